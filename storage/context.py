"""Keeps the frames that a reader needs to read a stream from the middle: its HEADER and the topology at that place.

Each stream with frames in the spool has a file with its HEADER frame and its TOPOLOGY frames back to back, as in a
capture. When the file is rewritten, topologies that no frame in the spool needs are left out.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from contracts.errors import WireError
from contracts.wire import HEAD_SIZE, FrameKind, parse_head

_LOG: Final = logging.getLogger(__name__)
_SUFFIX: Final = ".context"
_OBSOLETE: Final = 16
"""The file is rewritten once it has so many topologies that no frame needs: a file of a few hundred kB."""


@dataclass(slots=True)
class Context:
    """The HEADER and the topologies of one stream."""

    header: bytes
    topologies: list[tuple[int, bytes]] = field(default_factory=list)
    """(sequence number, TOPOLOGY frame with all sightings), ascending."""

    def before(self, sequence: int) -> bytes | None:
        """Return the last topology before the frame with this number; None if there is none."""
        return next((frame for number, frame in reversed(self.topologies) if number < sequence), None)


class Contexts:
    """The contexts of all streams in a spool, by the stream's tag. OSErrors pass."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._of: dict[int, Context] = {}

    def open(self, *, keep: bool) -> None:
        """Read the contexts of earlier runs; without `keep`, remove them, because none of their frames is left."""
        self._directory.mkdir(parents=True, exist_ok=True)
        for path in self._directory.glob(f"*{_SUFFIX}"):
            frames = _frames(path.read_bytes())
            if frames and parse_head(frames[0]).message is FrameKind.HEADER:
                numbered = [(parse_head(frame).sequence, frame) for frame in frames[1:]]
                self._of[parse_head(frames[0]).stream] = Context(frames[0], numbered)
            else:
                _LOG.warning("%s: not readable; the frames of its stream cannot be sent", path)
                path.unlink()
        if not keep:
            self.close(keep=False)

    def begin(self, header: bytes) -> None:
        """Begin the context of a new stream with its HEADER."""
        stream = parse_head(header).stream
        self._of[stream] = Context(header)
        self._write(stream)

    def add(self, frame: bytes) -> None:
        """Add a TOPOLOGY frame. To be called before the frame goes to the spool."""
        head = parse_head(frame)
        context = self._of[head.stream]
        context.topologies.append((head.sequence, frame))
        try:
            with self._path(head.stream).open("ab") as file:
                file.write(frame)
        except OSError as error:
            # The frame stays in memory; only a crash before the next rewrite loses it.
            _LOG.warning("%s: %s", self._path(head.stream), error.strerror)

    def of(self, stream: int) -> Context | None:
        """Return a stream's context; None if it is missing, and then no reader can read the stream's frames."""
        return self._of.get(stream)

    def needed_from(self, stream: int, sequence: int) -> None:
        """Forget the topologies that only frames before `sequence`, the stream's oldest in the spool, need."""
        context = self._of.get(stream)
        if context is None:
            return
        obsolete = sum(number < sequence for number, _ in context.topologies) - 1
        if obsolete >= _OBSOLETE:
            del context.topologies[:obsolete]
            try:
                self._write(stream)
            except OSError as error:
                # The file still has all topologies.
                _LOG.warning("%s: cannot be rewritten: %s", self._path(stream), error.strerror)

    def leave_out(self, stream: int, sequence: int) -> None:
        """Forget a TOPOLOGY that the ingest refuses: frames after it are sent with the topology before it."""
        context = self._of.get(stream)
        if context is None:
            return
        context.topologies = [each for each in context.topologies if each[0] != sequence]
        try:
            self._write(stream)
        except OSError as error:
            # After a restart the topology is sent, refused and left out again.
            _LOG.warning("%s: cannot be rewritten: %s", self._path(stream), error.strerror)

    def forget(self, stream: int) -> None:
        """Remove the context of a stream whose frames have all arrived."""
        if self._of.pop(stream, None) is not None:
            try:
                self._path(stream).unlink(missing_ok=True)
            except OSError as error:
                _LOG.warning("%s: cannot be removed: %s", self._path(stream), error.strerror)

    def close(self, keep: bool) -> None:
        """Forget all contexts; without `keep`, remove their files too."""
        for stream in [] if keep else list(self._of):
            self.forget(stream)
        self._of.clear()

    def _path(self, stream: int) -> Path:
        return self._directory / f"{stream:08x}{_SUFFIX}"

    def _write(self, stream: int) -> None:
        context = self._of[stream]
        path = self._path(stream)
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(b"".join((context.header, *(frame for _, frame in context.topologies))))
        temporary.replace(path)


def _frames(data: bytes) -> list[bytes]:
    """Split frames that are back to back; stops at the first incomplete or damaged one."""
    found = []
    at = 0
    while at < len(data):
        try:
            end = at + HEAD_SIZE + parse_head(data[at : at + HEAD_SIZE]).stored
        except WireError:
            break
        if end > len(data):
            break
        found.append(data[at:end])
        at = end
    return found
