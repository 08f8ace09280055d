"""A reader of files: plain and synchronous, the same for every format, wherever it is called from."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Self

from collector.reading.closing import Closing
from contracts.interfaces import StreamHeader, StreamItem
from contracts.schema import HookCost


class FileReader(Closing):
    """A file (or several that are one stream), read once from front to back; a context manager that opens and closes.

    `open` is called once, first; `items` once after it; `close` at any time, also again. The properties hold from
    `open` on, `warnings` and `discarded` at the end of `items`, and all of them stay after `close`.
    """

    _header: StreamHeader | None = None

    def open(self) -> StreamHeader:
        """Open the file and read its header. Raises `Unavailable` or `CaptureError`; then nothing is left open."""
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
        """How the stream came to be."""
        assert self._header is not None, "open() first"
        return self._header

    @property
    def cost(self) -> tuple[HookCost, ...]:
        """Nothing: files do not tell what observing has cost."""
        return ()

    @abstractmethod
    def _open(self) -> StreamHeader:
        """As `open`; what it has opened when it raises, `close` closes."""

    @abstractmethod
    def items(self) -> Iterator[StreamItem]:
        """The stream, in order, read as it is asked for. Raises `CaptureError`."""

    @abstractmethod
    def close(self) -> None:
        """Close the file. Safe to call again, and where `open` never was."""

    @property
    @abstractmethod
    def bytes_total(self) -> int:
        """What there is to read, for a progress bar; 0 if that is not known."""

    @property
    @abstractmethod
    def bytes_read(self) -> int:
        """How far reading has come, at most `bytes_total` where that is known."""

    @property
    @abstractmethod
    def discarded(self) -> int:
        """Records that the reader had to leave out; never those lost in the ring."""

    @property
    @abstractmethod
    def warnings(self) -> Sequence[str]:
        """What the user should know after reading, one line each: damage, a missing end, what cannot be told."""
