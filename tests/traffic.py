"""Made-up packets on a made-up host, as records with known results.

    c1, c2: eth0 ── veth1, veth2 on br0 ── host ── out0 ── rem0: far end

`eth0` is the name of both containers' devices, and of hardware in another namespace. The caller chooses all times; a
`Tape` collects records in any order and returns them as one batch in order of time.
"""

from __future__ import annotations

import numpy as np

from contracts.hooks import HOOKS, Hook
from contracts.records import Batch, Content, Flag
from contracts.topology import NO_DEVICE, Device, Sighting, Topology, assign_roles

HOST, C1, C2, FAR, ELSEWHERE = 1, 11, 12, 20, 99

DEVICES = (
    Device(HOST, 2, "br0", "bridge", netns_name="host"),
    Device(HOST, 3, "veth1", "veth", C1, 2, 2, netns_name="host"),
    Device(HOST, 4, "veth2", "veth", C2, 2, 2, netns_name="host"),
    Device(HOST, 5, "out0", "veth", FAR, 2, default_route=True, netns_name="host"),
    Device(HOST, 6, "vx0", "vxlan", netns_name="host"),
    Device(C1, 2, "eth0", "veth", HOST, 3, netns_name="c1", container="c1"),
    Device(C2, 2, "eth0", "veth", HOST, 4, netns_name="c2", container="c2"),
    Device(FAR, 2, "rem0", "veth", HOST, 5, netns_name="far", container="far"),
    Device(ELSEWHERE, 2, "eth0", "", netns_name="elsewhere"),
)
NAMES = ("", "eth0", "br0", "veth1", "veth2", "out0", "rem0", "vx0", "gone0")
CODE = {name: code for code, name in enumerate(NAMES)}

Q, X, R, G = Hook.NET_DEV_QUEUE, Hook.NET_DEV_START_XMIT, Hook.NETIF_RECEIVE_SKB, Hook.NAPI_GRO_RECEIVE_ENTRY
r, D, c, k = Hook.NETIF_RX, Hook.SKB_COPY_DATAGRAM_IOVEC, Hook.CONSUME_SKB, Hook.KFREE_SKB
IP = Hook.IP_RCV
LETTERS = {info.letter: info.hook for info in HOOKS}

REQUEST = "Q:eth0 X:eth0 r:veth{n} R:veth{n} R:br0 Q:out0 X:out0 r:rem0 R:rem0 c"
REPLY = "Q:rem0 X:rem0 r:out0 R:out0 Q:br0 X:br0 Q:veth{n} X:veth{n} r:eth0 R:eth0"
ACROSS = "Q:eth0 X:eth0 r:veth1 R:veth1 Q:veth2 X:veth2 r:eth0 R:eth0 c"


def topology(from_ns=-(1 << 62), devices=DEVICES, names=NAMES):
    sightings = (NO_DEVICE, *(Sighting(name) for name in names[1:]))
    return Topology(from_ns, HOST, assign_roles(devices, HOST), sightings)


class Tape:
    """Collects records as (time, arrival, ...) rows."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, ...]] = []

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, ts, hook, name="", skb=1, length=84, cpu=0, reason=0, key=0, flags=0, segs=0, proto=0):
        copied = 0 if hook in (c, k) else length
        content = key, flags, segs, proto
        self.rows.append((ts, len(self.rows), int(hook), CODE[name], skb, copied, cpu, reason, *content))

    def packet(self, path, ts, *, skb=1, step=100, length=84, cpu=0, n=1, reason=0, key=0, flags=0, segs=0, proto=0):
        """Add the records of one packet, `step` ns apart (or at the listed offsets), and return the time of the last.

        `key`, `flags` and `segs` are one value for all records, or a list with a value for each. A packet with a
        `proto` is of IPv6, without identification.
        """
        words = path.format(n=n).split()
        content = [[one] * len(words) if isinstance(one, int) else one for one in (key, flags, segs)]
        for i, word in enumerate(words):
            letter, _, name = word.partition(":")
            at = ts + (i * step if isinstance(step, int) else step[i])
            own = length - 28 if letter == "D" else length
            told = [one[i] for one in content]
            self.add(at, LETTERS[letter], name, skb, own, cpu, reason if letter == "k" else 0, *told, proto)
        return at

    def gap(self, start, end, lost=1, cpu=0):
        self.rows.append((start, -1, int(Hook.LOST), 0, end, lost, cpu, 0, 0, 0, 0, 0))

    def batch(self):
        """Return all records as one batch, with content if a record has some."""
        rows = sorted(self.rows)
        if not rows:
            return Batch.empty()
        ts, _, hook, dev, skb, length, cpu, reason, key, flags, segs, proto = (
            np.array(column) for column in zip(*rows, strict=True)
        )
        content = None
        if key.any() or flags.any():
            told = {"ip_version": np.where(proto, 6, 0), "l4_proto": proto}
            content = Content.of(len(rows), packet_key=key, flags=flags | np.where(key, Flag.KEY, 0), **told)
        columns = {"ts_ns": ts, "hook": hook, "dev": dev, "skb_id": skb, "l3_len": length, "cpu": cpu}
        return Batch.of(len(rows), content, **columns, drop_reason=reason, gso_segs=segs)
