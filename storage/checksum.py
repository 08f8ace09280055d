"""A checksum over each whole segment, so that a flipped bit is an error that names the file, never a wrong figure.

Parquet's own page checksums (written too, for other readers) do not cover page headers and the footer with its
statistics and offsets. DuckDB, which reads the segments, verifies no checksum. Each segment therefore has a CRC-32 of
all its bytes in the key-value metadata of its footer, under the name `mace.crc32`: eight hexadecimal digits, computed
with zeros in their place. A CRC-32 finds every flipped bit, every damaged stretch of up to 32 bits, and all but one in
2^32 of other damages.

The digits are in the file and not in its name, so that a segment that is written again replaces the one before it.
Segments written before checksums existed have none, and are read unverified.
"""

from __future__ import annotations

import mmap
import zlib
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import pyarrow as pa
import pyarrow.parquet as pq

KEY: Final = b"mace.crc32"
_DIGITS: Final = 8
NO_SUM: Final = b"0" * _DIGITS
_ENTRY: Final = b"\x18" + bytes([len(KEY)]) + KEY + b"\x18" + bytes([_DIGITS])
"""The entry in the footer (Thrift's compact protocol): the key as a string, and the header of a string of 8 bytes."""
_BATCH_ROWS: Final = 1 << 16
_FOOTER_MAX: Final = 1 << 24
"""The entry is searched in so many bytes at the end; the footer of a segment of 2^20 rows has some 10 kB."""


def encoded(rows: pa.Table, row_group_size: int, options: Mapping[str, Any]) -> pa.Buffer:
    """Return rows as the bytes of one Parquet file with its checksum, as `SegmentWriter` writes it.

    Arrow writes to its own memory here: a sink of Python's is called for each page and each page's header.
    """
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, rows.schema, write_page_checksum=True, **options) as writer:
        writer.write_table(rows, row_group_size=row_group_size)
        writer.add_key_value_metadata({KEY: NO_SUM})
    data = bytearray(sink.getvalue())
    at = data.rindex(_ENTRY) + len(_ENTRY)
    data[at : at + _DIGITS] = b"%08x" % zlib.crc32(data)
    return pa.py_buffer(data)


class SegmentWriter:
    """Writes one Parquet file with its checksum to `sink` (anything with `write`), which the caller closes.

    It is a context manager. The footer gets the key-value metadata `told`. `options` are those of
    `pyarrow.parquet.ParquetWriter`. OSErrors of the sink pass.
    """

    def __init__(
        self, sink: Any, schema: pa.Schema, told: Mapping[bytes, bytes] | None = None, /, **options: Any
    ) -> None:
        self._sum = SummingSink(sink)
        self._told = dict(told or {})
        self._writer = pq.ParquetWriter(self._sum, schema, write_page_checksum=True, **options)

    def write(self, rows: pa.Table, row_group_size: int) -> None:
        """Append rows, in row groups of at most `row_group_size`."""
        self._writer.write_table(rows, row_group_size=row_group_size)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        self._writer.add_key_value_metadata(self._told | {KEY: NO_SUM})
        self._sum.hold()
        self._writer.close()
        if kind is None:
            self._sum.release()


class SummingSink:
    """Computes the sum of the bytes written, and holds back the footer until the sum is inserted into it."""

    closed = False

    def __init__(self, sink: Any) -> None:
        self._sink = sink
        self._crc = 0
        self._held: bytearray | None = None

    def write(self, data: bytes | memoryview) -> int:
        self._crc = zlib.crc32(data, self._crc)
        if self._held is None:
            self._sink.write(data)
        else:
            self._held += data
        return len(data)

    def hold(self) -> None:
        self._held = bytearray()

    def release(self) -> None:
        assert self._held is not None
        at = self._held.rindex(_ENTRY) + len(_ENTRY)
        self._held[at : at + _DIGITS] = b"%08x" % self._crc
        self._sink.write(self._held)
        self._held = None

    def flush(self) -> None:
        """Nothing to do: the caller closes the sink."""

    def close(self) -> None:
        """The caller closes the sink."""

    def readable(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False


def bears_sum(path: Path) -> bool:
    """Return whether the file has a checksum. OSErrors pass."""
    with closing(mapped(path)) as data:
        return has_sum(data)


def has_sum(data: Any) -> bool:
    """Return whether a file's bytes (or a mapping of them) have a checksum."""
    return _digits_at(data) is not None


def mismatch(path: Path) -> str:
    """Return how a file differs from its checksum; "" if it does not, or has none. OSErrors pass."""
    with closing(mapped(path)) as data:
        return mismatch_of(data)


def mismatch_of(data: Any) -> str:
    """Return how a file's bytes (or a mapping of them) differ from its checksum; "" if they do not, or have none."""
    at = _digits_at(data)
    if at is None:
        return ""
    with memoryview(data) as view:
        crc = zlib.crc32(view[:at])
        crc = zlib.crc32(NO_SUM, crc)
        crc = zlib.crc32(view[at + _DIGITS :], crc)
    written, found = bytes(data[at : at + _DIGITS]), b"%08x" % crc
    if found == written:
        return ""
    return f"its checksum is {found.decode()}, {written.decode('ascii', 'replace')!r} was written"


def damage(path: Path) -> str:
    """Read a whole file; returns a description of its damage, "" if there is none. FileNotFoundError passes."""
    try:
        if why := mismatch(path):
            return why
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, use_threads=False):
                del batch
    except FileNotFoundError:
        raise
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        return str(error).splitlines()[0]
    return ""


def mapped(path: Path) -> Any:
    """Return a mapping of a file's bytes, for reading, which the caller closes. OSErrors pass."""
    with path.open("rb") as file:
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:  # an empty file cannot be mapped
            return mmap.mmap(-1, 1)


def _digits_at(data: Any) -> int | None:
    at: int = data.rfind(_ENTRY, max(0, len(data) - _FOOTER_MAX))
    return None if at < 0 else at + len(_ENTRY)
