"""A replay on the workers of a Dask cluster: many recordings at once, and parts of one recording at once.

    scheduler ──► worker: run_part(supposing its state) ──► PartDone ──► here: does it follow? commit it
                     ▲                                                        │ no
                     └──────────── the same part, with the state ◄───────────┘

The cluster only computes; committing is done here, one part after the other. So it does not matter how often a part is
worked on, or where: a worker that dies is replaced by Dask's own rescheduling, and what it left behind is taken away.
Workers read the recordings and write into the store by themselves, so both have to be where they can reach them: a
shared file system, or a URL.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, Final

from contracts.errors import MissingExtra, SourceError, UsageError
from mace.replaying.assembly import Assembly
from mace.replaying.into_store import stopped
from mace.replaying.part import PartDone, PartTask, run_part

try:
    from distributed import Client, KilledWorker, LocalCluster, wait
except ImportError as _error:
    raise MissingExtra("cluster", _error.name or "distributed") from _error

log = logging.getLogger(__name__)

LOCAL: Final = "local:"
_AHEAD: Final = 4
"""Parts that are under way or wait to be committed, for each thread of the workers: enough that none is idle while one
part is done again, few enough that what is staged stays small."""
_LOOK_S: Final = 0.5
"""How often a wish to stop is looked at while nothing comes."""
_WORKER_STARTS_WITH: Final = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
"""Ctrl-C goes to all processes of a terminal, and is meant for the one that commits."""
_CONNECT_S: Final = 5
"""A scheduler that does not answer within this is taken for none."""


def replay(assembly: Assembly, address: str, told: Callable[[int, int], None], stop: Callable[[], bool]) -> None:
    """Do all parts that are left and commit them. Raises `UsageError` for an address that is none, `SourceError` where
    no scheduler answers or a part ends its workers again and again, and what parts raise.
    """
    with _client(address) as client:
        work = _Replay(assembly, client, told, stop)
        work.run()
        log.info("%d of %d parts were done again with the state before them", work.repeated, assembly.parts_total)


def _hush() -> None:
    """Dask tells at length what it does; here only faults are wanted, and all of it with `--debug`."""
    if not logging.root.isEnabledFor(logging.DEBUG):
        for name in [n for n in logging.root.manager.loggerDict if n.split(".")[0] == "distributed"]:
            logging.getLogger(name).setLevel(logging.ERROR)


def _local_workers(count: int) -> LocalCluster:
    """Processes of this machine, a thread each."""
    return LocalCluster(
        n_workers=count,
        threads_per_worker=1,
        processes=True,
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
        scheduler_kwargs={"dashboard": False},
        silence_logs=logging.ERROR,
        preload=[_WORKER_STARTS_WITH],
    )


@contextlib.contextmanager
def _client(address: str) -> Iterator[Client]:
    _hush()
    if address.startswith(LOCAL):
        count = address.removeprefix(LOCAL)
        if not count.isdecimal() or not int(count):
            raise UsageError(
                f"--cluster {address}: expected local:N, with a number of processes, or a scheduler's address"
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
        self._assembly, self._client, self._told, self._stop = assembly, client, told, stop
        self._waiting: dict[tuple[int, int], PartDone] = {}
        """Done, but not yet to be committed."""
        self.repeated = 0
        """Parts that supposed wrongly and were done again."""

    def run(self) -> None:
        assembly = self._assembly
        tasks = assembly.tasks()
        under_way: set[Any] = set()

        def submit(task: PartTask) -> None:
            under_way.add(self._client.submit(run_part, task, pure=False))

        def fill() -> None:
            # Workers may come and go.
            room = _AHEAD * max(sum(self._client.nthreads().values()), 1)
            while len(under_way) + len(self._waiting) < room and (task := next(tasks, None)) is not None:
                submit(task)

        try:
            fill()
            while under_way:
                if self._stop():
                    raise stopped(assembly)
                try:
                    finished = wait(under_way, timeout=_LOOK_S, return_when="FIRST_COMPLETED").done
                except TimeoutError:
                    continue
                for future in finished:
                    under_way.discard(future)
                    done = self._result(future)
                    future.release()
                    self._waiting[done.capture, done.part] = done
                    for again in self._commit(done.capture):
                        self.repeated += 1
                        submit(again)
                fill()
        finally:
            self._client.cancel(list(under_way), force=True)

    def _result(self, future: Any) -> PartDone:
        try:
            done: PartDone = future.result()
        except KilledWorker as error:
            raise SourceError(f"a part ended its workers again and again: {error}") from error
        return done

    def _commit(self, capture: int) -> list[PartTask]:
        """Commit what can be of a recording; the part that has to be done again with its state, if any."""
        assembly = self._assembly
        while (part := assembly.next_part(capture)) is not None:
            done = self._waiting.pop((capture, part), None)
            if done is None:
                return []
            if not assembly.follows(done):
                return [assembly.task(capture, part)]
            assembly.commit(done)
            self._told(assembly.bytes_committed, assembly.bytes_total)
        return []
