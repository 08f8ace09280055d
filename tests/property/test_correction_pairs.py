"""Samples are never paired with wrong packets, and all certain pairs are found; a reference tries all assignments."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.schema import NOT_TOLD, Direction
from correlator.correction import Reason, Span, correct, only_increasing, settled
from correlator.samples import Samples
from correlator.stamps import FPING, PING, PING_USER, REQUEST_RESPONSE
from tests.made_exchanges import LENGTH, START, Path, ping_run


def pairs(found):
    """Return (request, response) of each sample; None for a sample without a pair."""
    rows = zip(found.reason, found.request.tolist(), found.response.tolist(), strict=True)
    return [(request, response) if reason == Reason.PAIRED else None for reason, request, response in rows]


def wrong(run, found):
    return [(row, pair) for row, pair in enumerate(pairs(found)) if pair is not None and pair != run.truth[row]]


def ran(run):
    """Return the shortest run of the tool that has all packets in it."""
    times = np.concatenate([run.crossings.inner_utc_ns, run.crossings.inner_stamp_utc_ns])
    return START, int(times.max(initial=START))


# One choice out of many ------------------------------------------------------------------------------------


def naive_increasing(sets):
    """Try every choice. A set whose members all exceed those of the earlier sets begins a stretch judged separately."""
    chosen, start = [], 0
    for stop in range(1, len(sets) + 1):
        before, after = sets[start:stop], sets[stop:]
        if after and max(map(max, before)) >= min(map(min, after)):
            continue
        choices = [c for c in itertools.product(*before) if all(a < b for a, b in itertools.pairwise(c))]
        for options in zip(*choices, strict=True) if choices else [()] * len(before):
            chosen.append(options[0] if len(set(options)) == 1 else -1)
        start = stop
    return chosen


@given(st.lists(st.sets(st.integers(0, 9), min_size=1, max_size=4), max_size=6))
def test_only_increasing_equals_an_exhaustive_search(sets):
    spans = [Span(sorted(s), 0, len(s)) for s in sets]
    assert only_increasing(spans).tolist() == naive_increasing(sets)


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(1, 5), st.integers(0, 7)), max_size=6))
def test_only_increasing_with_unfit_items_equals_an_exhaustive_search(windows):
    items = list(range(12))
    spans = [Span(items, start, start + size) for start, size, _ in windows]
    fitting = [[i for i in items[s : s + n] if i == s or i % 3 != unfit % 3] for s, n, unfit in windows]
    found = only_increasing(spans, lambda n, item: item in fitting[n])
    # The spans separate the stretches, whatever fits in them: the reference must use the same stretches.
    apart, start = [], 0
    for stop in range(1, len(spans) + 1):
        if stop == len(spans) or max(s.stop - 1 for s in spans[start:stop]) < min(s.start for s in spans[stop:]):
            choices = [
                c for c in itertools.product(*fitting[start:stop]) if all(a < b for a, b in itertools.pairwise(c))
            ]
            columns = list(zip(*choices, strict=True)) or [()] * (stop - start)
            apart += [options[0] if len(set(options)) == 1 else -1 for options in columns]
            start = stop
    assert found.tolist() == apart


# The whole of it against a reference -----------------------------------------------------------------------


def naive_pairs(run, stamps, ends=None):
    """Pair requests, then replies, by trying all orders, with the long waiting times first and then with the ordinary
    ones. `ends`: beginning and end of the run, if known.

    For few samples, all with times and none with duplicate replies.
    """
    begin, end = ends or (-(1 << 62), 1 << 62)
    c = run.crossings
    packets = list(zip(c.packet.tolist(), c.direction.tolist(), c.inner_utc_ns.tolist(),
                       c.inner_stamp_utc_ns.tolist(), c.outer_edge_utc_ns.tolist(), strict=True))  # fmt: skip
    out = sorted((inner, name, left) for name, d, inner, _, left in packets if d == Direction.EGRESS)
    back = sorted((arrived, name) for name, d, _, arrived, _ in packets if d == Direction.INGRESS)
    s = run.samples

    def replies(k, i, waits):
        unsure = 1_000 + waits.clock_slack_ns
        queued, _, left = out[i]
        rtt, stamp = int(s.rtt_ns[k]), int(s.stamp_utc_ns[k])
        return [
            n for n, (arrived, _) in enumerate(back)
            if -unsure <= rtt - (arrived - queued) <= waits.send_wait_ns + unsure and arrived >= left
            and -unsure - 1_000 <= stamp - arrived <= waits.print_wait_ns + 1_000 + unsure and begin <= arrived <= end
        ]  # fmt: skip

    def requests(k, waits):
        begun, unsure = int(s.stamp_utc_ns[k] - s.rtt_ns[k]), 1_000 + waits.clock_slack_ns
        early, late = begun - waits.print_wait_ns - 1_000 - unsure, begun + 1_000 + unsure + waits.send_wait_ns
        early, late = max(early, begin), min(late, end)
        return [i for i, (queued, _, _) in enumerate(out) if early <= queued <= late and replies(k, i, waits)]

    def tried(rows, candidates, number, times, last):
        """Return row -> the one item that fits it. The samples are numbered from 0 to `last`."""
        inside = [n for n, at in enumerate(times) if begin <= at <= end]
        certain = {}
        for waits in (stamps.patient(), stamps):
            sets = {k: [certain[k]] if k in certain else candidates(k, waits) for k in rows}
            sets = {k: items for k, items in sets.items() if items}
            chosen = dict(zip(sets, naive_increasing(list(sets.values())), strict=True))
            if waits is not stamps:
                ordinary = {k: item for k, item in chosen.items() if item in candidates(k, stamps)}
                marks = [(number[k], item) for k, item in ordinary.items()]
                if ends and marks:
                    marks += [(-1, inside[0] - 1), (last + 1, inside[-1] + 1)]
                for k in list(chosen):
                    before = [mark for mark in marks if mark[0] <= number[k]]
                    after = [mark for mark in marks if mark[0] >= number[k]]
                    if not before or not after or len({item - n for n, item in (max(before), min(after))}) > 1:
                        del chosen[k]
            certain |= {k: item for k, item in chosen.items() if item >= 0 and k not in certain}
        return certain

    answered = [k for k in np.argsort(s.seq, kind="stable").tolist() if s.rtt_ns[k] != NOT_TOLD]
    sent = [queued for queued, _, _ in out]
    request = tried(answered, requests, {k: int(s.seq[k] - s.seq.min()) for k in answered}, sent, len(s) - 1)
    lines = {k: n for n, k in enumerate(sorted(answered))}
    arrivals = [arrived for arrived, _ in back]
    chosen = {k: request[k] for k in sorted(request)}
    response = tried(chosen, lambda k, waits: replies(k, chosen[k], waits), lines, arrivals, len(lines) - 1)
    return [(out[request[k]][1], back[response[k]][1]) if k in response else None for k in range(len(s))]


@pytest.mark.slow
@settings(max_examples=150)
@given(st.integers(0, 1 << 32), st.integers(1, 5), st.sampled_from([3e4, 1e6, 4e6, 3e7]), st.integers(0, 3),
       st.booleans(), st.integers(-1, 4))  # fmt: skip
def test_pairs_agree_with_an_exhaustive_search(seed, count, pace_ns, strangers, ends_known, held_up):
    rng = np.random.default_rng(seed)
    jitter_ns = int(rng.choice([10_000, 10**7]))
    # A packet with ordinary waits, foreign or of a request without a reply, is preferred to a delayed one.
    held_up = -1 if strangers else held_up
    loss = 0.0 if held_up >= 0 else 0.2
    run = ping_run(
        rng, count, pace_ns=pace_ns, loss=loss, strangers=strangers, jitter_ns=jitter_ns, held_up=held_up
    )  # fmt: skip
    ends = ran(run) if ends_known else None
    found = correct(run.samples, run.crossings, PING, ran_utc_ns=ends)
    # The reference separates stretches by fitting items, the code by a wider range: the code may leave more samples
    # unpaired, but must not pair any differently.
    by_trial = naive_pairs(run, PING, ends)
    assert all(mine in (None, other) for mine, other in zip(pairs(found), by_trial, strict=True))
    if strangers == 0 and (found.reason != Reason.NO_RESPONSE).all():
        assert pairs(found) == by_trial
    assert wrong(run, found) == []


# Against the truth -----------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=60)
@given(st.integers(0, 1 << 32), st.sampled_from([2e4, 3e5, 2e6, 1e7, 5e7]), st.booleans(), st.integers(0, 20))
def test_never_a_wrong_pair(seed, pace_ns, content, strangers):
    rng = np.random.default_rng(seed)
    run = ping_run(
        rng, 60, pace_ns=pace_ns, loss=rng.choice([0, 0.1, 0.5]), duplicates=rng.choice([0, 0.2]),
        first_seq=int(rng.choice([1, 65_500])), jitter_ns=int(rng.choice([10_000, 30_000_000])),
        strangers=strangers, content=content, stamped=bool(rng.integers(0, 2)), ident_told=bool(rng.integers(0, 2)),
        # Among packets that are as close as that delay, one with ordinary waits is preferred.
        held_up=int(rng.choice([0, 30, 59])) if pace_ns >= 1e7 and not strangers else -1,
    )  # fmt: skip
    begin, end = ran(run)
    longer_ns = int(rng.choice([0, 10**7, 10**10]))
    ends = None if rng.integers(0, 2) else (begin - longer_ns, end + longer_ns)
    found = correct(run.samples, run.crossings, PING, ran_utc_ns=ends)
    assert wrong(run, found) == []
    unanswered = np.array([pair is None for pair in run.truth])
    assert ((found.reason == Reason.NO_REPLY) == unanswered).all()


@pytest.mark.parametrize("duplicates", [0.0, 0.3])
@pytest.mark.parametrize("loss", [0.0, 0.3])
@pytest.mark.parametrize("pace_ns", [10_000_000, 100_000_000])
def test_all_samples_at_a_slow_pace_are_paired(pace_ns, loss, duplicates):
    run = ping_run(np.random.default_rng(5), 200, pace_ns=pace_ns, loss=loss, duplicates=duplicates, first_seq=65_450)
    assert pairs(correct(run.samples, run.crossings, PING)) == run.truth


@pytest.mark.slow
def test_order_pairs_all_samples_of_a_flood():
    run = ping_run(np.random.default_rng(6), 5_000, pace_ns=150_000, rtt_ns=10_000, jitter_ns=1_000)
    assert pairs(correct(run.samples, run.crossings, PING)) == run.truth


def some_without_times(run, rng, share):
    """Return the run's samples, some of them with replies without a time, and the mask of these."""
    chosen = (run.samples.rtt_ns != NOT_TOLD) & (rng.random(len(run.samples)) < share)
    return replace(run.samples, rtt_ns=np.where(chosen, NOT_TOLD, run.samples.rtt_ns), untimed=chosen), chosen


