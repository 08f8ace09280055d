"""Tables of a run's figures for people: the containers' overhead, each device's delays, losses, and the ledger."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Final

from rich.console import Console, Group
from rich.panel import Panel
from rich.text import Text

from contracts.figures import COUNTS_AS, Distribution, Summary, labels_of
from contracts.hooks import BY_HOOK
from contracts.names import printable
from contracts.schema import Segment
from mace.shown.terminal import PlainTable

_NAMES_SHOWN: Final = 5


def show(summary: Summary, console: Console) -> None:
    """Print all figures of a summary."""
    console.print(renderable(summary))


def renderable(summary: Summary) -> Group:
    """Return what `show` prints, for a live display."""
    return Group(*losses_panel(summary), overhead_table(summary), "", device_table(summary), "", ledger_line(summary))


def losses_panel(summary: Summary) -> list[Panel]:
    """Return a panel that lists what is missing from the figures; an empty list if nothing is."""
    text = Text("\n".join(map(printable, summary.losses())))
    return [Panel(text, title="not everything was seen", border_style="bold red", expand=False)] if text else []


def overhead_table(summary: Summary) -> PlainTable:
    """Return a table of the overhead, the time in the container's devices, per container and direction."""
    table = _table("Time of each packet in the container's devices, µs", ("container", "direction"), "packets", "mean")
    owner = summary.owners()
    for (place, direction, _), distribution in summary.overhead():
        table.add_row(owner(place), direction.name.lower(), *cells(distribution))
    return table


def device_table(summary: Summary) -> PlainTable:
    """Return a table of the delays per device and direction, in the order of the path."""
    rows = summary.rows(Segment.DEVICE, Segment.OUTSIDE, Segment.DELIVERY, Segment.WAITING)
    labels, owner = labels_of([k[0] for k, _ in rows]), summary.owners()
    table = _table("Device by device, in the order of the path, µs", ("device", "of", "kind", "counts as"), "packets")
    for direction, group in groupby(rows, key=lambda r: r[0][1]):
        table.add_row(direction.name.lower(), style="bold")
        for (place, _, segment), distribution in group:
            table.add_row(
                labels[place],
                owner(place),
                place.kind or "hardware",
                COUNTS_AS[segment],
                *cells(distribution)[:-1],
                style="dim" if segment is Segment.OUTSIDE else "",
            )
    return table


def ledger_line(summary: Summary) -> Text:
    """Return lines with packets, the whole ledger and all grades, also zeros, and the source of the figures."""
    lines = (
        f"packets {summary.packets:,} · {summary.ledger.line()}",
        summary.grades.line(),
        _ambiguous_line(summary),
        _cost_line(summary),
        *(f"{name}: {account.line()}" for name, account in summary.sinks.items()),
        _sharing_line(summary),
        _pods_line(summary),
        summary.note,
    )
    style = "bold red" if summary.losses() else "dim"
    return Text("\n".join(printable(line) for line in lines if line), style=style)


def _cost_line(summary: Summary) -> str:
    told = (f"{BY_HOOK[c.hook].name} {c.ns_per_call:.0f} ns × {c.calls:,}" for c in summary.cost if c.timed)
    line = " · ".join(told)
    return f"own cost: {line}" if line else ""


def _ambiguous_line(summary: Summary) -> str:
    if not summary.several_devices:
        return ""
    copies = summary.grades.ambiguous - summary.several_devices
    line = f"ambiguous: {summary.several_devices:,} packets fit several devices, {copies:,} fit several packets"
    if not summary.imitated:
        return line
    some = ", ".join(summary.imitated[:_NAMES_SHOWN]) + (", ..." if len(summary.imitated) > _NAMES_SHOWN else "")
    return (
        f"{line}; devices in other namespaces have the same names as the host's {some}, and any user who may make a"
        " namespace can choose such names: the kernel module, which identifies devices by number, is not misled"
    )


def _sharing_line(summary: Summary) -> str:
    names = ", ".join(summary.on_host_network)
    return f"on the host's own network, with no device to cross: {names}" if names else ""


def _pods_line(summary: Summary) -> str:
    """Return which containers share a pod's devices, for a few pods that have several."""
    places = (place for (place, _, _), _ in summary.overhead())
    several = {p.container: names for p in places if "," in (names := summary.pods.get(p.container_id, ""))}
    told = [f"{pod}: {names.replace(',', ', ')}" for pod, names in several.items()]
    more = f"; and {len(told) - _NAMES_SHOWN} more pods" if len(told) > _NAMES_SHOWN else ""
    return f"containers that share a pod's devices: {'; '.join(told[:_NAMES_SHOWN])}{more}" if told else ""


def microseconds(ns: float) -> str:
    """Format a delay in ns as µs for people: `1,234.5`."""
    return f"{ns / 1000:,.1f}"


def cells(distribution: Distribution) -> list[str]:
    """Return the figures of one table row: count, then p50, p90, p99, max and mean in µs."""
    p50, p90, p99 = distribution.quantiles((0.5, 0.9, 0.99))
    shown = (p50, p90, p99, distribution.max_ns, distribution.mean_ns)
    return [f"{distribution.count:,}", *(microseconds(v) for v in shown)]


def _table(title: str, names: Sequence[str], counted: str, *more: str) -> PlainTable:
    table = PlainTable(title)
    for name in names:
        table.add_column(name, overflow="fold")
    for name in (counted, "p50", "p90", "p99", "max", *more):
        table.add_column(name, justify="right", no_wrap=True)
    return table
