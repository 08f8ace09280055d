"""The host path term of a tool that is about to run: probes from host and container, by turns, and what they come to.

`mace ping --host-path N` sends N from either before ping, in ten rounds of random order, at ping's own pace.
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
"""Before the first of them, for what starting the source has stirred up."""


@dataclass(frozen=True, slots=True)
class HostPath:
    """The term, by stretch and whole, with its interval."""

    host: list[Stretches]
    """By round."""
    container: list[Stretches]

    @property
    def term_ns(self) -> float:
        """What is to be added to a host RTT, ns."""
        return self._term(np.arange(ROUNDS))

    @property
    def interval(self) -> intervals.Interval | None:
        """Of it, ns."""
        return intervals.of_rounds(self._term, ROUNDS)

    def _term(self, drawn: Ints) -> float:
        return hostpath.term_ns([self.host[n] for n in drawn], [self.container[n] for n in drawn])

    def added_to(self, median: dict[str, Any] | None) -> tuple[float, float, float] | None:
        """A host RTT's median (as `Corrected.statistics` has it) with the term: (value, low, high), ns.

        The two errors are independent, so their sizes add as the sides of a right angle do.
        """
        own = self.interval
        if median is None or own is None:
            return None
        value = median["estimate"] + own.estimate
        low = np.hypot(median["estimate"] - median["low"], own.estimate - own.low)
        high = np.hypot(median["high"] - median["estimate"], own.high - own.estimate)
        return float(value), float(value - low), float(value + high)

    def as_dict(self, median: dict[str, Any] | None) -> dict[str, Any]:
        """term_ns, ci95_ns, by stretch, probes (seen of host and container), and host_rtt_p50_ns with its interval."""
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
        """The same for people."""
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
    """What is to be sent, and where from."""

    address: str
    """Of IPv4."""
    count: int
    """From either side."""
    interval_s: float
    netns_fd: int
    """The container's network namespace."""
    host_netns: str
    """Path or name of the host's; "": our own."""
    _blocks: list[tuple[int, bool, int, int, list[int]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        try:
            version = ip_address(self.address).version
        except ValueError:
            raise UsageError(f"--host-path: {self.address!r} is a name; probes want an IPv4 address") from None
        if version != 4:
            raise UsageError("--host-path: probes are of IPv4")
        if self.count < ROUNDS:
            raise UsageError(f"--host-path: {self.count} probes, expected {ROUNDS} at least, one a round")

    def measure(self, session: Session) -> HostPath:
        """Send them under a capture of their own, and see. Raises `UsageError` where none is seen on its whole way."""
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
                f"--host-path: it takes one device on either side, found {found}; [capture] outer names one"
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
                raise UsageError(f"--host-path: none of the {where}'s probes was seen on its whole way out")
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
