"""Which allocator Arrow takes its memory from, in a process that stores for long."""

from __future__ import annotations

import os
from typing import Final

import pyarrow as pa

_CHOICE: Final = "ARROW_DEFAULT_MEMORY_POOL"
"""Arrow's own variable: who has set it has chosen."""


def hold_little() -> None:
    """Let Arrow take jemalloc where it has it, from now on and for the whole process.

    What Arrow takes by itself since its release 21, mimalloc 2.2, holds on to more with each merge of segments
    (apache/arrow#47266): 30 to 60 MB after ten minutes, where jemalloc is flat. docs/design/006-store.md has the figures.
    """
    if _CHOICE not in os.environ and "jemalloc" in pa.supported_memory_backends():
        pa.set_memory_pool(pa.jemalloc_memory_pool())
