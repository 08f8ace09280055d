"""Cheap connections of many simulated hosts to a broker: as much of MQTT 5 as a publisher with QoS 1 needs.

A client library spends more time on a packet than the ingest may spend on the thousand records in it, and a thousand
hosts share two cores with the measured processes. Packets are therefore prepared as bytes. Of an answer only the type
is parsed, except for acknowledgements of the ingest.
"""

import asyncio
import struct
from collections.abc import Callable

CONNECT, CONNACK, PUBLISH, PUBACK, SUBSCRIBE, SUBACK, PINGREQ = 1, 2, 3, 4, 8, 9, 12
KEEPALIVE_S = 60


def packet(kind: int, flags: int, *parts: bytes) -> bytes:
    """Return an MQTT packet with its length, encoded in seven bits per byte."""
    body = b"".join(parts)
    left, length = len(body), b""
    while left > 127:
        length += bytes([left & 127 | 128])
        left >>= 7
    return bytes([kind << 4 | flags]) + length + bytes([left]) + body


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack(">H", len(data)) + data


def connect(identifier: str) -> bytes:
    """Return a CONNECT packet of a clean session without name."""
    return packet(CONNECT, 0, text("MQTT"), b"\x05\x02", struct.pack(">H", KEEPALIVE_S), b"\0", text(identifier))


def subscribe(topic: str) -> bytes:
    """Return a SUBSCRIBE packet with QoS 0."""
    return packet(SUBSCRIBE, 2, b"\0\1", b"\0", text(topic), b"\0")


def publish(topic: str, number: int, name: str, value: str, payload: bytes) -> bytes:
    """Return a PUBLISH packet with QoS 1 and one user property."""
    properties = b"\x26" + text(name) + text(value)
    return packet(PUBLISH, 2, text(topic), struct.pack(">H", number), bytes([len(properties)]), properties, payload)


class HostConnection(asyncio.Protocol):
    """One host's connection. `told` gets payloads published to the host; `ready` is done once it is subscribed."""

    def __init__(self, identifier: str, topic: str, told: Callable[[bytes], None]) -> None:
        self.ready = asyncio.get_running_loop().create_future()
        self._identifier, self._topic, self._told = identifier, topic, told
        self._got = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(connect(self._identifier))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ready.done():
            self.ready.set_exception(ConnectionError(str(exc)))

    def send(self, data: bytes) -> None:
        assert self._transport is not None
        self._transport.write(data)

    def close(self) -> None:
        assert self._transport is not None
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        self._got += data
        while (whole := self._next()) is not None:
            kind, body = whole
            if kind == CONNACK:
                assert body[1] == 0, f"the broker refuses us: {body[1]:#04x}"
                self.send(subscribe(self._topic))
            elif kind == SUBACK and not self.ready.done():
                self.ready.set_result(None)
            elif kind == PUBLISH:
                # QoS 0, so no packet number: the topic, the length of no or few properties, the payload.
                at = 2 + int.from_bytes(body[:2], "big")
                self._told(body[at + 1 + body[at] :])
            elif kind == PUBACK:
                # 0x10: the topic has no subscriber until the ingest subscribes.
                assert len(body) < 3 or body[2] in (0, 0x10), f"a publish was refused: {body[2]:#04x}"

    def _next(self) -> tuple[int, bytes] | None:
        length = shift = 0
        for at in range(1, min(len(self._got), 5)):
            length |= (self._got[at] & 127) << shift
            shift += 7
            if not self._got[at] & 128:
                end = at + 1 + length
                if len(self._got) < end:
                    return None
                found = self._got[0] >> 4, self._got[at + 1 : end]
                self._got = self._got[end:]
                return found
        return None
