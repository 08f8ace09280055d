"""The host RTT from made-up samples and probes: what is added to the lower bound, and what the interval contains."""

from dataclasses import replace

import numpy as np
import pytest

from contracts.hooks import Hook
from contracts.schema import NOT_TOLD, HookCost
from correlator import intervals
from mace.tools.calibration import counted
from mace.tools.host_path import Probe
from mace.tools.host_rtt import Cost, ToolTimes, added_ns, calibrated, estimate, spread_evenly

SIX = (Hook.NET_DEV_QUEUE, Hook.NET_DEV_START_XMIT, Hook.NETIF_RX) * 2


def probes(count, *, send=32_000, inside=False, far=25_000, scatter=0, seed=1):
    random = np.random.default_rng(seed + inside)
    moves = random.normal(0, 1, (count, 2)) * scatter
    return [Probe(inside, send + int(a), 5_000, far + int(b) if far >= 0 else -1, SIX) for a, b in moves]


def samples(count=50, scatter=0, seed=9):
    moves = np.random.default_rng(seed).normal(0, 1, (count, 2)) * scatter
    return ToolTimes(43_000 + moves[:, 0] + moves[:, 1], np.full(count, 500.0), 13_000 + moves[:, 1])


def cost(per_record_ns=1_000, error_ns=0.0, *, measured=True):
    return Cost(dict.fromkeys(map(int, Hook), per_record_ns), error_ns, measured)


def both(count, **shape):
    return [*probes(count, **shape), *probes(count, inside=True, **shape | {"send": 27_000})]


def test_the_parts_of_the_term_and_the_cost():
    found = estimate(samples(), both(4), cost())
    assert (found.send_ns, found.device_ns, found.far_ns) == (5_000, 4_500, 12_000)
    assert (found.term_ns, found.cost_ns, found.added_ns) == (21_500, 6_000, 15_500)
    assert found.median == intervals.Interval(43_000 + 15_500, 58_500, 58_500, 1)
    assert added_ns(samples(), both(4), cost()) == 15_500
    assert "host path term +21.5 µs" in found.line()
    assert "tracer's cost, measured, 6.0 µs" in found.line()
    told = found.as_dict()
    assert (told["term_ns"], told["tracer_cost_ns"], told["tracer_cost_by"]) == (21_500, 6_000, "calibration")
    assert (told["added_ns"], told["probes"]) == (15_500, [4, 4])
    wide = estimate(samples(), both(4), cost(error_ns=100))
    cost_ns, error_ns = wide.cost_and_error_ns
    assert cost_ns == 6_000
    assert error_ns == pytest.approx(1.96 * 6 * 100, rel=0.1)


def test_a_far_end_on_another_machine_is_not_in_the_term():
    found = estimate(samples(), both(4, far=-1), cost())
    assert (found.far_ns, found.term_ns) == (0, 9_500)
    assert "far end" not in found.line()


def test_rare_probes_are_compared_with_one_another():
    sides = [*probes(4), *probes(4, send=27_000, inside=True, far=20_000)]
    found = estimate(samples(), sides, cost(), alone=True)
    assert (found.send_ns, found.device_ns, found.far_ns) == (5_000, 0, 5_000)
    assert added_ns(samples(), sides, cost(), alone=True) == found.added_ns


def test_an_unknown_cost_is_said_and_not_subtracted():
    found = estimate(samples(), both(4), None)
    assert (found.cost_ns, found.cost, found.added_ns) == (None, None, 21_500)
    assert "not known and not subtracted" in found.line()
    assert found.as_dict()["tracer_cost_ns"] is None
    assert found.cost_and_error_ns == (NOT_TOLD, NOT_TOLD)


@pytest.mark.parametrize("few", [both(2), probes(20), probes(20, inside=True), []])
def test_too_few_probes_of_a_side_give_no_term(few):
    assert estimate(samples(), few, cost()) is None
    assert added_ns(samples(), few, cost()) is None


def test_one_sample_and_none():
    assert estimate(samples(1), both(4), cost()) is None
    assert added_ns(samples(1), both(4), cost()) == 15_500
    assert added_ns(samples(0), both(4), cost()) is None