@pytest.mark.slow
@settings(max_examples=60)
@given(st.integers(0, 1 << 32), st.sampled_from([2e4, 3e5, 2e6, 1e7]), st.booleans(), st.integers(0, 5))
def test_untimed_replies_cause_no_wrong_pair(seed, pace_ns, content, strangers):
    rng = np.random.default_rng(seed)
    run = ping_run(
        rng, 60, pace_ns=pace_ns, loss=rng.choice([0, 0.1]), duplicates=rng.choice([0, 0.2]), strangers=strangers,
        jitter_ns=int(rng.choice([10_000, 30_000_000])), content=content, stamped=bool(rng.integers(0, 2)),
    )  # fmt: skip
    samples, chosen = some_without_times(run, rng, 0.2)
    found = correct(samples, run.crossings, PING)
    assert ((found.reason == Reason.NO_TIME) == chosen).all()
    assert wrong(run, found) == []


@pytest.mark.parametrize(
    ("pace_ns", "count", "seen"), [(10_000_000, 200, True), (10_000_000, 200, False), (150_000, 1_000, True)]
)
def test_untimed_replies_leave_other_samples_paired(pace_ns, count, seen):
    """The other samples stay paired, whether or not the packets of untimed replies were captured."""
    rng = np.random.default_rng(6)
    run = ping_run(rng, count, pace_ns=pace_ns, rtt_ns=10_000, jitter_ns=1_000)
    samples, chosen = some_without_times(run, rng, 0.1)
    crossings = run.crossings
    if not seen:
        theirs = [name for row in np.flatnonzero(chosen) for name in run.truth[row]]
        crossings = crossings[~np.isin(crossings.packet, theirs)]
    wanted = [None if untimed else pair for untimed, pair in zip(chosen, run.truth, strict=True)]
    assert pairs(correct(samples, crossings, PING)) == wanted


