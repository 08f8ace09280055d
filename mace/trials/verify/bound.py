"""Computes how many packets can be matched at all with the existing records, without the engine's results for them.

If records were removed (`allowed`), a packet needs every record from its inner to its outer device, and no gap in any
CPU's records in that time, because a lost record may have been the end of its buffer. If a source does not record all
packets, or the kernel changes them (`kept`), a packet needs a record at both ends, identified by the observers' stamps;
the two records must have the same content key, or without keys the same buffer and length.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from contracts.arrays import Ints, Mask
from contracts.hooks import ALONG, Hook, Way
from contracts.records import Batch
from contracts.topology import Device, Role, Sighting, Topology
from correlator.records import Records, named
from mace.trials.verify.stream import CollectedStream
from mace.trials.verify.truth import NumberedPacket, PathRow, Sight

_RECEIVED = ALONG[Way.RECEIVE]


def allowed(whole: CollectedStream, gone: Mask, matched: Container[int], rows: Sequence[PathRow]) -> int:
    """Return how many of the packets matched in the whole stream can be matched without the records that are `gone`."""
    batch = Batch.concatenate([item for item in whole.items if isinstance(item, Batch)])
    order = np.argsort(batch.skb_id, kind="stable")
    ts, skb = batch.ts_ns[order], batch.skb_id[order]
    lost_before = np.append(0, np.cumsum(gone[order]))
    first = np.searchsorted(skb, skb, "left")
    upto = np.searchsorted(skb, skb, "right")
    records = Records.of(batch[order])
    place = {name: i for i, name in enumerate(named(records).tolist())}
    gaps = _gaps(batch, gone)
    count = 0
    for row in rows:
        if row.packet not in matched:
            continue
        at = place[row.packet]
        times = ts[first[at] : upto[at]]
        begin, end = (ns - whole.offset_ns for ns in row.between)
        a = first[at] + int(np.searchsorted(times, begin, "left"))
        b = first[at] + int(np.searchsorted(times, end, "right"))
        cut = bool(((gaps[0] < end) & (gaps[1] > begin)).any())
        if lost_before[a] == lost_before[b] and not cut:
            count += 1
    return count


def _gaps(batch: Batch, gone: Mask) -> tuple[Ints, Ints]:
    """Return the beginning and end of each gap: the times of the remaining records around it."""
    begins, ends = [], []
    for cpu in np.unique(batch.cpu):
        mine = np.flatnonzero(batch.cpu == cpu)
        lost = np.concatenate([[False], gone[mine], [False]])
        edges = np.flatnonzero(lost[1:] != lost[:-1])
        times = np.concatenate([[batch.ts_ns[mine[0]] - 1], batch.ts_ns[mine], [batch.ts_ns[-1] + 1]])
        begins.append(times[edges[0::2]])
        ends.append(times[edges[1::2] + 1])
    return np.concatenate(begins), np.concatenate(ends)


def kept(
    whole: CollectedStream, devices: Sequence[Device], inner: Mapping[str, Sequence[Sight]], outer: Sequence[Sight]
) -> int:
    """Return how many numbered packets have a record at both ends that can be recognised as the same packet's."""
    batch = Batch.concatenate([item for item in whole.items if isinstance(item, Batch)])
    sightings = [item for item in whole.items if isinstance(item, Topology)][-1].sightings
    count = 0
    for sent in (True, False):
        out = _Ends(batch, sightings, [d for d in devices if d.role is Role.OUTER], sent, outer, whole.offset_ns)
        for container, sights in inner.items():
            its = [d for d in devices if d.role is Role.INNER and d.container == container]
            here = _Ends(batch, sightings, its, sent, sights, whole.offset_ns).of_packet
            count += sum(_tied(here[p], out.of_packet[p]) for p in here.keys() & out.of_packet.keys())
    return count


@dataclass(frozen=True, slots=True)
class _RowEnd:
    skb: int
    length: int
    key: int


def _tied(a: _RowEnd, b: _RowEnd) -> bool:
    return a.key == b.key if a.key and b.key else (a.skb, a.length) == (b.skb, b.length)


class _Ends:
    """The record of each packet at one device, by the observer's stamp.

    A packet has none if another packet was stamped between the record and its own stamp.
    """

    def __init__(
        self,
        batch: Batch,
        sightings: Sequence[Sighting],
        devices: Sequence[Device],
        sent: bool,
        sights: Sequence[Sight],
        offset_ns: int,
    ) -> None:
        codes = [i for i, s in enumerate(sightings) if any(s.is_of(device) for device in devices)]
        hooks = [Hook.NET_DEV_QUEUE] if sent else _RECEIVED
        at = np.flatnonzero(np.isin(batch.dev, codes) & np.isin(batch.hook, hooks))
        times = (batch.ts_ns[at] + offset_ns).tolist()
        stamps = sorted(ns for ns, out, _ in sights if out is sent)
        self.of_packet: dict[NumberedPacket, _RowEnd] = {}
        seen: dict[str, int] = defaultdict(int)
        for ns, out, number in sorted(sights):
            if out is not sent or not number:
                continue
            packet = (number, seen[number])
            seen[number] += 1
            i = bisect_right(times, ns) - 1 if sent else bisect_left(times, ns)
            if not 0 <= i < len(times):
                continue
            between = (times[i], ns) if sent else (ns, times[i])
            if bisect_left(stamps, between[1] + (not sent)) - bisect_left(stamps, between[0]) == (0 if sent else 1):
                record = at[i]
                key = int(batch.content.packet_key[record]) if batch.content is not None else 0
                self.of_packet[packet] = _RowEnd(int(batch.skb_id[record]), int(batch.l3_len[record]), key)
