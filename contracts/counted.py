"""Base class of dataclasses of counts, which add field by field: the ledger and the grades of a run."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Self


class Counted:
    """Mixin for a dataclass all of whose fields are counts."""

    __slots__ = ()

    def as_dict(self) -> dict[str, int]:
        """Return the counts by name, in the order of the definition."""
        names: Any = fields(self)  # type: ignore[arg-type] # a dataclass
        # dataclasses.asdict would copy each number with ten calls.
        return {each.name: getattr(self, each.name) for each in names}

    def __add__(self, other: Self) -> Self:
        theirs = other.as_dict()
        return type(self)(**{name: count + theirs[name] for name, count in self.as_dict().items()})