def width(found):
    return found.high - found.low


def test_the_interval_grows_with_each_uncertainty():
    known = estimate(samples(), both(8), cost()).median
    assert width(known) == 0
    each = (
        estimate(samples(scatter=3_000), both(8), cost()).median,
        estimate(samples(), both(8, scatter=3_000), cost()).median,
        estimate(samples(), both(8), cost(error_ns=500)).median,
        estimate(samples(), both(8), cost(), method_error_ns=500).median,
    )
    whole = estimate(samples(scatter=3_000), both(8, scatter=3_000), cost(error_ns=500), method_error_ns=500).median
    assert all(0 < width(one) < width(whole) for one in each)
    assert width(estimate(samples(), both(4, scatter=3_000), cost()).median) > width(each[1])


def test_the_interval_covers_the_truth():
    """The true median of what is made here is 43 + 21.5 - 6 µs; the cost is off by its own error."""
    covered = 0
    for seed in range(60):
        error = np.random.default_rng(seed).normal(0, 300)
        sides = both(6, scatter=3_000, seed=10 * seed)
        found = estimate(samples(30, 4_000, seed), sides, cost(1_000 + error, 300)).median
        covered += found.low <= 58_500 <= found.high
    assert covered >= 54


def test_the_method_s_own_error_is_in_the_interval_of_the_term():
    exact, found = (estimate(samples(), both(8), cost(), method_error_ns=each) for each in (0, 8_000))
    assert width(exact.term) == 0
    assert width(found.term) == pytest.approx(2 * 1.96 * 8_000, rel=0.1)
    assert found.term.estimate == exact.term.estimate


def test_the_mean_has_the_errors_of_term_and_cost():
    found = estimate(samples(scatter=3_000), both(8, scatter=3_000), cost(error_ns=500))
    mean = intervals.Interval(60_000, 59_000, 61_000, 1)
    around = found.around(mean)
    assert around.estimate == 60_000
    assert width(around) > max(width(found.term), width(found.cost), width(mean))


def test_what_tracing_has_added_to_the_overheads():
    inside = [replace(each, egress=SIX, ingress=SIX[:2]) for each in probes(4, send=27_000, inside=True)]
    found = estimate(samples(), [*probes(4), *inside], cost(), cost(300))
    assert found.in_devices_ns == (1_800, 600)
    assert found.as_dict()["egress_tracer_cost_ns"] == 1_800
    assert "egress and ingress contain 1.8 and 0.6 µs of tracing at least" in found.line()


def test_a_sources_count_is_by_hook():
    """A hook without a timed call costs as much as the others on average."""
    costs = [
        HookCost(Hook.NET_DEV_QUEUE, 9, 2, 3_000),
        HookCost(Hook.NETIF_RX, 9, 3, 1_500),
        HookCost(Hook.KFREE_SKB, 9, 0, 0),
    ]
    found = counted(costs)
    assert not found.measured
    assert found.of([SIX, SIX])[0] == 2 * (1_500 + 500 + 1_000)
    assert found.of([SIX])[1] > 0
    assert counted([HookCost(Hook.KFREE_SKB, 9, 0, 0)]) is None
    assert counted([]) is None


def test_a_term_that_was_measured_before():
    term, paid = intervals.Interval(9_500, 8_500, 10_500, 1), intervals.Interval(6_000, 5_000, 7_000, 1)
    found = calibrated(samples(), term, paid)
    assert found.median.estimate == 43_000 + 3_500
    assert width(found.median) == pytest.approx(2_000 * 2**0.5, rel=0.1)
    assert width(calibrated(samples(scatter=3_000), term, paid).median) > width(found.median)
    assert "by mace calibrate" in found.line()
    assert found.as_dict()["probed_by"] == "calibration"
    assert calibrated(samples(1), term, paid) is None


def test_whole_units_are_spread_evenly():
    moves = spread_evenly(np.full(1000, 1000))
    assert np.abs(moves).max() < 500
    assert abs(moves.mean()) < 5
