"""Corrects a tool's round trip times in a container: subtracts the delay of the container's devices.

For a request and its response that were both seen over the whole path (`contracts.schema.Crossings`):

    lower bound of the host RTT = tool RTT - egress - ingress
    egress   = net_dev_queue of the request, outer - inner device
    ingress  = of the response, inner - outer device: netif_receive_skb, if the tool reads the clock after it; the
               kernel's timestamp, if the tool uses that: the wait behind the timestamp is not part of the tool's RTT
    NIC RTT  = at the outer device, first hook of the response - net_dev_start_xmit of the request

Which request and which response? A sample contains little: a time, a length, a number, a round trip time. A crossing
contains the packet's times and length and, from a source that reads packets, its flow. A wrong pair is worse than a
missing one. A sample is therefore paired only if *all that is known leaves one possibility*:

1. **Candidates.** The request is a packet out of the container with the sample's length and, if both have them, the
   same protocol, identifier and sequence number. It was queued when the tool's stamp model expects it
   (`correlator.stamps`). A packet into the container, with the response's length and content, arrived one round trip
   time later, within the tolerance of the model.
2. **Order.** A tool sends its requests in the order of their numbers, so that the packets of successive samples follow
   one another; and it reports replies in the order of arrival. Among all assignments that keep this order (each is
   strictly increasing, and such assignments form a lattice), a forward pass over the samples finds the earliest, a
   backward pass the latest. Where the two agree there is one possibility; where they differ, the sample is *ambiguous*.
   Content, if the source has it, only reduces the sets of candidates.
3. **Waits.** A process can be interrupted anywhere, and for long. The first pass therefore allows long waits. A pair
   that is then the only possibility is kept if ordinary waits suffice for it, or if it lies between two such pairs with
   exactly as many packets between them as samples. If it is known when the tool ran, then the beginning and the end of
   its run take the place of such a pair before the first and after the last one. A second pass decides the remaining
   samples with ordinary waits, with the kept pairs in their places. The response to a request that the second pass has
   decided must fit with ordinary waits, too.
4. **A reply without a time** (it was cut, or damaged on its way) is never paired. But it had a request and is a packet,
   and so takes part: its request lies between the requests of its neighbours, and its response between their responses.
   If no assignment has room for it, its packets were not seen, and it is ignored.
5. **Failure.** If no assignment exists for samples that compete for the same packets, a packet of one of them is
   missing, and all of them are ambiguous. If records were lost where a sample's packets must be, the right packet may
   be among the lost ones: the sample is not paired.

Lost replies, further replies, replies out of order and wrapping sequence numbers need no rules of their own. One error
cannot be detected: a sample's own packet was missed although no record was lost (an ambiguous path, a changed buffer),
while another packet of the same length had, in the same milliseconds, the same round trip time.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from itertools import pairwise
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt

from contracts.arrays import Ints, Mask
from contracts.protocols import ICMP, ICMPV6
from contracts.schema import NOT_TOLD, Columns, Crossings, Direction
from correlator.samples import Samples
from correlator.stamps import LineTime, ReceiveClock, StampModel

Gaps = Sequence[tuple[int, int]]
"""Stretches of time, (start, end) in UTC ns, in which records were lost."""
Ran = tuple[int, int]
"""Beginning and end of the tool's run, UTC ns: it sent and received all its packets between them."""
SampleKey = tuple[int, ...]

_ECHOES: Final = (ICMP, ICMPV6)
_EVER: Final = 1 << 62
"""Later than every time, and small enough for sums."""
_FEW: Final = 64
"""Number of candidates that are examined one by one; more are faster as arrays."""


class Reason(IntEnum):
    """Whether a sample is paired, and if not, why."""

    PAIRED = 0
    NO_REPLY = 1
    """The tool saw no reply."""
    NO_REQUEST = 2
    """No packet left the container when the request must have."""
    NO_RESPONSE = 3
    """Packets left the container in time, but no packet into the container fits the round trip time."""
    AMBIGUOUS = 4
    """Several packets fit equally well."""
    LOST = 5
    """The ring lost records while the sample was under way: its packets may be among them."""
    NO_TIME = 6
    """A reply arrived, or may have, but the tool's output has no round trip time for it."""


