"""The result of correcting a tool's samples, as tables and as JSON, for `mace correct`, `mace ping` and `mace wrap`.

The result says what is missing from its figures: it lists samples without a pair with their reasons, and the ledger.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.text import Text

from contracts.figures import Summary
from contracts.names import printable
from contracts.results import Results
from contracts.schema import NOT_TOLD, Crossings, Grade, RoundTripRows, RoundTrips
from contracts.topology import Device, Role
from correlator import intervals
from correlator.correction import REASONS, Corrections, Reason, correct
from correlator.samples import Samples
from mace.shown import tables
from mace.shown.terminal import PlainTable
from mace.tools.samples import Reader

FIGURES: Final = {
    "tool_rtt_ns": "tool RTT",
    "host_rtt_ns": "host RTT",
    "nic_rtt_ns": "NIC RTT",
    "egress_ns": "egress overhead",
    "ingress_ns": "ingress overhead",
}
"""Columns of `Corrections` with statistics, and their names for people."""
_LOWER_BOUND: Final = (
    "host RTT is a lower bound where requests are rare: egress and ingress are the time spent in the container's "
    "devices, and a host process does a part of that work too (mace ping --host-path N measures how much)"
)
_SHOWN: Final = 12
"""Most unpaired samples that are listed per reason; `--json` lists all."""


@dataclass(slots=True)
class Observed:
    """The correlator's results, as far as a correction needs them."""

    summary: Summary = field(default_factory=Summary)
    devices: tuple[Device, ...] = ()
    settled_utc_ns: int = 0
    gaps_utc_ns: list[tuple[int, int]] = field(default_factory=list)
    _parts: list[Crossings] = field(default_factory=list)

    def add(self, results: Results) -> None:
        """Add the correlator's next results."""
        self.summary.add(results)
        rows = results.rows
        self.devices = rows.devices
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

    @classmethod
    def of(cls, samples: Samples, observed: Observed, reader: Reader, netns: int) -> Corrected:
        """Correct `samples`, all that `reader` has found, with the packets of the namespace of inode `netns`."""
        crossings = observed.crossings(netns)
        stamps, unknown = reader.stamps, reader.unknown
        corrections = correct(samples, crossings, stamps, observed.gaps_utc_ns)
        name = observed.containers().get(netns, ("", 0))[0]
        namespace = next((d.netns_name for d in observed.devices if d.netns == netns), "")
        return cls(
            stamps.name, name, samples, corrections, unknown.count, unknown.first, dict(reader.left_out),
            observed.summary, len(crossings), namespace,
        )  # fmt: skip

    def round_trips(self) -> RoundTrips:
        """Return all samples as rows for a database."""
        found, samples = self.corrections, self.samples
        paired = found.reason == Reason.PAIRED
        rows = RoundTripRows(
            utc_ns=np.where(paired, found.sent_utc_ns, samples.stamp_utc_ns),
            seq=samples.seq,
            tool_rtt_ns=samples.rtt_ns,
            host_rtt_ns=found.host_rtt_ns,
            nic_rtt_ns=found.nic_rtt_ns,
            egress_ns=found.egress_ns,
            ingress_ns=found.ingress_ns,
            grade=found.grade,
            reason=found.reason,
        )
        return RoundTrips(self.tool, self.container, self.netns, tuple(r.name.lower() for r in Reason), rows)

    def statistics(self) -> dict[str, dict[str, Any]]:
        """Return count, min, median, mean and max in ns, by the names in `FIGURES`.

        Median and mean have intervals, and are None if there are too few samples. The statistics are over the paired
        samples without duplicate replies, in the order of sending.
        """
        chosen = np.flatnonzero((self.corrections.reason == Reason.PAIRED) & ~self.samples.duplicate)
        chosen = chosen[np.argsort(self.corrections.sent_utc_ns[chosen], kind="stable")]
        found = {}
        for name in FIGURES:
            values: npt.NDArray[np.int64] = getattr(self.corrections, name)[chosen]
            median, mean = intervals.median(values), intervals.mean(values)
            found[name] = {
                "count": len(values),
                "min": int(values.min()) if len(values) else None,
                "median": median.as_dict() if median else None,
                "mean": mean.as_dict() if mean else None,
                "max": int(values.max()) if len(values) else None,
            }
        return found

    def unpaired(self) -> dict[Reason, list[int]]:
        """Return the rows of the samples without a pair, by reason."""
        reasons = self.corrections.reason
        return {
            r: np.flatnonzero(reasons == r).tolist() for r in Reason if r is not Reason.PAIRED and (reasons == r).any()
        }

    def as_dict(self) -> dict[str, Any]:
        """Return the result for JSON.

        The keys are `tool`, `container`, `samples` (a list of objects: seq, stamp_utc_ns, duplicate, reason,
        tool_rtt_ns, and for paired samples host_rtt_ns, nic_rtt_ns, egress_ns, ingress_ns, grade), `paired`, `unpaired`
        (count by reason), `statistics` (the result of `statistics`), `not_understood` (lines), `left_out` (count by
        reason), `packets`, `ledger`, and `cost` if it is known.
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
        }
        if self.summary.cost:
            found["cost"] = [cost.as_dict() for cost in self.summary.cost]
        return found

    def _rows(self) -> Iterator[dict[str, Any]]:
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
                for name in ("host_rtt_ns", "nic_rtt_ns", "egress_ns", "ingress_ns"):
                    row[name] = int(getattr(self.corrections, name)[i])
                row["grade"] = Grade(int(self.corrections.grade[i])).name.lower()
            yield row

    def tables(self, console: Console, *, lower_bound: bool = True) -> None:
        """Print statistics, unpaired samples with their reasons, lines that were not understood, and the ledger.

        `lower_bound`: say that the host RTT is a lower bound, where no host path term is printed.
        """
        console.print(self._statistics_table())
        if lower_bound and (self.corrections.reason == Reason.PAIRED).any():
            console.print(Text(_LOWER_BOUND))
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
            table.add_row(FIGURES[name], *cells, _microseconds(figures["max"]))
        return table

    def _remarks(self) -> Iterator[str]:
        for reason, rows in self.unpaired().items():
            yield f"unpaired {len(rows):,} · {REASONS[reason]}{self._named(rows)}"
        for why, count in self.left_out.items():
            yield f"left out {count:,} · {why}"
        if not self.packets:
            yield (
                "no packet of this container has records over the whole path: check that the container runs on this "
                "host, and that [capture] outer names the host's devices towards the network"
            )
        if self.not_understood:
            lines = "; ".join(repr(line) for line in self.first_not_understood)
            yield f"not understood: {self.not_understood:,} lines of the tool's output: {lines}"

    def _named(self, rows: list[int]) -> str:
        numbers = [int(seq) for seq in self.samples.seq[rows[:_SHOWN]] if seq != NOT_TOLD]
        if not numbers:
            return ""
        more = f" and {len(rows) - len(numbers):,} more" if len(rows) > len(numbers) else ""
        return f" (seq {', '.join(map(str, numbers))}{more})"


def line(corrections: Corrections, row: int) -> str:
    """Return one line with a sample's correction, or the reason why it has none."""
    reason = Reason(int(corrections.reason[row]))
    if reason is not Reason.PAIRED:
        return f"not corrected · {REASONS[reason]}"
    told = (
        f"{name}={tables.microseconds(int(getattr(corrections, column)[row]))}"
        for name, column in (
            ("host", "host_rtt_ns"),
            ("nic", "nic_rtt_ns"),
            ("egress", "egress_ns"),
            ("ingress", "ingress_ns"),
        )
    )
    return f"{' '.join(told)} µs {Grade(int(corrections.grade[row])).name.lower()}"


def _told(value: np.integer[Any]) -> int | None:
    return None if value == NOT_TOLD else int(value)


def _microseconds(ns: float | None) -> str:
    return "-" if ns is None else tables.microseconds(ns)
