"""Memory that the columns of a stream take, again and again."""

from __future__ import annotations

from typing import Final

import numpy as np

_KEPT_BYTES: Final = 24 << 20
"""glibc's malloc learns from the largest mapping that it saw freed, up to 32 MiB (mallopt(3), M_MMAP_THRESHOLD)."""


def keep_freed_memory() -> None:
    """Let the C library keep freed memory instead of giving each large array back to the kernel and asking again.

    The columns of a tick are made anew each time. Measured on a virtual machine, where a page fault is dear: without
    this a third of all CPU time of a capture went into page faults.
    """
    np.empty(_KEPT_BYTES, np.uint8)
