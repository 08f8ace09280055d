"""A made-up tool that sends requests through a made-up container: its samples, its packets, and the true pairs."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from contracts.schema import NOT_TOLD, Crossings, Direction, Grade
from correlator.samples import Samples

START = 1_760_000_000_000_000_000
LENGTH = 84


@dataclass
class Path:
    """The packets that pass the container's devices; they are numbered in the order in which they are added."""

    rows: list[tuple[int, ...]] = field(default_factory=list)

    def egress(self, queued, *, length=LENGTH, overhead=10_000, content=(NOT_TOLD,) * 3):
        """Add a packet queued at the inner device at a time; return (number, time when it left the outer device)."""
        proto, ident, seq = content
        edges = queued + 1_000, queued + overhead + 2_000
        times = (queued, queued + overhead, edges[0], edges[1], edges[1])
        self.rows.append((Direction.EGRESS, *times, length, proto, ident, seq))
        return len(self.rows), edges[1]

    def ingress(self, arrived, *, length=LENGTH, overhead=8_000, wait=700, content=(NOT_TOLD,) * 3):
        """Add a packet with a kernel timestamp at the inner device; return (number, its `netif_receive_skb` there)."""
        proto, ident, seq = content
        inner = arrived + wait
        outer = arrived - overhead + 500
        times = (inner, outer, arrived, outer - 400, outer - 500)
        self.rows.append((Direction.INGRESS, *times, length, proto, ident, seq))
        return len(self.rows), inner

    def crossings(self) -> Crossings:
        columns = np.array(self.rows, np.int64).reshape(-1, 10).T
        count = len(self.rows)
        direction, inner, outer, inner_stamp, outer_stamp, outer_edge, length, proto, ident, seq = columns
        found = Crossings(
            packet=np.arange(1, count + 1, dtype=np.uint64),
            device=np.zeros(count, np.int32),
            direction=direction.astype(np.uint8),
            inner_utc_ns=inner,
            outer_utc_ns=outer,
            inner_stamp_utc_ns=inner_stamp,
            outer_stamp_utc_ns=outer_stamp,
            outer_edge_utc_ns=outer_edge,
            l3_len=length.astype(np.uint32),
            grade=np.full(count, Grade.BUFFER, np.uint8),
            l4_proto=proto.astype(np.int16),
            l4_src=ident.astype(np.int32),
            l4_dst=seq.astype(np.int32),
            l4_seq=np.full(count, NOT_TOLD, np.int64),
        )
        # In an order without meaning.
        return found[np.random.default_rng(1).permutation(count)]


@dataclass
class ToolRun:
    """Result of a tool's run: samples, crossings and true pairs."""

    samples: Samples
    path: Path
    truth: list[tuple[int, int] | None]
    """For each sample the numbers of its packets; None for a sample without a reply."""
    gaps: list[tuple[int, int]] = field(default_factory=list)

    @property
    def crossings(self) -> Crossings:
        return self.path.crossings()


def ping_run(
    rng,
    count,
    *,
    pace_ns,
    rtt_ns=100_000,
    jitter_ns=20_000,
    loss=0.0,
    duplicates=0.0,
    first_seq=1,
    strangers=0,
    content=False,
    stamped=True,
    ident_told=False,
    held_up=-1,
):
    """Simulate iputils ping -D: microseconds, lines with the time of printing, `strangers` other exchanges.

    The request of sample `held_up` is queued 4 ms after its timestamp.
    """
    path = Path()
    lines = []
    sent = START
    for number in range(count):
        seq = (first_seq + number) % 65536
        own = (1, 77, seq) if content else (NOT_TOLD,) * 3
        queued = sent + int(rng.integers(1_000, 60_000)) + (4_000_000 if number == held_up else 0)
        name, left = path.egress(queued, overhead=int(rng.integers(5_000, 40_000)), content=own)
        if rng.random() >= loss:
            for copy in range(1 + (rng.random() < duplicates)):
                overhead = int(rng.integers(4_000, 30_000))
                arrived = left + rtt_ns + int(rng.integers(0, jitter_ns + 1)) + overhead + copy * 40_000
                reply, _ = path.ingress(arrived, overhead=overhead, wait=int(rng.integers(200, 3_000)), content=own)
                lines.append((arrived, sent, first_seq + number, copy, name, reply))
        else:
            lines.append((sent + 1_000_000, sent, first_seq + number, -1, name, 0))
        # One process sends the next request when the call that sent this one has returned.
        sent = max(sent + int(pace_ns * rng.uniform(0.9, 1.1)), queued + 500)
    for _ in range(strangers):
        queued = int(rng.integers(START, sent + 1))
        other = (1, 78, int(rng.integers(0, 65536))) if content else (NOT_TOLD,) * 3
        _, left = path.egress(queued, content=other)
        path.ingress(left + rtt_ns + int(rng.integers(0, jitter_ns + 1)) + 8_000, content=other)

    lines.sort()
    columns: dict[str, list[int]] = {name: [] for name in ("stamp_utc_ns", "seq", "rtt_ns", "duplicate", "l4_seq")}
    truth: list[tuple[int, int] | None] = []
    printed, told = START, set()
    for arrived, begun, number, copy, name, reply in lines:
        printed = max(printed, arrived) + int(rng.integers(5_000, 80_000))
        answered = copy >= 0
        columns["stamp_utc_ns"].append(printed // 1000 * 1000 if stamped and answered else NOT_TOLD)
        columns["seq"].append(number)
        columns["rtt_ns"].append((arrived // 1000 - begun // 1000) * 1000 if answered else NOT_TOLD)
        columns["duplicate"].append(answered and number in told)
        columns["l4_seq"].append(number % 65536)
        told.add(number)
        truth.append((name, reply) if answered else None)
    samples = Samples.of(
        len(lines),
        **columns,
        resolution_ns=1_000,
        request_len=LENGTH,
        reply_len=LENGTH,
        l4_proto=1,
        l4_id=77 if ident_told else NOT_TOLD,
    )
    return ToolRun(samples, path, truth)
