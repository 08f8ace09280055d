"""The result of correcting a tool's samples, as tables and as JSON, for `mace correct`, `mace ping` and `mace wrap`.

The result says what is missing from its figures: it lists samples without a pair with their reasons, and the ledger.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.text import Text

from contracts.arrays import Ints
from contracts.figures import Summary
from contracts.names import printable
from contracts.results import Results, Totals
from contracts.schema import NOT_TOLD, Crossings, Grade, RoundTripRows, RoundTrips
from contracts.topology import Device, Role
from correlator import intervals
from correlator.correction import REASONS, Corrections, Ran, Reason, correct
from correlator.samples import Samples
from correlator.stamps import StampModel
from correlator.waiting import Waited
from mace.shown import tables
from mace.shown.terminal import PlainTable
from mace.tools.calibration import Calibration
from mace.tools.following import Followed, Following
from mace.tools.host_probes import HostProbes
from mace.tools.host_rtt import Cost, HostRtt, ToolTimes, calibrated, estimate, paired
from mace.tools.samples import Reader

FIGURES: Final = {
    "tool_rtt_ns": "tool RTT",
    "host_rtt_ns": "host RTT",
    "host_rtt_lower_bound_ns": "host RTT, lower bound",
    "nic_rtt_ns": "NIC RTT",
    "egress_ns": "egress in devices",
    "ingress_ns": "ingress in devices",
}
"""Columns of `Corrections` with statistics, and the host RTT, which is there with probes alone; names for people."""
WAITS: Final = {
    "temporal_error_ns": "temporal error",
    "host_rtt_without_waiting_ns": "host RTT without it",
    "host_rtt_lower_bound_without_waiting_ns": "lower bound without it",
    "waited_send_ns": "CPU wait, sending",
    "waited_receive_ns": "CPU wait, receiving",
}
"""Figures of a tool that was followed while it ran, with statistics, and their names for people."""
_WAITED_NS: Final = 50_000
"""Smallest temporal error that a line mentions: more than a wake-up on an idle machine (`correlator.stamps`)."""
_LOWER_BOUND: Final = (
    "of the host RTT only a lower bound is known, the tool RTT less the time in the container's devices: a host "
    "process does a part of that work too"
)
NO_PROBES: Final = "probes are sent while a tool runs, by mace ping and mace wrap"
"""Why a recording has none."""
_SHOWN: Final = 12
"""Most unpaired samples that are listed per reason; `--json` lists all."""


@dataclass(slots=True)
class Observed:
    """The correlator's results, as far as a correction needs them."""

    summary: Summary = field(default_factory=Summary)
    devices: tuple[Device, ...] = ()
    settled_utc_ns: int = 0
    gaps_utc_ns: list[tuple[int, int]] = field(default_factory=list)
    totals: Totals | None = None
    """The run's totals so far."""
    _parts: list[Crossings] = field(default_factory=list)

    def add(self, results: Results) -> None:
        """Add the correlator's next results."""
        self.summary.add(results)
        rows = results.rows
        self.devices = rows.devices
        self.totals = results.totals
        self.settled_utc_ns = results.totals.settled_utc_ns
        self.gaps_utc_ns += rows.gaps_utc_ns
        if len(rows.crossings):
            self._parts.append(rows.crossings)

    def containers(self) -> dict[int, tuple[str, int]]:
        """Return (name, number of crossings) by the inode of each container's network namespace."""
        devices, counts = np.unique(self.crossings().device, return_counts=True)
        found: dict[int, tuple[str, int]] = {}
        for number, count in zip(devices.tolist(), counts.tolist(), strict=True):
            device = self.devices[number]
            before = found.get(device.netns, ("", 0))[1]
            found[device.netns] = (device.container or device.netns_name, before + count)
        return found

    def crossings(self, netns: int | None = None, since_utc_ns: int | None = None) -> Crossings:
        """Return the crossings in the order in which they were found.

        `netns` selects those of one namespace's packets. `since_utc_ns` may leave out crossings before that time.
        """
        parts = self._parts
        if since_utc_ns is not None:
            start = len(parts)
            while start and int(parts[start - 1].inner_utc_ns.max()) >= since_utc_ns:
                start -= 1
            parts = parts[start:]
        found = Crossings.concatenate(parts)
        if netns is None:
            return found
        ours = np.array([device.netns == netns and device.role is Role.INNER for device in self.devices], np.bool_)
        return found[ours[found.device]] if len(found) else found