REASONS: Final = {
    Reason.PAIRED: "paired",
    Reason.NO_REPLY: "no reply: the tool saw none",
    Reason.NO_REQUEST: "no request: no packet out of the container is where it must have been",
    Reason.NO_RESPONSE: "no response: no packet into the container fits the round trip time",
    Reason.AMBIGUOUS: "ambiguous: several packets fit",
    Reason.LOST: "lost: the ring lost records while it was under way",
    Reason.NO_TIME: "no time: a reply came, or may have, and the tool's output has no round trip time of it",
}
"""Text for people of each reason."""


@dataclass(frozen=True, slots=True, eq=False)
class Corrections(Columns):
    """One row per sample, in the order of the samples. If `reason` is not PAIRED, all other columns are 0."""

    reason: npt.NDArray[np.uint8]
    grade: npt.NDArray[np.uint8]
    """The lower grade of the two packets (`contracts.schema.Grade`)."""
    request: npt.NDArray[np.uint64]
    """`Crossings.packet`."""
    response: npt.NDArray[np.uint64]
    sent_utc_ns: npt.NDArray[np.int64]
    """`net_dev_queue` of the request at the inner device."""
    arrived_utc_ns: npt.NDArray[np.int64]
    """The response at the inner device, as the tool's clock sees it: kernel timestamp or `netif_receive_skb`."""
    tool_rtt_ns: npt.NDArray[np.int64]
    host_rtt_lower_bound_ns: npt.NDArray[np.int64]
    """Lower bound of a host process's RTT, whose packet causes a part of the work within egress and ingress, too."""
    nic_rtt_ns: npt.NDArray[np.int64]
    egress_ns: npt.NDArray[np.int64]
    """Overhead of the request."""
    ingress_ns: npt.NDArray[np.int64]
    """Overhead of the response, up to where the tool's clock is read."""

    _DTYPES: ClassVar[dict[str, str]] = {
        "reason": "u1",
        "grade": "u1",
        "request": "<u8",
        "response": "<u8",
        "sent_utc_ns": "<i8",
        "arrived_utc_ns": "<i8",
        "tool_rtt_ns": "<i8",
        "host_rtt_lower_bound_ns": "<i8",
        "nic_rtt_ns": "<i8",
        "egress_ns": "<i8",
        "ingress_ns": "<i8",
    }


def correct(
    samples: Samples,
    crossings: Crossings,
    stamps: StampModel,
    gaps_utc_ns: Gaps = (),
    ran_utc_ns: Ran | None = None,
) -> Corrections:
    """Pair one tool's samples with one container's packets, and subtract the delay of the container's devices.

    `crossings`: packets of one container, in any order, including packets of other processes. `ran_utc_ns`: when the
    tool ran, if `samples` are all of its run; None if that is not known. Returns a row for every sample.
    """
    egress = _sorted(crossings, Direction.EGRESS)
    ingress = _sorted(crossings, Direction.INGRESS, stamp=stamps.receive_clock is ReceiveClock.KERNEL)
    reason = np.where(samples.untimed, Reason.NO_TIME, Reason.NO_REPLY).astype(np.uint8)
    request, response = pair(samples, egress, ingress, stamps, gaps_utc_ns, ran_utc_ns, reason)

    rows = np.flatnonzero(reason == Reason.PAIRED)
    out, back = egress[request[rows]], ingress[response[rows]]
    columns = {name: np.zeros(len(samples), dtype) for name, dtype in Corrections._DTYPES.items()}
    columns["reason"] = reason
    stamped = stamps.receive_clock is ReceiveClock.KERNEL
    added = out.outer_utc_ns - out.inner_utc_ns
    tool = samples.rtt_ns[rows]
    arrived = back.inner_utc_ns
    removed = arrived - back.outer_utc_ns
    if stamped:
        # The kernel may be interrupted between its timestamp and the hook. But the request was stamped before it was
        # queued, so that the response was stamped at most a round trip time after the queueing.
        latest = out.inner_utc_ns + tool + samples.resolution_ns[rows]
        arrived = np.minimum(back.inner_stamp_utc_ns, latest)
        removed = arrived - back.outer_stamp_utc_ns
    found: dict[str, npt.NDArray[Any]] = {
        "grade": np.minimum(out.grade, back.grade),
        "request": out.packet,
        "response": back.packet,
        "sent_utc_ns": out.inner_utc_ns,
        "arrived_utc_ns": arrived,
        "tool_rtt_ns": tool,
        "host_rtt_lower_bound_ns": tool - added - removed,
        "nic_rtt_ns": back.outer_edge_utc_ns - out.outer_edge_utc_ns,
        "egress_ns": added,
        "ingress_ns": removed,
    }
    for name, values in found.items():
        columns[name][rows] = values
    return Corrections(**columns)


