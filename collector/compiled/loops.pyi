"""The functions of the compiled module.

All arrays are C-contiguous, and an array that a function fills has been allocated by the caller. All functions release
the GIL while they run. They raise `IndexError` for arrays whose lengths do not agree, before they read or write any of
their elements, and `MemoryError`.
"""

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from contracts.arrays import U64, Bytes, Ints

_U32: TypeAlias = npt.NDArray[np.uint32]

def decode(
    pages: Bytes,
    layout: tuple[int, int, int, int],
    stretches: Ints,
    first: Ints,
    hook_of_id: Bytes,
    formats: npt.NDArray[Any],
    key: tuple[int, int, int],
    columns: tuple[npt.NDArray[Any], ...],
) -> tuple[int, int, bytes]:
    """Decode the events of ring-buffer pages into columns; returns (records, skipped events, names).

    `layout` has a page's size and the offsets of time stamp, commit word and data, in bytes. `stretches`, [n, 3], has
    CPU, number of pages, and bytes of the first page's data to skip. `hook_of_id`, 65,536 elements, is 0 for an event
    that no hook has; `formats`, 256 elements of `collector.pages.decoding.FORMAT`, is indexed by hook. `key` is that of
    the buffer ids, its last two numbers odd.

    `columns` are those of `contracts.records.DTYPES`, with room for all events, and of one length. `dev` becomes an
    index into `names`, in which each name is 16 bytes, padded with NUL; the first is the empty name. `first`, one
    element more than pages, becomes the index of each page's first record and the number of records.

    Raises `ValueError`, with CPU and fault, for an invalid page.
    """

def locate(
    pages: Bytes,
    layout: tuple[int, int, int, int],
    stretches: Ints,
    first: Ints,
    columns: tuple[Ints, Ints, _U32],
) -> int:
    """Find the events of all kinds on ring-buffer pages, and return their number; arguments and errors as in `decode`.

    `columns` become the index of the word of `pages` at which each event's payload begins, its time in ns, and its
    payload's size in bytes.
    """

def distinct(low: U64, high: U64, index: _U32) -> bytes:
    """Return the names that occur, 16 bytes each, in order of appearance behind the empty name.

    A name is given as its bytes 0 to 7 and 8 to 15, little-endian. `index`, one element for each, becomes its place
    among the returned names.
    """
