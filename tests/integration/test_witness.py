"""Independent witnesses of the same packets: bpftrace and perf stamp them at the same tracepoints.

The probes of a tracepoint run one after the other, in the order in which they were attached: at each hook first
ftrace's and then the witness's. How much later the witness stamps a packet depends on its own cost and on cold caches
(0.2 to 6 µs), so that two observers' delays differ; but the witness's stamp of a packet at one hook lies between MACE's
there and MACE's at the next hook. A wrong device, a wrong pair or a delay that is off by more than the witness is late
would break this order. Between MACE's own stamps and its delays there is no difference at all.
"""

import re
import subprocess
import time

import numpy as np
import pytest

from collector.files import FileOptions, recording
from contracts.hooks import Hook
from contracts.records import Batch
from mace.lab import Spec, running
from tests.golden_perfetto import replayed
from tests.measuring import measured, wait_for

pytestmark = [pytest.mark.needs("root", "tracefs", "netns"), pytest.mark.slow, pytest.mark.timeout(180)]

COUNT = 300
SIZE = 1217
"""Payload of the pings; their length on each device tells them from all other traffic."""


def stamps(capture, hook, device, length):
    """Return the times of a recording's packets of one length at a hook of a device, int64, ns of CLOCK_MONOTONIC."""
    with recording(capture, FileOptions()).reader() as reader:
        topologies, batches = [], []
        for item in reader.items():
            (batches if isinstance(item, Batch) else topologies).append(item)
    batch = Batch.concatenate(batches)
    names = [sighting.name for sighting in topologies[-1].sightings]
    at = np.array([name == device for name in names])[batch.dev]
    return batch.ts_ns[(batch.hook == hook) & at & (batch.l3_len == length)]


def in_order(ours, theirs, next_ours):
    """Check that a witness stamped packets after MACE and before MACE's stamps at their next hook; ns, in order."""
    index = np.searchsorted(ours, theirs, "right") - 1
    assert index.min() >= 0
    assert len(np.unique(index)) == len(index)
    late = theirs - next_ours[index]
    assert (late < 0).all(), f"later than MACE's next stamps by up to {late.max()} ns"


def agree(measurement, direction, outer, begun, ended):
    """Compare MACE's delays of a direction with a witness's stamps (ns) at the first and the last hook of each."""
    hook = Hook.NET_DEV_QUEUE if direction == "egress" else Hook.NETIF_RECEIVE_SKB
    first, last = ("eth0", outer) if direction == "egress" else (outer, "eth0")
    begin, end = (stamps(measurement.capture, hook, device, SIZE + 28) for device in (first, last))
    assert len(begin) == len(end) == len(begun) == len(ended) == COUNT
    assert overheads(measurement, direction) == (end - begin).tolist()
    in_order(begin, begun, end)
    in_order(end, ended, np.append(begin[1:], np.iinfo(np.int64).max))


def overheads(measurement, direction):
    rows = measurement.rows(container="c1", segment="overhead", direction=direction, l3_len=SIZE + 28)
    return [row["delay_ns"] for row in sorted(rows, key=lambda row: row["utc_ns"])]


