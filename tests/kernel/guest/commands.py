"""The command line, forked from one process that has imported it: in an emulator the import takes half a minute.

Input, output, exit status and signals of a command are those of a process of its own. The host's tests cover commands
that start as new processes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from mace.commands import registry
from tests.forked_commands import PARTS
from tests.places import ROOT

_FORKING = get_context("forkserver")
_FORKING.set_forkserver_preload(["mace.cli", *(registry.module(each.name) for each in registry.COMMANDS), *PARTS])


def _run(argv: tuple[str, ...], folder: Path) -> None:
    """Run `mace argv...` in the child, with its output in two files."""
    os.chdir(ROOT)
    for fd, name in ((1, "out"), (2, "err")):
        to = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(to, fd)
        os.close(to)
    from mace.__main__ import main

    sys.argv = ["mace", *argv]
    sys.exit(main())


class Command:
    """The part of `subprocess.Popen` with pipes and text that tests use."""

    def __init__(self, *argv: object) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="mace-command-")
        self._process = _FORKING.Process(target=_run, args=(tuple(map(str, argv)), Path(self._folder.name)))
        self._process.start()
        self.pid = self._process.pid
        self._said: list[str] = []

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        assert self.pid is not None
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self._folder.cleanup()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the command's end; raises `subprocess.TimeoutExpired`."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("mace", timeout or 0)
        if not self._said:
            self._said = [Path(self._folder.name, name).read_text() for name in ("out", "err")]
            self._folder.cleanup()
        return self._said[0], self._said[1]


def mace(*argv: object, check: bool = True, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, like `tests.measuring.mace`."""
    command = Command(*argv)
    try:
        out, err = command.communicate(timeout)
    finally:
        command.kill()
    done = subprocess.CompletedProcess(["mace", *map(str, argv)], command.returncode or 0, out, err)
    if check:
        assert done.returncode == 0, done.stderr
    return done


def start(*argv: object, **_: Any) -> Command:
    """Start a command, like `tests.measuring.start`."""
    return Command(*argv)