def settled(samples: Samples, stamps: StampModel, upto_utc_ns: int) -> int:
    """Return how many of the first samples can be paired for good.

    All packets that began before `upto_utc_ns`, and all samples whose lines have an earlier time, must be known. The
    settled samples compete for no packet with any later sample of `samples`. A sample still to come could compete only
    if its round trip time is longer than all so far and it was sent within milliseconds of a settled one.
    """
    answered = samples.rtt_ns != NOT_TOLD
    if not answered.any():
        return len(samples)
    places = _TimeBounds.of(samples, stamps)
    longest = int(samples.rtt_ns.max()) + stamps.send_wait_ns + stamps.line_resolution_ns + stamps.clock_slack_ns
    to_come = upto_utc_ns - (0 if stamps.line_time is LineTime.SENT else longest + stamps.print_wait_ns)
    done_by = np.where(answered, np.maximum(places.sent_before, places.arrived_before), -_EVER)
    last = np.maximum.accumulate(np.where(answered, places.sent_before, -_EVER))
    ahead = np.where(answered, places.sent_after, _EVER)
    ahead = np.append(np.minimum.accumulate(ahead[::-1])[::-1], to_come)[1:].clip(max=to_come)
    cuts = np.flatnonzero((np.maximum.accumulate(done_by) < upto_utc_ns) & (last < ahead))
    return int(cuts[-1]) + 1 if len(cuts) else 0


# Pairing --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _TimeBounds:
    """Bounds in time of each sample's packets, UTC ns, inclusive; ± `_EVER` without a bound."""

    sent_after: Ints
    """Bounds of the request at the inner device."""
    sent_before: Ints
    arrived_after: Ints
    """Bounds of the response at the inner device: kernel timestamp or `netif_receive_skb`, whichever the tool uses."""
    arrived_before: Ints
    shortest: Ints
    """Bounds of the time from request to response, ns."""
    longest: Ints

    @classmethod
    def of(cls, samples: Samples, stamps: StampModel) -> _TimeBounds:
        timed = samples.stamp_utc_ns != NOT_TOLD
        rtt, unsure = samples.rtt_ns, samples.resolution_ns + stamps.clock_slack_ns
        wake = stamps.wake_wait_ns if stamps.receive_clock is ReceiveClock.USER else 0
        early, late = samples.stamp_utc_ns - stamps.line_resolution_ns, samples.stamp_utc_ns + stamps.line_resolution_ns
        if stamps.line_time is LineTime.SENT:
            sent_after, sent_before = early, late
            arrived_after, arrived_before = early, late + stamps.send_wait_ns + rtt
        else:
            printing = stamps.print_wait_ns if stamps.line_time is LineTime.PRINTED else 0
            arrived_after, arrived_before = early - printing, late
            sent_after, sent_before = arrived_after - rtt, arrived_before - rtt
        return cls(
            np.where(timed, sent_after - unsure, -_EVER),
            np.where(timed, sent_before + stamps.send_wait_ns + unsure, _EVER),
            np.where(timed, arrived_after - wake - unsure, -_EVER),
            np.where(timed, arrived_before + unsure, _EVER),
            rtt - stamps.send_wait_ns - wake - unsure,
            rtt + unsure,
        )

    def between(self, samples: Samples, first: Ints) -> _TimeBounds:
        """Return these bounds, with replies without a time bounded by the order.

        Requests follow one another in the order of `first` (rows of first replies), replies in the order of the rows.
        """
        untimed = _untimed(samples)
        if not untimed.any():
            return self
        arrived = np.flatnonzero(untimed | (samples.rtt_ns != NOT_TOLD))
        sent_after = np.where(untimed, -_EVER, self.sent_after)
        sent_before = np.where(untimed, _EVER, self.sent_before)
        arrived_after, arrived_before = self.arrived_after.copy(), self.arrived_before.copy()
        for order, after, before in ((first, sent_after, sent_before), (arrived, arrived_after, arrived_before)):
            chosen = untimed[order]
            earliest = np.maximum.accumulate(after[order])
            latest = np.minimum.accumulate(before[order][::-1])[::-1]
            after[order] = np.where(chosen, earliest, after[order])
            before[order] = np.where(chosen, latest, before[order])
        sent_before = np.where(untimed, np.minimum(sent_before, arrived_before), sent_before)
        shortest, longest = np.where(untimed, 0, self.shortest), np.where(untimed, _EVER, self.longest)
        return _TimeBounds(sent_after, sent_before, arrived_after, arrived_before, shortest, longest)

    def within(self, ran: Ran | None) -> _TimeBounds:
        """Return these bounds without the times at which the tool did not run."""
        if ran is None:
            return self
        begin, end = ran
        return replace(
            self,
            sent_after=np.maximum(self.sent_after, begin),
            sent_before=np.minimum(self.sent_before, end),
            arrived_after=np.maximum(self.arrived_after, begin),
            arrived_before=np.minimum(self.arrived_before, end),
        )