def test_one_delayed_sample_of_a_flood_leaves_the_others_paired():
    run = ping_run(np.random.default_rng(6), 500, pace_ns=150_000, rtt_ns=10_000, jitter_ns=1_000, held_up=250)
    assert pairs(correct(run.samples, run.crossings, PING)) == run.truth


@pytest.mark.parametrize("stamped", [False, True])
@pytest.mark.parametrize("held_up", [0, 19])
def test_the_ends_of_a_run_confirm_long_waits(held_up, stamped):
    """The first and the last sample have a neighbour on one side only. Foreign packets were there before and after."""
    run = ping_run(np.random.default_rng(6), 20, pace_ns=10_000_000, stamped=stamped, held_up=held_up)
    begin, end = ran(run)
    alone = correct(run.samples, run.crossings, PING)
    assert pairs(alone) == [None if row == held_up else pair for row, pair in enumerate(run.truth)]
    for at in (begin - 2_000_000, end + 2_000_000):
        run.path.egress(at)
        run.path.ingress(at + 90_000)
    assert pairs(correct(run.samples, run.crossings, PING, ran_utc_ns=(begin, end))) == run.truth


@pytest.mark.parametrize("held_up", [0, 19])
@pytest.mark.parametrize("direction", [Direction.EGRESS, Direction.INGRESS])
def test_a_foreign_packet_within_the_run_leaves_a_delayed_end_unpaired(held_up, direction):
    run = ping_run(np.random.default_rng(6), 20, pace_ns=10_000_000, held_up=held_up)
    begin, end = ran(run)
    begin, end = begin - 2_000_000_000, end + 2_000_000_000
    at = begin + 1_000_000 if held_up == 0 else end - 1_000_000
    add = run.path.egress if direction is Direction.EGRESS else run.path.ingress
    add(at)
    found = correct(run.samples, run.crossings, PING, ran_utc_ns=(begin, end))
    assert pairs(found) == [None if row == held_up else pair for row, pair in enumerate(run.truth)]


