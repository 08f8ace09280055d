"""The ledger: where every record went. An invariant, printed even when all is zero.

    records = matched + unmatched + ambiguous + expired + dropped + in_flight

`lost` and `discarded` stand beside it: records that never reached the correlator.
"""

from __future__ import annotations

from dataclasses import dataclass

from contracts.counted import Counted


@dataclass(frozen=True, slots=True)
class Ledger(Counted):
    """Counts of records. Each record is in exactly one of the categories."""

    records: int = 0
    """Seen by the correlator."""
    matched: int = 0
    """Tied to another record of the same packet, and (where it has a device) to one certain device."""
    unmatched: int = 0
    """No partner: nothing else was seen of this kernel buffer's life."""
    ambiguous: int = 0
    """Several devices or packets fit and none can be told to be the right one."""
    expired: int = 0
    """Waited for a partner until it was too late for one."""
    dropped: int = 0
    """Of packets that the kernel dropped (what they crossed before is measured all the same)."""
    in_flight: int = 0
    """Of packets whose life has not ended yet."""
    lost: int = 0
    """Not stored by the ring; never seen here."""
    discarded: int = 0
    """Discarded by a bounded buffer of our own; never seen here."""

    @property
    def imbalance(self) -> int:
        """Records that are in no category; anything but 0 is a defect."""
        return self.records - (
            self.matched + self.unmatched + self.ambiguous + self.expired + self.dropped + self.in_flight
        )

    def line(self) -> str:
        """All of it in one line for people."""
        return "ledger: " + " · ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in self.as_dict().items())
