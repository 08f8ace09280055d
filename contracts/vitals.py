"""Health of a running MACE: the accounts of its sinks, the fill of its channels, and the time of its last results.

The pipeline and its sinks write these values; `mace_internal`, the Prometheus endpoint and the health checks read them.
"""

from __future__ import annotations

import os
import resource
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Final

from contracts.errors import UsageError

_REASONS: Final = 16
"""Largest number of different reasons in an account: a server chooses the text of its messages."""


@dataclass(slots=True)
class Account:
    """Where a sink's rows went. Each row that the sink took is in exactly one category.

        taken = stored + waiting + refused + over_budget + dropped_buffer + dropped_spool + left_out

    The fields are those of `contracts.metrics.SINK_FIELDS`, which gives the meaning of each.
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
    """Reason -> number of rows that were not stored, and of requests that failed, for this reason."""
    trouble: str = ""
    """Why the last request failed; empty if it succeeded."""

    @property
    def imbalance(self) -> int:
        """Rows in no category; any value but 0 is a defect."""
        return self.taken - self.stored - self.waiting - self.not_stored - self.left_out

    @property
    def not_stored(self) -> int:
        """Rows that should have been stored and never will be."""
        return self.refused + self.over_budget + self.dropped_buffer + self.dropped_spool

    def note(self, reason: str, count: int = 1) -> bool:
        """Count a reason and return whether it is new, and so worth a message."""
        new = reason not in self.reasons
        if new and len(self.reasons) >= _REASONS:
            reason = "other reasons"
            new = False
        self.reasons[reason] += count
        return new

    def as_dict(self) -> dict[str, int]:
        """Return the counts by name, without the reasons."""
        return {name: getattr(self, name) for name in ACCOUNT_FIELDS}

    def __add__(self, other: Account) -> Account:
        """Return the account of this run and the next one, `other`.

        Counts add up. Gauges are those of `other`, whose `taken` includes the rows that waited when this run ended.
        """
        both = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(Account) if f.type == "int"}
        latest = {
            name: getattr(other, name) for name in ("waiting", "spool_bytes", "series", "delivery_ns", "connected")
        }
        both |= latest
        both["taken"] -= self.waiting
        both["buffer_peak"] = max(self.buffer_peak, other.buffer_peak)
        return Account(**both, reasons=self.reasons + other.reasons, trouble=other.trouble)

    def why(self) -> str:
        """Return the reasons why rows were not stored and requests failed, most frequent first, with their counts."""
        return "; ".join(f"{reason} ({count:,})" for reason, count in self.reasons.most_common()) or "see the log"

    def line(self) -> str:
        """Return on one line for people: rows taken and stored, every other category that is not 0, and the trouble."""
        told = ("taken", "stored", "waiting", "refused", "over_budget", "dropped_buffer", "dropped_spool", "left_out")
        counts = {name: getattr(self, name) for name in told}
        shown = (f"{name.replace('_', ' ')} {n:,}" for name, n in counts.items() if n or name in {"taken", "stored"})
        return " · ".join(shown) + (f" · {self.trouble}" if self.trouble else "")


ACCOUNT_FIELDS: Final = tuple(name for name in Account.__slots__ if name not in {"reasons", "trouble"})


@dataclass(frozen=True, slots=True)
class Publishing:
    """Where the records went that a host publishes to an ingest.

    records in the spool at the start + records = arrived + waiting + discarded + set_aside
    """

    records: int = 0
    """Records of this run given to the publisher."""
    arrived: int = 0
    """Records that the ingest has acknowledged."""
    waiting: int = 0
    """Records in the spool or on the way."""
    discarded: int = 0
    """Records discarded because the spool was full, or because they were damaged on the disk."""
    set_aside: int = 0
    """Records in frames that cannot be sent (another version; a stream whose beginning is missing) or that the ingest
    refuses for their content."""
    connected: bool = False
    answered: bool = False
    """Whether the broker has accepted a connection since the run began."""
    taken_over: int = 0
    """Times that another client with the same name took over the session."""
    trouble: str = ""
    """Why nothing is being published; empty if publishing works."""


@dataclass(slots=True)
class Vitals:
    """Health of one process. `live`: the process measures now; a replay does not report its health."""

    live: bool = True
    accounts: dict[str, Account] = field(default_factory=dict)
    """Name of the sink → its account."""
    queues: dict[str, int] = field(default_factory=dict)
    """Name of the channel → largest number of items that have waited in it."""
    running: bool = False
    """Whether source and sinks are open."""
    last_results_s: float = 0.0
    """`time.monotonic()` of the last results."""
    waits_for: str = ""
    """The thing without which there can be no results (a connection, a host); empty if nothing is missing."""
    publishing: Callable[[], Publishing] | None = None
    """Returns the state of publishing to an ingest, callable from any thread; None if nothing is published."""

    def account(self, sink: str) -> Account:
        """Make an account for the sink of this name; raises `UsageError` if the name already has one."""
        if sink in self.accounts:
            raise UsageError(f"two sinks are called {sink!r}")
        self.accounts[sink] = account = Account()
        return account

    def ended(self) -> None:
        """Note that the measurement has ended."""
        self.running = False

    def got_on(self, **peaks: int) -> None:
        """Note that results arrived now, and the peaks of the channels by name."""
        self.last_results_s = time.monotonic()
        self.queues.update(peaks)


def process_figures() -> dict[str, int]:
    """Return cpu_ns, resident_bytes and open_files of this process, now."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 - a second is not worth a Path
        pages = int(file.read().split()[1])
    return {
        "cpu_ns": int((usage.ru_utime + usage.ru_stime) * 1e9),
        "resident_bytes": pages * resource.getpagesize(),
        "open_files": len(os.listdir("/proc/self/fd")),  # noqa: PTH208 - names are not looked at
    }
