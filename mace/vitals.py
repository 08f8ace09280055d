"""What a running MACE knows of itself: the accounts of its sinks, its channels, and when it last got on.

Filled by those who do the work, read by those who tell of it (`mace_internal`, the Prometheus endpoint, health).
"""

from __future__ import annotations

import os
import resource
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Final

from mace.errors import UsageError

_REASONS: Final = 16
"""Different reasons that an account remembers; a server can put anything into its messages."""


@dataclass(slots=True)
class Account:
    """Where a sink's rows went. Each row taken is in exactly one of the categories.

        taken = stored + waiting + refused + over_budget + dropped_buffer + dropped_spool + left_out

    The fields are those of `mace.metrics.SINK_FIELDS`, which tells what they mean.
    """

    taken: int = 0
    stored: int = 0
    waiting: int = 0
    refused: int = 0
    over_budget: int = 0
    dropped_buffer: int = 0
    dropped_spool: int = 0
    left_out: int = 0
    attempts: int = 0
    retries: int = 0
    buffer_peak: int = 0
    spool_bytes: int = 0
    series: int = 0
    delivery_ns: int = 0
    connected: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    """Rows that were not stored, and failed requests, by what was said of them."""
    trouble: str = ""
    """Why the last request failed; empty after one that did not."""

    @property
    def imbalance(self) -> int:
        """Rows that are in no category; anything but 0 is a defect."""
        return self.taken - self.stored - self.waiting - self.not_stored - self.left_out

    @property
    def not_stored(self) -> int:
        """Rows that were meant to be stored and never will be."""
        return self.refused + self.over_budget + self.dropped_buffer + self.dropped_spool

    def note(self, reason: str, count: int = 1) -> bool:
        """Count a reason; whether it is new, and so worth saying."""
        new = reason not in self.reasons
        if new and len(self.reasons) >= _REASONS:
            reason = "other reasons"
            new = False
        self.reasons[reason] += count
        return new

    def as_dict(self) -> dict[str, int]:
        """The counts by name, without the reasons."""
        return {name: getattr(self, name) for name in ACCOUNT_FIELDS}

    def __add__(self, other: Account) -> Account:
        """Of one run and the next: counts add up, and the later one, which found what waited, says how it is now."""
        both = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(Account) if f.type == "int"}
        latest = {
            name: getattr(other, name) for name in ("waiting", "spool_bytes", "series", "delivery_ns", "connected")
        }
        both |= latest
        both["taken"] -= self.waiting
        both["buffer_peak"] = max(self.buffer_peak, other.buffer_peak)
        return Account(**both, reasons=self.reasons + other.reasons, trouble=other.trouble)

    def why(self) -> str:
        """What was said of rows that were not stored and of requests that failed, most frequent first."""
        return "; ".join(f"{reason} ({count:,})" for reason, count in self.reasons.most_common()) or "see the log"

    def line(self) -> str:
        """All of it that is not 0, in one line for people."""
        told = ("taken", "stored", "waiting", "refused", "over_budget", "dropped_buffer", "dropped_spool", "left_out")
        counts = {name: getattr(self, name) for name in told}
        shown = (f"{name.replace('_', ' ')} {n:,}" for name, n in counts.items() if n or name in {"taken", "stored"})
        return " · ".join(shown) + (f" · {self.trouble}" if self.trouble else "")


ACCOUNT_FIELDS: Final = tuple(name for name in Account.__slots__ if name not in {"reasons", "trouble"})


@dataclass(frozen=True, slots=True)
class Publishing:
    """What became of the records that a host publishes for an ingest elsewhere.

    found in the spool + records = arrived + waiting + discarded + set_aside
    """

    records: int = 0
    """Taken over in this run."""
    arrived: int = 0
    """The ingest says that it has them."""
    waiting: int = 0
    """In the spool or on the way."""
    discarded: int = 0
    """Given up for want of room, or damaged on the disk."""
    set_aside: int = 0
    """In frames that cannot be sent (of another version, of a stream whose beginning is missing) or that the ingest
    refuses for what is in them."""
    connected: bool = False
    answered: bool = False
    """The broker has taken us in once at least since the run began."""
    taken_over: int = 0
    """Times that another client of the same name took the session over."""
    trouble: str = ""
    """Why nothing is published now; empty if nothing is in the way."""


@dataclass(slots=True)
class Vitals:
    """Of one process. `live`: it measures now; a replay's own health is nobody's business."""

    live: bool = True
    accounts: dict[str, Account] = field(default_factory=dict)
    """By name of the sink."""
    queues: dict[str, int] = field(default_factory=dict)
    """Name of the channel → the most items that ever waited in it."""
    running: bool = False
    """Source and sinks are open."""
    last_results_s: float = 0.0
    """`time.monotonic()` of the last results."""
    waits_for: str = ""
    """What has to be there before there can be results; empty if nothing is missing."""
    publishing: Callable[[], Publishing] | None = None
    """Says how publishing to an ingest goes, from any thread; None where nothing is published."""

    def account(self, sink: str) -> Account:
        """A new account for a sink of that name; raises `UsageError` if there is one."""
        if sink in self.accounts:
            raise UsageError(f"two sinks are called {sink!r}")
        self.accounts[sink] = account = Account()
        return account

    def ended(self) -> None:
        """Nothing is measured any more."""
        self.running = False

    def got_on(self, **peaks: int) -> None:
        """Results came through; how full the channels have been."""
        self.last_results_s = time.monotonic()
        self.queues.update(peaks)


def process_figures() -> dict[str, int]:
    """cpu_ns, resident_bytes, open_files of this process, now."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 - a second is not worth a Path
        pages = int(file.read().split()[1])
    return {
        "cpu_ns": int((usage.ru_utime + usage.ru_stime) * 1e9),
        "resident_bytes": pages * resource.getpagesize(),
        "open_files": len(os.listdir("/proc/self/fd")),  # noqa: PTH208 - names are not looked at
    }
