"""Mutations of bytes as in damaged transfers, and of frames that get valid checksums again."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from typing import Final
from zlib import crc32

import zstandard

from contracts.wire import FILE_HEAD, HEAD_SIZE, FrameKind, parse_head
from tests.made_capture import forge

_NUMBERS: Final = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
_TEXTS: Final = (
    b"\0",
    b"\n",
    b"\xff\xfe",
    b"[/]",
    b"\x1b[31m",
    b"%s" * 20,
    b"9" * 5000,
    b"-1",
    b"1e999",
    b"nan",
    b"{" * 300,
    b"[" * 2000,
    "\N{RIGHT-TO-LEFT OVERRIDE}".encode(),
)
_MOST_BYTES: Final = 1 << 20


def mutated(data: bytes, drawn: random.Random, others: Sequence[bytes] = ()) -> bytes:
    """Return `data` with one to eight mutations; `others` are data that may be spliced into it."""
    out = bytearray(data)
    for _ in range(drawn.choice((1, 1, 2, 3, 8))):
        _ACCIDENTS[drawn.randrange(len(_ACCIDENTS))](out, drawn, others)
        del out[_MOST_BYTES:]
    return bytes(out)


def resealed(capture: bytes, drawn: random.Random) -> bytes:
    """Return a capture with one or two mutated payloads or moved frames, whose sizes and checksums match again."""
    frames = frames_of(capture)
    for _ in range(drawn.choice((1, 1, 2))):
        at = drawn.randrange(len(frames))
        raw = mutated(payload_of(frames[at]), drawn)
        frames[at] = sealed(frames[at], raw, drawn)
    match drawn.randrange(6):
        case 0:
            drawn.shuffle(frames)
        case 1:
            frames.insert(drawn.randrange(len(frames) + 1), drawn.choice(frames))
        case 2:
            del frames[drawn.randrange(len(frames))]
    return FILE_HEAD + b"".join(frames)


def sealed(frame: bytes, raw: bytes, drawn: random.Random) -> bytes:
    """Return the frame with another payload; another HEADER may begin another stream, whose tag is derived from it."""
    head = parse_head(frame)
    packed = zstandard.compress(raw) if drawn.random() < 0.5 else None
    stored = packed if packed is not None and len(packed) < len(raw) else None
    stream = crc32(raw) if head.message is FrameKind.HEADER and drawn.random() < 0.5 else head.stream
    return forge(head.message, raw, stored=stored, stream=stream, sequence=head.sequence, version=head.version)


def frames_of(capture: bytes) -> list[bytes]:
    """Return the frames of a sound capture."""
    found, at = [], len(FILE_HEAD)
    while at < len(capture):
        size = HEAD_SIZE + parse_head(capture[at:]).stored
        found.append(capture[at : at + size])
        at += size
    return found


def payload_of(frame: bytes) -> bytes:
    """Return the decompressed payload of a frame."""
    head = parse_head(frame)
    stored = frame[HEAD_SIZE:]
    return zstandard.ZstdDecompressor().decompress(stored, max_output_size=head.raw) if head.compressed else stored


# The mutations. They prefer the beginning, which describes how the rest is read.


def _place(out: bytearray, drawn: random.Random) -> int:
    return drawn.randrange(min(len(out), 64) + 1) if drawn.random() < 0.3 else drawn.randrange(len(out) + 1)


def _turn_bit(out: bytearray, drawn: random.Random, _: Sequence[bytes]) -> None:
    if out:
        out[_place(out, drawn) % len(out)] ^= 1 << drawn.randrange(8)


def _set_byte(out: bytearray, drawn: random.Random, _: Sequence[bytes]) -> None:
    if out:
        out[_place(out, drawn) % len(out)] = drawn.randrange(256)


def _set_number(out: bytearray, drawn: random.Random, _: Sequence[bytes]) -> None:
    size = drawn.choice((1, 2, 4, 8))
    number = drawn.choice(_NUMBERS) % (1 << 8 * size)
    at = _place(out, drawn)
    out[at : at + size] = struct.pack("<Q", number)[:size] if drawn.random() < 0.7 else number.to_bytes(size)


def _delete(out: bytearray, drawn: random.Random, _: Sequence[bytes]) -> None:
    at = _place(out, drawn)
    del out[at : at + drawn.choice((1, 2, 4, 37, 1000))]


def _repeat(out: bytearray, drawn: random.Random, _: Sequence[bytes]) -> None:
    at, size = _place(out, drawn), drawn.choice((1, 4, 37, 1000))
    out[at:at] = out[at : at + size] * drawn.choice((1, 2, 50))


def _zero(out: bytearray, drawn: random.Random, _: Sequence[bytes]) -> None:
    at, size = _place(out, drawn), drawn.choice((4, 64, 4096))
    out[at : at + size] = bytes(len(out[at : at + size]))


def _cut(out: bytearray, drawn: random.Random, _: Sequence[bytes]) -> None:
    del out[_place(out, drawn) :]


def _insert(out: bytearray, drawn: random.Random, _: Sequence[bytes]) -> None:
    at = _place(out, drawn)
    out[at:at] = drawn.choice(_TEXTS) if drawn.random() < 0.5 else drawn.randbytes(drawn.choice((1, 8, 100)))


def _splice(out: bytearray, drawn: random.Random, others: Sequence[bytes]) -> None:
    if others:
        other = drawn.choice(others)
        at = drawn.randrange(len(other) + 1)
        here = _place(out, drawn)
        out[here:] = other[at : at + (1 << 18)]


_ACCIDENTS: Final[tuple[Callable[[bytearray, random.Random, Sequence[bytes]], None], ...]] = (
    _turn_bit,
    _turn_bit,
    _set_byte,
    _set_number,
    _set_number,
    _delete,
    _repeat,
    _zero,
    _cut,
    _insert,
    _insert,
    _splice,
)
