"""Read capture files (`.mace`): the recorded stream, unchanged.

`Capture` reads one file; `CaptureReader` adapts it to the protocol of all formats (`collector.files`).

A capture whose writer was killed has no END mark and may end in the middle of a frame. `Capture.truncated` reports
this; it is no error, because all frames before are intact. Any other damage raises `CaptureError` with the byte at
which the frame begins. With `salvage`, damage is skipped, counted and reported instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from collector.reading.closing import Closing
from collector.reading.opening import is_url, open_binary
from collector.reading.reader import FileReader
from collector.reading.window import FileWindow
from contracts import wire
from contracts.errors import CaptureError, WireError
from contracts.interfaces import StreamHeader, StreamItem
from contracts.records import Batch
from contracts.timerange import LATEST_RECORDED_NS
from contracts.topology import Topology

_DAMAGE_TOLD: Final = 1000
"""Places of damage that are reported one by one; further damage extends the last. A hostile file has millions."""


@dataclass(frozen=True, slots=True)
class Truncated:
    """A capture without its END mark."""

    offset: int
    """Where the last whole frame ends."""
    cut: int
    """Bytes of an incomplete frame behind `offset`."""

    def __str__(self) -> str:
        if not self.cut:
            return f"ended without END mark at byte {self.offset}: the recording was killed; all frames are whole"
        return (
            f"ended without END mark, {self.cut} bytes of an incomplete frame at byte {self.offset}: "
            "the recording was killed, or the file is cut"
        )


@dataclass(frozen=True, slots=True)
class Damage:
    """Bytes that salvage skipped."""

    offset: int
    length: int
    why: str

    def __str__(self) -> str:
        return f"skipped {self.length} bytes at byte {self.offset}: {self.why}"


@dataclass(frozen=True, slots=True)
class Position:
    """A frame inside a capture at which reading can begin."""

    offset: int
    """Offset of the frame's first byte."""
    sequence: int
    """Number of the frame."""
    records: int
    """Records of the stream before the frame."""
    topologies: tuple[tuple[int, int], ...]
    """Offset and number of the TOPOLOGY frames that must be read before the frame."""


class Capture(Closing):
    """One capture file, read once from front to back; a context manager.

    The constructor opens the file and reads its header; it raises `Unavailable` if there is no such file and
    `CaptureError` if the file is no capture. Iterating yields `Topology` and `Batch` items and raises `CaptureError`.
    """

    def __init__(self, path: Path | str, *, salvage: bool = False) -> None:
        self.path: Final = path if is_url(path) else Path(path)
        self.bytes_total = 0
        """Size of the file at opening; 0 if it is no regular file."""
        self.truncated: Truncated | None = None
        """Set at the end of a capture that has no END mark."""
        self.damage: list[Damage] = []
        """Places that salvage skipped."""
        self._refused = 0
        """Records of undamaged batches that were refused for impossible times."""
        self._salvage = salvage
        self._decoder = wire.Decoder(gaps=salvage)
        self._file: BinaryIO
        self._file, self.bytes_total = open_binary(path)
        self._window = FileWindow(self.path, self._file)
        try:
            self.header: Final = self._read_header()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file. Safe to call again."""
        self._file.close()

    def go_to(self, position: Position) -> None:
        """Continue at `position` as if all frames before had been read. Call before the first item is read."""
        for offset, sequence in position.topologies:
            self._window.seek(offset)
            self._decoder.skip_to(sequence, 0)
            if not isinstance(self._next(), Topology):
                raise CaptureError(self.path, offset, "no TOPOLOGY is here any more: the file has changed")
        self._window.seek(position.offset)
        self._decoder.skip_to(position.sequence, position.records)

    @property
    def topology(self) -> Topology | None:
        """The topology read last."""
        return self._decoder.topology

    @property
    def end(self) -> wire.End | None:
        """The END mark, once it has been read."""
        return self._decoder.end

    @property
    def bytes_read(self) -> int:
        """Bytes read so far, for a progress bar."""
        return self._window.offset

    @property
    def records(self) -> int:
        """Records of the stream so far, including those that salvage skipped."""
        return self._decoder.records

    @property
    def discarded(self) -> int:
        """Records that salvage skipped, as far as the frames around the damage show."""
        return self._decoder.missing + self._refused

    @property
    def warnings(self) -> list[str]:
        """Warnings for the user after reading: damage and a missing END mark, one line each."""
        told = [f"{self.path}: {damage}" for damage in self.damage]
        if self.truncated:
            told.append(f"{self.path}: {self.truncated}")
        return told

    def __iter__(self) -> Iterator[StreamItem]:
        while True:
            try:
                message = self._next()
            except CaptureError:  # the disk, not the data
                raise
            except WireError as error:
                if not self._salvage:
                    raise CaptureError(self.path, self._window.offset, str(error)) from error
                self._skip(str(error))
                continue
            if message is None:
                return
            if not isinstance(message, wire.End | StreamHeader):
                yield message

    def _read_header(self) -> StreamHeader:
        try:
            self._window.fill(len(wire.FILE_HEAD) + wire.HEAD_SIZE)
            head = self._window.bytes[: len(wire.FILE_HEAD)]
            if head[: len(wire.SIGNATURE)] != wire.SIGNATURE[: len(head)]:
                raise WireError(_not_a_capture(bytes(head)))
            if len(head) < len(wire.FILE_HEAD):
                raise WireError("the file is cut inside its signature" if head else "the file is empty")
            version = int.from_bytes(head[len(wire.SIGNATURE) :], "little")
            wire.check_version(version)
            self._window.drop(len(head))
            message = self._next()
            if not isinstance(message, StreamHeader):
                raise WireError("the file is cut inside its header")
            if self._decoder.version != version:
                raise WireError(f"a file of wire version {version} whose frames are of {self._decoder.version}")
        except CaptureError:
            raise
        except WireError as error:
            raise CaptureError(self.path, self._window.offset, str(error)) from error
        return message

    def _next(self) -> wire.WireItem | None:
        """Return the next frame's message, None at the end of the file. A refused frame stays in the window."""
        have = self._window.fill(wire.HEAD_SIZE)
        if not have:
            if self._decoder.end is None:
                self.truncated = Truncated(self._window.offset, 0)
            return None
        if self._decoder.end is not None:
            raise WireError("the file goes on after its END mark (two captures in one file? replay them one by one)")
        if have < wire.HEAD_SIZE and self._window.bytes[: len(wire.SYNC)] == wire.SYNC[:have]:
            self.truncated = Truncated(self._window.offset, have)
            self._window.drop(have)
            return None
        head = self._decoder.head(self._window.bytes)
        size = wire.HEAD_SIZE + head.stored
        have = self._window.fill(size)
        if have < size:
            # The head's own checksum is right, so the stated size is true and the file is cut.
            self.truncated = Truncated(self._window.offset, have)
            self._window.drop(have)
            return None
        whole = self._decoder.records - self._decoder.missing
        message = self._decoder.payload(head, bytes(self._window.bytes[wire.HEAD_SIZE : size]))
        if isinstance(message, Batch) and not self._in_time(message):
            self._refused += self._decoder.records - self._decoder.missing - whole
            raise WireError("a batch with times before 1970 or after 2116")
        self._window.drop(size)
        return message

    def _in_time(self, batch: Batch) -> bool:
        """Return whether arithmetic with the batch's times stays within 64 bits."""
        assert self._decoder.header is not None
        offset_ns = self._decoder.header.clock.offset_ns
        return not len(batch) or all(0 <= int(batch.ts_ns[at]) + offset_ns <= LATEST_RECORDED_NS for at in (0, -1))

    def _skip(self, why: str) -> None:
        """Skip to the next place where a frame may begin, or to the end, and note the damage."""
        start, size = self._window.offset, 1
        with contextlib.suppress(WireError):
            # An intact head gives the frame's size: skip the whole frame. A search for frames inside the payload would
            # let a hostile file be read over and over.
            size = wire.HEAD_SIZE + wire.parse_head(self._window.bytes).stored
        self._window.drop(self._window.fill(size))
        while self._window.fill(wire.HEAD_SIZE):
            found = self._window.bytes.find(wire.SYNC)
            if found < 0:
                # Keep the last bytes: they may be the first part of a sync mark.
                self._window.drop(max(len(self._window.bytes) - len(wire.SYNC) + 1, 1))
                continue
            self._window.drop(found)
            if self._window.fill(wire.HEAD_SIZE) < wire.HEAD_SIZE:
                break
            try:
                wire.parse_head(self._window.bytes)
                break
            except WireError:
                self._window.drop(1)
        self._tell(Damage(start, self._window.offset - start, why))

    def _tell(self, damage: Damage) -> None:
        if self.damage:
            last = self.damage[-1]
            if last.offset + last.length == damage.offset or len(self.damage) == _DAMAGE_TOLD:
                self.damage[-1] = Damage(last.offset, damage.offset + damage.length - last.offset, last.why)
                return
        self.damage.append(damage)


