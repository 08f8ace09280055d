"""Whatever one host sends, in any order, and whenever the ingest is killed, the other host's rows are stored once."""

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from contracts.clock import ClockPair
from contracts.hooks import Hook
from contracts.topics import ROOT
from contracts.wire import FrameKind
from correlator.engine import Engine, EngineConfig
from correlator.feeder import Feeder
from storage.query import Filter, StoreReader
from tests.hostile import (
    EVIL,
    EXTREMES,
    FRAMES,
    HONEST,
    ITEMS,
    RECORDS,
    Driven,
    batch,
    evil_header,
    frame,
    of_stream,
    tampered,
    topology,
)
from tests.made_capture import HEADER, stream_tag

TAG = stream_tag(FRAMES[0])


def expected_rows():
    engine = Engine(HEADER.clock.offset_ns, EngineConfig())
    return sum(len(results.rows.delays) for results in Feeder(engine).run(ITEMS))


EXPECTED = expected_rows()
CLOCKS = st.builds(ClockPair, st.sampled_from(EXTREMES), st.sampled_from([*EXTREMES, HEADER.clock.utc_ns]), st.just(1))
HEADERS = st.one_of(
    st.builds(evil_header, st.sampled_from(["1", "2", "3"])),
    st.builds(lambda clock: evil_header("1", clock=clock), CLOCKS),
    st.builds(lambda cpus: evil_header("1", cpus=cpus), st.sampled_from([1, 1 << 16])),
)
TIMES = st.one_of(
    st.sampled_from(EXTREMES), st.integers(0, 1 << 40).map(lambda after: HEADER.clock.monotonic_ns + after)
)
OLDEST = st.sampled_from([None, "0", "1", "2", "5", "18446744073709551615", "-1", "x", "9" * 5_000])
HOOKS = st.sampled_from([*Hook])


@st.composite
def frames(draw):
    """Draw a frame of one HEADER's stream, mostly with a plausible number."""
    header = draw(st.shared(HEADERS, key="header"))
    number = draw(st.one_of(st.integers(0, 6), st.sampled_from([1 << 32, (1 << 64) - 1])))
    match draw(st.sampled_from(["header", "topology", "batch", "made", "end", "progress", "bytes", "known"])):
        case "header":
            return draw(HEADERS)
        case "topology":
            names = draw(st.lists(st.sampled_from(["eth0", "br0", "x" * 2_000]), max_size=4))
            devices = [{"netns": 1, "ifindex": n, "name": name, "kind": "veth"} for n, name in enumerate(names)]
            sightings = (("", 0, 0), *((name, 0, 0) for name in names))
            return topology(number, draw(TIMES), devices, sightings, draw(st.sampled_from([0, 1, 9])), header)
        case "batch":
            ts = draw(st.lists(TIMES, max_size=8).map(sorted))
            columns = {
                "hook": draw(st.lists(HOOKS, min_size=len(ts), max_size=len(ts))),
                "dev": draw(st.lists(st.integers(0, 4), min_size=len(ts), max_size=len(ts))),
                "l3_len": draw(st.lists(st.sampled_from([0, 84, (1 << 32) - 1]), min_size=len(ts), max_size=len(ts))),
            }
            before = draw(st.sampled_from([0, 1, 250, 1 << 62, (1 << 64) - 1]))
            return batch(number, ts, before=before, header=header, **columns)
        case "made":
            return of_stream(draw(st.sampled_from(FRAMES[1:])), header)
        case "end":
            told = b'{"records":%d,"lost":%d}' % (draw(st.sampled_from([0, 250, (1 << 63) - 1])), 0)
            return frame(FrameKind.END, told, number, header)
        case "progress":
            return frame(FrameKind.PROGRESS, b'{"upto_ns":%d}' % draw(TIMES), number, header)
        case "known":
            return draw(st.sampled_from(FRAMES))
        case _:
            return draw(st.binary(max_size=60))


class OneHostileAmongHosts(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="mace-test-"))
        self.driven = Driven(self.folder / "store")
        self.sent = 0

    @rule(payload=frames(), oldest=OLDEST, retain=st.booleans())
    def evil_sends(self, payload, oldest, retain):
        self.driven.send(EVIL, payload, oldest, retain=retain)

    @rule(number=st.integers(1, len(FRAMES) - 1), at=st.integers(0, 1 << 16), bit=st.integers(0, 7), oldest=OLDEST)
    def evil_tampers(self, number, at, bit, oldest):
        self.driven.send(EVIL, tampered(of_stream(FRAMES[number]), at, bit), oldest)

    @rule(upto=st.integers(2, len(FRAMES)))
    def evil_is_as_the_others(self, upto):
        for each in (evil_header(), *map(of_stream, FRAMES[1:upto])):
            self.driven.send(EVIL, each)

    @rule(
        topic=st.sampled_from(
            [f"{ROOT}/{EVIL}/stream/0", f"{ROOT}//stream/0", f"{ROOT}/{'x' * 300}/status", f"{ROOT}/{EVIL}/status", "x"]
        ),
        payload=st.sampled_from([b"", b'{"state":"online"}', FRAMES[0]]),
    )
    def evil_uses_another_topic(self, topic, payload):
        self.driven.hear(topic, payload)
        self.driven.work()

    @precondition(lambda self: self.sent < len(FRAMES))
    @rule(count=st.integers(1, 4))
    def honest_sends(self, count):
        for each in FRAMES[self.sent : self.sent + count]:
            self.driven.send(HONEST, each)
        self.sent = min(self.sent + count, len(FRAMES))

    @rule()
    def all_is_flushed(self):
        self.driven.flush()

    @rule(synced=st.booleans())
    def it_is_killed_and_started_again(self, synced):
        if synced:
            self.driven.sync()
        self.driven.kill()
        self.driven.start()
        # The host continues after the acknowledged frame.
        self.sent = self.driven.next_of(HONEST, TAG)

    @invariant()
    def the_honest_host_is_heard_and_nothing_is_given_up(self):
        assert self.driven.next_of(HONEST, TAG) == self.sent
        assert self.driven.ingest.counts.given_up == 0
        assert self.driven.ingest.counts.set_aside == 0
        assert len(self.driven.ingest._turns) == 0

    def teardown(self):
        try:
            for each in FRAMES[self.sent :]:
                self.driven.send(HONEST, each)
            self.driven.end()
            stored = self.driven.stored(HONEST)
            assert (stored.ledger.records, stored.ledger.discarded, stored.ledger.imbalance) == (RECORDS, 0, 0)
            assert stored.rows_stored == EXPECTED
            assert len(StoreReader(self.folder / "store").delays(Filter(run="its run"), ["packet"])) == EXPECTED
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)


TestOneHostileAmongHosts = pytest.mark.slow(OneHostileAmongHosts.TestCase)
TestOneHostileAmongHosts.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)
