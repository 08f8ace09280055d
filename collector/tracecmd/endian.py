"""Converts ring pages of a big-endian machine to little-endian ones, so that one decoder reads both.

The events of a page are found only by walking the page, and their headers differ: on a big-endian machine `type_len` is
the upper 5 bits of the word, not the lower ones (order of bit fields in include/linux/ring_buffer.h). All pages are
therefore walked in lockstep, one event of each page at a time. Headers, lengths and the fields that MACE reads are
swapped in place; all other bytes are left unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from collector.pages.decoding import MISSED
from collector.pages.formats import EventFormat, PageLayout
from contracts.arrays import Bytes, Ints
from contracts.errors import SourceError

_DATA_MAX: Final = 28
_PADDING: Final = 29
_DELTA_MASK: Final = np.uint32((1 << 27) - 1)
_TYPE_SHIFT: Final = np.uint32(27)


def to_little_endian(buffer: Bytes, pages: int, layout: PageLayout, formats: Iterable[EventFormat]) -> None:
    """Swap the byte order of the first `pages` pages in `buffer`, and of all integer fields of events of `formats`.

    `common_type` is swapped in every event. Raises `SourceError` for an invalid page.
    """
    whole = buffer[: pages * layout.page_size]
    matrix = whole.reshape(pages, layout.page_size)
    _turn(matrix[:, layout.timestamp_offset :], 8)
    _turn(matrix[:, layout.commit_offset :], layout.commit_size)
    commit = matrix[:, layout.commit_offset : layout.commit_offset + 4].copy().view("<u4")[:, 0].astype(np.int64)
    used = commit & ~MISSED
    if (used > layout.data_size).any() or (used & 3).any():
        raise SourceError(f"a page holds no such number of bytes; expected up to {layout.data_size}, in whole words")
    start = np.arange(pages, dtype=np.int64) * layout.page_size + layout.data_offset
    for page in np.flatnonzero(commit & MISSED):
        after = int(used[page])
        if after + layout.commit_size <= layout.data_size:
            _turn(matrix[page : page + 1, layout.data_offset + after :], layout.commit_size)
    payload, kinds = _turn_headers(whole, start, start + used)
    data = payload[kinds <= _DATA_MAX]
    _turn_at(whole, data, 2)
    fitting = data[data + 2 <= len(whole)]
    idents = whole[fitting].astype(np.uint16) | whole[fitting + 1].astype(np.uint16) << np.uint16(8)
    for form in formats:
        of = fitting[idents == form.id]
        for field in form.fields.values():
            is_number = field.size in (2, 4, 8) and (not field.is_array or field.is_data_loc or field.is_rel_loc)
            if is_number and field.name != "common_type":
                _turn_at(whole, of + field.offset, field.size)


def _turn_headers(whole: Bytes, start: Ints, end: Ints) -> tuple[Ints, npt.NDArray[np.uint32]]:
    """Swap the headers of all events; return the offset of each event's payload, and its type."""
    big = whole.view(">u4")
    little = whole.view("<u4")
    payloads: list[Ints] = []
    kinds: list[npt.NDArray[np.uint32]] = []
    at = start
    while True:
        going = np.flatnonzero(at < end)
        if not len(going):
            break
        at, end = at[going], end[going]
        word = at >> 2
        head = big[word].astype(np.uint32)
        kind, delta = head >> _TYPE_SHIFT, head & _DELTA_MASK
        little[word] = delta << np.uint32(5) | kind
        rest = (kind == _PADDING) & (delta == 0)
        has_more = ((kind == 0) | (kind >= _PADDING)) & ~rest
        if (at[has_more] + 8 > end[has_more]).any():
            raise SourceError("a page has an event that reaches over its end")
        more = word[has_more] + 1
        extra = np.zeros(len(at), np.int64)
        extra[has_more] = big[more]
        little[more] = extra[has_more].astype(np.uint32)
        length = np.where(kind <= _DATA_MAX, 4 + 4 * kind.astype(np.int64), 8)
        sized = ((kind == 0) | (kind == _PADDING)) & ~rest
        length[sized] = 4 + extra[sized]
        length[rest] = end[rest] - at[rest]
        if (length < 4).any() or (length & 3).any() or (at + length > end).any():
            raise SourceError("a page has an event of no valid length")
        payloads.append(at + np.where(kind == 0, 8, 4))
        kinds.append(kind)
        at = at + length
    if not payloads:
        return np.zeros(0, np.int64), np.zeros(0, np.uint32)
    return np.concatenate(payloads), np.concatenate(kinds)


def _turn(part: npt.NDArray[Any], size: int) -> None:
    """Reverse the first `size` bytes of each row."""
    part[:, :size] = part[:, :size][:, ::-1].copy()


def _turn_at(whole: Bytes, at: Ints, size: int) -> None:
    """Reverse `size` bytes at each offset; offsets outside the buffer are left for the decoder to refuse."""
    at = at[at + size <= len(whole)]
    places = at[:, None] + np.arange(size)
    whole[places] = whole[places[:, ::-1]]
