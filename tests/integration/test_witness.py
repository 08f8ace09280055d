"""Independent witnesses of the same packets: bpftrace and perf compute the same delays from the same tracepoints.

Counts are equal. Medians are not equal to the nanosecond: each observer stamps at another place of the probe's
list and every probe before it costs its time (about 0.2 µs for ftrace, 0.3 for bpftrace, 0.9 for perf), once or twice
between the two stamps of a delay and at each of the devices in between. The bound is 3 µs or a third, whichever is
more: a wrong device or a wrong pair would be off by a whole crossing or a whole interval.
"""

import re
import statistics
import subprocess
import time

import pytest

from mace.lab import Spec, running
from tests.measuring import measured, wait_for

pytestmark = [pytest.mark.needs("root", "tracefs", "netns"), pytest.mark.slow, pytest.mark.timeout(180)]

COUNT = 500
SIZE = 111
"""Payload of the pings; their length on each device tells them from all other traffic."""


def agree(ours, theirs):
    assert len(ours) == len(theirs) == COUNT
    a, b = statistics.median(ours), statistics.median(theirs)
    assert abs(a - b) <= max(3_000, max(a, b) / 3), f"medians: ours {a} ns, theirs {b} ns"


def overheads(measurement, direction):
    rows = measurement.rows(container="c1", segment="overhead", direction=direction, l3_len=SIZE + 28)
    return [row["delay_ns"] for row in rows]


@pytest.mark.needs("bpftrace")
@pytest.mark.parametrize("interval_s", [0.01, 0.002])
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
"""
        said = tmp_path / "bpftrace.txt"
        with measured(lab, tmp_path) as measurement:
            witness = subprocess.Popen(["bpftrace", "-o", said, "-e", program])
            try:
                # Its first line, "Attaching N probes...", comes before they are on.
                wait_for(lambda: said.exists() and "Attaching" in said.read_text(), what="bpftrace")
                time.sleep(2)
                assert lab.ping("c1", count=COUNT, size=SIZE, interval_s=interval_s).received == COUNT
                time.sleep(0.5)
            finally:
                witness.terminate()
                witness.wait(timeout=30)
        text = said.read_text()
    for direction in ("egress", "ingress"):
        agree(overheads(measurement, direction), [int(n) for n in re.findall(rf"^{direction} (\d+)", text, re.M)])


def _name_argument():
    """How this bpftrace spells the string behind the tracepoint's __data_loc `name`."""
    listed = subprocess.run(
        ["bpftrace", "-lv", "tracepoint:net:net_dev_queue"], capture_output=True, text=True, check=True
    ).stdout
    return "str(args->name)" if "name" in listed else "str(args->data_loc_name)"


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
