"""Parses the output of tracers into columns: ftrace's `trace` and `trace_pipe`, `trace-cmd report`, `perf script`.

All print one event a line, in order of time:

    ping-4711    [001] b.s1.  1234.567890: net_dev_queue: dev=eth0 skbaddr=00000000d6c17a4f len=98
    ping  4711 [001]  1234.567890: net:net_dev_queue: dev=eth0 skbaddr=0xffff888103a5e500 len=98
    ping-4711      1b.s1.  1234.567890: net_dev_queue:        dev=eth0 skbaddr=0xff456078fff3e040 len=98

(the last is `trace-cmd report -l`). Between the events they print losses: `CPU:1 [LOST 1234 EVENTS]`
(kernel/trace/trace.c, print_trace_line and tracing_read_pipe), `CPU:1 [1234 EVENTS DROPPED]` of trace-cmd,
`PERF_RECORD_LOST lost 1234` of perf. The first lines of `trace` show how many events were overwritten before:
`entries-in-buffer/entries-written: 1000/5000`.

A line begins with a task's name, which may be any 15 bytes but NUL: blanks, brackets, digits, a `#` or a line feed
(TASK_COMM_LEN; prctl(PR_SET_NAME) checks nothing). The parser therefore requires CPU, time and event directly one after
the other: a name of 15 bytes cannot imitate all three. A line that is not parsed is counted under one of the kinds of
`collector.text.unread`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

import numpy as np

from collector.pages.decoding import PageDecoder, Sightings
from collector.text.unread import Unread, kind_of
from contracts.errors import CaptureError
from contracts.hooks import TRACEPOINTS, Hook, Way
from contracts.records import DTYPES, Batch
from contracts.timerange import LATEST_RECORDED_NS

# perf prints the subsystem with the event, all others omit it. `probe:netif_rx` is a user's kprobe and no hook.
_HOOK_OF: Final = {name.encode(): info.hook for info in TRACEPOINTS for name in (info.tracepoint, info.name)}
_WITH_DEVICE: Final = frozenset(info.hook for info in TRACEPOINTS if info.has_device)
_TRANSMIT: Final = frozenset(info.hook for info in TRACEPOINTS if info.way is Way.TRANSMIT)

# All repetitions are bounded: on a hostile line an unbounded pattern would backtrack over and over. Before the CPU are
# the task's name (that of a kernel thread has up to 63 bytes in perf), numbers, and the buffer's or file's name.
# Between CPU and time are ftrace's flags, or perf's `misc` letters and `tod`. A number in that place is a task id, so
# that the apparent CPU is part of a name (`perf script -F comm,tid,time,event,trace` of a task called "[000]").
# Between time and event are the column of `trace-cmd report --ts-diff`, or perf's `period`.
_COLUMNS: Final = rb"(?:[^\s\d\[\]][^\s\[\]]{0,15} {1,16}|\d{4}-\d\d-\d\d [\d:.]{8,18} {1,16}){0,3}"
_LATENCY_CPU: Final = rb"-\d{1,10} {1,8}(\d{1,5})[.dDbX][^\s\[\]]{3,8} {1,24}"
_TIMED: Final = (
    rb"(?:\[(\d{1,5})\] {1,24}" + _COLUMNS + rb"|" + _LATENCY_CPU + rb")"
    rb"(\d{1,10})\.(\d{9}|\d{6}): {1,64}(?:\(\+-?\d{1,20}\) {1,24})?(?:\d{1,20} {1,64})?"
)
_EVENT: Final = re.compile(rb".{0,160}?" + _TIMED + rb"((?:[\w-]{1,64}:)?\w{1,64}):(?= |\r?$)(.*)")
_NO_NAME: Final = re.compile(rb".{0,160}" + _TIMED + rb"(.*)")
"""The last CPU and time of a line in which no event's name follows a time."""
_NAME_WIDTH: Final = 16
"""Width of the first column, the task's name, right-aligned (`%16s`)."""
_ADDRESS: Final = re.compile(rb"(?:0x)?([0-9a-fA-F]{1,16})(?:p?x)?")
"""An address. Older versions of libtraceevent print `%px` as a pointer and the letter `x`; the format uses `%px` since
Linux kernel commit 65875073eddd ("net: use %px to print skb address in trace_netif_receive_skb") (in v5.14)."""
_WHOLE_ADDRESS: Final = re.compile(rb" skbaddr=(?:0x)?[0-9a-fA-F]{16}(?![0-9a-fA-F])")
_DIGITS: Final = re.compile(rb"\d{1,9}|0x[0-9a-f]{1,8}")
"""A number. ftrace's option `fields` prints hexadecimal numbers: `len=0x62 (98)`."""
_ETH_HLEN: Final = 14
_NAME_BYTES: Final = 15
CPUS_MAX: Final = int(np.iinfo(DTYPES["cpu"]).max)
LINE_MAX: Final = 1 << 16
"""Bytes of the longest line that is read; no tracer prints longer ones."""

