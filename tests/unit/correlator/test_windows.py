"""Windows are exact except for quantiles, and final when they are yielded."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from contracts import histogram
from contracts.schema import Direction, Segment
from correlator.windows import Windows
from tests.durations import S


def add(windows, utc_ns, delays, device=0):
    n = len(delays)
    windows.add(
        np.array(utc_ns, np.int64),
        np.full(n, device, np.int32),
        np.full(n, Direction.EGRESS, np.uint8),
        np.full(n, Segment.DEVICE, np.uint8),
        np.array(delays, np.int64),
    )


@given(st.lists(st.tuples(st.integers(0, 25 * S), st.integers(0, 1 << 41), st.integers(0, 3)), min_size=1))
def test_every_window_against_the_definition(rows):
    windows = Windows()
    half = len(rows) // 2
    for part in (rows[:half], rows[half:]):
        for device in {row[2] for row in part}:
            chosen = [row for row in part if row[2] == device]
            add(windows, [row[0] for row in chosen], [row[1] for row in chosen], device)
    found = {(w.start_utc_ns, w.width_s, w.device): w for w in windows.close(None)}
    wanted = {(t - t % (width * S), width, d) for t, _, d in rows for width in (1, 10)}
    assert set(found) == wanted
    for (start, width, device), window in found.items():
        values = sorted(v for t, v, d in rows if d == device and start <= t < start + width * S)
        assert (window.count, window.sum_ns) == (len(values), sum(values))
        assert (window.min_ns, window.max_ns) == (values[0], values[-1])
        assert window.counts.sum() == len(values)
        assert list(window.bins) == sorted(set(histogram.bins_of(np.array(values)).tolist()))
        for q, said in zip(
            histogram.QUANTILES, (window.p50_ns, window.p90_ns, window.p99_ns, window.p999_ns), strict=True
        ):
            true = values[max(int(np.ceil(q * len(values))), 1) - 1]
            assert abs(said - min(true, histogram.MAX_NS)) <= max(true / 250, 0) or true > histogram.MAX_NS


def test_a_window_is_returned_once_after_its_end():
    windows = Windows()
    add(windows, [S // 2, S + 1], [5, 7])
    assert len(windows.close(S - 1)) == 0
    (first,) = windows.close(S)
    assert (first.start_utc_ns, first.width_s, first.count) == (0, 1, 1)
    (second,) = windows.close(9 * S)
    assert second.count == 1
    (wide,) = windows.close(10 * S)
    assert (wide.width_s, wide.count, wide.sum_ns) == (10, 2, 12)
    assert len(windows.close(None)) == 0


def test_sums_stay_exact_beyond_what_doubles_hold():
    windows = Windows()
    delays = [(1 << 52) + i for i in range(1000)]
    add(windows, [0] * 1000, delays)
    one_second, ten_seconds = windows.close(None)
    assert one_second.sum_ns == ten_seconds.sum_ns == sum(delays)


def test_many_devices_at_once():
    windows = Windows()
    count = 3_000
    windows.add(
        np.zeros(count, np.int64) + np.arange(count) % 7 * S,
        np.arange(count, dtype=np.int32),
        np.ones(count, np.uint8),
        np.ones(count, np.uint8),
        np.arange(count, dtype=np.int64) ** 2,
    )
    found = [w for w in windows.close(None) if w.width_s == 1]
    assert [(w.device, w.sum_ns) for w in sorted(found, key=lambda w: w.device)] == [(i, i * i) for i in range(count)]


def test_windows_far_apart_of_devices_with_large_numbers():
    """Time and device do not fit into one integer then."""
    windows = Windows()
    rows = [(t * S, d, delay) for delay, (t, d) in enumerate([(5, 1 << 30), (4_000_005, 3), (5, 3)] * 2)]
    for utc_ns, device, delay in rows:
        add(windows, [utc_ns], [delay], device)
    found = [(w.start_utc_ns // S, w.device, w.count, w.sum_ns) for w in windows.close(None) if w.width_s == 1]
    assert found == [(5, 3, 2, 7), (5, 1 << 30, 2, 3), (4_000_005, 3, 2, 5)]
