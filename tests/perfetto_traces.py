"""Perfetto traces of known records, made with Perfetto's own protos in all forms that traced writes."""

import zlib
from collections import defaultdict

import numpy as np
import zstandard
from google.protobuf import descriptor_pb2
from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as protos

from contracts.hooks import Hook

BOOT_AHEAD_NS = 5_000_000_000
"""Boot clock minus monotonic clock in these traces: five seconds of suspend."""
UTC_NS = 1_750_000_000_000_000_000
SEQUENCE = 7
TYPED = {
    Hook.NETIF_RECEIVE_SKB: "netif_receive_skb",
    Hook.NAPI_GRO_RECEIVE_ENTRY: "napi_gro_receive_entry",
    Hook.KFREE_SKB: "kfree_skb",
}
# Fields as the kernel's formats have them: (name, whether traced leaves its address alone).
FIELDS = {
    Hook.NET_DEV_QUEUE: ("skbaddr", "len", "name"),
    Hook.NET_DEV_START_XMIT: (
        *("name", "queue_mapping", "skbaddr", "vlan_tagged", "vlan_proto", "vlan_tci", "protocol", "ip_summed", "len"),
        *("data_len", "network_offset", "transport_offset_valid", "transport_offset", "tx_flags", "gso_size"),
        *("gso_segs", "gso_type"),
    ),
    Hook.NETIF_RX: ("skbaddr", "len", "name"),
    Hook.SKB_COPY_DATAGRAM_IOVEC: ("skbaddr", "len"),
    Hook.CONSUME_SKB: ("skbaddr", "location"),
}
NAMES = {
    Hook.NET_DEV_QUEUE: "net_dev_queue",
    Hook.NET_DEV_START_XMIT: "net_dev_start_xmit",
    Hook.NETIF_RX: "netif_rx",
    Hook.SKB_COPY_DATAGRAM_IOVEC: "skb_copy_datagram_iovec",
    Hook.CONSUME_SKB: "consume_skb",
}
KEEPS_ADDRESS = (Hook.NET_DEV_START_XMIT, Hook.SKB_COPY_DATAGRAM_IOVEC)
DESCRIBED = {hook: 65536 + i for i, hook in enumerate(NAMES)}


def make(
    batch,
    sightings,
    *,
    form="generic",
    numbers=False,
    xmit_done=False,
    per_bundle=100,
    lost=(),
    stats=(),
    sequence=SEQUENCE,
    clock=0,
    snapshots=True,
    compress=None,
):
    """Return a trace (bytes) of a batch. `sightings`: device names by code.

    `form`: `generic` events name their fields, `described` events have descriptors. With `numbers`, buffer addresses
    are replaced by numbers of the bundle where traced does so. `xmit_done` adds net_dev_xmit after each
    net_dev_start_xmit. `lost`: indices of bundles with lost events before them. `stats`: (cpu, overrun).
    """
    packets = []
    if snapshots:
        packets += [snapshot(int(batch.ts_ns[0]) - 1_000_000), snapshot(int(batch.ts_ns[-1]) + 1_000_000)]
    packets.append(named("system_info", lambda info: setattr(info.utsname, "release", "6.1.0-test")))
    packets += bundles(
        batch,
        sightings,
        form,
        numbers=numbers,
        xmit_done=xmit_done,
        size=per_bundle,
        lost=lost,
        sequence=sequence,
        clock=clock,
    )
    packets += [process_tree(), *stats_packets(stats)]
    return joined(packets, compress)


def joined(packets, compress=None):
    """Join packets to a file; with compression, three packets per compressed packet."""
    if compress is None:
        return b"".join(protos.Trace(packet=[packet]).SerializeToString() for packet in packets)
    found = b""
    for start in range(0, len(packets), 3):
        inner = protos.Trace(packet=packets[start : start + 3]).SerializeToString()
        outer = protos.TracePacket()
        if compress == "deflate":
            outer.compressed_packets = zlib.compress(inner)
        else:
            outer.zstd_compressed_packets = zstandard.compress(inner)
        found += protos.Trace(packet=[outer]).SerializeToString()
    return found


def named(field, fill):
    packet = protos.TracePacket(trusted_packet_sequence_id=1)
    fill(getattr(packet, field))
    return packet


def snapshot(monotonic_ns, boot_ahead_ns=BOOT_AHEAD_NS, jitter_ns=0):
    """Return traced's snapshot of its clocks at `monotonic_ns`; UTC is `UTC_NS` at monotonic time 0."""
    packet = protos.TracePacket(trusted_packet_sequence_id=1)
    times = {1: UTC_NS + monotonic_ns, 3: monotonic_ns + jitter_ns, 6: monotonic_ns + boot_ahead_ns}
    for clock, time in times.items():
        packet.clock_snapshot.clocks.add(clock_id=clock, timestamp=time)
    return packet


