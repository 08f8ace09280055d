"""Assigns the records of the raw stream to the packets that the correlator has found.

The correlator's rows say when a packet was at which device, and number it by a hash of its first record. The records
have more: the CPU, the reason of a drop, ports. Records wait here until the packets that began before them are settled
(`Totals.settled_utc_ns`); the hash of the first record and the buffer then identify their packets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from contracts.arrays import U64, Ints
from contracts.hooks import BY_HOOK, Hook, Way
from contracts.interfaces import StreamHeader, StreamItem
from contracts.ordering import GOLDEN
from contracts.protocols import ICMP, ICMPV6
from contracts.records import Batch, Content, Flag
from contracts.results import Results
from contracts.schema import NOT_TOLD, Delays, Direction, Outcome
from contracts.topology import Device, Sighting, Topology
from correlator.replies import ExchangedPackets, Replies

_MOST_RECORDS: Final = 1 << 22
"""Most records that wait, as many as the engine keeps open. Older records are returned without a packet."""
_IS_END: Final = np.isin(np.arange(256), [info.hook for info in BY_HOOK.values() if info.way is Way.END])


@dataclass(frozen=True, slots=True, eq=False)
class TimelinePackets:
    """Packets in time order, as arrays of equal length."""

    seen: ExchangedPackets
    end_ns: Ints
    """End of the packet's last hop, UTC."""
    whole_ns: Ints
    """The container's overhead on the packet; `NOT_TOLD` if the packet was not seen over the whole path."""
    request: U64
    """The packet that this packet replies to; 0 if none is known."""
    told_by: Ints
    drop_reason: Ints
    """The kernel's drop reason; 0 if the packet was not dropped."""

    def __len__(self) -> int:
        return len(self.seen)


@dataclass(frozen=True, slots=True, eq=False)
class Settled:
    """The packets, rows and records that have become final since the last call."""

    rows: Delays
    """Rows in time order, and at equal times in path order."""
    of_packet: Ints
    """For each row, the index of its packet in `packets`."""
    packets: TimelinePackets
    records: Batch
    of_record: U64
    """For each record, the number of its packet; 0 if no packet with rows has the record."""
    sightings: tuple[Sighting, ...]
    devices: tuple[Device, ...]


