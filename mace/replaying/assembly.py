"""A replay into a store, in parts: plans them, commits what was done, and remembers how far it has come.

    plan ──► PartTask ──► run_part, here or on a worker ──► PartDone ──► commit: in order, one after the other
                                                                          │
              STORE/runs, ledger, windows, delays  ◄── files moved ───────┤
              STORE/replay/plan.json, 00000.json ... ◄── how far ─────────┘

A part is committed when the one before it is and the state it began with is the state that one ended with. What is
committed stays; the note of it comes last, so that a kill between leaves a part that is done once more, with the same
rows under the same names. When all is committed the notes go, and the store is what an uninterrupted replay leaves.
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Self

import pyarrow.parquet as pq

from collector.capture.cuts import Cut, cuts
from collector.reading.opening import is_url
from contracts.config import StoreConfig
from contracts.errors import CaptureError, StoreError
from contracts.figures import Summary
from contracts.schema import SCHEMA_VERSION
from contracts.topology import Device
from contracts.windowtable import WindowTable
from correlator.engine import EngineConfig
from correlator.state import EngineState
from mace.replaying.journal import Committed, committed_from_json, committed_to_json, cut_from_json, cut_to_json
from mace.replaying.part import MACE_FORMAT, PartDone, PartTask, RecordedFile
from storage import segments, tables
from storage.embedded import check_schema, lock_store
from storage.places import Place, place_at
from storage.segments import HOUR_NS, NO_HOUR, UNFINISHED, by_hour

PART_BYTES: Final = 64 << 20
"""Some 30 million records, a quarter of a minute's work: what a kill costs at most, and long beside a warm-up."""
_PLAN: Final = f"{UNFINISHED}/plan.json"
_NOTES: Final = 2
"""Version of what is in the notes. A replay that another version has begun is not gone on with."""
_FLUSHES_A_PART: Final = 2
"""A part's own segments, and those of the windows across its beginning."""


@dataclass(slots=True)
class _Capture:
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
        """How much of the file a part is."""
        edges = [0, *(cut.position.offset for cut in self.cuts), self.file.bytes_total]
        return edges[part + 1] - edges[part]


