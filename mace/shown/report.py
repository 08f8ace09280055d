"""Reports on a store as tables, as one JSON object, or as pictures.

Every form includes the ledger, so that no figure is shown without the counts of missing records.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.text import Text

from contracts.errors import UsageError, nearest
from contracts.figures import COUNTS_AS, Summary
from contracts.schema import Direction, Segment
from mace.shown import tables
from mace.shown.evidence import NO_EVIDENCE, Evidence
from mace.shown.lines import json_line
from mace.shown.terminal import PlainConsole, PlainTable, styled
from mace.shown.views import path_dict
from storage.query import Filter, From, PacketPath, Run, StoreReader, TypicalPath

_BAR_WIDTH: Final = 22
_MAX_PATHS: Final = 8
"""Most typical paths that are printed; a host may have hundreds of containers."""


def report(
    store: StoreReader,
    where: Filter,
    *,
    packet: int | None = None,
    worst: int | None = None,
    source: From = "auto",
    as_json: bool = False,
    png: Path | None = None,
    html: Path | None = None,
    evidence: Evidence = NO_EVIDENCE,
    console: Console,
) -> None:
    """Print the figures of the rows that the filter admits, and the ledger; with `packet` or `worst`, paths of packets.

    JSON is the object of `Summary.as_dict`; with `packet` or `worst` it has a list `packet_paths` of objects with host,
    run, packet, utc_ns, container, l3_len, grade, outcome, overhead_ns by direction, and hops, each with device, netns,
    container, kind, direction, segment, position, start_ns, delay_ns. `evidence` adds fields
    and lines. Raises `UsageError` for unknown names.
    """
    summary = store.summary(where, source)
    if not summary.rows():
        _check_names(store, where)
    asked = packet is not None or worst is not None
    paths = store.packet(packet, where) if packet is not None else store.worst(worst, where) if worst else []
    if packet is not None and not paths:
        raise UsageError(f"{store.path}: no rows of a packet {packet}")
    # Read before printing: the note counts skipped damaged segments.
    typical = [] if asked or (as_json and not png) else store.typical_paths(where)
    if png:
        from mace.shown import plots  # noqa: PLC0415 (matplotlib takes half a second, and is an extra)

        typical = typical or store.typical_paths(where)
        figure = plots.figure(summary, typical, store.series(where, source=source), title=_title(store, where))
        plots.write_png(figure, png)
    if html:
        from mace.shown.page import one_file  # noqa: PLC0415 (not for the other forms)

        one_file.write(store, where, source, html, title=_title(store, where), tables=_as_text(summary))
    if as_json:
        found = summary.as_dict()
        if asked:
            found["packet_paths"] = [path_dict(p) for p in paths]
        json_line(found | dict(evidence.fields))
        return
    if asked:
        console.print(*tables.losses_panel(summary))
        for path in paths:
            console.print(packet_table(path), "")
        console.print(tables.ledger_line(summary))
        _print_lines(evidence.lines, console)
        return
    console.print(*tables.losses_panel(summary), tables.overhead_table(summary), "", tables.device_table(summary), "")
    _print_typical(typical, console)
    console.print(tables.ledger_line(summary))
    _print_lines(evidence.lines, console)


def _print_lines(lines: Sequence[str], console: Console) -> None:
    for line in lines:
        console.print(styled(line, ""), soft_wrap=True)


def _as_text(summary: Summary) -> str:
    text = io.StringIO()
    tables.show(summary, PlainConsole(file=text, width=140))
    return text.getvalue()


def print_typical_paths(path: Path, console: Console) -> None:
    """Print the typical paths of all packets in a store."""
    _print_typical(StoreReader(path).typical_paths(), console)


def _print_typical(paths: Sequence[TypicalPath], console: Console) -> None:
    for path in paths[:_MAX_PATHS]:
        console.print(typical_table(path), "")
    if len(paths) > _MAX_PATHS:
        console.print(
            Text(f"and {len(paths) - _MAX_PATHS} more paths; --container NAME shows one container's", style="dim")
        )


def _title(store: StoreReader, where: Filter) -> str:
    told = [f"{store.path.name}"]
    for name in ("container", "device", "run"):
        if getattr(where, name):
            told.append(f"{name} {getattr(where, name)}")
    if where.direction is not None:
        told.append(where.direction.name.lower())
    return "MACE · " + " · ".join(told)


def _check_names(store: StoreReader, where: Filter) -> None:
    """Raise `UsageError` if a name in a filter without results is unknown to the store."""
    runs = [r.run for r in store.runs()]
    if where.run is not None and where.run not in runs:
        raise UsageError(f"{store.path}: no run {where.run!r}{nearest(where.run, runs)}")
    everything = store.summary(replace(where, container=None, device=None, direction=None)).rows()
    for name in ("container", "device"):
        wanted = getattr(where, name)
        known = sorted({getattr(key[0], name) for key, _ in everything} - {""})
        if wanted is not None and wanted not in known:
            hint = nearest(wanted, known) or (f"; there are {', '.join(known[:10])}" if known else "")
            raise UsageError(f"{store.path}: no {name} {wanted!r} in the chosen time{hint}")


def print_runs(runs: Sequence[Run], console: Console, *, as_json: bool) -> None:
    """Print the runs as a table, or as a JSON object with a list `runs`."""
    if as_json:
        found = [
            {
                "host": r.host,
                "run": r.run,
                "source": r.source,
                "started_utc_ns": r.started_utc_ns,
                "upto_utc_ns": r.upto_utc_ns,
                "closed": r.closed,
                "packets": r.packets,
                "rows_stored": r.rows_stored,
                "rows_not_stored": r.rows_not_stored,
                "ledger": r.ledger.as_dict(),
            }
            for r in runs
        ]
        json_line({"runs": found})
        return
    table = PlainTable(f"{len(runs)} runs")
    for name in ("run", "host", "source", "began (UTC)"):
        table.add_column(name)
    for name in ("seconds", "packets", "rows", "lost", "discarded"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("end")
    for r in runs:
        table.add_row(
            r.run,
            r.host,
            r.source,
            f"{datetime.fromtimestamp(r.started_utc_ns // 1_000_000_000, UTC):%Y-%m-%d %H:%M:%S}",
            f"{(r.upto_utc_ns - r.started_utc_ns) / 1e9:,.1f}",
            f"{r.packets:,}",
            f"{r.rows_stored:,}",
            f"{r.ledger.lost:,}",
            f"{r.ledger.discarded:,}",
            "" if r.closed else "running or killed",
        )
    console.print(table)


_ARROWS: Final = {Direction.EGRESS: "→ network", Direction.INGRESS: "← network"}


def typical_table(path: TypicalPath) -> PlainTable:
    """Return a table of a container's path in one direction, with the hops' medians drawn to scale in a row."""
    medians = [delays.quantiles((0.5, 0.99)) for _, _, delays in path.hops]
    title = f"{path.container or path.netns} {_ARROWS.get(path.direction, '')}: typical path, µs"
    table = _hops_table(title, ("packets", "p50", "p99"), "medians in a row")
    total = sum(p50 for p50, _ in medians) or 1
    at = 0
    for (place, segment, delays), (p50, p99) in zip(path.hops, medians, strict=True):
        table.add_row(
            place.device,
            place.container or place.netns,
            place.kind or "hardware",
            COUNTS_AS[segment],
            f"{delays.count:,}",
            tables.microseconds(p50),
            tables.microseconds(p99),
            _bar(at, p50, total, segment),
        )
        at += p50
    return table


def packet_table(path: PacketPath) -> PlainTable:
    """Return a table of one packet's path, hop by hop."""
    overhead = ", ".join(
        f"{d.name.lower()} overhead {tables.microseconds(ns)} µs" for d, ns in path.overhead_ns.items()
    )
    when = datetime.fromtimestamp(path.utc_ns // 1_000_000_000, UTC)
    title = (
        f"packet {path.packet} of {path.container or 'no container'}, {path.l3_len} bytes,"
        f" {when:%Y-%m-%d %H:%M:%S}.{path.utc_ns % 1_000_000_000:09d} UTC; {path.outcome}, tied by {path.grade}"
        + (f"; {overhead}" if overhead else "")
    )
    table = _hops_table(title, ("from", "delay"), "from the first hop")
    total = max((h.start_ns + h.delay_ns for h in path.hops), default=0) or 1
    for hop in path.hops:
        table.add_row(
            hop.place.device,
            hop.place.container or hop.place.netns,
            hop.place.kind or "hardware",
            COUNTS_AS[hop.segment],
            tables.microseconds(hop.start_ns),
            tables.microseconds(hop.delay_ns),
            _bar(hop.start_ns, hop.delay_ns, total, hop.segment),
        )
    return table


def _hops_table(title: str, figures: Sequence[str], drawn: str) -> PlainTable:
    table = PlainTable(title)
    for name in ("device", "of", "kind", "counts as"):
        table.add_column(name, overflow="fold")
    for name in figures:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(drawn, no_wrap=True)
    return table


def _bar(start: int, length: int, total: int, segment: Segment) -> Text:
    """Return a bar in `_BAR_WIDTH` cells, at least one cell long."""
    first = min(start * _BAR_WIDTH // total, _BAR_WIDTH - 1)
    last = max(first + 1, -(-(start + length) * _BAR_WIDTH // total))
    style = {Segment.DEVICE: "cyan", Segment.DELIVERY: "magenta", Segment.WAITING: "magenta"}.get(segment, "dim")
    return Text(" " * first) + Text("█" * (min(last, _BAR_WIDTH) - first), style=style)
