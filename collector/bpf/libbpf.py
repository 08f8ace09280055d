"""Calls of libbpf through ctypes, with its errors turned into exceptions.

Every Debian and Ubuntu with iproute2 has the library. The calls need no compiler, header or Python binding
(docs/design/022-bpf.md). Objects, programs, links and maps are opaque pointers of libbpf, passed as integers.
"""

from __future__ import annotations

import ctypes
import errno
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from collector.bpf import refusal
from contracts.errors import Unavailable

BTF: Final = Path("/sys/kernel/btf/vmlinux")
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
    "bpf_object__next_program": (_VOID, (_VOID, _VOID)),
    "bpf_object__next_map": (_VOID, (_VOID, _VOID)),
    "bpf_object__find_program_by_name": (_VOID, (_VOID, ctypes.c_char_p)),
    "bpf_object__find_map_by_name": (_VOID, (_VOID, ctypes.c_char_p)),
    "bpf_program__name": (ctypes.c_char_p, (_VOID,)),
    "bpf_program__set_autoload": (_INT, (_VOID, ctypes.c_bool)),
    "bpf_program__set_log_buf": (_INT, (_VOID, _VOID, ctypes.c_size_t)),
    "bpf_program__fd": (_INT, (_VOID,)),
    "bpf_program__attach": (_VOID, (_VOID,)),
    "bpf_link__destroy": (_INT, (_VOID,)),
    "bpf_map__fd": (_INT, (_VOID,)),
    "bpf_map__name": (ctypes.c_char_p, (_VOID,)),
    "bpf_map__reuse_fd": (_INT, (_VOID, _INT)),
    "bpf_map__set_autocreate": (_INT, (_VOID, ctypes.c_bool)),
    "bpf_map__set_max_entries": (_INT, (_VOID, _U32)),
    "bpf_map__set_inner_map_fd": (_INT, (_VOID, _INT)),
    "bpf_map__value_size": (_U32, (_VOID,)),
    "bpf_map__initial_value": (_VOID, (_VOID, ctypes.POINTER(ctypes.c_size_t))),
    "bpf_map_create": (_INT, (_INT, ctypes.c_char_p, _U32, _U32, _U32, _VOID)),
    "bpf_map_update_elem": (_INT, (_INT, _VOID, _VOID, ctypes.c_uint64)),
    "bpf_map_lookup_elem": (_INT, (_INT, _VOID, _VOID)),
    "bpf_prog_load": (_INT, (_INT, ctypes.c_char_p, ctypes.c_char_p, _VOID, ctypes.c_size_t, _VOID)),
    "bpf_raw_tracepoint_open": (_INT, (ctypes.c_char_p, _INT)),
    "bpf_prog_test_run_opts": (_INT, (_INT, _VOID)),
    "bpf_obj_get_info_by_fd": (_INT, (_INT, _VOID, _VOID)),
    "bpf_enable_stats": (_INT, (_INT,)),
    "btf__load_vmlinux_btf": (_VOID, ()),
    "btf__free": (None, (_VOID,)),
    "btf__find_by_name_kind": (ctypes.c_int32, (_VOID, ctypes.c_char_p, _U32)),
    "btf__type_by_id": (ctypes.POINTER(_U32), (_VOID, _U32)),
}

_MAP_TYPE_ARRAY: Final = 2
_MAP_TYPE_RINGBUF: Final = 27
_MMAPABLE: Final = 1 << 10
_KIND_TYPEDEF: Final = 8
_KIND_FUNC: Final = 12
_PROG_TYPE_TRACING: Final = 26
_TRACE_FENTRY: Final = 24
_RETURN_0: Final = bytes.fromhex("b7000000000000009500000000000000")
"""Instructions of a program that does nothing: r0 = 0; exit."""
_INFO_BYTES: Final = 224
"""Bytes of struct bpf_prog_info to query: recursion_misses (Linux 5.12) ends at 216."""


