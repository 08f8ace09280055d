"""Writes packets as traces of OpenTelemetry: OTLP in JSON, one `TracesData` a line.

A packet is a trace. Its root span lasts from the packet's first hop to its last; each crossing of a device is a child.
A reply's root span links to the root span of its request.

The file is that of the specification's "OTLP File Exporter" and of the collector's file exporter, and the collector's
`otlpjsonfile` receiver reads it. In OTLP's JSON, identifiers are hexadecimal, enumerations numbers, and 64-bit integers
strings. `json` writes that directly; a test compares with the official messages (opentelemetry-proto).

Identifiers are hashes of boot, host, run and packet: the same recording gives the same file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from contracts.arrays import Ints
from contracts.figures import COUNTS_AS
from contracts.interfaces import StreamHeader
from contracts.schema import Delays, Direction, Grade, Outcome, Segment
from contracts.topology import Device
from contracts.version import VERSION
from storage.new_file import NewFile

_INTERNAL: Final = 1
"""`SPAN_KIND_INTERNAL`."""
_READING: Final = (Segment.DELIVERY, Segment.WAITING)
_ERROR: Final = 2
"""`STATUS_CODE_ERROR`."""
_LINE_BYTES: Final = 1 << 19
"""Size at which a line ends. The collector's receiver reads lines of up to 1 MiB by default."""


@dataclass(frozen=True, slots=True, eq=False)
class PacketFacts:
    """What the rows of packets do not say, as arrays with an entry for each packet."""

    request: npt.NDArray[np.uint64]
    """The packet that the packet replies to; 0 if none is known."""
    told_by: Sequence[str]
    """Evidence for the reply; "" without one."""


