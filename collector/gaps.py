"""Where a ring lost events: markers in the stream, and how many each stands for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from contracts.hooks import Hook
from contracts.records import DTYPES, Batch

_MOST_LOST: Final = int(np.iinfo(DTYPES["l3_len"]).max)
"""What the column of a marker can hold."""


def settle(counts: Sequence[int | None], outstanding: int) -> list[int]:
    """Lost events of some gaps in order, where the kernel left some counts out.

    `outstanding` is the kernel's total less all that was told before: never less than the gaps' sum. What the known
    ones leave goes to the first unknown gap but for one event each for the others. A count given too high before
    (the total ran ahead of the pages) is made up for by later ones. The sum is at most `outstanding`.
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
    """A batch of one `LOST` marker: `cpu` lost so many records after `ts_ns` and before `until_ns`."""
    columns: dict[str, Any] = {name: [value] for name, value in marker_columns(cpu, ts_ns, lost, until_ns).items()}
    return Batch.of(1, **columns)


def marker_columns(cpu: int, ts_ns: int, lost: int, until_ns: int) -> dict[str, int]:
    """The columns of such a marker that say something."""
    return {"ts_ns": ts_ns, "skb_id": until_ns, "cpu": cpu, "hook": Hook.LOST, "l3_len": min(lost, _MOST_LOST)}
