"""What a reader needs before it can read a stream from the middle: HEADER and the topology of that place.

A file for each stream that still has something in the spool: its HEADER frame and its TOPOLOGY frames back to back, as
in a capture. Those that no frame in the spool needs any more are left out when the file is written anew.
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
"""Topologies that nothing needs are left out once there are so many of them: a file of a few hundred kB."""


@dataclass(slots=True)
class Context:
    """One stream's."""

    header: bytes
    topologies: list[tuple[int, bytes]] = field(default_factory=list)
    """Numbers and TOPOLOGY frames, each with all sightings; ascending."""

    def before(self, sequence: int) -> bytes | None:
        """The topology that holds at a frame, if it is of an earlier one."""
        return next((frame for number, frame in reversed(self.topologies) if number < sequence), None)


class Contexts:
    """Those of all streams in a spool, by the stream's tag. OSErrors pass."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._of: dict[int, Context] = {}

    def open(self, *, keep: bool) -> None:
        """Read what earlier runs left; with nothing of them left to send, remove it."""
        self._directory.mkdir(parents=True, exist_ok=True)
        for path in self._directory.glob(f"*{_SUFFIX}"):
            frames = _frames(path.read_bytes())
            if frames and parse_head(frames[0]).message is FrameKind.HEADER:
                numbered = [(parse_head(frame).sequence, frame) for frame in frames[1:]]
                self._of[parse_head(frames[0]).stream] = Context(frames[0], numbered)
            else:
                _LOG.warning("%s: not readable, what belongs to it cannot be sent", path)
                path.unlink()
        if not keep:
            self.close(keep=False)

    def begin(self, header: bytes) -> None:
        """A new stream."""
        stream = parse_head(header).stream
        self._of[stream] = Context(header)
        self._write(stream)

    def add(self, frame: bytes) -> None:
        """A TOPOLOGY frame, before it goes to the spool."""
        head = parse_head(frame)
        context = self._of[head.stream]
        context.topologies.append((head.sequence, frame))
        try:
            with self._path(head.stream).open("ab") as file:
                file.write(frame)
        except OSError as error:
            # It stays in memory; only a crash before there is room again would miss it.
            _LOG.warning("%s: %s", self._path(head.stream), error.strerror)

    def of(self, stream: int) -> Context | None:
        """A stream's; None if there is none, and then its frames are of no use."""
        return self._of.get(stream)

    def needed_from(self, stream: int, sequence: int) -> None:
        """The stream's oldest frame that can still be sent is this one: forget topologies that hold no more there."""
        context = self._of.get(stream)
        if context is None:
            return
        obsolete = sum(number < sequence for number, _ in context.topologies) - 1
        if obsolete >= _OBSOLETE:
            del context.topologies[:obsolete]
            try:
                self._write(stream)
            except OSError as error:
                # What is on the disk still has them all.
                _LOG.warning("%s: not written anew: %s", self._path(stream), error.strerror)

    def leave_out(self, stream: int, sequence: int) -> None:
        """A TOPOLOGY that nobody takes: frames behind it are sent with the one before."""
        context = self._of.get(stream)
        if context is None:
            return
        context.topologies = [each for each in context.topologies if each[0] != sequence]
        try:
            self._write(stream)
        except OSError as error:
            # It is refused again, and left out again.
            _LOG.warning("%s: not written anew: %s", self._path(stream), error.strerror)

    def forget(self, stream: int) -> None:
        """All of the stream has arrived."""
        if self._of.pop(stream, None) is not None:
            try:
                self._path(stream).unlink(missing_ok=True)
            except OSError as error:
                _LOG.warning("%s: not removed: %s", self._path(stream), error.strerror)

    def close(self, keep: bool) -> None:
        """With nothing left to send, remove all."""
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
    """Frames back to back, until the end or the first that is not whole."""
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