def test_the_ends_of_a_run_confirm_nothing_without_an_ordinary_sample():
    """All samples of such a tool are late: it reads the clock elsewhere than its model says."""
    path = Path()
    for n in range(3):
        path.egress(START + 10_000_000 * n)
        path.ingress(START + 10_000_000 * n + 90_000)
    samples = Samples.of(3, seq=[1, 2, 3], rtt_ns=4_000_000, request_len=LENGTH, reply_len=LENGTH)
    found = correct(samples, path.crossings(), PING, ran_utc_ns=(START - 1_000_000, START + 30_000_000))
    assert pairs(found) == [None] * 3


def test_an_unanswered_request_at_the_end_of_a_run_counts():
    run = ping_run(np.random.default_rng(6), 20, pace_ns=10_000_000, held_up=18, loss=0)
    last = run.samples.seq == 20
    samples = replace(
        run.samples,
        rtt_ns=np.where(last, NOT_TOLD, run.samples.rtt_ns),
        stamp_utc_ns=np.where(last, NOT_TOLD, run.samples.stamp_utc_ns),
    )
    reply = run.truth[-1][1]
    crossings = run.crossings[run.crossings.packet != reply]
    expected = [*run.truth[:-1], None]
    assert pairs(correct(samples, crossings, PING, ran_utc_ns=ran(run))) == expected
    # If the last request were not the run's, its packet would be foreign.
    shorter = pairs(correct(samples[:-1], crossings, PING, ran_utc_ns=ran(run)))
    assert shorter == [*run.truth[:-2], None]


