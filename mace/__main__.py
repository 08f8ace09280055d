"""`mace`, and `python -m mace`: the command line, in a process whose memory stays flat for weeks."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Final

from mace.shown import streams

_ALLOCATOR: Final = "ARROW_DEFAULT_MEMORY_POOL"
"""Arrow's own variable: who has set it has chosen."""


def main() -> int:
    """Run one command; returns the exit status."""
    streams.claim()
    if "pyarrow" not in sys.modules:
        sys.meta_path.insert(0, _ArrowFinder())
    from mace import cli  # noqa: PLC0415 (opens files, so the streams are claimed first)

    if "_ARGCOMPLETE" in os.environ:
        cli.complete()
    return cli.main()


class _ArrowFinder:
    """Has Arrow take its memory from jemalloc, which it decides on while it is imported, whoever imports it first.

    mimalloc 2.2, which it takes by itself since its release 21, holds on to more with each merge of segments
    (apache/arrow#47266), where jemalloc is flat; docs/design/006-store.md has the figures.

    Arrow takes a third of a second and 40 MiB to import, so it is left to the commands that need it.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "pyarrow":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader) and _ALLOCATOR not in os.environ:
            spec.loader = _ArrowLoader(spec.loader.name, spec.loader.path)
        return spec


class _ArrowLoader(SourceFileLoader):
    """Loads Arrow with `_ALLOCATOR` set, which is not for the tools that a command starts."""

    def exec_module(self, module: ModuleType) -> None:
        os.environ[_ALLOCATOR] = "jemalloc"
        try:
            super().exec_module(module)
        finally:
            del os.environ[_ALLOCATOR]


if __name__ == "__main__":
    sys.exit(main())
