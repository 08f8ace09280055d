"""Share of packets paired correctly: the correlator, matching by buffer address, and by MACE's original key.

bpftrace records the packets at the hooks of the hook table, with the buffer's address and the packet's bytes. Three
programs get the same records; the true pairs are known by a number in each packet that the programs do not see. The
task is to find, for each record at the container's queue, the record of the same packet at the outer device's queue.

- `address`: matches by the buffer's address, forgotten when the buffer is freed, as perf's netdev-times.py does.
- `original key`: matches by the first eight bytes behind the IP header, as in MACE's prototype (ANRW '19).
- ours: `correlator.engine` with the values that ftrace has (time, hook, device name, length, address). The module's
  content key, which needs a kernel that loads modules, is not used.
"""

import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from collector.machine import devices
from contracts.errors import Unavailable
from contracts.hooks import HOOKS, TRACEPOINTS, Hook, Way
from contracts.records import Batch
from contracts.schema import Direction
from contracts.topology import NO_DEVICE, Sighting, Topology
from correlator.engine import Engine, EngineConfig
from mace.lab import HOST, REMOTE, Lab, Spec, probing, running
from tests.benchmark.figures import folder

ETHERNET = 14
DATAGRAMS = 10_000
PINGS = 2_000
LOCAL_BYTES = 20_000_000
ICMP, TCP, UDP = 1, 6, 17
OURS = "ours"

# bytes: 8 behind the IP header, 8 behind those; IPv4 without options, which the lab sends.
PLACED = r"""
tracepoint:%s {
  $s = (struct sk_buff *)args->skbaddr; $i = $s->head + $s->network_header;
  if (*(uint8 *)$i == 0x45) {
    printf("%d %%llu %%llx %%d %%s %%d %%d %%llx %%llx %%d\n", nsecs, (uint64)args->skbaddr, cpu, str(args->name),
      args->len, *(uint8 *)($i + 9), *(uint64 *)($i + 20), *(uint64 *)($i + 28), *(uint16 *)($i + 4));
  }
}
"""
END = r"""tracepoint:%s { printf("%d %%llu %%llx %%d\n", nsecs, (uint64)args->skbaddr, cpu); }"""


class Seen:
    """The records of bpftrace in order of time; lists of equal length."""

    def __init__(self, text: Path) -> None:
        rows = []
        with text.open() as lines:
            for line in lines:
                words = line.split()
                if not words or not words[0].isdigit() or len(words) not in (4, 10):
                    continue
                hook, ts, skb, cpu, *more = words
                name, length, proto, first, second, ip_id = more or ["", "0", "0", "0", "0", "0"]
                rows.append((int(ts), int(hook), int(skb, 16), int(cpu), name, int(length), int(proto),
                             int(first, 16), int(second, 16), int(ip_id)))  # fmt: skip
        rows.sort()
        (self.ts, self.hook, self.skb, self.cpu, self.name, self.length, self.proto, self.key, self.payload,
         self.ip_id) = map(list, zip(*rows, strict=True))  # fmt: skip

    def truth(self, i: int) -> tuple[int, ...]:
        """Return the number in each packet that identifies it; NAT does not rewrite the number."""
        if self.proto[i] == ICMP:
            return ICMP, self.length[i], self.key[i] >> 48  # its sequence number
        if self.proto[i] == UDP:
            return UDP, self.length[i], self.payload[i]  # the generator's number
        return self.proto[i], self.length[i], self.key[i] >> 32, self.ip_id[i]  # TCP's sequence number

    def at(self, hook: Hook, name: str) -> list[int]:
        return [i for i, (h, n) in enumerate(zip(self.hook, self.name, strict=True)) if h == hook and n == name]


Pairs = list[tuple[int, int]]


def by_address(seen: Seen, outer: str) -> Pairs:
    waiting: dict[int, int] = {}
    pairs = []
    for i, (hook, name, skb) in enumerate(zip(seen.hook, seen.name, seen.skb, strict=True)):
        if hook == Hook.NET_DEV_QUEUE and name == "eth0":
            waiting[skb] = i
        elif hook == Hook.NET_DEV_QUEUE and name == outer and skb in waiting:
            pairs.append((waiting.pop(skb), i))
        elif hook in (Hook.CONSUME_SKB, Hook.KFREE_SKB):
            waiting.pop(skb, None)
    return pairs


def by_original_key(seen: Seen, outer: str) -> Pairs:
    waiting: dict[int, int] = {}
    pairs = []
    for i, (hook, name, key) in enumerate(zip(seen.hook, seen.name, seen.key, strict=True)):
        if hook == Hook.NET_DEV_QUEUE and name == "eth0":
            waiting[key] = i
        elif hook == Hook.NET_DEV_QUEUE and name == outer and key in waiting:
            pairs.append((waiting.pop(key), i))
    return pairs


