"""The kernel module's ABI as numpy dtypes and Python constants: the only Python file that knows byte offsets.

Written by hand after `kmod/uapi/mace.h`, which documents each field; `tests/contract/test_abi.py` compiles that header
and compares sizes and offsets. Names are the header's without the prefixes `mace_` and `MACE_`. `contracts.hooks`
defines the hook numbers, `contracts.records` the flags of records.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from enum import IntEnum, IntFlag
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from contracts import records

ABI_MAJOR: Final = 1
ABI_MINOR: Final = 2

DEVICE_NAME: Final = "mace"
HOOK_SLOTS: Final = 16
MAX_NETNS: Final = 16
MAX_DEVICES: Final = 16
MAX_SAMPLE_SHIFT: Final = 31
ALL_CPUS: Final = 0xFFFFFFFF


Flag = records.Flag
"""Bits of `RECORD["flags"]`."""


class HelloFlag(IntFlag):
    """Bits of `HELLO["flags"]`."""

    ALL = 0x1
    NETNS_GONE = 0x2
    COOKIES = 0x4


class SetupFlag(IntFlag):
    """Bits of `SETUP["flags"]`."""

    COOKIES = 0x1


class TakeFlag(IntFlag):
    """Bits of `TAKE["flags"]`."""

    FLUSH = 0x1


RECORD: Final[np.dtype[Any]] = np.dtype(
    [
        ("ts_ns", "<u8"),
        ("skb_id", "<u8"),
        ("packet_key", "<u8"),
        ("netns", "<u4"),
        ("ifindex", "<u4"),
        ("l3_len", "<u4"),
        ("l4_src", "<u2"),
        ("l4_dst", "<u2"),
        ("l4_seq", "<u4"),
        ("drop_reason", "<u4"),
        ("gso_segs", "<u2"),
        ("cpu", "<u2"),
        ("ip_id", "<u2"),
        ("vlan", "<u2"),
        ("hook", "u1"),
        ("ip_version", "u1"),
        ("l4_proto", "u1"),
        ("flags", "u1"),
        ("l4_bits", "u1"),
        ("pad", "u1", (3,)),
    ]
)
"""struct mace_record: one packet at one hook; 64 bytes."""

_FIELDS: Final[Mapping[str, Any]] = RECORD.fields or {}
_SEEN: Final[dict[str, tuple[str, Any]]] = {
    "ts_ns": ("ts_ns", "<i8"),
    "skb_id": ("skb_id", "<u8"),
    "place": ("netns", "<u8"),
    "l3_len": ("l3_len", "<u4"),
    "drop_reason": ("drop_reason", "<u4"),
    "gso_segs": ("gso_segs", "<u2"),
    "cpu": ("cpu", "<u2"),
    "hook": ("hook", "u1"),
    **{name: (name, dtype) for name, dtype in records.CONTENT_DTYPES.items()},
}
"""Batch column -> (field of `RECORD` where the column begins, dtype with which it is read)."""
COLUMNS: Final[np.dtype[Any]] = np.dtype(
    {
        "names": list(_SEEN),
        "formats": [dtype for _, dtype in _SEEN.values()],
        "offsets": [_FIELDS[field][1] for field, _ in _SEEN.values()],
        "itemsize": RECORD.itemsize,
    }
)
"""View of a 64-byte record as the columns of a batch and of its content; `place` is `netns | ifindex << 32`."""
WORDS: Final[np.dtype[Any]] = np.dtype(("<u8", (RECORD.itemsize // 8,)))
"""View of a record as eight uint64 words: n contiguous records form an array of shape (n, 8)."""


def columns(words: npt.NDArray[np.uint64]) -> dict[str, npt.NDArray[Any]]:
    """Return the fields of `COLUMNS` by name, each of shape (n,), as views of records stored word by word.

    `words` is (8, n) uint64 and contiguous: row i holds the i-th word of each record, as in the transpose of `WORDS`.
    """
    found = {}
    for name, (dtype, offset, *_) in (COLUMNS.fields or {}).items():
        number, inside = divmod(offset, 8)
        found[name] = words[number].view(dtype)[inside // dtype.itemsize :: 8 // dtype.itemsize]
    return found


SUBBUF: Final[np.dtype[Any]] = np.dtype(
    [
        ("sequence", "<u8"),
        ("lost", "<u8"),
        ("lost_from_ns", "<u8"),
        ("records", "<u4"),
        ("cpu", "<u4"),
        ("pad", "<u8", (4,)),
    ]
)
"""struct mace_subbuf: head of a sub-buffer; 64 bytes, the records follow."""

HELLO: Final[np.dtype[Any]] = np.dtype(
    [
        ("abi_major", "<u2"),
        ("abi_minor", "<u2"),
        ("record_bytes", "<u2"),
        ("subbuf_head_bytes", "<u2"),
        ("hooks", "<u4"),
        ("flags", "<u4"),
        ("netns", "<u4"),
        ("cpus", "<u4"),
        ("ring_bytes_min", "<u8"),
        ("ring_bytes_max", "<u8"),
        ("load_id", "<u8"),
        ("version", "S32"),
    ]
)
"""struct mace_hello: the module's version and limits, and what this session may read."""

