"""Topics and small messages of MACE on an MQTT broker. docs/mqtt.md describes the whole protocol.

    mace/v1/HOST/stream/BUCKET   host → ingest   one wire frame a message (`contracts.wire`), QoS 1
    mace/v1/HOST/ack             ingest → host   which frame is expected next, which are refused (`Ack`), QoS 0
    mace/v1/HOST/status          host → all      who publishes, retained; the last will says `offline`
    mace/v1/HOST/delays|windows|ledger   host → all   rows as Arrow (`storage.mqtt_rows`), QoS 1

A host's name is a level of its topics, so that a broker's access list can restrict each host to its own topics. The
bucket is a stable hash of the name: each shard of the ingest subscribes to its own buckets, and the broker distributes
the messages. With several brokers, another hash of the name chooses the broker (`broker_of`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from typing import Any, Final
from zlib import crc32

from contracts.errors import UsageError, WireError
from contracts.names import printable

ROOT: Final = "mace/v1"
BUCKETS: Final = 256
"""Number of buckets, and so the largest number of shards. Fixed for ever: host and ingest must agree on the topic."""
OLDEST: Final = "oldest"
"""User property of a stream message: the number of the oldest frame that the host still has. Missing frames before it
will never arrive."""
_MAX_HOST_BYTES: Final = 255
"""Longest host name, that of DNS; a topic may have 65,535 bytes."""
_FORBIDDEN: Final = frozenset("/+#\0")
"""The separator of topic levels, the two wildcards, and NUL, which MQTT forbids in topics."""
MAX_SEQUENCE: Final = (1 << 64) - 1
_MAX_WHY: Final = 300
"""Characters of a peer's reason that are kept: enough for a sentence, too few to flood a log."""


def check_host(host: str) -> str:
    """Return the host name if it can be a level of a topic; raises `WireError` otherwise."""
    if not host or len(host.encode("utf-8", "replace")) > _MAX_HOST_BYTES or _FORBIDDEN & set(host):
        raise WireError(f"host {host[:80]!r} cannot be part of a topic: 1 to {_MAX_HOST_BYTES} bytes without / + # NUL")
    return host


def bucket(host: str) -> int:
    """Return the bucket of a host, 0 to `BUCKETS` - 1: the same on every machine and in every version."""
    return crc32(host.encode()) % BUCKETS


def broker_of(host: str, addresses: Iterable[str]) -> str:
    """Return the address of the broker that serves a host: the same on every machine, in every order of the addresses.

    Of a hash of host and address the largest wins (highest random weight: Thaler and Ravishankar, "Using name-based
    mappings to increase hit rates", IEEE/ACM ToN 6(1), 1998). A broker more, or one less, of n moves 1/n of the hosts
    and leaves the others where they are.
    """

    def weight(address: str) -> tuple[bytes, str]:
        return blake2b(f"{address}\0{host}".encode("utf-8", "surrogateescape"), digest_size=8).digest(), address

    return max(addresses, key=weight)


def stream_topic(host: str) -> str:
    """Return the topic on which a host publishes its frames; raises `WireError` like `check_host`."""
    return f"{ROOT}/{check_host(host)}/stream/{bucket(host)}"


def ack_topic(host: str) -> str:
    """Return the topic on which the ingest acknowledges a host's frames; raises `WireError` like `check_host`."""
    return f"{ROOT}/{check_host(host)}/ack"


def results_topic(host: str, table: str) -> str:
    """Return the topic on which a host publishes rows of a table; raises `WireError` like `check_host`."""
    return f"{ROOT}/{check_host(host)}/{table}"


def host_of_results(topic: str) -> str:
    """Return the host in a topic that `results_topic` has made."""
    return topic.removeprefix(f"{ROOT}/").split("/", 1)[0]


def status_topic(host: str) -> str:
    """Return the topic on which a host announces that it is online; raises `WireError` like `check_host`."""
    return f"{ROOT}/{check_host(host)}/status"


