"""Replays on several cores of this machine: worker processes compute parts, this process commits them.

    this process ── PartTask ──► worker: run_part, supposing the state before it
         ▲                          │
         └── PartDone ◄─────────────┘      commit in order; a part that supposed wrongly is done again

The results are those of one process, errors included: after a part has failed, no part behind it begins, and the parts
before it are committed before its error is raised.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Final, Self

from contracts.errors import SourceError
from mace.replaying.assembly import PART_BYTES, Assembly
from mace.replaying.commits import Commits
from mace.replaying.part import MACE_FORMAT, PartDone, PartTask, RecordedFile

_LOG = logging.getLogger(__name__)

JOB_BYTES: Final = 512 << 20
"""Memory for a job: a worker with parts of `PART_BYTES` peaks at some 420 MiB."""
SMALLEST_PART: Final = 32 << 20
"""Smallest part that is made to occupy a job, bytes: 7 million records with content, some 2.5 s of work. Two workers
take 1.6 s of CPU time more than one process, and one process already overlaps encoding with the rest."""
_AHEAD: Final = 4
"""Parts in progress or waiting for their commit, per job: the staged rows stay small."""
_LOOK_S: Final = 0.2
"""Interval at which a request to stop is noticed while no part ends."""
_KEPT_FROM_WORKERS: Final = (signal.SIGINT, signal.SIGTERM)
"""Ctrl-C reaches all processes of a terminal, a service manager's SIGTERM all of a service. This process alone, which
ends its workers, shall handle them."""


def usable() -> int:
    """Return the default number of jobs: the cores that this process may use, fewer if memory for them is short."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    available = _available_bytes()
    return cores if available is None else max(1, min(cores, available // JOB_BYTES))


def _available_bytes() -> int | None:
    """Return the memory that is available without swapping (MemAvailable of proc(5)), bytes; None if not on Linux."""
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            name, value = line.split(":")
            if name == "MemAvailable":
                return int(value.split()[0]) << 10
    return None


def part_bytes(files: Sequence[RecordedFile], jobs: int) -> int:
    """Return the size of parts: `PART_BYTES`, or of short recordings a part for each job, to suppose few states."""
    total = sum(file.bytes_total for file in files)
    return min(PART_BYTES, max(SMALLEST_PART, total // jobs))


def worthwhile(files: Sequence[RecordedFile], jobs: int) -> bool:
    """Return whether several jobs would replay these files faster than one process."""
    divisible = [file for file in files if file.format == MACE_FORMAT and not file.options.salvage]
    several = len(files) > 1 or bool(divisible)
    return jobs > 1 and several and sum(file.bytes_total for file in files) >= 2 * SMALLEST_PART


def replay(assembly: Assembly, jobs: int, told: Callable[[int, int], None], stop: Callable[[], bool]) -> None:
    """Run and commit all remaining parts in up to `jobs` worker processes.

    `told` is called with the bytes done and the total bytes; `stop` returns whether to stop, which raises `Stopped`.
    Raises `SourceError` if a worker is killed, and the errors of parts.
    """
    with _Workers() as workers:
        work = _Replay(assembly, workers, jobs, told, stop)
        try:
            work.run()
        finally:
            workers.kill()
            assembly.remove_staged()
        _LOG.info("%d of %d parts were done again with the state before them", work.repeated, assembly.parts_total)


@dataclass(slots=True, eq=False)
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection
    task: PartTask | None = None
    read: int = 0
    """Bytes of the task's part read so far."""

    def begin(self, task: PartTask) -> None:
        """Give the worker its next task."""
        self.task, self.read = task, 0
        # A worker that has died is reported by `receive`, with the reason.
        with suppress(BrokenPipeError):
            self.connection.send(task)

    def receive(self) -> object:
        """Return the worker's next message. Raises `SourceError` if the worker has ended."""
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError):
            status = self.process.wait()
            told = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
            raise SourceError(f"worker process {self.process.pid} {told}") from None


class _Workers:
    """The worker processes; a context manager, after which none is left."""

    def __init__(self) -> None:
        self._opened = ExitStack()
        self.all: list[_Worker] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> _Worker:
        """Start another worker."""
        ours, theirs = socket.socketpair()
        import pyarrow as pa  # noqa: PLC0415 (not to count cores)

        with theirs, _blocked(_KEPT_FROM_WORKERS):
            connection = Connection(ours.detach())
            self._opened.callback(connection.close)
            argv = (sys.executable, "-P", "-m", "mace.replaying.worker", str(theirs.fileno()), str(os.getpid()))
            # Arrow chooses its allocator while it is imported; the workers have the same as this process.
            environment = os.environ | {"ARROW_DEFAULT_MEMORY_POOL": pa.default_memory_pool().backend_name}
            process = subprocess.Popen(
                argv,
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=environment,
            )
        self.all.append(_Worker(process, connection))
        return self.all[-1]

    def kill(self) -> None:
        """End all workers, whatever they do."""
        for worker in self.all:
            worker.process.kill()
        for worker in self.all:
            worker.process.wait()
        self.all.clear()
        self._opened.close()


@contextmanager
def _blocked(signals: Sequence[signal.Signals]) -> Iterator[None]:
    """Block signals in this thread: a process that is started in the block never receives them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Replay:
    def __init__(
        self,
        assembly: Assembly,
        workers: _Workers,
        jobs: int,
        told: Callable[[int, int], None],
        stop: Callable[[], bool],
    ) -> None:
        self._assembly, self._workers, self._jobs = assembly, workers, jobs
        self._told, self._stop = told, stop
        self._commits = Commits(assembly, lambda _done, _total: None)
        self._tasks = assembly.tasks()
        self._again: list[PartTask] = []
        """Parts to be done again, before any new one."""
        self._failed: dict[tuple[int, int], tuple[PartTask, Exception]] = {}
        self._most = assembly.bytes_committed

    @property
    def repeated(self) -> int:
        return self._commits.repeated

    def run(self) -> None:
        while True:
            if self._stop():
                raise self._assembly.stopped()
            self._fill()
            busy = {worker.connection: worker for worker in self._workers.all if worker.task is not None}
            if not busy:
                if not self._failed:
                    return
                self._retry_or_raise()
                continue
            for connection in wait(list(busy), _LOOK_S):
                self._take(busy[connection])  # type: ignore[index]
            self._progress()

    def _fill(self) -> None:
        """Give each idle worker a part, and start workers while there are parts for them."""
        workers = self._workers
        while True:
            idle = next((worker for worker in workers.all if worker.task is None), None)
            if idle is None and len(workers.all) >= self._jobs:
                return
            task = self._next()
            if task is None:
                return
            (idle or workers.start()).begin(task)

    def _next(self) -> PartTask | None:
        if self._again:
            return self._again.pop()
        under_way = sum(worker.task is not None for worker in self._workers.all) + len(self._commits)
        if self._failed or under_way >= _AHEAD * self._jobs:
            return None
        return next(self._tasks, None)

    def _take(self, worker: _Worker) -> None:
        """Handle the next message of a worker."""
        task = worker.task
        assert task is not None
        try:
            message = worker.receive()
        except SourceError as error:
            raise SourceError(
                f"{error}, perhaps because memory is short (--jobs 1 needs least); {self._assembly.told_progress()}"
            ) from None
        if isinstance(message, int):
            worker.read = message
            return
        worker.task = None
        if isinstance(message, Exception):
            self._failed[task.capture, task.part] = (task, message)
            return
        assert isinstance(message, PartDone), message
        if (again := self._commits.add(message)) is not None:
            self._again.append(again)

    def _retry_or_raise(self) -> None:
        """Raise the error of the first failed part, unless the part supposed the state before it: then do it again."""
        (capture, part), (task, error) = min(self._failed.items())
        if task.begin is None or task.state is not None or self._assembly.next_part(capture) != part:
            raise error
        del self._failed[capture, part]
        self._again.append(self._assembly.task(capture, part))

    def _progress(self) -> None:
        assembly = self._assembly
        reading = sum(worker.read for worker in self._workers.all if worker.task is not None)
        # A part that is done again was counted before.
        self._most = max(self._most, min(assembly.bytes_committed + reading, assembly.bytes_total))
        self._told(self._most, assembly.bytes_total)
