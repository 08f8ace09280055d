"""One part of a recording, worked on by itself: in this process, or in one that only gets a `PartTask`.

    capture:   ├────── part 0 ──────┤T1├────── part 1 ──────┤T2├───── part 2 ─────┤
    engine:    nothing ─────► state at T1 ─────► state at T2 ─────► finish

What crosses a cut is in the engine's state and in the windows that lie across it. A part that is given the state at its
beginning goes on from it. One that is not *supposes* it: it begins to read a little before its cut, and has the same
state by then, if no packet was under way for longer than that. Whether it had, is found out by comparing the digests of
the state it began with and of the one that the part before it ended with; so the answer is never a guess.

A part depends on its task alone: done twice, or by two workers at once, it gives the same rows.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from collector.capture.cuts import Cut, stretch
from collector.capture.source import Capture
from collector.files import BY_NAME, FileOptions, FileReader
from collector.memory import keep_freed_memory
from collector.reading.opening import filesystem, is_url
from contracts.errors import WireError
from contracts.figures import Summary
from contracts.interfaces import Progress, StreamHeader
from contracts.ledger import Ledger
from contracts.records import Batch
from contracts.results import Results
from contracts.schema import Grades
from contracts.topology import Device, Topology
from contracts.windowtable import WindowTable
from correlator.engine import Engine, EngineConfig
from correlator.feeder import Feeder
from correlator.state import EngineState
from storage.part_writer import PartWriter, Staged
from storage.places import place_at

MACE_FORMAT: Final = "mace"
"""Row of `collector.files.FORMATS` whose files can be begun in the middle."""

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
"""Numbers of mallopt(3)."""
_KEPT_BYTES: Final = 32 << 20
"""The largest block that the C library can be told to keep (DEFAULT_MMAP_THRESHOLD_MAX); twice that is what it sets the
other threshold to by itself."""

Told = Callable[[int, int], None]
"""Called with bytes read of the part so far and records; what it raises ends the part."""


@dataclass(frozen=True, slots=True)
class RecordedFile:
    """What is replayed, as plain data: a recording of this machine, or one file at a URL."""

    locations: tuple[str, ...]
    """Paths or URLs."""
    format: str
    options: FileOptions
    header: StreamHeader
    first_utc_ns: int
    bytes_total: int

    @property
    def name(self) -> str:
        """For a person."""
        return " + ".join(self.locations)


@dataclass(frozen=True, slots=True)
class PartTask:
    """All that a part depends on."""

    capture: int
    """Which of the replay's recordings."""
    part: int
    """Which part of it."""
    file: RecordedFile
    engine: EngineConfig
    begin: Cut | None
    """None: the file's beginning."""
    end_ns: int | None
    """Records before this time; None: all."""
    state: EngineState | None
    """The engine's at the beginning; None: to be supposed, or the file's beginning."""
    store: str | None
    """Path or URL of the place that rows are written to; None: windows and counts alone."""
    folder: str
    """In the store: an attempt makes a folder of its own there."""
    overlap: bool = False
    """Encode rows in a thread beside."""


@dataclass(frozen=True, slots=True)
class PartDone:
    """What came of it. Counts are of this part alone."""

    capture: int
    part: int
    began_with: str
    """Digest of the state at the beginning; empty at a file's beginning."""
    ended_with: str
    """The same at the end; empty at the end of the file."""
    state: EngineState | None
    """At the end."""
    ledger: Ledger
    """All but `in_flight` add up over parts; that is of the end."""
    grades: Grades
    rows: int
    upto_utc_ns: int
    settled_utc_ns: int
    """No later part has a delay that began before."""
    edges: WindowTable
    """Windows of which the part before or after may have more."""
    devices: tuple[Device, ...]
    """What these point to."""
    staged: tuple[Staged, ...]
    folder: str
    summary: Summary
    warnings: tuple[str, ...]
    lost_told: int | None
    """Records lost, by the file's END mark, where there is one."""


def run_part(task: PartTask, told: Told = lambda _read, _records: None) -> PartDone:
    """Read, correlate and write one part. Raises what reading and writing raise; nothing is left then."""
    _keep_freed_memory()
    offset_ns = task.file.header.clock.offset_ns
    state = task.state
    if state is None and task.begin is not None:
        state = _supposed(task, task.begin, offset_ns)
    began_with = state.digest() if state is not None else ""
    begin_utc_ns = task.begin.at_ns + offset_ns if task.begin is not None else None
    engine = Engine(offset_ns, task.engine, state)
    summary, edges, rows = Summary(), list[WindowTable](), 0
    folder = f"{task.folder}/{task.capture:05d}-{task.part:06d}-{uuid.uuid4().hex}"

    with ExitStack() as stack:
        reader = stack.enter_context(reading(task))
        writer = None
        if task.store is not None:
            place = place_at(task.store)
            writer = stack.enter_context(PartWriter(place, folder, task.file.header, overlap=task.overlap))

        def take(results: Results) -> None:
            nonlocal rows
            summary.add(results)
            given = results.rows
            rows += len(given.delays)
            inner = given.windows
            if begin_utc_ns is not None and len(inner):
                across = inner.column("start_utc_ns") < begin_utc_ns
                if across.any():
                    edges.append(inner[across])
                    inner = inner[~across]
            if writer is not None:
                writer.add(given.delays, inner, given.devices)

        feeder = Feeder(engine, lambda: reader.discarded)
        records = 0
        for item in reader.items():
            try:
                for results in feeder.take(item):
                    take(results)
            except WireError as error:
                raise WireError(f"{task.file.name}: {error}") from error
            records += len(item) if isinstance(item, Batch) else 0
            told(reader.bytes_read, records)
        if task.end_ns is None:
            last, after = feeder.finish(), None
            take(last)
            totals = last.totals
        else:
            for results in feeder.stop_at(task.end_ns):
                take(results)
            after = engine.state(task.end_ns)
            # The last results may be older than the last record.
            totals = feeder.totals(task.end_ns)
            open_windows = engine.close_windows()
            summary.count(open_windows, engine.devices)
            summary.update(totals)
            edges.append(open_windows)
        staged = tuple(writer.close()) if writer is not None else ()
        return PartDone(
            capture=task.capture,
            part=task.part,
            began_with=began_with,
            ended_with=after.digest() if after is not None else "",
            state=after,
            ledger=totals.ledger,
            grades=totals.grades,
            rows=rows,
            # Of a file without records nothing is known but when it began.
            upto_utc_ns=totals.upto_utc_ns if totals.ledger.records or task.begin else task.file.header.clock.utc_ns,
            settled_utc_ns=totals.settled_utc_ns,
            edges=WindowTable.concatenate(edges),
            devices=engine.devices,
            staged=staged,
            folder=folder,
            summary=summary,
            warnings=tuple(reader.warnings),
            lost_told=reader.lost_told,
        )


