"""A pod whose packets reach its device by bpf_redirect_peer, as with Cilium's host routing."""

import json
import signal
import subprocess
import uuid
from contextlib import ExitStack

import pytest

from collector.bpf.session import programs
from contracts.hooks import Hook
from tests.measuring import start, wait_for
from tests.redirect_peer import bpffs, redirect

pytestmark = pytest.mark.needs("root", "netns", "tracefs")

POD, POD_ROUTER = "198.51.100.2", "198.51.100.1"
FAR, OUTER = "203.0.113.2", "203.0.113.1"
POD_MAC, ROUTER_MAC = "02:00:00:00:00:02", "02:00:00:00:00:01"
COUNT = 200


@pytest.mark.slow
@pytest.mark.parametrize("source", ["ftrace", pytest.param("bpf", marks=pytest.mark.needs("bpf"))])
def test_ingress_that_is_hidden_is_said_to_be(tmp_path, source):
    """ftrace has no hook `ip_rcv`. BPF has it where the kernel allows, and then measures ingress instead."""
    tag = f"r{uuid.uuid4().hex[:6]}"
    pod, host, far = (f"{tag}-{name}" for name in ("pod", "host", "far"))

    def run(words, *more):
        subprocess.run([*words.split(), *more], check=True, capture_output=True)

    with ExitStack() as leaving:
        for name in (pod, host, far):
            run(f"ip netns add {name}")
            leaving.callback(run, f"ip netns del {name}")
            run(f"ip netns exec {name} sysctl -qw net.ipv6.conf.all.disable_ipv6=1")
        run(f"ip -n {host} link add lxc0 address {ROUTER_MAC} type veth peer name eth0 address {POD_MAC} netns {pod}")
        run(f"ip -n {host} link add out0 type veth peer name far0 netns {far}")
        for name, device, address in (
            (pod, "eth0", POD), (host, "lxc0", POD_ROUTER), (host, "out0", OUTER), (far, "far0", FAR),
        ):  # fmt: skip
            run(f"ip -n {name} addr add {address}/24 dev {device}")
            run(f"ip -n {name} link set {device} up")
        # What is not redirected, ARP, would come at the pod's device: how often is the kernel's affair.
        run(f"ip -n {pod} neigh add {POD_ROUTER} lladdr {ROUTER_MAC} dev eth0")
        run(f"ip -n {host} neigh add {POD} lladdr {POD_MAC} dev lxc0")
        run(f"ip -n {pod} route add default via {POD_ROUTER}")
        run(f"ip -n {host} route add default via {FAR}")
        run(f"ip -n {far} route add default via {OUTER}")
        run(f"ip netns exec {host} sysctl -qw net.ipv4.ip_forward=1")
        redirect(host, "out0", "lxc0", POD, leaving.enter_context(bpffs(tmp_path / "bpf")) / "peer")
        (tmp_path / "mace.toml").write_text(f'[capture]\nsource = "{source}"\nhost_netns = "{host}"\n')
        capture = tmp_path / "run.mace"
        words = ("run", "--json", "--no-store", "--record", capture, "--config", tmp_path / "mace.toml")
        measuring = start(*words)
        leaving.callback(measuring.kill)
        # The recording's header is written once all is open.
        wait_for(lambda: capture.exists() and capture.stat().st_size, limit_s=60)
        for _ in range(3):
            run(f"ip netns exec {pod} ping -q -i 0.01 -c {COUNT} {FAR}")
        measuring.send_signal(signal.SIGINT)
        out, err = measuring.communicate(timeout=120)
        assert measuring.returncode == 0, err
        found = json.loads(out)
    egress = [row for row in found["devices"] if row["device"] == "eth0" and row["direction"] == "egress"]
    assert egress[0]["count"] >= COUNT
    if source == "bpf" and Hook.IP_RCV in programs()[0]:
        whole = {row["direction"]: row["count"] for row in found["overhead"] if row["netns"] == pod}
        assert whole["ingress"] >= 3 * COUNT
        assert "unseen" not in found
        return
    assert not [row for row in found["devices"] if row["device"] == "eth0" and row["direction"] == "ingress"]
    (told,) = found["unseen"]
    assert told.startswith(f"eth0 of {pod} sent ")
    assert "bpf_redirect_peer" in told
