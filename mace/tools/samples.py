"""Shared parts of the readers of tools' output: the reader's protocol, the growing samples, and decimal numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Final, Protocol

import numpy as np

from contracts.arrays import Ints
from correlator.samples import Samples
from correlator.stamps import StampModel

IP_HEADER: Final = {4: 20, 6: 40}
"""Bytes of the IP header by version, without options and extension headers."""
DECIMAL: Final = r"\d{1,9}(?:\.\d{1,9})?"
"""Part of a regular expression: a number in s or ms that fits in 64 bits as ns."""
STAMP: Final = r"(?:\[(?P<stamp>[1-4]?\d{1,9}\.\d{1,9})\] )?"
"""Part of a regular expression: the time of a line, seconds since 1970."""
_KEPT: Final = 5
"""Number of lines that were not understood and are kept, to be shown."""
_SHOWN: Final = 160
"""Characters of a line that are shown; no tool prints longer lines."""
_FINEST: Final = 12
"""Most decimals of a unit that are read; the 12th of a second is far below 1 ns."""


class Reader(Protocol):
    """Reads a tool's output line by line."""

    unknown: Unknown
    left_out: Counter[str]
    """Number of exchanges in the output that cannot be samples, by reason."""

    @property
    def stamps(self) -> StampModel:
        """When the tool reads the clock; certain only after the last line."""
        ...

    def line(self, text: str) -> int | None:
        """Read one line; returns the row in `samples` of the sample on it, None if it has none."""
        ...

    def samples(self, since: int = 0) -> Samples:
        """Return the replies so far, from row `since` on, in the order of the lines."""
        ...

    def finish(self) -> Samples:
        """Return all replies, followed by the requests without a reply. To be called after the last line.

        Raises `UsageError` if replies arrived and the tool printed no round trip time, as with its quiet option.
        """
        ...


@dataclass(slots=True)
class Unknown:
    """Counts the lines that were not understood, and keeps the first of them."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        """Count a line, and keep it if it is one of the first `_KEPT`."""
        self.count += 1
        if len(self.first) < _KEPT:
            self.first.append(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…")


@dataclass(slots=True)
class GrowingSamples:
    """The columns of `Samples`, as lists that grow."""

    columns: dict[str, list[int]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.columns.get("rtt_ns", ()))

    def add(self, **values: int) -> int:
        """Add a row, always with the same columns; returns its number."""
        for name, value in values.items():
            self.columns.setdefault(name, []).append(value)
        return len(self) - 1

    def samples(self, since: int) -> Samples:
        return Samples.of(len(self) - since, **{name: column[since:] for name, column in self.columns.items()})


def unanswered(first: int, last: int, answered: Collection[int]) -> Ints:
    """Return the numbers from `first` to `last`, both included, that are not in `answered`."""
    numbers = np.arange(first, max(last + 1, first))
    found: Ints = numbers[~np.isin(numbers, np.fromiter(answered, np.int64, len(answered)))]
    return found


def with_unanswered(replies: Samples, missing: Ints | Sequence[int], untimed: Iterable[range] = ()) -> Samples:
    """Return the replies, followed by a row for each request number in `missing`.

    Requests in a range of `untimed` had a reply without a time, or may have had one; the others had no reply. The
    ranges are in ascending order.
    """
    numbers = np.asarray(missing, np.int64)
    if not len(numbers):
        return replies
    ranges = np.array([(one.start, one.stop) for one in untimed if one], np.int64).reshape(-1, 2)
    at = np.searchsorted(ranges[:, 0], numbers, "right") - 1
    within = np.zeros(len(numbers), np.bool_)
    within[at >= 0] = numbers[at >= 0] < ranges[at[at >= 0], 1]
    return Samples.concatenate([replies, Samples.of(len(numbers), seq=numbers, untimed=within)])


def decimal_ns(text: str, unit_ns: int) -> tuple[int, int]:
    """Parse a decimal number of units of `unit_ns`; returns its value and the unit of its last digit, both in ns.

    Raises `ArithmeticError`, `ValueError`.
    """
    number = Decimal(text)
    if not number.is_finite():
        raise ValueError(text)
    _, _, exponent = number.as_tuple()
    digits = min(max(-int(exponent), 0), _FINEST)
    return int((number * unit_ns).to_integral_value()), max(1, unit_ns // 10**digits)


def shown(text: str) -> str:
    """Return a line in quotes and shortened, for a message."""
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…")
