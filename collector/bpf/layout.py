"""What the programs of `bpf/` and their loader agree on, as numpy sees it.

Written by hand after `bpf/mace_bpf.h`, which says what each field means; `tests/contract/test_bpf_layout.py` compiles
that header and compares. Records are those of `contracts.abi`.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from contracts.abi import HOOK_SLOTS, MAX_DEVICES, MAX_NETNS

CONFIG: Final[np.dtype[Any]] = np.dtype(
    [
        ("skb_key", "<u8", (2,)),
        ("netns", "<u8", (MAX_NETNS,)),
        ("place_netns", "<u8", (MAX_DEVICES,)),
        ("l4_protos", "<u8", (4,)),
        ("place_ifindex", "<u4", (MAX_DEVICES,)),
        ("netns_count", "<u4"),
        ("place_count", "<u4"),
        ("sample_mask", "<u4"),
        ("wake_every", "<u4"),
        ("l4_filtered", "<u4"),
        ("cookies", "<u4"),
    ]
)
"""struct mace_config: what a session wants."""

STATE: Final[np.dtype[Any]] = np.dtype([("recording", "<u4"), ("pad", "<u4"), ("nothing", "<u8")])
"""struct mace_state: what changes while the programs are loaded."""

COUNTS: Final[np.dtype[Any]] = np.dtype(
    [
        ("calls", "<u8", (HOOK_SLOTS,)),
        ("lost", "<u8", (HOOK_SLOTS,)),
        ("lost_all", "<u8"),
        ("since_wake", "<u8"),
    ]
)
"""struct mace_counts: what a CPU counted."""

STRUCTS: Final[dict[str, np.dtype[Any]]] = {"mace_config": CONFIG, "mace_state": STATE, "mace_counts": COUNTS}
"""The header's name of each."""

LOST_BITS: Final = 24
"""Of the count of lost records that the pad of a record holds."""
