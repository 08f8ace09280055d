"""Which CPU does the work: `mace report --cpus` against bpftrace, on the same packets, with RPS off and on.

With RPS the host's end of the container's veth passes packets to CPU 1, while the pings, and with them all that a
packet passes before that, run on CPU 0. Both see the same pairs of CPUs. Medians differ by the cost of the probes, as
in `tests/integration/test_witness.py`, whose bound this is.
"""

import json
import re
import statistics
import subprocess

import pytest

from mace.lab import HOST, Spec, running
from mace.lab.plan import device_tag
from tests.integration.test_witness import COUNT, SIZE, _name_argument
from tests.measuring import balanced, mace, measured, on_one_cpu, wait_for

pytestmark = [pytest.mark.needs("root", "tracefs", "netns", "bpftrace", "rps"), pytest.mark.slow]
LAB = "cpu"
VETH, BRIDGE = f"veth{device_tag(LAB)}-c1", f"br{device_tag(LAB)}"


def spread(lab, device, cpus):
    """Let these CPUs (a mask, hexadecimal) run the receive softirq of a device of the lab's host."""
    queue = f"/sys/class/net/{device}/queues/rx-0/rps_cpus"
    script = f"mount -t sysfs none /sys && echo {cpus} > {queue}"
    netns = f"--net={lab.netns_path(HOST)}"
    subprocess.run(["nsenter", netns, "unshare", "--mount", "sh", "-c", script], check=True)


def program():
    """Print, for each ping at the container's veth: its wait and the two CPUs; and its run up to the bridge.

    Printing takes as long as the run itself, so the run begins before it, as it does for MACE.
    """
    name, length = _name_argument(), SIZE + 28
    at = f"/args->len == {length} && {name} =="
    return f"""
tracepoint:net:netif_rx {at} "{VETH}"/ {{ @queued[args->skbaddr] = nsecs; @cpu[args->skbaddr] = cpu; }}
tracepoint:net:netif_receive_skb {at} "{VETH}" && @queued[args->skbaddr]/ {{
  @began[args->skbaddr] = nsecs;
  printf("wait %lu %d %d\\n", @began[args->skbaddr] - @queued[args->skbaddr], @cpu[args->skbaddr], cpu);
  delete(@queued[args->skbaddr]); }}
tracepoint:net:netif_receive_skb {at} "{BRIDGE}" && @began[args->skbaddr]/ {{
  printf("run %lu\\n", nsecs - @began[args->skbaddr]); delete(@began[args->skbaddr]); }}
interval:ms:100 {{ printf("on\\n"); }}
"""


def agree(ours_ns, theirs):
    median = statistics.median(theirs)
    assert abs(ours_ns - median) <= max(1_000, min(ours_ns, median) / 4), f"ours {ours_ns} ns, theirs {median} ns"


def report(*argv):
    return json.loads(mace("report", "--cpus", "--json", *argv).stdout)


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("cpus", "moves"), [("0", False), ("2", True)])
def test_bpftrace(tmp_path, cpus, moves):
    said = tmp_path / "bpftrace.txt"
    with running(Spec(name=LAB)) as lab, on_one_cpu(0):
        spread(lab, VETH, cpus)
        lab.ping("c1", count=2)
        with measured(lab, tmp_path, "--source", "ftrace", "--softirqs") as measurement:
            with said.open("wb") as file:
                witness = subprocess.Popen(["bpftrace", "-B", "line", "-e", program()], stdout=file)
            try:
                wait_for(lambda: "\non\n" in said.read_text(), what="bpftrace", limit_s=60)
                assert lab.ping("c1", count=COUNT, size=SIZE).received == COUNT
                beats = said.read_text().count("\non\n")
                wait_for(lambda: said.read_text().count("\non\n") > beats + 2, what="bpftrace's last ping", limit_s=60)
            finally:
                witness.terminate()
                witness.wait(timeout=30)
    seen = [tuple(map(int, each)) for each in re.findall(r"^wait (\d+) (\d+) (\d+)", said.read_text(), re.M)]
    runs = [int(each) for each in re.findall(r"^run (\d+)", said.read_text(), re.M)]
    # The kernel skips a tracepoint's program while bpftrace itself has a map of that CPU in hand.
    assert COUNT // 2 < len(seen) <= COUNT
    assert COUNT // 2 < len(runs) <= COUNT
    assert {queued != ran for _, queued, ran in seen} == {moves}

    found = report("--store", measurement.store)
    stages = [one for one in found["stages"] if (one["device"], one["direction"]) == (VETH, "egress")]
    pairs = {(one["cpu_queued"], one["cpu"]): one["packets"] for one in stages}
    assert set(pairs) == {(queued, ran) for _, queued, ran in seen}
    assert sum(pairs.values()) == COUNT
    [stage] = stages
    agree(stage["wait"]["p50_ns"], [wait for wait, _, _ in seen])
    agree(stage["run"]["p50_ns"], runs)

    [egress] = [one for one in found["containers"] if (one["container"], one["direction"]) == ("c1", "egress")]
    assert egress["packets"] == COUNT
    if moves:
        assert egress["moved_per_packet"] >= 1
        assert "each change of CPU costs" in egress["sentence"]
    else:
        assert egress["price_ns"] == 0
    balanced(found)
    [cpu] = [one for one in found["cpus"] if one["cpu"] == int(moves)]
    assert cpu["packets_per_s"] > 0
    assert cpu["softirqs"]["count"] + cpu["softirqs"]["lost"] >= COUNT
    # A recording has the same stages; it does not have the CPUs' counters and softirqs.
    replayed = report(measurement.capture)
    assert (replayed["stages"], replayed["containers"]) == (found["stages"], found["containers"])
    assert {(one["packets_per_s"], one["softirqs"]) for one in replayed["cpus"]} == {(None, None)}
