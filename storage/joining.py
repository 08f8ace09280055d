"""Joins Parquet files of one schema into one: moves their pages as they are, and writes a new footer.

    a: PAR1 │ row groups of a │ footer │ length │ PAR1
    b: PAR1 │ row groups of b │ footer │ length │ PAR1          joined: PAR1 │ a's and b's row groups │ footer │ ...

A row group says in the footer where its pages begin in the file; moving it adds one number to these offsets. The footer
is a Thrift struct in the compact protocol (apache/thrift, doc/specs/thrift-compact-protocol.md), `FileMetaData` of
parquet-format's parquet.thrift. The joined footer has the fields that Arrow writes; a file with others, with another
schema or of another version of Arrow raises `NotAlike`, and its rows have to be decoded and encoded.

pyarrow can do this for a dataset's `_metadata` only, whose row groups stay in files of their own.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, Final, Self

from storage.checksum import KEY, NO_SUM, SummingSink

_MAGIC: Final = b"PAR1"
_TAIL: Final = 8
"""Bytes behind the footer: its length and the magic number."""

# FileMetaData, its RowGroup, ColumnChunk and ColumnMetaData: numbers of fields.
_VERSION, _SCHEMA, _ROWS, _ROW_GROUPS, _KEY_VALUES, _CREATED_BY, _ORDERS = range(1, 8)
_COLUMNS, _GROUP_OFFSET, _ORDINAL = 1, 5, 7
_CHUNK_OFFSET, _CHUNK = 2, 3
_PAGE_OFFSETS: Final = (9, 10, 11)
"""Offsets of a column's data, index and dictionary pages."""
_KNOWN: Final = {
    "file": {_VERSION, _SCHEMA, _ROWS, _ROW_GROUPS, _KEY_VALUES, _CREATED_BY, _ORDERS},
    "row group": {_COLUMNS, 2, 3, 4, _GROUP_OFFSET, 6, _ORDINAL},
    "column chunk": {_CHUNK_OFFSET, _CHUNK},
    "column": {1, 2, 3, 4, 5, 6, 7, 8, *_PAGE_OFFSETS, 12, 13, 16},
}
"""Fields that a moved row group may have. Others, such as the offsets of page indexes, could be wrong afterwards."""

# Types of the compact protocol.
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)
_MOST_DEEP: Final = 16

_Struct = dict[int, tuple[int, Any]]
"""Number of each field -> its type and value. Values: int, bytes (`_BINARY`, `_DOUBLE`), `_List`, another struct."""


class NotAlike(ValueError):
    """A file cannot be joined to the others as it is."""


@dataclass(frozen=True, slots=True)
class _List:
    kind: int
    values: list[Any]


class Joiner:
    """Writes the row groups of several files, and a checksum over the whole, to `sink`, which the caller closes.

    OSErrors of the sink pass.
    """

    def __init__(self, sink: Any, like: bytes) -> None:
        """`like` is a Parquet file, as `storage.tables.encode` returns it: its schema and key-values are required."""
        self._footer, _ = _footer(like)
        for pair in self._footer[_KEY_VALUES][1].values:
            if pair[1][1] == KEY:
                pair[2] = (_BINARY, NO_SUM)
        self._row_groups: list[_Struct] = []
        self._sink = SummingSink(sink)
        self._sink.write(_MAGIC)
        self._at = len(_MAGIC)
        self.rows = 0
        """Number of rows so far."""

    def add(self, data: Any) -> None:
        """Append the row groups of a file (bytes, or a mapping). Raises `NotAlike` before anything is written."""
        footer, end = _footer(data)
        _required("file", footer)
        for field in (_VERSION, _SCHEMA, _KEY_VALUES, _CREATED_BY, _ORDERS):
            if _compared(footer, field) != _compared(self._footer, field):
                raise NotAlike(f"another schema or version (field {field})")
        groups: list[_Struct] = footer[_ROW_GROUPS][1].values
        for group in groups:
            _move(group, self._at - len(_MAGIC))
        with memoryview(data) as view:
            self._sink.write(view[len(_MAGIC) : end])
        self._at += end - len(_MAGIC)
        self._row_groups += groups
        self.rows += int(footer[_ROWS][1])

    def close(self) -> None:
        """Write the footer."""
        whole = self._footer | {_ROWS: (_I64, self.rows), _ROW_GROUPS: (_LIST, _List(_STRUCT, self._row_groups))}
        out = bytearray()
        _put_struct(out, whole)
        self._sink.hold()
        self._sink.write(bytes(out) + struct.pack("<i", len(out)) + _MAGIC)
        self._sink.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()


