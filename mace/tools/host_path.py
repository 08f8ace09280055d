"""The host path term: how much longer a host process's packet takes than the correction leaves of a container's.

The correction subtracts the time from `net_dev_queue` at the inner device to `net_dev_queue` at the outer device. At
low packet rates that is many microseconds more than the container added: the subtracted part runs the host's rules and
warms the caches for the rest of the way, while a host packet runs everything with cold caches:

    host process    S ── routing, output and postrouting rules ── Q outer ── X outer ── ...      all of it cold
    container       S ── Q inner ─┆─ bridge, the same rules, ... ─┆─ Q outer ── X outer ── ...   only the start is cold
                                  └────────── subtracted ─────────┘

The term is therefore measured with *probes* from the host and from the container, of the tool's pace and size. The
*host path term* is the time of a host's probe less the time that the correction leaves of a container's packet, over
these stretches:

    send     S to Q outer for the host's probe, S to Q inner for the container's
    device   Q outer to X outer (`net_dev_start_xmit`: the driver is called)
    beyond   X outer to the request's last record on this machine before the far end receives it
    answer   from that record to the reply's first record at the outer device

`beyond` and `answer` exist only if the far end is on this machine, as in a lab: it then shares the caches, and would
answer a host process later than it answers the container. For a far end on another machine the term has neither.

The way from the outer device back to the sender, and a tool's round trips, are not part of the term, so it cannot be
tuned to the value that it is compared with. The term is added to the host RTT, and its uncertainty to that interval.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from contracts.arrays import Ints
from contracts.hooks import ALONG, Hook, Way
from contracts.records import Batch
from contracts.topology import Topology

MOST_RECORDS: Final = 100_000
"""Most records that are kept of packets as long as a probe: 6 MB, and half a second of a flood of such packets."""
_ARRIVALS: Final = ALONG[Way.RECEIVE]
_EVER: Final = 1 << 62
_LATEST_NS: Final = 5_000_000
"""A probe without a record within this time after its send is left out."""


@dataclass(frozen=True, slots=True)
class Stretches:
    """The times over each stretch, ns, int64: one value per probe with records on its whole way out."""

    send: Ints
    device: Ints
    beyond: Ints
    answer: Ints
    """Times of the probes that a far end on this machine has answered, so it may be shorter than the other arrays."""

    def __len__(self) -> int:
        return len(self.send)


class ProbeCollector:
    """Collects the records of packets of one length, with the names of their devices."""

    def __init__(self) -> None:
        self._parts: list[tuple[Batch, npt.NDArray[np.object_]]] = []
        self._names: npt.NDArray[np.object_] = np.array([""], object)

    def add(self, item: Topology | Batch, length: int) -> None:
        """Add the next item of a stream: from a batch, the records of packets of that length."""
        if isinstance(item, Topology):
            names = [s.name or _only_name(item, s) for s in item.sightings]
            self._names = np.array(names, object)
            return
        batch = item[item.l3_len == length]
        batch = batch[batch.hook != Hook.LOST]
        if len(batch):
            self._parts.append((batch, self._names[batch.dev]))

    def forget(self, before_ns: int) -> None:
        """Drop the batches that end before `before_ns`, and the earliest ones above `MOST_RECORDS` records."""
        kept = [part for part in self._parts if int(part[0].ts_ns[-1]) >= before_ns]
        while sum(len(batch) for batch, _ in kept) > MOST_RECORDS:
            kept.pop(0)
        self._parts = kept

    def whole(self) -> ProbeRecords:
        """Return all records that are kept."""
        batch = Batch.concatenate([part for part, _ in self._parts])
        names = np.concatenate([names for _, names in self._parts]) if self._parts else np.zeros(0, object)
        return ProbeRecords(batch.ts_ns, batch.hook, batch.skb_id, names)


def _only_name(topology: Topology, sighting: object) -> str:
    found = topology.candidates(sighting)  # type: ignore[arg-type]
    return found[0].name if len(found) == 1 else ""


@dataclass(frozen=True, slots=True)
class ProbeRecords:
    """Records in time order, as columns of equal length."""

    ts_ns: Ints
    hook: npt.NDArray[np.uint8]
    skb_id: npt.NDArray[np.uint64]
    device: npt.NDArray[np.object_]

    def since(self, start_ns: int) -> ProbeRecords:
        """Return the records from `start_ns` on."""
        return self.between(start_ns, _EVER)

    def between(self, start_ns: int, end_ns: int) -> ProbeRecords:
        """Return the records from `start_ns` until before `end_ns`."""
        a, b = np.searchsorted(self.ts_ns, [start_ns, end_ns])
        return ProbeRecords(self.ts_ns[a:b], self.hook[a:b], self.skb_id[a:b], self.device[a:b])


def stretches(sent_ns: Sequence[int], seen: ProbeRecords, inner: str | None, outer: str) -> Stretches:
    """Return the probes' times over each stretch; a probe with a missing record is left out.

    `sent_ns` are the times of sending, CLOCK_MONOTONIC. `seen` are the records of the probes' length, from before the
    first probe until after the last. `inner` is the container's own device; None for the host's probes, which begin at
    `outer`.
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
            continue  # the far end is on another machine
        reply = _first(times, hooks, devices, (last, last + _LATEST_NS), outer, _ARRIVALS)
        if reply is not None:
            answers.append(times[reply] - last)
    send, device, beyond = np.array(rows, np.int64).reshape(-1, 3).T
    return Stretches(send, device, beyond, np.array(answers, np.int64))


