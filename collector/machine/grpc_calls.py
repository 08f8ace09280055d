"""Calls methods of a gRPC server on a connected socket, each with one message and one answer, or a stream of answers.

gRPC is HTTP/2 with five bytes before each message (PROTOCOL-HTTP2.md in grpc's doc folder). h2, of the extra `cri`,
speaks HTTP/2; this module is imported only when a server is asked.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import ConnectionTerminated, DataReceived, ResponseReceived, StreamEnded, StreamReset, TrailersReceived
from h2.exceptions import ProtocolError

_PREFIX: Final = struct.Struct(">BI")
"""Whether the message is compressed (MACE offers no compression), and its length."""
_ANSWERS_BYTES: Final = 64 << 20
"""Largest answers that are read, all together. A list entry takes one or two kilobytes, mostly annotations."""
_UNIMPLEMENTED: Final = "12"


class Unimplemented(ValueError):
    """The server does not have the method."""


def call(sock: socket.socket, calls: Sequence[tuple[str, bytes]], timeout_s: float) -> list[bytes]:
    """Call methods (path, message) all at once, and return their answers in the same order.

    Raises `OSError`, and `ValueError` if an answer is an error, too large, too late or no gRPC.
    """
    try:
        return _called(sock, calls, time.monotonic() + timeout_s)
    except TimeoutError as failure:
        raise ValueError(f"no complete answer within {timeout_s:g} s") from failure
    except (ProtocolError, KeyError) as failure:
        raise ValueError(f"no gRPC server: {type(failure).__name__} {failure}") from failure


def stream(sock: socket.socket, path: str, message: bytes) -> Iterator[bytes]:
    """Call a method, and yield its answers as they arrive, until the server ends the call.

    Waits for ever: shutting the socket down ends it. Raises `OSError`, and `ValueError` as `call` does, `Unimplemented`
    for a method that the server does not have.
    """
    sock.settimeout(None)
    connection = H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
    connection.initiate_connection()
    _send(connection, path, message)
    body = bytearray()
    ended = False
    try:
        while not ended:
            sock.sendall(connection.data_to_send())
            if not (data := sock.recv(1 << 16)):
                return
            for event in connection.receive_data(data):
                match event:
                    case DataReceived():
                        body += event.data
                        connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                    case ResponseReceived() | TrailersReceived():
                        _check(path, event.headers)
                    case StreamEnded() | StreamReset() | ConnectionTerminated():
                        ended = True
            while len(body) >= _PREFIX.size:
                compressed, size = _PREFIX.unpack_from(body)
                if compressed or size > _ANSWERS_BYTES:
                    raise ValueError(f"{path}: expected messages of up to {_ANSWERS_BYTES >> 20} MiB, not compressed")
                if len(body) < _PREFIX.size + size:
                    break
                yield bytes(body[_PREFIX.size : _PREFIX.size + size])
                del body[: _PREFIX.size + size]
    except (ProtocolError, KeyError) as failure:
        raise ValueError(f"no gRPC server: {type(failure).__name__} {failure}") from failure


def _send(connection: H2Connection, path: str, message: bytes) -> int:
    """Begin a call, and return the number of its HTTP/2 stream."""
    number: int = connection.get_next_available_stream_id()
    headers = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "localhost"}
    connection.send_headers(number, [*headers.items(), ("content-type", "application/grpc"), ("te", "trailers")])
    connection.send_data(number, _PREFIX.pack(0, len(message)) + message, end_stream=True)
    return number


def _called(sock: socket.socket, calls: Sequence[tuple[str, bytes]], deadline_s: float) -> list[bytes]:
    connection = H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
    connection.initiate_connection()
    unanswered: dict[int, str] = {}
    for path, message in calls:
        unanswered[_send(connection, path, message)] = path
    bodies = {number: bytearray() for number in unanswered}
    while unanswered:
        sock.sendall(connection.data_to_send())
        if (left_s := deadline_s - time.monotonic()) <= 0:
            raise TimeoutError
        sock.settimeout(left_s)
        if not (data := sock.recv(1 << 16)):
            raise ValueError("the connection was closed before the answer")
        for event in connection.receive_data(data):
            match event:
                case DataReceived(stream_id=number):
                    bodies[number] += event.data
                    connection.acknowledge_received_data(event.flow_controlled_length, number)
                case ResponseReceived() | TrailersReceived():
                    _check(unanswered[event.stream_id], event.headers)
                case StreamEnded(stream_id=number):
                    del unanswered[number]
                case StreamReset() | ConnectionTerminated():
                    raise ValueError(f"the server ended the call (HTTP/2 error {event.error_code})")
        if sum(map(len, bodies.values())) > _ANSWERS_BYTES:
            raise ValueError(f"no end of the answer after {_ANSWERS_BYTES >> 20} MiB")
    return [_message(bytes(body)) for body in bodies.values()]


def _check(path: str, headers: Iterable[Any]) -> None:
    """Raise `ValueError` if the headers or trailers of an answer tell an error."""
    told = dict(headers)
    if told.get(":status", "200") != "200":
        raise ValueError(f"{path}: HTTP {told[':status']}")
    if told.get("grpc-status", "0") != "0":
        kind = Unimplemented if told["grpc-status"] == _UNIMPLEMENTED else ValueError
        raise kind(f"{path}: gRPC status {told['grpc-status']} {told.get('grpc-message', '')}".rstrip())


def _message(body: bytes) -> bytes:
    """Return the one message in the body of an answer."""
    if len(body) < _PREFIX.size or _PREFIX.unpack_from(body) != (0, len(body) - _PREFIX.size):
        raise ValueError("expected one gRPC message, not compressed")
    return body[_PREFIX.size :]