@pytest.mark.needs("bpftrace")
@pytest.mark.parametrize("interval_s", [pytest.param(0.01, marks=pytest.mark.slow), 0.002])
def test_bpftrace(tmp_path, interval_s):
    with running(Spec(name="wit")) as lab:
        lab.ping("c1", count=2)
        tx, rx, outer = SIZE + 42, SIZE + 28, lab.outer_device
        name = _name_argument()
        program = f"""
tracepoint:net:net_dev_queue /args->len == {tx} && {name} == "eth0"/ {{ printf("egress begin %lu\\n", nsecs); }}
tracepoint:net:net_dev_queue /args->len == {tx} && {name} == "{outer}"/ {{ printf("egress end %lu\\n", nsecs); }}
tracepoint:net:netif_receive_skb /args->len == {rx} && {name} == "{outer}"/ {{ printf("ingress begin %lu\\n", nsecs); }}
tracepoint:net:netif_receive_skb /args->len == {rx} && {name} == "eth0"/ {{ printf("ingress end %lu\\n", nsecs); }}
interval:ms:100 {{ printf("on\\n"); }}
"""
        said = tmp_path / "bpftrace.txt"
        with measured(lab, tmp_path) as measurement:
            # Without -o, which would buffer all output until the end.
            with said.open("wb") as file:
                witness = subprocess.Popen(["bpftrace", "-B", "line", "-e", program], stdout=file)
            try:
                # bpftrace prints "Attaching N probes..." before they are on, and the output of the last probe
                # afterwards.
                wait_for(lambda: said.exists() and "\non\n" in said.read_text(), what="bpftrace")
                assert lab.ping("c1", count=COUNT, size=SIZE, interval_s=interval_s).received == COUNT
                time.sleep(0.5)
            finally:
                witness.terminate()
                witness.wait(timeout=30)
        text, offset = said.read_text(), boot_offset_ns()
    for direction in ("egress", "ingress"):
        begun, ended = (
            np.array(sorted(map(int, re.findall(rf"^{direction} {which} (\d+)", text, re.M)))) - offset
            for which in ("begin", "end")
        )
        agree(measurement, direction, outer, begun, ended)


def boot_offset_ns():
    """Return how far CLOCK_BOOTTIME, which is bpftrace's `nsecs`, is ahead of CLOCK_MONOTONIC."""
    read, clocks = time.clock_gettime_ns, (time.CLOCK_MONOTONIC, time.CLOCK_BOOTTIME, time.CLOCK_MONOTONIC)
    _, offset = min(
        (after - before, boot - (before + after) // 2)
        for before, boot, after in ([read(clock) for clock in clocks] for _ in range(100))
    )
    return offset


def _name_argument():
    """Return the expression of this bpftrace version for the string of the tracepoint's __data_loc `name`."""
    listed = subprocess.run(
        ["bpftrace", "-lv", "tracepoint:net:net_dev_queue"], capture_output=True, text=True, check=True
    ).stdout
    return "str(args->name)" if "name" in listed else "str(args->data_loc_name)"


@pytest.mark.slow
@pytest.mark.needs("perf")
def test_perf_script(tmp_path):
    events = ("net:net_dev_queue", "net:netif_receive_skb")
    data = tmp_path / "perf.data"
    with running(Spec(name="wit")) as lab:
        lab.ping("c1", count=2)
        outer = lab.outer_device
        with measured(lab, tmp_path) as measurement:
            argv = ["perf", "record", "-q", "-k", "mono", "-a", "-o", data]
            argv += [word for event in events for word in ("-e", event)]
            witness = subprocess.Popen([*argv, "--", "sleep", "60"], stderr=subprocess.PIPE)
            try:
                time.sleep(2)
                assert lab.ping("c1", count=COUNT, size=SIZE).received == COUNT
                time.sleep(0.5)
            finally:
                witness.terminate()
                witness.communicate(timeout=60)
    script = ["perf", "script", "--ns", "-i", data, "-F", "time,event,trace"]
    text = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    line = re.compile(r"(\d+)\.(\d{9}):\s+(\S+?):\s+dev=(\S+) skbaddr=\S+ len=(\d+)")
    found = {}
    for seconds, fraction, event, device, length in line.findall(text):
        if int(length) == SIZE + (42 if event.endswith("net_dev_queue") else 28):
            found.setdefault((event.split(":")[-1], device), []).append(int(seconds + fraction))
    for direction, event, devices in (
        ("egress", "net_dev_queue", ("eth0", outer)),
        ("ingress", "netif_receive_skb", (outer, "eth0")),
    ):
        agree(measurement, direction, outer, *(np.array(sorted(found[event, device])) for device in devices))
    # The default output of perf script replays to the same events at the same times.
    plain = tmp_path / "perf.txt"
    with plain.open("wb") as file:
        subprocess.run(["perf", "script", "--ns", "-i", data], stdout=file, check=True)
    _, batch, last, _, _ = replayed(plain)
    times = sorted(int(seconds + fraction) for seconds, fraction, *_ in line.findall(text))
    assert batch.ts_ns[batch.hook != Hook.LOST].tolist() == times
    assert last.totals.ledger.imbalance == 0
