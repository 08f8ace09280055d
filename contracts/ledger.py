"""The ledger: the category of every record. Reports print the ledger even when all counts are zero.

    records = matched + unmatched + ambiguous + expired + dropped + in_flight

`lost` and `discarded` stand outside this sum: they count records that never reached the correlator.
"""

from __future__ import annotations

from dataclasses import dataclass

from contracts.counted import Counted


@dataclass(frozen=True, slots=True)
class Ledger(Counted):
    """Counts of records. Each record is in exactly one of the categories."""

    records: int = 0
    """Records that the correlator received."""
    matched: int = 0
    """Records matched to another record of the same packet and, if the hook has a device, to one certain device."""
    unmatched: int = 0
    """Records without a partner: the kernel buffer's life has no other record."""
    ambiguous: int = 0
    """Records that several devices or packets fit equally well."""
    expired: int = 0
    """Records whose partner did not arrive within the timeout."""
    dropped: int = 0
    """Records of packets that the kernel dropped (the devices that they crossed before are measured all the same)."""
    in_flight: int = 0
    """Records of packets whose life has not ended yet."""
    lost: int = 0
    """Records that the kernel's ring did not store; the correlator never receives them."""
    discarded: int = 0
    """Records that a bounded buffer of MACE's discarded; the correlator never receives them."""

    @property
    def imbalance(self) -> int:
        """Records in no category; any value but 0 is a defect."""
        return self.records - (
            self.matched + self.unmatched + self.ambiguous + self.expired + self.dropped + self.in_flight
        )

    def line(self) -> str:
        """Return all counts on one line for people."""
        return "ledger: " + " · ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in self.as_dict().items())
