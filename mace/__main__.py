"""`mace`, and `python -m mace`: the command line, in a process whose memory stays flat for weeks."""

import os
import sys
from importlib import import_module
from typing import Final

from mace.shown import streams

_ALLOCATOR: Final = "ARROW_DEFAULT_MEMORY_POOL"
"""Arrow's own variable: who has set it has chosen."""


def main() -> int:
    """Run one command; returns the exit status."""
    streams.claim()
    _import_arrow()
    from mace import cli  # noqa: PLC0415 (it imports Arrow too)

    return cli.main()


def _import_arrow() -> None:
    """Have Arrow take its memory from jemalloc, which it decides on while it is imported.

    mimalloc 2.2, which it takes by itself since its release 21, holds on to more with each merge of segments
    (apache/arrow#47266), where jemalloc is flat; docs/design/006-store.md has the figures.
    """
    if _ALLOCATOR in os.environ:
        return
    os.environ[_ALLOCATOR] = "jemalloc"
    try:
        import_module("pyarrow")
    finally:
        # Not for the tools that a command starts.
        del os.environ[_ALLOCATOR]


if __name__ == "__main__":
    sys.exit(main())
