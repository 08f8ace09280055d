"""Perfetto traces with changed, removed or added bytes give an error with an offset, or records and a balanced ledger.

Inputs that once failed are kept here as examples.
"""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from collector.perfetto.wire import MAX_PACKET_BYTES, PacketReader
from contracts.errors import CaptureError
from contracts.hooks import Hook
from tests import perfetto_traces as traces
from tests.golden_perfetto import replayed
from tests.places import GOLDEN
from tests.unit.collector.perfetto.test_source import NAMES, records

GIVEN = records(400)
FILES = GOLDEN / "perfetto-1"
TRACES = {
    "generic": traces.make(GIVEN, NAMES, per_bundle=40, lost=(2,), stats=((0, 3), (1, 4))),
    "described": traces.make(GIVEN, NAMES, form="described", numbers=True, xmit_done=True, per_bundle=40),
    "deflate": traces.make(GIVEN, NAMES, compress="deflate", per_bundle=40),
    "traced": (FILES / "generic.pftrace").read_bytes(),
}

changes = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "repeat", "length"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 255),
        st.integers(1, 64),
    ),
    min_size=1,
    max_size=4,
)


def changed(raw, what):
    raw = bytearray(raw)
    for how, where, value, size in what:
        at = int(where * len(raw)) if raw else 0
        if how == "flip" and raw:
            raw[at] ^= value or 1
        elif how == "cut":
            del raw[at : at + size]
        elif how == "insert":
            raw[at:at] = bytes([value]) * size
        elif how == "repeat":
            raw[at:at] = raw[at : at + size]
        elif raw:
            raw[at : at + 5] = b"\xff\xff\xff\xff\x07"[: len(raw) - at]
    return bytes(raw)


@pytest.mark.slow
@pytest.mark.parametrize("salvage", [False, True])
@given(which=st.sampled_from(sorted(TRACES)), what=changes)
@example(which="generic", what=[("insert", 0.999, 0x12, 1)])  # a packet of events, none of which has a time
@example(which="deflate", what=[("length", 0.0, 0, 1)])
@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_is_an_error_or_counted(salvage, which, what):
    raw = changed(TRACES[which], what)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "changed.pftrace")
        path.write_bytes(raw)
        refused = None
        try:
            _, batch, last, _, source = replayed(path, salvage=salvage)
        except CaptureError as error:
            refused = error
    if refused is not None:
        assert 0 <= refused.offset <= len(raw)
        assert f"at byte {refused.offset}" in str(refused)
        return
    assert (np.diff(batch.ts_ns) >= 0).all()
    assert last.totals.ledger.imbalance == 0
    assert last.totals.ledger.records == int((batch.hook != Hook.LOST).sum())
    assert set(batch.hook.tolist()) <= {int(hook) for hook in Hook if hook is not Hook.INVALID}
    assert (batch.dev < len(source.sightings)).all()


@given(raw=st.binary(max_size=2_000))
@settings(max_examples=200)
def test_arbitrary_bytes(raw):
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "any.pftrace")
        path.write_bytes(b"\n" + raw)
        reader = PacketReader(path, salvage=True)
        try:
            sizes = [len(packet.data) for packet in reader]
        finally:
            reader.close()
        assert reader.bytes_read == len(raw) + 1
        assert sum(sizes) <= MAX_PACKET_BYTES + 200 * len(raw)
