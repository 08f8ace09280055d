"""Cost of a record by kind of traffic, for traffic other than short echo requests: the module against ftrace.

As in `tests.benchmark.kmod`, in one lab on one kernel, rounds without observer, with ftrace and with the module take
turns. A client and a server on one CPU exchange messages, each exchange as soon as the one before is answered, so that
the time of an exchange is that of all its packets, on both sides. The cost of a record is the time that observing adds
to the median exchange, divided by the records of an exchange.
"""

import json
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mace.lab import Lab, Spec, running
from tests.benchmark.figures import figure
from tests.benchmark.kmod import CPU, KERNEL, Ftrace, Module, in_guest

EXCHANGES: Final = 60
WARM_UP: Final = 20
"""Exchanges of the warm-up, which are not measured. These few suffice when instructions are counted."""
TUNNELS: Final = {
    "vxlan": "type vxlan id 7 dstport 4789 local 203.0.113.{here} remote 203.0.113.{there}",
    "geneve": "type geneve id 7 remote 203.0.113.{there}",
    "gretap": "type gretap local 203.0.113.{here} remote 203.0.113.{there} key 7",
    "gre": "type gre local 203.0.113.{here} remote 203.0.113.{there}",
    "ipip": "type ipip local 203.0.113.{here} remote 203.0.113.{there}",
}

PEER = """
import os, socket, statistics, sys, time
os.sched_setaffinity(0, {int(sys.argv[1])})
side, address, how, size, exchanges, warm_up = *sys.argv[2:5], *map(int, sys.argv[5:8])
family = socket.AF_INET6 if ":" in address else socket.AF_INET
PORT, SEGMENT = 5001, 64
if how == "echo":
    peer = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_ICMP)
elif how == "stream":
    peer = socket.socket(family, socket.SOCK_STREAM)
else:
    peer = socket.socket(family, socket.SOCK_DGRAM)
if side == "server":
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    peer.bind((address, PORT))
    if how == "stream":
        peer.listen()
    print("ready", flush=True)
    if how == "stream":
        peer, _ = peer.accept()
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for _ in range(exchanges):
        if how == "stream":
            left = size
            while left:
                left -= len(peer.recv(left))
            peer.send(b"!")
        else:
            for _ in range(size // SEGMENT if how == "segments" else 1):
                data, sender = peer.recvfrom(65536)
            peer.sendto(b"!" if how == "segments" else data, sender)
else:
    peer.settimeout(20)
    peer.connect((address, PORT))
    if how == "segments":
        peer.setsockopt(17, 103, SEGMENT)  # UDP_SEGMENT
    times = []
    for n in range(exchanges):
        data = os.urandom(size)
        if how == "echo":
            # RFC 792, with the identifier 1
            head = bytes([8, 0]), bytes([0, 1, *n.to_bytes(2, "big")])
            words = [int.from_bytes((head[0] + head[1] + data)[at : at + 2], "big") for at in range(0, size + 6, 2)]
            total = sum(words)
            while total >> 16:
                total = (total & 0xFFFF) + (total >> 16)
            data = head[0] + (~total & 0xFFFF).to_bytes(2, "big") + head[1] + data
        begin = time.perf_counter_ns()
        if how == "stream":
            peer.sendall(data)
        else:
            peer.send(data)
        peer.recv(65536)
        times.append(time.perf_counter_ns() - begin)
    print(statistics.median(times[warm_up:]))
"""
"""Client and server; arguments: CPU, side, address, how, size, exchanges, warm_up. The client prints the median, ns."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of traffic."""

    name: str
    how: str = "datagram"
    size: int = 64
    member: str = "c1"
    address: str = ""
    """Address of the server; empty: the remote's."""
    family: int = 4
    exchanges: int = EXCHANGES
    before: Callable[[Lab], None] = lambda _: None


def run(lab: Lab, member: str, *commands: str) -> None:
    for command in commands:
        if lab.exec(member, command.split()):
            raise RuntimeError(f"{member}: {command}")


def _cut_in_software(lab: Lab) -> None:
    run(lab, "c1", "ethtool -K eth0 tso off gso off tx-udp-segmentation off")


def _uncut(lab: Lab) -> None:
    run(lab, "c1", "ethtool -K eth0 tso on gso on tx-udp-segmentation on")