DEVICE: Final[np.dtype[Any]] = np.dtype([("netns_fd", "<i4"), ("ifindex", "<u4")])
"""struct mace_device: a device whose packets pass the filter."""

FILTER: Final[np.dtype[Any]] = np.dtype(
    [
        ("hooks", "<u4"),
        ("sample_shift", "<u4"),
        ("netns_count", "<u4"),
        ("device_count", "<u4"),
        ("netns_fd", "<i4", (MAX_NETNS,)),
        ("device", DEVICE, (MAX_DEVICES,)),
        ("l4_protos", "<u8", (4,)),
    ]
)
"""struct mace_filter: hooks, namespaces, devices and protocols to record."""

SETUP: Final[np.dtype[Any]] = np.dtype(
    [
        ("abi_major", "<u2"),
        ("flags", "<u2"),
        ("subbuf_bytes", "<u4"),
        ("subbufs", "<u4"),
        ("watermark", "<u4"),
        ("flush_ms", "<u4"),
        ("pad2", "<u4"),
        ("filter", FILTER),
        ("ring_bytes", "<u8"),
        ("cpu_count", "<u4"),
        ("pad3", "<u4"),
    ]
)
"""struct mace_setup: the session's rings."""

PLACE_NAME: Final[np.dtype[Any]] = np.dtype([("netns", "<u4"), ("ifindex", "<u4")])
"""struct mace_place_name: a device, as records name it."""

PLACES: Final[np.dtype[Any]] = np.dtype(
    [
        ("netns_count", "<u4"),
        ("device_count", "<u4"),
        ("netns", "<u4", (MAX_NETNS,)),
        ("device", PLACE_NAME, (MAX_DEVICES,)),
    ]
)
"""struct mace_places: namespaces and devices at which a session records."""

TAKE: Final[np.dtype[Any]] = np.dtype(
    [
        ("cpu", "<u4"),
        ("flags", "<u4"),
        ("release", "<u4"),
        ("first", "<u4"),
        ("ready", "<u4"),
        ("pad", "<u4"),
        ("now_ns", "<u8"),
    ]
)
"""struct mace_take: releases the sub-buffers of one CPU's ring that were read and returns those that are ready."""

STATS: Final[np.dtype[Any]] = np.dtype(
    [("cpu", "<u4"), ("pad", "<u4"), ("written", "<u8", (HOOK_SLOTS,)), ("lost", "<u8", (HOOK_SLOTS,))]
)
"""struct mace_stats: records that this session wrote and lost on one CPU, per hook."""

COST: Final[np.dtype[Any]] = np.dtype(
    [
        ("every", "<u4"),
        ("pad", "<u4"),
        ("calls", "<u8", (HOOK_SLOTS,)),
        ("timed", "<u8", (HOOK_SLOTS,)),
        ("timed_ns", "<u8", (HOOK_SLOTS,)),
    ]
)
"""struct mace_cost: calls of the probes and time spent in them since the module was loaded, per hook."""

STRUCTS: Final[dict[str, np.dtype[Any]]] = {
    "mace_record": RECORD,
    "mace_subbuf": SUBBUF,
    "mace_hello": HELLO,
    "mace_device": DEVICE,
    "mace_filter": FILTER,
    "mace_setup": SETUP,
    "mace_place_name": PLACE_NAME,
    "mace_places": PLACES,
    "mace_take": TAKE,
    "mace_stats": STATS,
    "mace_cost": COST,
}
"""Name of the struct in `kmod/uapi/mace.h` -> its dtype."""

IOC_MAGIC: Final = 0xBE
_WRITE, _READ = 1, 2


def _ioc(direction: int, number: int, size: int) -> int:
    """Return an ioctl request as _IOC() of include/uapi/asm-generic/ioctl.h encodes it.

    powerpc, mips, sparc, alpha and parisc encode requests differently and are not supported.
    """
    return direction << 30 | size << 16 | IOC_MAGIC << 8 | number


class Ioctl(IntEnum):
    """Requests of ioctl(2) on the device."""

    HELLO = _ioc(_READ, 0, HELLO.itemsize)
    SETUP = _ioc(_READ | _WRITE, 1, SETUP.itemsize)
    START = _ioc(0, 2, 0)
    STOP = _ioc(0, 3, 0)
    TAKE = _ioc(_READ | _WRITE, 4, TAKE.itemsize)
    STATS = _ioc(_READ | _WRITE, 5, STATS.itemsize)
    COST = _ioc(_READ, 6, COST.itemsize)
    PLACES = _ioc(_WRITE, 7, PLACES.itemsize)


assert sys.byteorder == "little", "the module's memory is viewed as it is: MACE runs on little-endian machines"
