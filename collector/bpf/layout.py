"""numpy dtypes of the structs that the programs in `bpf/` share with their loader.

This file mirrors `bpf/mace_bpf.h` by hand; the header documents each field. `tests/contract/test_bpf_layout.py`
compiles the header and compares the two. The record has the dtype `contracts.abi.RECORD`.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, Final

import numpy as np

from contracts.abi import HOOK_SLOTS, MAX_DEVICES, MAX_NETNS

CONFIG: Final[np.dtype[Any]] = np.dtype(
    [
        ("skb_key", "<u8", (2,)),
        ("l4_protos", "<u8", (4,)),
        ("sample_mask", "<u4"),
        ("wake_every", "<u4"),
        ("l4_filtered", "<u4"),
        ("place_filtered", "<u4"),
        ("cookies", "<u4"),
        ("paged", "<u4"),
        ("ring_slots", "<u4"),
        ("hooks", "<u4"),
    ]
)
"""struct mace_config: a session's filter and settings."""

STATE: Final[np.dtype[Any]] = np.dtype(
    [
        ("recording", "<u4"),
        ("pad", "<u4"),
        ("nothing", "<u8"),
        ("netns", "<u8", (MAX_NETNS,)),
        ("device", "<u8", (MAX_DEVICES,)),
        ("netns_count", "<u4"),
        ("device_count", "<u4"),
    ]
)
"""struct mace_state: the variables that the loader writes while the programs are loaded."""

COUNTS: Final[np.dtype[Any]] = np.dtype(
    [
        ("calls", "<u8", (HOOK_SLOTS,)),
        ("lost", "<u8", (HOOK_SLOTS,)),
        ("lost_all", "<u8"),
        ("since_wake", "<u8"),
    ]
)
"""struct mace_counts: one CPU's counts."""

WALK_DEVICES: Final = 64
"""MACE_WALK_DEVICES: number of elements of the map `mace_netdevs`."""


class Walked(IntEnum):
    """enum mace_walked: what the program `walk_devices` returns."""

    DONE = 0
    MORE = 1
    LOST = 2


NETDEV: Final[np.dtype[Any]] = np.dtype(
    [
        ("netns_cookie", "<u8"),
        ("netns", "<u4"),
        ("proc_stat", "<u4"),
        ("ifindex", "<u4"),
        ("peer_netns", "<u4"),
        ("peer_ifindex", "<u4"),
        ("lower_netns", "<u4"),
        ("lower_ifindex", "<u4"),
        ("master_ifindex", "<u4"),
        ("type", "<u2"),
        ("initial", "<u2"),
        ("pad", "<u4"),
        ("name", "S16"),
        ("kind", "S16"),
    ]
)
"""struct mace_netdev: a device."""

RING: Final[np.dtype[Any]] = np.dtype([("head", "<u8"), ("tail", "<u8"), ("pad", "<u8", (6,))])
"""struct mace_ring: the head of a CPU's ring, in an array that the reader maps."""

STRUCTS: Final[dict[str, np.dtype[Any]]] = {
    "mace_config": CONFIG,
    "mace_state": STATE,
    "mace_counts": COUNTS,
    "mace_netdev": NETDEV,
    "mace_ring": RING,
}
"""Dtype of each struct, by the struct's name in the header."""

WRITTEN: Final = 0x80
"""MACE_WRITTEN: bit of a record's field `hook` in a slot of struct mace_ring that is completely written."""

NO_PLACE: Final = (1 << 64) - 1
"""MACE_NO_PLACE: an element of `netns` or `device` that is not in use."""

LOST_BITS: Final = 24
"""Bits of the CPU's count of lost records that the pad of a record holds, the lowest ones."""
