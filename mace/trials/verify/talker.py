"""Sends numbered packets. It runs as a file inside a member's namespace and imports the standard library only.

    talker.py echo FAMILY                                    print the port; send every datagram back
    talker.py sink FAMILY                                    print the port; read one connection to its end
    talker.py udp FAMILY HOST PORT FLOW COUNT BYTES PPS      send COUNT datagrams; ignore replies
    talker.py tcp FAMILY HOST PORT FLOW COUNT BYTES PPS      make COUNT writes over one connection
    talker.py twin FAMILY HOST PORT FLOW COUNT BYTES PPS     as udp, with fixed source port and IP identifications

A payload is a row of cells of 16 bytes: magic (4 bytes), flow (2), number of the cell in the datagram (2; 0 for TCP),
and number of the datagram, or for TCP of the cell in the stream (8). A fragment or a segment therefore has a number of
its own. A client prints `done` at its end. All end when their standard input ends, and after a minute in any case.
"""

import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator

CELL = struct.Struct("!4sHHQ")
MAGIC = b"\xa5MaC"
TWIN_PORT = 40_000
LIMIT_S = 60
LINGER_S = 0.5
"""Time that a client waits for the replies to its last datagrams."""


def payload(flow: int, number: int, size: int) -> bytes:
    """Return `size` bytes of cells for datagram `number` of a flow."""
    cells = (size + CELL.size - 1) // CELL.size
    return b"".join(CELL.pack(MAGIC, flow, cell, number) for cell in range(cells))[:size]


def bound(family: str, kind: socket.SocketKind) -> socket.socket:
    """Return a socket bound to a free port, after printing the port."""
    sock = socket.socket(socket.AF_INET6 if family == "6" else socket.AF_INET, kind)
    sock.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE
    sock.bind(("", 0))
    if kind is socket.SOCK_STREAM:
        sock.listen(1)
    print(sock.getsockname()[1], flush=True)
    return sock


def echo(family: str) -> None:
    """Send every datagram back."""
    sock = bound(family, socket.SOCK_DGRAM)
    while True:
        data, peer = sock.recvfrom(65536)
        sock.sendto(data, peer)


def sink(family: str) -> None:
    """Read one connection to its end."""
    sock, _ = bound(family, socket.SOCK_STREAM).accept()
    while sock.recv(1 << 20):
        pass


def paced(count: int, pps: int) -> Iterator[int]:
    """Yield 0 to `count` - 1, each when it is due; after a delay no faster than `pps` either."""
    due = time.monotonic()
    for number in range(count):
        while (ahead := due - time.monotonic()) > 0:
            if ahead > 0.0003:
                time.sleep(ahead - 0.0002)
        yield number
        due = max(due + 1 / pps, time.monotonic() - 0.001)


def udp(family: str, host: str, port: str, flow: str, count: str, size: str, pps: str) -> None:
    """Send numbered datagrams; replies stay in the socket's buffer."""
    sock = socket.socket(socket.AF_INET6 if family == "6" else socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)
    sock.connect((host, int(port)))
    for number in paced(int(count), int(pps)):
        sock.send(payload(int(flow), number, int(size)))
    time.sleep(LINGER_S)


def tcp(family: str, host: str, port: str, flow: str, count: str, size: str, pps: str) -> None:
    """Send one numbered stream in pieces; returns when the peer has read everything."""
    sock = socket.socket(socket.AF_INET6 if family == "6" else socket.AF_INET, socket.SOCK_STREAM)
    sock.connect((host, int(port)))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    cells = int(size) // CELL.size
    for number in paced(int(count), int(pps)):
        first = number * cells
        piece = b"".join(CELL.pack(MAGIC, int(flow), 0, first + cell) for cell in range(cells))
        sock.sendall(piece)
    sock.shutdown(socket.SHUT_WR)
    sock.recv(1)


def twin(family: str, host: str, port: str, flow: str, count: str, size: str, pps: str) -> None:
    """Send UDP over IPv4 with hand-made headers, so that two containers' packets differ in address and payload only."""
    del family
    answers = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    answers.bind(("", TWIN_PORT))
    answers.connect((host, int(port)))
    source, target = (socket.inet_aton(name[0]) for name in (answers.getsockname(), answers.getpeername()))
    raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    for number in paced(int(count), int(pps)):
        data = payload(int(flow), number, int(size))
        # The kernel fills in length and checksum of the IP header; a UDP checksum of 0 means none (RFC 768).
        ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 0, number % 65_535 + 1, 0, 64, socket.IPPROTO_UDP, 0, source, target)
        head = struct.pack("!HHHH", TWIN_PORT, int(port), 8 + len(data), 0)
        raw.sendto(ip + head + data, (host, 0))
    time.sleep(LINGER_S)


def leave_with_parent() -> None:
    """End the process when standard input ends, because the parent has then ended."""
    sys.stdin.read()
    os._exit(0)


ROLES: dict[str, Callable[..., None]] = {"echo": echo, "sink": sink, "udp": udp, "tcp": tcp, "twin": twin}

if __name__ == "__main__":
    signal.alarm(LIMIT_S)
    threading.Thread(target=leave_with_parent, daemon=True).start()
    ROLES[sys.argv[1]](*sys.argv[2:])
    print("done", flush=True)
    os._exit(0)
