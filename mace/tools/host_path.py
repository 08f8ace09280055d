"""What a host process's packet spends on its way out, where a container's has something of it behind it already.

The correction takes off `net_dev_queue` outer - inner, and with it more than the container added: what is left of the
way out has been warmed up by what was taken off. Where packets are rare that is many microseconds:

    host process    S ── routing, output and postrouting rules ── Q outer ── X outer ── ...      all of it cold
    container       S ── Q inner ─┆─ bridge, the same rules, ... ─┆─ Q outer ── X outer ── ...   only the start is cold
                                  └────────── taken off ──────────┘

So the correction's claim is put to the test where the answer is known: the same *probe* is sent from the host and from
the container, at the pace of the tool, alternating with it in time and never beside it. By how much a host's probe
takes longer over a stretch than what the correction leaves of a container's is the *host path term*:

    send     S to Q outer of a host's,  S to Q inner of a container's
    device   Q outer to X outer         (`net_dev_start_xmit`: the driver is called)
    beyond   X outer to the last that this machine sees of the request before it is taken in
    answer   from there to the first that the outer device sees of the reply

The last two are there only where the far end is on this machine, as in a lab: it shares the caches, and a host process
would have seen it answer later than the container does. Where it is elsewhere nothing of it is in the term.

What comes back to the sender is no part of it, nor is a tool's round trip: it cannot be tuned to what it is compared
with. It is added to the host RTT, and its uncertainty belongs into that one's interval.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from contracts.arrays import Ints
from contracts.hooks import ALONG, Hook, Way
from contracts.records import Batch
from contracts.topology import Topology
from mace.lab import probing

PAYLOAD_BYTES: Final = 48
"""Of a probe: not the 56 of ping, so that its packets are told from the tool's by their length."""
PROBE_LEN: Final = 20 + 8 + PAYLOAD_BYTES
"""Bytes with the IPv4 header."""
STRETCHES: Final = ("send", "device", "beyond", "answer")
"""Of the host path term."""
_ARRIVALS: Final = ALONG[Way.RECEIVE]
_LATEST_NS: Final = 5_000_000
"""A probe's first record comes this soon, or it is left out."""


def probe_command(address: str, count: int, interval_ns: int) -> list[str]:
    """The command line that sends probes to an IPv4 address, to be run in the host's or a container's namespace."""
    return probing.command("probes", address, count, interval_ns, PAYLOAD_BYTES)


@dataclass(frozen=True, slots=True)
class Stretches:
    """Of each probe that was seen on its whole way out, ns, int64."""

    send: Ints
    device: Ints
    beyond: Ints
    answer: Ints
    """Of those that a far end on this machine has answered; the others are left out here."""

    def __len__(self) -> int:
        return len(self.send)


class ProbeCollector:
    """The records of one length, with the names of the devices that they were seen at."""

    def __init__(self) -> None:
        self._parts: list[tuple[Batch, npt.NDArray[np.object_]]] = []
        self._names: npt.NDArray[np.object_] = np.array([""], object)

    def add(self, item: Topology | Batch, length: int) -> None:
        """Take the next item of a stream; of a batch the records of that length."""
        if isinstance(item, Topology):
            names = [s.name or _only_name(item, s) for s in item.sightings]
            self._names = np.array(names, object)
            return
        batch = item[item.l3_len == length]
        batch = batch[batch.hook != Hook.LOST]
        if len(batch):
            self._parts.append((batch, self._names[batch.dev]))

    def whole(self) -> ProbeRecords:
        """All of them."""
        batch = Batch.concatenate([part for part, _ in self._parts])
        names = np.concatenate([names for _, names in self._parts]) if self._parts else np.zeros(0, object)
        return ProbeRecords(batch.ts_ns, batch.hook, batch.skb_id, names)


def _only_name(topology: Topology, sighting: object) -> str:
    found = topology.candidates(sighting)  # type: ignore[arg-type]
    return found[0].name if len(found) == 1 else ""