@settings(max_examples=40)
@given(st.integers(0, 1 << 32), st.sampled_from([3e6, 1e8, 3e8]), st.sampled_from([0, 39]), st.booleans())
def test_lost_records_of_a_run_with_known_ends_cause_no_wrong_pairs(seed, pace_ns, held_up, stamped):
    rng = np.random.default_rng(seed)
    run = ping_run(rng, 40, pace_ns=pace_ns, stamped=stamped, held_up=held_up)
    begin, end = ran(run)
    first = int(rng.integers(begin, end))
    last = min(end, first + int(rng.integers(0, int(10 * pace_ns))))
    crossings = run.crossings
    gone = (crossings.inner_utc_ns >= first) & (crossings.inner_stamp_utc_ns <= last)
    gone &= rng.random(len(gone)) < 0.7
    found = correct(run.samples, crossings[~gone], PING, [(first, last)], (begin, end))
    assert wrong(run, found) == []
    missing = set(crossings.packet[gone].tolist())
    for reason, truth in zip(found.reason, run.truth, strict=True):
        assert reason != Reason.PAIRED or not missing & set(truth)


def test_samples_without_times_are_paired_if_every_request_has_a_reply():
    run = ping_run(np.random.default_rng(7), 2_000, pace_ns=10_000_000, stamped=False)
    assert pairs(correct(run.samples, run.crossings, PING)) == run.truth


def test_without_times_a_foreign_packet_makes_samples_ambiguous():
    run = ping_run(np.random.default_rng(8), 50, pace_ns=10_000_000, stamped=False, strangers=1, jitter_ns=0)
    found = correct(run.samples, run.crossings, PING)
    assert wrong(run, found) == []
    assert (found.reason == Reason.AMBIGUOUS).any()


@settings(max_examples=10)
@given(st.integers(0, 1 << 32), st.sampled_from([2e5, 1e7]))
def test_content_pairs_all_samples_among_foreign_traffic(seed, pace_ns):
    run = ping_run(
        np.random.default_rng(seed), 100, pace_ns=pace_ns, loss=0.2, duplicates=0.2, first_seq=65_480, strangers=50,
        jitter_ns=30_000_000, content=True, ident_told=True,
    )  # fmt: skip
    assert pairs(correct(run.samples, run.crossings, PING)) == run.truth


@pytest.mark.slow
def test_order_distinguishes_wrapped_sequence_numbers():
    run = ping_run(np.random.default_rng(9), 70_000, pace_ns=100_000, rtt_ns=10_000, content=True, stamped=False)
    assert pairs(correct(run.samples, run.crossings, PING)) == run.truth


# Losses ----------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.integers(0, 1 << 32), st.sampled_from([2e5, 3e6, 1e7]), st.booleans())
def test_lost_records_cause_no_wrong_pairs(seed, pace_ns, ident_told):
    rng = np.random.default_rng(seed)
    run = ping_run(
        rng, 80, pace_ns=pace_ns, loss=0.2, strangers=20, content=ident_told, ident_told=ident_told, jitter_ns=100_000
    )
    crossings = run.crossings
    begin = START + int(rng.integers(0, int(80 * pace_ns)))
    end = begin + int(rng.integers(0, int(20 * pace_ns)))
    gone = (
        (crossings.inner_utc_ns >= begin) & (crossings.inner_stamp_utc_ns <= end) & (rng.random(len(crossings)) < 0.7)
    )
    found = correct(run.samples, crossings[~gone], PING, [(begin, end)])
    assert wrong(run, found) == []
    if not gone.any() or ident_told:
        return
    missing = set(crossings.packet[gone].tolist())
    for reason, truth in zip(found.reason, run.truth, strict=True):
        if truth and missing & set(truth):
            assert reason != Reason.PAIRED


@settings(max_examples=40)
@given(st.integers(0, 1 << 32), st.sampled_from([2e5, 3e6, 1e7, 1e8]), st.booleans())
def test_foreign_packets_are_not_paired(seed, pace_ns, stamped):
    """Packets of equal length and similar round trips, 20 ms away from the samples."""
    run = ping_run(np.random.default_rng(seed), 80, pace_ns=pace_ns, loss=0.1, stamped=True)
    late = Path([(row[0], *(t + 20_000_000 for t in row[1:6]), *row[6:]) for row in run.path.rows])
    found = correct(run.samples, late.crossings(), PING)
    assert (found.reason != Reason.PAIRED).all() or pace_ns < 2e7


