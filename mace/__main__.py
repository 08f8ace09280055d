"""Entry point of `mace` and `python -m mace`: chooses Arrow's allocator, so that memory stays flat for weeks."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Final

from mace.shown import streams

_ALLOCATOR: Final = "ARROW_DEFAULT_MEMORY_POOL"
"""Arrow's own variable. A value that the user has set is kept."""


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
    """Import hook that makes Arrow use jemalloc, and do without pandas.

    Arrow chooses its allocator while it is imported, by any module.

    Since release 21 Arrow's default is mimalloc 2.2, whose memory grows with each merge of segments
    (apache/arrow#47266); with jemalloc it stays flat. docs/design/006-store.md has the figures.

    A hook and not an import: importing Arrow costs a third of a second and 40 MiB, which only some commands need.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "pyarrow":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _ArrowLoader(spec.loader.name, spec.loader.path)
        return spec


class _ArrowLoader(SourceFileLoader):
    """Loads Arrow with `_ALLOCATOR` set, and unsets it afterwards, so that child processes do not inherit it.

    Arrow also looks for pandas when it makes its first array, to recognise arrays of pandas. Where pandas is installed,
    importing it would cost 0.8 s and 53 MiB, and no command has such arrays.
    """

    def exec_module(self, module: ModuleType) -> None:
        chosen = _ALLOCATOR in os.environ
        os.environ.setdefault(_ALLOCATOR, "jemalloc")
        try:
            super().exec_module(module)
        finally:
            if not chosen:
                del os.environ[_ALLOCATOR]
        without = _WithoutPandas()
        sys.meta_path.insert(0, without)
        try:
            module.array([])
        finally:
            sys.meta_path.remove(without)


class _WithoutPandas:
    """Import hook that refuses to import pandas."""

    def find_spec(
        self, fullname: str, _path: Sequence[str] | None = None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "pandas":
            raise ModuleNotFoundError("Arrow needs no pandas here", name=fullname)
        return None


if __name__ == "__main__":
    sys.exit(main())
