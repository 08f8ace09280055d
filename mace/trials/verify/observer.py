"""Observes the packets at one device with a packet socket, independently of MACE.

    observer.py DEVICE        inside the device's namespace; imports the standard library only

It prints `ready`, notes packets until its standard input ends, and then prints one JSON object: `dropped` (packets that
did not fit in the socket's buffer) and `seen`, a list of [ns since 1970 by the kernel's stamp, whether this device sent
the packet, number]. The number is the hexadecimal content of the first whole cell in the payload, as `talker.py` writes
cells; "" for a packet without cells, which `talker.py` has not sent.
"""

import ctypes
import json
import select
import socket
import struct
import sys

ETH_P_ALL, SOL_PACKET, PACKET_STATISTICS, PACKET_OUTGOING = 3, 263, 6, 4
SO_TIMESTAMPNS, SO_RCVBUFFORCE, SO_ATTACH_FILTER = 35, 33, 26
SNAP_BYTES = 256
"""Enough for IPv4, UDP, VXLAN, Ethernet, IPv6, TCP with options, half a cell, and one whole cell."""
BUFFER_BYTES = 512 << 20
"""Receive buffer of the socket: the kernel counts a packet's whole buffer, and TCP's buffers have 64 KiB."""
MAGIC, CELL_BYTES = b"\xa5MaC", 16


def only_heads(sock: socket.socket) -> None:
    """Attach a BPF filter, `return SNAP_BYTES`, which keeps only the first bytes of each packet."""
    code = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, SNAP_BYTES))
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HL", 1, ctypes.addressof(code)))


def noted(sock: socket.socket) -> tuple[int, bool, str]:
    """Receive the next packet; returns its stamp, whether it was sent here, and its number."""
    data, extra, _, address = sock.recvmsg(SNAP_BYTES, 256)
    stamp = next(value for level, kind, value in extra if (level, kind) == (socket.SOL_SOCKET, SO_TIMESTAMPNS))
    seconds, ns = struct.unpack("ll", stamp)
    at = data.find(MAGIC)
    cell = data[at + len(MAGIC) : at + CELL_BYTES] if 0 <= at <= len(data) - CELL_BYTES else b""
    return seconds * 1_000_000_000 + ns, address[2] == PACKET_OUTGOING, cell.hex()


def main(device: str) -> None:
    """Observe the device until standard input ends."""
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL))
    only_heads(sock)
    sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER_BYTES)
    sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    sock.bind((device, ETH_P_ALL))
    sock.setblocking(False)
    print("ready", flush=True)
    seen, ending = [], False
    while not ending:
        ready, _, _ = select.select([sock, sys.stdin], [], [])
        ending = ready == [sys.stdin]
        try:
            while True:
                seen.append(noted(sock))
        except BlockingIOError:
            pass
        except OSError:  # the device was removed; the socket reports that once
            ending = True
    _, dropped = struct.unpack("II", sock.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
    print(json.dumps({"dropped": dropped, "seen": seen}))


if __name__ == "__main__":
    main(sys.argv[1])
