"""Sends ICMP echo requests and prints their round trips. It runs as a file inside a member's namespace.

    prober.py ADDRESS COUNT INTERVAL_NS PAYLOAD_BYTES LIMIT_S

It imports only the standard library, so that it starts fast. At its end it prints one JSON list: the round trip of each
request in ns, by the user's clock; -1 if no reply arrived within a second. An interval of 0 sends the next request as
soon as the reply has arrived.
"""

import json
import os
import signal
import socket
import struct
import sys
import time

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


def main(address: str, count: int, interval_ns: int, payload_bytes: int, limit_s: int) -> None:
    """Send all requests, then print their round trips."""
    signal.alarm(limit_s)
    sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    sock.connect((address, 0))
    requests = [request(number, bytes(payload_bytes + payload_bytes % 2)) for number in range(count)]
    sys.stdout.write(json.dumps(trips(sock, requests, interval_ns)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], *(int(word) for word in sys.argv[2:6]))
