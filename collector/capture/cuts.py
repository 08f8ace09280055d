"""Cuts of a capture file in time: `cuts` finds them, `stretch` reads the records between two of them.

    ├─── records of part k ───┤T├─── records of part k+1 ───
                      ├ warm ─┤

A cut is a time T, a multiple of `align_ns`. A worker that has the engine's state at T begins part k+1 at
`Cut.position`, the frame with the first record from T on. A worker without that state begins at `Cut.warm` and has
built up the state by T.

The scan steps from frame head to frame head (36 bytes) and skips payloads. It decodes only topologies, and a few
batches near each cut. The scan does not verify the file: it finds no cuts behind a damaged head, and the reader of the
last part reports the damage as any other reader does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, Final

from collector.capture.source import Capture, Position
from collector.reading.opening import is_url, open_binary
from contracts import wire
from contracts.errors import WireError
from contracts.interfaces import StreamItem
from contracts.records import Batch

WARM_UP_FRAMES: Final = 1 << 14
"""Largest number of frames in a warm-up. A warm-up that needs more of them is shorter than requested."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A time at which a capture can be cut, and the positions in the file at which its second part begins."""

    at_ns: int
    position: Position
    """The frame with the first record from `at_ns` on."""
    warm: Position
    """A frame whose records begin at least the warm-up before `at_ns`, or the capture's first batch."""


def cuts(path: Path | str, *, part_bytes: int, align_ns: int, warm_up_ns: int) -> list[Cut]:
    """Return cuts that divide a capture into parts of at least about `part_bytes`; none for a small file.

    Raises `Unavailable` or `CaptureError`, as `Capture` does.
    """
    with Capture(path) as capture:
        begin = capture.bytes_read
    raw, total = open_binary(path)
    with raw if is_url(path) else BufferedReader(raw, 1 << 16) as file:  # type: ignore[type-var]
        found: list[Cut] = []
        scan = _Scan(file, begin)
        last = begin
        while total - scan.offset > part_bytes // 2 and scan.skip_to(last + part_bytes):
            cut = scan.cut(align_ns, warm_up_ns)
            if cut is None:
                break
            found.append(cut)
            last = cut.position.offset
        return found


class _Scan:
    """A walk over a capture's frames."""

    def __init__(self, file: BinaryIO, begin: int) -> None:
        self._file = file
        self._sequence = 1
        """Number of the next frame; the HEADER was 0."""
        self._decoder = wire.Decoder()
        self._topologies: tuple[tuple[int, int], ...] = ()
        """Offset and number of the TOPOLOGY frames needed to know the current topology; mostly the last one alone."""
        self._batches: deque[tuple[int, int, tuple[tuple[int, int], ...]]] = deque(maxlen=WARM_UP_FRAMES)
        """Offset, number and needed topologies of the batches passed last."""
        self.offset = begin

    def skip_to(self, offset: int) -> bool:
        """Step to the first frame at or behind `offset`; return False at the end of the file or at a damaged frame."""
        while self.offset < offset:
            if self._pass() is None:
                return False
        return True

    def cut(self, align_ns: int, warm_up_ns: int) -> Cut | None:
        """Return the next cut from here on, or None if there is none before the end."""
        at_ns: int | None = None
        while (passed := self._pass()) is not None:
            if passed is not wire.FrameKind.BATCH:
                continue
            offset, sequence, topologies = self._batches[-1]
            try:
                batch, before = self._decode(offset)
            except WireError:
                return None
            if not len(batch):
                continue
            if at_ns is None:
                at_ns = int(batch.ts_ns[0]) // align_ns * align_ns + align_ns
            if batch.ts_ns[-1] >= at_ns:
                position = Position(offset, sequence, before, topologies)
                warm = self._warm(at_ns - warm_up_ns)
                return None if warm is None else Cut(at_ns, position, warm)
        return None

    def _pass(self) -> wire.FrameKind | None:
        """Step over one frame and return its kind, or None at the end of the file or at a damaged frame."""
        start = self.offset
        self._file.seek(start)
        try:
            head = wire.parse_head(self._file.read(wire.HEAD_SIZE))
        except WireError:
            return None
        if head.sequence != self._sequence:
            return None
        if head.message is wire.FrameKind.BATCH:
            self._batches.append((start, head.sequence, self._topologies))
        elif head.message is wire.FrameKind.TOPOLOGY:
            try:
                if self._decoder.stands_alone(head, self._file.read(head.stored)):
                    self._topologies = ()
            except WireError:
                return None
            self._topologies = (*self._topologies, (start, head.sequence))
        self._sequence += 1
        self.offset = start + wire.HEAD_SIZE + head.stored
        return head.message

    def _decode(self, offset: int) -> tuple[Batch, int]:
        self._file.seek(offset)
        head = wire.parse_head(self._file.read(wire.HEAD_SIZE))
        return self._decoder.peek(head, self._file.read(head.stored))

    def _warm(self, from_ns: int) -> Position | None:
        """Return the position of a batch that begins at or shortly before `from_ns`.

        The search steps back from the last batch, as far as the records per frame so far suggest and a fifth further.
        """
        newest = (0, 0)
        back = 1
        while True:
            back = min(back, len(self._batches))
            offset, sequence, topologies = self._batches[-back]
            try:
                batch, before = self._decode(offset)
            except WireError:
                return None
            first = int(batch.ts_ns[0]) if len(batch) else None
            if back == len(self._batches) or (first is not None and first <= from_ns):
                return Position(offset, sequence, before, topologies)
            step = max(back // 4, 1)
            if first is not None and back > newest[0] > 0 and newest[1] > first:
                step = max((first - from_ns) * (back - newest[0]) * 6 // ((newest[1] - first) * 5), 1)
            if first is not None and not newest[0]:
                newest = (back, first)
            back += step


def stretch(
    capture: Capture, position: Position | None, from_ns: int | None, to_ns: int | None
) -> Iterator[StreamItem]:
    """Yield the items from `position` (None: from the beginning), with records of `from_ns` <= time < `to_ns` only."""
    if position is not None:
        capture.go_to(position)
        if capture.topology is not None:
            yield capture.topology
    for item in capture:
        if not isinstance(item, Batch):
            yield item
            continue
        batch = item
        if from_ns is not None and len(batch) and batch.ts_ns[0] < from_ns:
            batch = batch[int(batch.ts_ns.searchsorted(from_ns)) :]
        if to_ns is not None and len(batch) and batch.ts_ns[-1] >= to_ns:
            batch = batch[: int(batch.ts_ns.searchsorted(to_ns))]
            if len(batch):
                yield batch
            return
        yield batch
