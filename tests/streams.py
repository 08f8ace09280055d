"""Records of a stream's items, and the checks that every stream must pass."""

import numpy as np

from contracts.interfaces import Progress
from contracts.records import Batch
from contracts.topology import Topology


def records(items):
    """Return all records of a stream, markers included, as one batch."""
    return Batch.concatenate([item for item in items if isinstance(item, Batch)])


def check_stream(items):
    """Check a stream: records are in order of time, sightings precede them, no record precedes earlier progress."""
    assert isinstance(items[0], Topology)
    at, sightings = -(1 << 63), ()
    for item in items:
        if isinstance(item, Topology):
            assert item.from_ns >= at
            assert item.sightings[: len(sightings)] == sightings
            sightings, from_ns = item.sightings, item.from_ns
        elif isinstance(item, Progress):
            at = max(at, item.upto_ns)
        else:
            assert len(item) > 0
            assert (np.diff(item.ts_ns) >= 0).all()
            assert item.ts_ns[0] >= max(at, from_ns)
            assert item.dev.max() < len(sightings)
            at = int(item.ts_ns[-1])
