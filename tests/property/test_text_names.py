"""Texts in every form, of tasks with any names: each event is read correctly, or reported as unread.

The writers follow the tracers' own formats: kernel/trace/trace_output.c (trace_print_context, lat_print_generic,
lat_print_timestamp), builtin-script.c of perf (perf_sample__fprintf_start) and trace-cmd's report.
"""

from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from collector.reading.options import FileOptions
from collector.text.source import TextReader, recognises
from contracts.errors import CaptureError
from contracts.records import Batch
from contracts.topology import Topology

EVERY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

PIECES = (
    b"[000]", b"[1] ", b" ", b"#", b"-1", b"1.123456: ", b"0.1", b":", b"d..1.", b"\n", b"\r", b"\t", b"x", b"net:",
    b"netif_rx:", b"(  1)", b"CPU:0 ", b"[LOST ", b"EVENTS]", b"\xff", b"\xc3\xa9", b"=> ", b"K", b"us: ", b"|", b"/* ",
    b"\x1b",
)  # fmt: skip
NAMES = st.one_of(
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map(lambda parts: b"".join(parts)[:15]),
    st.binary(min_size=1, max_size=15).map(lambda raw: raw.replace(b"\0", b"?")),
)
"""Names of tasks: up to 15 bytes, any but NUL."""
DEVICES = st.sampled_from([b"eth0", b"veth1-c1", b"len=1", b"skbaddr=0x1", b"\xc3\xa9th0", b"a=b[0]"])


@dataclass(frozen=True)
class Event:
    name: bytes
    pid: int
    cpu: int
    ts_us: int
    buffer: int
    device: bytes | None
    """None: another event, whose text contains the name of a task."""
    other: bytes

    def fields(self, address):
        if self.device is None:
            return b"prev_comm=%s prev_pid=7 ==> next_comm=%s next_pid=9" % (self.other, self.name)
        return b"dev=%s skbaddr=%s len=84" % (self.device, address(self.buffer))

    def event(self, subsystem):
        names = (b"net:netif_rx", b"sched:sched_switch") if subsystem else (b"netif_rx", b"sched_switch")
        return names[self.device is None]

    @property
    def time(self):
        return b"%5d.%06d" % divmod(self.ts_us, 1_000_000)


EVENTS = st.lists(
    st.builds(
        Event,
        NAMES,
        st.integers(0, 4_194_303),
        st.integers(0, 300),
        st.integers(1, 900),
        st.integers(0, 2**40).map(lambda at: 0xFFFF_8880_0000_0000 + at),
        st.one_of(DEVICES, st.none()),
        NAMES,
    ),
    min_size=1,
    max_size=12,
)


def ftrace(flags=b" b..1.", tgid=b""):
    return lambda e, a: b"%16s-%-7d %s[%03d]%s %s: %s: %s\n" % (
        e.name, e.pid, tgid, e.cpu, flags, e.time, e.event(False), e.fields(a)
    )  # fmt: skip


def perf(*, task=True, pid=False, cpu=True, between=b"", time=True, period=b"", event=True, trace=True):
    def line(e, a):
        numbers = b"%7d/%-7d " % (e.pid, e.pid) if pid else b"%5d " % e.pid
        raw = b"%16s " % e.name + numbers if task else b""
        raw += b"[%03d] " % e.cpu if cpu else b""
        raw += between + (b"%12s: " % e.time if time else b"") + period
        return raw + (b"%26s: " % e.event(True) if event else b"") + (e.fields(a) if trace else b"") + b"\n"

    return line


READ = {
    "ftrace": ftrace(),
    "ftrace without irq-info": ftrace(b" "),
    "ftrace of old kernels": ftrace(b" d..3"),
    "ftrace with tgid": ftrace(tgid=b"(   99) "),
    "ftrace with no tgid": ftrace(tgid=b"(-------) "),
    "report": lambda e, a: b"%16s-%-5d [%03d] %s: %-20s %s\n" % (
        e.name, e.pid, e.cpu, e.time, e.event(False) + b":", e.fields(a)
    ),
    "report -l": lambda e, a: b"%8s-%-5d %3d.Nh1. %s: %-20s %s\n" % (
        e.name[:8], e.pid, e.cpu, e.time, e.event(False) + b":", e.fields(a)
    ),
    "report of an instance": lambda e, a: b"  tasks: " + READ["report"](e, a),
    "report --ts-diff": lambda e, a: b"%16s-%-5d [%03d] %s: (+12)    %s: %s\n" % (
        e.name, e.pid, e.cpu, e.time, e.event(False), e.fields(a)
    ),
    "perf": perf(),
    "perf pid,tid": perf(pid=True),
    "perf misc": perf(between=b"K      "),
    "perf tod": perf(between=b"2026-11-29 15:03:51.702801 "),
    "perf period": perf(period=b"         1 "),
    "perf without task": perf(task=False),
}  # fmt: skip
NOT_READ = {
    "latency": lambda e, a: b"%8s-%-7d %3dd..1. %4dus+: %s: %s\n" % (
        e.name[:8], e.pid, e.cpu, e.ts_us, e.event(False), e.fields(a)
    ),
    "latency, verbose": lambda e, a: b"%16s %7d %3d 0 00000000 00000001 [%08x] %d.%03dms (+0.001ms): %s: %s\n" % (
        e.name, e.pid, e.cpu, e.ts_us, *divmod(e.ts_us, 1000), e.event(False), e.fields(a)
    ),
    "counter": lambda e, a: b"%16s-%-7d [%03d] d..1. %12d: %s: %s\n" % (
        e.name, e.pid, e.cpu, e.ts_us, e.event(False), e.fields(a)
    ),
    "perf without cpu": perf(cpu=False),
    "perf without cpu and task": perf(cpu=False, task=False),
    "perf without time": perf(time=False),
    "perf without event": perf(event=False),
    "perf without trace": perf(trace=False),
}  # fmt: skip
ADDRESSES = {
    "%px": lambda at: b"0x%x" % at,
    "%px by an old libtraceevent": lambda at: b"0x%xx" % at,
    "hash": lambda at: b"00000000%08x" % (at & 0xFFFF_FFFF),
    "bare": lambda at: b"%x" % at,
}


