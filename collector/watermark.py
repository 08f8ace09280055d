"""The watermark: the time up to which records of several CPUs can be passed on in order (see `collector.merge`)."""

from __future__ import annotations


class Watermark:
    """Base class of mergers; the watermark is the earliest time up to which a CPU is complete, minus a hold-back."""

    def __init__(self, hold_back_ns: int) -> None:
        if hold_back_ns < 0:
            raise ValueError(f"hold_back_ns is {hold_back_ns}, expected 0 or more")
        self._hold_back_ns = hold_back_ns
        self._complete: dict[int, int] = {}
        self.given_ns: int | None = None
        """All records before this time were passed on; later `take`s return none before it. None at first."""
        self.late = 0
        """Records that arrived after records of later times had been passed on."""

    @property
    def watermark_ns(self) -> int | None:
        """Time before which all records can be passed on; None without a CPU."""
        return min(self._complete.values()) - self._hold_back_ns if self._complete else None

    def add_cpu(self, cpu: int, complete_ns: int) -> None:
        """Wait for this CPU from now on; it has no record before `complete_ns`."""
        self._complete[cpu] = complete_ns

    def complete(self, cpu: int, until_ns: int) -> None:
        """Declare that all records of `cpu` before `until_ns` were pushed."""
        self._complete[cpu] = max(self._complete[cpu], until_ns)
