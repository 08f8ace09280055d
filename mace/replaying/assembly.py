"""A replay into a store, in parts: plans the parts, commits their results, and notes the progress for a resume.

    plan ──► PartTask ──► run_part, here or on a worker ──► PartDone ──► commit: in order, one after the other
                                                                          │
              STORE/runs, ledger, windows, delays  ◄── files moved ───────┤
              STORE/replay/plan.json, 00000.json ... ◄── how far ─────────┘

A part is committed when the part before it is committed and ended with the state that this part began with. Committed
rows stay. The note is written last, so that after a kill before it the part is done again, with the same rows under the
same names. When all parts are committed the notes are removed, and the store equals that of an uninterrupted replay.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Self

import pyarrow.parquet as pq

from collector.capture.cuts import Cut, cuts
from collector.reading.opening import is_url
from contracts.config import StoreConfig
from contracts.errors import CaptureError, Stopped, StoreError
from contracts.figures import Summary
from contracts.schema import SCHEMA_VERSION
from contracts.topology import Device
from contracts.windowtable import WindowTable
from correlator.engine import EngineConfig
from correlator.state import EngineState
from mace.replaying.journal import Committed, committed_from_json, committed_to_json, cut_from_json, cut_to_json
from mace.replaying.part import MACE_FORMAT, PartDone, PartTask, RecordedFile
from storage import segments, tables
from storage.embedded import ABOUT, check_schema, lock_store, schema_of
from storage.folding import fold_windows
from storage.places import Place, place_at
from storage.segments import HOUR_NS, NO_HOUR, UNFINISHED, by_hour

PART_BYTES: Final = 64 << 20
"""Size of a part: some 30 million records, a quarter of a minute's work. A kill loses no more than that, and a warm-up
is short compared with it."""
_PLAN: Final = f"{UNFINISHED}/plan.json"
_NOTES: Final = 3
"""Version of the notes. A replay with notes of another version cannot be resumed."""
_FLUSHES_A_PART: Final = 2
"""Flush numbers of a part: one for its own segments, one for the windows across its beginning."""


@dataclass(slots=True)
class _RecordingParts:
    """One recording of the replay."""

    file: RecordedFile
    cuts: list[Cut]
    first_flush: int
    committed: Committed = field(default_factory=Committed)

    @property
    def parts(self) -> int:
        return len(self.cuts) + 1

    @property
    def complete(self) -> bool:
        return self.committed.parts == self.parts

    def part_bytes(self, part: int) -> int:
        """Return the size of a part, in bytes of the file."""
        edges = [0, *(cut.position.offset for cut in self.cuts), self.file.bytes_total]
        return edges[part + 1] - edges[part]


class Assembly:
    """One replay, a context manager. A store can have one at a time.

    Raises `StoreError` if the directory is not a MACE store, if the store already holds one of the runs, or if it has
    an unfinished replay of other files.
    """

    def __init__(
        self,
        files: Sequence[RecordedFile],
        store: str | None,
        engine: EngineConfig,
        config: StoreConfig,
        *,
        resume: bool = False,
        part_bytes: int = PART_BYTES,
        warm_up_ns: int | None = None,
    ) -> None:
        """`store` is a path or URL; None computes windows and counts only. `warm_up_ns` defaults to two timeouts."""
        self._files, self._engine, self._config, self._resume = files, engine, config, resume
        self._part_bytes = part_bytes
        self._warm_up_ns = 2 * engine.timeout_ns if warm_up_ns is None else warm_up_ns
        self._place: Place | None = place_at(store, fsync=config.sync) if store is not None else None
        self._local = (
            Path(self._place.location) if self._place is not None and not is_url(self._place.location) else None
        )
        self._lock_fd = -1
        self._captures: list[_RecordingParts] = []
        self.warnings: list[str] = []

    def __enter__(self) -> Self:
        try:
            self._open()
        except BaseException:
            self._unlock()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self._place is not None and not self.parts_committed:
                self._place.remove(UNFINISHED)  # nothing is committed that a resume could use
        finally:
            self._unlock()

    # Progress -----------------------------------------------------------------------------------------

    @property
    def bytes_total(self) -> int:
        """Size of all recordings, bytes."""
        return sum(c.file.bytes_total for c in self._captures)

    @property
    def bytes_committed(self) -> int:
        """Size of the committed parts, bytes."""
        return sum(c.part_bytes(part) for c in self._captures for part in range(c.committed.parts))

    @property
    def parts_total(self) -> int:
        """Number of parts of all recordings."""
        return sum(c.parts for c in self._captures)

    @property
    def parts_committed(self) -> int:
        """Number of committed parts of all recordings."""
        return sum(c.committed.parts for c in self._captures)

    @property
    def complete(self) -> bool:
        """Whether every part is committed."""
        return all(c.complete for c in self._captures)

    def part_bytes(self, done: PartDone) -> int:
        """Return the size of a finished part, in bytes of its file."""
        return self._captures[done.capture].part_bytes(done.part)

    def summary(self) -> Summary:
        """Return the figures of all committed parts."""
        whole = Summary()
        for capture in self._captures:
            whole.merge(capture.committed.summary)
            whole.observed(capture.file.header.hooks)
        return whole

    # Tasks --------------------------------------------------------------------------------------------

    def tasks(self) -> Iterator[PartTask]:
        """Yield the tasks of parts that are not committed, in order.

        Each task is made when it is requested, and has the state at its beginning if that is known by then.
        """
        for number, capture in enumerate(self._captures):
            for part in range(capture.committed.parts, capture.parts):
                yield self.task(number, part)

    def task(self, number: int, part: int) -> PartTask:
        """Return the task of one part, with the state at its beginning if the part before it is committed."""
        capture = self._captures[number]
        known: EngineState | None = capture.committed.state if part == capture.committed.parts else None
        return PartTask(
            capture=number,
            part=part,
            file=capture.file,
            engine=self._engine,
            begin=capture.cuts[part - 1] if part else None,
            end_ns=capture.cuts[part].at_ns if part < len(capture.cuts) else None,
            state=known,
            store=self._place.location if self._place is not None else None,
            folder=f"{UNFINISHED}/staged",
        )

    def follows(self, done: PartDone) -> bool:
        """Return whether the part before is committed and ended with the state that this part began with."""
        committed = self._captures[done.capture].committed
        return done.part == committed.parts and done.began_with == committed.ended_with

    def next_part(self, number: int) -> int | None:
        """Return the part of a recording that is to be committed next; None if all are committed."""
        capture = self._captures[number]
        return None if capture.complete else capture.committed.parts

    # Committing ---------------------------------------------------------------------------------------

    def commit(self, done: PartDone) -> None:
        """Add a part's rows to the store. `follows` must hold, so a recording's parts are committed in order.

        Raises `StoreError` if the store cannot be written, `CaptureError` if the file's END disagrees with its records.
        """
        assert self.follows(done), "the part is not the next one, or began with another state"
        capture = self._captures[done.capture]
        last = done.part == capture.parts - 1
        before = capture.committed
        now, final, devices = before.with_part(done, last=last)
        if last and done.lost_told is not None and done.lost_told != now.ledger.lost:
            raise CaptureError(
                capture.file.name,
                capture.file.bytes_total,
                f"the END mark says {done.lost_told} records lost, but {now.ledger.lost} were",
            )
        try:
            self._store(capture, done, now, final, devices, last=last)
        except OSError as error:
            raise StoreError(
                f"{self._told_place}: cannot commit: {error.strerror or error}; the parts committed before stay"
                " readable: free space, then continue with --resume"
            ) from error
        capture.committed = now
        self.warnings += done.warnings

    def _store(
        self,
        capture: _RecordingParts,
        done: PartDone,
        now: Committed,
        final: WindowTable,
        devices: Sequence[Device],
        *,
        last: bool,
    ) -> None:
        place = self._place
        if place is None:
            return
        header = capture.file.header
        flush = capture.first_flush + _FLUSHES_A_PART * done.part
        if done.part == 0:
            self._put("runs", NO_HOUR, flush, tables.runs_table(header))
        entry = tables.LedgerRow(
            header,
            done.upto_utc_ns,
            now.ledger,
            packets=now.grades.packets,
            grades=now.grades,
            rows_stored=now.rows,
            rows_not_stored=0,
            closed=last,
            on_host_network=done.summary.sharers,
        )
        self._put("ledger", done.upto_utc_ns // HOUR_NS, flush, tables.ledger_table([entry], flush))
        for hour, chosen in by_hour(final.column("start_utc_ns")):
            windows = final if chosen is None else final[chosen]
            self._put("windows", hour, flush + 1, tables.windows_table(header, windows, devices))
        for staged in sorted(done.staged, key=lambda s: segments.TABLES.index(s.table)):
            place.move(staged.name, _segment_name(staged.table, staged.hour, flush, staged.rows))
        place.remove(done.folder)
        note = json.dumps(committed_to_json(now), separators=(",", ":"))
        place.write(f"{UNFINISHED}/{done.capture:05d}.json", note.encode())

    def _put(self, table: str, hour: int, flush: int, rows: Any) -> None:
        assert self._place is not None
        self._place.write(_segment_name(table, hour, flush, len(rows)), tables.encode(rows, table).to_pybytes())

    def remove_staged(self) -> None:
        """Remove rows of parts that are not committed, when no part is under way."""
        if self._place is not None:
            self._place.remove(f"{UNFINISHED}/staged")

    def told_progress(self) -> str:
        """Return how many parts are committed and how to go on, for the message of a replay that ends early."""
        parts = f"stopped after {self.parts_committed} of {self.parts_total} parts"
        return f"{parts}; the same command with --resume continues" if self._place is not None else parts

    def stopped(self) -> Stopped:
        """Return the error of a replay that was asked to stop."""
        return Stopped(self.told_progress())

    def finish(self) -> None:
        """Remove the notes, after every part was committed."""
        assert self.complete, "some parts are not committed"
        if self._place is not None:
            # The plan first: without it, leftover notes are not taken for a replay to resume.
            self._place.remove(_PLAN)
            self._place.remove(UNFINISHED)
        if self._local is not None:
            fold_windows(self._local, None, sys.maxsize, fsync=self._config.sync)
            self._retain()

    # Opening ------------------------------------------------------------------------------------------

    def _open(self) -> None:
        place = self._place
        if place is None:
            self._captures = self._planned(1)
            return
        try:
            if self._local is not None:
                self._open_local(self._local)
            else:
                self._open_remote(place)
            text = place.read(_PLAN)
            if text is not None:
                self._go_on(place, text)
                return
            place.remove(UNFINISHED)
            flush = segments.next_flush(self._local) if self._local is not None else 1
            self._refuse_known_runs(place)
            self._captures = self._planned(flush)
            place.write(_PLAN, json.dumps(self._plan()).encode())
        except OSError as error:
            raise StoreError(f"{self._told_place}: {error.strerror or error}") from error

    def _open_local(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        known = check_schema(root)
        strange = sorted(p.name for p in root.iterdir() if not p.name.startswith(("lock", "store.json")))
        if not known and strange:
            raise StoreError(f"{root}: not a MACE store, and not empty (found {strange[0]!r})")
        self._lock_fd = lock_store(root, "replay of " + ", ".join(file.header.run for file in self._files[:3]))
        if known < SCHEMA_VERSION:
            assert self._place is not None
            self._place.write("store.json", ABOUT)
        segments.remove_leftovers(root)
        self._retain()

    def _open_remote(self, place: Place) -> None:
        found = place.names()
        if not found:
            place.write("store.json", ABOUT)
        elif UNFINISHED not in found:
            raise StoreError(
                f"{place.location}: not empty (found {found[0]!r}); a replay to a URL needs an empty place"
            )
        elif schema_of(place.read("store.json") or b"", f"{place.location}/store.json") < SCHEMA_VERSION:
            place.write("store.json", ABOUT)

    def _go_on(self, place: Place, text: bytes) -> None:
        """Resume a stopped replay from its plan and notes."""
        if not self._resume:
            raise StoreError(
                f"{self._told_place}: a replay was stopped here; continue it with --resume, or name another directory"
            )
        try:
            plan = json.loads(text)
            flush = int(plan["flush"])
            found = [[cut_from_json(cut) for cut in capture["cuts"]] for capture in plan["captures"]]
            self._part_bytes, self._warm_up_ns = plan["part_bytes"], plan["warm_up_ns"]
            self._captures = self._placed(flush, found)
            if self._plan() != plan:
                raise StoreError(
                    f"{self._told_place}: a different replay was stopped here"
                    f" ({_difference(plan, self._plan())}); resume with the same files and options, or name another"
                    " directory"
                )
            for number, capture in enumerate(self._captures):
                note = place.read(f"{UNFINISHED}/{number:05d}.json")
                if note is not None:
                    capture.committed = committed_from_json(json.loads(note))
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{self._told_place}/{UNFINISHED}: damaged: {type(error).__name__}: {error}; replay into another"
                " directory"
            ) from error
        self.remove_staged()

    def _planned(self, flush: int) -> list[_RecordingParts]:
        return self._placed(flush, [self._cuts(file) for file in self._files])

    def _cuts(self, file: RecordedFile) -> list[Cut]:
        # With salvage the extent of damage is known only when everything before it was read, so there is one part.
        if file.format != MACE_FORMAT or file.options.salvage or file.bytes_total < self._part_bytes:
            return []
        return cuts(
            file.locations[0],
            part_bytes=self._part_bytes,
            align_ns=self._engine.slice_ns,
            warm_up_ns=self._warm_up_ns,
        )

    def _placed(self, flush: int, found: Sequence[list[Cut]]) -> list[_RecordingParts]:
        captures = []
        for file, its_cuts in zip(self._files, found, strict=False):
            captures.append(_RecordingParts(file, its_cuts, flush))
            flush += _FLUSHES_A_PART * (len(its_cuts) + 1)
        return captures

    def _plan(self) -> dict[str, Any]:
        captures = [
            {
                "files": list(c.file.locations),
                "bytes": c.file.bytes_total,
                "host": c.file.header.host,
                "run": c.file.header.run,
                "options": {name: str(value) for name, value in asdict(c.file.options).items()},
                "cuts": [cut_to_json(cut) for cut in c.cuts],
            }
            for c in self._captures
        ]
        return {
            "mace-replay": _NOTES,
            "flush": self._captures[0].first_flush if self._captures else 1,
            "part_bytes": self._part_bytes,
            "warm_up_ns": self._warm_up_ns,
            "engine": asdict(self._engine),
            "captures": captures,
        }

    def _refuse_known_runs(self, place: Place) -> None:
        """Raise `StoreError` for a run that is named twice or already stored, whose packets would count twice."""
        wanted = [(file.header.host, file.header.run) for file in self._files]
        for host, run in wanted:
            if wanted.count((host, run)) > 1:
                raise StoreError(f"run {run} of host {host} is in several of the files; its packets would count twice")
        if self._local is None:
            return
        for each in segments.listing(self._local, "runs"):
            data = place.read(str(each.path.relative_to(self._local)))
            try:
                rows = pq.read_table(io.BytesIO(data or b""), columns=["host", "run"]).to_pylist()
            except (OSError, ValueError):
                continue  # a damaged segment, which readers report, must not prevent storing new runs
            for row in rows:
                if (row["host"], row["run"]) in wanted:
                    raise StoreError(
                        f"{self._told_place}: already holds run {row['run']} of host {row['host']}; its packets would"
                        " count twice: name another directory"
                    )

    def _retain(self) -> None:
        config = self._config
        if self._local is not None and (config.max_age_s or config.max_bytes):
            segments.retain(self._local, time.time(), config.max_age_s, config.max_bytes)

    def _unlock(self) -> None:
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    @property
    def _told_place(self) -> str:
        return self._place.location if self._place is not None else "-"


def _segment_name(table: str, hour: int, flush: int, rows: int) -> str:
    return str(segments.segment(Path(), table, hour, flush, flush, rows).path)


def _difference(plan: dict[str, Any], now: dict[str, Any]) -> str:
    """Return the first difference between a stored plan and the present one, for a message."""
    if plan.get("mace-replay") != now["mace-replay"]:
        return "begun by another version of MACE"
    if plan.get("engine") != now["engine"]:
        return "with other correlator settings"
    for then, this in zip(plan.get("captures", []), now["captures"], strict=False):
        for name in ("files", "run", "bytes", "options"):
            if then.get(name) != this[name]:
                return f"{name}: {then.get(name)}, now {this[name]}"
    return f"{len(plan.get('captures', []))} files, now {len(now['captures'])}"