def test_a_gap_affects_only_samples_near_it():
    run = ping_run(np.random.default_rng(3), 100, pace_ns=10_000_000)
    gap = (START + 500_000_000, START + 501_000_000)
    found = correct(run.samples, run.crossings, PING, [gap])
    assert 1 <= (found.reason == Reason.LOST).sum() <= 3
    assert (found.reason == Reason.PAIRED).sum() == 100 - (found.reason == Reason.LOST).sum()


# Settled samples -------------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=30)
@given(st.integers(0, 1 << 32), st.sampled_from([2e5, 6e6, 2e7]), st.integers(1, 30))
def test_settled_samples_keep_their_pairs(seed, pace_ns, step):
    run = ping_run(np.random.default_rng(seed), 60, pace_ns=pace_ns, loss=0.2, strangers=5)
    whole = correct(run.samples, run.crossings, PING)
    done, crossings = 0, run.crossings
    for stop in range(step, 60 + step, step):
        known = run.samples[done:stop]
        upto = int(known.stamp_utc_ns.max(initial=0))
        ready = settled(known, PING, upto)
        early = correct(known[:ready], crossings[crossings.inner_stamp_utc_ns < upto], PING)
        # Later packets may pair further samples, but change no pair.
        shown, last = pairs(early), pairs(whole)[done : done + ready]
        assert all(now in (None, then) for now, then in zip(shown, last, strict=True))
        assert (early.reason == Reason.NO_REPLY).tolist() == (whole.reason[done : done + ready] == 1).tolist()
        done += ready


def test_samples_at_a_slow_pace_settle_during_the_run():
    run = ping_run(np.random.default_rng(4), 60, pace_ns=20_000_000)
    assert settled(run.samples, PING, START + 600_000_000) in range(25, 31)


# Figures and models ----------------------------------------------------------------------------------------


def test_figures_of_one_exchange():
    path = Path()
    request, left = path.egress(START + 5_000, overhead=20_000)
    response, inner = path.ingress(START + 90_000, overhead=9_000, wait=600)
    samples = Samples.of(1, stamp_utc_ns=START + 150_000, seq=1, rtt_ns=90_000, request_len=LENGTH, reply_len=LENGTH)
    found = correct(samples, path.crossings(), PING)
    assert pairs(found) == [(request, response)]
    assert found.tool_rtt_ns == 90_000
    assert found.egress_ns == 20_000
    # From stamp to stamp: the outer device's record is at 90 - 9 + 0.5 µs, its stamp 0.4 µs before that, and the time
    # nearest to the wire 0.5 µs before it.
    assert found.ingress_ns == 8_900
    assert found.host_rtt_lower_bound_ns == 61_100
    assert found.nic_rtt_ns == START + 81_000 - left
    by_user = correct(samples, path.crossings(), PING_USER)
    assert by_user.ingress_ns == inner - (START + 81_500)
    assert by_user.host_rtt_lower_bound_ns == 70_000 - by_user.ingress_ns
    assert found.sent_utc_ns == START + 5_000


@pytest.mark.parametrize(
    ("model", "stamp_ns", "rtt_ns", "paired"),
    [
        (PING, 150_000, 90_000, True),
        (PING, -15_000, 90_000, False),  # printed before it arrived
        (PING, 5_200_000, 90_000, False),  # printed late: paired only if neighbours confirm it
        (PING, 150_000, 78_000, False),  # ended before the reply arrived
        (PING, 150_000, 1_200_000, False),  # queued late
        (PING_USER, 150_000, 130_000, True),
        (FPING, 90_000, 90_000, True),
        (FPING, 300_000, 90_000, False),  # the line has the time of the reply itself
        (REQUEST_RESPONSE, 0, 130_000, True),
        (REQUEST_RESPONSE, 120_000, 130_000, False),  # sent after its packet
    ],
)
def test_the_stamp_model_of_each_tool(model, stamp_ns, rtt_ns, paired):
    path = Path()
    path.egress(START + 5_000)
    path.ingress(START + 90_000)
    samples = Samples.of(1, stamp_utc_ns=START + stamp_ns, rtt_ns=rtt_ns)
    assert (correct(samples, path.crossings(), model).reason == Reason.PAIRED) == paired


