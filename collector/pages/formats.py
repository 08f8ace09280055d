"""The kernel's own description of its trace pages and events: `header_page` and the `format` files.

Event ids, field offsets and even the fields themselves differ between kernels, so that MACE fixes only their names.
The format is documented in Documentation/trace/events.rst ("Event formats"); the kernel writes it in
kernel/trace/trace_events.c (`f_show`) and kernel/trace/ring_buffer.c (`ring_buffer_print_page_header`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from contracts.errors import SourceError, nearest

_FIELD: Final = re.compile(
    r"\s*field:(?P<declaration>[^;]*);\s*offset:(?P<offset>\d{1,9});\s*size:(?P<size>\d{1,9});"
    r"(?:\s*signed:(?P<signed>\d+);)?\s*"
)
_ARRAY: Final = re.compile(r"\s*\[[^\]]*\]\s*$")

MAX_EVENT_ID: Final = 0xFFFF
"""`common_type` is an unsigned short (include/linux/trace_events.h, struct trace_entry)."""


@dataclass(frozen=True, slots=True)
class EventField:
    """One field of an event or of the page header. `offset` and `size` in bytes."""

    name: str
    type: str
    offset: int
    size: int
    signed: bool
    is_array: bool = False
    """Whether the field is declared with brackets, as a `__data_loc` always is."""

    @property
    def is_data_loc(self) -> bool:
        """Whether the field holds the position of its data: offset in the low 16 bits, length in the high 16 bits."""
        return self.type.startswith("__data_loc")

    @property
    def is_rel_loc(self) -> bool:
        """Whether the field holds the position of its data like a `__data_loc`, with the offset from the field's end.

        Linux kernel commit 55de2c0b5610 (in v5.17).
        """
        return self.type.startswith("__rel_loc")

    @property
    def is_rest(self) -> bool:
        """Whether the field is an array without a size, which extends to the end of the event: `char buf[]`."""
        return self.is_array and self.size == 0


@dataclass(frozen=True, slots=True)
class PageLayout:
    """Offsets and sizes of the parts of a ring-buffer page, in bytes (`events/header_page`)."""

    timestamp_offset: int
    commit_offset: int
    commit_size: int
    data_offset: int
    data_size: int

    @property
    def page_size(self) -> int:
        """Bytes of header and data together, which one read of `trace_pipe_raw` returns."""
        return self.data_offset + self.data_size


@dataclass(frozen=True, slots=True)
class EventFormat:
    """The binary layout of one event."""

    event: str
    """`subsystem:name`, as in contracts.hooks."""
    id: int
    fields: Mapping[str, EventField]

    def field(self, name: str) -> EventField:
        """Return the field of that name; raises `SourceError` with the event and the known fields."""
        try:
            return self.fields[name]
        except KeyError:
            raise SourceError(
                f"{self.event}: this kernel's format has no field {name!r}{nearest(name, self.fields)}; it has "
                f"{', '.join(self.fields)}"
            ) from None


def _parse_field(where: str, number: int, line: str) -> EventField:
    match = _FIELD.fullmatch(line)
    if match is None:
        raise SourceError(f"{where}: line {number} is not a field description: {line.strip()!r}")
    # `char name[16]`, `const void * skbaddr`, `__data_loc char[] name`: the name is the last word.
    bare = _ARRAY.sub("", match["declaration"])
    type_name, _, name = bare.strip().rpartition(" ")
    if not name or not type_name:
        raise SourceError(f"{where}: line {number} declares no field: {line.strip()!r}")
    return EventField(
        name,
        type_name.strip(),
        int(match["offset"]),
        int(match["size"]),
        match["signed"] == "1",
        "[" in match["declaration"],
    )


def parse_header_page(text: str) -> PageLayout:
    """Parse the text of `events/header_page`; raises `SourceError` with the line that is wrong."""
    where = "events/header_page"
    fields = {
        f.name: f for f in (_parse_field(where, n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip())
    }
    for name in ("timestamp", "commit", "data"):
        if name not in fields:
            raise SourceError(f"{where}: no field {name!r}; found {', '.join(fields) or 'none'}")
    timestamp, commit, data = fields["timestamp"], fields["commit"], fields["data"]
    if timestamp.size != 8 or commit.size not in (4, 8) or data.offset % 4 or data.size % 4:
        raise SourceError(
            f"{where}: a {timestamp.size}-byte timestamp, a {commit.size}-byte commit and data of {data.size} bytes at "
            f"{data.offset} are not a page this version reads"
        )
    return PageLayout(timestamp.offset, commit.offset, commit.size, data.offset, data.size)


def parse_format(event: str, text: str) -> EventFormat:
    """Parse the text of one event's `format` file; raises `SourceError` with the event and the line."""
    ident: int | None = None
    in_fields = False
    fields: dict[str, EventField] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("ID:"):
            value = line.removeprefix("ID:").strip()
            if not value.isdecimal() or int(value) > MAX_EVENT_ID:
                raise SourceError(f"{event}: format line {number}: the id is {value!r}, expected 0 to {MAX_EVENT_ID}")
            ident = int(value)
        elif line.startswith("format:"):
            in_fields = True
        elif line.startswith("print fmt:"):
            break
        elif in_fields and line.strip():
            field = _parse_field(f"{event}: format", number, line)
            fields[field.name] = field
    if ident is None:
        raise SourceError(f"{event}: format has no line 'ID:'")
    if not fields:
        raise SourceError(f"{event}: format has no fields")
    return EventFormat(event, ident, fields)
