"""`mace wrap`: runs a tool in a container under a capture, and corrects the samples in its output when it has ended.

`mace ping` does this for ping line by line; for other tools the correction follows at the end.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from ipaddress import ip_address
from typing import Final

import numpy as np

from contracts.arrays import Ints
from contracts.errors import LabError, UsageError
from contracts.results import Results
from contracts.schema import Direction
from contracts.topology import Role
from mace.live.session import Session
from mace.tools.beside import Beside
from mace.tools.corrected import Corrected, Observed
from mace.tools.following import Following
from mace.tools.host_probes import HostProbes
from mace.tools.output import READERS, read
from mace.tools.ping import user_clock
from storage.capture import CaptureSink

_ADDRESS: Final = re.compile(
    r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7})(?![\w.])"
)
_PAYLOAD: Final = 48
"""Payload of a probe beside a tool whose packets' length is not known: the packets differ from ping's and fping's."""
_PAUSE_NS: Final = 1_000_000
"""Packets that follow one another faster than this belong to one exchange, such as a TCP connection."""
_FLOOD: Final = 50
"""So many packets without a pause are a flood."""
_LAST_WORDS_S: Final = 3.0
"""Time for an interrupted tool to print its results."""


def measure(
    argv: Sequence[str],
    netns_fd: int,
    session: Session,
    following: Following,
    beside: Beside,
    tee: CaptureSink | None,
    *,
    reader_name: str | None = None,
    quiet: bool = False,
) -> tuple[Corrected, int]:
    """Run the command in the namespace of `netns_fd`; returns the corrected samples and the command's exit status.

    `following` is open, and follows the command. `reader_name` is the tool's name in `READERS`; None recognises the
    tool by its output, and ping's -U by the command line. Unless `quiet`, the tool's output is copied to stderr. Raises
    `LabError` and `UsageError`.
    """
    tool = _Tool(argv, netns_fd, following, beside.probes)
    observed, netns = Observed(), os.fstat(netns_fd).st_ino

    def take(results: Results) -> None:
        observed.add(results)
        following.read()
        offset_ns = session.utc_offset_ns
        beside.probes.requested((_exchanges(results, netns) - offset_ns).tolist())
        beside.probes.harvest(observed.settled_utc_ns - offset_ns)

    session.observe(tool.probed, take, tee=beside.tee(tee))
    if tool.said is None:
        raise LabError(f"{argv[0]} was stopped before its end, so there is no output to correct")
    if not quiet:
        sys.stderr.write(tool.said)
    if not tool.said.strip():
        raise UsageError(f"{argv[0]} ended with status {tool.status} and printed nothing")
    if reader_name is None and user_clock(argv):
        reader_name = "ping-U"
    samples, reader = read(tool.said.splitlines(), READERS[reader_name]() if reader_name else None)
    offset_ns = session.utc_offset_ns
    ran_utc_ns = tool.began_ns + offset_ns, tool.ended_ns + offset_ns
    found = replace(Corrected.of(samples, observed, reader, netns, ran_utc_ns), destination=destination(argv))
    return beside.finished(found.followed_by(following, reader.stamps, offset_ns)), tool.status


def destination(argv: Sequence[str]) -> str:
    """Return the only IP address on a command line; "" if there is none, or several."""
    found = set()
    for word in _ADDRESS.findall(" ".join(argv)):
        with suppress(ValueError):
            found.add(str(ip_address(word)))
    return found.pop() if len(found) == 1 else ""


def _exchanges(results: Results, netns: int) -> Ints:
    """Return when exchanges with the network began in that namespace: packets out of it after a pause, UTC ns.

    In a flood, where there are no pauses, each packet begins one.
    """
    rows = results.rows
    crossings = rows.crossings
    if not len(crossings):
        return np.zeros(0, np.int64)
    ours = np.array([d.netns == netns and d.role is Role.INNER for d in rows.devices], np.bool_)
    out = crossings[ours[crossings.device] & (crossings.direction == Direction.EGRESS)]
    times: Ints = np.sort(out.inner_utc_ns)
    gaps = np.diff(times, prepend=-_PAUSE_NS)
    if len(times) > _FLOOD and gaps[1:].max() < _PAUSE_NS:
        return times
    begins: Ints = times[gaps >= _PAUSE_NS]
    return begins


class _Tool:
    """A command in a network namespace; `said` is its standard output, None until it has ended.

    It ran between `began_ns` and `ended_ns`, CLOCK_MONOTONIC.
    """

    def __init__(self, argv: Sequence[str], netns_fd: int, following: Following, probes: HostProbes) -> None:
        self._argv, self._netns_fd, self._following, self._probes = argv, netns_fd, following, probes
        self.said: str | None = None
        self.status = 0
        self.began_ns = self.ended_ns = 0

    async def probed(self) -> None:
        """Run the command with probes beside it, if its destination is known."""
        async with self._probes.running():
            if address := destination(self._argv):
                await self._probes.start(address, _PAYLOAD)
            await self.run()

    async def run(self) -> None:
        self.began_ns = time.monotonic_ns()
        process = await asyncio.create_subprocess_exec(
            "nsenter", f"--net=/proc/self/fd/{self._netns_fd}", "--", *self._argv,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, pass_fds=(self._netns_fd,),
            start_new_session=True, env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
        self._following.started(process.pid)
        reading = asyncio.ensure_future(process.communicate())
        try:
            said, _ = await asyncio.shield(reading)
            self.said, self.status = said.decode(errors="replace"), process.returncode or 0
        except asyncio.CancelledError:
            with suppress(TimeoutError, ProcessLookupError):
                # The whole process group, for a command that is a shell with a loop.
                os.killpg(process.pid, signal.SIGINT)
                said, _ = await asyncio.wait_for(asyncio.shield(reading), _LAST_WORDS_S)
                self.said, self.status = said.decode(errors="replace"), process.returncode or 0
            raise
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await reading
            self.ended_ns = time.monotonic_ns()