class Assembly:
    """One replay. `open` first, `close` last; a context manager. One at a time in a store.

    Raises `StoreError` where the store is another's, holds a run of these already, or has an unfinished replay of
    something else.
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
        """`store`: path or URL; None computes windows and counts alone. `warm_up_ns`: two timeouts, if not given."""
        self._files, self._engine, self._config, self._resume = files, engine, config, resume
        self._part_bytes = part_bytes
        self._warm_up_ns = 2 * engine.timeout_ns if warm_up_ns is None else warm_up_ns
        self._place: Place | None = place_at(store, fsync=config.sync) if store is not None else None
        self._local = (
            Path(self._place.location) if self._place is not None and not is_url(self._place.location) else None
        )
        self._lock_fd = -1
        self._captures: list[_Capture] = []
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
                self._place.remove(UNFINISHED)  # nothing that could be gone on with
        finally:
            self._unlock()

    # How far it is ------------------------------------------------------------------------------------

    @property
    def bytes_total(self) -> int:
        """Of all recordings."""
        return sum(c.file.bytes_total for c in self._captures)

    @property
    def bytes_committed(self) -> int:
        """Of the parts that are committed."""
        return sum(c.part_bytes(part) for c in self._captures for part in range(c.committed.parts))

    @property
    def parts_total(self) -> int:
        """Of all recordings."""
        return sum(c.parts for c in self._captures)

    @property
    def parts_committed(self) -> int:
        """Of all recordings."""
        return sum(c.committed.parts for c in self._captures)

    @property
    def complete(self) -> bool:
        """Whether all is committed."""
        return all(c.complete for c in self._captures)

    def part_bytes(self, done: PartDone) -> int:
        """How much of its file a part is."""
        return self._captures[done.capture].part_bytes(done.part)

    def summary(self) -> Summary:
        """All that is committed."""
        whole = Summary()
        for capture in self._captures:
            whole.merge(capture.committed.summary)
        return whole

    # Tasks --------------------------------------------------------------------------------------------

    def tasks(self) -> Iterator[PartTask]:
        """What is left to do, in order, each as it is when it is asked for: with the state, where that is known."""
        for number, capture in enumerate(self._captures):
            for part in range(capture.committed.parts, capture.parts):
                yield self.task(number, part)

    def task(self, number: int, part: int) -> PartTask:
        """One part, with the state at its beginning if the part before it is committed."""
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
        """Whether the part began with what the one before it, which is committed, ended with."""
        committed = self._captures[done.capture].committed
        return done.part == committed.parts and done.began_with == committed.ended_with

    def next_part(self, number: int) -> int | None:
        """The part of a recording that is to be committed next; None if it is complete."""
        capture = self._captures[number]
        return None if capture.complete else capture.committed.parts

    # Committing ---------------------------------------------------------------------------------------

    def commit(self, done: PartDone) -> None:
        """Make a part's rows a part of the store. Of each recording in order; `follows` must hold."""
        assert self.follows(done), "not the next part, or not from the same state"
        capture = self._captures[done.capture]
        last = done.part == capture.parts - 1
        before = capture.committed
        now, final, devices = before.with_part(done, last=last)
        if last and done.lost_told is not None and done.lost_told != now.ledger.lost:
            raise CaptureError(
                capture.file.name,
                capture.file.bytes_total,
                f"END of {done.lost_told} records lost, but there were {now.ledger.lost}",
            )
        try:
            self._store(capture, done, now, final, devices, last=last)
        except OSError as error:
            raise StoreError(
                f"{self._told_place}: cannot commit: {error.strerror or error}; what was committed before stays"
                " readable: free space, then go on with --resume"
            ) from error
        capture.committed = now
        self.warnings += done.warnings

    def _store(
        self,
        capture: _Capture,
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

    def finish(self) -> None:
        """All is committed: take away the notes."""
        assert self.complete, "some parts are not committed"
        if self._place is not None:
            # The plan first: without it the notes are no replay that could be gone on with.
            self._place.remove(_PLAN)
            self._place.remove(UNFINISHED)
        if self._local is not None:
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
        if not known:
            assert self._place is not None
            self._place.write("store.json", _about())
        segments.remove_leftovers(root)
        self._retain()

    def _open_remote(self, place: Place) -> None:
        found = place.names()
        if not found:
            place.write("store.json", _about())
        elif UNFINISHED not in found:
            raise StoreError(
                f"{place.location}: not empty (found {found[0]!r}); a replay to a URL makes a dataset anew"
            )

    def _go_on(self, place: Place, text: bytes) -> None:
        """Take up what a stopped replay has left."""
        if not self._resume:
            raise StoreError(
                f"{self._told_place}: a replay was stopped here; go on with --resume, or name another directory"
            )
        try:
            plan = json.loads(text)
            flush = int(plan["flush"])
            found = [[cut_from_json(cut) for cut in capture["cuts"]] for capture in plan["captures"]]
            self._part_bytes, self._warm_up_ns = plan["part_bytes"], plan["warm_up_ns"]
            self._captures = self._placed(flush, found)
            if self._plan() != plan:
                raise StoreError(
                    f"{self._told_place}: the replay that was stopped here was another one"
                    f" ({_difference(plan, self._plan())}); go on with the same files and options, or name another"
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
        place.remove(f"{UNFINISHED}/staged")

    def _planned(self, flush: int) -> list[_Capture]:
        return self._placed(flush, [self._cuts(file) for file in self._files])

    def _cuts(self, file: RecordedFile) -> list[Cut]:
        # What salvage leaves out is only known when all before it was read.
        if file.format != MACE_FORMAT or file.options.salvage or file.bytes_total < self._part_bytes:
            return []
        return cuts(
            file.locations[0],
            part_bytes=self._part_bytes,
            align_ns=self._engine.slice_ns,
            warm_up_ns=self._warm_up_ns,
        )

    def _placed(self, flush: int, found: Sequence[list[Cut]]) -> list[_Capture]:
        captures = []
        for file, its_cuts in zip(self._files, found, strict=False):
            captures.append(_Capture(file, its_cuts, flush))
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
        """The same capture stored twice would count every packet twice."""
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
                continue  # readers report it; it must not keep new runs from being stored
            for row in rows:
                if (row["host"], row["run"]) in wanted:
                    raise StoreError(
                        f"{self._told_place}: already holds run {row['run']} of host {row['host']}; its packets would"
                        " count twice: name another directory"
                    )

    def _retain(self) -> None:
        config = self._config
        if self._local is not None and (config.max_age_days or config.max_size_gib):
            segments.retain(
                self._local,
                time.time(),
                config.max_age_days * 86_400 or None,
                int(config.max_size_gib * 2**30) or None,
            )

    def _unlock(self) -> None:
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    @property
    def _told_place(self) -> str:
        return self._place.location if self._place is not None else "-"


def _about() -> bytes:
    return json.dumps({"format": "mace-store", "schema": SCHEMA_VERSION}).encode()


def _segment_name(table: str, hour: int, flush: int, rows: int) -> str:
    return str(segments.segment(Path(), table, hour, flush, flush, rows).path)


def _difference(plan: dict[str, Any], now: dict[str, Any]) -> str:
    """What of a plan is no longer so, for a person."""
    if plan.get("mace-replay") != now["mace-replay"]:
        return "begun by another version of MACE"
    if plan.get("engine") != now["engine"]:
        return "other correlator settings"
    for then, this in zip(plan.get("captures", []), now["captures"], strict=False):
        for name in ("files", "run", "bytes", "options"):
            if then.get(name) != this[name]:
                return f"{name}: {then.get(name)}, now {this[name]}"
    return f"{len(plan.get('captures', []))} files, now {len(now['captures'])}"
