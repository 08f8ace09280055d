"""What readers of tools' output have in common: what a reader is, the samples as they grow, and decimals."""

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
"""Bytes, without options and extensions."""
DECIMAL: Final = r"\d{1,9}(?:\.\d{1,9})?"
"""In an expression: a number whose nanoseconds fit into 64 bits, if its unit is a millisecond or a second."""
STAMP: Final = r"(?:\[(?P<stamp>[1-4]?\d{1,9}\.\d{1,9})\] )?"
"""In an expression: the time of a line, seconds since 1970."""
_KEPT: Final = 5
"""As many of the lines that are not understood are kept, to be shown."""
_SHOWN: Final = 160
"""Characters of a line that are shown; what has more of them is no line of a tool."""
_FINEST: Final = 12
"""Decimals that a unit is counted to: a second's are far below 1 ns then."""


class Reader(Protocol):
    """What a tool prints, line by line."""

    unknown: Unknown
    left_out: Counter[str]
    """Exchanges that the output tells of and that are no samples: how many, by the reason."""

    @property
    def stamps(self) -> StampModel:
        """How the tool looks at the clock; known for certain once all lines have been taken."""
        ...

    def line(self, text: str) -> int | None:
        """Take one line; the number of the sample that it tells of (its row in `samples`), None if it tells of none."""
        ...

    def samples(self, since: int = 0) -> Samples:
        """The replies so far, from that row on, in the order of the lines."""
        ...

    def finish(self) -> Samples:
        """The same when there are no more lines, and behind them the requests that had no reply.

        Raises `UsageError` where the tool printed no round trip time although replies came, as with its quiet option.
        """
        ...


@dataclass(slots=True)
class Unknown:
    """Lines that were not understood."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        """Count a line, and keep it if it is one of the first."""
        self.count += 1
        if len(self.first) < _KEPT:
            self.first.append(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…")


@dataclass(slots=True)
class GrowingSamples:
    """Columns of `Samples` that grow."""

    columns: dict[str, list[int]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.columns.get("rtt_ns", ()))

    def add(self, **values: int) -> int:
        """One more row, always with the same columns; its number."""
        for name, value in values.items():
            self.columns.setdefault(name, []).append(value)
        return len(self) - 1

    def samples(self, since: int) -> Samples:
        return Samples.of(len(self) - since, **{name: column[since:] for name, column in self.columns.items()})


def unanswered(first: int, last: int, answered: Collection[int]) -> Ints:
    """Numbers between two, these included, that are not among others."""
    numbers = np.arange(first, max(last + 1, first))
    found: Ints = numbers[~np.isin(numbers, np.fromiter(answered, np.int64, len(answered)))]
    return found


def with_unanswered(replies: Samples, missing: Ints | Sequence[int], untimed: Iterable[range] = ()) -> Samples:
    """The replies, then a row for each number of a request in `missing`.

    Those in a range of `untimed` have had a reply, or may have; the others had none. These ranges are in order.
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
    """A decimal number of units in ns, and its last digit's unit, ns. Raises `ArithmeticError`, `ValueError`."""
    number = Decimal(text)
    if not number.is_finite():
        raise ValueError(text)
    _, _, exponent = number.as_tuple()
    digits = min(max(-int(exponent), 0), _FINEST)
    return int((number * unit_ns).to_integral_value()), max(1, unit_ns // 10**digits)


def shown(text: str) -> str:
    """A line for a message, in quotes and not too long."""
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…")