def _not_a_capture(head: bytes) -> str:
    if head[:4] == wire.SIGNATURE[:4]:
        return "the file was changed in transfer (line ends): copy it again as a binary file"
    return f"not a MACE capture: it begins with {head[:8].hex(' ')}"


def read(path: Path | str, *, salvage: bool = False) -> Iterator[StreamItem]:
    """Yield the items of a capture file, for scripts and benchmarks; raises `Unavailable` or `CaptureError`."""
    with Capture(path, salvage=salvage) as capture:
        yield from capture


class CaptureReader(FileReader):
    """A capture file as a stream."""

    def __init__(self, path: Path | str, *, salvage: bool = False) -> None:
        self.path: Final = path
        self.capture: Capture | None = None
        """The open file."""
        self._salvage = salvage

    def _open(self) -> StreamHeader:
        """Open the file; raises `Unavailable` or `CaptureError`."""
        self.capture = Capture(self.path, salvage=self._salvage)
        return self.capture.header

    def items(self) -> Iterator[StreamItem]:
        """See `FileReader`."""
        assert self.capture is not None, "open() first"
        yield from self.capture

    def close(self) -> None:
        """Close the file."""
        if self.capture is not None:
            self.capture.close()

    @property
    def discarded(self) -> int:
        """Records that salvage skipped."""
        return self.capture.discarded if self.capture else 0

    @property
    def bytes_total(self) -> int:
        """Size of the file."""
        return self.capture.bytes_total if self.capture else 0

    @property
    def bytes_read(self) -> int:
        """Bytes read so far."""
        return self.capture.bytes_read if self.capture else 0

    @property
    def warnings(self) -> list[str]:
        """Warnings for the user after reading, one line each."""
        return self.capture.warnings if self.capture else []


@dataclass(frozen=True, slots=True)
class CaptureInfo:
    """Origin of a capture: its header and the time of its first record."""

    path: Path | str
    header: StreamHeader
    first_utc_ns: int
    """UTC of the first record; of the header if there is no record."""


def describe(path: Path | str, *, salvage: bool = False) -> CaptureInfo:
    """Read header and first record of a capture; raises `Unavailable` or `CaptureError`."""
    with Capture(path, salvage=salvage) as capture:
        first = next((int(item.ts_ns[0]) for item in capture if isinstance(item, Batch) and len(item)), None)
        clock = capture.header.clock
        return CaptureInfo(capture.path, capture.header, clock.utc_ns if first is None else first + clock.offset_ns)
