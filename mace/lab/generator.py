"""Sender and receiver of UDP and TCP traffic. `mace.lab.traffic` runs this file inside a member's namespace.

It imports only the standard library: `python -I -S generator.py` starts in 10 ms and works in any directory.

    generator.py ROLE key=value...

The process writes JSON objects to standard output, one per line. A server writes {"port": N} when it can receive. Every
process writes its result last. The parent writes orders to standard input: `finish N` says that the client has sent N
packets; the server then waits for the missing ones, for a limited time. End of file on standard input means that the
parent has ended, and the process ends at once. On SIGTERM the process stops and writes its result. A time limit ends
every process in any case.
"""

import json
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

GRACE_NS = 500_000_000
"""After `finish`, a server waits this long after the last arrival for missing packets."""
BUFFER_BYTES = 64 << 20
"""Socket buffer. A sender outruns a receiver while both share a CPU; a lab must not lose packets to that."""
CHUNK_BYTES = 256 << 10
MAX_RTTS = 1_000_000
NAP_S = 0.1

stop = False
finish_at: int | None = None


def say(**values: Any) -> None:
    """Write one line to the parent."""
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def listen_to_parent() -> None:
    """Read orders until the parent ends, and then end this process."""
    global finish_at
    for line in sys.stdin:
        order, _, value = line.strip().partition(" ")
        if order == "finish":
            finish_at = int(value)
    # End of file: the parent has ended. os._exit, because the main thread may be in a system call.
    os._exit(1)


def on_term(_signal: int, _frame: Any) -> None:
    """Handle SIGTERM: let the loops stop at the next packet."""
    global stop
    stop = True


def address_family(version: int) -> socket.AddressFamily:
    """Return the socket module's constant for an IP version."""
    return socket.AF_INET if version == 4 else socket.AF_INET6


def set_receive_timeout(sock: socket.socket, seconds: float) -> None:
    """Set SO_RCVTIMEO. `settimeout` would cost two system calls per packet instead of one."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(seconds), int(seconds % 1 * 1e6)))


def grow_buffers(sock: socket.socket) -> None:
    """Set both socket buffers to `BUFFER_BYTES`, if this process has the privilege."""
    so_sndbufforce, so_rcvbufforce = 32, 33  # not in the socket module; beyond net.core.*mem_max, for root
    for option in (so_sndbufforce, so_rcvbufforce):
        try:
            sock.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)
        except OSError:
            pass


def udp_server(family: int, echo: int) -> None:
    """Count datagrams until the parent's order or SIGTERM; with `echo` send each back."""
    sock = socket.socket(address_family(family), socket.SOCK_DGRAM)
    grow_buffers(sock)
    sock.bind(("", 0))
    set_receive_timeout(sock, 0.05)
    say(port=sock.getsockname()[1])
    buffer = bytearray(65536)
    count = total = first_ns = last_ns = 0
    receive = sock.recv_into
    now = time.monotonic_ns
    while not stop and (finish_at is None or count < finish_at):
        try:
            if echo:
                size, peer = sock.recvfrom_into(buffer)
                sock.sendto(memoryview(buffer)[:size], peer)
            else:
                size = receive(buffer)
        except BlockingIOError:
            if finish_at is not None and now() - max(last_ns, finish_seen()) > GRACE_NS:
                break
            continue
        except OSError:  # an ICMP error in response to an echoed datagram
            continue
        last_ns = now()
        if not count:
            first_ns = last_ns
        count += 1
        total += size
    say(received=count, received_bytes=total, duration_ns=last_ns - first_ns)


_finish_seen_ns = 0


def finish_seen() -> int:
    """Return the time of the first call, ns: when the server first noticed `finish`."""
    global _finish_seen_ns
    if not _finish_seen_ns:
        _finish_seen_ns = time.monotonic_ns()
    return _finish_seen_ns


def udp_client(
    family: int, host: str, port: int, count: int, size: int, interval_ns: int, duration_ns: int, echo: int
) -> None:
    """Send `count` datagrams, one every `interval_ns` (0: as fast as possible); with `echo`, wait for each reply."""
    sock = socket.socket(address_family(family), socket.SOCK_DGRAM)
    grow_buffers(sock)
    sock.connect((host, port))
    payload = bytearray(size)
    pack = struct.Struct("!Q").pack_into if size >= 8 else None
    reply = bytearray(65536)
    if echo:
        set_receive_timeout(sock, 1.0)
    rtts: list[int] = []
    sent = received = errors = 0
    now, send = time.monotonic_ns, sock.send
    start_ns = now()
    end_ns = start_ns + duration_ns if duration_ns else 0
    while sent < count and not stop:
        if interval_ns or end_ns or echo:
            t = now()
            due = start_ns + sent * interval_ns
            if end_ns and max(t, due) >= end_ns:
                break
            ahead = due - t
            if interval_ns and ahead > 0:
                # Sleep until 100 us before the time and then spin: timers fire some 60 us late, which would lower the
                # rate. Sleeps are short, because the loop notices a stop only between them.
                if ahead > 200_000:
                    time.sleep(min((ahead - 100_000) / 1e9, NAP_S))
                    continue
                while now() < t + ahead:
                    pass
        if pack:
            pack(payload, 0, sent)  # every datagram differs
        try:
            before = now() if echo else 0
            send(payload)
            sent += 1
            while echo:
                sock.recv_into(reply)
                if not pack or bytes(reply[:8]) == bytes(payload[:8]):  # else a late reply to an earlier one
                    received += 1
                    if len(rtts) < MAX_RTTS:
                        rtts.append(now() - before)
                    break
        except BlockingIOError:
            continue  # no reply in time: counted as sent, not as received
        except OSError:  # an ICMP error for an earlier datagram (refused, unreachable), or no buffer space
            errors += 1
            if errors > 1000:
                break
    say(sent=sent, received=received, errors=errors, duration_ns=now() - start_ns, rtts_ns=rtts)


