"""Numbers by name that add up: what a ledger and the grades of a run have in common."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Self


class Counted:
    """For a dataclass all of whose fields are counts."""

    __slots__ = ()

    def as_dict(self) -> dict[str, int]:
        """All counts by name, in the order of the definition."""
        names: Any = fields(self)  # type: ignore[arg-type] # a dataclass
        # asdict would copy each number by ten calls.
        return {each.name: getattr(self, each.name) for each in names}

    def __add__(self, other: Self) -> Self:
        theirs = other.as_dict()
        return type(self)(**{name: count + theirs[name] for name, count in self.as_dict().items()})