_Row = tuple[int, int, int, int, int, int, int]
_COLUMN_NAMES: Final = ("ts_ns", "skb_id", "dev", "l3_len", "cpu", "gso_segs", "hook")


def is_event(line: bytes) -> bool:
    """Return whether a line has the CPU and the time of an event, or reports a loss."""
    return _NO_NAME.match(line) is not None or _LOSS.fullmatch(line) is not None


class LineReader:
    """Parses whole lines into batches; remembers the last time and pending losses of each CPU."""

    def __init__(self, sightings: Sightings, decoder: PageDecoder) -> None:
        self._sightings, self._decoder = sightings, decoder
        self._codes: dict[bytes, int] = {}
        self._last_ns: dict[int, int] = {}
        self._newest_ns = 0
        self._lost: dict[int, int] = {}
        """CPU -> lost events reported, but not yet in a marker because the CPU has had no event since."""
        self.lines = 0
        """Lines read so far."""
        self.events = 0
        """Events of hooks read so far."""
        self.backwards = 0
        """Events with an earlier time than the event before."""
        self.unended = b""
        """The last line, if it has no line feed."""
        self.unread: Counter[Unread] = Counter()
        """Lines that were not parsed, by kind."""
        self.first_unread: dict[Unread, int] = {}
        """Number of the first line of each kind, from 1 on."""
        self.of_perf = False
        """Whether events have names as perf prints them."""
        self.perf_losses = False
        """Whether perf has printed a loss."""
        self.uncounted = 0
        """Losses without a number of events."""
        self.hashed = False
        """Whether some addresses are hashes of 32 bits: their upper half is 0, which no kernel address has."""
        self.unhashed = False
        """Whether some addresses are no hashes."""

    def read(self, text: bytes) -> Batch:
        """Return the records of some lines, in the order of the lines, which is nearly that of time."""
        rows: list[_Row] = []
        lines = text.split(b"\n")
        self.unended = lines.pop()
        if self.unended:
            self._unended(lines)
        last = b""
        for number, line in enumerate(lines, self.lines + 1):
            match = _EVENT.match(line)
            if match is None or _is_name(line, match.start(3)):
                self._other(line, number)
                continue
            bracketed, latency, seconds, part, event, fields = match.groups()
            hook = _HOOK_OF.get(event)
            if hook is not None:
                last = event
                self._event(rows, int(bracketed or latency), seconds, part, hook, fields, number)
        self.lines += len(lines)
        self.of_perf = self.of_perf or b":" in last
        if not rows:
            return Batch.empty()
        # One array per column: addresses would not fit an array of the smaller numbers' dtype.
        columns: dict[str, Any] = {
            name: np.array(values, DTYPES[name])
            for name, values in zip(_COLUMN_NAMES, zip(*rows, strict=True), strict=True)
        }
        real = columns["hook"] != Hook.LOST
        ids = columns["skb_id"]
        ids[real] = self._decoder.skb_ids(ids[real])
        return Batch.of(len(rows), **columns)

    def rest(self) -> Batch:
        """Return markers of the losses reported behind the last event of each CPU."""
        end_ns = max(self._last_ns.values(), default=0)
        rows = [(self._last_ns.get(cpu, end_ns), cpu, lost) for cpu, lost in sorted(self._lost.items())]
        self._lost.clear()
        return Batch.of(
            len(rows),
            ts_ns=[ts for ts, _, _ in rows],
            skb_id=[ts for ts, _, _ in rows],
            cpu=[cpu for _, cpu, _ in rows],
            l3_len=[_limited(lost) for _, _, lost in rows],
            hook=[Hook.LOST] * len(rows),
        )

    def _unended(self, lines: list[bytes]) -> None:
        """Keep a last line without line feed if it is an event with a whole address; count it as garbled otherwise."""
        match = _EVENT.match(self.unended)
        if match is not None and (match[5] not in _HOOK_OF or _WHOLE_ADDRESS.search(match[6])):
            lines.append(self.unended)
        elif self.unended.strip():
            self._leave(Unread.GARBLED, self.lines + len(lines) + 1)

    def _other(self, line: bytes, number: int) -> None:
        """Handle a line that is no event: a loss, a comment, or a line that cannot be parsed."""
        loss = _LOSS.fullmatch(line)
        if loss is not None and int(loss[1]) <= CPUS_MAX:
            count = loss[2] or loss[3]
            self._lose(int(loss[1]), int(count) if count and len(count) <= _COUNT_DIGITS else None)
        elif (written := _WRITTEN.match(line)) is not None:
            # Events of unknown CPUs, overwritten before the first event.
            self._lose(0, max(int(written[2]) - int(written[1]), 0))
        elif (timed := _NO_NAME.match(line)) is not None and not _is_name(line, timed.start(3)):
            self._without_name(int(timed[1] or timed[2]), timed[5], number)
        elif (kind := kind_of(line)) is not None:
            self._leave(kind, number)

    def _without_name(self, cpu: int, rest: bytes, number: int) -> None:
        """Handle a line with CPU and time but no event's name: a loss of perf, a tracer's own line, a missing name."""
        if rest.startswith(b"PERF_RECORD_LOST"):
            self.perf_losses = True
            count = _PERF_LOST.search(rest)
            self._lose(min(cpu, CPUS_MAX), int(count[1]) if count else None)
        elif b"skbaddr=" in rest:
            self._leave(Unread.NO_NAME, number)
        elif not rest.strip():
            self._leave(Unread.GARBLED, number)

    def _leave(self, kind: Unread, number: int) -> None:
        self.unread[kind] += 1
        self.first_unread.setdefault(kind, number)

    def _lose(self, cpu: int, count: int | None) -> None:
        self.uncounted += count is None
        lost = 1 if count is None else count
        if lost:
            self._lost[cpu] = self._lost.get(cpu, 0) + lost

    def _event(
        self, rows: list[_Row], cpu: int, seconds: bytes, part: bytes, hook: Hook, fields: bytes, number: int
    ) -> None:
        address = _ADDRESS.fullmatch(_value(fields, b" skbaddr="))
        if address is None:
            self._leave(Unread.NO_ADDRESS, number)
            return
        ts_ns = int(seconds) * 1_000_000_000 + int(part) * (1 if len(part) == 9 else 1000)
        if cpu > CPUS_MAX or ts_ns > LATEST_RECORDED_NS:
            self._leave(Unread.GARBLED, number)
            return
        if cpu in self._lost:
            before = min(self._last_ns.get(cpu, ts_ns), ts_ns)
            rows.append((before, ts_ns, 0, _limited(self._lost.pop(cpu)), cpu, 0, Hook.LOST))
        self.events += 1
        self.backwards += ts_ns < self._newest_ns
        self._last_ns[cpu] = self._newest_ns = ts_ns
        digits = address[1]
        # The kernel prints a hash with eight leading zeroes (lib/vsprintf.c, ptr_to_id); an address has none.
        if len(digits) == 16 and digits.startswith(b"00000000"):
            self.hashed = True
        else:
            self.unhashed = True
        length, header = _number(fields, b" len="), 0
        if hook in _TRANSMIT:
            header = _number(fields, b" network_offset=") or _ETH_HLEN
        device = self._device(fields) if hook in _WITH_DEVICE else 0
        segments = min(_number(fields, b" gso_segs="), 0xFFFF)
        rows.append((ts_ns, int(digits, 16), device, max(length - header, 0), cpu, segments, hook))

    def _device(self, fields: bytes) -> int:
        name = (_value(fields, b" dev=") or _value(fields, b" name="))[:_NAME_BYTES]
        code = self._codes.get(name)
        if code is None:
            raw = name.ljust(_NAME_BYTES + 1, b"\0")
            code = self._sightings.code(int.from_bytes(raw[:8], "little"), int.from_bytes(raw[8:], "little"))
            self._codes[name] = code
        return code


