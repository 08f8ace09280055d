"""The module, MACE's live capture of ftrace, and trace-cmd give the same delays for the same packets at the same time.

So does Perfetto, whose trace is made of trace-cmd's records. One kernel suffices, because the test compares the
recorders and not kernels.
"""

from __future__ import annotations

import asyncio
import platform
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from collector.files import FileOptions, recording
from collector.ftrace.source import FtraceConfig, FtraceSource
from collector.kmod.source import KmodSource
from collector.machine.devices import DeviceFollower
from contracts.hooks import TRACEPOINTS
from contracts.interfaces import Progress, Source, StreamHeader, StreamItem
from contracts.schema import Delays, Direction, Grade, Segment
from correlator.engine import Engine, EngineConfig
from mace.lab import HOST, Lab
from storage.capture import CaptureSink
from tests.kernel.guest.conftest import load, unload
from tests.perfetto_from_pages import perfetto_from_pages

pytestmark = pytest.mark.skipif(
    not platform.release().startswith("6.12."), reason="one kernel is enough: the three are compared, not kernels"
)

PINGS, DATAGRAMS = 30, 60
APART_NS = 60_000
"""Delays of four in five packets differ by less: in the emulator the stamps of two tracers in one event are a few µs
apart, and the other CPU may run in between."""

LAST_EVENT = Path("/sys/kernel/tracing/events") / TRACEPOINTS[-1].tracepoint.replace(":", "/") / "enable"
Stream = tuple[StreamHeader, list[StreamItem]]


def follower(lab: Lab) -> DeviceFollower:
    return DeviceFollower(
        host_netns=str(lab.netns_path(HOST)), outer=(lab.outer_device,), remote_netns=(lab.netns_path("remote").name,)
    )


def wait_until_recording(process: subprocess.Popen[str], place: Path) -> None:
    """Until the last event is enabled and each CPU has its file; what it says comes only when it ends."""
    deadline = time.monotonic() + 120
    while LAST_EVENT.read_text().strip() != "1" or not list(place.glob("trace.dat.cpu*")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "trace-cmd did not begin"
        time.sleep(0.2)
    time.sleep(1)


async def both(lab: Lab, target: Path) -> list[Stream]:
    """What ftrace and the module tell of some traffic; ftrace's also as a capture file."""
    sources: list[Source] = [
        FtraceSource(FtraceConfig(hold_back_ms=3000), follower(lab)),
        KmodSource(devices=follower(lab)),
    ]
    streams: list[Stream] = [(await source.open(), []) for source in sources]
    sink = CaptureSink(target)
    await sink.open(streams[0][0])

    async def read(source: Source, items: list[StreamItem], tee: CaptureSink | None) -> None:
        async for item in source.items():
            if isinstance(item, Progress):
                continue
            items.append(item)
            if tee is not None:
                await tee.write(item)

    reading = [
        asyncio.create_task(read(source, items, sink if number == 0 else None))
        for number, (source, (_, items)) in enumerate(zip(sources, streams, strict=True))
    ]
    await asyncio.sleep(1)
    await asyncio.to_thread(traffic, lab)
    await asyncio.sleep(1)
    for source in sources:
        source.request_stop()
    await asyncio.gather(*reading)
    await sink.aclose()
    for source in sources:
        await source.aclose()
    return streams


def traffic(lab: Lab) -> None:
    lab.ping("c1", count=PINGS, interval_s=0.02)
    lab.udp("c2", count=DATAGRAMS, size=100, rate_pps=200)


def rows(stream: Stream) -> Delays:
    header, items = stream
    engine = Engine(header.clock.offset_ns, EngineConfig())
    results = [one for item in items if not isinstance(item, Progress) for one in engine.feed(item)]
    results.append(engine.finish())
    assert results[-1].totals.ledger.lost == 0
    return Delays.concatenate([one.rows.delays for one in results])


@pytest.fixture(scope="module")
def seen(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Delays]:
    place = tmp_path_factory.mktemp("trace-cmd")
    load()
    events = [word for info in TRACEPOINTS for word in ("-e", info.tracepoint)]
    argv = ["trace-cmd", "record", "-C", "mono", *events, "-o", str(place / "trace.dat")]
    process = subprocess.Popen(argv, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        wait_until_recording(process, place)
        ftrace, module = asyncio.run(both(lab, place / "live.mace"))
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
        unload()
    options = FileOptions(topology=place / "live.mace")
    perfetto = perfetto_from_pages(place / "trace.dat", ftrace[0].clock.offset_ns)
    (place / "trace.pftrace").write_bytes(perfetto)
    return {
        "ftrace": rows(ftrace),
        "module": rows(module),
        "trace-cmd": rows(read_file(place / "trace.dat", options)),
        "perfetto": rows(read_file(place / "trace.pftrace", options)),
    }


def read_file(path: Path, options: FileOptions) -> Stream:
    with recording(path, options).reader() as reader:
        return reader.header, list(reader.items())


def crossings(found: Delays, way: Direction) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """When each packet's path began, and how long it took, in that order."""
    whole = (found.segment == Segment.OVERHEAD) & (found.direction == way)
    order = np.argsort(found.utc_ns[whole], kind="stable")
    return found.utc_ns[whole][order], found.delay_ns[whole][order]


@pytest.mark.parametrize("other", ["module", "trace-cmd", "perfetto"])
@pytest.mark.parametrize("way", [Direction.EGRESS, Direction.INGRESS])
def test_the_same_packets_take_as_long(seen: dict[str, Delays], other: str, way: Direction) -> None:
    utc, delay = crossings(seen["ftrace"], way)
    other_utc, other_delay = crossings(seen[other], way)
    assert len(utc) >= PINGS + (DATAGRAMS if way is Direction.EGRESS else 0)
    # The others may have been watching a little longer. In the same order all the same: that the nearest in time is the
    # same packet does not hold where the emulator stood still between the two tracers' stamps of one event.
    assert len(other_utc) >= len(utc)
    shifted = np.lib.stride_tricks.sliding_window_view(other_utc, len(utc))
    first = int(np.median(np.abs(shifted - utc), axis=1).argmin())
    near = slice(first, first + len(utc))
    apart = np.abs(other_delay[near] - delay)
    print(f"{other}, {way.name}: {np.median(apart):,.0f} ns apart in the median, 80 %: {np.percentile(apart, 80):,.0f}")
    assert np.percentile(apart, 80) < APART_NS


def test_perfetto_has_what_trace_cmd_has(seen: dict[str, Delays]) -> None:
    """The same records in another form: the same rows to the nanosecond."""
    one, other = seen["trace-cmd"], seen["perfetto"]
    assert len(one) == len(other) > PINGS + DATAGRAMS
    for name in ("utc_ns", "direction", "segment", "position", "delay_ns", "l3_len", "grade", "outcome"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name


def test_the_module_knows_them_by_content_too(seen: dict[str, Delays]) -> None:
    assert (seen["module"].grade == Grade.EXACT).mean() > 0.9
    for name in ("ftrace", "trace-cmd", "perfetto"):
        assert (seen[name].grade == Grade.BUFFER).all()
