"""Minutes of made windows, second by second, as a live view receives them."""

from dataclasses import replace

import numpy as np

from contracts.ledger import Ledger
from contracts.recent import Recent
from contracts.schema import Segment
from contracts.topology import Role
from contracts.windowtable import WindowTable
from tests.made_results import START_NS, make_delays, make_results, make_windows, topology, with_totals

BEGIN_NS = START_NS // 1_000_000_000 * 1_000_000_000
NS = 1_000_000_000


def owned(delays, containers, devices=None):
    """Return the delays, and a device for each container that crosses it, as the engine lists devices."""
    devices = devices or topology(containers)
    whole = delays.segment == Segment.OVERHEAD
    inner = dict(zip(delays.packet[whole].tolist(), (delays.device[whole] // 2).tolist(), strict=True))
    container = np.array([inner[packet] for packet in delays.packet.tolist()], np.int64)
    shared = np.maximum(delays.device - (2 * containers - 2), delays.device & 1)
    listed = []
    for c in range(containers):
        own = devices[2 * c]
        listed += [
            replace(device, container=own.container, container_id=own.container_id)
            for device in (own, devices[2 * c + 1], *devices[-3:])
        ]
    return replace(delays, device=(5 * container + shared).astype(np.int32)), tuple(listed)


def make_minute(seconds=62, containers=2, packets_per_s=40, devices=None, seed=0):
    """Return rows, devices, and one result for each second."""
    made = make_delays(
        seconds * packets_per_s,
        containers=containers,
        seed=seed,
        start_ns=BEGIN_NS,
        gap_ns=4 * NS // 5 // packets_per_s,
    )
    delays, listed = owned(made, containers, devices)
    found = []
    for second in range(seconds):
        begin = BEGIN_NS + second * NS
        mine = delays[(delays.utc_ns >= begin) & (delays.utc_ns < begin + NS)]
        ledger = Ledger(records=second + 1, matched=second + 1)
        results = make_results(mine, devices=listed, windows=make_windows(mine), ledger=ledger, upto_utc_ns=begin + NS)
        found.append(with_totals(results, settled_utc_ns=begin + NS, present=devices))
    return delays, listed, found


def moment_after(results):
    """Return the moment after these results."""
    recent = Recent()
    for each in results:
        recent.add(each)
    return recent.moment()


def inner_devices(devices):
    """Return the indices of the containers' own devices."""
    return [n for n, device in enumerate(devices) if device.role is Role.INNER]


def windows_of(results):
    """Return all windows of results as one table."""
    return WindowTable.concatenate([each.rows.windows for each in results])