def in_order(events):
    """Return the events with ascending times; `ts_us` was the distance to the event before."""
    ts, made = 1_857_097_000_000, []
    for event in events:
        ts += event.ts_us
        made.append(Event(event.name, event.pid, event.cpu, ts, event.buffer, event.device, event.other))
    return made


def read(path):
    """Read a text; returns (records, device of each, source)."""
    with TextReader(path, FileOptions(clock="mono")) as source:
        items = list(source.items())
    batch = Batch.concatenate([item for item in items if isinstance(item, Batch)])
    names = [one.name for one in [i for i in items if isinstance(i, Topology)][-1].sightings]
    return batch, [names[dev] for dev in batch.dev], source


def rows(batch, devices):
    return list(zip(batch.ts_ns.tolist(), batch.cpu.tolist(), devices, batch.l3_len.tolist(), strict=True))


@EVERY
@given(form=st.sampled_from(sorted(READ)), address=st.sampled_from(sorted(ADDRESSES)), events=EVENTS)
@example(
    form="perf", address="%px", events=[Event(b"[0] 1.123456: ", 31901, 0, 5, 0xFFFF_8880_0000_0000, b"eth0", b"")]
)
def test_written_events_are_read(tmp_path, form, address, events):
    events = in_order(events)
    path = tmp_path / "trace"
    raw = b"".join(READ[form](event, ADDRESSES[address]) for event in events)
    path.write_bytes(raw)
    truth = [(e.ts_us * 1000, e.cpu, e.device.decode(), 84) for e in events if e.device is not None]
    assert recognises(raw)
    if not truth:
        with pytest.raises(CaptureError, match="no line of it is a network event"):
            read(path)
        return
    batch, devices, source = read(path)
    assert rows(batch, devices) == truth
    whole = [ADDRESSES[address](e.buffer) for e in events if e.device is not None]
    assert len(set(batch.skb_id.tolist())) == len(set(whole))
    assert source.bytes_read == len(raw)
    if not any(b"\n" in name for event in events for name in (event.name, event.other)):
        assert source.discarded == 0
        assert not any("left out" in line for line in source.warnings)


@pytest.mark.slow
@EVERY
@given(form=st.sampled_from(sorted(NOT_READ)), events=EVENTS)
def test_unread_events_are_refused_or_counted(tmp_path, form, events):
    """For any name of a task, unread events are reported with a remedy."""
    events = in_order(events)
    path = tmp_path / "trace"
    path.write_bytes(b"".join(NOT_READ[form](event, ADDRESSES["%px"]) for event in events))
    measured = [e for e in events if e.device is not None]
    refused = ""
    try:
        batch, _, source = read(path)
    except CaptureError as error:
        refused = str(error)
    if refused:
        # A name may imitate the missing column, so that the message names another one.
        told = ("-F comm,tid,cpu,time,event,trace", "echo ", "garbled") if measured else ("no line of it",)
        assert any(words in refused for words in told)
        return
    assert measured
    assert len(batch) + source.discarded >= len(measured)
    assert len(batch) == len(measured) or any("left out" in line for line in source.warnings)


@EVERY
@given(events=EVENTS, noise=st.lists(st.binary(max_size=60), max_size=6), data=st.data())
def test_other_lines_change_nothing(tmp_path, events, noise, data):
    """Lines that are no events may stand anywhere; they are reported."""
    events = in_order(events)
    lines = [READ["ftrace"](event, ADDRESSES["hash"]) for event in events]
    for line in noise:
        at = data.draw(st.integers(0, len(lines)))
        lines.insert(at, line.replace(b"\0", b"").replace(b"\n", b"") + b"\n")
    path = tmp_path / "trace"
    path.write_bytes(b"".join(lines))
    truth = [(e.ts_us * 1000, e.cpu, e.device.decode(), 84) for e in events if e.device is not None]
    if truth:
        batch, devices, _ = read(path)
        assert rows(batch, devices) == truth
