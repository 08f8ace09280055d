"""The same packets give the same results, live and from the files of other tools.

One run in the lab has three recordings: MACE's live capture, which keeps the kernel's pages, so that a trace.dat and a
Perfetto trace can be made of the same records; a second trace instance, from which `trace-cmd extract` makes a
trace.dat and the kernel prints text; and tcpdump in the container and at the outer device.
"""

import asyncio
import platform
import subprocess
import time
from dataclasses import dataclass

import numpy as np
import pytest

from collector.files import PCAP_PAIR, FileOptions, recording, recording_of
from collector.ftrace import source as ftrace_source
from collector.ftrace import tracefs
from collector.ftrace.rings import ReadRing
from collector.ftrace.source import FtraceConfig, FtraceSource
from collector.machine.devices import DeviceFollower
from contracts.hooks import TRACEPOINTS
from contracts.interfaces import Progress
from contracts.schema import Delays, Direction, Segment
from correlator.engine import Engine, EngineConfig
from mace.lab import HOST, Spec, running
from storage.capture import CaptureSink
from tests.made_tracedat import MadeTraceDat
from tests.perfetto_from_pages import perfetto_from_pages

pytestmark = [pytest.mark.needs("root", "tracefs", "netns", "tcpdump", "trace-cmd"), pytest.mark.slow]

PINGS, DATAGRAMS = 60, 400


@dataclass
class Run:
    """The recordings of one run in the lab."""

    live: object
    pages: object
    perfetto: object
    extracted: object
    text: object
    inner: object
    outer: object


class KeepingRing(ReadRing):
    """A ring that keeps the kernel's pages unchanged."""

    kept = {}  # noqa: RUF012 - CPU -> pages, for the one run of this module

    def __init__(self, path, layout):
        super().__init__(path, layout)
        self._pages = self.kept.setdefault(int(path.parent.name.removeprefix("cpu")), [])

    def take(self, into, start=0):
        taken = super().take(into, start)
        self._pages += [page.tobytes() for page in into.matrix[start : start + taken.pages]]
        return taken


