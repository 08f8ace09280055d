"""Hand-made packet captures: pcap and pcapng in both byte orders and with several clocks, and traffic through NAT."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAGIC = {"us": 0xA1B2C3D4, "ns": 0xA1B23C4D}


@dataclass(frozen=True)
class PcapFrame:
    """One captured frame."""

    utc_ns: int
    data: bytes
    length: int = 0
    """Bytes that the frame had on the link, if more than were captured."""


def pcap(
    frames: Sequence[PcapFrame], *, order: str = "<", unit: str = "ns", link: int = 1, snap: int = 262144
) -> bytes:
    per = 1 if unit == "ns" else 1000
    raw = [struct.pack(order + "IHHiIII", MAGIC[unit], 2, 4, 0, 0, snap, link)]
    for one in frames:
        s, rest = divmod(one.utc_ns, 10**9)
        data = one.data[:snap]
        raw.append(struct.pack(order + "IIII", s, rest // per, len(data), max(one.length, len(one.data))) + data)
    return b"".join(raw)


def block(kind: int, body: bytes, order: str) -> bytes:
    body += b"\0" * (-len(body) % 4)
    size = struct.pack(order + "I", len(body) + 12)
    return struct.pack(order + "I", kind) + size + body + size


def option(code: int, data: bytes, order: str) -> bytes:
    return struct.pack(order + "HH", code, len(data)) + data + b"\0" * (-len(data) % 4)


def ng_section(order: str) -> bytes:
    return block(0x0A0D0D0A, struct.pack(order + "IHHq", 0x1A2B3C4D, 1, 0, -1), order)


def ng_interface(
    order: str, *, link: int = 1, name: str = "", tsresol: int | None = None, offset_s: int = 0, more: bytes = b""
) -> bytes:
    """Return an interface description block. `tsresol`: value of that option; None omits it (microseconds)."""
    options = option(2, name.encode(), order) if name else b""
    options += b"" if tsresol is None else option(9, bytes([tsresol]), order)
    options += option(14, struct.pack(order + "q", offset_s), order) if offset_s else b""
    return block(1, struct.pack(order + "HHI", link, 0, 0) + options + more + option(0, b"", order), order)


def ng_packet(
    order: str,
    interface: int,
    utc_ns: int,
    data: bytes,
    *,
    length: int = 0,
    tsresol: int | None = 9,
    offset_s: int = 0,
    old: bool = False,
) -> bytes:
    """Return an enhanced packet block, or the obsolete packet block."""
    ticks_per_s = 10**6 if tsresol is None else 2 ** (tsresol & 127) if tsresol & 128 else 10**tsresol
    ticks = (utc_ns - offset_s * 10**9) * ticks_per_s // 10**9
    where = struct.pack(order + "HH", interface, 0xFFFF) if old else struct.pack(order + "I", interface)
    sizes = (len(data), max(length, len(data)))
    return block(
        2 if old else 6, where + struct.pack(order + "IIII", ticks >> 32, ticks & 0xFFFFFFFF, *sizes) + data, order
    )


def pcapng(
    frames: Sequence[PcapFrame],
    *,
    order: str = "<",
    tsresol: int | None = 9,
    offset_s: int = 0,
    link: int = 1,
    interfaces: int = 1,
) -> bytes:
    """Return a pcapng file of one section, with the frames distributed over its interfaces in turn."""
    clock = {"tsresol": tsresol, "offset_s": offset_s}
    raw = [ng_section(order), *([ng_interface(order, link=link, **clock)] * interfaces)]
    for number, one in enumerate(frames):
        raw.append(ng_packet(order, number % max(interfaces, 1), one.utc_ns, one.data, length=one.length, **clock))
        if number % 7 == 3:
            raw.append(block(5, b"\0" * 12, order))  # statistics of an interface, which the reader skips
    return b"".join(raw)


def udp_frames(
    count: int, seed: int = 1, *, size: int = 26, start_ns: int = 1_700_000_000 * 10**9
) -> tuple[np.ndarray, np.ndarray]:
    """Return `count` frames of UDP over IPv4 as rows of bytes, and their times, ns; ids and payloads differ."""
    rng = np.random.default_rng(seed)
    frames = np.zeros((count, 42 + size), np.uint8)
    frames[:, 0:12] = [2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 1]
    frames[:, 12:24] = [8, 0, 0x45, 0, 0, 28 + size, 0, 0, 0x40, 0, 64, 17]
    frames[:, 18:20] = np.arange(count, dtype=">u2").view(np.uint8).reshape(-1, 2)
    frames[:, 26:34] = [198, 51, 100, 2, 203, 0, 113, 2]
    frames[:, 34:42] = [0x9C, 0x40, 0x13, 0x89, 0, 8 + size, 1, 2]
    frames[:, 42:50] = np.arange(count, dtype=">u8").view(np.uint8).reshape(-1, 8)
    frames[:, 50:] = rng.integers(0, 256, (count, size - 8), np.uint8)
    return frames, start_ns + np.cumsum(rng.integers(3_000, 9_000, count))


def through_nat(frames: np.ndarray) -> np.ndarray:
    """Return the frames as after masquerading: other addresses, ports, TTL and checksums, and another link."""
    other = frames.copy()
    other[:, 0:12] = [2, 0, 0, 0, 1, 9, 2, 0, 0, 0, 1, 1]
    other[:, 22] -= 1
    other[:, 24:26] = 77
    other[:, 26:30] = [203, 0, 113, 1]
    other[:, 34:36] += 5
    other[:, 40:42] = 99
    return other


def written(frames: np.ndarray, utc_ns: np.ndarray, *, unit: str = "ns") -> bytes:
    """Return many frames of equal size as a pcap file, made with numpy for speed."""
    head = np.empty((len(frames), 4), "<u4")
    head[:, 0] = utc_ns // 10**9
    head[:, 1] = utc_ns % 10**9 // (1 if unit == "ns" else 1000)
    head[:, 2:] = frames.shape[1]
    body = np.concatenate([head.view(np.uint8), frames], axis=1)
    return pcap([], unit=unit) + body.tobytes()
