"""What passes one device, as a packet socket sees it: a witness that knows nothing of MACE.

    observer.py DEVICE        inside the device's namespace; the standard library only

Says `ready`, notes until its standard input ends, and then prints one JSON object: `dropped` (packets that the kernel
had no room to show it) and `seen`, a list of [ns since 1970 by the kernel's stamp, whether it was sent here, number].
The number is that of the first whole cell of the packet's payload, as `talker.py` writes them, in hex; "" if it has
none, being somebody else's packet.
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
"""Behind IPv4, UDP, VXLAN, Ethernet, IPv6, TCP with options and half a cell there is still a whole cell in it."""
BUFFER_BYTES = 512 << 20
"""The kernel counts a packet's whole buffer, and TCP's have 64 KiB."""
MAGIC, CELL_BYTES = b"\xa5MaC", 16


def only_heads(sock: socket.socket) -> None:
    """Keep the first bytes of each packet only. BPF: return SNAP_BYTES."""
    code = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, SNAP_BYTES))
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HL", 1, ctypes.addressof(code)))


def noted(sock: socket.socket) -> tuple[int, bool, str]:
    """The next packet."""
    data, extra, _, address = sock.recvmsg(SNAP_BYTES, 256)
    stamp = next(value for level, kind, value in extra if (level, kind) == (socket.SOL_SOCKET, SO_TIMESTAMPNS))
    seconds, ns = struct.unpack("ll", stamp)
    at = data.find(MAGIC)
    cell = data[at + len(MAGIC) : at + CELL_BYTES] if 0 <= at <= len(data) - CELL_BYTES else b""
    return seconds * 1_000_000_000 + ns, address[2] == PACKET_OUTGOING, cell.hex()


def main(device: str) -> None:
    """Watch until the parent has had enough."""
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
        except OSError:  # the device has gone, and the socket says so once
            ending = True
    _, dropped = struct.unpack("II", sock.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
    print(json.dumps({"dropped": dropped, "seen": seen}))


if __name__ == "__main__":
    main(sys.argv[1])
