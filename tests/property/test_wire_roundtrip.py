"""Encoding and decoding any valid stream gives the same items; other batch boundaries give the same records."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from contracts.clock import ClockPair
from contracts.hooks import Hook
from contracts.interfaces import StreamHeader
from contracts.records import CONTENT_DTYPES, DTYPES, Batch, Content
from contracts.topology import NO_DEVICE, Device, Role, Sighting, Topology
from contracts.wire import MAX_RECORDS, Decoder, End
from tests.made_capture import encode, same_stream

HOOKS = [hook for hook in Hook if hook is not Hook.INVALID]
I64 = np.iinfo("i8")
text = st.text(max_size=20)
unsigned63 = st.integers(0, 2**63 - 1)
signed64 = st.integers(int(I64.min), int(I64.max))


@st.composite
def columns(draw, count, sightings=1):
    """Draw columns of random, narrow, constant and extreme values, with or without content; times ascend."""

    def column(name, dtype):
        if name == "hook":
            return draw(hnp.arrays(dtype, count, elements=st.sampled_from(HOOKS)))
        high = int(np.iinfo(dtype).max) if name != "dev" else sightings - 1
        top = draw(st.sampled_from([0, 1, 255, 256, 65_535, 65_536, 2**32 - 1, 2**32, high]))
        elements = st.integers(0, min(top, high))
        return draw(hnp.arrays(dtype, count, elements=elements, fill=elements))

    def times():
        shape = draw(st.sampled_from(["anywhere", "burst", "jumps"]))
        if shape == "anywhere":
            return np.sort(draw(hnp.arrays("<i8", count, elements=signed64)))
        steps = st.integers(0, 2_000) if shape == "burst" else st.sampled_from([0, 1, 2**16, 2**24, 2**40, 2**50])
        start = draw(st.integers(-(2**62), 2**61))
        return start + np.cumsum(draw(hnp.arrays("<i8", count, elements=steps)))

    content = None
    if draw(st.booleans()):
        content = Content.of(count, **{name: column(name, dtype) for name, dtype in CONTENT_DTYPES.items()})
    drawn = {name: column(name, dtype) for name, dtype in DTYPES.items() if name != "ts_ns"}
    return Batch.of(count, content, ts_ns=times(), **drawn)


@given(st.data(), st.integers(0, 300))
def test_any_batch(data, count):
    batch = data.draw(columns(count))
    decoder = Decoder()
    _, got, end = (decoder.frame(frame) for frame in encode([batch]))
    assert same_stream([got], [batch])
    assert end == End(count, batch.lost)


devices = st.builds(
    Device,
    netns=unsigned63,
    ifindex=unsigned63,
    name=text,
    kind=text,
    peer_netns=unsigned63,
    peer_ifindex=unsigned63,
    master_ifindex=unsigned63,
    default_route=st.booleans(),
    netns_name=text,
    container=text,
    role=st.sampled_from(Role),
    netns_cookie=unsigned63,
)
sightings = st.builds(Sighting, text, unsigned63, unsigned63, unsigned63)


@given(
    st.builds(
        Topology,
        from_ns=signed64,
        host_netns=unsigned63,
        devices=st.lists(devices, unique_by=lambda d: d.key, max_size=5).map(tuple),
        sightings=st.lists(sightings, max_size=5).map(lambda some: (NO_DEVICE, *some)),
    )
)
def test_any_topology(topology):
    decoder = Decoder()
    assert [decoder.frame(frame) for frame in encode([topology])][1] == topology


@given(
    st.builds(
        StreamHeader,
        source=text,
        host=text,
        run=text,
        kernel=text,
        boot_id=text,
        cpus=st.integers(1, 1 << 16),
        clock=st.builds(ClockPair, signed64, signed64, unsigned63),
        hooks=st.lists(text, max_size=5).map(tuple),
        mace_version=text,
        command=st.lists(text, max_size=5).map(tuple),
    )
)
def test_any_header(header):
    assert Decoder().frame(encode([], header)[0]) == header


@pytest.mark.slow
@given(st.data(), st.integers(1, 200), st.lists(st.integers(0, 200), max_size=8))
def test_batch_boundaries_do_not_matter(data, count, cuts):
    whole = data.draw(columns(count))
    bounds = [0, *sorted(min(cut, count) for cut in cuts), count]
    pieces = [whole[low:high] for low, high in pairwise(bounds)]
    decoder = Decoder()
    got = [item for item in map(decoder.frame, encode(pieces)) if isinstance(item, Batch)]
    assert same_stream([Batch.concatenate(got)], [whole])


def test_the_largest_batch():
    rng = np.random.default_rng(7)
    batch = Batch.of(
        MAX_RECORDS,
        ts_ns=np.cumsum(rng.integers(0, 2**40, MAX_RECORDS)),
        skb_id=rng.integers(0, 2**64, MAX_RECORDS, dtype="u8"),
        l3_len=rng.integers(0, 2**32, MAX_RECORDS),
        hook=rng.choice(HOOKS, MAX_RECORDS),
    )
    decoder = Decoder()
    assert same_stream([decoder.frame(frame) for frame in encode([batch])][1:2], [batch])
