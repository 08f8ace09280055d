"""A hostile client of one host does not change the rows of the other hosts."""

import logging
from dataclasses import replace

import pytest

from contracts.clock import ClockPair
from contracts.hooks import Hook
from contracts.topics import ROOT, stream_topic
from contracts.wire import FrameKind
from correlator.feeder import Feeder
from mace.live import hosts
from storage.journal import EntryKind, Journal
from storage.query import StoreReader
from tests.hostile import (
    CLOCK_AT_THE_END,
    CLOCK_OF_2191,
    EVIL,
    FRAMES,
    HONEST,
    RECORDS,
    Driven,
    batch,
    constant,
    evil_header,
    frame,
    of_stream,
    topology,
)
from tests.made_capture import HEADER, TOPOLOGY, encode, stream_tag, traffic

pytestmark = pytest.mark.slow

NOW = HEADER.clock.monotonic_ns
HOURS = 3_600_000_000_000
SIGHTINGS = (("", 0, 0), *((f"veth{n}", 0, 0) for n in range(5)))
TAG = stream_tag(evil_header())


@pytest.fixture
def driven(tmp_path):
    driven = Driven(tmp_path / "store")
    yield driven
    driven.end()


def honest_rows_are_there(driven):
    """Publish the honest host's stream and check that all of it is stored."""
    for each in FRAMES:
        driven.send(HONEST, each)
    driven.flush()
    stored = driven.stored(HONEST)
    assert (stored.ledger.records, stored.ledger.discarded, stored.ledger.imbalance) == (RECORDS, 0, 0)
    return driven.ingest.rows_stored