class _LoadOptions(ctypes.Structure):
    """The start of struct bpf_prog_load_opts; libbpf takes the rest to be 0."""

    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("attempts", _INT),
        ("expected_attach_type", _U32),
        ("prog_btf_fd", _U32),
        ("prog_flags", _U32),
        ("prog_ifindex", _U32),
        ("kern_version", _U32),
        ("attach_btf_id", _U32),
        ("attach_prog_fd", _U32),
        ("attach_btf_obj_fd", _U32),
    )


@dataclass(frozen=True, slots=True)
class Runs:
    """The kernel's counts for one program (struct bpf_prog_info)."""

    runs: int
    """Number of runs while the kernel's statistics were on."""
    run_ns: int
    """Time spent in these runs, ns."""
    missed: int
    """Calls that the kernel skipped because the program was already running on that CPU; 0 before Linux 5.12."""

    def __add__(self, other: Runs) -> Runs:
        """Return the counts of two programs together."""
        return Runs(self.runs + other.runs, self.run_ns + other.run_ns, self.missed + other.missed)


@cache
def library() -> Any:
    """Return libbpf, with the types of its functions set; raises `Unavailable` if it is missing or too old."""
    try:
        found = ctypes.CDLL(_NAME, use_errno=True)
        for name, (result, arguments) in _CALLS.items():
            function = getattr(found, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise Unavailable("bpf", f"{_NAME} cannot be used: {error}", "install libbpf 1.0 or later (libbpf1)") from error
    # Without this call libbpf prints its own messages on standard error.
    found.libbpf_set_print(None)
    return found


def check(result: int) -> int:
    """Return the result of a libbpf call; raises `OSError` if it is negative: -errno, or -1 with errno set."""
    if result < 0:
        code = ctypes.get_errno() or -result
        raise OSError(code, os.strerror(code))
    return result


def pointer(result: int | None) -> int:
    """Return the pointer that a libbpf call returned; raises `OSError` by the call's errno if it is NULL."""
    if not result:
        code = ctypes.get_errno() or errno.EINVAL
        raise OSError(code, os.strerror(code))
    return result


class _MapOptions(ctypes.Structure):
    """struct bpf_map_create_opts of libbpf 1.0."""

    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("btf_fd", _U32),
        ("btf_key_type_id", _U32),
        ("btf_value_type_id", _U32),
        ("btf_vmlinux_value_type_id", _U32),
        ("inner_map_fd", _U32),
        ("map_flags", _U32),
        ("map_extra", ctypes.c_uint64),
        ("numa_node", _U32),
        ("map_ifindex", _U32),
    )


def create_ring_buffer(size: int) -> int:
    """Create a BPF ring buffer of `size` bytes and return its file descriptor; raises `OSError`.

    The size is a power of two and at least one page.
    """
    return check(library().bpf_map_create(_MAP_TYPE_RINGBUF, b"mace_ring", 0, 0, size, None))


def create_mapped(size: int) -> int:
    """Create an array of one element of `size` bytes that can be mapped, and return its file descriptor.

    Raises `OSError`.
    """
    options = _MapOptions(sz=ctypes.sizeof(_MapOptions), map_flags=_MMAPABLE)
    create = library().bpf_map_create
    return check(create(_MAP_TYPE_ARRAY, b"mace_ring", ctypes.sizeof(_U32), size, 1, ctypes.byref(options)))


def put(map_fd: int, number: int, value: int) -> None:
    """Set element `number` of an array map to `value`; raises `OSError`.

    The value of an array of maps is the file descriptor of a map.
    """
    key, held = _U32(number), _U32(value)
    check(library().bpf_map_update_elem(map_fd, ctypes.byref(key), ctypes.byref(held), 0))


