"""The object file of the BPF programs: opens it, and loads some of its programs and maps into the kernel."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from collector.bpf import refusal
from collector.bpf.libbpf import Btf, check, library, pointer
from contracts.errors import SourceError, Unavailable

_LOG = logging.getLogger(__name__)

OBJECT: Final = Path(__file__).parent / "mace.bpf.o"
"""The object file that `bpf/Makefile` builds; it is package data."""
OLD_OBJECT: Final = OBJECT.with_name("mace_old.bpf.o")
"""The object file for kernels before Linux 6.2, built and shipped beside `OBJECT`."""
_WHAT: Final = "bpf"
_LOG_BYTES: Final = 16 << 20
"""Room for the verifier's log of one path: 0.1 MB is usual. Only written pages take memory."""
_OTHER_VERSION: Final = "they belong to another version of MACE; rebuild them: `make -C bpf -B`"


def has_functions(*names: str) -> bool:
    """Return whether the running kernel has these functions for programs; raises `Unavailable` without its BTF."""
    btf = Btf()
    try:
        return all(btf.has_function(name) for name in names)
    finally:
        btf.close()


class BpfObject:
    """An opened object file, whose programs and maps are addressed by name.

    On a kernel before Linux 6.2 it is the file `OLD_OBJECT` in the folder of `path`, else the file at `path`; `old`
    spares the look at the kernel.

    The constructor raises `Unavailable` if the file is missing or no BPF object. A name that the object lacks raises
    `SourceError`, because the file then belongs to another version of MACE.
    """

    def __init__(self, path: Path = OBJECT, *, old: bool | None = None) -> None:
        self._library = library()
        self._object = 0
        self._selected: tuple[str, ...] = ()
        self.old: Final = not has_functions("bpf_rdonly_cast") if old is None else old
        """Whether this is the object for kernels before Linux 6.2."""
        if self.old:
            path = path.with_name(OLD_OBJECT.name)
        try:
            self._object = pointer(self._library.bpf_object__open_file(os.fsencode(path), None))
        except OSError as error:
            if not path.exists():
                raise Unavailable(
                    _WHAT,
                    f"the programs are not built: {path} does not exist",
                    "`./dev setup`, with clang and libbpf-dev",
                ) from error
            raise Unavailable(
                _WHAT, f"{path} is no BPF object: {error.strerror}", "rebuild it: `make -C bpf -B`"
            ) from error

    def close(self) -> None:
        """Unload the programs and free the maps; a second call has no effect."""
        opened, self._object = self._object, 0
        if opened:
            self._library.bpf_object__close(opened)

    def select(self, programs: Collection[str]) -> None:
        """Let `load` load these programs and no other; raises `SourceError` for a missing one, and `OSError`."""
        self._selected = tuple(programs)
        for name in programs:
            self.program(name)
        for program in self._all(self._library.bpf_object__next_program):
            name = self._library.bpf_program__name(program).decode()
            check(self._library.bpf_program__set_autoload(program, name in programs))

    def select_maps(self, maps: Collection[str]) -> None:
        """Let `load` create these maps and no other; raises `SourceError` for a missing one, and `OSError`."""
        for name in maps:
            self.map(name)
        for one in self._all(self._library.bpf_object__next_map):
            check(self._library.bpf_map__set_autocreate(one, self._library.bpf_map__name(one).decode() in maps))

    def share_maps(self, other: BpfObject) -> None:
        """Let `load` create no map, but use those of `other`: the same file, loaded. Raises `OSError`."""
        for one in self._all(self._library.bpf_object__next_map):
            name = self._library.bpf_map__name(one).decode()
            check(self._library.bpf_map__reuse_fd(one, other.map_fd(name)))

    def _all(self, following: Any) -> Iterator[int]:
        one = following(self._object, None)
        while one:
            yield one
            one = following(self._object, one)

    def load(self) -> None:
        """Load the selected programs, and create the selected maps; raises `Unavailable`.

        If the kernel refuses a program, libbpf loads it once more, with the verifier's log.
        """
        with mmap.mmap(-1, _LOG_BYTES) as memory:
            log = (ctypes.c_char * _LOG_BYTES).from_buffer(memory)
            for name in self._selected:
                check(self._library.bpf_program__set_log_buf(self.program(name), log, _LOG_BYTES))
            loaded = self._library.bpf_object__load(self._object)
            code = ctypes.get_errno() or -loaded
            told = log.value.decode(errors="replace")
            del log
        if loaded < 0:
            _LOG.debug("bpf: the verifier's log: %s", told or "none")
            error = OSError(code, os.strerror(code))
            raise refusal.of_programs(error, told) from error

    def program(self, name: str) -> int:
        """Return libbpf's pointer to a program."""
        try:
            return pointer(self._library.bpf_object__find_program_by_name(self._object, name.encode()))
        except OSError as error:
            raise SourceError(f"bpf: the object file has no program {name}: {_OTHER_VERSION}") from error

    def program_fd(self, name: str) -> int:
        """Return the file descriptor of a loaded program; raises `OSError`."""
        return check(self._library.bpf_program__fd(self.program(name)))

    def map(self, name: str) -> int:
        """Return libbpf's pointer to a map."""
        found = self._library.bpf_object__find_map_by_name(self._object, name.encode())
        if not found:
            raise SourceError(f"bpf: the programs have no map {name}: {_OTHER_VERSION}")
        return int(found)

    def map_fd(self, name: str) -> int:
        """Return the file descriptor of a created map; raises `OSError`."""
        return check(self._library.bpf_map__fd(self.map(name)))

    def memory_of(self, section: str, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """Return the start of a section's global data as `dtype`, a writable view of libbpf's copy.

        Loading copies this memory into the map, so the programs see what was written here before.
        """
        size = ctypes.c_size_t()
        at = pointer(self._library.bpf_map__initial_value(self.map(section), ctypes.byref(size)))
        if size.value < dtype.itemsize:
            raise SourceError(
                f"bpf: the programs' section {section} has {size.value} bytes, expected at least {dtype.itemsize}:"
                f" {_OTHER_VERSION}"
            )
        memory = memoryview((ctypes.c_uint8 * dtype.itemsize).from_address(at)).cast("B")
        found: npt.NDArray[Any] = np.frombuffer(memory, dtype).reshape(())
        return found
