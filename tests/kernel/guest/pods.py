"""Pods whose packets reach their device past every tracepoint, and pods behind netkit, in namespaces of their own."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from collector.bpf.devices import BpfDeviceFollower
from mace.lab import netkit
from storage.capture import CaptureSink
from tests.kernel.guest import programs
from tests.kernel.guest.commands import mace, start
from tests.kernel.guest.conftest import load, unload
from tests.kernel.guest.reader import within
from tests.measuring import wait_for
from tests.redirect_peer import bpffs, redirect

COUNT = 40
SIZE = 101
LENGTHS = {4: SIZE + 28, 6: SIZE + 48}
"""Family -> length of its echo requests and replies without a link-layer header, bytes: no other packet has it."""
HOST, FAR = "past-host", "past-far"
STACKED = {
    "macvlan": "type macvlan mode bridge",
    "ipvlan": "type ipvlan mode l2",
    "vlan": "type vlan id 5",
}
"""Devices on top of an outer device, which are moved into the pod."""
PAIRED = ("peer", "list")
"""Pods behind bpf_redirect_peer; those of `list` from a device that hands over its packets in lists."""
ROUTED = {"netkit2": netkit.Mode.L2, "netkit3": netkit.Mode.L3}
"""Pods behind netkit, and its mode: they need the hook no more than those behind veth do."""


def run(words: str) -> None:
    subprocess.run(words.split(), check=True, capture_output=True)


class Way:
    """One outer device with its far end, and one pod. A pod on a device that stacks on the outer one has IPv6, too."""

    def __init__(self, number: int, name: str) -> None:
        self.name, self.pod, self.outer = name, f"past-{name}", f"out{number}"
        base, inner = f"198.51.100.{number * 16}", f"203.0.113.{number * 16}"
        self.host_address, self.far_address = (f"{base.rsplit('.', 1)[0]}.{number * 16 + n}" for n in (1, 2))
        stacked = name in STACKED
        first = "198.51.100" if stacked else "203.0.113"
        self.pod_address = f"{first}.{number * 16 + (3 if stacked else 2)}"
        self.router = self.far_address if stacked else f"203.0.113.{number * 16 + 1}"
        self.inside = f"{inner}/28"
        self.far = f"far{number}"
        self.lxc = f"lxc{number}"
        self.families = (4, 6) if stacked else (4,)
        self.addresses6 = [f"2001:db8:0:{number}::{n}" for n in (2, 3)]
        """At the far end, and in the pod."""

    def make(self, folder: Path) -> None:
        run(f"ip netns add {self.pod}")
        run(f"ip -n {HOST} link add {self.outer} type veth peer name {self.far} netns {FAR}")
        run(f"ip -n {HOST} addr add {self.host_address}/28 dev {self.outer}")
        run(f"ip -n {HOST} link set {self.outer} up")
        run(f"ip -n {FAR} link set {self.far} up")
        far = self.far
        if self.name == "vlan":
            far = f"{self.far}.5"
            run(f"ip -n {FAR} link add {far} link {self.far} type vlan id 5")
            run(f"ip -n {FAR} link set {far} up")
        run(f"ip -n {FAR} addr add {self.far_address}/28 dev {far}")
        if self.name in STACKED:
            run(f"ip -n {HOST} link add up{self.outer} link {self.outer} {STACKED[self.name]}")
            run(f"ip -n {HOST} link set up{self.outer} netns {self.pod} name eth0")
        elif self.name in ROUTED:
            pod = Path("/run/netns", self.pod)
            within(HOST, lambda: netkit.add(self.lxc, ROUTED[self.name], pod, "eth0"))
        else:
            run(f"ip -n {HOST} link add {self.lxc} type veth peer name eth0 netns {self.pod}")
        run(f"ip -n {self.pod} addr add {self.pod_address}/28 dev eth0")
        run(f"ip -n {self.pod} link set eth0 up")
        if self.name in STACKED:
            for netns, device, address in zip((FAR, self.pod), (far, "eth0"), self.addresses6, strict=True):
                run(f"ip -n {netns} addr add {address}/64 dev {device} nodad")
            return
        run(f"ip -n {HOST} addr add {self.router}/28 dev {self.lxc}")
        run(f"ip -n {HOST} link set {self.lxc} up")
        run(f"ip -n {self.pod} route add default via {self.router}")
        run(f"ip -n {FAR} route add {self.inside} via {self.host_address}")
        if self.name == "list":
            # Since Linux 5.13 this is NAPI, for packets of a device that does not send several segments at once.
            run(f"ip netns exec {HOST} ethtool -K {self.outer} gro on")
            run(f"ip netns exec {FAR} ethtool -K {self.far} tso off")
        if self.name in PAIRED:
            redirect(HOST, self.outer, self.lxc, self.pod_address, folder / self.name)

    def ping(self, count: int) -> None:
        """Send this number of echo requests of each family from the pod to the far end."""
        for family in self.families:
            address = self.far_address if family == 4 else self.addresses6[0]
            run(f"ip netns exec {self.pod} ping -{family} -q -n -i 0.01 -c {count} -s {SIZE} {address}")


def has_netkit() -> bool:
    return subprocess.run(["modprobe", "netkit"], check=False, capture_output=True).returncode == 0


@contextmanager
def made(folder: Path) -> Iterator[dict[str, Way]]:
    """Provide the pods, by name; their neighbours are resolved."""
    names = (*STACKED, *PAIRED, *(ROUTED if has_netkit() else ()))
    ways = {name: Way(number, name) for number, name in enumerate(names)}
    with ExitStack() as leaving:
        for name in (HOST, FAR):
            run(f"ip netns add {name}")
            leaving.callback(run, f"ip netns del {name}")
        run(f"ip netns exec {HOST} sysctl -qw net.ipv4.ip_forward=1")
        pinned = leaving.enter_context(bpffs(folder / "bpf"))
        for way in ways.values():
            leaving.callback(run, f"ip netns del {way.pod}")
            way.make(pinned)
        for way in ways.values():
            way.ping(2)
        yield ways


def measured(source: str, ways: dict[str, Way], count: int, folder: Path) -> tuple[dict[str, Any], Path]:
    """Ping from each pod while `mace run` measures; return the run's JSON, and its recording."""
    outer = json.dumps([way.outer for way in ways.values()])
    (folder / "mace.toml").write_text(f'[capture]\nsource = "{source}"\nhost_netns = "{HOST}"\nouter = {outer}\n')
    if source == "kmod":
        load()
    capture = folder / "run.mace"
    words = ("run", "--json", "--no-store", "--record", capture, "--config", folder / "mace.toml")
    measuring = start(*words)
    try:
        wait_for(lambda: (capture.exists() and capture.stat().st_size) or measuring.poll() is not None, limit_s=600)
        for way in ways.values():
            way.ping(count)
        measuring.send_signal(signal.SIGINT)
        out, err = measuring.communicate(timeout=300)
    finally:
        measuring.kill()
        if source == "kmod":
            unload()
    assert measuring.returncode == 0, err
    return json.loads(out), capture


def measured_by_loaded(ways: dict[str, Way], count: int, folder: Path) -> tuple[dict[str, Any], Path]:
    """Ping from each pod while the loaded BPF programs record; return the replay's JSON, and the recording.

    The verifier takes an emulator a minute, so `mace run` would be too slow.
    """
    session = programs.unfiltered()
    session.forget_counts()
    outer = [way.outer for way in ways.values()]
    source = programs.source(session, BpfDeviceFollower(host_netns=HOST, outer=outer, docker_sockets=()))
    capture = folder / "run.mace"

    async def record() -> None:
        sink = CaptureSink(capture)

        async def read() -> None:
            async for item in source.items():
                await sink.write(item)

        try:
            await sink.open(await source.open())
            reading = asyncio.create_task(read())
            for way in ways.values():
                await asyncio.to_thread(way.ping, count)
            source.request_stop()
            await reading
        finally:
            await sink.aclose()
            await source.aclose()

    asyncio.run(record())
    return json.loads(mace("replay", "--json", capture, timeout=300).stdout), capture