REFUSED = {
    "the number of a frame has 5000 digits": lambda: [(evil_header(), "9" * 5000)],
    "the number of a frame is no number": lambda: [(evil_header(), "-1")],
    "the clock says 2191": lambda: [evil_header(clock=CLOCK_OF_2191)],
    "the clock says 1996": lambda: [evil_header(clock=ClockPair(1, 820_454_400_000_000_000, 1))],
    "the name of the run has 6 MB": lambda: [evil_header(run="r" * 6_000_000)],
    "the name of the run has 2 kB": lambda: [evil_header(run="r" * 2_000)],
    "another host's stream": lambda: [FRAMES[0]],
    "nothing": lambda: [b""],
    "no frame": lambda: [b"\xffMCF" + bytes(100)],
    "a topology of the future": lambda: [evil_header(), topology(1, -(9 * 10**18), sightings=SIGHTINGS)],
    "devices that no topology has told of": lambda: [
        evil_header(),
        topology(1, -(9 * 10**18), sightings=SIGHTINGS),
        (batch(2, [NOW], dev=[4], hook=[Hook.NET_DEV_QUEUE]), "2"),
        (batch(2, [NOW], dev=[4], hook=[Hook.NET_DEV_QUEUE]), "2"),
    ],
    "a time of 2^63 - 1": lambda: [evil_header(clock=CLOCK_AT_THE_END), batch(1, [(1 << 63) - 1], hook=[1])],
    "a time of tomorrow's tomorrow": lambda: [evil_header(), batch(1, [NOW + 9 * 366 * 24 * HOURS], hook=[1])],
    "an hour between two records": lambda: [
        evil_header(),
        batch(1, [NOW + n * HOURS for n in range(50)], hook=[1] * 50),
    ],
    "2^20 records": lambda: [evil_header(), constant(1, 1 << 20)],
    "3 MB of devices": lambda: [evil_header(), topology(1, sightings=(("", 0, 0), *(("x" * 1_000, 0, 0),) * 3_000))],
    "a device with a long name": lambda: [evil_header(), topology(1, sightings=(("", 0, 0), ("x" * 5_000, 0, 0)))],
    "records beyond 2^62 before it": lambda: [evil_header(), batch(1, [NOW], before=(1 << 64) - 1, hook=[1])],
    "an end of records beyond 2^62": lambda: [
        evil_header(),
        frame(FrameKind.END, b'{"records":%d,"lost":0}' % ((1 << 63) - 1), 1),
    ],
    "progress to the end of time": lambda: [
        evil_header(),
        frame(FrameKind.PROGRESS, b'{"upto_ns":9223372036854775807}', 1),
    ],
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_hostile_message_is_refused_and_the_other_hosts_continue(driven, what, caplog):
    messages = [each if isinstance(each, tuple) else (each, "0") for each in REFUSED[what]()]
    with caplog.at_level(logging.WARNING):
        for payload, oldest in messages:
            driven.send(EVIL, payload, oldest)
    assert driven.ingest.counts.refused == max(1, len(messages) - 1)
    assert any(stream_topic(EVIL) in line and "refused" in line for line in caplog.messages)
    assert driven.ingest.counts.given_up == 0
    honest_rows_are_there(driven)
    driven.kill()
    driven.start()
    assert driven.ingest.counts.set_aside == 0


TAKEN = {
    "a batch before any topology": lambda: [evil_header(), batch(1, [NOW + n for n in range(50)], hook=[1] * 50)],
    "gaps that never end": lambda: [
        evil_header(),
        batch(
            1, [NOW + n for n in range(9_000)], hook=[Hook.LOST] * 9_000, skb_id=[(1 << 63) + n for n in range(9_000)]
        ),
    ],
    "the last number of all": lambda: [
        evil_header(),
        (frame(FrameKind.PROGRESS, b'{"upto_ns":%d}' % NOW, (1 << 64) - 1), str((1 << 64) - 1)),
    ],
    "no devices": lambda: [evil_header(), topology(1), batch(2, [NOW, NOW + 1], hook=[4, 4])],
    "a thousand devices of one name": lambda: [
        evil_header(),
        topology(
            1,
            devices=[{"netns": 1, "ifindex": n, "name": "eth0", "kind": "veth"} for n in range(1, 1_000)],
            sightings=(("", 0, 0), *(("eth0", 0, 0),) * 100),
        ),
        batch(2, [NOW + n for n in range(400)], hook=[4, 1] * 200, dev=[1 + n % 99 for n in range(400)]),
    ],
}


@pytest.mark.parametrize("what", TAKEN)
def test_an_odd_valid_message_is_processed_and_the_other_hosts_continue(driven, what):
    for each in TAKEN[what]():
        payload, oldest = each if isinstance(each, tuple) else (each, "0")
        driven.send(EVIL, payload, oldest)
    assert (driven.ingest.counts.refused, driven.ingest.counts.given_up) == (0, 0)
    honest_rows_are_there(driven)
    driven.flush()
    assert driven.stored(EVIL) is not None
    driven.kill()
    driven.start()
    assert (driven.ingest.counts.set_aside, driven.ingest.counts.given_up) == (0, 0)


def test_frames_of_a_stream_are_not_retained(driven):
    driven.send(EVIL, evil_header(), retain=True)
    assert (driven.ingest.counts.refused, driven.ingest.hosts) == (1, 0)


@pytest.mark.parametrize("name", ["x" * 300, "", "naïve" * 60])
def test_a_status_of_a_host_with_an_invalid_name_is_refused(driven, name):
    driven.hear(f"{ROOT}/{name}/status", b'{"state":"online"}', retain=True)
    assert (driven.ingest.counts.refused, driven.ingest._due) == (1, {})


def test_a_refused_frame_changes_nothing(driven):
    """A refused frame changes nothing, even if it could be decoded."""
    driven.send(EVIL, evil_header())
    driven.send(EVIL, topology(1, -(9 * 10**18), sightings=SIGHTINGS))
    driven.send(EVIL, topology(1, NOW, sightings=SIGHTINGS[:3]))
    assert driven.ingest.counts.refused == 1
    driven.send(EVIL, batch(2, [NOW], dev=[4], hook=[1]))
    assert driven.ingest.counts.refused == 2
    driven.send(EVIL, batch(2, [NOW], dev=[2], hook=[1]))
    assert (driven.ingest.counts.refused, driven.next_of(EVIL, TAG)) == (2, 3)


def test_a_failing_engine_ends_its_hosts_run_only(driven, monkeypatch, caplog):
    """An unforeseen error in an engine ends that host's run only; the host's next run is accepted."""
    driven.send(EVIL, evil_header())
    driven.send(EVIL, of_stream(FRAMES[1]))

    def fails(*_):
        raise IndexError("list index out of range")

    with monkeypatch.context() as broken, caplog.at_level(logging.ERROR):
        broken.setattr(Feeder, "take", fails)
        driven.send(EVIL, of_stream(FRAMES[2]))
    assert "host evil: its run is given up" in caplog.text
    assert "IndexError" in caplog.text
    driven.send(EVIL, of_stream(FRAMES[3]))
    assert (driven.ingest.counts.given_up, driven.ingest.counts.refused) == (1, 1)
    assert driven.next_of(EVIL, TAG) == 2, "what was not taken is not acknowledged"
    honest_rows_are_there(driven)
    other = evil_header("2")
    driven.send(EVIL, other)
    for each in FRAMES[1:]:
        driven.send(EVIL, of_stream(each, other))
    driven.flush()
    assert driven.stored(EVIL).ledger.records == RECORDS


def told(driven, host=EVIL):
    """Return the refusals for a host: stream, next, first, last, and whether they concern the clock."""
    words = [
        word
        for each, word in driven.ingest._words(driven.ingest._brokers.all[0])
        if each == host and word.refused is not None
    ]
    return [
        (word.stream, word.next, word.refused.first, word.refused.last, word.refused.clock_utc_ns is not None)
        for word in words
    ]


def test_a_host_is_told_which_frame_is_refused(driven):
    driven.send(EVIL, evil_header())
    driven.send(EVIL, topology(1, sightings=SIGHTINGS))
    driven.send(EVIL, constant(2, 1, ts_ns=NOW + (1 << 62)))
    assert told(driven) == [(TAG, 2, 2, 2, False)]
    driven.send(EVIL, constant(3, 1))  # the host announces that the frame before may still arrive
    assert told(driven) == []
    driven.send(EVIL, constant(3, 1), oldest="3")
    assert told(driven) == []
    assert driven.next_of(EVIL, TAG) == 4


def test_a_host_is_told_that_a_whole_run_is_refused(driven):
    wrong = evil_header(clock=CLOCK_OF_2191)
    for each in (wrong, topology(1, header=wrong), batch(2, [NOW], header=wrong)):
        driven.send(EVIL, each)
    assert told(driven) == [(stream_tag(wrong), 0, 0, 2, True)]
    driven.send(EVIL, batch(40, [NOW], header=wrong), oldest="40")
    assert told(driven) == [(stream_tag(wrong), 0, 40, 40, True)]


def test_a_host_is_told_that_its_run_was_given_up(driven):
    driven.send(EVIL, evil_header())
    driven.send(EVIL, topology(1, sightings=SIGHTINGS))
    driven.inside(lambda: driven.ingest._give_up(EVIL, ValueError("a defect")))
    for number in (2, 3, 4):
        driven.send(EVIL, constant(number, 1))
    # Earlier frames are acknowledged, so that the host does not count them again.
    assert told(driven) == [(TAG, 2, 2, 4, False)]


def test_a_host_beyond_the_limit_gets_no_refusal(tmp_path):
    driven = Driven(tmp_path / "store", hosts=1, runs=1)
    try:
        driven.send(HONEST, FRAMES[0])
        driven.send(EVIL, evil_header())
        driven.send(HONEST, FRAMES[1], retain=True)
        driven.flush()
        driven.send(HONEST, encode([], replace(HEADER, host=HONEST, run="more"), end=False)[0])
        assert driven.ingest.counts.refused == 3
        assert (told(driven), told(driven, HONEST)) == ([], [])
    finally:
        driven.end()


def test_counters_beyond_64_bits_end_the_run(driven, monkeypatch):
    monkeypatch.setattr(hosts, "_LARGEST", 1_000)
    driven.send(EVIL, evil_header())
    driven.send(EVIL, batch(1, [NOW], hook=[Hook.LOST], l3_len=[5_000], skb_id=[NOW + 1]))
    driven.send(EVIL, frame(FrameKind.PROGRESS, b'{"upto_ns":%d}' % (NOW + HOURS), 2))
    assert driven.ingest.counts.given_up == 1


def test_rows_that_no_table_can_hold_are_left_out(driven, monkeypatch, caplog):
    """One flush has the rows of all hosts; one host's rows that cannot be stored must not affect the others'."""
    driven.send(EVIL, evil_header())
    for each in FRAMES[1:]:
        driven.send(EVIL, of_stream(each))
    part = driven.ingest._hosts._parts[EVIL, TAG]
    part.rows = 1 << 70
    with caplog.at_level(logging.ERROR):
        honest_rows_are_there(driven)
    assert "host evil: its run is given up and the rest of it refused: its rows cannot be stored: " in caplog.text
    assert driven.stored(EVIL) is None


@pytest.mark.parametrize("limit", ["_WAITING_ROWS", "_WAITING_RUNS"])
def test_a_host_waits_for_the_flush_when_much_of_it_is_to_be_stored(driven, monkeypatch, limit):
    monkeypatch.setattr(hosts, limit, 2)
    for run in ("1", "2", "3"):
        header = evil_header(run)
        for each in (header, *(of_stream(each, header) for each in FRAMES[1:])):
            driven.hear(stream_topic(EVIL), each)
    driven.work()
    waiting = len(driven.ingest._turns)
    assert waiting > len(FRAMES)
    honest_rows_are_there(driven)
    for _ in range(40):
        driven.work()
        driven.flush()
    assert len(driven.ingest._turns) == 0
    assert {run.run for run in runs(driven)} == {"1", "2", "3"}


def test_a_host_waits_for_the_flush_when_its_rows_are_of_many_hours(driven, monkeypatch):
    monkeypatch.setattr(hosts, "_WAITING_HOURS", 3)
    header = evil_header()
    days = [replace(traffic(20), ts_ns=traffic(20).ts_ns + n * HOURS) for n in range(12)]
    for each in encode([TOPOLOGY, *days], replace(HEADER, host=EVIL, run="1")):
        driven.hear(stream_topic(EVIL), each)
    driven.work()
    assert len(driven.ingest._turns) >= 6
    assert len(driven.ingest._hosts._parts[EVIL, stream_tag(header)].hours) in (3, 4)


def runs(driven):
    return [run for run in StoreReader(driven.path).runs() if run.host == EVIL]


def test_hosts_and_their_runs_have_limits(tmp_path):
    driven = Driven(tmp_path / "store", hosts=2, runs=3)
    driven.send(HONEST, FRAMES[0])
    for number in range(5):
        driven.send(EVIL, evil_header(str(number)))
        driven.flush()
    assert driven.ingest.counts.refused == 2
    for number in range(5):
        driven.send(f"more-{number}", encode([], replace(HEADER, host=f"more-{number}"))[0])
    assert (driven.ingest.counts.refused, driven.ingest.hosts) == (2 + 5, 2)
    for each in FRAMES[1:]:
        driven.send(HONEST, each)
    driven.flush()
    assert driven.stored(HONEST).ledger.records == RECORDS
    driven.end()


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (EntryKind.FRAME, batch(1, [NOW], dev=[4], hook=[1])),
        (EntryKind.FRAME, b"no frame"),
        (EntryKind.FRAME, FRAMES[0]),
        (9, b"an entry of a kind that is not known"),
    ],
)
def test_it_starts_on_a_journal_with_entries_that_cannot_be_applied(tmp_path, kind, payload, caplog):
    """The journal has entries of an earlier version: a batch whose topology had been refused."""
    journal = Journal(tmp_path / "store" / "ingest", fsync=False)
    Driven(tmp_path / "store").end()
    journal.open()
    journal.append(EntryKind.FRAME, HONEST, FRAMES[0])
    journal.append(EntryKind.FRAME, EVIL, evil_header())
    journal.append(kind, EVIL, payload)
    for each in FRAMES[1:4]:
        journal.append(EntryKind.FRAME, HONEST, each)
    journal.sync(journal.taken())
    journal.close()
    with caplog.at_level(logging.ERROR):
        driven = Driven(tmp_path / "store")
    assert driven.ingest.counts.set_aside == 1
    (aside,) = (tmp_path / "store" / "ingest").glob("*.aside")
    assert payload in aside.read_bytes()
    assert f"host {EVIL}: a journal entry cannot be applied" in caplog.text
    assert str(aside) in caplog.text
    assert driven.next_of(HONEST, stream_tag(FRAMES[0])) == 4
    honest_rows_are_there(driven)
    driven.end()
