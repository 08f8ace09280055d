"""Names on the broker: valid host names, shards, and the content of acknowledgements."""

import pytest

from contracts.errors import UsageError, WireError
from contracts.topics import (
    BUCKETS,
    Ack,
    Refusal,
    Shard,
    broker_of,
    bucket,
    check_host,
    host_of_results,
    host_of_stream,
    results_topic,
    stream_topic,
)


@pytest.mark.parametrize("host", ["web-1", "web.example", "naïve", "a b", "x" * 255])
def test_the_host_of_a_topic_is_the_host(host):
    assert host_of_stream(stream_topic(host)) == host


@pytest.mark.parametrize("host", ["", "a/b", "a+", "#", "a\0b", "x" * 256])
def test_a_name_that_cannot_be_part_of_a_topic_is_refused(host):
    with pytest.raises(WireError, match="cannot be part of a topic"):
        check_host(host)


def test_buckets_are_the_same_for_ever():
    """Published topics contain the buckets, so they equal those of the first version."""
    assert [bucket(host) for host in ("web-1", "web-2", "naïve")] == [104, 210, 102]


@pytest.mark.parametrize("topic", ["mace/v1/web-1/stream/7", "mace/v1/web-1/stream", "mace/v2/web-1/stream/104", "x"])
def test_a_topic_that_is_not_a_hosts_is_refused(topic):
    with pytest.raises(WireError, match="topic"):
        host_of_stream(topic)


@pytest.mark.parametrize("count", [1, 2, 3, BUCKETS])
def test_each_host_belongs_to_one_shard(count):
    shards = [Shard(index, count) for index in range(count)]
    for host in (f"host-{n}" for n in range(50)):
        owners = [shard for shard in shards if shard.owns(host)]
        heard_by = [s for s in shards if any(_fits(f, stream_topic(host)) for f in s.filters())]
        assert len(owners) == 1
        assert heard_by == owners


def _fits(pattern, topic):
    return all(p in ("+", t) for p, t in zip(pattern.split("/"), topic.split("/"), strict=True))


def test_shards_are_shown_counted_from_one():
    assert str(Shard.parse("2/3")) == "2/3"
    assert Shard.parse("2/3") == Shard(1, 3)


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "1/257", "a/b", "-1/2", "1/2/3", "²/3"])
def test_an_impossible_shard_is_a_usage_error(text):
    with pytest.raises(UsageError, match="shard"):
        Shard.parse(text)


def test_an_acknowledgement_is_decoded_unchanged():
    refusals = Refusal(3, 9, "a reason"), Refusal(0, (1 << 64) - 1, "", clock_utc_ns=-5)
    for ack in (Ack(0, 0, again=True), Ack(0xFFFFFFFF, (1 << 64) - 1), *(Ack(1, 3, refused=each) for each in refusals)):
        assert Ack.parse(ack.to_bytes()) == ack


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b'{"stream": 1}',
        b'{"stream": -1, "next": 0}',
        b'{"stream": 1, "next": 1.5}',
        b'{"stream": 1, "next": 2, "again": 1}',
        b'{"stream": true, "next": 2}',
        b'{"stream": 1, "next": 2, "refused": 7}',
        b'{"stream": 1, "next": 2, "refused": {}}',
        b'{"stream": 1, "next": 2, "refused": {"first": 3, "last": 2, "why": ""}}',
        b'{"stream": 1, "next": 2, "refused": {"first": -1, "last": 2, "why": ""}}',
        b'{"stream": 1, "next": 2, "refused": {"first": 1, "last": 2, "why": 5}}',
        b'{"stream": 1, "next": 2, "refused": {"first": 1, "last": 2, "why": "", "clock_utc_ns": "now"}}',
        b"\xff",
        b"[" * 100000,
    ],
)
def test_invalid_acknowledgements_are_refused(payload):
    with pytest.raises(WireError, match="not an acknowledgement"):
        Ack.parse(payload)


def test_a_reason_is_text_of_a_bounded_length():
    told = Ack(1, 2, refused=Refusal(2, 2, "\x1b[31m" + "x" * 100_000))
    refused = Ack.parse(told.to_bytes()).refused
    assert len(refused.why) < 400
    assert refused.why.startswith("\\x1b[31mxx")


def test_consecutive_refused_frames_are_reported_together():
    assert Refusal(3, 4, "a").with_next(Refusal(5, 5, "b")) == Refusal(3, 5, "b")
    assert Refusal(3, 4, "a").with_next(Refusal(7, 7, "b")) == Refusal(7, 7, "b")


def test_a_host_has_the_same_broker_for_ever_and_in_every_order():
    addresses = [f"mqtt://broker-{letter}.example:1883" for letter in "abc"]
    found = [broker_of(host, addresses) for host in ("web-1", "web-2", "naïve")]
    assert found == [broker_of(host, addresses[::-1]) for host in ("web-1", "web-2", "naïve")]
    assert [each.partition(".")[0][-1] for each in found] == ["b", "b", "c"]


def test_a_broker_more_or_less_moves_its_own_hosts_only():
    hosts = [f"host-{number}" for number in range(3_000)]
    addresses = [f"mqtt://broker-{number}.example:1883" for number in range(5)]
    before = {host: broker_of(host, addresses) for host in hosts}
    shares = [list(before.values()).count(each) for each in addresses]
    # A share is binomial: 600 hosts, and five standard deviations of 22.
    assert all(490 < share < 710 for share in shares)
    more = {host: broker_of(host, [*addresses, "mqtt://new.example:1883"]) for host in hosts}
    assert {more[host] for host in hosts if more[host] != before[host]} == {"mqtt://new.example:1883"}
    less = {host: broker_of(host, addresses[1:]) for host in hosts}
    assert {before[host] for host in hosts if less[host] != before[host]} == {addresses[0]}


def test_brokers_and_shards_divide_hosts_independently():
    """Each shard has hosts of each broker, so the shards stay equal whatever the number of brokers."""
    addresses = [f"mqtt://broker-{number}.example:1883" for number in range(4)]
    found = {(broker_of(f"host-{n}", addresses), bucket(f"host-{n}") % 4) for n in range(400)}
    assert len(found) == 16


def test_the_host_of_a_topic_of_results_is_the_host():
    assert host_of_results(results_topic("web-1.example", "delays")) == "web-1.example"
