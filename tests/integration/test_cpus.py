"""Which CPU does the work: `mace report --cpus` against bpftrace, on the same packets, with RPS off and on.

With RPS the host's end of the container's veth passes packets to CPU 1, while the pings, and with them all that a
packet passes before that, run on CPU 0. Both see the same pairs of CPUs, and bpftrace's stamps lie between MACE's, as
in `tests/integration/test_witness.py`.
"""

import itertools
import json
import re
import subprocess

import numpy as np
import pytest

from contracts.hooks import Hook
from mace.lab import HOST, Spec, running
from mace.lab.plan import device_tag
from tests.integration.test_witness import COUNT, SIZE, _name_argument, boot_offset_ns, in_order, stamps
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
    """Print each ping's times and CPUs: queued at the container's veth, received there, received at the bridge."""
    name, length = _name_argument(), SIZE + 28
    at = f"/args->len == {length} && {name} =="
    return f"""
tracepoint:net:netif_rx {at} "{VETH}"/ {{ printf("queued %lu %d\\n", nsecs, cpu); }}
tracepoint:net:netif_receive_skb {at} "{VETH}"/ {{ printf("began %lu %d\\n", nsecs, cpu); }}
tracepoint:net:netif_receive_skb {at} "{BRIDGE}"/ {{ printf("ended %lu %d\\n", nsecs, cpu); }}
interval:ms:100 {{ printf("on\\n"); }}
"""


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
    offset_ns, text = boot_offset_ns(), said.read_text()
    ours = {
        "queued": stamps(measurement.capture, Hook.NETIF_RX, VETH, SIZE + 28),
        "began": stamps(measurement.capture, Hook.NETIF_RECEIVE_SKB, VETH, SIZE + 28),
        "ended": stamps(measurement.capture, Hook.NETIF_RECEIVE_SKB, BRIDGE, SIZE + 28),
    }
    ours["next"] = np.append(ours["queued"][1:], np.iinfo(np.int64).max)
    cpus_seen = {}
    for event, following in itertools.pairwise(ours):
        # CPUs print independently of one another.
        lines = sorted((int(ns), int(cpu)) for ns, cpu in re.findall(rf"^{event} (\d+) (\d+)", text, re.M))
        # The kernel skips a tracepoint's program while bpftrace itself has a map of that CPU in hand.
        assert COUNT // 2 < len(lines) <= COUNT == len(ours[event])
        in_order(ours[event], np.array([ns for ns, _ in lines]) - offset_ns, ours[following])
        cpus_seen[event] = {cpu for _, cpu in lines}
    assert cpus_seen["queued"] == {0}
    assert cpus_seen["began"] == {int(moves)}

    found = report("--store", measurement.store)
    [stage] = [one for one in found["stages"] if (one["device"], one["direction"]) == (VETH, "egress")]
    assert (stage["cpu_queued"], stage["cpu"], stage["packets"]) == (0, int(moves), COUNT)
    for name, delays in (("wait", ours["began"] - ours["queued"]), ("run", ours["ended"] - ours["began"])):
        # Histograms have bins of a 128th.
        assert stage[name]["p50_ns"] == pytest.approx(np.quantile(delays, 0.5, method="inverted_cdf"), rel=1 / 64)

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
