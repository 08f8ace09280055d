"""Kinds of lines in a tracer's text that cannot be parsed, and the advice for each.

MACE does not guess at the event of a hook that is printed without a necessary column, or in a form whose times have
another meaning. It counts the line and tells the user which option prints it completely; a file with no other lines is
refused with the same advice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum
from typing import Final

from contracts.hooks import TRACEPOINTS

_PERF_FIELDS: Final = "`perf script -F comm,tid,cpu,time,event,trace`"


class Unread(Enum):
    """A kind of line that cannot be parsed; the value describes the lines and says what to do."""

    NO_ADDRESS = f"lines have no buffer address (skbaddr=), which {_PERF_FIELDS} prints, as all tracers do"
    NO_CPU = f"lines have no CPU, such as [000]: print it with {_PERF_FIELDS}"
    NO_TIME = f"lines have no time: print it with {_PERF_FIELDS}"
    NO_NAME = f"lines have no event name: print it with {_PERF_FIELDS}"
    LATENCY = (
        "lines are in ftrace's latency format, whose times count from the last time that the buffer was emptied: "
        "`echo 0 > options/latency-format` and print again"
    )
    GRAPH = (
        "lines are in the form of the tracer function_graph, without times: `echo nop > current_tracer`, trace again"
    )
    TICKS = "lines have times that are not seconds: trace with another clock, `echo mono > trace_clock`"
    NO_CONTEXT = "lines have neither task, CPU nor time: `echo 1 > options/context-info` and print again"
    RAW = "lines are numbers of ftrace's raw or hex form: `echo 0` to options/raw and options/hex and print again"
    GARBLED = "lines begin like an event or name one that is measured, but are cut or garbled"
    NOT_EVENTS = (
        "lines are no events but parts of printed texts or of task names with line feeds; none names an event that "
        "is measured"
    )


COLUMNS: Final = (
    Unread.NO_ADDRESS, Unread.NO_CPU, Unread.NO_TIME, Unread.NO_NAME, Unread.LATENCY, Unread.GRAPH, Unread.TICKS,
    Unread.NO_CONTEXT, Unread.RAW,
)  # fmt: skip
"""Kinds caused by the printed form: either all lines of a text are of such a kind, or only damaged ones."""
DISCARDED: Final = tuple(kind for kind in Unread if kind is not Unread.NOT_EVENTS)
"""Kinds of lines that are, or may be, events of hooks."""

_NAMES: Final = rb"(?:" + b"|".join(sorted((info.name.encode() for info in TRACEPOINTS), reverse=True)) + rb")"
_MENTION: Final = re.compile(rb"(?:^|[\s:*])" + _NAMES + rb":(?:\s|$)|(?:^|\s)skbaddr=")
_TIME: Final = re.compile(rb"(?:^|\s)\d{1,10}\.(?:\d{9}|\d{6}): ")
_NAMED_BY_PERF: Final = re.compile(rb"(?:net|skb):" + _NAMES + rb":(?:\s|$)")
_GRAPH: Final = re.compile(rb"\|.*/\* ")
_LATENCY: Final = re.compile(rb"\d{1,20}us[ !+#*@$]?: |\d{1,20}\.\d{3}ms \(\+")
_TICKS: Final = re.compile(rb"\[\d{1,5}\] {1,24}(?:\S{1,16} {1,24})?\d{1,20}: ")
_NAME_FIRST: Final = re.compile(_NAMES + rb": ")
_RAW: Final = re.compile(rb"[0-9a-f]{1,10} [0-9a-f]{1,8} [0-9a-f]{1,20} type: \d{1,5}\s*$")
_CPU: Final = re.compile(rb"\[\d{1,5}\] ")
_BEGINS: Final = re.compile(rb"[ -]\d{1,10} {1,8}(?:\([ \d-]{1,12}\) )?\[\d{3,5}\](?:\s|$)")
"""A task's number and the CPU, as they precede each event."""
_EVENT: Final = re.compile(rb"(?<!\S)\d{1,20}(?:\.(?:\d{9}|\d{6})|us.?): {1,64}((?:[\w-]{1,64}:)?\w{1,64}):(?=\s|$)")
"""A time and an event's name. A task's name can imitate both, so that all matches in a line count."""
_UNTIMED: Final = re.compile(rb"\[\d{1,5}\] {1,64}(?:\d[\d-]{9} [\d:.]{8,18} {1,64})?[\w-]{1,64}:\w{1,64}: ")
"""A CPU and an event of perf without the time between them."""
_MEASURED: Final = frozenset(name.encode() for info in TRACEPOINTS for name in (info.name, info.tracepoint))
_LOOKED_AT: Final = 1 << 12
"""Bytes of a line that are searched; events of hooks have 400."""
_NOTHING: Final = re.compile(
    rb"\s*$"
    rb"|#"  # comments: of ftrace, of perf, and `##### CPU 1 buffer started ####`
    rb"|(?:.{0,64}: {0,24})?(?:cpus=\d+|version = \d+|CPU \d+ is empty|CPU:\d+ \[SUBBUFFER START\])\s*$"  # trace-cmd
    rb"|\s*=> "  # stacks of ftrace and trace-cmd
    rb"|\s+[0-9a-f]{1,16} .{1,512}\)\s{0,4}$"  # and of perf
    rb"|\s*\d{1,5}\) "  # function_graph
)
_BEGINNINGS: Final = (b"# tracer:", b"# ========", b"cpus=", b"version = ")
"""First bytes of the output of ftrace, of `perf script --header`, and of `trace-cmd report`."""


