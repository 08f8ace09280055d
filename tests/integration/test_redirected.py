"""A pod whose packets reach its device by bpf_redirect_peer, as with Cilium's host routing."""

import ctypes
import json
import os
import signal
import struct
import subprocess
import uuid
from contextlib import ExitStack

import pytest

from tests.measuring import start, wait_for

pytestmark = pytest.mark.needs("root", "netns", "tracefs")

POD, POD_ROUTER = "198.51.100.2", "198.51.100.1"
FAR, OUTER = "203.0.113.2", "203.0.113.1"
POD_MAC, ROUTER_MAC = "02:00:00:00:00:02", "02:00:00:00:00:01"
COUNT = 200
_BPF_PROG_LOAD, _BPF_OBJ_PIN, _SCHED_CLS, _REDIRECT_PEER = 5, 6, 3, 155
_NR_BPF = {"x86_64": 321, "aarch64": 280}[os.uname().machine]


def program(ifindex, address):
    """IPv4 packets to `address` go to the peer of the device; others their way. Instructions as in linux/bpf.h."""

    def one(code, dst=0, src=0, offset=0, number=0):
        return struct.pack("<BBhi", code, src << 4 | dst, offset, number)

    wanted = int.from_bytes(bytes(map(int, address.split("."))), "big", signed=False)
    wanted -= (wanted >> 31) << 32
    return b"".join(
        [
            one(0xBF, 6, 1),  # r6 = ctx
            one(0x20, number=30),  # r0 = word of the packet at 30: destination behind an Ethernet header
            one(0x56, 0, offset=4, number=wanted),  # if w0 != wanted goto pass
            one(0xB7, 1, number=ifindex),
            one(0xB7, 2),
            one(0x85, number=_REDIRECT_PEER),
            one(0x95),
            one(0xB7, 0),  # pass: TC_ACT_OK
            one(0x95),
        ]
    )


def bpf(command, attributes):
    libc = ctypes.CDLL(None, use_errno=True)
    found = libc.syscall(_NR_BPF, command, ctypes.c_char_p(attributes), len(attributes))
    if found < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), f"bpf({command})")
    return found


def pinned(instructions, path):
    """Load a program for tc and pin it."""
    code, licence, log = (ctypes.create_string_buffer(raw) for raw in (instructions, b"GPL", bytes(65536)))
    fields = struct.pack(
        "<IIQQIIQI", _SCHED_CLS, len(instructions) // 8, ctypes.addressof(code), ctypes.addressof(licence),
        1, len(log), ctypes.addressof(log), 0,
    )  # fmt: skip
    fd = bpf(_BPF_PROG_LOAD, fields.ljust(128, b"\0"))
    name = ctypes.create_string_buffer(os.fsencode(path))
    bpf(_BPF_OBJ_PIN, struct.pack("<QI", ctypes.addressof(name), fd).ljust(64, b"\0"))
    os.close(fd)


@pytest.mark.slow
def test_ingress_that_is_hidden_is_said_to_be(tmp_path):
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
        bpffs = tmp_path / "bpf"
        bpffs.mkdir()
        run(f"mount -t bpf bpf {bpffs}")
        leaving.callback(run, f"umount {bpffs}")
        shown = subprocess.run(["ip", "-n", host, "-j", "link", "show", "lxc0"], check=True, capture_output=True)
        pinned(program(json.loads(shown.stdout)[0]["ifindex"], POD), bpffs / "peer")
        inside = f"nsenter --net=/run/netns/{host}"  # not ip netns exec, which hides the mount
        run(f"{inside} tc qdisc add dev out0 clsact")
        run(f"{inside} tc filter add dev out0 ingress bpf direct-action object-pinned {bpffs}/peer")
        (tmp_path / "mace.toml").write_text(f'[capture]\nsource = "ftrace"\nhost_netns = "{host}"\n')
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
    assert not [row for row in found["devices"] if row["device"] == "eth0" and row["direction"] == "ingress"]
    (told,) = found["unseen"]
    assert told.startswith(f"eth0 of {pod} sent ")
    assert "bpf_redirect_peer" in told
