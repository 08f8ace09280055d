"""Sends a few pings from the host while ping runs in a container, and so measures what a host's ping takes then.

    the container's ping   |       |       |       |       |       |       |       |       |
    bursts of host's pings                             h       h       h       h

A burst is a run of ping itself with the container's interval, so that its requests find caches as cool as the
container's do, and its own code is ping's. The first ones of a burst find ping's code cold and do not count. Now and
then a burst is the container's: its records say how much tracing the overheads contain.
"""

from __future__ import annotations

import asyncio
import getopt
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from contracts.errors import MaceError
from mace.tools.host_path import Probe, ProbeRecords, pinged
from mace.tools.host_probes import HostProbes, Sent
from mace.tools.host_rtt import Cost, HostRtt, ToolTimes, direct, direct_added_ns
from mace.tools.ping import OPTIONS
from mace.tools.ping_output import PingOutput

_SHORTEST_S: Final = 0.002
"""A ping with a shorter interval keeps its caches warm, and a burst by itself would find its own code cold."""
_DENSE_S: Final = 0.02
"""With a shorter interval a burst has more pings: a process that starts is not warm after one."""
_FEW: Final = (4, 1)
"""Pings in a burst, and how many at its beginning do not count."""
_MANY: Final = (10, 3)
_STARTS_NS: Final = 5_000_000
"""From starting ping to its first request."""
_CONTAINERS_TURN: Final = (2, 8)
"""The third of each eight bursts is the container's."""
_KEPT: Final = frozenset({"-U", "-Q", "-M", "-t"})
"""Options of the container's ping that the host's pings have, too."""


def probes(argv: Sequence[str], netns_fd: int, host_netns: str) -> HostProbes:
    """Return the probes for a ping with these arguments: bursts of ping, and for a flood those of `host_probes`."""
    options, _ = getopt.gnu_getopt(list(argv), OPTIONS)
    told = dict(options)
    try:
        interval_s = float(told.get("-i", "1"))
    except ValueError:
        interval_s = 0.0
    if interval_s < _SHORTEST_S or "-A" in told:
        return HostProbes(netns_fd, host_netns)
    kept = [word for option, value in options if option in _KEPT for word in (option, value) if word]
    return HostPings(netns_fd, host_netns, told.get("-i", "1"), kept)


class HostPings(HostProbes):
    """The pings beside one run of ping with that interval, s, as it is on a command line, and these options."""

    def __init__(self, netns_fd: int, host_netns: str, interval: str, options: Sequence[str]) -> None:
        super().__init__(netns_fd, host_netns)
        self._interval, self._options = interval, list(options)
        self._many, self._cold = _MANY if float(interval) < _DENSE_S else _FEW
        self._argv: list[str] = []
        """ping's command line; empty before `start`."""

    def added_ns(self, tool: ToolTimes, cost: Cost | None) -> float | None:
        """Return what to add to lower bounds, ns, by the pings so far; None if there are too few."""
        return direct_added_ns(tool, self.probes, cost)

    def estimate(self, tool: ToolTimes, cost: Cost | None, warm: Cost | None) -> HostRtt | None:
        """Return the host path term and the tracer's cost (`mace.tools.host_rtt`); None if there are too few pings."""
        return direct(tool, self.probes, cost, warm)

    async def _begin(self, address: str, payload_bytes: int) -> None:
        count = ["-c", str(self._many), "-i", self._interval, "-s", str(payload_bytes)]
        self._argv = ["ping", "-D", "-n", "-W", "1", *count, *self._options, address]

    def _can_send(self) -> bool:
        return bool(self._argv)

    def _next(self, now_ns: int, pace_ns: int) -> tuple[int, int]:
        return self._between(now_ns, pace_ns, _STARTS_NS), self._many

    @staticmethod
    def _inside(turn: int) -> bool:
        return turn % _CONTAINERS_TURN[1] == _CONTAINERS_TURN[0]

    def _send(self, due_ns: int, count: int, *, inside: bool) -> None:
        del count
        self._readers.append(asyncio.create_task(self._burst(due_ns, inside=inside)))

    async def _burst(self, due_ns: int, *, inside: bool) -> None:
        await asyncio.sleep(max(0, due_ns - _STARTS_NS - time.monotonic_ns()) / 1e9)
        process = await asyncio.create_subprocess_exec(
            *self._entering(inside=inside), *self._argv, stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, pass_fds=(self._netns_fd,),
            start_new_session=True, env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
        try:
            said, complaints = await process.communicate()
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        self._due_ns.pop(inside, None)
        self._readers = [task for task in self._readers if task is not asyncio.current_task()]
        self._note(said.decode(errors="replace"), complaints.decode(errors="replace"), inside=inside)

    def _note(self, said: str, complaints: str, *, inside: bool) -> None:
        """Take the round trips that a burst has printed."""
        reader = PingOutput(user_clock="-U" in self._options)
        try:
            for text in said.splitlines():
                reader.line(text)
            samples = reader.finish()
        except MaceError as error:
            self.why_not = self.why_not or f"the output of the host's ping is not understood: {error}"
            return
        if not len(samples):
            last = (complaints.strip().splitlines() or ["it sent nothing"])[-1]
            self._unanswered(f"probes cannot be sent: {last}")
            return
        answered = samples[samples.rtt_ns >= 0]
        for _ in range(0 if len(answered) else len(samples)):
            self._unanswered("the destination answers no probe")
        if len(answered):
            self._silent, self._answered = 0, self._answered + len(answered)
        warm = answered[answered.seq > self._cold]
        offset_ns = time.time_ns() - time.monotonic_ns()
        sent_ns = warm.stamp_utc_ns - offset_ns - warm.rtt_ns
        self._sent += (Sent(inside, *each) for each in zip(sent_ns.tolist(), warm.rtt_ns.tolist(), strict=True))

    @staticmethod
    def _timed(probe: Sent, seen: ProbeRecords, inner: str | None, outer: str) -> Probe | None:
        return pinged(probe.sent_ns + probe.rtt_ns, probe.rtt_ns, seen, inner, outer)

    async def _leave(self) -> None:
        for task in self._readers:
            task.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)
