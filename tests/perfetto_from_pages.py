"""Converts the raw ftrace events of a trace.dat to the Perfetto trace that traced would have written.

Each event has all fields of the kernel's format, on ftrace's boot clock, CPU by CPU as traced drains the rings. An
event with a message of its own in Perfetto uses it; any other event names its fields. With `numbers`, addresses are
replaced by numbers of their packet of events where traced does so: in messages of their own, and in fields declared as
`void *`.
"""

import numpy as np
from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as protos

from collector.tracecmd.reader import TraceDat
from tests.perfetto_traces import BOOT_AHEAD_NS, joined, named

DRAINED_NS = 100_000_000
"""Interval at which traced drains a ring, about 100 ms."""
_TYPED = {field.name: field.message_type for field in protos.FtraceEvent.DESCRIPTOR.fields if field.message_type}


def perfetto_from_pages(path, utc_offset_ns, *, numbers=False):
    """Return the trace as bytes. `utc_offset_ns`: UTC minus CLOCK_MONOTONIC, for the clock snapshots."""
    with TraceDat(path) as trace:
        assert trace.clock == "mono"
        events = [event for name in trace.events for event in _events(trace, name)]
        kernel = trace.kernel
    events.sort(key=lambda event: event[0])
    first, last = events[0][0], events[-1][0]
    packets = [_snapshot(first - 1_000_000, utc_offset_ns), _snapshot(last + 1_000_000, utc_offset_ns)]
    packets.append(named("system_info", lambda info: setattr(info.utsname, "release", kernel)))
    drains = {}
    for event in events:
        drains.setdefault(((event[0] - first) // DRAINED_NS, event[1]), []).append(event)
    packets += [_bundle(cpu, drains[drain, cpu], numbers=numbers) for drain, cpu in sorted(drains)]
    return joined(packets, "deflate")


def _events(trace, name):
    """Return (time, CPU, short name, {field: value}, fields that traced replaces) of each event of a name."""
    columns = trace.read(name)
    fields = trace.format(name).fields
    pointers = {field: form.type for field, form in fields.items() if form.type.endswith("*")}
    hidden = {field for field, kind in pointers.items() if kind == "void *" or name.split(":")[1] in _TYPED}
    times, cpus = columns.pop("ts_ns").tolist(), columns.pop("cpu").tolist()
    rows = zip(*(np.asarray(column).tolist() for column in columns.values()), strict=True)
    for ts, cpu, row in zip(times, cpus, rows, strict=True):
        yield ts, cpu, name.split(":")[1], dict(zip(columns, row, strict=True)), hidden


def _snapshot(monotonic_ns, utc_offset_ns):
    packet = protos.TracePacket(trusted_packet_sequence_id=1)
    for clock, ahead in ((1, utc_offset_ns), (3, 0), (6, BOOT_AHEAD_NS)):
        packet.clock_snapshot.clocks.add(clock_id=clock, timestamp=monotonic_ns + ahead)
    return packet


def _bundle(cpu, events, *, numbers):
    packet = protos.TracePacket(trusted_packet_sequence_id=7)
    packet.ftrace_events.cpu = cpu
    known = {}
    for ts, _, name, values, hidden in events:
        event = packet.ftrace_events.event.add(timestamp=ts + BOOT_AHEAD_NS, pid=values["common_pid"])
        kept = {key: value for key, value in values.items() if not key.startswith("common_")}
        for key in hidden if numbers else ():
            kept[key] = known.setdefault(kept[key], len(known) + 1)
        if name in _TYPED:
            told = getattr(event, name)
            for field in _TYPED[name].fields:
                if field.name in kept:
                    value = kept[field.name]
                    setattr(told, field.name, value.decode() if isinstance(value, bytes) else value)
            continue
        event.generic.event_name = name
        for key, value in kept.items():
            if isinstance(value, bytes):
                event.generic.field.add(name=key, str_value=value.decode())
            elif value < 0:
                event.generic.field.add(name=key, int_value=value)
            else:
                event.generic.field.add(name=key, uint_value=value)
    return packet
