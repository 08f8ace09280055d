"""Runs one command on several kernels, as many at a time as there are cores: fetch, build, boot."""

import os
import sys
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.kernel import vm
from tests.kernel.build import REPOSITORY, build
from tests.kernel.kernels import fetch

# The path of this interpreter, so that the guest has the same environment.
PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/kernel/guest")

JOBS = 2  # QEMU keeps one core busy each
TIMEOUT_S = 1500  # far more than the guest's tests take on a busy machine; each test has its own limit

# Environment variables for tests, which tests in the guest need, too.
PASSED_ON = ("CI", "MACE_REQUIRE")


@dataclass(frozen=True, slots=True)
class Task:
    """A command to run on every kernel."""

    command: Sequence[str] = PYTEST
    timeout_s: float = TIMEOUT_S
    results: Path | None = None  # a directory for each kernel in it
    newest: bool = False  # ask Debian, even if there is a kernel in the cache


class Matrix:
    """Running machines. Leaving the context ends those that still run.

    with Matrix(["6.1", "6.12"], Task()) as matrix:
        matrix.futures["6.12"].result()   # a vm.Result; raises KernelUnavailable, MachineFailed
    """

    def __init__(self, names: Iterable[str], task: Task, jobs: int = JOBS):
        self._task = task
        self._stop = threading.Event()
        # Threads wait only; and they outlive their machines, whose processes die with the thread that made them.
        self._pool = ThreadPoolExecutor(jobs, thread_name_prefix="kernel")
        self.futures: dict[str, Future[vm.Result]] = {name: self._pool.submit(self._run, name) for name in names}

    def _run(self, name: str) -> vm.Result:
        kernel = fetch(name, newest=self._task.newest)
        module = build(kernel).module
        env = {key: os.environ[key] for key in PASSED_ON if key in os.environ} | {"MACE_KO": str(module)}
        return vm.boot(
            kernel,
            self._task.command,
            cwd=REPOSITORY,
            env=env,
            timeout_s=self._task.timeout_s,
            results=self._task.results / name if self._task.results else None,
            stop=self._stop,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.end()

    def end(self) -> None:
        """End the machines that still run."""
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)
