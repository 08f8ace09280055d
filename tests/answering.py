"""A DNS or HTTP server for a lab's far end: answering.py dns|http ADDRESS [DELAY_S], with the standard library only.

`dns` answers each question with one address record over UDP, DELAY_S after it came; `http` answers each request with an
empty page at once. Prints `ready`, and ends at the end of its standard input.
"""

import socket
import struct
import sys
import threading
import time


def dns_answer(query: bytes) -> bytes:
    """Return the answer to a DNS question (RFC 1035): the question and 192.0.2.7, without additional records."""
    identifier, flags, *_ = struct.unpack("!HHHHHH", query[:12])
    end = 12
    while query[end]:
        end += query[end] + 1
    question = query[12 : end + 5]
    head = struct.pack("!HHHHHH", identifier, 0x8400 | (flags & 0x0100), 1, 1, 0, 0)
    return head + question + struct.pack("!HHHIH", 0xC00C, 1, 1, 60, 4) + socket.inet_aton("192.0.2.7")


def dns(address: str, delay_s: str = "0") -> None:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((address, 53))
    print("ready", flush=True)
    while True:
        query, sender = sock.recvfrom(4096)
        time.sleep(float(delay_s))
        sock.sendto(dns_answer(query), sender)


def http(address: str) -> None:
    listening = socket.create_server((address, 80), backlog=64)
    print("ready", flush=True)
    while True:
        connection, _ = listening.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(b"HTTP/1.0 204 No Content\r\n\r\n")


if __name__ == "__main__":
    threading.Thread(target={"dns": dns, "http": http}[sys.argv[1]], args=sys.argv[2:], daemon=True).start()
    sys.stdin.read()
