"""libbpf by ctypes: the calls that loading needs, and its errors as exceptions.

Every Debian and Ubuntu with iproute2 has the library; no compiler, header or Python binding is needed
(docs/design/022-bpf.md). Objects, programs and maps are libbpf's pointers, opaque here.
"""

from __future__ import annotations

import ctypes
import errno
import os
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from contracts.errors import Unavailable

_NAME: Final = "libbpf.so.1"
_VOID = ctypes.c_void_p
_INT = ctypes.c_int
_U32 = ctypes.c_uint32
_CALLS: Final[dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "libbpf_set_print": (_VOID, (_VOID,)),
    "libbpf_num_possible_cpus": (_INT, ()),
    "bpf_object__open_file": (_VOID, (ctypes.c_char_p, _VOID)),
    "bpf_object__load": (_INT, (_VOID,)),
    "bpf_object__close": (None, (_VOID,)),
    "bpf_object__find_program_by_name": (_VOID, (_VOID, ctypes.c_char_p)),
    "bpf_object__find_map_by_name": (_VOID, (_VOID, ctypes.c_char_p)),
    "bpf_program__set_autoload": (_INT, (_VOID, ctypes.c_bool)),
    "bpf_program__fd": (_INT, (_VOID,)),
    "bpf_program__attach": (_VOID, (_VOID,)),
    "bpf_link__destroy": (_INT, (_VOID,)),
    "bpf_map__fd": (_INT, (_VOID,)),
    "bpf_map__set_max_entries": (_INT, (_VOID, _U32)),
    "bpf_map__value_size": (_U32, (_VOID,)),
    "bpf_map__initial_value": (_VOID, (_VOID, ctypes.POINTER(ctypes.c_size_t))),
    "bpf_map_create": (_INT, (_INT, ctypes.c_char_p, _U32, _U32, _U32, _VOID)),
    "bpf_map_update_elem": (_INT, (_INT, _VOID, _VOID, ctypes.c_uint64)),
    "bpf_map_lookup_elem": (_INT, (_INT, _VOID, _VOID)),
    "bpf_obj_get_info_by_fd": (_INT, (_INT, _VOID, _VOID)),
    "bpf_enable_stats": (_INT, (_INT,)),
    "btf__load_vmlinux_btf": (_VOID, ()),
    "btf__free": (None, (_VOID,)),
    "btf__find_by_name_kind": (ctypes.c_int32, (_VOID, ctypes.c_char_p, _U32)),
    "btf__type_by_id": (ctypes.POINTER(_U32), (_VOID, _U32)),
}

_MAP_TYPE_RINGBUF: Final = 27
_KIND_TYPEDEF: Final = 8
_INFO_BYTES: Final = 224
"""Of struct bpf_prog_info, up to recursion_misses (Linux 5.12)."""


@dataclass(frozen=True, slots=True)
class Runs:
    """What the kernel counted of one program (struct bpf_prog_info)."""

    runs: int
    """While statistics were on."""
    run_ns: int
    """Time spent in these, ns."""
    missed: int
    """Calls that did not run, because the program was running on that CPU already; 0 before Linux 5.12."""


@cache
def library() -> Any:
    """libbpf. Raises `Unavailable` where it is missing."""
    try:
        found = ctypes.CDLL(_NAME, use_errno=True)
        for name, (result, arguments) in _CALLS.items():
            function = getattr(found, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise Unavailable("bpf", f"{_NAME} cannot be used: {error}", "install libbpf 1.0 or later (libbpf1)") from error
    # It would print its own words on standard error.
    found.libbpf_set_print(None)
    return found


def check(result: int) -> int:
    """The result of a call that returns a negative errno, or -1 and sets errno; raises OSError."""
    if result < 0:
        code = ctypes.get_errno() or -result
        raise OSError(code, os.strerror(code))
    return result


def pointer(result: int | None) -> int:
    """The result of a call that returns NULL and sets errno; raises OSError."""
    if not result:
        code = ctypes.get_errno() or errno.EINVAL
        raise OSError(code, os.strerror(code))
    return result


def create_ring(size: int) -> int:
    """The file descriptor of a new ring buffer of `size` bytes, a power of two and at least a page."""
    return check(library().bpf_map_create(_MAP_TYPE_RINGBUF, b"mace_ring", 0, 0, size, None))


def put(map_fd: int, number: int, value: int) -> None:
    """Set an element of an array of numbers or of maps (by their file descriptors)."""
    key, held = _U32(number), _U32(value)
    check(library().bpf_map_update_elem(map_fd, ctypes.byref(key), ctypes.byref(held), 0))


def runs_of(program_fd: int) -> Runs:
    """What the kernel counted of a program."""
    info = (ctypes.c_uint64 * (_INFO_BYTES // 8))()
    size = _U32(_INFO_BYTES)
    check(library().bpf_obj_get_info_by_fd(program_fd, info, ctypes.byref(size)))
    return Runs(runs=info[25], run_ns=info[24], missed=info[26])


class Btf:
    """The types of the kernel that runs. Raises OSError where it has none that can be read."""

    def __init__(self) -> None:
        self._library = library()
        self._btf = pointer(self._library.btf__load_vmlinux_btf())

    def close(self) -> None:
        self._library.btf__free(self._btf)

    def arguments_of(self, tracepoint: str) -> int:
        """How many arguments a tracepoint gives to a program; -1 if the kernel has none of this name."""
        number = self._library.btf__find_by_name_kind(self._btf, f"btf_trace_{tracepoint}".encode(), _KIND_TYPEDEF)
        if number < 0:
            return -1
        # struct btf_type: name_off, info, type. A typedef of a pointer to a function, whose first argument is
        # the probe's own data.
        of_pointer = self._library.btf__type_by_id(self._btf, number)[2]
        of_function = self._library.btf__type_by_id(self._btf, of_pointer)[2]
        return int(self._library.btf__type_by_id(self._btf, of_function)[1] & 0xFFFF) - 1
