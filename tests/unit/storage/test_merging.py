from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from storage import merging
from storage.merging import Histograms

ROWS = 300


def made(rng, rows=ROWS):
    """Return windows of a few groups, as a batch of Arrow, with histograms that add up to their counts."""
    bins = [
        np.sort(rng.choice(merging.BINS, rng.integers(1, 40), replace=False)).astype(np.uint16) for _ in range(rows)
    ]
    counts = [rng.integers(1, 1000, len(each)) for each in bins]
    low = rng.integers(0, 1000, rows)
    return pa.RecordBatch.from_pydict(
        {
            "container": [f"c{n}" for n in rng.integers(0, 5, rows)],
            "stretch": rng.integers(0, 4, rows),
            "count": [int(each.sum()) for each in counts],
            "sum_ns": rng.integers(1000, 1 << 50, rows),
            "min_ns": low,
            "max_ns": low + rng.integers(0, 1000, rows),
            "bins": pa.array([each.tolist() for each in bins], pa.list_(pa.uint16())),
            "counts": pa.array([each.tolist() for each in counts], pa.list_(pa.int64())),
        }
    )


@pytest.mark.parametrize("limit", [None, 0])
@pytest.mark.parametrize("coarse_bits", [0, 4])
def test_groups_of_several_batches_against_a_loop(monkeypatch, limit, coarse_bits):
    """Also where cells are merged after each batch, and where there are too many for a table."""
    if limit is not None:
        monkeypatch.setattr(merging, "_DENSE", limit)
        monkeypatch.setattr(merging, "_UNMERGED", limit)
    rng = np.random.default_rng(7)
    batches = [made(rng), made(rng, 1), made(rng)]
    found = Histograms(("container", "stretch"), coarse_bits)
    for each in [*batches, batches[0].slice(0, 0)]:
        found.add(each)
    expected = {}
    for row in pa.Table.from_batches(batches).to_pylist():
        count, total, low, high, cells = expected.get((row["container"], row["stretch"]), (0, 0, 1 << 62, 0, Counter()))
        for bin_, n in zip(row["bins"], row["counts"], strict=True):
            cells[(bin_ >> coarse_bits << coarse_bits) + (1 << coarse_bits >> 1)] += n
        expected[row["container"], row["stretch"]] = (
            count + row["count"],
            total + row["sum_ns"],
            min(low, row["min_ns"]),
            max(high, row["max_ns"]),
            cells,
        )
    got = {key: (d.count, d.sum_ns, d.min_ns, d.max_ns, d.histogram()) for key, d in found.distributions()}
    assert got.keys() == expected.keys()
    for key, (*figures, (bins, counts)) in got.items():
        *wanted, cells = expected[key]
        assert figures == wanted
        assert dict(zip(bins.tolist(), counts.tolist(), strict=True)) == cells
        assert (np.diff(bins) > 0).all()


def test_nothing_has_no_groups():
    assert list(Histograms(("container",)).distributions()) == []
