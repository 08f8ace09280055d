"""What a reader of files is asked, and what it promises: the part of `collector.files` that the formats share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from contracts.interfaces import Source, StreamHeader


class FileSource(Source, Protocol):
    """A `Source` over a file; the properties hold from `open` on, `warnings` at the end."""

    @property
    def bytes_total(self) -> int:
        """What there is to read, for a progress bar; 0 if that is not known."""
        ...

    @property
    def bytes_read(self) -> int:
        """How far reading has come, at most `bytes_total`."""
        ...

    @property
    def warnings(self) -> Sequence[str]:
        """What the user should know after reading, one line each: damage, a missing end, what cannot be told."""
        ...


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
