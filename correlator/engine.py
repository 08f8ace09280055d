"""Records -> delays. Pure and synchronous: no I/O, no clock, no tasks; the same records give the same answers.

    feed(item) ──► slice ──► group by buffer ──► join moves into lives ──► lives that ended ──► hops ──► delays
                     ▲                                                │
                     └──────────── lives still open, carried over ────┘

Records are worked on in slices of the stream. A life that has not ended when its slice does is carried, with
what was already decided about its records, into the next one; so where slices and batches are cut changes
nothing but when a row comes out. All steps are whole-array ones: a slice costs a few sorts and gathers.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from correlator.identity import (
    CODE_BITS,
    CODES,
    CROSS,
    JOIN,
    ROLES,
    SAME_LENGTH,
    WAY,
    Resolver,
    from_device,
    place,
    to_device,
)
from correlator.memo import GOLDEN, Memo
from correlator.windows import Windows
from mace.hooks import Hook, Way
from mace.ledger import Ledger
from mace.records import Batch
from mace.schema import Delays, Direction, Grade, Outcome, Results, Segment
from mace.topology import Device, Role, Topology

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

_NEVER: Final = np.iinfo(np.int64).max
_ROLE: Final = {role: np.uint8(number) for number, role in enumerate(ROLES)}


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What the engine's answers depend on."""

    timeout_ns: int = 500_000_000
    """A packet's next record comes within this, or its life is over."""
    slice_ns: int = 100_000_000
    """Stretch of time that is worked on at once; changes when rows come out, not what they are."""
    slice_records: int = 1 << 17
    """A slice is cut here if it gets larger: memory and cache."""
    open_records: int = 1 << 22
    """Records of open lives that are kept at most; beyond it the oldest lives are ended early."""
    rows: bool = True
    """Whether to give out a row per packet and segment; windows come in any case."""


@dataclass(frozen=True, slots=True)
class _Records:
    """Columns that the engine keeps of each record. `number`: device number or -1; `cross`: starts a hop."""

    ts: Ints
    skb: npt.NDArray[np.uint64]
    place: Ints
    length: npt.NDArray[np.uint32]
    number: Ints
    cross: Mask

    def __len__(self) -> int:
        return len(self.ts)

    def take(self, index: Ints) -> _Records:
        return _Records(*(getattr(self, f.name)[index] for f in fields(self)))

    @classmethod
    def join(cls, first: _Records, second: _Records) -> _Records:
        if not len(first):
            return second
        return cls(*(np.concatenate([getattr(first, f.name), getattr(second, f.name)]) for f in fields(cls)))


def _new(batch: Batch, number: Ints) -> _Records:
    count = len(batch)
    return _Records(
        batch.ts_ns,
        batch.skb_id,
        place(batch.hook, batch.dev),
        batch.l3_len,
        number,
        np.ones(count, np.bool_),
    )


