"""`mace wrap`: any tool whose output is understood, run in a container under a capture, and corrected when it is done.

What `mace ping` does for ping, line by line, this does for the others at the end.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress

from contracts.errors import LabError, UsageError
from mace.live.session import Session
from mace.tools.corrected import Corrected, Observed
from mace.tools.output import READERS, read
from storage.capture import CaptureSink

_LAST_WORDS_S = 3.0
"""An interrupted tool has this long to say what it has."""


def measure(
    argv: Sequence[str],
    netns_fd: int,
    session: Session,
    tee: CaptureSink | None,
    *,
    reader_name: str | None = None,
    quiet: bool = False,
) -> tuple[Corrected, int]:
    """Run the command in that namespace; what came of it, and its exit status.

    `reader_name`: which tool it is (`READERS`); None where its first line tells. Unless `quiet`, what the tool printed
    goes to stderr as it was. Raises `LabError` and `UsageError`.
    """
    tool = _Tool(argv, netns_fd)
    observed = Observed()
    session.observe(tool.run, observed.add, tee=tee)
    if tool.said is None:
        raise LabError(f"{argv[0]} did not run to its end")
    if not quiet:
        sys.stderr.write(tool.said)
    if not tool.said.strip():
        raise UsageError(f"{argv[0]} ended with status {tool.status} and printed nothing")
    samples, reader = read(tool.said.splitlines(), READERS[reader_name]() if reader_name else None)
    return Corrected.of(samples, observed, reader, os.fstat(netns_fd).st_ino), tool.status


class _Tool:
    """A command in a network namespace, and what it prints."""

    def __init__(self, argv: Sequence[str], netns_fd: int) -> None:
        self._argv, self._netns_fd = argv, netns_fd
        self.said: str | None = None
        self.status = 0

    async def run(self) -> None:
        process = await asyncio.create_subprocess_exec(
            "nsenter", f"--net=/proc/self/fd/{self._netns_fd}", "--", *self._argv,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, pass_fds=(self._netns_fd,),
            start_new_session=True, env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
        reading = asyncio.ensure_future(process.communicate())
        try:
            said, _ = await asyncio.shield(reading)
            self.said, self.status = said.decode(errors="replace"), process.returncode or 0
        except asyncio.CancelledError:
            with suppress(TimeoutError, ProcessLookupError):
                # The whole of it: a shell's loop, too.
                os.killpg(process.pid, signal.SIGINT)
                said, _ = await asyncio.wait_for(asyncio.shield(reading), _LAST_WORDS_S)
                self.said, self.status = said.decode(errors="replace"), process.returncode or 0
            raise
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await reading
