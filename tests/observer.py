"""UDP datagrams on one device, as a packet socket sees them: an observer that knows nothing of MACE.

It knows each by a number in its payload.

    observer.py DEVICE        inside the device's namespace; the standard library only

Says `ready`, notes until its standard input ends, and then prints one JSON object: `dropped` (packets that the kernel
had no room to show it) and `seen`, a list of [ns since 1970 by the kernel's stamp, whether it was sent here, number in
the first eight bytes of the payload, bytes of payload].
"""

import ctypes
import json
import select
import socket
import struct
import sys

ETH_P_ALL, SOL_PACKET, PACKET_STATISTICS, PACKET_OUTGOING = 3, 263, 6, 4
SO_TIMESTAMPNS, SO_RCVBUFFORCE, SO_ATTACH_FILTER = 35, 33, 26
UDP = 17


def only_udp(sock: socket.socket) -> None:
    """Let the kernel drop all else: behind the network header's first bytes, IPv4's or IPv6's protocol is 17."""
    # BPF: A = byte 0 >> 4; 4: byte 9, 6: byte 6 (RFC 791, 8200); 17: take it.
    program = [
        (0x30, 0, 0, 0),
        (0x74, 0, 0, 4),
        (0x15, 0, 2, 4),
        (0x30, 0, 0, 9),
        (0x15, 3, 4, UDP),
        (0x15, 0, 3, 6),
        (0x30, 0, 0, 6),
        (0x15, 0, 1, UDP),
        (0x06, 0, 0, 0xFFFF),
        (0x06, 0, 0, 0),
    ]
    code = b"".join(struct.pack("HBBI", *step) for step in program)
    buffer = ctypes.create_string_buffer(code)
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HL", len(program), ctypes.addressof(buffer)))


def noted(sock: socket.socket) -> tuple[int, bool, int, int] | None:
    """The next packet, or None if it has no number."""
    data, extra, _, address = sock.recvmsg(256, 256)
    head = (data[0] & 15) * 4 if data[0] >> 4 == 4 else 40
    if len(data) < head + 16:
        return None
    stamp = next(value for level, kind, value in extra if (level, kind) == (socket.SOL_SOCKET, SO_TIMESTAMPNS))
    seconds, ns = struct.unpack("ll", stamp)
    (length,), (number,) = struct.unpack_from("!H", data, head + 4), struct.unpack_from("!Q", data, head + 8)
    return seconds * 1_000_000_000 + ns, address[2] == PACKET_OUTGOING, number, length - 8


def main(device: str) -> None:
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL))
    only_udp(sock)
    sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
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
                if (each := noted(sock)) is not None:
                    seen.append(each)
        except BlockingIOError:
            pass
    _, dropped = struct.unpack("II", sock.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
    print(json.dumps({"dropped": dropped, "seen": seen}))


if __name__ == "__main__":
    main(sys.argv[1])