def runs_of(program_fd: int) -> Runs:
    """Return the kernel's counts for the program of a file descriptor; raises `OSError`."""
    info = (ctypes.c_uint64 * (_INFO_BYTES // 8))()
    size = _U32(_INFO_BYTES)
    check(library().bpf_obj_get_info_by_fd(program_fd, info, ctypes.byref(size)))
    return Runs(runs=info[25], run_ns=info[24], missed=info[26])


class _TestRun(ctypes.Structure):
    """struct bpf_test_run_opts of libbpf 1.0."""

    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("data_in", _VOID),
        ("data_out", _VOID),
        ("data_size_in", _U32),
        ("data_size_out", _U32),
        ("ctx_in", _VOID),
        ("ctx_out", _VOID),
        ("ctx_size_in", _U32),
        ("ctx_size_out", _U32),
        ("retval", _U32),
        ("repeat", _INT),
        ("duration", _U32),
        ("flags", _U32),
        ("cpu", _U32),
        ("batch_size", _U32),
    )


def run(program_fd: int, argument: int) -> int:
    """Run a raw tracepoint's program once, with one argument, and return what it returns; raises `OSError`."""
    context = ctypes.c_uint64(argument)
    options = _TestRun(sz=ctypes.sizeof(_TestRun), ctx_in=ctypes.addressof(context), ctx_size_in=8)
    check(library().bpf_prog_test_run_opts(program_fd, ctypes.byref(options)))
    return int(options.retval)


class Btf:
    """The type information (BTF) of the running kernel.

    The constructor raises `Unavailable` if libbpf is missing, or the kernel's BTF is missing or unreadable.
    """

    def __init__(self) -> None:
        self._library = library()
        if not BTF.exists():
            raise Unavailable(
                "bpf", f"this kernel has no BTF: {BTF} does not exist", "a kernel with CONFIG_DEBUG_INFO_BTF"
            )
        try:
            self._btf = pointer(self._library.btf__load_vmlinux_btf())
        except OSError as error:
            raise Unavailable("bpf", f"{BTF} cannot be read: {error.strerror}", refusal.RIGHTS) from error

    def close(self) -> None:
        """Free the type information."""
        self._library.btf__free(self._btf)

    def has_function(self, name: str) -> bool:
        """Return whether the kernel has the function, for programs to call."""
        return bool(self._library.btf__find_by_name_kind(self._btf, name.encode(), _KIND_FUNC) > 0)

    def try_function(self, name: str) -> None:
        """Attach an empty program to the start of a function of the kernel, and detach it; raises `OSError`.

        The kernel can refuse to load such a program (a security policy), or to attach it (no ftrace, or an architecture
        without direct calls).
        """
        number = check(self._library.btf__find_by_name_kind(self._btf, name.encode(), _KIND_FUNC))
        options = _LoadOptions(sz=ctypes.sizeof(_LoadOptions), expected_attach_type=_TRACE_FENTRY, attach_btf_id=number)
        fd = check(
            self._library.bpf_prog_load(
                _PROG_TYPE_TRACING, b"mace_try", b"GPL", _RETURN_0, len(_RETURN_0) // 8, ctypes.byref(options)
            )
        )
        try:
            os.close(check(self._library.bpf_raw_tracepoint_open(None, fd)))
        finally:
            os.close(fd)

    def arguments_of(self, tracepoint: str) -> int:
        """Return the number of arguments that a tracepoint passes to a program; -1 if the kernel lacks it."""
        number = self._library.btf__find_by_name_kind(self._btf, f"btf_trace_{tracepoint}".encode(), _KIND_TYPEDEF)
        if number < 0:
            return -1
        # struct btf_type is name_off, info, type. btf_trace_NAME is a typedef of a pointer to a function, whose first
        # argument is the probe's own data.
        of_pointer = self._library.btf__type_by_id(self._btf, number)[2]
        of_function = self._library.btf__type_by_id(self._btf, of_pointer)[2]
        return int(self._library.btf__type_by_id(self._btf, of_function)[1] & 0xFFFF) - 1
