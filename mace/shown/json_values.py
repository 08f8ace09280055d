r"""Converts Arrow columns of any depth to JSON values, for the rows of a query as JSON, CSV and tables.

    integers, text, booleans          unchanged; decimals without a fraction are integers, others text with all digits
    NaN, Infinity                     null
    times                             ISO 8601, to the digit of the type: 2026-11-24T12:42:25.644110536Z, 03:04:05
    infinite times                    infinity, -infinity
    lists, maps, structs, unions      list, list of pairs, object (a list where names repeat), the present value
    bytes                             text, with \xAA for bytes that are not printable ASCII

`storage.sql` has already converted types without an Arrow form to text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import isfinite
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import compute

_DATE_BEFORE_INFINITY: Final = (1 << 31) - 2
_TIME_BEFORE_INFINITY: Final = (1 << 63) - 2
"""Largest finite date and time: DuckDB's infinities are the numbers beyond, of either sign."""
_PER_SECOND: Final = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
_QUOTED: Final = frozenset(b"\\\"'")
"""Printable bytes that are escaped nevertheless, as in DuckDB's own text of a BLOB."""


def column(values: pa.Array | pa.ChunkedArray) -> list[Any]:
    """Return the JSON values of a column, in order."""
    if isinstance(values, pa.ChunkedArray):
        return [value for chunk in values.chunks for value in column(chunk)]
    kind = values.type
    for applies, convert in _CONVERSIONS:
        if applies(kind):
            return convert(values)
    found: list[Any] = values.to_pylist()
    return found


def rows(found: pa.Table | pa.RecordBatch) -> Iterable[tuple[Any, ...]]:
    """Return the rows of a table as tuples of JSON values."""
    return zip(*(column(each) for each in found.columns), strict=True)


def _each(convert: Callable[[Any], Any]) -> Callable[[pa.Array], list[Any]]:
    return lambda values: [None if value is None else convert(value) for value in values.to_pylist()]


def _masked(values: pa.Array, converted: Iterable[Any]) -> list[Any]:
    return [value if there else None for value, there in zip(converted, values.is_valid().to_pylist(), strict=True)]


def _numbers(values: pa.Array, width: pa.DataType) -> npt.NDArray[np.int64]:
    """Return times as integers in the unit of their type; 0 for null."""
    plain: npt.NDArray[np.int64] = compute.fill_null(values.cast(width), 0).to_numpy(zero_copy_only=False)
    return plain.astype(np.int64)


def _instants(numbers: npt.NDArray[np.int64], unit: str, last: int, zone: str) -> list[str]:
    endless = np.abs(numbers) > last
    # Infinite times are replaced first, because numpy reads the smallest integer as "not a time".
    texts = np.datetime_as_string(np.where(endless, 0, numbers).astype(f"datetime64[{unit}]")).tolist()
    for i in np.flatnonzero(endless).tolist():
        texts[i] = "infinity" if numbers[i] > 0 else "-infinity"
    return [text if text.endswith("infinity") else _four_digits(text) + zone for text in texts]


def _four_digits(text: str) -> str:
    """Pad a negative year to the four digits of ISO 8601: numpy counts the sign as a digit, as in `-043`."""
    year, dash, rest = text[1:].partition("-")
    return f"-{year:0>4}{dash}{rest}" if text.startswith("-") else text


def _timestamps(values: pa.Array) -> list[Any]:
    kind = values.type
    numbers = _numbers(values, pa.int64())
    return _masked(values, _instants(numbers, kind.unit, _TIME_BEFORE_INFINITY, "Z" if kind.tz else ""))


def _dates(values: pa.Array) -> list[Any]:
    return _masked(values, _instants(_numbers(values, pa.int32()), "D", _DATE_BEFORE_INFINITY, ""))


def _times_of_day(values: pa.Array) -> list[Any]:
    per_second = _PER_SECOND[values.type.unit]
    width = pa.int32() if pa.types.is_time32(values.type) else pa.int64()

    def text(number: int) -> str:
        seconds, rest = divmod(number, per_second)
        digits = f".{rest:0{len(str(per_second)) - 1}d}" if rest else ""
        return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}{digits}"

    return _masked(values, map(text, _numbers(values, width).tolist()))


def _durations(values: pa.Array) -> list[Any]:
    per_second = _PER_SECOND[values.type.unit]
    return _masked(values, (number / per_second for number in _numbers(values, pa.int64()).tolist()))


def _structs(values: pa.Array) -> list[Any]:
    names = [field.name for field in values.type]
    # Not `flatten`, which merges the struct's nulls into its fields and aborts for a field that is a union.
    fields = [column(values.field(number)) for number in range(len(names))]
    parts = zip(*fields, strict=True) if names else ((),) * len(values)
    if len(set(names)) < len(names):
        return _masked(values, map(list, parts))
    return _masked(values, (dict(zip(names, part, strict=True)) for part in parts))


def _cut(inside: list[Any], lengths: Iterable[int]) -> Iterator[list[Any]]:
    at = 0
    for length in lengths:
        yield inside[at : at + length]
        at += length


def _lists(values: pa.Array) -> list[Any]:
    offsets = values.offsets.to_numpy()
    return _masked(values, _cut(column(values.values[offsets[0] : offsets[-1]]), np.diff(offsets).tolist()))


def _fixed_lists(values: pa.Array) -> list[Any]:
    size, first = values.type.list_size, values.offset
    inside = column(values.values[first * size : (first + len(values)) * size])
    return _masked(values, _cut(inside, [size] * len(values)))


def _maps(values: pa.Array) -> list[Any]:
    offsets = values.offsets.to_numpy()
    keys, items = (column(part[offsets[0] : offsets[-1]]) for part in (values.keys, values.items))
    return _masked(values, _cut(list(map(list, zip(keys, items, strict=True))), np.diff(offsets).tolist()))


def _unions(values: pa.Array) -> list[Any]:
    codes = {code: number for number, code in enumerate(values.type.type_codes)}
    parts = [column(values.field(number)) for number in range(values.type.num_fields)]
    return [parts[codes[code]][row] for row, code in enumerate(values.type_codes.to_pylist())]


def _bytes(raw: bytes) -> str:
    return "".join(chr(b) if 32 <= b < 127 and b not in _QUOTED else f"\\x{b:02X}" for b in raw)


_CONVERSIONS: Final[tuple[tuple[Callable[[pa.DataType], bool], Callable[[pa.Array], list[Any]]], ...]] = (
    (lambda kind: isinstance(kind, pa.BaseExtensionType), lambda values: column(values.storage)),
    (pa.types.is_dictionary, lambda values: column(values.dictionary_decode())),
    (pa.types.is_floating, _each(lambda value: value if isfinite(value) else None)),
    (lambda kind: pa.types.is_decimal(kind) and kind.scale == 0, _each(int)),
    (pa.types.is_decimal, _each(str)),
    (pa.types.is_timestamp, _timestamps),
    (pa.types.is_date32, _dates),
    (pa.types.is_time, _times_of_day),
    (pa.types.is_duration, _durations),
    (pa.types.is_struct, _structs),
    (pa.types.is_map, _maps),
    (pa.types.is_union, _unions),
    (pa.types.is_fixed_size_list, _fixed_lists),
    (lambda kind: pa.types.is_list(kind) or pa.types.is_large_list(kind), _lists),
    (
        lambda kind: pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind),
        _each(_bytes),
    ),
)
