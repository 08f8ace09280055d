"""trace.dat files for programs and notebooks: any event of any subsystem, as numpy columns.

    from collector.tracecmd.reader import TraceDat

    with TraceDat("trace.dat") as trace:
        print(trace.kernel, trace.cpus, trace.events)
        switches = trace.read("sched:sched_switch")
        print(switches["ts_ns"], switches["prev_comm"], switches["next_pid"])

`read` returns all events of one name, in time order; `blocks` yields them piece by piece, in bounded memory. A column
is an array with one value per event:

    ts_ns         int64, ns of the clock that the file was recorded with (`trace.clock`)
    cpu           uint16
    the fields    integers of their size and sign; `char x[N]` as bytes (dtype S) up to the first NUL; strings of
                  variable length (`__data_loc char[]`, `char x[]`) likewise, or as an object array of `bytes` if a
                  long string among many would make all elements as wide; other arrays as rows of uint8, and arrays of
                  variable length as an object array of `bytes`, both in the machine's byte order (`trace.byte_order`)

The fields are those of the kernel's own format, including `common_pid` and the other common ones. The subsystem
`ftrace` has the events that ftrace records by itself: `ftrace:print` (texts written to trace_marker), `bprint` and
`bputs` (trace_printk), `function`, `funcgraph_entry` and `funcgraph_exit`, `kernel_stack` and more. `caller` of a
kernel_stack has as many addresses as the field `size` states. `buf` of raw_data has all bytes that were written, with
up to three bytes of padding.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import Enum, auto
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from collector.pages.decoding import Located, PageDecoder, Stretch
from collector.pages.formats import EventField, EventFormat
from collector.reading.closing import Closing
from collector.tracecmd.clock import clock_of
from collector.tracecmd.endian import to_little_endian
from collector.tracecmd.file import FTRACE, BufferInfo, CpuData, TraceFile
from collector.tracecmd.pages import layout_of, pieces
from contracts.arrays import Bytes, Ints
from contracts.errors import CaptureError, SourceError, nearest

EventColumns = dict[str, npt.NDArray[Any]]
_PIECE_PAGES: Final = 512
_TEXT_MAX: Final = 32 << 20
"""Largest column of strings, bytes, in which all elements are as wide as the longest string."""


class TraceDat(Closing):
    """An open trace.dat file; a context manager.

    Opening raises `Unavailable` if there is no such file and `CaptureError` if the file is damaged or no trace.dat.
    Methods raise `KeyError`, with the nearest name, for an event that the file does not describe.
    """

    def __init__(self, path: Path | str, *, buffer: str = "", clock: str = "") -> None:
        """Open a file and read its frame.

        `buffer` names the trace instance to read (`top`: the top one); empty: all. `clock` names the trace clock of a
        file without one, like `--clock`.
        """
        self._file: Final = TraceFile(path)
        frame = self._file.frame
        self.path: Final = self._file.path
        self.version: Final = frame.version
        self.byte_order: Final = "big" if frame.big_endian else "little"
        """Byte order of the machine, and of the bytes in columns of arrays."""
        words = frame.uname.split()
        self.host: Final = words[1] if len(words) > 2 else ""
        self.kernel: Final = words[2] if len(words) > 2 else ""
        self.buffers: Final = tuple(info.name or "top" for info in frame.buffers if info.cpus)
        self._chosen = [i for i in frame.buffers if i.cpus and (not buffer or (i.name or "top") == buffer)]
        if buffer and not self._chosen:
            self.close()
            raise KeyError(f"no buffer {buffer!r}{nearest(buffer, self.buffers)}; there are {', '.join(self.buffers)}")
        self._asked_clock = clock
        self._formats: dict[str, EventFormat] = {}

    def close(self) -> None:
        """Close the file. Safe to call again."""
        self._file.close()

    @property
    def events(self) -> tuple[str, ...]:
        """Names of the events that the file describes, `subsystem:name`; some may have no occurrence."""
        return tuple(sorted(self._file.frame.formats))

    @property
    def cpus(self) -> tuple[int, ...]:
        """Numbers of the CPUs that have pages."""
        return tuple(sorted({data.cpu for info in self._chosen for data in info.cpus}))

    @property
    def clock(self) -> str:
        """The trace clock; "" if the file does not say."""
        return next((self._clock(info).name for info in self._chosen), "")

    @property
    def utc_offset_ns(self) -> int | None:
        """Nanoseconds to add to `ts_ns` to get UTC; None if the file was recorded without `--date`."""
        return self._file.frame.date_offset_ns

    def processes(self) -> dict[int, str]:
        """Return process id -> name, for the processes that trace-cmd saved."""
        lines = (line.split(None, 1) for line in self._file.frame.cmdlines.splitlines())
        return {int(line[0]): line[1] for line in lines if len(line) == 2 and line[0].isdecimal()}

    def format(self, event: str) -> EventFormat:
        """Return the format of an event; raises `KeyError` for an unknown event, `CaptureError` for a bad format."""
        if event not in self._formats:
            try:
                found = self._file.frame.format(event)
            except SourceError as error:
                raise CaptureError(self.path, 0, str(error)) from error
            if found is None:
                raise KeyError(f"no event {event!r}{nearest(event, self.events)} in {self.path}")
            self._formats[event] = found
        return self._formats[event]

    def read(self, event: str) -> EventColumns:
        """Return the columns of all events of one name, in time order; equal times are ordered by CPU.

        Raises `KeyError` or `CaptureError`.
        """
        parts = list(self.blocks(event))
        if not parts:
            return self._columns_of_none(event)
        whole = {name: _joined([part[name] for part in parts]) for name in parts[0]}
        order = np.lexsort((whole["cpu"], whole["ts_ns"]))
        return {name: column[order] for name, column in whole.items()}

    def blocks(self, event: str) -> Iterator[EventColumns]:
        """Yield the columns of events of one name in blocks of some ten thousand, CPU after CPU, in the ring's order.

        Raises `KeyError` or `CaptureError`.
        """
        form = self.format(event)
        for info in self._chosen:
            try:
                decoder = PageDecoder(layout_of(self._file, info), ())
            except SourceError as error:
                raise CaptureError(self.path, 0, str(error)) from error
            for data in info.cpus:
                yield from self._blocks(info, data, decoder, form)

    def _clock(self, info: BufferInfo) -> Any:
        return clock_of(self.path, self._file.frame, info, self._asked_clock)

    def _blocks(
        self, info: BufferInfo, data: CpuData, decoder: PageDecoder, form: EventFormat
    ) -> Iterator[EventColumns]:
        clock = self._clock(info)
        for piece in pieces(self._file, info, data, _PIECE_PAGES):
            try:
                if self._file.frame.big_endian:
                    to_little_endian(piece.buffer, piece.pages, decoder.layout, (form,))
                found = decoder.locate(piece.buffer, [Stretch(data.cpu, piece.pages)])
            except SourceError as error:
                raise CaptureError(self.path, piece.offset, str(error)) from error
            mine = found[np.flatnonzero(found.ids() == form.id)]
            if len(mine.at):
                yield {
                    "ts_ns": clock.ns(mine.ts),
                    "cpu": np.full(len(mine.at), data.cpu, np.uint16),
                    **self._fields(piece.buffer, mine, form, piece.offset),
                }

    def _fields(self, buffer: Bytes, found: Located, form: EventFormat, offset: int) -> EventColumns:
        kinds = {name: _kind(form, field) for name, field in form.fields.items()}
        fixed = [f for name, f in form.fields.items() if not f.is_rest and kinds[name] is not _ColumnKind.STACK]
        needed = max((field.offset + field.size for field in fixed), default=0)
        if (found.size < needed).any():
            raise CaptureError(self.path, offset, f"{form.event}: an event that is shorter than its format")
        start, columns = found.at << 2, {}
        for name, field in form.fields.items():
            kind = kinds[name]
            if kind is _ColumnKind.NUMBER or kind is _ColumnKind.ROWS or kind is _ColumnKind.FIXED_TEXT:
                columns[name] = _fixed(buffer, start, field, kind)
                continue
            at, length = self._place(buffer, start, found.size.astype(np.int64), field, offset)
            if kind is _ColumnKind.STACK:
                size = form.fields["size"]
                told = _fixed(buffer, start, size, _ColumnKind.NUMBER).astype(np.int64).clip(0, _STACK_MAX)
                length = np.minimum(length, told * (field.size // _STACK_ENTRIES))
            columns[name] = (_texts if kind is _ColumnKind.TEXT else _parts)(buffer, start + at, length)
        return columns

    def _place(self, buffer: Bytes, start: Ints, sizes: Ints, field: EventField, offset: int) -> tuple[Ints, Ints]:
        """Return offset and length, in bytes, of a field of variable length in each event."""
        if not (field.is_data_loc or field.is_rel_loc):
            at = np.minimum(field.offset, sizes)
            return at, sizes - at
        where = buffer[(start + field.offset)[:, None] + np.arange(4)].view("<u4")[:, 0].astype(np.int64)
        at, length = where & 0xFFFF, where >> 16
        if field.is_rel_loc:
            at += field.offset + 4
        if (at + length > sizes).any():
            raise CaptureError(self.path, offset, f"field {field.name!r} lies outside its event")
        return at, length

    def _columns_of_none(self, event: str) -> EventColumns:
        none: EventColumns = {"ts_ns": np.zeros(0, np.int64), "cpu": np.zeros(0, np.uint16)}
        form, nowhere, nothing = self.format(event), np.zeros(0, np.int64), np.zeros(0, np.uint8)
        for name, field in form.fields.items():
            kind = _kind(form, field)
            if kind is _ColumnKind.TEXT:
                none[name] = _texts(nothing, nowhere, nowhere)
            elif kind is _ColumnKind.PARTS or kind is _ColumnKind.STACK:
                none[name] = np.zeros(0, object)
            else:
                none[name] = _fixed(nothing, nowhere, field, kind)
        return none


class _ColumnKind(Enum):
    """Kind of column that a field becomes."""

    NUMBER = auto()
    FIXED_TEXT = auto()
    ROWS = auto()
    """Rows of bytes, equally many for each event."""
    TEXT = auto()
    """Strings of variable length."""
    PARTS = auto()
    """Bytes of variable length."""
    STACK = auto()
    """Bytes of variable length that depends on the depth of the stack and not on the format."""


_ELEMENT: Final = re.compile(r"(?:__data_loc |__rel_loc )?(?:const )?(.*?)(?:\[\])?")
_STACK_ENTRIES: Final = 8
"""Entries of `caller` in the format of a kernel_stack (FTRACE_STACK_ENTRIES, kernel/trace/trace.h)."""
_STACK_MAX: Final = 1 << 16


def _kind(form: EventFormat, field: EventField) -> _ColumnKind:
    if (form.event, field.name) == (f"{FTRACE}:kernel_stack", "caller") and "size" in form.fields and field.is_array:
        return _ColumnKind.STACK
    element = _ELEMENT.fullmatch(field.type)
    # Only `char` is text: `unsigned char` is an address or another number, and may contain zeros.
    is_text = element is not None and element[1] == "char" and form.event != f"{FTRACE}:raw_data"
    if field.is_data_loc or field.is_rel_loc or field.is_rest:
        return _ColumnKind.TEXT if is_text else _ColumnKind.PARTS
    if field.size in (1, 2, 4, 8) and not field.is_array:
        return _ColumnKind.NUMBER
    return _ColumnKind.FIXED_TEXT if is_text and field.is_array else _ColumnKind.ROWS


def _fixed(buffer: Bytes, start: Ints, field: EventField, kind: _ColumnKind) -> npt.NDArray[Any]:
    """Return the column of a field of fixed size."""
    raw = buffer[(start + field.offset)[:, None] + np.arange(field.size)]
    if kind is _ColumnKind.NUMBER:
        number: npt.NDArray[Any] = raw.view(f"<{'i' if field.signed else 'u'}{field.size}")[:, 0]
        return number
    return _strings(raw) if kind is _ColumnKind.FIXED_TEXT else raw


def _parts(buffer: Bytes, at: Ints, length: Ints) -> npt.NDArray[Any]:
    """Return the bytes of each event, unchanged, as an object array."""
    found = np.empty(len(at), object)
    found[:] = [buffer[a : a + n].tobytes() for a, n in zip(at.tolist(), length.tolist(), strict=True)]
    return found


def _texts(buffer: Bytes, at: Ints, length: Ints) -> npt.NDArray[Any]:
    """Return the bytes of each event up to the first NUL."""
    width = max(int(length.max(initial=0)), 1)
    if len(at) * width > _TEXT_MAX:
        found = _parts(buffer, at, length)
        found[:] = [one.partition(b"\0")[0] for one in found]
        return found
    places = at[:, None] + np.minimum(np.arange(width), np.maximum(length - 1, 0)[:, None])
    return _strings(np.where(np.arange(width) < length[:, None], buffer.take(places, mode="clip"), np.uint8(0)))


def _strings(raw: Bytes) -> npt.NDArray[np.bytes_]:
    """Return rows of bytes as strings (dtype S) up to their first NUL."""
    ended = np.maximum.accumulate(raw == 0, axis=1)
    text = np.ascontiguousarray(np.where(ended, np.uint8(0), raw))
    return text.view(f"S{raw.shape[1]}")[:, 0]


def _joined(parts: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    if len(parts) == 1:
        return parts[0]
    if parts[0].dtype.kind in "SO" and sum(map(len, parts)) * max(part.dtype.itemsize for part in parts) > _TEXT_MAX:
        parts = [part.astype(object) for part in parts]
    return np.concatenate(parts)
