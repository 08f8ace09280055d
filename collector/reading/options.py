"""Options of the readers of files, and the description of a file before it is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from contracts.interfaces import StreamHeader


@dataclass(frozen=True, slots=True)
class FileOptions:
    """Options of the readers of all formats; each reader ignores those that do not concern it."""

    salvage: bool = False
    """Skip damaged parts and count the records lost, instead of raising `CaptureError`."""
    topology: Path | None = None
    """A capture file (`.mace`) of the same host; its topology describes the devices of a file that only names them."""
    buffer: str = ""
    """Name of the trace instance to read from a file with several."""
    clock: str = ""
    """Trace clock of a file that does not name its clock."""
    inner_device: str = ""
    """Device to read from an inner packet capture of several devices: the kernel's index, or an interface's name."""
    outer_device: str = ""
    """Device to read from an outer packet capture of several devices: the kernel's index, or an interface's name."""


@dataclass(frozen=True, slots=True)
class Description:
    """Origin of a file: its header and the time of its first record."""

    header: StreamHeader
    first_utc_ns: int
    """UTC of the first record; of the header if there is no record."""
