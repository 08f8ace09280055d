"""Replays on the workers of a Dask cluster: several recordings, and several parts of a recording, at the same time.

    scheduler ──► worker: run_part(supposing its state) ──► PartDone ──► here: does it follow? commit it
                     ▲                                                        │ no
                     └──────────── the same part, with the state ◄───────────┘

Workers only compute; this process commits, one part after the other. It does not matter how often or where a part is
computed: if a worker dies, Dask reschedules its part, and the files that the worker left are removed. Workers read the
recordings and write staged rows themselves, so recordings and store must be on a shared file system or at URLs.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, Final

from contracts.errors import MissingExtra, SourceError, UsageError
from mace.replaying.assembly import Assembly
from mace.replaying.commits import Commits
from mace.replaying.part import PartDone, PartTask, run_part

try:
    from distributed import Client, KilledWorker, LocalCluster, wait
except ImportError as _error:
    raise MissingExtra("cluster", _error.name or "distributed") from _error

_LOG = logging.getLogger(__name__)

LOCAL: Final = "local:"
_AHEAD: Final = 4
"""Parts in progress or waiting for their commit, per thread of the workers: enough that no thread is idle while a part
is done again, few enough that the staged rows stay small."""
_LOOK_S: Final = 0.5
"""Interval at which a request to stop is noticed while no part ends."""
_WORKER_STARTS_WITH: Final = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
"""Run by each worker: Ctrl-C reaches all processes of the terminal, and only the committing process shall handle it."""
_CONNECT_S: Final = 5
"""Time for the scheduler to answer before it counts as absent."""


def replay(assembly: Assembly, address: str, told: Callable[[int, int], None], stop: Callable[[], bool]) -> None:
    """Run and commit all remaining parts on the cluster at `address`.

    `told` is called with committed and total bytes; `stop` returns whether to stop, which raises `Stopped`. Raises
    `UsageError` for a malformed address, `SourceError` if no scheduler answers or a part repeatedly kills its workers,
    and the errors of parts.
    """
    with _client(address) as client:
        work = _Replay(assembly, client, told, stop)
        work.run()
        _LOG.info("%d of %d parts were done again with the state before them", work.repeated, assembly.parts_total)


def _hush() -> None:
    """Let Dask's loggers log errors only, unless `--debug` is given."""
    if not logging.root.isEnabledFor(logging.DEBUG):
        for name in [n for n in logging.root.manager.loggerDict if n.split(".")[0] == "distributed"]:
            logging.getLogger(name).setLevel(logging.ERROR)


def _local_workers(count: int) -> LocalCluster:
    """Start workers as processes of this machine, with one thread each.

    Only their critical messages are logged: a part's failure arrives as an exception, and a worker whose heartbeat
    meets a closing scheduler would log a traceback.
    """
    return LocalCluster(
        n_workers=count,
        threads_per_worker=1,
        processes=True,
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
        scheduler_kwargs={"dashboard": False},
        silence_logs=logging.CRITICAL,
        preload=[_WORKER_STARTS_WITH],
    )


@contextlib.contextmanager
def _client(address: str) -> Iterator[Client]:
    _hush()
    if address.startswith(LOCAL):
        count = address.removeprefix(LOCAL)
        if not count.isdecimal() or not int(count):
            raise UsageError(
                f"--cluster {address}: expected local:N with a number of processes, or a scheduler's address"
            )
        with _local_workers(int(count)) as cluster, Client(cluster) as client:
            yield client
        return
    try:
        client = Client(address, timeout=_CONNECT_S)
    except (OSError, ValueError, TimeoutError) as error:
        raise SourceError(f"--cluster {address}: no Dask scheduler answers there ({error})") from error
    with client:
        yield client


class _Replay:
    def __init__(
        self, assembly: Assembly, client: Client, told: Callable[[int, int], None], stop: Callable[[], bool]
    ) -> None:
        self._assembly, self._client, self._stop = assembly, client, stop
        self._commits = Commits(assembly, told)

    @property
    def repeated(self) -> int:
        return self._commits.repeated

    def run(self) -> None:
        assembly = self._assembly
        tasks = assembly.tasks()
        under_way: set[Any] = set()

        def submit(task: PartTask) -> None:
            under_way.add(self._client.submit(run_part, task, pure=False))

        def fill() -> None:
            # Counted each time, because workers may join and leave.
            room = _AHEAD * max(sum(self._client.nthreads().values()), 1)
            while len(under_way) + len(self._commits) < room and (task := next(tasks, None)) is not None:
                submit(task)

        try:
            fill()
            while under_way:
                if self._stop():
                    raise assembly.stopped()
                try:
                    finished = wait(under_way, timeout=_LOOK_S, return_when="FIRST_COMPLETED").done
                except TimeoutError:
                    continue
                for future in finished:
                    under_way.discard(future)
                    done = self._result(future)
                    future.release()
                    if (again := self._commits.add(done)) is not None:
                        submit(again)
                fill()
        finally:
            self._client.cancel(list(under_way), force=True)

    def _result(self, future: Any) -> PartDone:
        try:
            done: PartDone = future.result()
        except KilledWorker as error:
            raise SourceError(f"a part has repeatedly killed its worker: {error}") from error
        return done
