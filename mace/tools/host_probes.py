"""Sends probes from the host and from a container while a tool runs there, in turns and at the tool's own pace.

    the tool's requests   |         |         |         |         |         |         |
    probes                                          : host                                 : container, ...
                                                  in the middle between two requests

At most one probe in `SAMPLES_A_PROBE` samples and `MOST_A_SECOND` are sent. A tool that sends a request every few
hundred microseconds keeps the caches warm, and a probe by itself would find its own code cold; then probes follow one
another in bursts, and the first ones of a burst do not count.

The capture records the probes as it does all packets; `tee` selects the records of their length. `harvest` combines
both, so that few records are kept. `mace.tools.host_rtt` computes the host RTT from the result.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from ipaddress import ip_address
from itertools import pairwise
from pathlib import Path
from typing import Final

from collector.machine.netns import path_of
from contracts.interfaces import StreamHeader, StreamItem, StreamSink
from contracts.records import Batch
from contracts.topology import Role, Topology
from mace.tools.host_path import Probe, ProbeCollector, ProbeRecords, timed
from mace.tools.host_rtt import RARE_ERROR_NS

SAMPLES_A_PROBE: Final = 5
"""Samples of the tool for each probe, at least."""
MOST_A_SECOND: Final = 10
_BURST: Final = 5
"""Probes in a burst; the first two of them warm the caches."""
_FLOOD_NS: Final = 2_000_000
"""A tool with a shorter pace keeps its caches warm: probes follow in bursts."""
_DENSE_NS: Final = 20_000_000
"""With a shorter pace the limit of ten a second makes probes ten or more times rarer than the tool's packets."""
_PACES: Final = 9
"""Number of the last requests whose distances give the pace: their median."""
_AHEAD_NS: Final = 3_000_000
"""Shortest time from asking for a probe to its sending: the prober has to wake up before."""
_AFTER_NS: Final = 20_000_000
"""Records of a probe are complete this long after its reply has arrived."""
_SILENT: Final = 5
"""After so many probes in a row without a reply no more are sent."""
_MOST: Final = 4096
"""Probes that are kept; beyond that, every other one is dropped."""
_LEAVING_S: Final = 1.5
"""Time for a prober to end: it may wait for a reply."""
_HEADERS: Final = {4: 28, 6: 48}
"""Bytes of the IP and ICMP headers, by the version of IP."""
_LEAST_PAYLOAD: Final = 16
_PROBER: Final = Path(__file__).with_name("host_prober.py")


def prober_command(address: str, payload_bytes: int) -> list[str]:
    """Return the command line of `host_prober.py`, to be run in a namespace."""
    return [sys.executable, "-I", "-S", str(_PROBER), address, str(payload_bytes)]


def payload_beside(tool_bytes: int) -> int:
    """Return the payload of a probe for a tool with that payload: 8 bytes less, so that their records differ."""
    return tool_bytes - 8 if tool_bytes - 8 >= _LEAST_PAYLOAD else tool_bytes + 8


@dataclass(frozen=True, slots=True)
class _Sent:
    """A probe that was sent and answered."""

    inside: bool
    sent_ns: int
    rtt_ns: int


