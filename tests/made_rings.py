"""A made-up module with the interface of `MaceDevice`: rings in Python's memory, filled as kmod/mace_ring.c does."""

import numpy as np

from collector.kmod.device import Hello, Stats, TakenSubBuffers
from contracts import abi
from contracts.errors import SourceError
from contracts.hooks import HOOKS, Hook
from contracts.schema import HookCost


class MadeRing:
    """The module's half of one ring."""

    def __init__(self, cpu=0, subbuf_bytes=4096, subbufs=4):
        self.cpu, self.subbuf_bytes, self.subbufs = cpu, subbuf_bytes, subbufs
        self.capacity = (subbuf_bytes - abi.SUBBUF.itemsize) // abi.RECORD.itemsize
        self.memory = bytearray(subbuf_bytes * subbufs)
        self.head = self.tail = self.handed = self.fill = 0
        self.filling = False
        self.pending = self.pending_from_ns = 0
        self.written = np.zeros(abi.HOOK_SLOTS, np.int64)
        self.lost = np.zeros(abi.HOOK_SLOTS, np.int64)
        self.now_ns = 0

    def subbuf(self, number):
        """Return head and records of a sub-buffer."""
        at = number % self.subbufs * self.subbuf_bytes
        head = np.ndarray((), abi.SUBBUF, self.memory, at)
        return head, np.ndarray((self.capacity,), abi.RECORD, self.memory, at + abi.SUBBUF.itemsize)

    def write(self, record):
        """Write one record (a 0-dimensional array); return False and count it as lost if the ring is full."""
        hook = int(record["hook"])
        if not self.filling:
            if self.head - self.tail == self.subbufs:
                self.lost[hook] += 1
                if not self.pending:
                    self.pending_from_ns = int(record["ts_ns"])
                self.pending += 1
                return False
            head, _ = self.subbuf(self.head)
            head[...] = (self.head, self.pending, self.pending_from_ns, 0, self.cpu, 0)
            self.pending = self.pending_from_ns = self.fill = 0
            self.filling = True
        head, records = self.subbuf(self.head)
        records[self.fill] = record
        self.written[hook] += 1
        self.fill += 1
        if self.fill == self.capacity:
            self.close()
        return True

    def close(self):
        head, _ = self.subbuf(self.head)
        head["records"] = self.fill
        self.filling = False
        self.head += 1

    def take(self, *, release=0, flush=False):
        if release > self.handed - self.tail:
            raise SourceError("TAKE: Invalid argument")
        # Released records may be overwritten at once: a view of them then shows nonsense.
        for number in range(self.tail, self.tail + release):
            at = number % self.subbufs * self.subbuf_bytes
            self.memory[at : at + self.subbuf_bytes] = b"\xee" * self.subbuf_bytes
        self.tail += release
        if flush and self.filling:
            self.close()
        self.handed = self.head
        return TakenSubBuffers(self.tail % self.subbufs, self.handed - self.tail, self.now_ns)


def record(ts_ns, hook=Hook.NETIF_RX, netns=4026531840, ifindex=2, **more):
    """Return a record as a 0-dimensional array."""
    made = np.zeros((), abi.RECORD)
    for name, value in {"ts_ns": ts_ns, "hook": hook, "netns": netns, "ifindex": ifindex, **more}.items():
        made[name] = value
    return made


class MadeDevice:
    """The calls of `MaceDevice` that `KmodSource` uses."""

    def __init__(self, cpus=2, subbuf_bytes=4096, sees_all=True):
        self.hello = Hello(
            abi=(abi.ABI_MAJOR, abi.ABI_MINOR),
            version="made",
            hooks=tuple(info.hook for info in HOOKS),
            sees_all=sees_all,
            netns_gone=False,
            cookies=False,
            netns=4026531840,
            cpus=cpus + 1,
            ring_bytes_min=8192,
            ring_bytes_max=1 << 30,
            load_id=7,
        )
        self.cpus = tuple(range(cpus))
        self.subbuf_bytes = subbuf_bytes
        self.rings = {}
        self.lost_elsewhere = 0
        self.calls = 0
        self.log = []
        self.now_ns = 0

    def write(self, cpu, *args, **more):
        """Write a record on a CPU, and return whether there was room for it."""
        return self.rings[cpu].write(record(*args, cpu=cpu, **more))

    def setup(self, *, subbuf_bytes, subbufs, watermark, flush_ms, wanted, cookies):
        self.wanted, self.cookies = wanted, cookies
        self.rings = {cpu: MadeRing(cpu, self.subbuf_bytes, subbufs) for cpu in self.cpus}
        self.log.append("setup")
        return self.cpus

    def has_ring(self, cpu):
        return cpu in self.rings

    def comes_online(self, cpu):
        """Bring a CPU online; like the module, this makes its ring before its first packet."""
        self.rings[cpu] = MadeRing(cpu, self.subbuf_bytes, self.rings[0].subbufs)

    def map(self, cpu):
        return self.rings[cpu].memory

    def record_at(self, places):
        self.places = places

    def start(self):
        self.log.append("start")

    def stop(self):
        self.log.append("stop")

    def take(self, cpu, *, release=0, flush=False):
        self.rings[cpu].now_ns = self.now_ns
        return self.rings[cpu].take(release=release, flush=flush)

    def stats(self, cpu=None):
        chosen = self.rings.values() if cpu is None else [self.rings[cpu]]
        written = sum((ring.written for ring in chosen), np.zeros(abi.HOOK_SLOTS, np.int64))
        lost = sum((ring.lost for ring in chosen), np.zeros(abi.HOOK_SLOTS, np.int64))
        if cpu is None:
            lost[Hook.NETIF_RX] += self.lost_elsewhere
        return Stats(written, lost)

    def cost(self):
        self.calls += 100
        return (HookCost(Hook.NETIF_RX, self.calls, self.calls // 4, self.calls * 10),)

    def greet(self):
        return self.hello

    def fileno(self):
        return -1

    def close(self):
        self.log.append("close")
