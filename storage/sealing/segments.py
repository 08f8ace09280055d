"""Seals a store while it is written: statements of its segments, in `STORE/seal`.

A segment is named by its path in the store, and stated as [name, size, SHA-256 in hexadecimal].

    begin    subject "store", found: segments that were there before the store was sealed
    run      host, run, clock (as in a capture's HEADER): a writer has opened the store
             found: segments that an interrupted writer left without a statement
             undone: segments of merges that an interrupted writer had not stated, and which this one removed
    put      segment: written
    merged   segment: written from the rows of the segments named `of`, whose bytes were compared with their statements
    removed  segments (names): removed by retention, `why`: age or size
    end      host, run, clock: the writer has closed the store
    state    stands for all statements before it, whose lines are no longer kept: `before` of them, `segments` now,
             `found`: names of those segments that were found and not written, `removed`: [hour, segments, rows, why],
             `intruded`: segments of the `found` of a `run` after an `end`, `closed`: whether the last writer was,
             `ends`: hashes of the lines with which writers closed the store

A statement of a new segment follows its file; a statement that files go away precedes their removal. Whenever a writer
is killed, the store therefore agrees with its seal, except for a file or two that the next writer states or removes.

Most statements are of segments that merging soon replaces. Now and then a `state` takes the place of all lines.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, Final, TypeAlias

from contracts import clock
from contracts.errors import SealError, StoreError
from contracts.interfaces import StreamHeader
from contracts.wire import clock_fields
from storage import segments
from storage.sealing.keys import SealKey
from storage.sealing.log import SealWriter, Statement, has_statement, read_log
from storage.sealing.places import has_seal, seal_path
from storage.segments import SegmentFile

_LOG: Final = logging.getLogger(__name__)

_KEPT_LINES: Final = 4096
"""Lines after which a `state` may replace them: some 1.3 MB."""
_MOST_ENDS: Final = 10_000

Stated: TypeAlias = tuple[int, str]
"""Size and SHA-256 of a segment, by its statement."""


@dataclass(slots=True)
class StoreState:
    """What the statements so far add up to."""

    live: dict[str, Stated] = field(default_factory=dict)
    """Segments that should be in the store, by name."""
    gone: set[str] = field(default_factory=set)
    """Segments that were merged or removed, of the lines that are kept."""
    found: set[str] = field(default_factory=set)
    """Live segments that a writer found without a statement: nothing is known of them before that."""
    removed: dict[tuple[int, str], list[int]] = field(default_factory=dict)
    """Segments and rows that retention removed, by hour and reason."""
    merged: int = 0
    """Segments that merging has replaced, of the lines that are kept."""
    intruded: list[str] = field(default_factory=list)
    """Segments that appeared while the store was closed: not written by an interrupted writer, but by someone else."""
    ends: list[str] = field(default_factory=list)
    """Hashes of the lines with which writers closed the store."""
    runs: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)
    """Host, run and clock of each run, of the lines that are kept."""
    closed: bool = True
    """Whether the last writer has closed the store."""
    replaced: int = 0
    """Statements that a `state` has replaced."""
    lines: int = 0
    """Statements that are kept."""

    def take(self, statement: Statement) -> None:
        """Add a statement. Raises `SealError` for one that its writer cannot have signed."""
        self.lines += 1
        match statement.kind:
            case "begin":
                self._found(statement)
            case "state":
                self._state(statement)
            case "run":
                if self.ends and self.closed:
                    self.intruded += [_segment(statement, given)[0] for given in statement.many("found")]
                self.closed = False
                self.runs.append((statement.text("host"), statement.text("run"), statement.fields.get("clock", {})))
                self._found(statement)
            case "put":
                name, stated = _segment(statement, statement.fields.get("segment"))
                self.live[name] = stated
                self.gone.discard(name)
            case "merged":
                name, stated = _segment(statement, statement.fields.get("segment"))
                for each in _names(statement, "of"):
                    self._away(each)
                    self.merged += 1
                self.live[name] = stated
                self.gone.discard(name)
            case "removed":
                why = statement.text("why")
                for each in _names(statement, "segments"):
                    self._away(each)
                    known = parsed(each)
                    counts = self.removed.setdefault((known.hour if known else segments.NO_HOUR, why), [0, 0])
                    counts[0] += 1
                    counts[1] += known.rows if known else 0
            case "end":
                self.closed = True
                self.ends.append(statement.head)
                del self.ends[:-_MOST_ENDS]
            case other:
                raise SealError(f"statement {statement.number}: unknown kind {other!r:.20}: a newer MACE wrote it")

    def _found(self, statement: Statement) -> None:
        for given in statement.many("found"):
            name, stated = _segment(statement, given)
            self.live[name] = stated
            self.found.add(name)

    def _state(self, statement: Statement) -> None:
        self.live = dict(_segment(statement, given) for given in statement.many("segments"))
        self.found = set(_names(statement, "found"))
        self.gone, self.merged, self.runs = set(), 0, []
        self.replaced, self.lines = statement.whole("before"), 1
        self.ends, self.intruded = _names(statement, "ends"), _names(statement, "intruded")
        self.closed = statement.fields.get("closed") is True
        self.removed = {}
        for given in statement.many("removed"):
            match given:
                case [int(hour), int(count), int(rows), str(why)]:
                    self.removed[hour, why] = [count, rows]
                case _:
                    raise SealError(f"statement {statement.number}: removed: {given!r:.40}")

    def _away(self, name: str) -> None:
        self.live.pop(name, None)
        self.found.discard(name)
        self.gone.add(name)

    def fields(self) -> dict[str, Any]:
        """Return the fields of a `state`."""
        return {
            "subject": "store",
            "before": self.replaced + self.lines,
            "segments": [[name, *stated] for name, stated in self.live.items()],
            "found": sorted(self.found),
            "removed": [[hour, count, rows, why] for (hour, why), (count, rows) in self.removed.items()],
            "intruded": self.intruded,
            "ends": self.ends,
            "closed": self.closed,
        }


def _segment(statement: Statement, given: Any) -> tuple[str, Stated]:
    match given:
        case [str(name), int(size), str(digest)]:
            return name, (size, digest)
    raise SealError(f"statement {statement.number} ({statement.kind}): no segment: {given!r:.40}")


def _names(statement: Statement, field_: str) -> list[str]:
    found = statement.many(field_)
    if not all(type(name) is str for name in found):
        raise SealError(f"statement {statement.number} ({statement.kind}): {field_}: expected names")
    return found


def parsed(name: str) -> SegmentFile | None:
    """Return the segment that a name in a store describes; None for another name."""
    return segments.named(Path(name))


def digest_of(path: Path) -> Stated:
    """Return a file's size and SHA-256. OSErrors pass."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest


class StoreSeal:
    """The seal of a store that this process writes, and whose lock it holds. Thread-safe; OSErrors pass."""

    def __init__(self, root: Path, writer: SealWriter, state: StoreState, *, sync: bool) -> None:
        self._root, self._writer, self._state, self._sync = root, writer, state, sync
        self._lock = Lock()

    @classmethod
    def open(cls, root: Path, key: SealKey, header: StreamHeader, *, sync: bool) -> StoreSeal:
        """Begin or continue a store's seal for a run. Call before covered segments are removed.

        Raises `SealError` for a seal of another key, or one that is broken.
        """
        path, state = seal_path(root), StoreState()
        known = has_seal(root) and has_statement(path)
        if known:
            log = read_log(path)
            for statement in log.statements():
                state.take(statement)
            writer = SealWriter.resume(log, key, sync=sync)
        else:  # an empty file is one whose writer was killed before its first statement
            writer = SealWriter.create(path, key, overwrite=True, sync=sync)
        made = cls(root, writer, state, sync=sync)
        try:
            undone = []
            if known:
                made._finish_removals()
                undone = made._undo_merges()
            else:
                if sync:
                    segments.sync_directory(root)
                made._append("begin", subject="store", found=made._unstated())
            told = clock_fields(header.clock)
            made._append("run", host=header.host, run=header.run, clock=told, found=made._unstated(), undone=undone)
        except BaseException:
            writer.close()
            raise
        return made

    def put(self, segment: SegmentFile, data: memoryview) -> None:
        """State a segment that was written."""
        self._append("put", segment=[self._name(segment.path), len(data), hashlib.sha256(data).hexdigest()])

    def check(self, segment: SegmentFile) -> None:
        """Raise `StoreError` if a segment is not as it was stated, so that merging does not seal what was edited."""
        stated = self._state.live.get(self._name(segment.path))
        if stated is None or stated != digest_of(segment.path):
            raise StoreError(f"{segment.path}: not as its seal states: it stays as it is, for `mace verify-seal`")

    def merged(self, segment: SegmentFile, of: Sequence[SegmentFile]) -> None:
        """State a segment that was merged from others, before those are removed."""
        names = [self._name(each.path) for each in of]
        self._append("merged", segment=[self._name(segment.path), *digest_of(segment.path)], of=names)

    def removed(self, found: Iterable[SegmentFile], why: str) -> None:
        """State that retention is about to remove segments."""
        self._append("removed", segments=[self._name(each.path) for each in found], why=why)

    def shorten(self) -> None:
        """Let one `state` take the place of many lines."""
        with self._lock:
            if self._state.lines < _KEPT_LINES or self._state.lines < 4 * len(self._state.live):
                return
            fields = self._state.fields()
            line, head = self._writer.signed("state", **fields)
            number = self._writer.number + 1
            segments.write_whole(self._writer.path, segments.write_bytes(memoryview(line)), fsync=self._sync)
            self._writer.reopen(number, head)
            self._state.take(Statement(number, "state", 0, fields, head))

    def close(self, header: StreamHeader | None) -> None:
        """State that the writer has closed the store in order (with its header), and close the seal's file."""
        try:
            if header is not None:
                told = clock_fields(clock.measure())
                self._append("end", host=header.host, run=header.run, clock=told)
        finally:
            self._writer.close()

    def _append(self, kind: str, **fields: Any) -> None:
        with self._lock:
            self._writer.append(kind, **fields)
            self._state.take(Statement(self._writer.number, kind, 0, fields, self._writer.head))

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self._root))

    def _unstated(self) -> list[list[Any]]:
        """Return the live segments without a statement."""
        return [
            [name, *digest_of(each.path)]
            for table in segments.TABLES
            for each in segments.listing(self._root, table)
            if (name := self._name(each.path)) not in self._state.live
        ]

    def _finish_removals(self) -> None:
        """Remove segments that retention has stated to be gone, and was killed before it removed them."""
        for table in segments.TABLES:
            for each in segments.listing(self._root, table):
                if self._name(each.path) in self._state.gone:
                    each.path.unlink()

    def _undo_merges(self) -> list[list[Any]]:
        """Remove segments without a statement that cover stated ones: of merges that a killed writer has not stated.

        The covered segments are still there, because they are removed only after that statement.
        """
        live = self._state.live
        undone = []
        for table in segments.TABLES:
            for each in segments.listing(self._root, table):
                name = self._name(each.path)
                if name not in live and any(
                    (other := parsed(known)) is not None
                    and (other.table, other.hour) == (table, each.hour)
                    and each.first <= other.first
                    and other.last <= each.last
                    for known in live
                ):
                    undone.append([name, *digest_of(each.path)])
                    each.path.unlink()
                    _LOG.info("%s: removed a merge that an interrupted writer has not stated", each.path)
        return undone
