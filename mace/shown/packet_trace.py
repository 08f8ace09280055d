"""A Perfetto trace of one stored packet and its neighbours in time, made from the rows of a store."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa

from contracts.errors import UsageError
from contracts.schema import Delays, Direction, Grade, Outcome, Segment
from contracts.topology import Device, Role
from storage.perfetto.file import PerfettoTrace
from storage.perfetto.sink import HopFacts, HostTracks
from storage.query import Filter, PacketPath, StoreReader

AROUND_NS: Final = 10_000_000
"""Neighbours are the packets that begin at most so long before or after the packet: some pings, or 1,000 packets of a
flood."""
MOST_ROWS: Final = 50_000
"""Rows of a trace, the nearest in time: 5 MB, which the Perfetto UI opens at once."""
_PLACE: Final = ("device_id", "device", "kind", "netns", "container", "role", "rank")


def write(store: StoreReader, packet: PacketPath, file: Path) -> int:
    """Write the trace of a packet and its neighbours on its host; returns the number of packets.

    Raises `UsageError` if the packet's rows are gone, and `StoreError`.
    """
    rows = store.delays(Filter(packet.utc_ns - AROUND_NS, packet.utc_ns + AROUND_NS, run=packet.run, host=packet.host))
    rows = _nearest(rows, packet.utc_ns)
    if not len(rows):
        raise UsageError(f"the store has no more rows around packet {packet.packet}")
    devices, ranks, of = _devices(rows)
    delays = _delays(rows, of)
    trace = PerfettoTrace(file, overwrite=True)
    try:
        tracks = HostTracks(trace, store.header(packet.host, packet.run))
        tracks.devices(devices, ranks)
        none = np.zeros(len(delays), np.int64)
        facts = HopFacts(delays.packet, none.astype(np.uint64), none, delays.drop_reason.astype(np.int64))
        tracks.hops(delays, facts)
        tracks.finish()
        trace.close()
    finally:
        trace.abort()
    return len(np.unique(delays.packet))


def _nearest(rows: pa.Table, utc_ns: int) -> pa.Table:
    time_ns = rows["time"].cast(pa.int64()).to_numpy()
    if len(rows) > MOST_ROWS:
        rows = rows.take(np.sort(np.argsort(np.abs(time_ns - utc_ns), kind="stable")[:MOST_ROWS]))
        time_ns = rows["time"].cast(pa.int64()).to_numpy()
    # At equal times in path order.
    return rows.take(np.lexsort((rows["position"].to_numpy(), time_ns)))


def _texts(rows: pa.Table, name: str) -> list[Any]:
    found: list[Any] = rows[name].cast(pa.string()).to_pylist()
    return found


def _devices(rows: pa.Table) -> tuple[list[Device], list[int], list[int]]:
    """Return the devices of the rows, their ranks, and each row's index of its device."""
    columns = [_texts(rows, name) if name != "rank" else rows[name].to_pylist() for name in _PLACE]
    index: dict[tuple[Any, ...], int] = {}
    of = [index.setdefault(place, len(index)) for place in zip(*columns, strict=True)]
    devices, ranks = [], []
    for device_id, name, kind, netns, container, role, rank in index:
        inode, _, ifindex = device_id.partition(":")
        devices.append(
            Device(
                int(inode),
                int(ifindex),
                name,
                kind,
                netns_name=netns,
                container=container if role == Role.INNER else "",
                role=Role(role),
            )
        )
        ranks.append(int(rank))
    return devices, ranks, of


def _delays(rows: pa.Table, of: list[int]) -> Delays:
    def numbers(name: str, kind: type[Direction | Segment | Grade | Outcome]) -> Any:
        return np.array([kind[text.upper()] for text in _texts(rows, name)], np.uint8)

    return Delays(
        utc_ns=rows["time"].cast(pa.int64()).to_numpy(),
        packet=rows["packet"].to_numpy().astype("<u8"),
        device=np.array(of, np.int32),
        direction=numbers("direction", Direction),
        segment=numbers("segment", Segment),
        position=rows["position"].to_numpy().astype("u1"),
        delay_ns=rows["delay_ns"].to_numpy().astype(np.int64),
        l3_len=rows["l3_len"].to_numpy().astype("<u4"),
        grade=numbers("grade", Grade),
        outcome=numbers("outcome", Outcome),
        drop_reason=rows["drop_reason"].to_numpy().astype("<u2"),
        waited=np.array([bool(each) for each in rows["waited"].to_pylist()]),
    )