def _move(group: _Struct, by: int) -> None:
    """Add `by` to all offsets of a row group."""
    _required("row group", group)
    _shift(group, _GROUP_OFFSET, by)
    group.pop(_ORDINAL, None)
    for chunk in group[_COLUMNS][1].values:
        _required("column chunk", chunk)
        column = chunk[_CHUNK][1]
        _required("column", column)
        # Writers of today leave 0: the column's metadata is not behind its pages.
        if chunk[_CHUNK_OFFSET][1]:
            _shift(chunk, _CHUNK_OFFSET, by)
        for field in _PAGE_OFFSETS:
            _shift(column, field, by)


def _required(what: str, found: _Struct) -> None:
    if strange := found.keys() - _KNOWN[what]:
        raise NotAlike(f"field {min(strange)} of a {what}")


def _shift(of: _Struct, field: int, by: int) -> None:
    if field in of:
        kind, value = of[field]
        of[field] = (kind, value + by)


def _compared(footer: _Struct, field: int) -> Any:
    """Return a field to compare with that of another file, without the file's checksum."""
    value = footer.get(field)
    if field != _KEY_VALUES or value is None:
        return value
    return [pair for pair in value[1].values if pair[1][1] != KEY]


# The compact protocol ----------------------------------------------------------------------------------------


def _footer(data: Any) -> tuple[_Struct, int]:
    """Return a file's footer, and the offset at which it begins. Raises `NotAlike` if there is none."""
    size = len(data)
    if size < len(_MAGIC) + _TAIL or data[:4] != _MAGIC or data[size - 4 : size] != _MAGIC:
        raise NotAlike("not a Parquet file")
    [length] = struct.unpack("<I", data[size - _TAIL : size - 4])
    begin = size - _TAIL - length
    if begin < len(_MAGIC):
        raise NotAlike("a footer larger than the file")
    try:
        return _Reader(bytes(data[begin : size - _TAIL])).struct(), begin
    except (IndexError, KeyError) as error:
        raise NotAlike("a damaged footer") from error


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data, self._at, self._deep = data, 0, 0

    def struct(self) -> _Struct:
        self._deep += 1
        if self._deep > _MOST_DEEP:
            raise NotAlike("structs in structs, too deep")
        found: _Struct = {}
        number = 0
        while head := self._byte():
            kind = head & 0x0F
            number = number + (head >> 4) if head >> 4 else self._signed()
            found[number] = (kind, kind == _TRUE if kind in {_TRUE, _FALSE} else self._value(kind))
        self._deep -= 1
        return found

    def _value(self, kind: int) -> Any:
        if kind in {_I16, _I32, _I64}:
            return self._signed()
        if kind == _BINARY:
            return self._bytes(self._unsigned())
        if kind == _STRUCT:
            return self.struct()
        if kind in {_LIST, _SET}:
            head = self._byte()
            size = head >> 4 if head >> 4 != 0x0F else self._unsigned()
            of = head & 0x0F
            # A truth value in a list is a byte of its own.
            return _List(of, [self._byte() if of in {_TRUE, _FALSE} else self._value(of) for _ in range(size)])
        if kind == _BYTE:
            return self._byte()
        if kind == _DOUBLE:
            return self._bytes(8)
        raise NotAlike(f"a value of type {kind}")

    def _byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def _bytes(self, size: int) -> bytes:
        if self._at + size > len(self._data):
            raise IndexError
        self._at += size
        return self._data[self._at - size : self._at]

    def _unsigned(self) -> int:
        value = shift = 0
        while (byte := self._byte()) & 0x80:
            value |= (byte & 0x7F) << shift
            shift += 7
        return value | byte << shift

    def _signed(self) -> int:
        value = self._unsigned()
        return value >> 1 ^ -(value & 1)


def _put_struct(out: bytearray, fields: _Struct) -> None:
    before = 0
    for number, (kind, value) in sorted(fields.items()):
        told = (_TRUE if value else _FALSE) if kind in {_TRUE, _FALSE} else kind
        if 0 < number - before <= 0x0F:
            out.append(number - before << 4 | told)
        else:
            out.append(told)
            _put_signed(out, number)
        before = number
        if kind not in {_TRUE, _FALSE}:
            _put(out, kind, value)
    out.append(0)


def _put(out: bytearray, kind: int, value: Any) -> None:
    if kind in {_I16, _I32, _I64}:
        _put_signed(out, value)
    elif kind == _BINARY:
        _put_unsigned(out, len(value))
        out += value
    elif kind == _STRUCT:
        _put_struct(out, value)
    elif kind in {_LIST, _SET}:
        size = len(value.values)
        out.append(min(size, 0x0F) << 4 | value.kind)
        if size >= 0x0F:
            _put_unsigned(out, size)
        for each in value.values:
            if value.kind in {_TRUE, _FALSE}:
                out.append(each)
            else:
                _put(out, value.kind, each)
    elif kind == _DOUBLE:
        out += value
    else:
        out.append(value)


def _put_unsigned(out: bytearray, value: int) -> None:
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)


def _put_signed(out: bytearray, value: int) -> None:
    _put_unsigned(out, value << 1 if value >= 0 else (-value << 1) - 1)
