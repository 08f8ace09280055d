"""The real trace.dat files of tests/golden/tracecmd give the events of `trace-cmd report`, and the live delays."""

import hashlib
import json
from collections import Counter

import numpy as np
import pytest

from collector.files import recording
from collector.reading.options import FileOptions
from collector.tracecmd.reader import TraceDat
from contracts.hooks import Hook
from contracts.records import Batch
from contracts.schema import Segment
from contracts.topology import Topology
from correlator.engine import Engine, EngineConfig
from tests.places import GOLDEN

TRACES = GOLDEN / "tracecmd"
EXPECTED = json.loads((TRACES / "expected.json").read_text())
FILES = sorted(EXPECTED)
STAMPED_NS = 250_000
"""Two tracers stamp an event in sequence; the emulator of the guest may run other code in between."""


def stream(path, options=None):
    """Return (header, items) of a file."""
    with recording(path, options).reader() as reader:
        return reader.header, list(reader.items())


@pytest.mark.parametrize("name", FILES)
def test_the_events_are_those_that_trace_cmd_reports(name):
    _, items = stream(TRACES / name)
    batch = Batch.concatenate([item for item in items if isinstance(item, Batch)])
    batch = batch[batch.hook != Hook.LOST]
    names = [item for item in items if isinstance(item, Topology)][-1].sightings
    expected = EXPECTED[name]
    hooks = [Hook(hook).name.lower() for hook in batch.hook.tolist()]
    assert dict(sorted(Counter(hooks).items())) == expected["events"]
    assert (int(batch.ts_ns[0]), int(batch.ts_ns[-1])) == (expected["first_ns"], expected["last_ns"])
    order = {}
    told = [
        (ts, cpu, hook, names[dev].name, order.setdefault(skb, len(order)))
        for ts, cpu, hook, dev, skb in zip(
            batch.ts_ns.tolist(), batch.cpu.tolist(), hooks, batch.dev.tolist(), batch.skb_id.tolist(), strict=True
        )
    ]
    assert hashlib.sha256(json.dumps(told).encode()).hexdigest() == expected["digest"]


def overheads(path, options=None):
    """Return (direction, ns) of each packet over the whole path, in time order."""
    header, items = stream(path, options)
    engine = Engine(header.clock.offset_ns, EngineConfig())
    results = [one for item in items for one in engine.feed(item)] + [engine.finish()]
    rows = []
    for one in results:
        whole = one.rows.delays.segment == Segment.OVERHEAD
        kept = (one.rows.delays.utc_ns[whole], one.rows.delays.direction[whole], one.rows.delays.delay_ns[whole])
        rows += list(zip(*(column.tolist() for column in kept), strict=True))
    return [row[1:] for row in sorted(rows)]


@pytest.mark.parametrize("name", [name for name in FILES if name not in ("v7-lost.dat", "v7-some.dat", "v7-none.dat")])
def test_delays_are_those_of_the_live_capture(name):
    """Both tools recorded the same packets at once, each with its own time stamps."""
    live_file = (TRACES / name).with_suffix(".mace")
    live = overheads(live_file)
    read = overheads(TRACES / name, FileOptions(topology=live_file))
    assert len(live) >= 18
    assert [direction for direction, _ in read] == [direction for direction, _ in live]
    apart = np.array([a[1] - b[1] for a, b in zip(read, live, strict=True)])
    print(f"{name}: {np.median(np.abs(apart)):.0f} ns apart in the median, at most {np.abs(apart).max()}")
    assert np.median(np.abs(apart)) < 20_000
    assert np.abs(apart).max() < STAMPED_NS


@pytest.mark.parametrize("name", ["v6.dat", "v7-zstd.dat", "v7-date.dat", "v7-buffers.dat"])
def test_events_as_columns(name):
    """The public API and the source give the same events."""
    with TraceDat(TRACES / name) as trace:
        assert trace.kernel.startswith("6.12.")
        for event, count in EXPECTED[name]["events"].items():
            full = next(one for one in trace.events if one.endswith(f":{event}"))
            columns = trace.read(full)
            assert len(columns["ts_ns"]) == count
            assert (np.diff(columns["ts_ns"]) >= 0).all()
            assert set(columns["cpu"].tolist()) <= set(trace.cpus)
        queued = trace.read("net:net_dev_queue")
        assert b"eth0" in set(queued["name"].tolist())
        assert queued["skbaddr"].dtype == np.uint64
        with pytest.raises(KeyError, match="did you mean 'net:net_dev_queue'"):
            trace.read("net:net_dev_quee")


def test_other_subsystems_events_as_columns():
    with TraceDat(TRACES / "v7-some.dat") as trace:
        switches = trace.read("sched:sched_switch")
        assert len(switches["ts_ns"]) == 3078
        assert switches["prev_comm"][0] == b"trace-cmd"
        assert switches["next_pid"][:3].tolist() == [306, 307, 13]
        assert switches["prev_state"][2] == 256
        assert trace.processes()[32] == "kworker/u8:2"
    with TraceDat(TRACES / "v7-buffers.dat", buffer="tasks") as trace:
        assert trace.buffers == ("tasks", "packets")
        assert len(trace.read("net:net_dev_queue")["ts_ns"]) == 0
        assert len(trace.read("sched:sched_switch")["ts_ns"]) > 0
