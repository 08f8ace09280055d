"""Reads the pages of one CPU in a trace.dat file, piece by piece, into buffers for the page decoder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from collector.pages.decoding import page_buffer
from collector.pages.formats import PageLayout
from collector.tracecmd.file import PAGE_MAX, BufferInfo, CpuData, TraceFile
from contracts.arrays import Bytes
from contracts.errors import CaptureError

CHUNK_MAX: Final = 16 << 20
"""Largest decompressed piece, bytes. trace-cmd compresses 10 pages at a time."""
RATIO_MAX: Final = 4096
"""Largest ratio of compression. Pages with a single event shrink to a hundredth."""
_PIECE_HEAD: Final = 8
_PAGES_KEPT: Final = 128
"""Pages in a piece below which buffers are not kept from piece to piece: such pieces occur with many CPUs."""


def layout_of(file: TraceFile, info: BufferInfo) -> PageLayout:
    """Return the layout of a buffer's pages: the kernel's layout with the buffer's page size.

    Raises `CaptureError` for an impossible layout.
    """
    said = file.frame.layout
    if said is None:
        raise CaptureError(file.path, 0, "the file does not tell how the kernel's pages are laid out")
    size = info.page_size
    ends = (said.timestamp_offset + 8, said.commit_offset + said.commit_size)
    if said.timestamp_offset % 4 or said.commit_offset % 4 or max(ends) > said.data_offset:
        raise CaptureError(file.path, 0, f"a page with these parts cannot be: {said}")
    if size % 4 or not said.data_offset + 8 <= size <= PAGE_MAX:
        raise CaptureError(
            file.path, 0, f"pages of {size} bytes; expected {said.data_offset + 8} to {PAGE_MAX}, in whole words"
        )
    return replace(said, data_size=size - said.data_offset)


@dataclass(frozen=True, slots=True)
class Piece:
    """Some pages in a `page_buffer`."""

    buffer: Bytes
    pages: int
    offset: int
    """Offset in the file of the first page, or of the compressed piece."""
    packed: bool
    """Whether the pages were compressed."""
    done: int
    """Bytes of the file that were read for these pages."""
    missing: int = 0
    """Pages right before these that are missing or could not be decompressed (with salvage)."""

    def offset_of(self, page: int, page_size: int) -> int:
        """Return the offset in the file of one of the pages; of a compressed piece, the offset of the piece."""
        return self.offset if self.packed else self.offset + page * page_size


def pieces(file: TraceFile, info: BufferInfo, cpu: CpuData, pages: int) -> Iterator[Piece]:
    """Yield all pages of one CPU, about `pages` at a time; compressed pieces are not divided.

    A piece is valid until the next is requested. Raises `CaptureError`. With `file.salvage`, pages that cannot be read
    or decompressed are left out, reported in `file.warnings` and counted in `Piece.missing`.
    """
    layout = layout_of(file, info)
    if info.compressed:
        yield from _unpacked(file, cpu, layout, pages)
        return
    end = min(cpu.offset + cpu.size, file.size)
    size = layout.page_size
    buffer = page_buffer(layout, min(pages, -(-cpu.size // size)))
    at = cpu.offset
    lacking = -(-(cpu.offset + cpu.size - max(end, at)) // size)
    while at < end:
        wanted = min(pages * size, end - at)
        got = file.read_into(at, buffer.data[:wanted])
        whole = got // size
        if got < wanted or got % size:
            _lacking(file, at + whole * size, f"a page of {size} bytes is cut")
            lacking += got % size > 0
        if whole:
            yield Piece(buffer, whole, at, packed=False, done=got)
        at += got
        if got < wanted:
            break
    if lacking > 0:
        yield Piece(buffer, 0, at, packed=False, done=0, missing=lacking)


def _unpacked(file: TraceFile, cpu: CpuData, layout: PageLayout, pages: int) -> Iterator[Piece]:
    if not cpu.size:
        return
    # The stated size is that of the pieces, without their number, which precedes them.
    end = min(cpu.offset + 4 + cpu.size, file.size)
    order = "big" if file.frame.big_endian else "little"
    if cpu.offset + 4 > end:
        _lacking(file, cpu.offset, "the number of compressed pieces is cut")
        yield Piece(page_buffer(layout, 0), 0, cpu.offset, packed=True, done=0, missing=1)
        return
    count = int.from_bytes(file.bytes_at(cpu.offset, 4, "the number of pieces"), order)  # type: ignore[arg-type]
    at, size = cpu.offset + 4, layout.page_size
    buffer = page_buffer(layout, 0)
    room, filled, begun, done, missing = 0, 0, at, 4, 0
    for _ in range(count):
        if at + _PIECE_HEAD > end:
            _lacking(file, at, "fewer compressed pieces than the file says")
            missing += 1
            break
        head = file.bytes_at(at, _PIECE_HEAD, "a compressed piece")
        stored, whole = int.from_bytes(head[:4], order), int.from_bytes(head[4:], order)  # type: ignore[arg-type]
        if whole > CHUNK_MAX or whole > RATIO_MAX * stored or not whole:
            _lacking(file, at, f"a piece of {stored} bytes that should become {whole}, which no recording does")
            missing += max(stored // size, 1)
            break
        if at + _PIECE_HEAD + stored > end:
            _lacking(file, at, f"a compressed piece of {stored} bytes is cut")
            missing += max(whole // size, 1)
            break
        try:
            raw = file.unpack(at, file.bytes_at(at + _PIECE_HEAD, stored, "a piece"), whole)
            if whole % size:
                raise CaptureError(file.path, at, f"a piece of {whole} bytes, which are no whole pages of {size}")
        except CaptureError as error:
            if not file.salvage:
                raise
            file.warn(at, f"{error.why}; left out")
            raw = b""
        at += _PIECE_HEAD + stored
        done += _PIECE_HEAD + stored
        if not raw:
            if filled:
                yield Piece(buffer, filled // size, begun, packed=True, done=done, missing=missing)
                filled, done, missing = 0, 0, 0
            missing += max(whole // size, 1)
            continue
        if filled + len(raw) > room:
            room = max(filled + len(raw), min(pages * size, 2 * room))
            larger = page_buffer(layout, room // size)
            larger[:filled] = buffer[:filled]
            buffer = larger
        if not filled:
            begun = at - stored - _PIECE_HEAD
        buffer[filled : filled + len(raw)] = np.frombuffer(raw, np.uint8)
        filled += len(raw)
        if filled + len(raw) > pages * size:
            del raw
            given = [Piece(buffer, filled // size, begun, packed=True, done=done, missing=missing)]
            if pages < _PAGES_KEPT:
                # With many CPUs a buffer of each would wait here, which a hostile file could make very large.
                buffer = larger = page_buffer(layout, 0)
                room = 0
            filled, done, missing = 0, 0, 0
            yield given.pop()
    if filled or missing:
        yield Piece(buffer, filled // size, begun, packed=True, done=done, missing=missing)


def _lacking(file: TraceFile, offset: int, why: str) -> None:
    """Report missing data: raise `CaptureError`, or with salvage add a warning."""
    if not file.salvage:
        raise CaptureError(file.path, offset, why)
    file.warn(offset, f"{why}; what is there is used")
