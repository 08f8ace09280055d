"""What tracers print -> columns: ftrace's `trace` and `trace_pipe`, `trace-cmd report`, `perf script`.

All print one event a line, in the order of time:

    ping-4711    [001] b.s1.  1234.567890: net_dev_queue: dev=eth0 skbaddr=00000000d6c17a4f len=98
    ping  4711 [001]  1234.567890: net:net_dev_queue: dev=eth0 skbaddr=0xffff888103a5e500 len=98

and between them what was lost: `CPU:1 [LOST 1234 EVENTS]` (kernel/trace/trace.c, print_trace_line and
tracing_read_pipe), `CPU:1 [1234 EVENTS DROPPED]` of trace-cmd, `PERF_RECORD_LOST lost 1234` of perf. The first lines
of `trace` tell how many events were overwritten before: `entries-in-buffer/entries-written: 1000/5000`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

import numpy as np

from collector.ftrace_pages import PageDecoder, Sightings
from mace.errors import CaptureError
from mace.hooks import BY_HOOK, HOOKS, Hook, Way
from mace.records import DTYPES, Batch

_HOOK_OF: Final = {info.name.encode(): info.hook for info in HOOKS}
# Bounded everywhere: a line that is made for it would otherwise be gone through over and over. A task's name has 15
# bytes (TASK_COMM_LEN), numbers and flags a few more; trace-cmd puts the buffer's name before all.
_HEAD: Final = rb"^[^\n#]{0,96}?"
_TIME: Final = rb"\[(\d{1,5})\] [^\n]{0,24}?(\d{1,10})\.(\d{6}|\d{9}): {1,24}"
_LINE: Final = re.compile(
    _HEAD
    + _TIME
    + rb"(?:\w{1,32}:)?("
    + b"|".join(sorted(_HOOK_OF, reverse=True))
    + rb"): ([^\n]*)$"
    + rb"|^[^\n]{0,64}?CPU:(\d{1,5}) \[(?:LOST )?(\d{1,18})? ?EVENTS(?: DROPPED)?\][^\n]*$"
    + rb"|"
    + _HEAD
    + _TIME
    + rb"PERF_RECORD_LOST lost (\d{1,18})[^\n]*$"
    + rb"|^# {0,8}entries-in-buffer/entries-written: (\d{1,18})/(\d{1,18})[^\n]*$",
    re.MULTILINE,
)
_BUFFER: Final = re.compile(rb"\bskbaddr=(?:0x)?([0-9a-fA-F]{1,16})\b")
_DEVICE: Final = re.compile(rb"\b(?:dev|name)=(\S{1,15})")
_NUMBERS: Final = {
    name: re.compile(rb"\b" + name.encode() + rb"=(\d{1,9})\b") for name in ("len", "network_offset", "gso_segs")
}
_ETH_HLEN: Final = 14
CPUS_MAX: Final = int(np.iinfo(DTYPES["cpu"]).max)
LINE_MAX: Final = 1 << 16
"""No tracer prints longer lines."""


def has_events(text: bytes) -> bool:
    """Whether some line is of an event that is measured."""
    return any(match[4] for match in _LINE.finditer(text))


class LineReader:
    """Turns whole lines into batches; remembers what each CPU said last."""

    def __init__(self, sightings: Sightings, decoder: PageDecoder) -> None:
        self._sightings, self._decoder = sightings, decoder
        self._last_ns: dict[int, int] = {}
        self._lost: dict[int, int] = {}
        """Told of, with no event of that CPU since."""
        self.unreadable = 0
        """Lines of our events without a buffer's address, or with one that is not a number."""
        self.uncounted = 0
        """Losses that do not say how many events."""
        self.hashed = False
        """Whether addresses are hashes of 32 bits: all above those are 0, as in no kernel's address."""

    def read(self, text: bytes) -> Batch:
        """All records of some lines, in their order, which is nearly that of time."""
        rows: list[tuple[int, int, int, int, int, int, int]] = []
        for match in _LINE.finditer(text):
            event = match[4]
            if event is not None:
                self._event(rows, match[1], match[2], match[3], _HOOK_OF[event], match[5])
            elif match[6] is not None:
                self._lose(int(match[6]), int(match[7]) if match[7] else None)
            elif match[11] is not None:
                self._lose(int(match[8]), int(match[11]))
            elif match[12] is not None:
                # Overwritten before the first event, of whichever CPU.
                self._lose(0, max(int(match[13]) - int(match[12]), 0))
        if not rows:
            return Batch.empty()
        names = ("ts_ns", "skb_id", "dev", "l3_len", "cpu", "gso_segs", "hook")
        # A column at a time: addresses do not go into the arrays of smaller numbers.
        columns: dict[str, Any] = {
            name: np.array(values, DTYPES[name]) for name, values in zip(names, zip(*rows, strict=True), strict=True)
        }
        real = columns["hook"] != Hook.LOST
        ids = columns["skb_id"]
        ids[real] = self._decoder.skb_ids(ids[real])
        return Batch.of(len(rows), **columns)

    def rest(self) -> Batch:
        """Markers of what was lost behind the last event of a CPU."""
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

    def _lose(self, cpu: int, count: int | None) -> None:
        self.uncounted += count is None
        lost = 1 if count is None else count
        if lost:
            self._lost[cpu] = self._lost.get(cpu, 0) + lost

    def _event(
        self,
        rows: list[tuple[int, int, int, int, int, int, int]],
        cpu_text: bytes,
        seconds: bytes,
        part: bytes,
        hook: Hook,
        fields: bytes,
    ) -> None:
        buffer = _BUFFER.search(fields)
        cpu = int(cpu_text)
        if buffer is None or cpu > CPUS_MAX:
            self.unreadable += 1
            return
        ts_ns = int(seconds) * 10**9 + int(part) * (1 if len(part) == 9 else 1000)
        if cpu in self._lost:
            before = min(self._last_ns.get(cpu, ts_ns), ts_ns)
            rows.append((before, ts_ns, 0, _limited(self._lost.pop(cpu)), cpu, 0, Hook.LOST))
        self._last_ns[cpu] = ts_ns
        # The kernel prints hashes with eight zeroes before them (lib/vsprintf.c, ptr_to_id); addresses have none.
        self.hashed = self.hashed or (len(buffer[1]) == 16 and buffer[1].startswith(b"00000000"))
        rows.append((ts_ns, int(buffer[1], 16), *self._rest_of(hook, fields, cpu)))

    def _rest_of(self, hook: Hook, fields: bytes, cpu: int) -> tuple[int, int, int, int, int]:
        """Device, length, CPU, segments and hook."""
        info = BY_HOOK[hook]
        device = _DEVICE.search(fields) if info.has_device else None
        code = 0
        if device is not None:
            raw = device[1].ljust(16, b"\0")
            code = self._sightings.code(int.from_bytes(raw[:8], "little"), int.from_bytes(raw[8:], "little"))
        length, header = _number(fields, "len"), 0
        if info.way is Way.TRANSMIT:
            header = _number(fields, "network_offset") or _ETH_HLEN
        return code, max(length - header, 0), cpu, min(_number(fields, "gso_segs"), 0xFFFF), hook


def _number(fields: bytes, name: str) -> int:
    match = _NUMBERS[name].search(fields)
    return int(match[1]) if match else 0


def _limited(lost: int) -> int:
    return min(lost, int(np.iinfo(DTYPES["l3_len"]).max))


def chunks(path_name: object, blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Whole lines, as many as come at once. Raises `CaptureError` for a line that none prints."""
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