def begins_text(head: bytes) -> bool:
    """Return whether these are the first bytes of a tracer's text."""
    return head.removeprefix(b"\xef\xbb\xbf").startswith(_BEGINNINGS)


def is_traced(line: bytes) -> bool:
    """Return whether a line that cannot be parsed is an event in a form that MACE does not read."""
    return bool(_EVENT.search(line) or _UNTIMED.search(line)) or kind_of(line) not in (
        None,
        Unread.NOT_EVENTS,
        Unread.GARBLED,
    )


def kind_of(line: bytes) -> Unread | None:
    """Return the kind of a line that is no readable event; None if the line contains no event of a hook."""
    line = line[:_LOOKED_AT]
    events = _EVENT.findall(line)
    if _MEASURED.intersection(events) or (not events and _MENTION.search(line)):
        return _mentioned(line)
    if events or _NOTHING.match(line):
        return None
    if _RAW.match(line):
        return Unread.RAW
    return Unread.GARBLED if _TIME.search(line) or _BEGINS.search(line) else Unread.NOT_EVENTS


def _mentioned(line: bytes) -> Unread:
    """Return the kind of a line that names an event of a hook, or its buffer."""
    if _LATENCY.search(line):
        return Unread.LATENCY
    if _GRAPH.search(line):
        return Unread.GRAPH
    if _TICKS.search(line):
        return Unread.TICKS
    if _NAME_FIRST.match(line):
        return Unread.NO_CONTEXT
    if _NAMED_BY_PERF.search(line):
        if not _TIME.search(line):
            return Unread.NO_TIME
        if not _CPU.search(line) or _CPU_IN_NAME.match(line):
            return Unread.NO_CPU
    return Unread.GARBLED


_CPU_IN_NAME: Final = re.compile(rb".{0,15}\[\d{1,5}\] .{0,64}?\d{1,10}\.(?:\d{9}|\d{6}): ")
"""An apparent CPU inside the 16 columns of the task's name; the real CPU follows behind these columns."""


def told(counts: Mapping[Unread, int], first: Mapping[Unread, int]) -> list[str]:
    """Return a sentence for each kind that occurred: the number of lines, their kind, and the first line's number."""
    return [
        f"{counts[kind]} {kind.value} (left out; the first is line {first[kind]})"
        for kind in Unread
        if counts.get(kind)
    ]