class HostProbes:
    """The probes beside one run of a tool in the namespace of `netns_fd`, which the caller closes.

    `host_netns` is the path or name of the host's network namespace; "" is this process's own.
    """

    def __init__(self, netns_fd: int, host_netns: str) -> None:
        self._netns_fd, self._host_netns = netns_fd, host_netns
        self._records = ProbeCollector()
        self._length = 0
        """Length of a probe with its headers; 0 before `start`."""
        self._topology = Topology(0, 0)
        self._recent: deque[int] = deque(maxlen=_PACES)
        self._samples = self._asked = self._turn = 0
        self._last_asked_ns = 0
        self._due_ns: dict[bool, int] = {}
        """When the probes are due that were asked for and have not been reported, by side."""
        self._sent: list[_Sent] = []
        """Probes whose records are not complete yet."""
        self._probers: dict[bool, asyncio.subprocess.Process] = {}
        self._readers: list[asyncio.Task[None]] = []
        self._ended = False
        self._silent = self._answered = 0
        self.probes: list[Probe] = []
        """Probes with records on their whole way, in the order of sending."""
        self.why_not = ""
        """Why no probe was sent, or none any more; empty if nothing kept them."""

    # The probers.

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Let `start` be called in the block; its probers have ended after it."""
        try:
            yield
        finally:
            self._ended = True
            await self._leave()

    async def start(self, address: str, payload_bytes: int) -> None:
        """Start the probers for that destination, once."""
        if self._probers or self.why_not or self._ended:
            return
        try:
            version = ip_address(address).version
        except ValueError:
            self.why_not = f"{address!r} is no address that probes can be sent to"
            return
        self._length = _HEADERS[version] + payload_bytes
        argv = prober_command(address, payload_bytes)
        for inside in (False, True):
            process = await asyncio.create_subprocess_exec(
                *self._entering(inside=inside), *argv, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE, pass_fds=(self._netns_fd,), start_new_session=True,
            )  # fmt: skip
            self._probers[inside] = process
            self._readers.append(asyncio.create_task(self._read(process, inside=inside)))

    def _entering(self, *, inside: bool) -> list[str]:
        if inside:
            return ["nsenter", f"--net=/proc/self/fd/{self._netns_fd}", "--"]
        return ["nsenter", f"--net={path_of(self._host_netns)}", "--"] if self._host_netns else []

    async def _read(self, process: asyncio.subprocess.Process, *, inside: bool) -> None:
        assert process.stdout is not None
        assert process.stderr is not None
        async for line in process.stdout:
            self._due_ns.pop(inside, None)
            told = json.loads(line)
            if isinstance(told, str):
                self._unanswered(f"probes cannot be sent: {told}")
            else:
                self._take(told, inside=inside)
        complaints = (await process.stderr.read()).decode(errors="replace").strip().splitlines()
        if complaints:
            self.why_not = self.why_not or f"the prober failed: {complaints[-1]}"

    def _take(self, told: Sequence[tuple[int, int]], *, inside: bool) -> None:
        for sent_ns, rtt_ns in told[len(told) // 2 :]:
            if rtt_ns >= 0:
                self._sent.append(_Sent(inside, sent_ns, rtt_ns))
                self._silent, self._answered = 0, self._answered + 1
            else:
                self._unanswered("the destination answers no probe")

    def _unanswered(self, why: str) -> None:
        """Count a probe without a reply; after several in a row, as during a change of routes, no more are sent."""
        self._silent += 1
        if self._silent >= _SILENT:
            self.why_not = self.why_not or why

    async def _leave(self) -> None:
        for process in self._probers.values():
            assert process.stdin is not None
            process.stdin.close()
        if self._readers:
            await asyncio.wait(self._readers, timeout=_LEAVING_S)
        for process in self._probers.values():
            with suppress(ProcessLookupError):
                if process.returncode is None:
                    process.kill()
            await process.wait()
        for reader in self._readers:
            await reader

    # The tool's requests.

    @property
    def pace_s(self) -> float:
        """Median distance of the tool's last requests, s; 0 while it is not known."""
        distances = sorted(b - a for a, b in pairwise(self._recent))
        return distances[len(distances) // 2] / 1e9 if distances else 0.0

    @property
    def rarer(self) -> bool:
        """Whether the probes are so much rarer than the tool's packets that they find other caches than these."""
        return 0 < self.pace_s < _DENSE_NS / 1e9

    @property
    def method_error_ns(self) -> float:
        """Standard error of the term by these probes, apart from their scatter, ns; none if caches stay warm."""
        return RARE_ERROR_NS if self.pace_s >= _FLOOD_NS / 1e9 else 0.0

    def requested(self, times_ns: Iterable[int]) -> None:
        """Note requests of the tool, or their replies, CLOCK_MONOTONIC in order, and ask for probes that are due."""
        before = self._samples
        for each in times_ns:
            self._samples += 1
            self._recent.append(each)
        ready = self._probers and not (self.why_not or self._due_ns or self._ended)
        if ready and self._samples > before:
            self._ask(time.monotonic_ns())

    def _ask(self, now_ns: int) -> None:
        if len(self._recent) < 3:
            return
        pace_ns = max(round(self.pace_s * 1e9), 1)
        count = _BURST if pace_ns < _FLOOD_NS else 1
        due_ns = now_ns if count > 1 else self._recent[-1] + pace_ns // 2
        if count == 1 and due_ns < now_ns + _AHEAD_NS:
            due_ns += -(-(now_ns + _AHEAD_NS - due_ns) // pace_ns) * pace_ns
        allowed = self._samples // SAMPLES_A_PROBE - self._asked
        if allowed < count or due_ns - self._last_asked_ns < count * 1_000_000_000 // MOST_A_SECOND:
            return
        inside = bool(self._turn % 2)
        stdin = self._probers[inside].stdin
        assert stdin is not None
        stdin.write(f"{due_ns} {count}\n".encode())
        self._turn, self._asked = self._turn + 1, self._asked + count
        self._due_ns[inside] = self._last_asked_ns = due_ns

    # The records.

    def tee(self, sink: StreamSink | None, on_open: Callable[[StreamHeader], None]) -> StreamSink:
        """Return a sink that passes the stream on to `sink` and selects the records of the probes.

        `on_open` gets the stream's header.
        """
        return _Tee(self, sink, on_open)

    def select(self, item: StreamItem) -> None:
        """Keep the probes' records of the next item of the stream."""
        if isinstance(item, Topology) or (isinstance(item, Batch) and self._length):
            self._records.add(item, self._length)
        if isinstance(item, Topology):
            self._topology = item

    def harvest(self, upto_ns: int | None = None) -> None:
        """Find the times of the probes that ended before `upto_ns` (None: all), whose records are all there."""
        done = [s for s in self._sent if upto_ns is None or s.sent_ns + s.rtt_ns + _AFTER_NS < upto_ns]
        if done:
            records = self._records.whole()
            outer = sorted({d.name for d in self._topology.devices if d.role is Role.OUTER})
            inode = os.fstat(self._netns_fd).st_ino
            inner = sorted({d.name for d in self._topology.devices if d.role is Role.INNER and d.netns == inode})
            for each in done:
                self._time(each, records, inner, outer)
            self._sent = [s for s in self._sent if s not in done]
        waiting = [*(s.sent_ns for s in self._sent), *self._due_ns.values()]
        self._records.forget(min(waiting, default=time.monotonic_ns()) - _AHEAD_NS)

    def _time(self, probe: _Sent, records: ProbeRecords, inner: Sequence[str], outer: Sequence[str]) -> None:
        seen = records.between(probe.sent_ns, probe.sent_ns + probe.rtt_ns + _AFTER_NS)
        # A probe leaves by one of the outer devices: a route may change while the tool runs.
        for first in inner if probe.inside else (None,):
            for last in outer:
                found = timed(probe.sent_ns, probe.rtt_ns, seen, first, last)
                if found is not None:
                    self.probes.append(found)
                    if len(self.probes) > _MOST:
                        self.probes = self.probes[::2]
                    return

    def remark(self) -> str:
        """Return why there are no probes, or too few, for people; empty if nothing is to be said."""
        if self.why_not:
            return f"no probes{' any more' if self._answered else ''}: {self.why_not}"
        if not self._probers:
            return "no probes: the tool's destination is not known"
        if self._answered and not self.probes:
            return f"none of {self._answered} probes has records on its whole way out of the outer device"
        inside = sum(p.inside for p in self.probes)
        return (
            f"too few probes: {len(self.probes) - inside} of the host, {inside} of the container; one is sent per "
            f"{SAMPLES_A_PROBE} samples"
        )


class _Tee:
    """Passes a stream on, and shows it to the probes."""

    def __init__(self, probes: HostProbes, sink: StreamSink | None, on_open: Callable[[StreamHeader], None]) -> None:
        self._probes, self._sink, self._on_open = probes, sink, on_open

    async def open(self, header: StreamHeader) -> None:
        self._on_open(header)
        if self._sink is not None:
            await self._sink.open(header)

    async def write(self, item: StreamItem) -> None:
        self._probes.select(item)
        if self._sink is not None:
            await self._sink.write(item)

    async def aclose(self) -> None:
        if self._sink is not None:
            await self._sink.aclose()
