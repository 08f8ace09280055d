"""Sends packets that are numbered throughout. Run as a file, inside a member's namespace; the standard library only.

    talker.py echo FAMILY                                    say the port; send every datagram back
    talker.py sink FAMILY                                    say the port; read one connection to its end
    talker.py udp FAMILY HOST PORT FLOW COUNT BYTES PPS      COUNT datagrams, each answered or not
    talker.py tcp FAMILY HOST PORT FLOW COUNT BYTES PPS      COUNT writes over one connection
    talker.py twin FAMILY HOST PORT FLOW COUNT BYTES PPS     as udp, but source port and IP identifications are fixed

A payload is a row of cells of 16 bytes: magic, flow (2 bytes), which cell of the payload or stream it is (2), and which
datagram, or for TCP which cell of the whole stream (8). So a fragment, or a segment, has a number of its own as well.
A client says `done` when it has. All end with their standard input, and after a minute in any case.
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
"""A client waits this long for the answers to its last datagrams."""


def payload(flow: int, number: int, size: int) -> bytes:
    """`size` bytes of cells of datagram `number`."""
    cells = (size + CELL.size - 1) // CELL.size
    return b"".join(CELL.pack(MAGIC, flow, cell, number) for cell in range(cells))[:size]


def bound(family: str, kind: socket.SocketKind) -> socket.socket:
    """A socket on a port that was free; says which."""
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
    """0 to `count` - 1, each when it is due; never faster than asked, also after a delay."""
    due = time.monotonic()
    for number in range(count):
        while (ahead := due - time.monotonic()) > 0:
            if ahead > 0.0003:
                time.sleep(ahead - 0.0002)
        yield number
        due = max(due + 1 / pps, time.monotonic() - 0.001)


def udp(family: str, host: str, port: str, flow: str, count: str, size: str, pps: str) -> None:
    """Datagrams; what comes back is left to the socket."""
    sock = socket.socket(socket.AF_INET6 if family == "6" else socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)
    sock.connect((host, int(port)))
    for number in paced(int(count), int(pps)):
        sock.send(payload(int(flow), number, int(size)))
    time.sleep(LINGER_S)


def tcp(family: str, host: str, port: str, flow: str, count: str, size: str, pps: str) -> None:
    """One stream, written in pieces; ends when the peer has read all."""
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
    """UDP over IPv4 with headers of our own, so that two containers' packets differ in address and payload only."""
    del family
    answers = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    answers.bind(("", TWIN_PORT))
    answers.connect((host, int(port)))
    source, target = (socket.inet_aton(name[0]) for name in (answers.getsockname(), answers.getpeername()))
    raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    for number in paced(int(count), int(pps)):
        data = payload(int(flow), number, int(size))
        # The kernel fills in the length and the checksum of the IP header; a UDP checksum of 0 is none (RFC 768).
        ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 0, number % 65_535 + 1, 0, 64, socket.IPPROTO_UDP, 0, source, target)
        head = struct.pack("!HHHH", TWIN_PORT, int(port), 8 + len(data), 0)
        raw.sendto(ip + head + data, (host, 0))
    time.sleep(LINGER_S)


def leave_with_parent() -> None:
    """Wait for the end of standard input."""
    sys.stdin.read()
    os._exit(0)


ROLES: dict[str, Callable[..., None]] = {"echo": echo, "sink": sink, "udp": udp, "tcp": tcp, "twin": twin}

if __name__ == "__main__":
    signal.alarm(LIMIT_S)
    threading.Thread(target=leave_with_parent, daemon=True).start()
    ROLES[sys.argv[1]](*sys.argv[2:])
    print("done", flush=True)
    os._exit(0)