def _first(
    times: list[int], hooks: list[int], devices: list[str], within: tuple[int, int], device: str, wanted: Sequence[Hook]
) -> int | None:
    """Return the index of the first record at `device`, of one of these hooks, between the two times; None if none."""
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
    """Return (send, device, beyond) of one probe, ns, and the time of the last record of its way out; None if unknown.

    `crossing`: the probe comes to the outer device from another device, which may have the same name.
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
                break  # another packet uses the buffer
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


@dataclass(frozen=True, slots=True)
class Probe:
    """The times of one probe with records on its whole way out, ns."""

    inside: bool
    """Whether it was sent from the container."""
    send_ns: int
    device_ns: int
    far_ns: int
    """`beyond` and `answer`; -1 if the far end is on another machine."""
    hooks: tuple[int, ...]
    """Hooks of the records within the probe's round trip, by which tracing has made it longer."""
    egress: tuple[int, ...] = ()
    """Of a container's probe: hooks of those within the overhead on the way out."""
    ingress: tuple[int, ...] = ()
    """And on the way in."""


def timed(sent_ns: int, rtt_ns: int, seen: ProbeRecords, inner: str | None, outer: str) -> Probe | None:
    """Return the times of one probe, sent at `sent_ns` (CLOCK_MONOTONIC); None if a record of its way is missing.

    `inner` is the container's own device; None for a probe from the host.
    """
    found = stretches([sent_ns], seen, inner, outer)
    if not len(found):
        return None
    far_ns = int(found.beyond[0] + found.answer[0]) if len(found.answer) else -1
    within = seen.between(sent_ns, sent_ns + rtt_ns)
    hooks = tuple(within.hook.tolist())
    probe = Probe(inner is not None, int(found.send[0]), int(found.device[0]), far_ns, hooks)
    if inner is None:
        return probe
    out, back = _in_devices(within, sent_ns + int(found.send[0]), outer)
    return replace(probe, egress=out, ingress=back)


def _in_devices(within: ProbeRecords, queued_ns: int, outer: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the hooks of the records within the overheads out and in, of a probe that was queued first at that time.

    A record is within the overhead if its probe's time is: the record that begins the overhead is, the one that ends it
    is not.
    """
    rest = within.since(queued_ns)
    at_outer = rest.device == outer
    left = np.flatnonzero(at_outer & (rest.hook == Hook.NET_DEV_QUEUE) & (rest.ts_ns > queued_ns))
    came = np.flatnonzero(at_outer & np.isin(rest.hook, _ARRIVALS))
    out = rest.hook[: left[0]].tolist() if len(left) else []
    back = rest.hook[came[0] :].tolist() if len(came) else []
    return tuple(out), tuple(back)
