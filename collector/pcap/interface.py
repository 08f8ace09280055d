"""One interface of a packet capture: its link type, and the conversion of its clock's ticks to ns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from collector.pcap.link_layer import is_known, link_name
from contracts.arrays import Ints
from contracts.timerange import LATEST_RECORDED_NS

Ticks = npt.NDArray[np.uint64]

_SECONDS_MAX: Final = 1 << 33
"""Bound of seconds, larger than `LATEST_RECORDED_NS`; the sum of two such numbers, in ns, does not overflow."""


@dataclass(slots=True)
class Interface:
    """One interface of a pcapng section, or the only interface of a pcap file."""

    link: int
    number: int = 0
    """Number among all interface names of the file; interfaces with one name in two sections share a number."""
    fcs_bytes: int = 0
    """Bytes of the checksum behind each frame."""
    base: int = 10
    exponent: int = 6
    """The clock has base^exponent ticks a second."""
    offset_s: int = 0
    missed: int = 0
    """Packets missed according to the capture's statistics."""
    missed_between: int = 0
    """Packets missed according to the options of packets; the statistics include them if the capture has both."""

    @property
    def missed_in_all(self) -> int:
        """Packets that the capture missed."""
        return max(self.missed, self.missed_between)

    @property
    def trouble(self) -> str:
        """Why no packet of the interface can be read, or an empty string."""
        if not is_known(self.link):
            return f"of {link_name(self.link)}"
        # With finer ticks 64 bits hold less than a second.
        if self.exponent > (63 if self.base == 2 else 19):
            return f"with a clock of {self.base}^{self.exponent} ticks a second"
        return ""

    def utc_ns(self, ticks: Ticks) -> Ints:
        """Convert ticks to UTC in whole ns, rounded down; -1 for a time before 1970 or after 2116."""
        seconds, ns = self._binary(ticks) if self.base == 2 else self._decimal(ticks)
        whole = np.minimum(seconds, np.uint64(2 * _SECONDS_MAX)).astype(np.int64)
        whole += min(max(self.offset_s, -_SECONDS_MAX), _SECONDS_MAX)
        good = (whole >= 0) & (whole < LATEST_RECORDED_NS // 10**9) & (abs(self.offset_s) <= _SECONDS_MAX)
        return np.where(good, whole * 10**9 + ns, -1)

    def _decimal(self, ticks: Ticks) -> tuple[Ticks, Ints]:
        """Return seconds and ns of a clock with 10^exponent ticks a second."""
        per_s = np.uint64(10**self.exponent)
        seconds = ticks // per_s
        rest = ticks - seconds * per_s
        if self.exponent <= 9:
            return seconds, (rest * np.uint64(10 ** (9 - self.exponent))).astype(np.int64)
        return seconds, (rest // np.uint64(10 ** (self.exponent - 9))).astype(np.int64)

    def _binary(self, ticks: Ticks) -> tuple[Ticks, Ints]:
        """Return seconds and ns of a clock with 2^exponent ticks a second."""
        shift = np.uint64(self.exponent)
        seconds = ticks >> shift
        rest = ticks - (seconds << shift)
        if self.exponent <= 32:
            return seconds, ((rest * np.uint64(10**9)) >> shift).astype(np.int64)
        # The product has more than 64 bits: compute its upper and lower halves separately.
        high, low = rest >> np.uint64(32), rest & np.uint64(0xFFFFFFFF)
        high = high * np.uint64(10**9) + (low * np.uint64(10**9) >> np.uint64(32))
        return seconds, (high >> (shift - np.uint64(32))).astype(np.int64)