class Engine:
    """One stream's correlator. Feed it the stream's items in order, then `finish`."""

    def __init__(self, utc_offset_ns: int, config: EngineConfig = EngineConfig()) -> None:
        self._config = config
        self._offset_ns = utc_offset_ns
        self._resolver = Resolver(keep_ns=2 * config.timeout_ns)
        self._windows = Windows()
        self._waiting: list[Batch] = []
        self._waiting_records = 0
        self._slice_end = -_NEVER
        self._latest = -_NEVER
        self._open = _new(Batch.empty(), np.zeros(0, np.int64))
        self._gaps: list[tuple[int, int]] = []
        self._entries = Memo(self._new_entry)
        self._devices: list[Device] = []
        self._packets = 0
        self._tally = dict.fromkeys(("records", "matched", "unmatched", "ambiguous", "expired", "dropped", "lost"), 0)
        self._left = 0
        """Single records that were still waiting when the stream ended."""
        self._began_ns: int | None = None
        self.open_peak = 0
        """The most records of open lives that were carried."""

    def feed(self, item: Topology | Batch) -> list[Results]:
        """Take the next item of the stream; what it completes comes back, in order."""
        if isinstance(item, Topology):
            results = self._advance(item.from_ns) if self._waiting else []
            self._resolver.update(item)
            return results
        if not len(item):
            return []
        return self._take(item)

    def advance(self, upto_ns: int) -> list[Results]:
        """Told that no record before `upto_ns` will come any more: finish what that completes."""
        return self._advance(upto_ns) if upto_ns >= self._slice_end else []

    def finish(self) -> Results:
        """The stream has ended: all that is left. Buffers of which one record is known stay in flight."""
        batch = Batch.concatenate(self._waiting)
        self._waiting, self._waiting_records = [], 0
        return self._work(batch, self._latest, last=True)

    # Slicing ------------------------------------------------------------------------------------------

    def _take(self, batch: Batch) -> list[Results]:
        results: list[Results] = []
        size = self._config.slice_ns
        while len(batch):
            if self._waiting_records == 0:
                first = int(batch.ts_ns[0])
                self._slice_end = first - first % size + size
            inside = (
                len(batch) if batch.ts_ns[-1] < self._slice_end else int(np.searchsorted(batch.ts_ns, self._slice_end))
            )
            inside = min(inside, self._config.slice_records - self._waiting_records)
            head, batch = batch[:inside], batch[inside:]
            self._waiting.append(head)
            self._waiting_records += len(head)
            if len(head):
                self._latest = int(head.ts_ns[-1])
            if len(batch):
                results.append(self._slice(min(int(batch.ts_ns[0]), self._slice_end)))
            elif self._waiting_records == self._config.slice_records:
                results.append(self._slice(self._latest))
        return results

    def _advance(self, upto_ns: int) -> list[Results]:
        if not self._waiting_records and not len(self._open):
            return []
        return [self._slice(max(upto_ns, self._latest))]

    def _slice(self, upto_ns: int) -> Results:
        batch = Batch.concatenate(self._waiting)
        self._waiting, self._waiting_records = [], 0
        return self._work(batch, upto_ns)

    # One slice ----------------------------------------------------------------------------------------

    def _work(self, batch: Batch, upto_ns: int, *, last: bool = False) -> Results:
        markers = batch.hook == Hook.LOST
        if markers.any():
            self._note_gaps(batch[markers])
            batch = batch[~markers]
        self._tally["records"] += len(batch)
        if self._began_ns is None and len(batch):
            # What was under way when the capture began looks like what is left after a gap.
            self._began_ns = int(batch.ts_ns[0])
            self._gaps.insert(0, (-_NEVER, self._began_ns))

        records = _Records.join(self._open, _new(batch, self._resolver.only[batch.dev]))
        delays = self._correlate(records, upto_ns, last=last) if len(records) else Delays.empty()
        self._windows.add(delays)
        oldest = int(self._open.ts.min()) if len(self._open) else upto_ns
        self._gaps = [gap for gap in self._gaps if gap[1] > min(oldest, upto_ns - self._config.timeout_ns)]
        windows = self._windows.close(None if last else min(oldest, upto_ns) + self._offset_ns)
        return Results(
            upto_ns + self._offset_ns,
            delays if self._config.rows else Delays.empty(),
            windows,
            Ledger(**self._tally, in_flight=self._left + len(self._open)),
            self._packets,
            tuple(self._devices),
        )

    def _note_gaps(self, markers: Batch) -> None:
        self._tally["lost"] += markers.lost
        self._gaps += zip(markers.ts_ns.tolist(), markers.skb_id.astype(np.int64).tolist(), strict=True)
        self._gaps.sort()

    def _spans_gap(self, after_ns: Ints, before_ns: Ints) -> Mask:
        """Whether records were lost somewhere between two times, element by element."""
        spans = np.zeros(len(after_ns), np.bool_)
        for start, end in self._gaps:
            spans |= (start < before_ns) & (end > after_ns)
        return spans

    def _correlate(self, records: _Records, upto_ns: int, *, last: bool) -> Delays:
        """Join the records into lives, keep the lives that go on, and measure those that have ended."""
        timeout_ns = self._config.timeout_ns
        order, skb = _by_buffer(records.skb)
        ts, spot, number = records.ts[order], records.place[order], records.number[order]
        same = np.empty(len(order), np.bool_)
        same[0] = False
        np.equal(skb[1:], skb[:-1], out=same[1:])
        carried = order < len(self._open)
        cross = np.ones(len(order), np.bool_)
        cross[carried] = records.cross[order[carried]]

        to_judge = np.flatnonzero(same & ~carried)
        before = to_judge - 1
        moves = self._resolver.moves(spot[before], spot[to_judge])
        ok = (moves & JOIN) != 0
        by_length = np.flatnonzero(moves & SAME_LENGTH)
        ok[by_length] &= records.length[order[to_judge[by_length]]] == records.length[order[before[by_length]]]
        ok &= ts[to_judge] - ts[before] <= timeout_ns
        if self._gaps:
            ok &= ~self._spans_gap(ts[before], ts[to_judge])
        joined = same.copy()
        joined[to_judge] = ok
        cross[to_judge] = ((moves & CROSS) != 0) | ~ok
        unsure = number == -1
        if unsure.any():
            after = np.flatnonzero(unsure[to_judge] & ok)
            _tell(number, to_judge[after], to_device(moves[after]))
            ahead = np.flatnonzero(unsure[before] & ok)
            _tell(number, before[ahead], from_device(moves[ahead]))
            self._tell_starts(number, np.flatnonzero(unsure & ~joined & ~carried), spot, ts)

        starts = np.flatnonzero(~joined)
        ends = np.append(starts[1:], len(order)) - 1
        size = ends - starts + 1
        freed = WAY[spot[ends] >> CODE_BITS] == Way.END
        reused = np.zeros(len(ends), np.bool_)
        reused[:-1] = same[ends[:-1] + 1]
        idle = ts[ends] < upto_ns - timeout_ns
        finished = freed | reused | idle | last
        finished |= self._overfull(size, ts[ends], finished)

        # A single record has no partner. Which kind of "no partner" depends on how long one could have come.
        waited = ~(freed | reused | last) | (idle & ~reused)
        waited[:-1] |= reused[:-1] & (ts[starts[1:]] - ts[ends[:-1]] > timeout_ns)
        single = finished & (size == 1)
        expired = single & waited & ~freed
        left = single & ~freed & ~reused & ~expired
        self._tally["expired"] += int(expired.sum())
        self._tally["unmatched"] += int((single & ~expired & ~left).sum())
        self._left += int(left.sum())

        life = np.cumsum(~joined) - 1
        measured = finished & (size > 1)
        going = ~finished[life]
        if going.any():
            back = order[going]
            by_time = np.argsort(back)
            kept = records.take(back[by_time])
            self._open = replace(kept, number=number[going][by_time], cross=cross[going][by_time])
            self.open_peak = max(self.open_peak, len(kept))
        else:
            self._open = _new(Batch.empty(), np.zeros(0, np.int64))
        if not measured.any():
            return Delays.empty()
        index = np.flatnonzero(measured[life])
        return self._measure(
            ts[index],
            (spot[index] >> CODE_BITS).astype(np.uint8),
            number[index],
            cross[index],
            np.repeat(np.arange(int(measured.sum())), size[measured]),
            size[measured],
            _packet_ids(skb[starts[measured]], ts[starts[measured]]),
            records.length[order[starts[measured]]],
        )

    def _overfull(self, size: Ints, last_ns: Ints, finished: Mask) -> Mask:
        """The lives to end early, longest idle first, so that no more than the configured records stay open."""
        chosen = np.zeros(len(size), np.bool_)
        waiting = np.flatnonzero(~finished)
        excess = int(size[waiting].sum()) - self._config.open_records
        if excess > 0:
            oldest = waiting[np.argsort(last_ns[waiting], kind="stable")]
            chosen[oldest[: int(np.searchsorted(np.cumsum(size[oldest]), excess)) + 1]] = True
        return chosen

    def _tell_starts(self, number: Ints, starts: Ints, spot: Ints, ts: Ints) -> None:
        """Resolve devices at which a life starts with a reception, unless its beginning may have been lost."""
        hook = spot[starts] >> CODE_BITS
        unsure = starts[(number[starts] == -1) & (WAY[hook] == Way.RECEIVE)]
        unsure = unsure[~self._spans_gap(ts[unsure] - self._config.timeout_ns, ts[unsure])]
        if len(unsure):
            codes, member = np.unique(spot[unsure] & (CODES - 1), return_inverse=True)
            number[unsure] = np.array([self._resolver.start(int(code)) for code in codes], np.int64)[member]

    # Lives to delays ----------------------------------------------------------------------------------

    def _measure(
        self,
        ts: Ints,
        hook: npt.NDArray[np.uint8],
        number: Ints,
        cross: Mask,
        life: Ints,
        size: Ints,
        packet: npt.NDArray[np.uint64],
        length: npt.NDArray[np.uint32],
    ) -> Delays:
        """Delays of whole lives. Records lie life after life; per life: `size`, `packet`, `length`."""
        way = WAY[hook]
        on_device = np.flatnonzero((way == Way.TRANSMIT) | (way == Way.RECEIVE))
        lives = len(size)
        final = np.cumsum(size) - 1
        freed = hook[final]
        if not len(on_device):
            self._tally["matched"] += len(ts)  # copied to a reader and freed: a clone that went nowhere
            return Delays.empty()

        # Hops: runs of records on one device. A hop lasts until the next one begins, the last one to its last record.
        run = np.flatnonzero(cross[on_device])
        first = on_device[run]
        end = on_device[np.append(run[1:], len(on_device)) - 1]
        of = life[first]
        device = _agreed(number[first], number[end])
        position_in = np.flatnonzero(np.diff(of, prepend=-1))
        """Each life's first hop, for lives that have any."""
        hops = np.diff(position_in, append=len(of))
        begin = np.repeat(np.arange(len(position_in)), hops)
        head, tail = position_in, position_in + hops - 1
        index = np.arange(len(of))
        enter, leave = ts[first], ts[end]
        follows = np.flatnonzero(of[1:] == of[:-1])
        leave[follows] = enter[follows + 1]

        known = device >= 0
        clear = np.ones(len(head), np.bool_)
        role, serves = self._resolver.role[device], self._resolver.serves[device]
        if not known.all():
            clear = np.logical_and.reduceat(known, head)
            role[~known], serves[~known] = _ROLE[Role.OTHER], -1
        sent = way[first] == Way.TRANSMIT
        inner = role == _ROLE[Role.INNER]

        # Whose packet is it? Sent by a container's own device, or last seen on the way into one.
        origin = np.where(sent[head] == inner[head], serves[head], -1)
        target = np.where(sent[tail] != inner[tail], serves[tail], -1)
        ours = clear & ((origin >= 0) | (target >= 0))
        outer = np.full(len(head), _NEVER)
        gates = np.flatnonzero(role == _ROLE[Role.OUTER])[::-1]
        outer[begin[gates]] = gates  # of several the first one, which is written last

        # From one container to another: the way in begins where the packet is first sent on.
        inward = ((target >= 0) & (origin < 0))[begin]
        if ((origin >= 0) & (target >= 0)).any():
            turn = np.minimum.reduceat(np.where(sent & (index != head[begin]), index, _NEVER), head)
            inward |= (target[begin] >= 0) & (index >= turn[begin])
        # On the way in what comes before the outer device is outside; if it was not seen, nothing is.
        gate = np.where((target >= 0) & (outer == _NEVER), -1, outer)[begin]
        outside = (index < gate) == inward
        outside |= (role == _ROLE[Role.REMOTE]) | (role == _ROLE[Role.OTHER]) | (role == _ROLE[Role.LOOPBACK])
        # A host process would have seen the packet at the outer device's netif_receive_skb: the path starts there.
        received = hook[end] == Hook.NETIF_RECEIVE_SKB
        entry = np.flatnonzero((target >= 0) & (origin < 0) & (outer != _NEVER))
        entry = outer[entry]
        entry = entry[received[entry]]
        enter[entry] = ts[end[entry]]
        crossed = (end > first) | (index != tail[begin])
        shown = np.flatnonzero(crossed & ours[begin])

        whole = np.full(len(head), -1, np.int64)
        has_outer = np.flatnonzero(outer != _NEVER)
        first_gate = outer[has_outer]
        queued = hook[first] == Hook.NET_DEV_QUEUE
        leaves = (origin >= 0) & (target < 0) & (inner & queued)[head]
        enters = (target >= 0) & (origin < 0) & (inner & received)[tail]
        out = has_outer[leaves[has_outer] & queued[first_gate]]
        whole[out] = ts[first[outer[out]]] - ts[first[head[out]]]
        into = has_outer[enters[has_outer] & received[first_gate]]
        whole[into] = ts[end[tail[into]]] - ts[end[outer[into]]]
        total = np.flatnonzero((whole >= 0) & ours)

        after = np.minimum(end[tail] + 1, len(ts) - 1)
        read = (hook[after] == Hook.SKB_COPY_DATAGRAM_IOVEC) & (life[after] == of[tail]) & enters & ours
        read_at = np.flatnonzero(read)

        dropped = np.zeros(lives, np.bool_)
        arrived = (role[tail] == _ROLE[Role.INNER]) | (role[tail] == _ROLE[Role.REMOTE])
        dropped[of[head]] = ~(arrived & received[tail])
        dropped &= freed == Hook.KFREE_SKB
        unclear = np.zeros(lives, np.bool_)
        unclear[of[head]] = ~clear
        unclear &= ~dropped
        self._tally["dropped"] += int(size[dropped].sum())
        self._tally["ambiguous"] += int(size[unclear].sum())
        self._tally["matched"] += int(size[~dropped & ~unclear].sum())

        outcome = np.where(
            dropped,
            np.uint8(Outcome.DROPPED),
            np.where(WAY[freed] == Way.END, np.uint8(Outcome.CONSUMED), np.uint8(Outcome.OPEN)),
        )
        lane = np.concatenate([begin[shown], total, read_at])
        """Which of the lives with hops a row is of."""
        row_life = of[head][lane]
        into_container = np.concatenate([inward[shown], enters[total], np.ones(len(read_at), np.bool_)])
        owner = np.where(into_container, target[lane], origin[lane])
        at = np.concatenate([device[shown], owner[len(shown) : len(shown) + len(total)], device[tail[read_at]]])
        seen = np.zeros(len(head), np.bool_)
        seen[lane] = True
        self._packets += int(seen.sum())
        delays = Delays(
            utc_ns=self._offset_ns
            + np.concatenate(
                [
                    enter[shown],
                    np.where(enters, ts[end[np.minimum(outer, len(end) - 1)]], ts[first[head]])[total],
                    ts[end[tail[read_at]]],
                ]
            ),
            packet=packet[row_life],
            device=self._entry(at, owner),
            direction=np.where(into_container, np.uint8(Direction.INGRESS), np.uint8(Direction.EGRESS)),
            segment=np.concatenate(
                [
                    np.where(outside[shown], np.uint8(Segment.OUTSIDE), np.uint8(Segment.DEVICE)),
                    np.full(len(total), Segment.OVERHEAD, np.uint8),
                    np.full(len(read_at), Segment.DELIVERY, np.uint8),
                ]
            ),
            position=np.concatenate(
                [
                    np.minimum(index - head[begin], 254)[shown],
                    np.full(len(total), 255),
                    np.minimum(hops, 254)[read_at],
                ]
            ).astype(np.uint8),
            delay_ns=np.concatenate([(leave - enter)[shown], whole[total], (ts[after] - ts[end[tail]])[read_at]]),
            l3_len=length[row_life],
            grade=np.full(len(lane), Grade.BUFFER, np.uint8),
            outcome=outcome[row_life],
        )
        return delays[_by_time(delays.utc_ns)] if self._config.rows else delays

    def _entry(self, device: Ints, owner: Ints) -> npt.NDArray[np.int32]:
        """Index into `Results.devices` of each (device, inner device of the container whose packet it is)."""
        return self._entries((device << 32) | owner).astype(np.int32)

    def _new_entry(self, key: int) -> int:
        device, owner = (self._resolver.devices[number] for number in divmod(key, 1 << 32))
        self._devices.append(replace(device, container=owner.container))
        return len(self._devices) - 1