@dataclass(frozen=True, slots=True)
class Corrected:
    """A tool's samples with their corrections."""

    tool: str
    container: str
    samples: Samples
    corrections: Corrections
    not_understood: int
    """Number of lines of the tool's output that the reader did not understand."""
    first_not_understood: Sequence[str]
    left_out: Mapping[str, int]
    """Number of exchanges in the tool's output that cannot be corrected, by reason."""
    summary: Summary
    packets: int
    """The container's packets with records over the whole path, in both directions."""
    netns: str = ""
    """Name of the container's network namespace."""
    host: HostRtt | None = None
    """What turns the lower bound into the host RTT; None if that is not known."""
    no_host: str = NO_PROBES
    """Why it is not known."""
    no_cost: str = ""
    """Why the tracer's cost is not known."""
    followed: Followed | None = None
    """How long the tool waited for a CPU; None if it was not followed while it ran."""
    totals: Totals | None = None
    """Totals of the run that observed the packets."""
    container_id: str = ""
    destination: str = ""
    """Address that the tool asked; empty if it is not known."""

    @classmethod
    def of(
        cls, samples: Samples, observed: Observed, reader: Reader, netns: int, ran_utc_ns: Ran | None = None
    ) -> Corrected:
        """Correct `samples`, all that `reader` has found, with the packets of the namespace of inode `netns`.

        `ran_utc_ns`: when the tool ran, if MACE ran it.
        """
        crossings = observed.crossings(netns)
        stamps, unknown = reader.stamps, reader.unknown
        corrections = correct(samples, crossings, stamps, observed.gaps_utc_ns, ran_utc_ns)
        name = observed.containers().get(netns, ("", 0))[0]
        inner = [d for d in observed.devices if d.netns == netns]
        namespace = next((d.netns_name for d in inner), "")
        return cls(
            stamps.name, name, samples, corrections, unknown.count, unknown.first, dict(reader.left_out),
            observed.summary, len(crossings), namespace, totals=observed.totals,
            container_id=next((d.container_id for d in inner if d.container_id), ""),
        )  # fmt: skip

    def followed_by(self, following: Following, stamps: StampModel, utc_offset_ns: int) -> Corrected:
        """Return the result with the waits of the tool, which has ended; `stamps` is its model."""
        return replace(self, followed=following.finished(self.samples, self.corrections, stamps, utc_offset_ns))

    def probed_by(self, probes: HostProbes, cost: Cost | None, warm: Cost | None, no_cost: str) -> Corrected:
        """Return the result with the host RTT by probes that ran beside the tool, which has ended.

        `cost` is the tracer's, and `warm` that of records that follow others; None if it is not known, and `no_cost`
        says why.
        """
        found = estimate(
            ToolTimes.of(self.samples, self.corrections), probes.probes, cost, warm,
            alone=probes.rarer, method_error_ns=probes.method_error_ns,
        )  # fmt: skip
        if found is None:
            return replace(self, no_host=probes.remark())
        return replace(self, host=found, no_host="", no_cost=no_cost)

    def calibrated_by(self, calibration: Calibration | None, why_not: str) -> Corrected:
        """Return the result with the host RTT by a calibration if it is not known; `why_not`: why there is none."""
        if self.host is not None:
            return self
        if calibration is None:
            return replace(self, no_host=f"{self.no_host}; no calibration is used: {why_not}")
        tool = ToolTimes.of(self.samples, self.corrections)
        pace_s = self._pace_s()
        term = calibration.term_at(pace_s)
        if term is None:
            shortest = f"one every {pace_s * 1000:.3g} ms" if pace_s else "unknown"
            return replace(self, no_host=f"{self.no_host}; the calibration has no term for the tool's pace, {shortest}")
        found = calibrated(tool, term, calibration.of_round_trip(pace_s))
        return replace(self, host=found, no_host="", no_cost="") if found else self

    def _pace_s(self) -> float:
        """Return the median distance of the paired requests, s; 0 with fewer than two."""
        sent = np.sort(self.corrections.sent_utc_ns[paired(self.samples, self.corrections)])
        return float(np.median(np.diff(sent))) / 1e9 if len(sent) > 1 else 0.0

    @property
    def host_rtt_ns(self) -> Ints:
        """Host RTT of each sample; `NOT_TOLD` for unpaired ones, and for all if it is not known."""
        if self.host is None:
            return np.full(len(self.samples), NOT_TOLD)
        found = self.corrections.host_rtt_lower_bound_ns + round(self.host.added_ns)
        return np.where(self.corrections.reason == Reason.PAIRED, found, NOT_TOLD)

    @property
    def waited(self) -> Waited:
        """How long the tool waited for a CPU, one row per sample; unknown if it was not followed."""
        return self.followed.waited if self.followed else Waited.unknown(len(self.samples))

    def round_trips(self) -> RoundTrips:
        """Return all samples as rows for a store or a database."""
        found, samples = self.corrections, self.samples
        paired = found.reason == Reason.PAIRED
        cost_ns, error_ns = self.host.cost_and_error_ns if self.host else (NOT_TOLD, NOT_TOLD)
        rows = RoundTripRows(
            utc_ns=np.where(paired, found.sent_utc_ns, samples.stamp_utc_ns),
            seq=samples.seq,
            tool_rtt_ns=samples.rtt_ns,
            host_rtt_ns=self.host_rtt_ns,
            nic_rtt_ns=found.nic_rtt_ns,
            egress_ns=found.egress_ns,
            ingress_ns=found.ingress_ns,
            grade=found.grade,
            reason=found.reason,
            temporal_error_ns=np.where(self.waited.known, self.waited.temporal_error_ns, NOT_TOLD),
            host_rtt_lower_bound_ns=found.host_rtt_lower_bound_ns,
            tracer_cost_ns=np.where(paired, cost_ns, NOT_TOLD),
            tracer_cost_error_ns=np.where(paired, error_ns, NOT_TOLD),
        )
        reasons = tuple(r.name.lower() for r in Reason)
        return RoundTrips(self.tool, self.container, self.netns, reasons, rows, self.container_id, self.destination)

    def statistics(self) -> dict[str, dict[str, Any]]:
        """Return count, min, median, mean and max in ns, by the names in `FIGURES` and, if known for any, in `WAITS`.

        Median and mean have intervals, and are None if there are too few samples. The statistics are over the paired
        samples without duplicate replies, in the order of sending. Those in `WAITS` are over the samples whose waits
        are known.
        """
        chosen = np.flatnonzero((self.corrections.reason == Reason.PAIRED) & ~self.samples.duplicate)
        chosen = chosen[np.argsort(self.corrections.sent_utc_ns[chosen], kind="stable")]
        followed = chosen[self.waited.known[chosen]]
        columns = {name: self._figure(name)[chosen] for name in FIGURES if name != "host_rtt_ns" or self.host}
        if len(followed):
            columns |= {name: values[followed] for name, values in self._waits().items()}
        found = {}
        for name, values in columns.items():
            median, mean = intervals.median(values), intervals.mean(values)
            if self.host is not None and median is not None and mean is not None:
                if name == "host_rtt_ns":
                    median, mean = self.host.median, self.host.around(mean)
                elif name == "host_rtt_without_waiting_ns":
                    median, mean = self.host.around(median), self.host.around(mean)
            found[name] = {
                "count": len(values),
                "min": int(values.min()) if len(values) else None,
                "median": median.as_dict() if median else None,
                "mean": mean.as_dict() if mean else None,
                "max": int(values.max()) if len(values) else None,
            }
        return found

    def _figure(self, name: str) -> Ints:
        found: Ints = self.host_rtt_ns if name == "host_rtt_ns" else getattr(self.corrections, name)
        return found

    def _waits(self) -> dict[str, Ints]:
        """Return the columns in `WAITS`, one element per sample: of the host RTT if it is known, else its bound."""
        waited = self.waited
        which = "host_rtt" if self.host else "host_rtt_lower_bound"
        return {
            "temporal_error_ns": waited.temporal_error_ns,
            f"{which}_without_waiting_ns": self._figure(f"{which}_ns") - waited.temporal_error_ns,
            "waited_send_ns": waited.send_ns,
            "waited_receive_ns": waited.receive_ns,
        }

    def unpaired(self) -> dict[Reason, list[int]]:
        """Return the rows of the samples without a pair, by reason."""
        reasons = self.corrections.reason
        return {
            r: np.flatnonzero(reasons == r).tolist() for r in Reason if r is not Reason.PAIRED and (reasons == r).any()
        }

    def as_dict(self) -> dict[str, Any]:
        """Return the result for JSON.

        The keys are `tool`, `container`, `samples` (a list of objects: seq, stamp_utc_ns, duplicate, reason,
        tool_rtt_ns, and for paired samples host_rtt_ns if it is known, host_rtt_lower_bound_ns, nic_rtt_ns, egress_ns,
        ingress_ns, grade), `paired`, `unpaired` (count by reason), `statistics` (the result of `statistics`),
        `not_understood` (lines), `left_out` (count by reason), `packets`, `ledger`, `host_path` (`HostRtt.as_dict`),
        `no_host_rtt` and `no_tracer_cost` (why the host RTT or the tracer's cost is not known; None if it is), `cost`
        if the source measures it, and `waiting` (`Followed.as_dict`) if the tool was followed while it ran. Then
        samples whose waits are known also have temporal_error_ns, host_rtt_without_waiting_ns (or
        host_rtt_lower_bound_without_waiting_ns), waited_send_ns, waited_receive_ns.
        """
        found: dict[str, Any] = {
            "tool": self.tool,
            "container": self.container,
            "samples": list(self._rows()),
            "paired": int((self.corrections.reason == Reason.PAIRED).sum()),
            "unpaired": {reason.name.lower(): len(rows) for reason, rows in self.unpaired().items()},
            "statistics": self.statistics(),
            "not_understood": self.not_understood,
            "left_out": dict(self.left_out),
            "packets": self.packets,
            "ledger": self.summary.ledger.as_dict(),
            "host_path": self.host.as_dict() if self.host else None,
            "no_host_rtt": self.no_host or None,
            "no_tracer_cost": self.no_cost or None,
        }
        if self.summary.cost:
            found["cost"] = [cost.as_dict() for cost in self.summary.cost]
        if self.followed:
            found["waiting"] = self.followed.as_dict()
        return found

    def _rows(self) -> Iterator[dict[str, Any]]:
        known, waits, host_rtt_ns = self.waited.known, self._waits(), self.host_rtt_ns
        for i in range(len(self.samples)):
            reason = Reason(int(self.corrections.reason[i]))
            row: dict[str, Any] = {
                "seq": _told(self.samples.seq[i]),
                "stamp_utc_ns": _told(self.samples.stamp_utc_ns[i]),
                "duplicate": bool(self.samples.duplicate[i]),
                "reason": reason.name.lower(),
                "tool_rtt_ns": _told(self.samples.rtt_ns[i]),
            }
            if reason is Reason.PAIRED:
                if self.host:
                    row["host_rtt_ns"] = int(host_rtt_ns[i])
                for name in ("host_rtt_lower_bound_ns", "nic_rtt_ns", "egress_ns", "ingress_ns"):
                    row[name] = int(getattr(self.corrections, name)[i])
                row["grade"] = Grade(int(self.corrections.grade[i])).name.lower()
            if known[i]:
                row |= {name: int(values[i]) for name, values in waits.items()}
            yield row

    def tables(self, console: Console) -> None:
        """Print statistics, what the host RTT consists of, unpaired samples with their reasons, and the ledger."""
        console.print(self._statistics_table())
        for text in self._remarks():
            console.print(Text(printable(text)))
        for panel in tables.losses_panel(self.summary):
            console.print(panel)
        console.print(tables.ledger_line(self.summary))

    def _statistics_table(self) -> PlainTable:
        paired = int((self.corrections.reason == Reason.PAIRED).sum())
        table = PlainTable(f"{self.container or 'container'}: {paired:,} of {len(self.samples):,} samples paired, µs")
        table.add_column("")
        for name in ("n", "min", "median", "95 %", "mean", "95 %", "max"):
            table.add_column(name, justify="right", no_wrap=True)
        for name, figures in self.statistics().items():
            cells = [f"{figures['count']:,}", _microseconds(figures["min"])]
            for which in ("median", "mean"):
                interval = figures[which]
                cells.append(_microseconds(interval and interval["estimate"]))
                cells.append(
                    f"{tables.microseconds(interval['low'])} … {tables.microseconds(interval['high'])}"
                    if interval
                    else "-"
                )
            table.add_row((FIGURES | WAITS)[name], *cells, _microseconds(figures["max"]))
        return table

    def _remarks(self) -> Iterator[str]:
        if self.host:
            yield self.host.line()
        elif (self.corrections.reason == Reason.PAIRED).any():
            yield f"{_LOWER_BOUND} ({self.no_host})"
        if self.no_cost:
            yield f"the tracer's cost is not known: {self.no_cost}"
        for reason, rows in self.unpaired().items():
            yield f"unpaired {len(rows):,} · {REASONS[reason]}{self._named(rows)}"
        for why, count in self.left_out.items():
            yield f"left out {count:,} · {why}"
        yield from self._waiting_remarks()
        if not self.packets:
            yield (
                "no packet of this container has records over the whole path: check that the container runs on this "
                "host, and that [capture] outer names the host's devices towards the network"
            )
        if self.not_understood:
            lines = "; ".join(repr(line) for line in self.first_not_understood)
            yield f"not understood: {self.not_understood:,} lines of the tool's output: {lines}"

    def _waiting_remarks(self) -> Iterator[str]:
        if self.followed is None:
            return
        yield from self.followed.remarks()
        paired = self.corrections.reason == Reason.PAIRED
        unknown = int((paired & ~self.waited.known).sum())
        if unknown and not self.followed.why_not:
            yield (
                f"waiting for a CPU is not known of {unknown:,} paired samples: several of the tool's tasks may have "
                "sent them, or the kernel recorded not every switch to and from them"
            )

    def _named(self, rows: list[int]) -> str:
        numbers = [int(seq) for seq in self.samples.seq[rows[:_SHOWN]] if seq != NOT_TOLD]
        if not numbers:
            return ""
        more = f" and {len(rows) - len(numbers):,} more" if len(rows) > len(numbers) else ""
        return f" (seq {', '.join(map(str, numbers))}{more})"