@dataclass(frozen=True, slots=True)
class _Mark:
    """A certain place in the order: from one mark to the next, packets and samples can be counted."""

    place: int
    """Index among the samples in question."""
    rank: int
    """Number of packets up to this place that could be a sample's."""
    number: int
    """Number of the sample among all."""


class _PacketsByKey:
    """Packets of one direction by key, in order of time within each key."""

    def __init__(self, times: Ints, keys: list[SampleKey]) -> None:
        self.at: dict[SampleKey, list[int]] = {}
        for index, key in enumerate(keys):
            self.at.setdefault(key, []).append(index)
        self.times = times
        self.times_of = {key: times[index].tolist() for key, index in self.at.items()}

    def rank(self, keys: Iterable[SampleKey]) -> Ints:
        """Return for each packet the number of packets up to it that have one of these keys."""
        ours = np.zeros(len(self.times), np.int64)
        for key in set(keys):
            ours[self.at.get(key, [])] = 1
        return np.cumsum(ours)

    def outside(self, rank: Ints, number: Ints, ran: Ran | None) -> tuple[_Mark, ...]:
        """Return the marks right before and right after the tool's run; none if it is not known when it ran.

        `rank`: result of `rank`; `number`: the numbers of all samples of the run.
        """
        if ran is None:
            return ()
        ranks = np.append(0, rank)
        before, upto = np.searchsorted(self.times, ran[0], "left"), np.searchsorted(self.times, ran[1], "right")
        first, last = int(number.min(initial=_EVER)), int(number.max(initial=-_EVER))
        return _Mark(-1, int(ranks[before]), first - 1), _Mark(_EVER, int(ranks[upto]) + 1, last + 1)

    def between(self, key: SampleKey, after: int, before: int) -> Span:
        """Return the indices of a key's packets between two times, inclusive."""
        times = self.times_of.get(key)
        if times is None:
            return Span([], 0, 0)
        return Span(self.at[key], bisect_left(times, after), bisect_right(times, before))