def process_tree():
    packet = protos.TracePacket(trusted_packet_sequence_id=3)
    packet.process_tree.processes.add(pid=40, ppid=1, cmdline=["ping", "-q", "203.0.113.2"])
    packet.process_tree.threads.add(tid=41, tgid=40, name="ping-thread")
    return packet


def stats_packets(stats):
    for phase in (1, 2) if stats else ():
        packet = protos.TracePacket(trusted_packet_sequence_id=SEQUENCE)
        packet.ftrace_stats.phase = phase
        for cpu, overrun in stats:
            packet.ftrace_stats.cpu_stats.add(cpu=cpu, overrun=1000 + (overrun if phase == 2 else 0))
        yield packet


def bundles(
    batch, sightings, form="generic", *, numbers=False, xmit_done=False, size=100, lost=(), sequence=7, clock=0
):
    """Return the packets of ftrace events, in the order in which traced drains the CPUs."""
    columns = {name: column.tolist() for name, column in batch.columns()}
    drains = defaultdict(list)
    for i in range(len(batch)):
        drains[i // size, columns["cpu"][i]].append(i)
    found = []
    for number, ((_, cpu), rows) in enumerate(sorted(drains.items())):
        packet = protos.TracePacket(trusted_packet_sequence_id=sequence)
        bundle = packet.ftrace_events
        bundle.cpu = cpu
        if number in lost:
            bundle.lost_events = True
        bundle.ftrace_clock = clock
        known = {}
        if form == "described":
            _describe(bundle)
        for i in rows:
            one = {name: column[i] for name, column in columns.items()}
            one["name"] = sightings[one["dev"]]
            one["address"] = one["skb_id"] | 0xFFFF_8880_0000_0000
            one["number"] = known.setdefault(one["address"], len(known) + 1) if numbers else one["address"]
            _event(bundle, one, form)
            if xmit_done and one["hook"] == Hook.NET_DEV_START_XMIT:
                event = bundle.event.add(timestamp=one["ts_ns"] + 1 + (BOOT_AHEAD_NS if clock == 0 else 0), pid=41)
                event.net_dev_xmit.len = one["l3_len"] + 14
                event.net_dev_xmit.name = one["name"]
                event.net_dev_xmit.rc = 0
                event.net_dev_xmit.skbaddr = one["number"]
        found.append(packet)
    return found


def _event(bundle, one, form):
    hook = Hook(one["hook"])
    ahead = BOOT_AHEAD_NS if bundle.ftrace_clock == 0 else 0
    event = bundle.event.add(timestamp=one["ts_ns"] + ahead, pid=41)
    sent = hook in (Hook.NET_DEV_QUEUE, Hook.NET_DEV_START_XMIT)
    address = one["address"] if hook in KEEPS_ADDRESS else one["number"]
    length = one["l3_len"] + (14 if sent else 0)
    if hook in TYPED:
        told = getattr(event, TYPED[hook])
        told.skbaddr = address
        if hook is not Hook.KFREE_SKB:
            told.len, told.name = length, one["name"]
        return
    values = {"skbaddr": address, "len": length, "name": one["name"], "network_offset": 14, "gso_segs": one["gso_segs"]}
    if form == "generic":
        event.generic.event_name = NAMES[hook]
        for name in FIELDS[hook]:
            value = values.get(name, 0)
            if isinstance(value, str):
                event.generic.field.add(name=name, str_value=value)
            else:
                event.generic.field.add(name=name, uint_value=value)
        return
    payload = b"".join(_field(number, values.get(name, 0)) for number, name in enumerate(FIELDS[hook], 1))
    event.MergeFromString(_field(DESCRIBED[hook], payload))


def _describe(bundle):
    for hook, number in DESCRIBED.items():
        described = descriptor_pb2.DescriptorProto(name=NAMES[hook])
        for place, name in enumerate(FIELDS[hook], 1):
            kind = 9 if name == "name" else 4
            described.field.add(name=name, number=place, type=kind)
        bundle.generic_event_descriptors.add(
            field_id=number, group_name="net", event_descriptor=described.SerializeToString()
        )


def _field(number, value):
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    raw = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(raw)) + raw


def _varint(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def names(topology):
    """Return device names by code."""
    return np.array([sighting.name for sighting in topology.sightings], object)
