"""Sends ICMP echo requests and says when: run as a file, by `mace.hostpath`, inside a member's namespace.

    prober.py ADDRESS COUNT INTERVAL_NS PAYLOAD_BYTES LIMIT_S

Only the standard library, as in `generator.py`. Nobody reads the replies: what counts is the way out. It ends with one
JSON list: CLOCK_MONOTONIC in ns before each `send`. An interval of 0 sends one right after the other.
"""

import json
import os
import signal
import socket
import struct
import sys
import time


def checksum(data: bytes) -> int:
    """RFC 1071, of an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


def request(number: int, payload: bytes) -> bytes:
    """RFC 792: type 8, code 0, checksum, identifier, sequence number."""
    identifier = os.getpid() & 0xFFFF
    head = struct.pack("!BBHHH", 8, 0, 0, identifier, number & 0xFFFF)
    return struct.pack("!BBHHH", 8, 0, checksum(head + payload), identifier, number & 0xFFFF) + payload


def main(address: str, count: int, interval_ns: int, payload_bytes: int, limit_s: int) -> None:
    """Send them all, then print the times."""
    signal.alarm(limit_s)
    sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    # SO_RCVBUF: the kernel's least. The replies are dropped at once instead of being queued.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    sock.connect((address, 0))
    requests = [request(number, bytes(payload_bytes + payload_bytes % 2)) for number in range(count)]
    sent = []
    due = time.monotonic_ns()
    for each in requests:
        if interval_ns:
            due += interval_ns
            time.sleep(max(0, due - time.monotonic_ns()) / 1e9)
        sent.append(time.monotonic_ns())
        sock.send(each)
    sys.stdout.write(json.dumps(sent) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], *(int(word) for word in sys.argv[2:6]))
