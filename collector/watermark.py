"""Up to when records of several CPUs can be given out: what both mergers keep account of (see `collector.merge`)."""

from __future__ import annotations


class Watermark:
    """Each CPU is complete up to a time; the earliest of these, less a hold-back, is the watermark."""

    def __init__(self, hold_back_ns: int) -> None:
        if hold_back_ns < 0:
            raise ValueError(f"hold_back_ns is {hold_back_ns}, expected 0 or more")
        self._hold_back_ns = hold_back_ns
        self._complete: dict[int, int] = {}
        self.given_ns: int | None = None
        """All records before this time were given out; later `take`s give none before it. None at first."""
        self.late = 0
        """Records that came after their time was given out."""

    @property
    def watermark_ns(self) -> int | None:
        """Up to this time, exclusively, records can be given out; None while some CPU has told nothing."""
        return min(self._complete.values()) - self._hold_back_ns if self._complete else None

    def add_cpu(self, cpu: int, complete_ns: int) -> None:
        """Wait for this CPU from now on; it has no record before `complete_ns`."""
        self._complete[cpu] = complete_ns

    def complete(self, cpu: int, until_ns: int) -> None:
        """All records of `cpu` with a time before `until_ns` were pushed."""
        self._complete[cpu] = max(self._complete[cpu], until_ns)
