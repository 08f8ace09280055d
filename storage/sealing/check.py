"""Compares a capture file or a store with its seal, and names every difference.

What a seal can show, and what it cannot (a seal and its subject that are both cut at one place look like those of a
killed writer), is in docs/seal.md.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

from contracts import wire
from contracts.clock import ClockPair
from contracts.errors import SealError, WireError
from storage import segments
from storage.sealing.keys import PublicKey
from storage.sealing.log import SealLog, Statement, numbers, read_log
from storage.sealing.places import has_seal, seal_path
from storage.sealing.segments import Stated, StoreState, digest_of, parsed

_MOST_FINDINGS: Final = 1000
"""Findings that are kept one by one; further ones are only counted."""


class Finding(NamedTuple):
    """One difference between a seal and its subject."""

    kind: str
    """`altered`, `missing`, `moved`, `repeated`, `inserted`, `foreign` or `seal` (a fault of the seal's own lines)."""
    what: str
    """The frames, bytes or segments."""
    from_utc_ns: int | None
    """Time from which the records are that it concerns; None if they have no times, or nothing says so."""
    to_utc_ns: int | None

    def __str__(self) -> str:
        told = f"{self.kind}: {self.what}"
        if self.from_utc_ns is None or self.to_utc_ns is None:
            return told
        return f"{told}; records from {_utc(self.from_utc_ns)} to {_utc(self.to_utc_ns)}"


_ATTEMPTS: Final = 5
"""Times that a store is read whose writer has merged or removed segments after its statements were read."""


@dataclass(slots=True)
class Checked:
    """The result of comparing a capture file or a store with its seal."""

    path: Path
    subject: str
    """`capture` or `store`."""
    key: PublicKey
    """The key that has signed."""
    known_key: bool | None
    """Whether it is the expected key; None if none was given to compare with."""
    findings: list[Finding] = field(default_factory=list)
    more_findings: int = 0
    """Findings beyond those in the list."""
    notes: list[str] = field(default_factory=list)
    """What an interruption, merging or retention has left, which is no difference."""
    statements: int = 0
    verified: int = 0
    """Frames or segments whose bytes are as they were stated."""
    bytes: int = 0
    """Their bytes."""
    unsealed: int = 0
    """Frames or segments that no statement mentions, behind the last one: a writer was killed, or writes now."""
    closed: bool = False
    """Whether the writer has stated its end."""
    head: str = ""
    """SHA-256 of the seal's last line."""
    heads: set[str] = field(default_factory=set)
    """SHA-256 of every line, and of the lines at which writers closed the store."""
    clocks: list[tuple[str, ClockPair]] = field(default_factory=list)
    """Clock pairs, each with the instant at which it was read."""

    @property
    def state(self) -> str:
        """`intact`: as sealed, to its end; `open`: as sealed, without the writer's end; `broken`; `other key`."""
        if self.findings:
            return "broken"
        if self.known_key is False:
            return "other key"
        return "intact" if self.closed and not self.unsealed else "open"

    def find(self, kind: str, what: str, from_utc_ns: int | None = None, to_utc_ns: int | None = None) -> None:
        """Note a difference."""
        if len(self.findings) < _MOST_FINDINGS:
            self.findings.append(Finding(kind, what, from_utc_ns, to_utc_ns))
        else:
            self.more_findings += 1

    def line(self) -> str:
        """Return the state in one line."""
        count = len(self.findings) + self.more_findings
        units = "frames" if self.subject == "capture" else "segments"
        told = {
            "intact": f"intact: {self.verified:,} {units}, {self.bytes:,} bytes, are as sealed, to the seal's end",
            "open": f"open: {self.verified:,} {units}, {self.bytes:,} bytes, are as sealed; their writer was killed, or"
            " writes still, or seal and data were both cut: nothing vouches for what came after",
            "broken": "broken: " + ("1 difference" if count == 1 else f"{count:,} differences"),
            "other key": "signed by another key than the expected one",
        }[self.state]
        whose = {None: "not compared with a key of yours", True: "the expected key", False: "not the expected key"}
        return f"seal {told}; key {self.key.fingerprint} ({whose[self.known_key]})"

    def as_dict(self) -> dict[str, Any]:
        """Return the result as JSON."""
        return {
            "path": str(self.path),
            "subject": self.subject,
            "state": self.state,
            "key": self.key.fingerprint,
            "expected_key": self.known_key,
            "statements": self.statements,
            "verified": self.verified,
            "bytes": self.bytes,
            "unsealed": self.unsealed,
            "closed": self.closed,
            "head": self.head,
            "findings": [each._asdict() for each in self.findings],
            "more_findings": self.more_findings,
            "notes": self.notes,
            "clocks": [{"when": when, **wire.clock_fields(pair)} for when, pair in self.clocks],
        }


def check(path: Path, *, key: PublicKey | None = None) -> Checked:
    """Compare a capture file or a store with its seal. `key` is the operator's, known from elsewhere.

    Raises `SealError` if there is no seal, or the seal or the data cannot be read.
    """
    if not path.exists():
        raise SealError(f"{path}: no such file or store")
    if not has_seal(path):
        raise SealError(
            f"{path}: not sealed (there is no {seal_path(path)}); `mace record --seal KEY` seals a new recording"
        )
    digests: dict[str, Stated] = {}
    for attempts_left in reversed(range(_ATTEMPTS)):
        log = read_log(seal_path(path))
        known = None if key is None else key == log.key
        found = Checked(path, "store" if path.is_dir() else "capture", log.key, known)
        try:
            if not path.is_dir():
                _capture(found, log)
            elif _store(found, log, digests) and attempts_left:
                continue
        except OSError as error:
            raise SealError(f"{error.filename or path}: cannot be read: {error.strerror or error}") from error
        found.head = log.head
        return found
    raise AssertionError("the last attempt returns")


def _read(found: Checked, log: SealLog) -> Iterator[Statement]:
    """Yield a log's statements, note its clocks, and when they end its faults."""
    for statement in log.statements():
        if statement.number == 0 or statement.kind == "state":
            subject = statement.text("subject")
            if subject != found.subject:
                raise SealError(f"{log.path}: the seal of a {subject}, beside a {found.subject}")
        found.statements += 1
        found.heads.add(statement.head)
        if isinstance(given := statement.fields.get("clock"), dict):
            try:
                found.clocks.append((f"{statement.kind} {_utc(statement.utc_ns)}", wire.clock_of(given)))
            except WireError as error:
                raise SealError(f"{log.path}: statement {statement.number}: {error}") from error
        yield statement
    for fault in log.faults:
        found.find("seal", fault)
    if log.cut_bytes:
        found.notes.append(f"the seal ends within a line ({log.cut_bytes} bytes): its writer was killed")
    # A store may have been written by hundreds of runs: the first and the last say how the clocks were.
    del found.clocks[1:-1]


# --- captures ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Sealed:
    """A frame as it was stated."""

    number: int
    at: int
    size: int
    from_ns: int | None
    to_ns: int | None


@dataclass(frozen=True, slots=True)
class _Piece:
    """Bytes of a file: a frame with an intact head, or what lies between frames."""

    at: int
    size: int
    sequence: int | None
    """Number of the frame by its head; None for bytes that are no frame."""
    digest: str


def _capture(found: Checked, log: SealLog) -> None:
    sealed: dict[str, _Sealed] = {}
    file_head, whose, ended = wire.FILE_HEAD.hex(), "", None
    for statement in _read(found, log):
        match statement.kind:
            case "begin":
                file_head = statement.text("file_head")
                whose = f"run {statement.text('run')} of host {statement.text('host')}"
            case "frame":
                times = [statement.whole(name) if name in statement.fields else None for name in ("from_ns", "to_ns")]
                number, at, size = (statement.whole(name) for name in ("frame", "at", "size"))
                sealed[statement.text("sha256")] = _Sealed(number, at, size, *times)
            case "end":
                found.closed, ended = True, statement.whole("frames")
                if statement.fields.get("whole") is not True:
                    found.notes.append("the recording failed before its end: the capture has no END")
            case other:
                raise SealError(f"{log.path}: statement {statement.number}: unknown kind {other!r:.20}")
    if ended is not None and ended != len(sealed):
        found.find("seal", f"{ended} frames were sealed, {len(sealed)} statements of frames are here")
    with closing(_mapped(found.path)) as data:
        size = len(wire.FILE_HEAD)
        if data[:size].hex() != file_head:
            found.find("altered", f"the file's signature, bytes 0 to {size - 1}")
        _compare(found, sealed, _pieces(data, size), whose)


def _compare(found: Checked, sealed: dict[str, _Sealed], pieces: Iterator[_Piece], whose: str) -> None:
    left = dict(sealed)
    last = max((each.number for each in sealed.values()), default=-1)
    odd: list[_Piece] = []
    newest = -1
    for piece in pieces:
        stated = sealed.get(piece.digest)
        if stated is None:
            if len(odd) < _MOST_FINDINGS:
                odd.append(piece)
            else:
                found.more_findings += 1
        elif left.pop(piece.digest, None) is None:
            found.find("repeated", f"frame {stated.number} once more at byte {piece.at}", stated.from_ns, stated.to_ns)
        else:
            found.verified += 1
            found.bytes += piece.size
            if stated.number < newest:
                found.find(
                    "moved",
                    f"frame {stated.number} at byte {piece.at}, after frame {newest}",
                    stated.from_ns,
                    stated.to_ns,
                )
            newest = max(newest, stated.number)
    if sealed and not found.verified and odd and odd[0].sequence == 0:
        found.more_findings = 0
        found.find("foreign", f"the seal is of another recording ({whose}): no frame of the file is one that it states")
        return
    absent = {each.number: each for each in left.values()}
    for piece in odd:
        _odd(found, piece, absent, last)
    for run in _consecutive(sorted(absent.values(), key=lambda each: each.number)):
        times = [t for each in run for t in (each.from_ns, each.to_ns) if t is not None]
        told = numbers("frame", range(run[0].number, run[-1].number + 1))
        found.find("missing", told, min(times, default=None), max(times, default=None))


def _odd(found: Checked, piece: _Piece, absent: dict[int, _Sealed], last: int) -> None:
    """Say what bytes are that no statement knows: an altered frame, an inserted one, or what came after the seal."""
    where = f"bytes {piece.at} to {piece.at + piece.size - 1}"
    if piece.sequence is not None:
        if (was := absent.pop(piece.sequence, None)) is not None:
            found.find("altered", f"frame {was.number}, {where}", was.from_ns, was.to_ns)
        elif piece.sequence > last and not found.closed:
            found.unsealed += 1
        else:
            found.find("inserted", f"a frame with the number {piece.sequence}, {where}")
        return
    within = [each for each in absent.values() if each.at < piece.at + piece.size and piece.at < each.at + each.size]
    for each in within:
        del absent[each.number]
        found.find("altered", f"frame {each.number}, {where} are no frame any more", each.from_ns, each.to_ns)
    if not within and not found.closed and not absent:
        found.notes.append(f"{where} are an incomplete frame: the recording's writer was killed")
    elif not within:
        found.find("inserted", f"{where} are no frame")


def _consecutive(frames: Sequence[_Sealed]) -> Iterator[list[_Sealed]]:
    run: list[_Sealed] = []
    for each in frames:
        if run and each.number != run[-1].number + 1:
            yield run
            run = []
        run.append(each)
    if run:
        yield run


def _pieces(data: Any, at: int) -> Iterator[_Piece]:
    """Cut a capture's bytes into frames by their heads, and what lies between."""
    with memoryview(data) as view:
        size = len(view)
        while at < size:
            end, sequence = _frame_end(data, at, size)
            yield _Piece(at, end - at, sequence, hashlib.sha256(view[at:end]).hexdigest())
            at = end


def _frame_end(data: Any, at: int, size: int) -> tuple[int, int | None]:
    """Return where the frame at `at` ends and its number; without a frame there, where the next one may begin."""
    try:
        head = wire.parse_head(data[at : at + wire.HEAD_SIZE])
        if (end := at + wire.HEAD_SIZE + head.stored) <= size:
            return end, head.sequence
    except WireError:
        pass
    after = at
    while (after := data.find(wire.SYNC, after + 1)) >= 0:
        try:
            wire.parse_head(data[after : after + wire.HEAD_SIZE])
        except WireError:
            continue
        return after, None
    return size, None


def _mapped(path: Path) -> Any:
    with path.open("rb") as file:
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:  # an empty file cannot be mapped
            if path.stat().st_size:
                raise SealError(f"{path}: cannot be mapped: {error}") from error
            return mmap.mmap(-1, 1)


# --- stores ------------------------------------------------------------------------------------------------------


def _store(found: Checked, log: SealLog, digests: dict[str, Stated]) -> bool:
    """Compare a store; returns whether to try again, because a writer may have moved on meanwhile.

    `digests` keeps those of segments already read, by name.
    """
    state = StoreState()
    for statement in _read(found, log):
        state.take(statement)
    found.heads.update(state.ends)
    found.closed = state.closed
    here = {
        str(each.path.relative_to(found.path)): covered
        for table in segments.TABLES
        for covered in (False, True)
        for each in segments.listing(found.path, table, covered=covered)
    }
    for name, stated in state.live.items():
        _segment(found, name, stated, digests)
    if not state.closed and any(each.kind == "missing" for each in found.findings):
        return True
    for name in sorted(here.keys() - state.live.keys()):
        if name in state.gone:
            if not here[name]:
                found.notes.append(f"segment {name} is there, though its removal is stated: its writer was killed")
        elif state.closed:
            found.find("inserted", f"segment {name}, which no statement mentions", *_hour(name))
        else:
            found.unsealed += 1
            found.notes.append(f"not sealed: segment {name}, written after the last statement")
    for name in state.intruded:
        found.find("inserted", f"segment {name}, which appeared while the store was closed", *_hour(name))
    if state.merged:
        found.notes.append(f"{state.merged:,} segments were merged into others, as is stated")
    for (hour, why), (count, rows) in sorted(state.removed.items()):
        when = "" if hour == segments.NO_HOUR else f" of the hour from {_utc(hour * segments.HOUR_NS)}"
        found.notes.append(f"retention removed {count:,} segments with {rows:,} rows{when} (limit of {why})")
    if state.found:
        found.notes.append(
            f"{len(state.found):,} segments were there before sealing began, or after an interruption: the seal vouches"
            " for them only since"
        )
    return False


def _segment(found: Checked, name: str, stated: Stated, digests: dict[str, Stated]) -> None:
    known = parsed(name)
    if known is None:
        raise SealError(f"{found.path}: the seal names {name!r:.80}, which is no segment")
    try:
        is_now = digests.get(name) or digest_of(found.path / name)
    except FileNotFoundError:
        found.find("missing", f"segment {name}, {known.rows:,} rows", *_hour(name))
        return
    digests[name] = is_now
    if is_now != stated:
        size = "" if is_now[0] == stated[0] else f", {is_now[0]:,} bytes, {stated[0]:,} were sealed"
        found.find("altered", f"segment {name}, {known.rows:,} rows{size}", *_hour(name))
        return
    found.verified += 1
    found.bytes += stated[0]


def _hour(name: str) -> tuple[int | None, int | None]:
    """Return the hour of a segment, by its name, as UTC in ns."""
    known = parsed(name)
    if known is None or known.hour == segments.NO_HOUR:
        return None, None
    return known.hour * segments.HOUR_NS, (known.hour + 1) * segments.HOUR_NS - 1


def _utc(ns: int) -> str:
    try:
        when = datetime.fromtimestamp(ns // 1_000_000_000, UTC)
    except (ValueError, OverflowError, OSError):
        return f"{ns} ns"
    return f"{when:%Y-%m-%d %H:%M:%S}.{ns % 1_000_000_000 // 1000:06d} UTC"