def three(between, **columns):
    """Return three exchanges 10 ms apart. `between(path, begin)` makes the second, `columns` replace those of its
    sample.
    """
    path = Path()
    for n in range(3):
        begin = START + 10_000_000 * n
        if n == 1:
            between(path, begin)
        else:
            path.egress(begin + 5_000)
            path.ingress(begin + 90_000)
    stamps = [START + 150_000 + 10_000_000 * n for n in range(3)]
    return path, Samples.of(3, **{"stamp_utc_ns": stamps, "seq": [1, 2, 3], "rtt_ns": [90_000] * 3, **columns})


def ordinary(path, begin):
    path.egress(begin + 5_000)
    path.ingress(begin + 90_000)


@pytest.mark.parametrize(
    ("columns", "paired"),
    [
        ({"stamp_utc_ns": [START + 150_000, START + 16_000_000, START + 20_150_000]}, True),  # printed late
        ({"stamp_utc_ns": [START + 150_000, START + 900_000_000, START + 900_150_000]}, False),  # so is the next one
        ({"rtt_ns": [90_000, 3_000_000, 90_000]}, True),  # queued late
        ({"rtt_ns": [90_000, 60_000, 90_000]}, True),  # interrupted after the kernel's stamp
        ({"rtt_ns": [90_000, -20_000, 90_000]}, False),
        ({"seq": [1, 3, 4], "rtt_ns": [90_000, 3_000_000, 90_000]}, False),  # a packet is missing
    ],
)
def test_neighbours_confirm_long_waits(columns, paired):
    path, samples = three(ordinary, **columns)
    found = correct(samples, path.crossings(), PING)
    assert pairs(found)[0] == (1, 2)
    assert pairs(found)[1] == ((3, 4) if paired else None)


def test_an_interrupt_after_the_kernels_stamp_is_not_subtracted():
    def interrupted(path, begin):
        path.egress(begin + 5_000, overhead=20_000)
        path.ingress(begin + 170_000, overhead=90_000)

    path, samples = three(interrupted, resolution_ns=1_000)
    found = correct(samples, path.crossings(), PING)
    # The outer device's stamp is at 80.1 µs; the tool's can be at 5 + 90 + 1 at the latest.
    assert found.ingress_ns[1] == 96_000 - 80_100
    assert found.host_rtt_lower_bound_ns[1] == 90_000 - 20_000 - found.ingress_ns[1]


def test_packets_of_another_length_are_not_paired():
    path = Path()
    path.egress(START + 5_000, length=LENGTH + 4)
    path.ingress(START + 90_000)
    samples = Samples.of(1, stamp_utc_ns=START + 150_000, rtt_ns=90_000, request_len=LENGTH)
    assert correct(samples, path.crossings(), PING).reason == Reason.NO_REQUEST
    path.egress(START + 5_000)
    assert correct(samples, path.crossings(), PING).reason == Reason.PAIRED
    other = Samples.of(1, stamp_utc_ns=START + 150_000, rtt_ns=90_000, request_len=LENGTH, reply_len=60)
    assert correct(other, path.crossings(), PING).reason == Reason.NO_RESPONSE


def test_a_reply_has_the_requests_ports_swapped():
    path = Path()
    for port in (40_001, 40_002):
        path.egress(START + 5_000, content=(17, port, 53))
        path.ingress(START + 90_000, content=(17, 53, port))
    samples = Samples.of(2, rtt_ns=130_000, l4_proto=17, l4_id=[40_001, 40_002], stamp_utc_ns=START)
    assert pairs(correct(samples, path.crossings(), REQUEST_RESPONSE)) == [(1, 2), (3, 4)]


def test_requests_without_a_reply():
    run = ping_run(np.random.default_rng(2), 20, pace_ns=10_000_000, content=True, ident_told=True, strangers=5)
    samples = Samples.concatenate([run.samples, Samples.of(2, seq=[21, 22])])
    found = correct(samples, run.crossings, PING)
    assert pairs(found) == [*run.truth, None, None]
    assert found.reason[-2:].tolist() == [Reason.NO_REPLY, Reason.NO_REPLY]


def test_no_samples():
    none = Samples.of(0)
    assert len(correct(none, Path().crossings(), PING)) == 0
    assert settled(none, PING, START) == 0
    assert settled(Samples.of(3), PING, START) == 3
    assert correct(Samples.of(1, rtt_ns=5), Path().crossings(), PING).reason == Reason.NO_REQUEST