def line(corrections: Corrections, row: int, waited: Waited | None = None, added_ns: float | None = None) -> str:
    """Return one line with a sample's correction, or the reason why it has none.

    `added_ns` turns the lower bound into the host RTT; None if it is not known, and then the line has the lower bound:
    `host≥` in place of `host=`. A temporal error that is longer than a wake-up on an idle machine is part of the line.
    """
    reason = Reason(int(corrections.reason[row]))
    if reason is not Reason.PAIRED:
        return f"not corrected · {REASONS[reason]}"
    host_ns = int(corrections.host_rtt_lower_bound_ns[row]) + round(added_ns or 0)
    host = f"host{'≥' if added_ns is None else '='}{tables.microseconds(host_ns)}"
    told = (
        f"{name}={tables.microseconds(int(getattr(corrections, column)[row]))}"
        for name, column in (
            ("nic", "nic_rtt_ns"),
            ("egress", "egress_ns"),
            ("ingress", "ingress_ns"),
        )
    )
    late_ns = int(waited.temporal_error_ns[row]) if waited is not None else 0
    more = f" · waited for CPU {tables.microseconds(late_ns)} µs" if late_ns >= _WAITED_NS else ""
    return f"{' '.join((host, *told))} µs {Grade(int(corrections.grade[row])).name.lower()}{more}"


def _told(value: np.integer[Any]) -> int | None:
    return None if value == NOT_TOLD else int(value)


def _microseconds(ns: float | None) -> str:
    return "-" if ns is None else tables.microseconds(ns)