def pair(
    samples: Samples,
    egress: Crossings,
    ingress: Crossings,
    stamps: StampModel,
    gaps_utc_ns: Gaps,
    ran_utc_ns: Ran | None,
    reason: npt.NDArray[np.uint8],
) -> tuple[Ints, Ints]:
    """Return the rows of `egress` and `ingress` of each sample: two int64 arrays, valid where `reason` is PAIRED.

    Fills in `reason`. `egress` is in order of `inner_utc_ns`, `ingress` in order of the arrival that the tool's clock
    sees.
    """
    keys = _Keys.of(samples, egress, ingress)
    requests = _PacketsByKey(egress.inner_utc_ns, keys.egress)
    replies = _PacketsByKey(_arrivals(ingress, stamp=stamps.receive_clock is ReceiveClock.KERNEL), keys.ingress)
    first, further = _by_request(samples, stamps)
    request = np.full(len(samples), -1, np.int64)
    response = request.copy()
    untimed = _untimed(samples)
    relaxed, ordinary = (
        _Fit(samples, model, keys, requests, replies, egress, gaps_utc_ns, ran_utc_ns, first)
        for model in (stamps.patient(), stamps)
    )
    answered = samples.rtt_ns != NOT_TOLD
    numbered = bool((samples.seq[first] != NOT_TOLD).all())
    number = samples.seq if numbered else np.full(len(samples), -1, np.int64)
    if not numbered:
        number[first] = np.arange(len(first))
    spans: dict[int, Span] = {}
    patiently = np.zeros(len(samples), np.bool_)

    for fit in (relaxed, ordinary):
        spans = {}
        for k in first:
            near = fit.near(k) if request[k] < 0 else Span([int(request[k])], 0, 1)
            reason[k] = Reason.AMBIGUOUS if request[k] >= 0 else fit.why_not(k, near)
            if reason[k] == Reason.AMBIGUOUS:
                spans[k] = near
        rows = np.array(list(spans), np.int64)
        found = _choose(spans, request, untimed, fit)
        if fit is relaxed and not keys.exact:
            # A reply without a time fits with any wait and so confirms nothing.
            fitting = [
                j >= 0 and not untimed[k] and ordinary.accepts(k, j) for k, j in zip(spans, found.tolist(), strict=True)
            ]
            rank = requests.rank(keys.request)
            ends = requests.outside(rank, number[number != NOT_TOLD], ran_utc_ns)
            found = _borne_out(found, np.array(fitting, np.bool_), rank, number[rows], ends)
        request[rows] = np.where(request[rows] >= 0, request[rows], found)
        if fit is relaxed:
            patiently = request >= 0

    for k, original in further:
        reason[k], request[k], patiently[k] = reason[original], request[original], patiently[original]
    # Replies without a time count as packets among the replies.
    line = np.cumsum(answered | samples.untimed)
    for fit in (relaxed, ordinary):
        spans = {}
        for k in np.flatnonzero(request >= 0).tolist():
            # A request that only ordinary waits have decided has no reply that took longer.
            bounds = fit if patiently[k] else ordinary
            near = bounds.responses(k, int(request[k])) if response[k] < 0 else Span([int(response[k])], 0, 1)
            missing = fit.missing[k] and response[k] < 0
            reason[k] = Reason.LOST if missing else Reason.AMBIGUOUS if near else Reason.NO_RESPONSE
            if reason[k] == Reason.AMBIGUOUS:
                spans[k] = near
        rows = np.array(list(spans), np.int64)
        found = _choose(spans, response, untimed)
        if fit is relaxed and not keys.exact:
            fitting = [
                i >= 0 and not untimed[k] and i in ordinary.responses(k, int(request[k]))
                for k, i in zip(spans, found, strict=True)
            ]
            rank = replies.rank(keys.response)
            ends = replies.outside(rank, line[answered | samples.untimed], ran_utc_ns)
            found = _borne_out(found, np.array(fitting, np.bool_), rank, line[rows], ends)
        response[rows] = np.where(response[rows] >= 0, response[rows], found)
    reason[response >= 0] = Reason.PAIRED
    reason[samples.untimed] = Reason.NO_TIME
    return request, response