@dataclass(frozen=True, slots=True)
class ProbeRecords:
    """Columns of equal length, in the order of time."""

    ts_ns: Ints
    hook: npt.NDArray[np.uint8]
    skb_id: npt.NDArray[np.uint64]
    device: npt.NDArray[np.object_]

    def between(self, start_ns: int, end_ns: int) -> ProbeRecords:
        """Those of a stretch of time, the end excluded."""
        a, b = np.searchsorted(self.ts_ns, [start_ns, end_ns])
        return ProbeRecords(self.ts_ns[a:b], self.hook[a:b], self.skb_id[a:b], self.device[a:b])


def stretches(sent_ns: Sequence[int], seen: ProbeRecords, inner: str | None, outer: str) -> Stretches:
    """How long the probes took over each stretch; those of which a record is missing are left out.

    `inner`: the container's own device; None for probes of the host, which begin at `outer`. `seen`: records
    of the probes' length from before the first to after the last of them.
    """
    rows: list[tuple[int, int, int]] = []
    answers: list[int] = []
    times, hooks = seen.ts_ns.tolist(), seen.hook.tolist()
    buffers, devices = seen.skb_id.tolist(), seen.device.tolist()
    for k, sent in enumerate(sent_ns):
        until = min(sent + _LATEST_NS, sent_ns[k + 1] if k + 1 < len(sent_ns) else sent + _LATEST_NS)
        probe = (sent, until, inner or outer, outer)
        row = _way_out(times, hooks, buffers, devices, probe, crossing=inner is not None)
        if row is None:
            continue
        *found, last = row
        rows.append((found[0], found[1], found[2]))
        if not found[2]:
            continue  # the far end is elsewhere
        reply = _first(times, hooks, devices, (last, last + _LATEST_NS), outer, _ARRIVALS)
        if reply is not None:
            answers.append(times[reply] - last)
    send, device, beyond = np.array(rows, np.int64).reshape(-1, 3).T
    return Stretches(send, device, beyond, np.array(answers, np.int64))


def _first(
    times: list[int], hooks: list[int], devices: list[str], within: tuple[int, int], device: str, wanted: Sequence[Hook]
) -> int | None:
    """Index of the first record from the one time on and before the other that is at `device` and of these hooks."""
    at = bisect_left(times, within[0])
    while at < len(times) and times[at] < within[1]:
        if devices[at] == device and hooks[at] in wanted:
            return at
        at += 1
    return None


def _way_out(
    times: list[int],
    hooks: list[int],
    buffers: list[int],
    devices: list[str],
    probe: tuple[int, int, str, str],
    *,
    crossing: bool,
) -> tuple[int, int, int, int] | None:
    """(send, device, beyond) of one probe, ns, and the time of the last record of its way out.

    `crossing`: it comes to the outer device from another, which may have the same name.
    """
    sent, until, first, outer = probe
    at = _first(times, hooks, devices, (sent, until), first, (Hook.NET_DEV_QUEUE,))
    if at is None:
        return None
    begin, left, last = times[at], None, None
    queued = None if crossing else begin
    for i in range(at + 1, len(times)):
        if times[i] > begin + _LATEST_NS:
            break
        if buffers[i] != buffers[at]:
            continue
        if hooks[i] == Hook.NET_DEV_QUEUE and devices[i] in (first, outer):
            if devices[i] != outer or queued is not None:
                break  # the buffer was used again
            queued = times[i]
        elif hooks[i] == Hook.NET_DEV_START_XMIT and devices[i] == outer and queued is not None:
            left = last = times[i]
        elif left is not None:
            last = times[i]
            if hooks[i] == Hook.NETIF_RECEIVE_SKB:
                break
    if queued is None or left is None or last is None:
        return None
    return begin - sent, left - queued, last - left, last


def term_ns(host: Sequence[Stretches], container: Sequence[Stretches], names: Iterable[str] = STRETCHES) -> float:
    """The host path term over these stretches, ns: medians of all probes, host's - container's. nan without probes.

    Where no far end on this machine has answered any, their answers are no part of it.
    """
    sides = ((1, host), (-1, container))
    answered = any(len(part.answer) for _, parts in sides for part in parts)
    seen = any(len(part) for _, parts in sides for part in parts)
    total = 0.0
    for name in names:
        if name == "answer" and seen and not answered:
            continue
        for sign, parts in sides:
            values = np.concatenate([getattr(part, name) for part in parts])
            total += sign * float(np.median(values)) if len(values) else float("nan")
    return total