def _tunnel(kind: str, number: int) -> Callable[[Lab], None]:
    def made(lab: Lab) -> None:
        for member, here, there in (("host", 1, 2), ("remote", 2, 1)):
            run(
                lab,
                member,
                f"ip link add t{number} {TUNNELS[kind].format(here=here, there=there)}",
                f"ip addr add 192.0.2.{4 * number + here}/30 dev t{number}",
                f"ip link set t{number} up",
            )
        run(lab, "host", f"ping -q -c 2 -i 0.05 192.0.2.{4 * number + 2}")

    return made


KINDS: Final = (
    Kind("echo", "echo", 56),
    Kind("datagram of 64 bytes"),
    Kind("datagram of 1,200 bytes, IPv6", size=1200, family=6),
    Kind("datagram of 4,000 bytes, fragments", size=4000),
    Kind("stream, offloaded", "stream", 65536, exchanges=EXCHANGES // 2),
    Kind("stream, offloaded, IPv6", "stream", 65536, family=6, exchanges=EXCHANGES // 2),
    Kind("stream, cut in software", "stream", 65536, exchanges=EXCHANGES // 2, before=_cut_in_software),
    Kind("64 datagrams cut in software", "segments", 64 * 64, exchanges=EXCHANGES // 2),
    *(
        Kind(f"echo in {kind}", "echo", 56, "host", f"192.0.2.{4 * number + 2}", before=_tunnel(kind, number))
        for number, kind in enumerate(TUNNELS, 1)
    ),
    Kind("stream in vxlan", "stream", 65536, "host", "192.0.2.6", exchanges=EXCHANGES // 2, before=_uncut),
)


def exchange_ns(lab: Lab, kind: Kind) -> float:
    """Return the median time of an exchange, ns."""
    address = kind.address or lab.address("remote", kind.family)
    counts = [address, kind.how, str(kind.size), str(WARM_UP + kind.exchanges), str(WARM_UP)]
    command = [sys.executable, "-I", "-S", "-c", PEER, str(CPU)]
    server = lab.popen("remote", [*command, "server", *counts]) if kind.how != "echo" else None
    try:
        if server is not None and server.stdout is not None and server.stdout.readline() != "ready\n":
            raise RuntimeError(server.communicate()[1])
        client = lab.popen(kind.member, [*command, "client", *counts])
        output, errors = client.communicate()
        if client.returncode:
            raise RuntimeError(errors)
        return float(output)
    finally:
        if server is not None:
            server.kill()
            server.communicate()


def measured() -> dict[str, dict[str, float]]:
    """Return kind -> ns per record that ftrace and the module add, ns by the module's count, records per exchange."""
    observers: dict[str, type[Ftrace | Module | nullcontext[None]]] = {
        "none": nullcontext,
        "ftrace": Ftrace,
        "module": Module,
    }
    found = {}
    with running(Spec(name="kinds")) as lab:
        for family in (4, 6):
            lab.ping("c1", count=2, family=family)
        for kind in KINDS:
            kind.before(lab)
            times = {}
            records = own = 0.0
            by_hook = {}
            for name, observer in observers.items():
                observing: AbstractContextManager[Any] = observer()
                with observing:
                    times[name] = exchange_ns(lab, kind)
                if isinstance(observing, Module):
                    records = observing.records / (WARM_UP + kind.exchanges)
                    own = observing.timed_ns / observing.timed
                    by_hook = observing.by_hook
            found[kind.name] = {
                "ftrace": (times["ftrace"] - times["none"]) / records,
                "module": (times["module"] - times["none"]) / records,
                "own": own,
                "records": records,
            }
            print(kind.name, found[kind.name], by_hook, flush=True)
    return found


def by_kind() -> list[dict[str, Any]]:
    """Target: at most 350 instructions a record, whatever the traffic. In a virtual machine that counts them."""
    found = in_guest("tests.benchmark.kmod_kinds", "kinds.json", KERNEL, counted=True)
    figures = []
    for name, each in found.items():
        figures += [
            figure(f"kmod_kind: {name}", "instructions per record", [each["module"]], "ftrace", each["ftrace"])
            | {"records_per_exchange": round(each["records"], 1), "own_count": round(each["own"])}
        ]
    return figures


if __name__ == "__main__":
    results = Path(os.environ.get("MACE_GUEST_RESULTS", "."))
    (results / "kinds.json").write_text(json.dumps(measured()))
