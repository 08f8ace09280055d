"""The raw stream and what the correlator made of it, brought together again: which records are of which packet.

The correlator says of a packet when it was where, and calls it by a hash of its first record. The records themselves
have what it has no use for: the processor, the reason of a drop, ports. So records wait here until the packets that
began before them are known (`Totals.settled_utc_ns`), and find their packets by the name of the first record and the
buffer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from contracts.hooks import BY_HOOK, Hook, Way
from contracts.interfaces import StreamHeader, StreamItem
from contracts.ordering import GOLDEN
from contracts.records import Batch, Content, Flag
from contracts.results import Results
from contracts.schema import NOT_TOLD, Delays, Direction, Outcome
from contracts.topology import Device, Sighting, Topology
from correlator.replies import Replies, Seen

Ints = npt.NDArray[np.int64]
Ids = npt.NDArray[np.uint64]

_MOST_RECORDS: Final = 1 << 22
"""Records that wait at most: as many as the engine keeps open. Older ones are given out without a packet."""
_IS_END: Final = np.isin(np.arange(256), [info.hook for info in BY_HOOK.values() if info.way is Way.END])


@dataclass(frozen=True, slots=True, eq=False)
class Packets:
    """Packets in the order of time. Arrays over packets."""

    seen: Seen
    end_ns: Ints
    """UTC, when its last hop ends."""
    whole_ns: Ints
    """What the container added to it; `NOT_TOLD` where it was not seen over the whole path."""
    request: Ids
    """The packet that it answers; 0 if none is known."""
    told_by: Ints
    drop_reason: Ints
    """0 where it was not dropped."""

    def __len__(self) -> int:
        return len(self.seen)


@dataclass(frozen=True, slots=True, eq=False)
class Settled:
    """What is known for good since the last time."""

    rows: Delays
    """In the order of time, and of the path where times are equal."""
    of_packet: Ints
    """Row → index into `packets`."""
    packets: Packets
    records: Batch
    of_record: Ids
    """Record → its packet; 0 if it is of none that has rows."""
    sightings: tuple[Sighting, ...]
    devices: tuple[Device, ...]


class Follower:
    """Takes a stream's items as they come and its results, in whatever step; gives out what is settled."""

    def __init__(self, header: StreamHeader, *, records: bool = True) -> None:
        self._offset_ns = header.clock.offset_ns
        self._keeps_records = records
        self._batch = Batch.empty()
        self._arrived: list[Batch] = []
        self._owner: Ids = np.zeros(0, np.uint64)
        self._sightings: tuple[Sighting, ...] = ()
        self._rows = Delays.empty()
        self._replies: Replies | None = None
        self._containers: dict[str, int] = {"": NOT_TOLD}
        self.without_packet = 0
        """Records that had to be given out before their packets were known: too many were waiting."""

    def take(self, item: StreamItem) -> None:
        """The next item of the stream, before the results that come of it."""
        if isinstance(item, Topology):
            self._sightings = item.sightings
        elif isinstance(item, Batch) and len(item):
            if self._replies is None:
                self._replies = Replies(int(item.ts_ns[0]) + self._offset_ns)
            if self._keeps_records:
                self._arrived.append(item)

    def settle(self, results: Results, *, last: bool = False) -> Settled:
        """What the results settle; with `last` all that is left."""
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

    def _packets(self, results: Results, *, last: bool) -> tuple[Delays, Ints, Packets]:
        rows = Delays.concatenate([self._rows, results.rows.delays])
        ids, of_packet = np.unique(rows.packet, return_inverse=True)
        begin = np.full(len(ids), np.iinfo(np.int64).max)
        np.minimum.at(begin, of_packet, rows.utc_ns)
        ready = np.ones(len(ids), np.bool_) if last else begin < results.totals.settled_utc_ns
        self._rows = rows[~ready[of_packet]]
        # Sorting the names once more would be a tenth of an export: those that are ready keep their order.
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
            inward & (proto != 1) & (proto != 58)
        )  # an echo has its identifier and number in the same places both ways
        seen = Seen(
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
        packets = Packets(
            seen, end[in_time], whole[in_time], request, told_by, np.where(dropped, drop_reason, 0)[in_time]
        )
        return rows, rank[of_packet], packets

    def _attribute(self, ids: Ids, end: Ints, inward: npt.NDArray[np.bool_]) -> tuple[Ints, Content]:
        """Find the records of packets (`ids` ascending). Of each the reason of its drop, and what it says of itself."""
        reason = np.zeros(len(ids), np.int64)
        batch = self._batch
        none = Content.of(len(ids))
        if not len(batch) or not len(ids):
            return reason, none
        # As correlator.lives.Lives.packet names a life.
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
        # At the inner device: the first record of a packet that leaves, the last of one that comes.
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