def _by_buffer(skb: npt.NDArray[np.uint64]) -> tuple[Ints, npt.NDArray[np.uint64]]:
    """Indices that bring records of one buffer together, each buffer's in the order in which they were given,
    and the buffers in that order.

    A sort of one integer, upper bits of a hash of the buffer above the index, is three times as fast as an
    argsort; where two buffers share those bits, rare as it is, the argsort is done after all.
    """
    bits = np.uint64(max(len(skb) - 1, 1).bit_length())
    low = (np.uint64(1) << bits) - np.uint64(1)
    keys = skb * GOLDEN
    keys &= ~low
    keys |= np.arange(len(skb), dtype=np.uint64)
    keys.sort()
    order = (keys & low).view(np.int64)
    sorted_skb = skb[order]
    neighbours = (keys[1:] ^ keys[:-1]) <= low
    if not np.array_equal(neighbours, sorted_skb[1:] == sorted_skb[:-1]):
        order = np.argsort(skb, kind="stable")
        return order, skb[order]
    return order, sorted_skb


def _by_time(ts: Ints) -> Ints:
    """Stable argsort of times that lie within minutes: by sorting one integer, time above index."""
    if not len(ts):
        return np.zeros(0, np.int64)
    bits = len(ts).bit_length()
    since = ts - ts.min()
    if int(since.max()) >> (62 - bits):
        return np.argsort(ts, kind="stable")
    keys = (since << bits) | np.arange(len(ts))
    keys.sort()
    order: Ints = keys & ((1 << bits) - 1)
    return order


def _tell(number: Ints, at: Ints, told: Ints) -> None:
    """Enter the devices that moves tell; -2 where two moves of one record disagree."""
    news = np.flatnonzero(told >= 0)
    at, told = at[news], told[news]
    current = number[at]
    number[at] = np.where((current == -1) | (current == told), told, -2)


def _agreed(first: Ints, end: Ints) -> Ints:
    """The device that a hop's first and last record name (-1 names none); -1 for none, or two.

    These two are enough: what lies between was reached on the same device, and moves tell nothing there.
    """
    return np.where((first == end) | (end == -1), first, np.where(first == -1, end, -1)).clip(min=-1)


def _packet_ids(skb: npt.NDArray[np.uint64], ts: Ints) -> npt.NDArray[np.uint64]:
    """A name for each life that depends on nothing but its first record."""
    mixed = skb ^ (ts.view(np.uint64) * GOLDEN)
    mixed ^= mixed >> np.uint64(32)
    ids: npt.NDArray[np.uint64] = mixed * np.uint64(0xD6E8FEB86659FD93)
    return ids
