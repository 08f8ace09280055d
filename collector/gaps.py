"""Gaps where a ring lost events: the markers in the stream, and the number of lost events that each reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from contracts.hooks import Hook
from contracts.records import DTYPES, Batch

_MOST_LOST: Final = int(np.iinfo(DTYPES["l3_len"]).max)
"""Largest number of lost records that a marker's column can hold."""


def settle(counts: Sequence[int | None], outstanding: int) -> list[int]:
    """Return the number of lost events of each gap, in order, for gaps some of whose counts the kernel omitted.

    `outstanding` is the kernel's total minus the events already reported; it is never less than the sum of the gaps.
    The events that the known counts leave go to the first unknown gap, except for one event for each other unknown gap.
    If an earlier count was too high, because the total was ahead of the pages, later counts are lower. The sum is at
    most `outstanding`.
    """
    settled = []
    unknown = sum(count is None for count in counts)
    rest = max(outstanding - sum(count or 0 for count in counts), 0)
    left = max(outstanding, 0)
    for count in counts:
        if count is None:
            unknown -= 1
            count = max(rest - unknown, min(rest, 1))
            rest -= count
        settled.append(min(count, left))
        left -= settled[-1]
    return settled


def marker(cpu: int, ts_ns: int, lost: int, until_ns: int) -> Batch:
    """Make a batch of one `LOST` marker: `cpu` lost `lost` records after `ts_ns` and before `until_ns`."""
    columns: dict[str, Any] = {name: [value] for name, value in marker_columns(cpu, ts_ns, lost, until_ns).items()}
    return Batch.of(1, **columns)


def marker_columns(cpu: int, ts_ns: int, lost: int, until_ns: int) -> dict[str, int]:
    """Return name -> value of a `LOST` marker's columns that are not 0 (arguments as in `marker`)."""
    return {"ts_ns": ts_ns, "skb_id": until_ns, "cpu": cpu, "hook": Hook.LOST, "l3_len": min(lost, _MOST_LOST)}