def _choose(spans: dict[int, Span], chosen: Ints, untimed: Mask, fit: _Fit | None = None) -> Ints:
    """Return the item that `only_increasing` finds for each span, -1 without one.

    With `fit`, an item must have a fitting reply or be chosen already. Spans of `untimed` samples take part only if
    there is room for them.
    """

    def found(rows: list[int]) -> Ints:
        def fits(n: int, item: int) -> bool:
            return fit is None or chosen[rows[n]] == item or bool(fit.responses(rows[n], item))

        return only_increasing([spans[row] for row in rows], fits)

    everyone = list(spans)
    timed = np.array([not untimed[row] for row in everyone], np.bool_)
    found_of = found(everyone)
    if not timed.all():
        # Untimed samples leave fewer choices, or none: if both searches find an item, it is the same.
        without = found([row for row in everyone if not untimed[row]])
        found_of[timed] = np.where(found_of[timed] >= 0, found_of[timed], without)
    return found_of


def _borne_out(found: Ints, fitting: Mask, rank: Ints, number: Ints, ends: Sequence[_Mark]) -> Ints:
    """Return the items found with long waits, or -1 where ordinary waits do not suffice.

    An item between two that fit with ordinary waits is kept, if exactly as many packets as samples lie between these:
    then it is the only possibility. `rank`: number of each packet among those that could be a sample's; `number`:
    number of each sample among all, including samples without a packet. `ends`: marks before and after the run, if
    known. They confirm nothing without an item that fits: a tool that reads the clock at other places has none.
    """
    kept = np.where(fitting, found, -1)
    sure = np.flatnonzero(fitting).tolist()
    marks = [_Mark(n, int(rank[found[n]]), int(number[n])) for n in sure]
    if marks and ends:
        marks = [ends[0], *marks, ends[1]]
    for before, after in pairwise(marks):
        if after.rank - before.rank == after.number - before.number:
            between = slice(before.place + 1, after.place)
            kept[between] = found[between]
    return kept


class _Fit:
    """Decides which packets can belong to a sample, with the waits of one model."""

    def __init__(
        self,
        samples: Samples,
        stamps: StampModel,
        keys: _Keys,
        requests: _PacketsByKey,
        replies: _PacketsByKey,
        egress: Crossings,
        gaps_utc_ns: Gaps,
        ran_utc_ns: Ran | None,
        first: Sequence[int],
    ) -> None:
        places = _TimeBounds.of(samples, stamps).between(samples, np.array(first, np.int64)).within(ran_utc_ns)
        self.missing = _overlap(gaps_utc_ns, places.sent_after, places.arrived_before)
        """Samples whose packets may be among lost records; none if keys are exact, except samples without a time."""
        if keys.exact:
            self.missing &= samples.stamp_utc_ns == NOT_TOLD
        self._keys, self._requests, self._replies = keys, requests, replies
        self._sent, self._left = requests.times.tolist(), egress.outer_edge_utc_ns.tolist()
        self._egress = egress
        self._shortest, self._longest = places.shortest.tolist(), places.longest.tolist()
        self._arrived_after, self._arrived_before = places.arrived_after.tolist(), places.arrived_before.tolist()
        self._sent_after, self._sent_before = places.sent_after.tolist(), places.sent_before.tolist()

    def near(self, k: int) -> Span:
        """Return the packets that were sent when the request of sample `k` must have been."""
        return self._requests.between(self._keys.request[k], self._sent_after[k], self._sent_before[k])

    def responses(self, k: int, j: int) -> Span:
        """Return the replies that fit sample `k` if its request is packet `j`."""
        after = max(self._sent[j] + self._shortest[k], self._left[j], self._arrived_after[k])
        before = min(self._sent[j] + self._longest[k], self._arrived_before[k])
        return self._replies.between(self._keys.response[k], after, before)

    def accepts(self, k: int, j: int) -> bool:
        """Return whether packet `j` can be the request of sample `k`."""
        return j in self.near(k) and bool(self.responses(k, j))

    def why_not(self, k: int, near: Span) -> Reason:
        """Return AMBIGUOUS if one of the packets can be the request of sample `k`, else the reason why none can."""
        if self.missing[k]:
            return Reason.LOST
        if not near:
            return Reason.NO_REQUEST
        return Reason.AMBIGUOUS if self._any(k, near) else Reason.NO_RESPONSE

    def _any(self, k: int, near: Span) -> bool:
        """Return whether any of the packets has a reply that fits sample `k`."""
        if any(self.responses(k, j) for j in near.first(_FEW)):
            return True
        rest = np.array(near.items[near.start + _FEW : near.stop], np.int64)
        times = np.array(self._replies.times_of.get(self._keys.response[k], ()), np.int64)
        sent, left = self._requests.times[rest], self._egress.outer_edge_utc_ns[rest]
        after = np.maximum(sent + self._shortest[k], left).clip(self._arrived_after[k])
        before = np.minimum(sent + self._longest[k], self._arrived_before[k])
        return bool((np.searchsorted(times, after, "left") < np.searchsorted(times, before, "right")).any())


