"""Processes one part of a recording: in this process, or in a worker that gets only a `PartTask`.

    capture:   ├────── part 0 ──────┤T1├────── part 1 ──────┤T2├───── part 2 ─────┤
    engine:    nothing ─────► state at T1 ─────► state at T2 ─────► finish

The engine's state and the windows across a cut carry everything from one part to the next. A part whose task has the
state at its beginning continues from it. Any other part *supposes* the state: it starts to read a little before its
cut, and reaches the right state by then if no packet was in flight for longer than that. Comparing the digest of the
supposed state with that of the state in which the part before has ended shows whether it was right, so no result is a
guess.

The rows of a part depend on its task only: done twice, or by two workers at once, a part gives the same rows.
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
"""The format in `collector.files.FORMATS` whose files can be read from the middle."""

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
"""Parameter numbers of mallopt(3)."""
_KEPT_BYTES: Final = 32 << 20
"""Largest mmap threshold of the C library (DEFAULT_MMAP_THRESHOLD_MAX). By itself the library sets the trim threshold
to twice the mmap threshold."""

OnProgress = Callable[[int, int], None]
"""Called with the bytes and records of the part read so far; an exception that it raises ends the part."""


@dataclass(frozen=True, slots=True)
class RecordedFile:
    """A recording of this machine, or one file at a URL, as plain data that can be sent to a worker."""

    locations: tuple[str, ...]
    """Paths or URLs of the recording's files."""
    format: str
    options: FileOptions
    header: StreamHeader
    first_utc_ns: int
    bytes_total: int

    @property
    def name(self) -> str:
        """The locations as one text, for messages."""
        return " + ".join(self.locations)


@dataclass(frozen=True, slots=True)
class PartTask:
    """Everything that the results of a part depend on."""

    capture: int
    """Number of the recording in the replay, from 0."""
    part: int
    """Number of the part in the recording, from 0."""
    file: RecordedFile
    engine: EngineConfig
    begin: Cut | None
    """The cut at which the part begins; None is the file's beginning."""
    end_ns: int | None
    """The part ends before this time; None is the file's end."""
    state: EngineState | None
    """State of the engine at the beginning; None if the part supposes it, or begins at the file's beginning."""
    store: str | None
    """Path or URL of the store that rows are written to; None computes windows and counts only."""
    folder: str
    """Folder in the store in which each attempt makes a folder of its own."""
    overlap: bool = False
    """Whether a second thread encodes the rows."""


@dataclass(frozen=True, slots=True)
class PartDone:
    """The results of one part. Its counts are of this part only."""

    capture: int
    part: int
    began_with: str
    """Digest of the state at the part's beginning; empty at the file's beginning."""
    ended_with: str
    """Digest of the state at the part's end; empty at the file's end."""
    state: EngineState | None
    """State of the engine at the part's end; None at the file's end."""
    ledger: Ledger
    """Counts that add up over parts, except `in_flight`, which is that at the part's end."""
    grades: Grades
    rows: int
    upto_utc_ns: int
    settled_utc_ns: int
    """No later part has a delay that began before this time."""
    edges: WindowTable
    """Windows across the part's ends, to which the part before or after may add."""
    devices: tuple[Device, ...]
    """The devices that the indices in `edges` refer to."""
    staged: tuple[Staged, ...]
    folder: str
    summary: Summary
    warnings: tuple[str, ...]
    lost_told: int | None
    """Number of lost records according to the file's END mark; None without one."""


def run_part(task: PartTask, told: OnProgress = lambda _read, _records: None) -> PartDone:
    """Read, correlate and write one part. After an error of reading or writing, the part's folder is removed."""
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
                writer.add_stages(given.stages, given.places, given.devices)

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
            if writer is not None:
                writer.add_stages(*engine.close_stages(), engine.devices)
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
            # A file without records has no other time than that of its header.
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
    """Let the C library keep freed memory (`keep_freed_memory`), also in a Dask worker.

    Dask sets MALLOC_TRIM_THRESHOLD_ in the workers' environment, which fixes thresholds that otherwise adapt. Freed
    memory then goes back to the kernel at once, and a part takes twice as long because of page faults.
    """
    keep_freed_memory()
    libc = ctypes.CDLL(None)
    if "MALLOC_TRIM_THRESHOLD_" in os.environ and hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _KEPT_BYTES)


def _supposed(task: PartTask, begin: Cut, offset_ns: int) -> EngineState:
    """Return the state at a cut as it follows from the warm-up records before the cut."""
    engine = Engine(offset_ns, replace(task.engine, rows=False, crossings=False))
    feeder = Feeder(engine)
    with Capture(task.file.locations[0]) as capture:
        for item in stretch(capture, begin.warm, None, begin.at_ns):
            if not isinstance(item, Progress):
                _work_through(feeder.take(item))
    _work_through(feeder.stop_at(begin.at_ns))
    return engine.state(begin.at_ns)


def _work_through(results: Iterable[Results]) -> None:
    """Let the engine work where only its state is needed, and drop the results."""
    for _ in results:
        pass


class _CapturePart:
    """Reader of a `.mace` file, or of a part of one."""

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
        # With salvage, lost records that damaged blocks counted are missing in our own count.
        return self._capture.end.lost if self._capture.end is not None and not self._task.file.options.salvage else None


class _WholeFile:
    """Reader of a whole file of any other format."""

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
    """Open the task's file; yields a reader whose `items` can be read once. Raises `Unavailable` or `CaptureError`."""
    file = task.file
    if file.format == MACE_FORMAT:
        with Capture(file.locations[0], salvage=file.options.salvage) as capture:
            yield _CapturePart(capture, task)
        return
    with here(file.locations) as paths, BY_NAME[file.format].reader(paths, file.options) as reader:
        yield _WholeFile(reader)


@contextmanager
def here(locations: tuple[str, ...]) -> Iterator[tuple[Path, ...]]:
    """Yield the files as paths of this machine. Files at URLs are fetched, and removed after the block."""
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