def by_us(seen: Seen, outer: str, topology: Topology) -> Pairs:
    names = [s.name for s in topology.sightings]
    code = {name: i for i, name in enumerate(names)}
    way = {info.hook: info.way for info in HOOKS}
    batch = Batch.of(
        len(seen.ts),
        ts_ns=seen.ts,
        skb_id=np.array(seen.skb, np.uint64),
        dev=[code.get(name, 0) for name in seen.name],
        l3_len=[n - ETHERNET if way[Hook(h)] is Way.TRANSMIT else n
                for n, h in zip(seen.length, seen.hook, strict=True)],
        cpu=seen.cpu,
        hook=seen.hook,
    )  # fmt: skip
    engine = Engine(0, EngineConfig(crossings=True, rows=False))
    results = [*engine.feed(topology), *engine.feed(batch), engine.finish()]
    queued = {seen.ts[i]: i for name in ("eth0", outer) for i in seen.at(Hook.NET_DEV_QUEUE, name)}
    pairs = []
    for found in results:
        out = found.rows.crossings[found.rows.crossings.direction == Direction.EGRESS]
        pairs += [(queued[a], queued[b]) for a, b in zip(out.inner_utc_ns.tolist(), out.outer_utc_ns.tolist(),
                                                          strict=True)]  # fmt: skip
    return pairs


@contextmanager
def watched(text: Path, lab: Lab) -> Iterator[None]:
    parts = [(PLACED if info.has_device else END) % (info.tracepoint, info.hook) for info in TRACEPOINTS
             if info.way is not Way.DELIVERY and info.hook != Hook.NAPI_GRO_RECEIVE_ENTRY]  # fmt: skip
    program = 'BEGIN { printf("ready\\n"); }\n' + "\n".join(parts)
    env = {**os.environ, "BPFTRACE_PERF_RB_PAGES": "8192"}
    with text.open("w") as out, text.with_suffix(".err").open("w") as err:
        process = subprocess.Popen(["bpftrace", "-B", "line", "-e", program], stdout=out, stderr=err, env=env)
        try:
            limit = time.monotonic() + 60
            while "ready" not in text.read_text():
                if process.poll() is not None or time.monotonic() > limit:
                    raise Unavailable("matching", "bpftrace: " + text.with_suffix(".err").read_text()[-300:])
                time.sleep(0.2)
            yield
            time.sleep(2)
        finally:
            process.terminate()
            process.wait()


def plain(lab: Lab) -> None:
    """One container sends datagrams as fast as it can."""
    lab.udp("c1", count=DATAGRAMS, size=64)


def pings(lab: Lab) -> None:
    """One container pings, each request as soon as the reply before has arrived."""
    lab.ping("c1", count=PINGS, flood=True)


def twins(lab: Lab) -> None:
    """Two containers send echo requests with equal identifiers and numbers (each ping is process 1 of a namespace)."""
    flows = []
    for name, size in (("c1", 64), ("c2", 96)):
        argv = ["unshare", "--pid", "--fork", *probing.command(lab.address(REMOTE), PINGS, 500_000, size)]
        flows.append(lab.popen(name, argv))
    for flow in flows:
        flow.communicate()


def tcp(lab: Lab) -> None:
    """One container makes a bulk transfer: large packets that stay in one buffer."""
    lab.tcp("c1", size=LOCAL_BYTES)


def local(lab: Lab) -> None:
    """A container makes a bulk transfer to its own host, while it and the host send datagrams to the far end."""
    flow = lab.start_tcp("c1", HOST, size=LOCAL_BYTES)
    other = lab.start_udp(HOST, REMOTE, count=DATAGRAMS, size=80)
    lab.udp("c1", count=DATAGRAMS, size=64)
    flow.wait()
    other.wait()


SCENARIOS: dict[str, Callable[[Lab], None]] = {
    "plain": plain,
    "pings": pings,
    "twins": twins,
    "tcp": tcp,
    "local": local,
}


def run() -> list[dict[str, Any]]:
    """Return, for each scenario and peer, the share of packets paired correctly and the number of wrong pairs."""
    figures = []
    with folder() as place, running(Spec(name="matching", containers=2)) as lab:
        for member in (*lab.containers, HOST):
            lab.ping(member, count=2)
        for name, traffic in SCENARIOS.items():
            text = place / f"{name}.txt"
            with watched(text, lab):
                traffic(lab)
            figures += _scores(name, Seen(text), lab)
    return figures


def _scores(name: str, seen: Seen, lab: Lab) -> list[dict[str, Any]]:
    outer = lab.outer_device
    found = devices.snapshot(
        host_netns=str(lab.netns_path(HOST)), outer=(outer,), remote_netns=(lab.netns_path(REMOTE).name,)
    ).devices
    names = dict.fromkeys(n for n in seen.name if n)
    topology = Topology(-(1 << 62), lab.netns_inode(HOST), found, (NO_DEVICE, *map(Sighting, names)))
    methods = {
        OURS: by_us(seen, outer, topology),
        "buffer address alone": by_address(seen, outer),
        "first 8 bytes behind the IP header": by_original_key(seen, outer),
    }
    inner = Counter(seen.truth(i) for i in seen.at(Hook.NET_DEV_QUEUE, "eth0"))
    both = {t for t in map(seen.truth, seen.at(Hook.NET_DEV_QUEUE, outer)) if inner[t] == 1}
    score = {}
    for method, pairs in methods.items():
        right = {seen.truth(a) for a, b in pairs if seen.truth(a) == seen.truth(b)} & both
        score[method] = (len(right) / len(both), sum(seen.truth(a) != seen.truth(b) for a, b in pairs))
    ours, wrong = score.pop(OURS)
    return [
        {
            "name": f"matching_{name}",
            "value": round(ours, 4),
            "unit": "of the packets paired right",
            "wrong": wrong,
            "peer": peer,
            "peer_value": round(share, 4),
            "peer_wrong": peer_wrong,
            "ratio": round(ours / share, 3) if share else None,
            "n": len(both),
            "spread": None,
        }
        for peer, (share, peer_wrong) in score.items()
    ]