class SpanFile:
    """One file of traces. Call `host` before the rows of a stream, and `close` at the end. Raises `StoreError`.

    The file appears when it is complete: until `close` it has a temporary name, which `abort` removes.
    """

    def __init__(self, path: Path | str, *, overwrite: bool = False) -> None:
        self._file = NewFile(path, overwrite=overwrite)
        self.spans = 0
        """Number of spans written: one for each packet and for each hop."""
        self._key = ""
        self._of_host: list[dict[str, Any]] = []
        self._devices: tuple[Device, ...] = ()
        self._waiting: dict[str, list[str]] = {}
        """Encoded spans by their encoded resource."""
        self._waiting_bytes = 0

    @property
    def bytes_written(self) -> int:
        """Size of the file so far."""
        return self._file.bytes_written

    def host(self, header: StreamHeader) -> None:
        """Begin the spans of a stream."""
        self._flush()
        self._key = f"{header.boot_id}/{header.host}/{header.run}"
        self._devices = ()
        self._of_host = [
            _attribute("host.name", header.host),
            _attribute("host.id", header.boot_id),
            _attribute("os.type", "linux"),
            _attribute("os.version", header.kernel),
            _attribute("mace.run", header.run),
            _attribute("mace.source", header.source),
            _attribute("mace.clock.uncertainty_ns", header.clock.uncertainty_ns),
        ]
        if header.clock.kernel is not None:
            self._of_host += [
                _attribute("mace.clock.state", header.clock.kernel.state),
                _attribute("mace.clock.max_error_ns", header.clock.kernel.max_error_ns),
            ]

    def packets(self, rows: Delays, of_packet: Ints, devices: tuple[Device, ...], facts: PacketFacts) -> None:
        """Write a trace for each packet.

        `rows` are all rows of these packets, in time order and at equal times in path order; `of_packet` is, for each
        row, the index of its packet in `facts`. `devices` are what the rows' `device` points to.
        """
        if not len(rows):
            return
        self._devices = devices
        order = np.argsort(of_packet, kind="stable")
        first = np.flatnonzero(np.r_[True, np.diff(of_packet[order]) > 0])
        columns = {name: getattr(rows, name)[order].tolist() for name in Delays._DTYPES}
        for begin, end in zip(first.tolist(), [*first[1:].tolist(), len(order)], strict=True):
            self._packet(columns, range(begin, end), int(of_packet[order[begin]]), facts)
            if self._waiting_bytes >= _LINE_BYTES:
                self._flush()

    def close(self) -> None:
        """Write what waits, and give the file its name. May be called again."""
        if not self._file.closed:
            self._flush()
        self._file.close()

    def abort(self) -> None:
        """Remove the incomplete file. Does nothing after `close`."""
        self._file.abort()

    def _packet(self, columns: dict[str, list[Any]], rows: range, packet: int, facts: PacketFacts) -> None:
        number = columns["packet"][rows[0]]
        trace, root = self._ids(number)
        hops = [row for row in rows if columns["segment"][row] != Segment.OVERHEAD]
        whole = [row for row in rows if columns["segment"][row] == Segment.OVERHEAD]
        met = [self._devices[columns["device"][row]] for row in (*whole, *rows)]
        inner = next((device for device in met if device.container), met[0])
        direction = Direction(columns["direction"][rows[0]]).name.lower()
        ends = [columns["utc_ns"][row] + max(columns["delay_ns"][row], 0) for row in rows]
        span = self._span(
            trace, root, f"{_owner(inner)} {direction}", min(columns["utc_ns"][r] for r in rows), max(ends)
        )
        outcome, drop_reason = Outcome(columns["outcome"][rows[0]]), columns["drop_reason"][rows[0]]
        span["attributes"] = [
            _attribute("mace.packet", f"{number:#x}"),
            _attribute("mace.direction", direction),
            _attribute("mace.grade", Grade(columns["grade"][rows[0]]).name.lower()),
            _attribute("mace.outcome", outcome.name.lower()),
            _attribute("mace.l3_len", columns["l3_len"][rows[0]]),
        ]
        for row in whole:  # a packet from one container to another has two
            way = Direction(columns["direction"][row]).name.lower()
            span["attributes"].append(_attribute(f"mace.overhead.{way}_ns", columns["delay_ns"][row]))
        if any(columns["waited"][row] for row in rows):
            span["attributes"].append(_attribute("mace.waited", value=True))
        if outcome is Outcome.DROPPED:
            span["attributes"].append(_attribute("mace.drop_reason", drop_reason))
            span["status"] = {"code": _ERROR, "message": f"dropped by the kernel, reason {drop_reason}"}
        if request := int(facts.request[packet]):
            other, its_root = self._ids(request)
            told = [_attribute("mace.told_by", facts.told_by[packet])]
            span["links"] = [{"traceId": other, "spanId": its_root, "attributes": told}]
        self._put(inner, span)
        for row in hops:
            device = self._devices[columns["device"][row]]
            segment = Segment(columns["segment"][row])
            begin, delay = columns["utc_ns"][row], columns["delay_ns"][row]
            key = f"{trace}/{columns['position'][row]}/{segment}/{device.netns}/{device.ifindex}/{begin}"
            name = f"{device.name} {segment.name.lower()}" if segment in _READING else device.name
            hop = self._span(trace, _hex(key, 8), name, begin, begin + max(delay, 0))
            hop["parentSpanId"] = root
            hop["attributes"] = [
                _attribute("network.interface.name", device.name),
                _attribute("mace.device.kind", device.kind or "hardware"),
                _attribute("mace.netns", device.netns_name),
                _attribute("mace.counts_as", COUNTS_AS[segment]),
                _attribute("mace.hop", columns["position"][row]),
                _attribute("mace.delay_ns", delay),
            ]
            self._put(device, hop)

    def _ids(self, packet: int) -> tuple[str, str]:
        """Return the identifiers of a packet's trace and of its root span."""
        trace = _hex(f"{self._key}/{packet}", 16)
        return trace, _hex(trace, 8)

    def _span(self, trace: str, span: str, name: str, begin_ns: int, end_ns: int) -> dict[str, Any]:
        return {
            "traceId": trace,
            "spanId": span,
            "name": name,
            "kind": _INTERNAL,
            "startTimeUnixNano": str(begin_ns),
            "endTimeUnixNano": str(end_ns),
        }

    def _put(self, device: Device, span: dict[str, Any]) -> None:
        attributes = [_attribute("service.name", _owner(device)), *self._of_host]
        if device.container:
            attributes.append(_attribute("container.name", device.container))
        if device.container_id:
            attributes.append(_attribute("container.id", device.container_id))
        encoded = _json(span)
        self._waiting.setdefault(_json({"attributes": attributes}), []).append(encoded)
        self._waiting_bytes += len(encoded)
        self.spans += 1

    def _flush(self) -> None:
        if not self._waiting:
            return
        scope = _json({"name": "mace", "version": VERSION})
        told = ",".join(
            f'{{"resource":{resource},"scopeSpans":[{{"scope":{scope},"spans":[{",".join(spans)}]}}]}}'
            for resource, spans in self._waiting.items()
        )
        self._waiting, self._waiting_bytes = {}, 0
        self._file.write(f'{{"resourceSpans":[{told}]}}\n'.encode())


def _owner(device: Device) -> str:
    """Return the container whose packets the device's rows are, or the device's namespace where there is none."""
    return device.container or device.netns_name or f"namespace {device.netns}"


def _hex(key: str, size: int) -> str:
    """Return an identifier of `size` bytes, which is never all zeros in practice (2^-64)."""
    return hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=size).hexdigest()


def _attribute(key: str, value: str | int | bool) -> dict[str, Any]:
    if isinstance(value, bool):
        return {"key": key, "value": {"boolValue": value}}
    if isinstance(value, int):
        return {"key": key, "value": {"intValue": str(value)}}
    return {"key": key, "value": {"stringValue": value}}


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
