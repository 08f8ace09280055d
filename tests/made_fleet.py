"""Captures of many hosts with known delays, computed from the made-up times.

Each host has two containers on a bridge, as in `tests.traffic`. A request leaves a container, and a reply arrives and
is read or not. Some requests are dropped at the bridge. Some records are lost while no packet is under way.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from contracts.clock import ClockPair
from contracts.hooks import Hook
from contracts.records import Batch
from contracts.topology import assign_roles
from tests.made_capture import HEADER, capture_bytes
from tests.traffic import CODE, DEVICES, HOST, LETTERS, REPLY, REQUEST, topology

HOSTS = 100
PACKETS = 120
"""Packets of each container of a host."""
START_NS = 50_000_000_000
EVERY_NS = 20_000_000
READ = REPLY + " D c"
DROPPED = "Q:eth0 X:eth0 r:veth{n} R:veth{n} R:br0 k"
PATHS = (REQUEST, REPLY, READ, DROPPED)

# First and last record of each stay at a device along the path, and the segment that the stay counts as.
TRUTH = {
    REQUEST: (
        ("eth0", "device", 0, 2),
        ("veth{n}", "device", 2, 4),
        ("br0", "device", 4, 5),
        ("out0", "outside", 5, 7),
        ("rem0", "outside", 7, 8),
        ("eth0", "overhead", 0, 5),
    ),
    REPLY: (
        ("rem0", "outside", 0, 2),
        ("out0", "device", 3, 4),
        ("br0", "device", 4, 6),
        ("veth{n}", "device", 6, 8),
        ("eth0", "device", 8, 9),
        ("eth0", "overhead", 3, 9),
    ),
    DROPPED: (("eth0", "device", 0, 2), ("veth{n}", "device", 2, 4)),
}
TRUTH[READ] = (*TRUTH[REPLY], ("eth0", "delivery", 9, 10))


@dataclass
class Fleet:
    """The delays and counts that a correlator has to find."""

    delays: dict
    """(host, container, device, direction, segment) -> list of delays, ns."""
    ledgers: dict
    """host -> (records, matched, dropped, lost)."""


def make_fleet(folder, hosts=HOSTS, packets=PACKETS):
    """Write `hosts` captures, and return their paths and the expected results."""
    fleet = Fleet({}, {})
    paths = []
    for number in range(hosts):
        path = folder / f"host-{number:03d}.mace"
        path.write_bytes(_capture(number, packets, fleet))
        paths.append(path)
    return paths, fleet


def _capture(number, packets, fleet):
    host = f"host-{number:03d}"
    rng = np.random.default_rng(number)
    header = replace(
        HEADER,
        host=host,
        run=f"run-{number}",
        clock=ClockPair(START_NS, 1_760_000_000_000_000_000 + number * 1_000_000, 20),
    )
    devices = assign_roles(
        [replace(d, container=f"{host}-{d.container}" if d.container else "") for d in DEVICES[:-1]], HOST
    )
    rows = []
    dropped = 0
    for i in range(packets):
        for n in (1, 2):
            path = PATHS[rng.integers(len(PATHS))]
            words = path.format(n=n).split()
            begin = START_NS + (2 * i + n) * EVERY_NS // 2 + int(rng.integers(0, 1_000_000))
            times = begin + np.cumsum(rng.integers(50, 20_000, len(words)))
            skb = 1 + 2 * i + n
            for t, word in zip(times.tolist(), words, strict=True):
                letter, _, name = word.partition(":")
                hook = LETTERS[letter]
                length = {Hook.CONSUME_SKB: 0, Hook.KFREE_SKB: 0, Hook.SKB_COPY_DATAGRAM_IOVEC: 56}.get(hook, 84)
                rows.append((t, int(hook), CODE[name], skb, length))
            for device, segment, first, last in TRUTH[path]:
                key = (
                    host,
                    f"{host}-c{n}",
                    device.format(n=n),
                    "egress" if path in (REQUEST, DROPPED) else "ingress",
                    segment,
                )
                fleet.delays.setdefault(key, []).append(int(times[last] - times[first]))
            dropped += len(words) if path is DROPPED else 0
    matched = len(rows) - dropped
    lost = int(rng.integers(0, 50))
    # After all packets, when none is under way.
    end = START_NS + (packets + 5) * EVERY_NS
    rows.append((end, int(Hook.LOST), 0, end + 1_000, lost))
    rows.sort(key=lambda row: row[0])
    columns = np.array(rows, "i8").T
    batch = Batch.of(len(rows), **dict(zip(("ts_ns", "hook", "dev", "skb_id", "l3_len"), columns, strict=True)))
    fleet.ledgers[host] = (len(rows) - 1, matched, dropped, lost)
    return capture_bytes([topology(START_NS, devices), batch], header)
