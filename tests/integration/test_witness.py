"""Independent witnesses of the same packets: bpftrace and perf compute the same delays from the same tracepoints.

Counts are equal. Medians are not equal to the nanosecond: the probes of a tracepoint run one after the other, so that
at each hook the second observer's time is later by the cost of the first observer's probe (0.2 µs for ftrace, 0.3 for
bpftrace, 0.9 for perf). If the costs at both ends of a delay are equal, they cancel out: ingress medians agreed within
0.16 µs. On egress the first hook runs with cold caches if packets are rare, which delays the second observer more:
0.5 µs at 500 packets/s, and 1.5 to 6.2 µs, at most 12 % of the delay, at 100 packets/s. The bound is therefore 1 µs or
a quarter of the delay, whichever is more. A wrong device or a wrong pair would be off by a whole crossing or interval.
"""

import re
import statistics
import subprocess
import time

import pytest

from contracts.hooks import Hook
from mace.lab import Spec, running
from tests.golden_perfetto import replayed
from tests.measuring import measured, wait_for

pytestmark = [pytest.mark.needs("root", "tracefs", "netns"), pytest.mark.slow, pytest.mark.timeout(180)]

COUNT = 300
SIZE = 1217
"""Payload of the pings; their length on each device tells them from all other traffic."""


def agree(ours, theirs):
    """Compare two arrays of delays in the order of the packets, ns."""
    assert len(ours) == len(theirs) == COUNT
    a, b = statistics.median(ours), statistics.median(theirs)
    bound = max(1_000, min(a, b) / 4)
    assert abs(a - b) <= bound, f"medians: ours {a} ns, theirs {b} ns"
    # Packet by packet, so that medians of different packets cannot agree by chance.
    assert statistics.median(abs(x - y) for x, y in zip(ours, theirs, strict=True)) <= bound


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
tracepoint:net:net_dev_queue /args->len == {tx} && {name} == "eth0"/ {{ @egress[args->skbaddr] = nsecs; }}
tracepoint:net:net_dev_queue /args->len == {tx} && {name} == "{outer}" && @egress[args->skbaddr]/ {{
  printf("egress %lu\\n", nsecs - @egress[args->skbaddr]); delete(@egress[args->skbaddr]); }}
tracepoint:net:netif_receive_skb /args->len == {rx} && {name} == "{outer}"/ {{ @ingress[args->skbaddr] = nsecs; }}
tracepoint:net:netif_receive_skb /args->len == {rx} && {name} == "eth0" && @ingress[args->skbaddr]/ {{
  printf("ingress %lu\\n", nsecs - @ingress[args->skbaddr]); delete(@ingress[args->skbaddr]); }}
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
        text = said.read_text()
    for direction in ("egress", "ingress"):
        agree(overheads(measurement, direction), [int(n) for n in re.findall(rf"^{direction} (\d+)", text, re.M)])


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
    line = re.compile(r"(\d+)\.(\d{9}):\s+(\S+?):\s+dev=(\S+) skbaddr=(\S+) len=(\d+)")
    began, found = {}, {"egress": [], "ingress": []}
    for seconds, fraction, event, device, skb, length in line.findall(text):
        ts, queued = int(seconds + fraction), event.endswith("net_dev_queue")
        if int(length) != SIZE + (42 if queued else 28):
            continue
        direction = "egress" if queued else "ingress"
        if device == ("eth0" if queued else outer):
            began[skb] = ts
        elif device == (outer if queued else "eth0") and skb in began:
            found[direction].append(ts - began.pop(skb))
    for direction, theirs in found.items():
        agree(overheads(measurement, direction), theirs)
    # The default output of perf script replays to the same events at the same times.
    plain = tmp_path / "perf.txt"
    with plain.open("wb") as file:
        subprocess.run(["perf", "script", "--ns", "-i", data], stdout=file, check=True)
    _, batch, last, _, _ = replayed(plain)
    times = sorted(int(seconds + fraction) for seconds, fraction, *_ in line.findall(text))
    assert batch.ts_ns[batch.hook != Hook.LOST].tolist() == times
    assert last.totals.ledger.imbalance == 0
