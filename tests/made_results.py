"""Results with known contents, for tests and benchmarks of the stages after the correlator."""

from dataclasses import replace

import numpy as np

from contracts.clock import ClockPair
from contracts.cpus import STAGES_WIDTH_S
from contracts.histogram import bins_of, quantiles
from contracts.interfaces import StreamHeader
from contracts.ledger import Ledger
from contracts.results import Results, Rows, Totals
from contracts.schema import Delays, Direction, Grades, Segment, Window
from contracts.topology import Device, Role
from contracts.windowtable import WindowTable
from correlator.windows import Windows

START_NS = 1_750_000_000_000_000_000
HEADER = StreamHeader(
    source="synthetic",
    host="testhost",
    run="run-1",
    kernel="6.1.0",
    boot_id="00000000-0000-0000-0000-000000000000",
    cpus=2,
    clock=ClockPair(1_000, START_NS, 50),
    hooks=("net:net_dev_queue", "net:netif_receive_skb"),
    mace_version="0",
    command=("mace", "run"),
)
HOST_NETNS, REMOTE_NETNS = 4026531840, 4026532900


def header(run="run-1", **changes):
    return replace(HEADER, run=run, **changes)


def topology(containers=1):
    """Return a topology: an inner device and its host end per container, a bridge, an outer device and the far end."""
    devices = []
    for n in range(containers):
        netns = 4026532000 + n
        devices += [
            Device(netns, 2, "eth0", "veth", HOST_NETNS, 10 + n, 0, True, f"c{n}", f"c{n}", Role.INNER),
            Device(HOST_NETNS, 10 + n, f"vethc{n}", "veth", netns, 2, 3, False, "host", "", Role.HOST),
        ]
    devices += [
        Device(HOST_NETNS, 3, "br0", "bridge", netns_name="host", role=Role.HOST),
        Device(HOST_NETNS, 4, "out0", "veth", REMOTE_NETNS, 2, 0, True, "host", "", Role.OUTER),
        Device(REMOTE_NETNS, 2, "rem0", "veth", HOST_NETNS, 4, 0, False, "remote", "", Role.REMOTE),
    ]
    return tuple(devices)


def hops(devices, container, direction):
    """Return (device, segment) of a packet in the order of its path, without OVERHEAD."""
    inner, host_end = 2 * container, 2 * container + 1
    bridge, outer, far = len(devices) - 3, len(devices) - 2, len(devices) - 1
    out = [(d, Segment.DEVICE) for d in (inner, host_end, bridge)] + [(outer, Segment.OUTSIDE), (far, Segment.OUTSIDE)]
    if direction == Direction.EGRESS:
        return out
    return [*reversed(out), (inner, Segment.DELIVERY)]


def delays_of(rows, **columns):
    """Return `rows` delays with these columns; all other columns are 0."""
    return Delays(
        **{name: np.asarray(columns.pop(name, np.zeros(rows)), dtype) for name, dtype in Delays._DTYPES.items()},
        **columns,
    )


def make_delays(packets, *, containers=1, seed=0, start_ns=START_NS, first_packet=0, gap_ns=20_000, scale_ns=900.0):
    """Return the delays of `packets` packets, every second one ingress, each with its hops and its OVERHEAD."""
    rng = np.random.default_rng(seed)
    devices = topology(containers)
    begin = start_ns + np.cumsum(rng.integers(gap_ns // 2, gap_ns * 2, packets))
    container = rng.integers(0, containers, packets)
    parts, order = [], []
    for c in range(containers):
        for direction in (Direction.EGRESS, Direction.INGRESS):
            mine = np.flatnonzero((container == c) & (np.arange(packets) % 2 == direction - 1))
            path = hops(devices, c, direction)
            delay = rng.gamma(2.0, scale_ns, (len(mine), len(path))).astype(np.int64)
            whole = np.array([s == Segment.DEVICE for _, s in path])
            overhead = delay[:, whole].sum(1)
            first = int(np.flatnonzero(whole)[0])
            starts = begin[mine][:, None] + np.cumsum(delay, 1) - delay
            rows = len(path) + 1

            parts.append(
                delays_of(
                    rows * len(mine),
                    utc_ns=np.c_[starts, starts[:, first]].ravel(),
                    packet=np.repeat((mine + first_packet + 1).astype("<u8") << np.uint64(20), rows),
                    device=np.tile([*(d for d, _ in path), 2 * c], len(mine)),
                    direction=np.full(rows * len(mine), direction),
                    segment=np.tile([*(s for _, s in path), Segment.OVERHEAD], len(mine)),
                    position=np.tile([*range(len(path)), 255], len(mine)),
                    delay_ns=np.c_[delay, overhead].ravel(),
                    l3_len=np.repeat(rng.choice(np.array([84, 46, 1500], "<u4"), len(mine)), rows),
                    grade=np.ones(rows * len(mine)),
                    outcome=np.ones(rows * len(mine)),
                )
            )
            order.append(np.repeat(mine, rows))
    delays = Delays.concatenate(parts)
    return delays[np.argsort(np.concatenate(order), kind="stable")]


def make_windows(delays, width_s=1):
    """Return the windows of these rows, computed in a simple loop."""
    width_ns = width_s * 1_000_000_000
    groups = {}
    starts = delays.utc_ns // width_ns * width_ns
    for key in zip(starts, delays.device, delays.direction, delays.segment, delays.delay_ns, strict=True):
        *rest, delay = map(int, key)
        groups.setdefault(tuple(rest), []).append(delay)
    windows = []
    for (start, device, direction, segment), values in sorted(groups.items()):
        bins, counts = np.unique(bins_of(np.array(values)), return_counts=True)
        p50, p90, p99, p999 = (int(v) for v in quantiles(bins, counts).clip(min(values), max(values)))
        windows.append(
            Window(
                start,
                width_s,
                device,
                Direction(direction),
                Segment(segment),
                len(values),
                sum(values),
                min(values),
                max(values),
                p50,
                p90,
                p99,
                p999,
                bins,
                counts,
            )
        )
    return tuple(windows)


def make_stages(rows, start_ns=START_NS):
    """Return counts and places of rows (place, direction, measure, durations), all in one interval."""
    windows, places = Windows(), tuple(dict.fromkeys(place for place, *_ in rows))
    for place, direction, measure, durations in rows:
        count, ns = len(durations), np.array(durations, np.int64)
        columns = (np.full(count, value) for value in (start_ns, places.index(place), direction, measure))
        windows.add(*columns, ns)
    table = windows.close(None)
    return table[table.column("width_s") == STAGES_WIDTH_S], places


def make_results(delays, *, devices=None, containers=1, windows=(), ledger=None, packets=None, upto_utc_ns=None):
    """Return results with the given rows, and with a ledger that balances if none is given."""
    records = 2 * len(delays)
    packets = len(np.unique(delays.packet)) if packets is None else packets
    return Results(
        Rows(delays, WindowTable.of(tuple(windows)), devices or topology(containers)),
        Totals(
            upto_utc_ns=upto_utc_ns or (int(delays.utc_ns.max()) + 1 if len(delays) else START_NS),
            ledger=ledger or Ledger(records=records, matched=records),
            packets=packets,
            grades=Grades(buffer=packets),
        ),
    )


def with_rows(results, **changes):
    """Return the results with some fields of their rows replaced."""
    return replace(results, rows=replace(results.rows, **changes))


def with_totals(results, **changes):
    """Return the results with some fields of their totals replaced."""
    return replace(results, totals=replace(results.totals, **changes))
