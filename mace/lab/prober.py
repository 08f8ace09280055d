"""Sends ICMP echo requests and prints their times or round trips. It runs as a file inside a member's namespace.

    prober.py MODE ADDRESS COUNT INTERVAL_NS PAYLOAD_BYTES LIMIT_S

It imports only the standard library, so that it starts fast. It prints one JSON list at its end:

    probes   CLOCK_MONOTONIC in ns before each `send`. Between two sends it waits as ping does, so that the time between
             sends is ping's for that interval and the CPU's caches are as cold. An interval of 0 sends the next request
             immediately.
    trips    the round trip of each request in ns, by the user's clock; -1 if no reply arrived within a second. An
             interval of 0 sends the next request as soon as the reply has arrived.
"""

import json
import os
import signal
import socket
import struct
import sys
import time
from contextlib import suppress

WAIT_S = 1.0


def checksum(data: bytes) -> int:
    """Return the Internet checksum (RFC 1071) of an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


def request(number: int, payload: bytes) -> bytes:
    """Return an echo request (RFC 792): type 8, code 0, checksum, identifier, sequence number, payload."""
    identifier = os.getpid() & 0xFFFF
    head = struct.pack("!BBHHH", 8, 0, 0, identifier, number & 0xFFFF)
    return struct.pack("!BBHHH", 8, 0, checksum(head + payload), identifier, number & 0xFFFF) + payload


def round_trip(sock: socket.socket, sent: bytes, begin_ns: int) -> int:
    """Return the ns from `begin_ns` until the reply to `sent`; -1 without a reply."""
    while time.monotonic_ns() - begin_ns < WAIT_S * 1e9:
        try:
            reply = sock.recv(2048)
        except TimeoutError:
            break
        taken_ns = time.monotonic_ns() - begin_ns
        # After the 20-byte IPv4 header: type 0 (echo reply), and the request's identifier and sequence number.
        if reply[20] == 0 and reply[24:28] == sent[4:8]:
            return taken_ns
    return -1


def warm(nowhere: socket.socket, data: bytes) -> None:
    """Warm the code path of `send` up to the system call, which fails because the socket is closed."""
    time.monotonic_ns()
    with suppress(OSError):
        nowhere.send(data)


def wait(sock: socket.socket, interval_ns: int) -> None:
    """Wait as ping does: receive until nothing has arrived for SO_RCVTIMEO, which the kernel rounds to its ticks."""
    due = time.monotonic_ns() + interval_ns
    with suppress(BlockingIOError):
        while time.monotonic_ns() < due:
            sock.recv(2048)


def probes(sock: socket.socket, requests: list[bytes], interval_ns: int) -> list[int]:
    """Send the requests and return the time of each, ns."""
    # 1 stands for the kernel's minimum: most replies are dropped at once instead of being queued.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    # At least 1 us: the kernel takes 0 as no time limit.
    interval_us = max(interval_ns // 1000, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", *divmod(interval_us, 1_000_000)))
    nowhere = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    os.close(nowhere.fileno())
    told = []
    for each in requests:
        if interval_ns:
            wait(sock, interval_ns)
        # A cold interpreter takes longer to reach the kernel than the kernel takes for the packet's path.
        warm(nowhere, each)
        begin_ns = time.monotonic_ns()
        sock.send(each)
        told.append(begin_ns)
    return told


def trips(sock: socket.socket, requests: list[bytes], interval_ns: int) -> list[int]:
    """Send the requests and return the round trip of each, ns."""
    sock.settimeout(WAIT_S)
    told = []
    due = time.monotonic_ns()
    for each in requests:
        if interval_ns:
            due += interval_ns
            time.sleep(max(0, due - time.monotonic_ns()) / 1e9)
        begin_ns = time.monotonic_ns()
        sock.send(each)
        told.append(round_trip(sock, each, begin_ns))
    return told


def main(mode: str, address: str, count: int, interval_ns: int, payload_bytes: int, limit_s: int) -> None:
    """Send all requests, then print the list of `mode`."""
    signal.alarm(limit_s)
    sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    sock.connect((address, 0))
    requests = [request(number, bytes(payload_bytes + payload_bytes % 2)) for number in range(count)]
    told = {"probes": probes, "trips": trips}[mode](sock, requests, interval_ns)
    sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *(int(word) for word in sys.argv[3:7]))
