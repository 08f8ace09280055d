"""Settings of the C library's allocator for large arrays that are allocated again and again."""

from __future__ import annotations

from typing import Final

import numpy as np

_KEPT_BYTES: Final = 24 << 20
"""Largest array that malloc then keeps: glibc raises its threshold for mappings to the size of the largest one that was
freed, up to 32 MiB (mallopt(3), M_MMAP_THRESHOLD)."""


def keep_freed_memory() -> None:
    """Make the C library keep the memory of freed arrays instead of returning it to the kernel each time.

    Every tick allocates its columns anew. Measured on a virtual machine, where page faults are expensive: without this
    call a third of a capture's CPU time went into page faults.
    """
    np.empty(_KEPT_BYTES, np.uint8)
