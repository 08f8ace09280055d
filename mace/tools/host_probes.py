"""Measures the host path term (`mace.tools.host_path`) before a tool runs, with probes from host and container.

`mace ping --host-path N` sends N probes from each side before ping, in ten rounds of random order, at ping's pace.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any, Final

import numpy as np

from collector.machine.netns import path_of
from contracts.arrays import Ints
from contracts.errors import MaceError, UsageError
from contracts.interfaces import StreamItem
from contracts.records import Batch
from contracts.topology import Role, Topology
from correlator import intervals
from mace.live.session import Session
from mace.tools import host_path as hostpath
from mace.tools.host_path import STRETCHES, ProbeCollector, Stretches

ROUNDS: Final = 10
_SEED: Final = 1
_QUIET_S: Final = 0.2
"""Wait before the first probe, so that the effects of starting the source have subsided."""


@dataclass(frozen=True, slots=True)
class HostPath:
    """The host path term, by stretch and in all, with its interval."""

    host: list[Stretches]
    """The host's probes, by round."""
    container: list[Stretches]
    """The container's probes, by round."""

    @property
    def term_ns(self) -> float:
        """The term, to be added to a host RTT, ns."""
        return self._term(np.arange(ROUNDS))

    @property
    def interval(self) -> intervals.Interval | None:
        """The term's interval, ns; None if there are too few rounds."""
        return intervals.of_rounds(self._term, ROUNDS)

    def _term(self, drawn: Ints) -> float:
        return hostpath.term_ns([self.host[n] for n in drawn], [self.container[n] for n in drawn])

    def added_to(self, median: dict[str, Any] | None) -> tuple[float, float, float] | None:
        """Return a median host RTT (of `Corrected.statistics`) plus the term: (value, low, high), ns; None if unknown.

        The two errors are independent, so the width of the sum's interval is the root of the sum of squares.
        """
        own = self.interval
        if median is None or own is None:
            return None
        value = median["estimate"] + own.estimate
        low = np.hypot(median["estimate"] - median["low"], own.estimate - own.low)
        high = np.hypot(median["high"] - median["estimate"], own.high - own.estimate)
        return float(value), float(value - low), float(value + high)

    def as_dict(self, median: dict[str, Any] | None) -> dict[str, Any]:
        """Return the term for JSON.

        The keys are term_ns, ci95_ns, one `*_ns` per stretch, probes (of host and container, with records), and
        host_rtt_p50_ns with host_rtt_ci95_ns.
        """
        found: dict[str, Any] = {"term_ns": round(self.term_ns), "ci95_ns": None, "host_rtt_p50_ns": None}
        ends, whole = intervals.bounds(self.interval), self.added_to(median)
        if ends is not None:
            found["ci95_ns"] = [round(end) for end in ends]
        if whole is not None:
            found["host_rtt_p50_ns"], *found["host_rtt_ci95_ns"] = map(round, whole)
        for name in STRETCHES:
            found[f"{name}_ns"] = round(hostpath.term_ns(self.host, self.container, [name]))
        return found | {"probes": [sum(map(len, side)) for side in (self.host, self.container)]}

    def line(self, median: dict[str, Any] | None) -> str:
        """Return the term as one line for people."""
        told = self.as_dict(median)
        ends = told["ci95_ns"]
        between = f" ({ends[0] / 1000:+.1f} … {ends[1] / 1000:+.1f})" if ends else ""
        parts = " ".join(f"{name}={told[f'{name}_ns'] / 1000:+.1f}" for name in STRETCHES)
        text = f"host path term {told['term_ns'] / 1000:+.1f} µs{between}: {parts}"
        if told["host_rtt_p50_ns"] is None:
            return text
        value, low, high = (ns / 1000 for ns in (told["host_rtt_p50_ns"], *told["host_rtt_ci95_ns"]))
        return f"{text} · median host RTT with it {value:.1f} ({low:.1f} … {high:.1f})"


@dataclass(slots=True)
class Probing:
    """The probes to send from the host and from a container."""

    address: str
    """IPv4 address of the far end."""
    count: int
    """Number of probes from each side."""
    interval_s: float
    netns_fd: int
    """File descriptor of the container's network namespace."""
    host_netns: str
    """Path or name of the host's network namespace; "" is this process's own."""
    _blocks: list[tuple[int, bool, int, int, list[int]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        try:
            version = ip_address(self.address).version
        except ValueError:
            raise UsageError(f"--host-path: {self.address!r} is a name; probes need an IPv4 address") from None
        if version != 4:
            raise UsageError(f"--host-path: {self.address} is an IPv6 address; probes need an IPv4 address")
        if self.count < ROUNDS:
            raise UsageError(f"--host-path: {self.count} probes, expected at least {ROUNDS}, one for each round")

    def measure(self, session: Session) -> HostPath:
        """Send the probes under a capture of their own and return the term.

        Raises `UsageError` if no probe of a side has records on its whole way, or a side has several devices.
        """
        seen, last = ProbeCollector(), Topology(0, 0)

        def take(item: StreamItem) -> None:
            nonlocal last
            if isinstance(item, Topology | Batch):
                seen.add(item, hostpath.PROBE_LEN)
            if isinstance(item, Topology):
                last = item

        session.watch(self._send, take)
        outer = sorted({d.name for d in last.devices if d.role is Role.OUTER})
        inode = os.fstat(self.netns_fd).st_ino
        inner = sorted({d.name for d in last.devices if d.role is Role.INNER and d.netns == inode})
        if len(outer) != 1 or len(inner) != 1:
            found = f"outer {', '.join(outer) or 'none'}, inner {', '.join(inner) or 'none'}"
            raise UsageError(
                f"--host-path: expected one outer and one inner device, found {found}; set [capture] outer to one"
            )
        records = seen.whole()
        sides: dict[bool, list[Stretches]] = {True: [], False: []}
        for _, inside, begin_ns, end_ns, sent in sorted(self._blocks):
            part = records.between(begin_ns, end_ns)
            sides[inside].append(hostpath.stretches(sent, part, inner[0] if inside else None, outer[0]))
        if len(sides[True]) < ROUNDS or len(sides[False]) < ROUNDS:
            raise UsageError("interrupted")
        for where, parts in (("host", sides[False]), ("container", sides[True])):
            if not any(map(len, parts)):
                raise UsageError(f"--host-path: none of the {where}'s probes has records on its whole way out")
        return HostPath(sides[False], sides[True])

    async def _send(self) -> None:
        order = random.Random(_SEED)
        await asyncio.sleep(_QUIET_S)
        for number in range(ROUNDS):
            for inside in order.sample((True, False), 2):
                begin_ns = time.monotonic_ns()
                sent = await self._block(self.count // ROUNDS, inside=inside)
                self._blocks.append((number, inside, begin_ns, time.monotonic_ns(), sent))

    async def _block(self, count: int, *, inside: bool) -> list[int]:
        argv = hostpath.probe_command(self.address, count, int(self.interval_s * 1e9))
        if inside:
            argv = ["nsenter", f"--net=/proc/self/fd/{self.netns_fd}", "--", *argv]
        elif self.host_netns:
            argv = ["nsenter", f"--net={path_of(self.host_netns)}", "--", *argv]
        process = await asyncio.create_subprocess_exec(
            *argv, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            pass_fds=(self.netns_fd,), start_new_session=True,
        )  # fmt: skip
        try:
            said, complaints = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode:
            raise MaceError(f"--host-path: {complaints.decode(errors='replace').strip().splitlines()[-1]}")
        sent: list[int] = json.loads(said)
        return sent