class PacketFollower:
    """Collects a stream's items and results, however they alternate, and returns the packets that are settled."""

    def __init__(self, header: StreamHeader, *, records: bool = True) -> None:
        self._offset_ns = header.clock.offset_ns
        self._keeps_records = records
        self._batch = Batch.empty()
        self._arrived: list[Batch] = []
        self._owner: U64 = np.zeros(0, np.uint64)
        self._sightings: tuple[Sighting, ...] = ()
        self._rows = Delays.empty()
        self._replies: Replies | None = None
        self._containers: dict[str, int] = {"": NOT_TOLD}
        self.without_packet = 0
        """Number of records returned before their packets were settled, because too many were waiting."""

    def take(self, item: StreamItem) -> None:
        """Add the next item of the stream. It must precede the results that follow from it."""
        if isinstance(item, Topology):
            self._sightings = item.sightings
        elif isinstance(item, Batch) and len(item):
            if self._replies is None:
                self._replies = Replies(int(item.ts_ns[0]) + self._offset_ns)
            if self._keeps_records:
                self._arrived.append(item)

    def settle(self, results: Results, *, last: bool = False) -> Settled:
        """Return the packets that the results settle; with `last`, all that are left."""
        self._batch = Batch.concatenate([self._batch, *self._arrived])
        self._arrived = []
        self._owner = np.append(self._owner, np.zeros(len(self._batch) - len(self._owner), np.uint64))
        rows, of_packet, packets = self._packets(results, last=last)
        cut = len(self._batch)
        if not last:
            cut = int(np.searchsorted(self._batch.ts_ns, results.totals.settled_utc_ns - self._offset_ns))
            if len(self._batch) - cut > _MOST_RECORDS:
                self.without_packet += len(self._batch) - _MOST_RECORDS // 2 - cut
                cut = len(self._batch) - _MOST_RECORDS // 2
        given, owner = self._batch[:cut], self._owner[:cut]
        self._batch, self._owner = self._batch[cut:], self._owner[cut:]
        return Settled(rows, of_packet, packets, given, owner, self._sightings, results.rows.devices)

    def _packets(self, results: Results, *, last: bool) -> tuple[Delays, Ints, TimelinePackets]:
        rows = Delays.concatenate([self._rows, results.rows.delays])
        ids, of_packet = np.unique(rows.packet, return_inverse=True)
        begin = np.full(len(ids), np.iinfo(np.int64).max)
        np.minimum.at(begin, of_packet, rows.utc_ns)
        ready = np.ones(len(ids), np.bool_) if last else begin < results.totals.settled_utc_ns
        self._rows = rows[~ready[of_packet]]
        # Sorting the packet numbers again would take a tenth of an export's time; the ready ones keep their order.
        rows, of_packet = rows[ready[of_packet]], of_packet[ready[of_packet]]
        in_time = np.argsort(rows.utc_ns, kind="stable")
        rows, of_packet = rows[in_time], (np.cumsum(ready) - 1)[of_packet[in_time]]
        ids = ids[ready]
        first = np.zeros(len(ids), np.int64)
        first[of_packet[::-1]] = np.arange(len(rows))[::-1]
        end = np.zeros(len(ids), np.int64)
        np.maximum.at(end, of_packet, rows.utc_ns + rows.delay_ns)
        whole = np.full(len(ids), NOT_TOLD)
        total = rows.position == 255
        np.maximum.at(whole, of_packet[total], rows.delay_ns[total])
        mixed = np.zeros(len(ids), np.bool_)
        np.logical_or.at(mixed, of_packet, rows.direction != rows.direction[first][of_packet])
        direction = rows.direction[first]
        drop_reason, content = self._attribute(ids, end, direction == Direction.INGRESS)
        dropped = rows.outcome[first] == Outcome.DROPPED

        in_time = np.lexsort((ids, rows.utc_ns[first]))
        rank = np.empty(len(ids), np.int64)
        rank[in_time] = np.arange(len(ids))
        names = np.array(
            [self._containers.setdefault(device.container, len(self._containers)) for device in results.rows.devices],
            np.int64,
        )
        inward = direction == Direction.INGRESS
        flow = (content.flags & Flag.FLOW) > 0
        proto = content.l4_proto.astype(np.int64)
        source, target = content.l4_src.astype(np.int64), content.l4_dst.astype(np.int64)
        turned = (
            inward & (proto != ICMP) & (proto != ICMPV6)
        )  # an echo has its identifier and number in the same places both ways
        seen = ExchangedPackets(
            packet=ids,
            container=np.where(mixed, NOT_TOLD, names[rows.device[first]] if len(ids) else NOT_TOLD),
            direction=direction,
            begin_ns=rows.utc_ns[first],
            l3_len=rows.l3_len[first].astype(np.int64),
            dropped=dropped,
            l4_proto=np.where(flow, proto, NOT_TOLD),
            near=np.where(flow, np.where(turned, target, source), NOT_TOLD),
            far=np.where(flow, np.where(turned, source, target), NOT_TOLD),
            l4_bits=np.where(flow, content.l4_bits.astype(np.int64), NOT_TOLD),
        )[in_time]
        if self._replies is None:
            self._replies = Replies(results.totals.upto_utc_ns)
        for gap in results.rows.gaps_utc_ns:
            self._replies.lost(*gap)
        request, told_by = self._replies.match(seen)
        packets = TimelinePackets(
            seen, end[in_time], whole[in_time], request, told_by, np.where(dropped, drop_reason, 0)[in_time]
        )
        return rows, rank[of_packet], packets

    def _attribute(self, ids: U64, end: Ints, inward: npt.NDArray[np.bool_]) -> tuple[Ints, Content]:
        """Assign records to packets (`ids` ascending); returns each packet's drop reason and content."""
        reason = np.zeros(len(ids), np.int64)
        batch = self._batch
        none = Content.of(len(ids))
        if not len(batch) or not len(ids):
            return reason, none
        # The hash by which correlator.records.named numbers a packet.
        named = batch.skb_id ^ (batch.ts_ns.view(np.uint64) * GOLDEN)
        named ^= named >> np.uint64(32)
        named *= np.uint64(0xD6E8FEB86659FD93)
        found = np.minimum(np.searchsorted(ids, named), len(ids) - 1)
        begins = (ids[found] == named) & (batch.hook != Hook.LOST)

        order = np.argsort(batch.skb_id, kind="stable")
        skb, ts = batch.skb_id[order], batch.ts_ns[order] + self._offset_ns
        last = np.maximum.accumulate(np.where(begins[order], np.arange(len(order)), -1))
        member = last >= 0
        member &= skb[last] == skb
        packet = found[order][last]
        inside = member & (ts <= end[packet])
        ended = _IS_END[batch.hook[order]]
        inside[1:] |= member[1:] & ended[1:] & inside[:-1] & (last[1:] == last[:-1])
        inside &= batch.hook[order] != Hook.LOST
        at, packet = order[inside], packet[inside]
        self._owner[at] = ids[packet]

        freed = _IS_END[batch.hook[at]]
        reason[packet[freed]] = batch.drop_reason[at[freed]]
        if batch.content is None:
            return reason, none
        # The record at the inner device: the first of a packet that leaves the container, the last of one that enters.
        told = (batch.content.flags[at] & Flag.FLOW) > 0
        at, packet = at[told], packet[told]
        speaks = np.full(len(ids), -1, np.int64)
        speaks[packet[::-1]] = at[::-1]
        latest = speaks.copy()
        latest[packet] = at
        speaks = np.where(inward, latest, speaks)
        content = batch.content[np.maximum(speaks, 0)]
        for name in ("flags", "l4_proto", "l4_src", "l4_dst", "l4_bits"):
            getattr(content, name)[speaks < 0] = 0
        return reason, content
