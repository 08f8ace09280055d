"""Shows which CPU works on packets: tables, JSON or CSV, from the stages that a store has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import pyarrow as pa
from rich.console import Console, RenderableType

from contracts import cpu_figures
from contracts.cpu_figures import CpuReport, StageFigures
from contracts.errors import UsageError
from contracts.figures import Distribution, Summary
from contracts.ledger import Ledger
from contracts.schema import Grades
from mace.shown import rows, tables
from mace.shown.lines import json_line
from mace.shown.terminal import PlainTable, styled
from storage.query import Filter, Run, StoreReader

_UNKNOWN: Final = "—"
_NOT_KNOWN: Final = (
    "The CPUs' own counters (packets, squeezed, dropped) are not known: only `mace run --cpus` stores them."
)


def show(store: StoreReader, where: Filter, console: Console, *, form: str) -> None:
    """Print the figures of the packets that the filter admits as `table`, `json` or `csv`, and the ledger.

    CSV has the stages alone. Raises `UsageError` for a store without stages.
    """
    found = figures(store, where)
    if form == "csv":
        rows.write_csv(_stages(found).to_reader())
        return
    summary = _losses(store.runs(where))
    if form == "json":
        json_line(found.as_dict() | {"ledger": summary.ledger.as_dict()})
        return
    console.print(*tables.losses_panel(summary), *drawn(found))
    for one in found.containers:
        console.print(one.sentence(), soft_wrap=True)
    console.print("", tables.ledger_line(summary))


def figures(store: StoreReader, where: Filter) -> CpuReport:
    """Return the figures of the packets that the filter admits. Raises `UsageError` for a store without stages."""
    counts = store.stages(where)
    if not counts and not store.segments("stages"):
        raise UsageError(
            f"{store.path}: the store does not have which CPU worked on packets: measure or replay with --cpus, or name"
            " a recording in place of the store"
        )
    spans = _spans(store.runs(where), where)
    return cpu_figures.report(counts, store.cpu_growth(where), store.softirqs(where), spans)


def drawn(found: CpuReport) -> list[RenderableType]:
    """Return the tables; the sentences follow."""
    made: list[RenderableType] = [_stage_table(found.stages), "", _cpu_table(found)]
    if any(one.growth is None for one in found.cpus):
        made.append(styled(_NOT_KNOWN, "dim"))
    softirqs = [one.softirqs for one in found.cpus if one.softirqs is not None]
    if softirqs:
        made += ["", _softirq_table(found)]
        if lost := sum(one.lost for one in softirqs):
            made.append(styled(f"The tracer lost {lost:,} events of softirqs: some are in no count.", "dim"))
    return [*made, "", _container_table(found), ""]


def _spans(runs: Sequence[Run], where: Filter) -> dict[str, int]:
    """Return the time of each host's runs within the filter's time, ns."""
    spans: dict[str, int] = {}
    for run in runs:
        begin = max(run.started_utc_ns, where.since_ns or run.started_utc_ns)
        end = min(run.upto_utc_ns, where.until_ns or run.upto_utc_ns)
        spans[run.host] = spans.get(run.host, 0) + max(end - begin, 0)
    return spans


def _losses(runs: Sequence[Run]) -> Summary:
    found = Summary(
        ledger=sum((run.ledger for run in runs), Ledger()),
        packets=sum(run.packets for run in runs),
        grades=sum((run.grades for run in runs), Grades()),
        several_devices=None,
        rows_not_stored=sum(run.rows_not_stored for run in runs),
    )
    for run in runs:
        found.observed(run.hooks)
    return found


def _table(title: str, names: Sequence[str], numbers: Sequence[str]) -> PlainTable:
    table = PlainTable(title)
    for name in names:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _stage_table(stages: Sequence[StageFigures]) -> PlainTable:
    figures = ("CPU", "packets", "moved %", "wait p50", "wait p99", "run p50", "run p99")
    table = _table(
        "Stages: CPU that passed the packet on → CPU that ran it, µs", ("device", "of", "direction"), figures
    )
    packets: dict[object, int] = {}
    moved: dict[object, int] = {}
    for one in stages:
        key = one.owner, one.place, one.direction
        packets[key] = packets.get(key, 0) + one.packets
        moved[key] = moved.get(key, 0) + one.packets * one.moved
    for one in stages:
        key = one.owner, one.place, one.direction
        table.add_row(
            one.place.device,
            one.owner,
            one.direction.name.lower(),
            f"{_cpu(one.cpu_queued)} → {_cpu(one.cpu)}",
            f"{one.packets:,}",
            f"{100 * moved[key] / packets[key]:.1f}" if packets[key] else _UNKNOWN,
            *_quantiles(one.wait),
            *_quantiles(one.run),
        )
    return table


def _cpu(number: int) -> str:
    return str(number) if number >= 0 else _UNKNOWN


def _quantiles(found: Distribution) -> list[str]:
    if not found.count:
        return [_UNKNOWN, _UNKNOWN]
    return [tables.microseconds(int(each)) for each in found.quantiles((0.5, 0.99))]


def _cpu_table(found: CpuReport) -> PlainTable:
    table = _table(
        "CPUs: work on these packets, and the kernel's counters",
        ("CPU", "host"),
        ("stages/s", "busy %", "packets/s", "squeezed", "dropped"),
    )
    for one in found.cpus:
        rate, busy = found.per_second(one)
        told = cpu_figures.packets_per_s(one.growth)
        table.add_row(
            str(one.cpu),
            one.host,
            _number(rate),
            _UNKNOWN if busy is None else f"{100 * busy:.2f}",
            _number(told),
            _number(one.growth.squeezed if one.growth else None),
            _number(one.growth.dropped if one.growth else None),
        )
    return table


def _container_table(found: CpuReport) -> PlainTable:
    figures = (
        "packets", "not whole", "work µs", "longest stage", "serial %", "now/s", "pipelined/s", "gain", "price µs"
    )  # fmt: skip
    table = _table(
        "Containers: work per packet, and the rates that it allows",
        ("container", "direction"),
        figures,
    )
    for one in found.containers:
        longest, serial, gain, price = one.longest(), one.serial_share(), one.gain(), one.price_ns()
        table.add_row(
            one.container or one.netns,
            one.direction.name.lower(),
            f"{one.packets:,}",
            f"{one.partial:,}",
            f"{one.mean_work_ns() / 1000:.1f}" if one.packets else _UNKNOWN,
            f"{longest[0]} {longest[1] / 1000:.1f}" if longest else _UNKNOWN,
            _UNKNOWN if serial is None else f"{100 * serial:.0f}",
            _number(one.bound_now()),
            _number(one.bound_pipelined()),
            _UNKNOWN if gain is None else f"{gain:.2f}",
            _UNKNOWN if price is None else f"{price / 1000:.1f}",
        )
    return table


def _softirq_table(found: CpuReport) -> PlainTable:
    names = ("softirqs", "by ksoftirqd %", "wait p50", "wait p99", "wait max", "run mean")
    table = _table("Receive softirqs, µs", ("CPU", "host"), names)
    for cpu in found.cpus:
        one = cpu.softirqs
        if one is None:
            continue
        table.add_row(
            str(one.cpu),
            one.host,
            f"{one.count:,}",
            f"{100 * one.by_ksoftirqd / one.count:.1f}" if one.count else _UNKNOWN,
            *_quantiles(one.waits),
            tables.microseconds(one.waits.max_ns) if one.waits.count else _UNKNOWN,
            f"{one.run_ns / one.count / 1000:.1f}" if one.count else _UNKNOWN,
        )
    return table


def _number(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{value:,.0f}"


def _stages(found: CpuReport) -> pa.Table:
    """Return the stages as columns: those of the JSON, with `wait_` and `run_` before the names of durations."""
    names = ("count", "sum_ns", "p50_ns", "p99_ns", "max_ns")
    flat = []
    for one in found.as_dict()["stages"]:
        row = {name: value for name, value in one.items() if name not in ("wait", "run")}
        for kind in ("wait", "run"):
            row |= {f"{kind}_{name}": (one[kind] or {}).get(name) for name in names}
        flat.append(row)
    columns = ("host", "owner", "container", "netns", "device", "kind", "direction")
    integers = ("packets", *(f"{kind}_{name}" for kind in ("wait", "run") for name in names))
    schema = pa.schema(
        [
            *((name, pa.string()) for name in columns),
            ("cpu_queued", pa.int32()),
            ("cpu", pa.int32()),
            ("moved", pa.bool_()),
            *((name, pa.int64()) for name in integers),
        ]
    )
    return pa.Table.from_pylist(flat, schema=schema)
