"""What the screen of `mace top` asks of a measurement, or of a store: the table's data and what keys can do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from contracts.cpu_figures import CpuReport
from contracts.ledger import Ledger
from contracts.recent import Moment
from storage.query import PacketPath


@dataclass(frozen=True, slots=True)
class Look:
    """One look at the figures. Nothing in it changes afterwards."""

    moment: Moment
    ledger: Ledger
    losses: tuple[str, ...]
    """A sentence for each loss of records or rows."""
    unseen: tuple[str, ...] = ()
    """A sentence for each device whose ingress the source does not show (`Summary.unseen`)."""
    on_host_network: tuple[str, ...] = ()
    """Names of the containers without a device of their own."""
    kept_s: float | None = None
    """Seconds of the raw stream that a trace would hold; None if none are kept."""
    recording: str = ""
    """The records and the file of the running recording; "" without one."""
    whole_runs: bool = False
    """Whether the ledger is of whole runs, and not up to the moment."""


class Feed(Protocol):
    """Gives looks, and does what keys ask for. All methods are called in the screen's event loop."""

    @property
    def title(self) -> str:
        """Host and source, or the store, in a few words."""
        ...

    @property
    def is_live(self) -> bool:
        """Whether time goes on by itself; otherwise `move` sets it."""
        ...

    @property
    def is_over(self) -> bool:
        """Whether the screen is to close: a signal arrived, or the measurement has ended."""
        ...

    async def look(self) -> Look:
        """Return the newest look. Raises `MaceError`."""
        ...

    async def worst(self, limit: int, look: Look, chosen: Callable[[str], bool] | None) -> Sequence[PacketPath]:
        """Return the packets with the largest overhead in the look's minute, at most `limit`.

        `chosen` decides by the container's name; None admits all. Raises `MaceError`.
        """
        ...

    async def cpus(self, look: Look) -> CpuReport:
        """Return which CPU worked on the packets of the look's minute. Raises `MaceError` if that was not counted."""
        ...

    def move(self, seconds: int | None, *, to_end: bool = False) -> None:
        """Go forward or, with a negative number, back; None goes to the first second, `to_end` to the last."""
        ...

    async def record(self) -> str:
        """Begin a recording, or end the one that runs; returns a sentence for the user. Raises `MaceError`."""
        ...

    async def trace(self) -> str:
        """Write the kept seconds as a Perfetto trace; returns a sentence for the user. Raises `MaceError`."""
        ...