def _keep_freed_memory() -> None:
    """As `keep_freed_memory`, also in a worker of Dask, which has its C library give back all it can.

    That (MALLOC_TRIM_THRESHOLD_ in the workers' environment) fixes the thresholds, which else grow by themselves; a
    part takes twice as long then, in page faults.
    """
    keep_freed_memory()
    libc = ctypes.CDLL(None)
    if "MALLOC_TRIM_THRESHOLD_" in os.environ and hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _KEPT_BYTES)


def _supposed(task: PartTask, begin: Cut, offset_ns: int) -> EngineState:
    """The state at a cut, as far as the warm-up before it tells."""
    engine = Engine(offset_ns, replace(task.engine, rows=False, crossings=False))
    feeder = Feeder(engine)
    with Capture(task.file.locations[0]) as capture:
        for item in stretch(capture, begin.warm, None, begin.at_ns):
            if not isinstance(item, Progress):
                _work_through(feeder.take(item))
    _work_through(feeder.stop_at(begin.at_ns))
    return engine.state(begin.at_ns)


def _work_through(results: Iterable[Results]) -> None:
    """Have the engine work, where only its state is wanted and nobody reads the results."""
    for _ in results:
        pass


class _CapturePart:
    """A `.mace` file, or a part of one."""

    def __init__(self, capture: Capture, task: PartTask) -> None:
        self._capture, self._task = capture, task
        self._from = task.begin.position.offset if task.begin is not None else 0

    def items(self) -> Iterator[Topology | Batch]:
        begin = self._task.begin
        at_ns, position = (begin.at_ns, begin.position) if begin is not None else (None, None)
        for item in stretch(self._capture, position, at_ns, self._task.end_ns):
            if not isinstance(item, Progress):
                yield item

    @property
    def bytes_read(self) -> int:
        return self._capture.bytes_read - self._from

    @property
    def discarded(self) -> int:
        return self._capture.discarded

    @property
    def warnings(self) -> list[str]:
        return self._capture.warnings

    @property
    def lost_told(self) -> int | None:
        # What salvage had to leave out is not in our own count.
        return self._capture.end.lost if self._capture.end is not None and not self._task.file.options.salvage else None


class _WholeFile:
    """A file of any other format."""

    def __init__(self, reader: FileReader) -> None:
        self._reader = reader
        self.lost_told = None

    def items(self) -> Iterator[Topology | Batch]:
        for item in self._reader.items():
            if not isinstance(item, Progress):
                yield item

    @property
    def bytes_read(self) -> int:
        return self._reader.bytes_read

    @property
    def discarded(self) -> int:
        return self._reader.discarded

    @property
    def warnings(self) -> list[str]:
        return list(self._reader.warnings)


@contextmanager
def reading(task: PartTask) -> Iterator[_CapturePart | _WholeFile]:
    """The task's file, open: `items`, once, and what there is to say of it. Raises `Unavailable` or `CaptureError`."""
    file = task.file
    if file.format == MACE_FORMAT:
        with Capture(file.locations[0], salvage=file.options.salvage) as capture:
            yield _CapturePart(capture, task)
        return
    with here(file.locations) as paths, BY_NAME[file.format].reader(paths, file.options) as reader:
        yield _WholeFile(reader)


@contextmanager
def here(locations: tuple[str, ...]) -> Iterator[tuple[Path, ...]]:
    """Files as paths of this machine: those at URLs are fetched, and gone afterwards."""
    far = any(map(is_url, locations))
    with tempfile.TemporaryDirectory(prefix="mace-fetched-") if far else nullcontext("") as folder:
        paths = []
        for number, location in enumerate(locations):
            if not is_url(location):
                paths.append(Path(location))
                continue
            files, path = filesystem(location)
            target = Path(folder) / str(number) / location.rsplit("/", 1)[-1]
            target.parent.mkdir()
            with files.open(path, "rb") as source, target.open("wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
            paths.append(target)
        yield tuple(paths)
