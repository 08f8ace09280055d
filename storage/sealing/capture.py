"""Seals a capture file while it is written: a statement for each frame, in `FILE.seal` beside it.

    begin   subject "capture", file_head (hex), host, run, source, clock (as in the capture's HEADER)
    frame   frame (its number), at, size, sha256; of a batch also records, from_ns, to_ns (UTC of first and last record)
    end     frames, bytes, records, lost, clock (read again); whole: whether the capture has its END

A statement follows its frame, so that a killed writer leaves at most one frame that is not sealed.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from contracts import clock
from contracts.interfaces import StreamHeader
from contracts.records import Batch
from contracts.wire import FILE_HEAD, clock_fields
from storage.sealing.keys import SealKey
from storage.sealing.log import SealWriter
from storage.sealing.places import seal_path


class CaptureSeal:
    """The seal of one capture file that is being written. OSErrors and `SealError` pass."""

    def __init__(self, capture: Path, key: SealKey, header: StreamHeader, *, overwrite: bool, sync: bool) -> None:
        self._log = SealWriter.create(seal_path(capture), key, overwrite=overwrite, sync=sync)
        self._offset_ns = header.clock.offset_ns
        self._frames, self._at = 0, len(FILE_HEAD)
        self._log.append(
            "begin",
            subject="capture",
            file_head=FILE_HEAD.hex(),
            host=header.host,
            run=header.run,
            source=header.source,
            clock=clock_fields(header.clock),
        )

    @property
    def head(self) -> str:
        """SHA-256 of the last statement's line: vouches for the whole seal."""
        return self._log.head

    def frame(self, frame: bytes, batch: Batch | None = None) -> None:
        """State that this frame follows in the file, after it was written."""
        times = {}
        if batch is not None and len(batch):
            first, last = int(batch.ts_ns[0]) + self._offset_ns, int(batch.ts_ns[-1]) + self._offset_ns
            times = {"records": len(batch), "from_ns": first, "to_ns": last}
        digest = hashlib.sha256(frame).hexdigest()
        self._log.append("frame", frame=self._frames, at=self._at, size=len(frame), sha256=digest, **times)
        self._frames += 1
        self._at += len(frame)

    def end(self, records: int, lost: int, *, whole: bool, sync: bool) -> None:
        """State that the recording has ended here."""
        told = clock_fields(clock.measure())
        self._log.append(
            "end", frames=self._frames, bytes=self._at, records=records, lost=lost, whole=whole, clock=told
        )
        if sync:
            self._log.sync()

    def close(self) -> None:
        """Close the seal's file. May be called again."""
        self._log.close()