def tcp_server(family: int, count: int, size: int, mode: str) -> None:
    """Serve one connection: `sink` reads to its end, `source` writes `size` bytes, `echo` answers requests of `size`.

    `echo` ends after `count` requests.
    """
    listener = socket.socket(address_family(family), socket.SOCK_STREAM)
    listener.bind(("", 0))
    listener.listen(1)
    say(port=listener.getsockname()[1])
    sock, _ = listener.accept()
    start_ns = time.monotonic_ns()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    total = exchanges = 0
    try:
        if mode == "sink":
            total = drain(sock)
        elif mode == "source":
            total = pour(sock, size)
            sock.shutdown(socket.SHUT_WR)
            drain(sock)
        else:
            while exchanges < count and not stop and (request := read_exactly(sock, size)):
                sock.sendall(request)
                exchanges += 1
                total += len(request)
    except OSError as error:
        say(received=exchanges, bytes=total, duration_ns=time.monotonic_ns() - start_ns, error=str(error))
        return
    sock.close()
    say(received=exchanges, bytes=total, duration_ns=time.monotonic_ns() - start_ns)


def tcp_client(
    family: int, host: str, port: int, count: int, size: int, interval_ns: int, duration_ns: int, mode: str
) -> None:
    """Connect to a `tcp_server` of the same mode: `sink` writes `size` bytes, `source` reads, `echo` sends requests."""
    start_ns = time.monotonic_ns()
    sock = socket.socket(address_family(family), socket.SOCK_STREAM)
    sock.connect((host, port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    rtts: list[int] = []
    total = sent = 0
    if mode == "sink":
        total = pour(sock, size)
        sock.shutdown(socket.SHUT_WR)
        drain(sock)  # until the server has read all and closed
    elif mode == "source":
        total = drain(sock)
    else:
        end_ns = start_ns + duration_ns if duration_ns else 0
        request = bytearray(size)
        while sent < count and not stop:
            due = start_ns + sent * interval_ns
            if end_ns and max(due, time.monotonic_ns()) >= end_ns:
                break
            if (ahead := due - time.monotonic_ns()) > 0:
                time.sleep(min(ahead / 1e9, NAP_S))
                if ahead > NAP_S * 1e9:
                    continue
            before = time.monotonic_ns()
            sock.sendall(request)
            sent += 1
            if not read_exactly(sock, size):
                break
            if len(rtts) < MAX_RTTS:
                rtts.append(time.monotonic_ns() - before)
            total += size
    duration_ns = time.monotonic_ns() - start_ns
    sock.close()
    say(sent=sent, received=len(rtts), bytes=total, duration_ns=duration_ns, rtts_ns=rtts)


def pour(sock: socket.socket, size: int) -> int:
    """Send `size` bytes; returns how many were sent before a stop."""
    chunk = memoryview(bytes(CHUNK_BYTES))
    left = size
    while left and not stop:
        left -= sock.send(chunk[: min(left, CHUNK_BYTES)])
    return size - left


def drain(sock: socket.socket) -> int:
    """Receive until the peer closes its end; returns the number of bytes."""
    buffer = bytearray(CHUNK_BYTES)
    total = 0
    while got := sock.recv_into(buffer):
        total += got
    return total


def read_exactly(sock: socket.socket, size: int) -> bytes:
    """Receive exactly `size` bytes; returns b"" if the peer closes its end before."""
    parts = bytearray()
    while len(parts) < size:
        part = sock.recv(size - len(parts))
        if not part:
            return b""
        parts += part
    return bytes(parts)


ROLES: dict[str, Callable[..., None]] = {
    "udp-server": udp_server,
    "udp-client": udp_client,
    "tcp-server": tcp_server,
    "tcp-client": tcp_client,
}


def main(argv: list[str]) -> None:
    """Run the role `argv[0]` with the settings key=value in the rest of `argv`."""
    role, settings = argv[0], dict(word.split("=", 1) for word in argv[1:])
    # SIGALRM's default action ends the process, also from within a system call.
    signal.setitimer(signal.ITIMER_REAL, float(settings.pop("limit_s")))
    signal.signal(signal.SIGTERM, on_term)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=listen_to_parent, daemon=True).start()
    arguments: dict[str, Any] = {k: v if k in ("host", "mode") else int(v) for k, v in settings.items()}
    try:
        ROLES[role](**arguments)
    except OSError as error:
        say(error=str(error))
    sys.stdout.flush()
    os._exit(0)  # a normal exit would wait for the thread that reads standard input


if __name__ == "__main__":
    main(sys.argv[1:])