def host_of_stream(topic: str) -> str:
    """Return the host of a stream topic; raises `WireError` for another topic or a bucket that is not the host's."""
    parts = topic.split("/")
    if len(parts) != 5 or parts[:2] != ROOT.split("/") or parts[3] != "stream":
        raise WireError(f"topic {topic[:120]!r} is not {ROOT}/HOST/stream/BUCKET")
    host = check_host(parts[2])
    if topic != stream_topic(host):
        raise WireError(f"topic {topic[:120]!r}: the bucket of {host[:80]!r} is {bucket(host)}")
    return host


@dataclass(frozen=True, slots=True)
class Shard:
    """Part `index` (from 0) of `count` of all hosts."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Parse `I/N` with I from 1 to N; raises `UsageError`."""
        first, slash, second = text.partition("/")
        if not (slash and first.isascii() and first.isdigit() and second.isascii() and second.isdigit()):
            raise UsageError(f"shard {text!r}: expected I/N, as in 1/2")
        index, count = int(first), int(second)
        if not 1 <= index <= count <= BUCKETS:
            raise UsageError(f"shard {text!r}: expected 1 <= I <= N <= {BUCKETS}")
        return cls(index - 1, count)

    def owns(self, host: str) -> bool:
        """Return whether the host belongs to this shard."""
        return bucket(host) % self.count == self.index

    def filters(self) -> list[str]:
        """Return the topic filters that the shard subscribes to."""
        if self.count == 1:
            return [f"{ROOT}/+/stream/+"]
        return [f"{ROOT}/+/stream/{number}" for number in range(self.index, BUCKETS, self.count)]

    def __str__(self) -> str:
        return f"{self.index + 1}/{self.count}"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Consecutive frames of a host's stream, `first` to `last`, that the ingest refuses for their content."""

    first: int
    last: int
    why: str
    clock_utc_ns: int | None = None
    """The ingest's clock, if the frames are refused because their times are ahead of it."""

    def with_next(self, other: Refusal) -> Refusal:
        """Return one refusal of both if the frames of `other` follow directly; otherwise return `other`."""
        return replace(other, first=self.first) if other.first == self.last + 1 else other

    @classmethod
    def of(cls, given: dict[str, Any]) -> Refusal:
        """Read a refusal from a JSON object; raises `ValueError`, `KeyError` or `TypeError` for any other object."""
        first, last, why, clock = given["first"], given["last"], given["why"], given.get("clock_utc_ns")
        if not (
            type(first) is int
            and type(last) is int
            and 0 <= first <= last <= MAX_SEQUENCE
            and type(why) is str
            and (clock is None or type(clock) is int)
        ):
            raise ValueError("not a refusal")
        return cls(first, last, printable(why[:_MAX_WHY]), clock)


@dataclass(frozen=True, slots=True)
class Ack:
    """The ingest's acknowledgement of a host's stream."""

    stream: int
    """Tag of the stream (`contracts.wire.Head.stream`)."""
    next: int
    """Number of the frame expected next: all frames before it are stored where a crash cannot lose them. 0: the ingest
    knows nothing of this stream."""
    again: bool = False
    """Whether frames are missing, and the host must send again from `next` on."""
    refused: Refusal | None = None
    """Frames that arrived and were refused."""

    def to_bytes(self) -> bytes:
        told: dict[str, Any] = {"stream": self.stream, "next": self.next, "again": self.again}
        if self.refused is not None:
            told["refused"] = asdict(self.refused)
        return json.dumps(told).encode()

    @classmethod
    def parse(cls, payload: bytes) -> Ack:
        """Parse an acknowledgement; raises `WireError` for any other payload."""
        try:
            given = json.loads(payload)
            stream, following, again = given["stream"], given["next"], given.get("again", False)
            refused = Refusal.of(given["refused"]) if given.get("refused") is not None else None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise WireError(f"not an acknowledgement: {payload[:80]!r}") from None
        if not (
            type(stream) is int
            and type(following) is int
            and type(again) is bool
            and 0 <= stream < 1 << 32
            and 0 <= following <= MAX_SEQUENCE
        ):
            raise WireError(f"not an acknowledgement: {payload[:80]!r}")
        return cls(stream, following, again, refused)
