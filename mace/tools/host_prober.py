"""Sends ICMP echo requests when it is told to. It runs as a file in the network namespace of the host or a container.

    host_prober.py ADDRESS PAYLOAD_BYTES

It imports only the standard library, so that it starts fast. Each line of its standard input, `DUE_NS COUNT`, has it
send COUNT requests, the first at DUE_NS (CLOCK_MONOTONIC) and each further one when the reply before it has arrived.
For each line it prints one line, a JSON list of `[SENT_NS, RTT_NS]`: CLOCK_MONOTONIC right before the request was sent,
and the round trip up to the kernel's timestamp of the reply, as ping measures it; -1 without a reply within a second. A
request that could not be sent has the error's text instead of the list. It ends when its standard input ends.
"""

import json
import os
import socket
import struct
import sys
import time

WAIT_S = 1.0
WARM_ROUNDS = 4
"""Requests to a closed socket before each request: then a cold interpreter no longer adds to the time up to the
kernel, and a probe takes as long as a ping, which is machine code."""
SO_TIMESTAMPNS = 35
"""include/uapi/asm-generic/socket.h, SO_TIMESTAMPNS_OLD; Python's socket module has no name for it."""


def checksum(data: bytes) -> int:
    """Return the Internet checksum (RFC 1071) of the bytes."""
    padded = data + bytes(len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(padded) // 2}H", padded))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


class Echo:
    """An ICMP or ICMPv6 socket that is connected to one address."""

    def __init__(self, address: str, payload_bytes: int) -> None:
        self.version = 6 if ":" in address else 4
        if self.version == 4:
            self.sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
            self.request_type, self.reply_type, self.header = 8, 0, 20
        else:
            # The kernel computes the checksum of ICMPv6 (RFC 3542, section 3.1).
            self.sock = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
            self.request_type, self.reply_type, self.header = 128, 129, 0
        self.sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        self.sock.connect((address, 0))
        self.nowhere = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        os.close(self.nowhere.detach())
        self.payload = bytes(payload_bytes)
        self.identifier = os.getpid() & 0xFFFF
        self.number = 0

    def request(self) -> bytes:
        """Return the next echo request (RFC 792, RFC 4443): type, code, checksum, identifier, number, payload."""
        self.number = (self.number + 1) & 0xFFFF
        rest = struct.pack("!HH", self.identifier, self.number) + self.payload
        head = struct.pack("!BBH", self.request_type, 0, 0)
        return struct.pack("!BBH", self.request_type, 0, checksum(head + rest)) + rest

    def forget(self) -> None:
        """Read and drop all packets that have arrived."""
        self.sock.setblocking(False)
        try:
            while True:
                self.sock.recv(2048)
        except BlockingIOError:
            pass
        self.sock.settimeout(WAIT_S)

    def send(self, data: bytes) -> int:
        """Send one request; returns CLOCK_MONOTONIC in ns right before it. Raises `OSError`."""
        sent_ns = 0
        failed = None
        for sock in (*(self.nowhere,) * WARM_ROUNDS, self.sock):
            failed = None
            sent_ns = time.monotonic_ns()
            try:
                sock.send(data)
            except OSError as error:
                failed = error
        if failed is not None:
            raise failed
        return sent_ns

    def arrived_ns(self, sent: bytes, sent_ns: int) -> int:
        """Return the kernel's timestamp of the reply, CLOCK_REALTIME in ns; -1 without a reply."""
        while time.monotonic_ns() - sent_ns < WAIT_S * 1e9:
            try:
                reply, ancillary, _, _ = self.sock.recvmsg(65_536, 256)
            except OSError:
                return -1  # no reply in time, or an ICMP error about the request
            told = reply[self.header :]
            if told[:1] == bytes([self.reply_type]) and told[4:8] == sent[4:8]:
                for _, kind, data in ancillary:
                    if kind == SO_TIMESTAMPNS:
                        seconds, ns = struct.unpack("qq", data[:16])
                        return int(seconds * 1_000_000_000 + ns)
                return -1
        return -1


def probes(echo: Echo, due_ns: int, count: int) -> list[tuple[int, int]]:
    """Send `count` requests from `due_ns` on; returns (time of sending, round trip) of each, ns."""
    told = []
    for n in range(count):
        data = echo.request()
        if n == 0:
            time.sleep(max(0, due_ns - time.monotonic_ns()) / 1e9)
        echo.forget()
        sent_ns = echo.send(data)
        offset_ns = time.time_ns() - time.monotonic_ns()
        arrived_ns = echo.arrived_ns(data, sent_ns)
        told.append((sent_ns, arrived_ns - offset_ns - sent_ns if arrived_ns >= 0 else -1))
    return told


def main(address: str, payload_bytes: int) -> None:
    """Send what the lines of standard input ask for."""
    echo = Echo(address, payload_bytes)
    for line in sys.stdin:
        due_ns, count = map(int, line.split())
        told: object
        try:
            told = probes(echo, due_ns, count)
        except OSError as error:
            told = error.strerror or str(error)
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