_LOSS: Final = re.compile(
    rb"(?:.{0,64}: {0,24})?CPU:(\d{1,5}) \[(?:LOST (?:(\d{1,40}) )?EVENTS|(?:(\d{1,40}) )?EVENTS DROPPED)\]\s{0,8}"
)
"""A loss, alone on its line. The shortest has 19 bytes, so that no task's name can imitate it."""
_COUNT_DIGITS: Final = 18
"""Largest number of digits in a count of lost events that is believed."""
_WRITTEN: Final = re.compile(rb"# {0,8}entries-in-buffer/entries-written: (\d{1,18})/(\d{1,18})")
_PERF_LOST: Final = re.compile(rb"lost (\d{1,18})(?!\d)")


def _is_name(line: bytes, time_at: int) -> bool:
    """Return whether everything before the time is a task's name, the end of which looks like a CPU."""
    return line[_NAME_WIDTH:time_at].isspace() and line[:1] == b" " != line[_NAME_WIDTH - 1 : _NAME_WIDTH]


def _value(fields: bytes, key: bytes) -> bytes:
    """Return the text behind the first `key` up to the next blank.

    A key begins with a blank (` len=`): a device's name contains no blanks, but may be `len=1`.
    """
    at = fields.find(key)
    if at < 0:
        return b""
    at += len(key)
    end = fields.find(b" ", at)
    return fields[at:].rstrip() if end < 0 else fields[at:end]


def _number(fields: bytes, key: bytes) -> int:
    value = _value(fields, key)
    if not _DIGITS.fullmatch(value):
        return 0
    return int(value, 16 if value.startswith(b"0x") else 10)


def _limited(lost: int) -> int:
    return min(lost, int(np.iinfo(DTYPES["l3_len"]).max))


def chunks(path_name: object, blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the blocks cut into whole lines; raises `CaptureError` for a line longer than any tracer prints."""
    rest, offset = b"", 0
    for block in blocks:
        text = rest + block
        cut = text.rfind(b"\n") + 1
        rest = text[cut:]
        if len(rest) > LINE_MAX:
            raise CaptureError(path_name, offset + cut, f"a line of more than {LINE_MAX} bytes")
        if cut:
            yield text[:cut]
        offset += cut
    if rest:
        yield rest