@dataclass(frozen=True, slots=True)
class Span:
    """The items from `start` to `stop` of an ascending list; false if there is none."""

    items: list[int]
    start: int
    stop: int

    def __bool__(self) -> bool:
        return self.start < self.stop

    def __contains__(self, item: int) -> bool:
        at = bisect_left(self.items, item, self.start, self.stop)
        return at < self.stop and self.items[at] == item

    def first(self, count: int) -> list[int]:
        """Return the first items, at most `count`."""
        return self.items[self.start : min(self.stop, self.start + count)]


def only_increasing(spans: Sequence[Span], fits: Callable[[int, int], bool] = lambda _n, _item: True) -> Ints:
    """Return for each span the one item on which all strictly increasing choices agree; -1 if they differ.

    A choice has one item of each span `n` with `fits(n, item)`; no span may be empty. Groups of spans that do not
    overlap are decided separately, so that spans without any choice affect only those that compete with them.
    """
    chosen = np.full(len(spans), -1, np.int64)
    if not spans:
        return chosen
    low = np.array([s.items[s.start] for s in spans])
    high = np.array([s.items[s.stop - 1] for s in spans])
    ahead = np.append(np.minimum.accumulate(low[::-1])[::-1], _EVER)[1:]
    cuts = np.flatnonzero(np.maximum.accumulate(high) < ahead) + 1
    start = 0
    for stop in cuts.tolist():
        earliest = _earliest(spans, start, stop, fits)
        if earliest is not None:
            latest = _latest(spans, start, stop, fits)
            chosen[start:stop] = np.where(earliest == latest, earliest, -1)
        start = stop
    return chosen


def _earliest(spans: Sequence[Span], start: int, stop: int, fits: Callable[[int, int], bool]) -> Ints | None:
    """Return the earliest strictly increasing choice of the spans from `start` to `stop`; None without one."""
    taken = np.empty(stop - start, np.int64)
    before = -_EVER
    for n in range(start, stop):
        span = spans[n]
        at = bisect_right(span.items, before, span.start, span.stop)
        while at < span.stop and not fits(n, span.items[at]):
            at += 1
        if at == span.stop:
            return None
        before = taken[n - start] = span.items[at]
    return taken


def _latest(spans: Sequence[Span], start: int, stop: int, fits: Callable[[int, int], bool]) -> Ints:
    """Return the latest strictly increasing choice of the spans from `start` to `stop`; there must be one."""
    taken = np.empty(stop - start, np.int64)
    behind = _EVER
    for n in range(stop - 1, start - 1, -1):
        span = spans[n]
        at = bisect_left(span.items, behind, span.start, span.stop) - 1
        while not fits(n, span.items[at]):
            at -= 1
        behind = taken[n - start] = span.items[at]
    return taken


def _untimed(samples: Samples) -> Mask:
    """Return a mask of samples whose reply certainly arrived, but without a time."""
    came: Mask = samples.untimed & (samples.reply_len != NOT_TOLD)
    return came