def tcpdump(lab, member, device, target):
    # Unbuffered: otherwise the file lacks the last second when tcpdump is ended.
    argv = ["tcpdump", "-i", device, "-w", str(target), "-U", "--immediate-mode", "--time-stamp-precision=nano", "ip"]
    process = lab.popen(member, argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for line in process.stderr:
        if "listening on" in line:
            return process
    raise AssertionError("tcpdump did not begin")


def second_instance():
    instance = tracefs.Instance.create(tracefs.find())
    instance.set_clock("mono")
    instance.set_ring_size(8192)
    for info in TRACEPOINTS:
        instance.enable(info.tracepoint)
    instance.record(on=True)
    return instance


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return record(tmp_path_factory.mktemp("tools"), PINGS, DATAGRAMS)


def record(place, pings, datagrams):
    """Record one run in the lab with all tools at once."""
    KeepingRing.kept.clear()
    patch = pytest.MonkeyPatch()
    patch.setattr(ftrace_source, "ReadRing", KeepingRing)
    instance = None
    try:
        with running(Spec(name="tools", containers=1)) as lab:
            lab.ping("c1", count=2)
            dumps = [
                tcpdump(lab, "c1", "eth0", place / "inner.pcap"),
                tcpdump(lab, HOST, lab.outer_device, place / "outer.pcap"),
            ]
            instance = second_instance()
            formats = asyncio.run(recorded(lab, place / "live.mace", pings, datagrams))
            time.sleep(0.5)
            instance.record(on=False)
            for dump in dumps:
                dump.terminate()
                dump.communicate(timeout=30)
            (place / "trace.txt").write_bytes((instance.path / "trace").read_bytes())
            argv = ["trace-cmd", "extract", "-B", instance.path.name, "-o", str(place / "extracted.dat")]
            subprocess.run(argv, check=True, capture_output=True)
    finally:
        patch.undo()
        if instance is not None:
            instance.remove()
    machine = platform.uname()
    uname = f"Linux {machine.node} {machine.release} {machine.machine}\0".encode()
    made = MadeTraceDat({"": KeepingRing.kept}, texts=formats, algorithm="zstd", options=((5, uname),))
    (place / "pages.dat").write_bytes(made.content())
    offset_ns = recording(place / "live.mace").header.clock.offset_ns
    (place / "pages.pftrace").write_bytes(perfetto_from_pages(place / "pages.dat", offset_ns))
    names = ("live.mace", "pages.dat", "pages.pftrace", "extracted.dat", "trace.txt", "inner.pcap", "outer.pcap")
    return Run(*(place / name for name in names))


async def recorded(lab, target, pings, datagrams):
    """Capture some traffic live to a file; returns the formats of its events."""
    follower = DeviceFollower(
        host_netns=str(lab.netns_path(HOST)), outer=(lab.outer_device,), remote_netns=(lab.netns_path("remote").name,)
    )
    source, sink = FtraceSource(FtraceConfig(hold_back_ms=500), follower), CaptureSink(target)
    await sink.open(await source.open())

    async def read():
        async for item in source.items():
            if not isinstance(item, Progress):
                await sink.write(item)

    reading = asyncio.create_task(read())
    await asyncio.sleep(0.3)
    formats = {info.tracepoint: source._instance.event_format(info.tracepoint) for info in TRACEPOINTS}
    await asyncio.to_thread(traffic, lab, pings, datagrams)
    await asyncio.sleep(0.3)
    source.request_stop()
    await reading
    await sink.aclose()
    await source.aclose()
    return formats


def traffic(lab, pings, datagrams):
    lab.ping("c1", count=pings, interval_s=0.005)
    lab.udp("c1", count=datagrams, size=100, rate_pps=2000)


def replayed(one):
    """Replay a recording; returns all rows, and the last results."""
    with one.reader() as reader:
        engine = Engine(reader.header.clock.offset_ns, EngineConfig())
        results = []
        for item in reader.items():
            results += engine.feed(item)
        results.append(engine.finish())
    return reader.header, Delays.concatenate([r.rows.delays for r in results]), results


def overheads(rows, way):
    whole = (rows.segment == Segment.OVERHEAD) & (rows.direction == way)
    order = np.argsort(rows.utc_ns[whole], kind="stable")
    return rows.utc_ns[whole][order], rows.delay_ns[whole][order]


@pytest.fixture(scope="module")
def live(run):
    return replayed(recording(run.live))


@pytest.mark.parametrize("form", ["pages", "perfetto"])
def test_the_same_records_give_the_same_rows(run, live, form):
    """Pages of the live capture's ring give identical rows as a trace.dat and as a Perfetto trace."""
    _, rows, results = live
    _, again, results_again = replayed(recording(getattr(run, form), FileOptions(topology=run.live)))
    assert len(rows) == len(again) > 5 * (PINGS + DATAGRAMS)
    for name in ("utc_ns", "direction", "segment", "position", "delay_ns", "l3_len", "grade", "outcome"):
        assert np.array_equal(getattr(rows, name), getattr(again, name)), name
    assert results_again[-1].totals.ledger == results[-1].totals.ledger
    assert results[-1].totals.ledger.lost == 0


def in_mono(run):
    """Return options with clock mono, which neither text nor extracted files record."""
    return FileOptions(topology=run.live, clock="mono")


def same_packets(run_rows, live_rows):
    """Yield each direction's begin and delay of the packets of two recordings, int64, ns, packet by packet."""
    for way, count in ((Direction.EGRESS, PINGS + DATAGRAMS), (Direction.INGRESS, PINGS)):
        utc, delay = overheads(run_rows, way)
        live_utc, live_delay = overheads(live_rows, way)
        # The other tool recorded a little longer.
        near = np.abs(utc[:, None] - live_utc[None, :]).argmin(axis=0)
        assert len(live_utc) >= count
        assert len(np.unique(near)) == len(near)
        yield utc[near], delay[near], live_utc, live_delay


def test_a_file_extracted_by_trace_cmd(run, live):
    """Another instance stamps the same packets first, because its probes were attached first.

    Its stamp of a packet is therefore before the live one at the same hook and after the live one at the hook before.
    """
    header, rows, _ = replayed(recording(run.extracted, in_mono(run)))
    assert header.clock == live[0].clock
    for begin, delay, live_begin, live_delay in same_packets(rows, live[1]):
        assert (begin <= live_begin).all()
        assert (live_begin < begin + delay).all()
        assert (begin + delay <= live_begin + live_delay).all()


def test_the_text_of_the_same_records(run):
    """Text and trace.dat of one instance differ only in truncated times and hashed addresses."""
    _, rows, results = replayed(recording(run.extracted, in_mono(run)))
    _, text, text_results = replayed(recording(run.text, in_mono(run)))
    assert text_results[-1].totals.ledger.records == results[-1].totals.ledger.records
    for way in (Direction.EGRESS, Direction.INGRESS):
        delay, text_delay = overheads(rows, way)[1], overheads(text, way)[1]
        assert len(delay) == len(text_delay)
        # Both ends of a delay are truncated to 1 µs.
        assert np.abs(delay - text_delay).max() <= 1_000


def test_two_packet_captures(run, live):
    """tcpdump has the same packets, stamped in the driver and the stack, microseconds from MACE's hooks."""
    _, rows, results = replayed(recording_of(PCAP_PAIR, (run.inner, run.outer)))
    assert results[-1].totals.grades.content == results[-1].totals.packets > PINGS + DATAGRAMS
    for _, delay, _, live_delay in same_packets(rows, live[1]):
        apart, usual_ns = np.abs(delay - live_delay), np.median(live_delay)
        assert np.median(apart) <= usual_ns
        assert np.percentile(apart, 80) <= 4 * usual_ns
