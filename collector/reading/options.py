"""What a reader of files is asked, and what a file says of itself before it is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from contracts.interfaces import StreamHeader


@dataclass(frozen=True, slots=True)
class FileOptions:
    """What can be asked of the reader of any format; each takes what concerns it."""

    salvage: bool = False
    """Skip damaged parts, counting what they held, instead of raising `CaptureError`."""
    topology: Path | None = None
    """A capture file (`.mace`) of the same host, which tells what the devices are where a file only names them."""
    buffer: str = ""
    """Which of several trace instances of a file to read."""
    clock: str = ""
    """The trace clock of a file that does not say which it was."""
    inner_device: str = ""
    """The device of an inner packet capture that was made at several: the kernel's index, or an interface's name."""
    outer_device: str = ""
    """The same of the outer packet capture."""


@dataclass(frozen=True, slots=True)
class Description:
    """What a file says of itself."""

    header: StreamHeader
    first_utc_ns: int
    """UTC of the first record; of the header where there is none."""