def _by_request(samples: Samples, stamps: StampModel) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the rows of first replies in the order of sending, and (row, row of the first reply) of further replies.

    Both omit a further reply to a request that has no first reply or no number. Replies without a time are among the
    first replies if the samples have numbers.
    """
    answered = np.flatnonzero(samples.rtt_ns != NOT_TOLD)
    numbered = bool(len(answered)) and bool((samples.seq[answered] != NOT_TOLD).all())
    if not numbered:
        rows = answered[~samples.duplicate[answered]]
        begun = samples.stamp_utc_ns[rows]
        if len(rows) and (begun != NOT_TOLD).all():
            begun = begun if stamps.line_time is LineTime.SENT else begun - samples.rtt_ns[rows]
            rows = rows[np.argsort(begun, kind="stable")]
        return rows.tolist(), []
    first: dict[int, int] = {}
    further = []
    for row, seq in zip(answered.tolist(), samples.seq[answered].tolist(), strict=True):
        if first.setdefault(seq, row) != row:
            further.append((row, first[seq]))
    for row in np.flatnonzero(_untimed(samples)).tolist():
        first.setdefault(int(samples.seq[row]), row)
    return [first[seq] for seq in sorted(first)], further


@dataclass(frozen=True, slots=True)
class _Keys:
    """Keys that a sample and its packets have in common.

    A column that is unknown for one of the samples, or for one of the packets of their protocol, is omitted from all
    keys.
    """

    request: list[SampleKey]
    """Key of each sample's request."""
    response: list[SampleKey]
    egress: list[SampleKey]
    """Key of each packet out of the container."""
    ingress: list[SampleKey]
    exact: bool
    """Whether a key identifies one exchange, as long as sequence numbers do not wrap."""

    @classmethod
    def of(cls, samples: Samples, egress: Crossings, ingress: Crossings) -> _Keys:
        answered = samples.rtt_ns != NOT_TOLD
        protocols = samples.l4_proto[answered]
        by_content = _all_told(protocols) and any((c.l4_proto != NOT_TOLD).any() for c in (egress, ingress))
        icmp = by_content and bool(np.isin(protocols, _ECHOES).all())
        keys, exact = [], by_content
        for crossings, length, ident in (
            (egress, samples.request_len, egress.l4_src),
            # An ICMP echo has the same identifier in both directions; ports are swapped.
            (ingress, samples.reply_len, ingress.l4_src if icmp else ingress.l4_dst),
        ):
            ours = np.isin(crossings.l4_proto, protocols) if by_content else np.ones(len(crossings), np.bool_)
            columns: list[tuple[npt.NDArray[Any], npt.NDArray[Any]]] = [(length, crossings.l3_len)]
            if by_content:
                columns += [(samples.l4_proto, crossings.l4_proto), (samples.l4_id, ident)]
            if icmp:
                columns += [(samples.l4_seq, crossings.l4_dst)]
            usable = [_all_told(said[answered]) and bool((seen[ours] != NOT_TOLD).all()) for said, seen in columns]
            exact &= all(usable[1:])
            used = [column for column, use in zip(columns, usable, strict=True) if use]
            keys.append(
                (
                    _tuples([said for said, _ in used], len(samples)),
                    _tuples([seen for _, seen in used], len(crossings)),
                )
            )
        (request, out), (response, back) = keys
        return cls(request, response, out, back, exact)


def _tuples(columns: list[npt.NDArray[Any]], count: int) -> list[SampleKey]:
    if not columns:
        return [()] * count
    return list(zip(*(column.tolist() for column in columns), strict=True))


def _all_told(column: npt.NDArray[Any]) -> bool:
    return bool(len(column)) and bool((column != NOT_TOLD).all())


def _sorted(crossings: Crossings, direction: Direction, *, stamp: bool = False) -> Crossings:
    chosen = crossings[crossings.direction == direction]
    return chosen[np.argsort(_arrivals(chosen, stamp=stamp), kind="stable")]


def _arrivals(crossings: Crossings, *, stamp: bool) -> Ints:
    return crossings.inner_stamp_utc_ns if stamp else crossings.inner_utc_ns


def _overlap(gaps: Gaps, after: Ints, before: Ints) -> Mask:
    hit = np.zeros(len(after), np.bool_)
    for start, end in gaps:
        hit |= (after <= end) & (before >= start)
    return hit


assert tuple(f.name for f in fields(Corrections)) == tuple(Corrections._DTYPES)
