"""Protocol of the readers of files: synchronous, and the same for every format."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Self

from collector.reading.closing import Closing
from contracts.interfaces import StreamHeader, StreamItem
from contracts.schema import HookCost


class FileReader(Closing):
    """Reads a file (or several that hold one stream) once from front to back; a context manager that opens and closes.

    `open` is called once, first; `items` once after it; `close` at any time, also repeatedly. The properties are valid
    from `open` on, `warnings` and `discarded` from the end of `items` on; all remain valid after `close`.
    """

    _header: StreamHeader | None = None

    def open(self) -> StreamHeader:
        """Open the file and read its header; raises `Unavailable` or `CaptureError` and then leaves nothing open."""
        try:
            self._header = self._open()
        except BaseException:
            self.close()
            raise
        return self._header

    def __enter__(self) -> Self:
        self.open()
        return self

    @property
    def header(self) -> StreamHeader:
        """Header of the stream."""
        assert self._header is not None, "open() first"
        return self._header

    @property
    def cost(self) -> tuple[HookCost, ...]:
        """Empty: files do not contain the cost of observing."""
        return ()

    @abstractmethod
    def _open(self) -> StreamHeader:
        """Open the file and read its header, for `open`, which calls `close` if this raises."""

    @abstractmethod
    def items(self) -> Iterator[StreamItem]:
        """Yield the stream in order, reading the file as items are requested; raises `CaptureError`."""

    @abstractmethod
    def close(self) -> None:
        """Close the file. Safe to call again, and without `open`."""

    @property
    @abstractmethod
    def bytes_total(self) -> int:
        """Bytes to read, for a progress bar; 0 if unknown."""

    @property
    @abstractmethod
    def bytes_read(self) -> int:
        """Bytes read so far, at most `bytes_total` if that is known."""

    @property
    @abstractmethod
    def discarded(self) -> int:
        """Records that the reader had to omit; never those lost in the ring."""

    @property
    @abstractmethod
    def warnings(self) -> Sequence[str]:
        """Warnings for the user after reading, one line each: damage, a missing end, missing information."""
