"""Computes the figures of an experiment from its repetitions: rows for JSON, tables, pictures.

A cell has two rows. `traced` false compares with ping on the host while nothing is traced, the truth; `traced` true
compares with ping on the host while the same source traces it, which has the tracer's cost too.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from rich.console import Console

from contracts.arrays import Ints
from contracts.ledger import Ledger
from correlator import intervals
from mace.shown.terminal import PlainTable
from mace.trials.experiment.load import NO_LOAD
from mace.trials.experiment.plan import Cell
from mace.trials.experiment.results import Repetition
from mace.trials.rounds import dithered, interval_text, machine_text, median_us

KINDS: Final = {False: "untraced", True: "traced"}
"""Which pings a row with that value of `traced` compares with."""
GOALS_US: Final = {"flood": 1, "10ms": 3, "50ms": 4, "200ms": 4, "1s": 4}
"""Largest difference between the corrected RTT and ping on the host that is aimed at, by pace."""


@dataclass(frozen=True, slots=True)
class Figures:
    """The result of an experiment."""

    repetitions: Sequence[Repetition]
    machine: dict[str, Any]

    def cells(self) -> dict[Cell, list[Repetition]]:
        """Return the repetitions by cell, in the order in which cells are shown."""
        found: dict[Cell, list[Repetition]] = {}
        for each in sorted(self.repetitions, key=lambda r: (r.cell.key(), r.number)):
            found.setdefault(each.cell, []).append(each)
        return found

    def ledger(self) -> Ledger:
        """Return the sum of the ledgers of all runs of `mace ping`."""
        total: Counter[str] = Counter()
        for each in self.repetitions:
            total.update(each.ledger)
        return Ledger(**total)

    def rows(self) -> list[dict[str, Any]]:
        """Return the figures of each cell for JSON; docs/evaluation.md explains the keys."""
        return [_row(cell, parts, traced=traced) for cell, parts in self.cells().items() for traced in KINDS]

    def as_dict(self) -> dict[str, Any]:
        """Return the result for JSON: `rows`, `machine`, `ledger`."""
        return {"rows": self.rows(), "machine": self.machine, "ledger": self.ledger().as_dict()}

    def tables(self, console: Console) -> None:
        """Print the result as tables for people."""
        for grid in self.grids():
            console.print(_printed(grid))
        for text in self.remarks():
            console.print(text)

    def grids(self) -> list[Grid]:
        """Return the tables for people."""
        rows = self.rows()
        truth = [row for row in rows if not row["traced"]]
        loaded = [row for row in truth if row["load"] != NO_LOAD]
        return [_main_table(truth), _steps_table(rows), *([_load_table(loaded)] if loaded else [])]

    def remarks(self) -> list[str]:
        """Return the lines below the tables: what is missing, the ledger, and the machine."""
        told = []
        for row in self.rows()[::2]:
            if not row["sent"]:
                told.append(f"{_place(row)}: the container shares the host's network, so there is nothing to correct")
            if row["unpaired"]:
                counts = ", ".join(f"{count:,} {reason}" for reason, count in row["unpaired"].items())
                told.append(f"unpaired at {_place(row)}: {counts}")
        return [*told, self.ledger().line(), machine_text(self.machine)]


def _row(cell: Cell, parts: Sequence[Repetition], *, traced: bool) -> dict[str, Any]:
    """Return one row: pings of the kind `traced` beside the figures of `mace ping`."""
    kind = KINDS[traced]
    bare = [_median_us(each.bare[kind]) for each in parts]
    pinged = [each.median[0] / 1000 if each.median else math.nan for each in parts]
    plain = [_us(each.plain) for each in parts]
    without = [_us(each.without_waiting) for each in parts]
    inside = [_median_us(each.container["untraced"]) for each in parts]
    cost = [_median_us(each.bare["traced"]) - _median_us(each.bare["untraced"]) for each in parts]
    row: dict[str, Any] = {
        **asdict(cell),
        "traced": traced,
        "bare_p50_us": median_us(_dithered(each.bare[kind]) for each in parts),
        "container_p50_us": median_us(_dithered(each.container[kind]) for each in parts),
        **_difference("added_p50_us", "added_ci95_us", inside, bare),
        "corrected_p50_us": _middle(pinged),
        **_difference("diff_p50_us", "ci95_us", pinged, bare),
        "coverage": _coverage(parts, bare),
        "plain_p50_us": _middle(plain),
        **_difference("plain_diff_p50_us", "plain_ci95_us", plain, bare),
        "host_path_us": _term(parts),
        "tracer_cost_us": _middle(cost),
        "tracer_cost_ci95_us": _interval(cost),
        "reported_tracer_cost_us": _middle([_us(each.tracer_cost) for each in parts]),
        "without_waiting_p50_us": _middle(without),
        **_difference("without_waiting_diff_p50_us", "without_waiting_ci95_us", without, bare),
        "temporal_error_us": _middle([_us(each.temporal_error) for each in parts]),
        "starved_p50_us": median_us(_dithered(each.bare.get("starved", [])) for each in parts),
        "bare_rounds_us": bare,
        "corrected_rounds_us": pinged,
    }
    return _rounded(row) | _counts(parts, kind)


def _counts(parts: Sequence[Repetition], kind: str) -> dict[str, Any]:
    unpaired: Counter[str] = Counter()
    for each in parts:
        unpaired.update(each.counts["unpaired"])
    return {
        "repetitions": len(parts),
        "bare": sum(len(each.bare[kind]) for each in parts),
        **{name: sum(each.counts[name] for each in parts) for name in ("sent", "paired", "waits_known", "probes")},
        "unpaired": dict(unpaired),
        "lost": sum(each.ledger["lost"] for each in parts),
        **{name: _total(each.wants[name] for each in parts) for name in parts[0].wants},
    }


def _total(values: Iterable[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _term(parts: Sequence[Repetition]) -> dict[str, float] | None:
    """Return the medians of the host path term's stretches over the repetitions, µs; None without a term."""
    known = [each.stretches for each in parts if each.stretches is not None]
    return {name: _middle([each[name] / 1000 for each in known]) for name in known[0]} if known else None


def _coverage(parts: Sequence[Repetition], bare_us: Sequence[float]) -> float | None:
    """Return the share of repetitions whose printed interval contains the median of the host's pings.

    The ends count as inside. Repetitions without an interval or without a reply on the host are left out; None if all
    are.
    """
    inside = [
        each.median[1] <= us * 1000 <= each.median[2]
        for each, us in zip(parts, bare_us, strict=True)
        if each.median is not None and not math.isnan(us)
    ]
    return sum(inside) / len(inside) if inside else None


def _difference(name: str, interval: str, values: Sequence[float], bare: Sequence[float]) -> dict[str, Any]:
    """Return the median over repetitions of value - bare, and its interval, by these two names."""
    found = [a - b for a, b in zip(values, bare, strict=True)]
    return {name: _middle(found), interval: _interval(found)}


def _interval(values: Sequence[float]) -> list[float] | None:
    known = np.array([value for value in values if not math.isnan(value)])

    def middle(drawn: Ints) -> float:
        return float(np.median(known[drawn]))

    return intervals.bounds(intervals.of_rounds(middle, len(known)))


def _middle(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return float(np.median(known)) if known else math.nan


def _us(ns: float | None) -> float:
    return math.nan if ns is None else ns / 1000


def _dithered(values_ns: Sequence[int]) -> Any:
    return dithered(np.array(values_ns, np.int64))


def _median_us(values_ns: Sequence[int]) -> float:
    return median_us([_dithered(values_ns)])


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row with two decimals, and None in place of nan, which JSON does not have."""

    def number(text: str) -> float:
        return round(float(text), 2)

    found: dict[str, Any] = json.loads(json.dumps(row), parse_float=number, parse_constant=lambda _: None)
    return found


# For people -----------------------------------------------------------------------------------------------


def _place(row: dict[str, Any]) -> str:
    """Return the conditions of a row in words; the usual ones are not named."""
    words = [row["pace"], f"{row['flood_containers']} flooding", row["source"]]
    words += [row["runtime"]] if row["runtime"] != "netns" else []
    words += [f"far end {row['far_end']}"] if row["far_end"] != "namespace" else []
    words += [f"load {row['load']}"] if row["load"] != NO_LOAD else []
    return ", ".join(words)


def _number(value: float | None, form: str = ".1f") -> str:
    return "-" if value is None else format(value, form)


@dataclass(frozen=True, slots=True)
class Grid:
    """A table's texts. The first column says where the figures of a row are from."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


_ON_PAGES: Final = ("repetitions", "goal")
"""Columns for which a terminal has no room."""
_PLACE_WIDTH: Final = 16


def _printed(grid: Grid) -> PlainTable:
    shown = [at for at, name in enumerate(grid.columns) if name not in _ON_PAGES]
    table = PlainTable(grid.title)
    table.add_column(grid.columns[0], min_width=_PLACE_WIDTH)
    for at in shown[1:]:
        table.add_column(grid.columns[at], justify="right", no_wrap=grid.columns[at] != "paired")
    for row in grid.rows:
        table.add_row(*(row[at] for at in shown))
    return table


def _main_table(rows: Sequence[dict[str, Any]]) -> Grid:
    title = "Medians, µs: ping on the host and in the container with nothing tracing, and what `mace ping` prints"
    columns = (
        "at",
        "repetitions",
        "host",
        "container",
        "added",
        "95 %",
        "corrected",
        "difference",
        "95 %",
        "goal",
        "coverage",
        "paired",
    )
    cells = [
        (
            _place(row),
            f"{row['repetitions']:,}",
            *(_number(row[name]) for name in ("bare_p50_us", "container_p50_us")),
            _number(row["added_p50_us"], "+.1f"),
            interval_text(row["added_ci95_us"]),
            _number(row["corrected_p50_us"]),
            _number(row["diff_p50_us"], "+.1f"),
            interval_text(row["ci95_us"]),
            f"±{GOALS_US[row['pace']]:g}" if row["load"] == NO_LOAD else "-",
            _number(row["coverage"], ".0%"),
            f"{row['paired']:,} of {row['sent']:,}",
        )
        for row in rows
    ]
    return Grid(title, columns, cells)


def _steps_table(rows: Sequence[dict[str, Any]]) -> Grid:
    title = "What tracing adds to ping, and the difference to the host's ping at each step, medians, µs"
    columns = (
        "at",
        "host traced",
        "added",
        "95 %",
        "taken out",
        "container traced",
        "lower bound",
        "corrected",
        "to traced",
    )
    cells = [
        (
            _place(truth),
            _number(traced["bare_p50_us"]),
            _number(truth["tracer_cost_us"], "+.1f"),
            interval_text(truth["tracer_cost_ci95_us"]),
            _number(truth["reported_tracer_cost_us"]),
            _number(traced["container_p50_us"]),
            _number(truth["plain_diff_p50_us"], "+.1f"),
            _number(truth["diff_p50_us"], "+.1f"),
            _number(traced["diff_p50_us"], "+.1f"),
        )
        for truth, traced in zip(rows[::2], rows[1::2], strict=True)
    ]
    return Grid(title, columns, cells)


def _load_table(rows: Sequence[dict[str, Any]]) -> Grid:
    title = (
        "Beside a load, µs: difference to ping on the host that has a real-time priority, and what the kernel counts"
    )
    columns = (
        "at",
        "host",
        "host starved",
        "corrected",
        "without waiting",
        "95 %",
        "waited, mean",
        "throttled",
        "PSI cpu, io",
    )
    cells = [
        (
            _place(row),
            _number(row["bare_p50_us"]),
            _number(row["starved_p50_us"]),
            _number(row["diff_p50_us"], "+.1f"),
            _number(row["without_waiting_diff_p50_us"], "+.1f"),
            interval_text(row["without_waiting_ci95_us"]),
            _number(row["temporal_error_us"]),
            "-" if row["throttled"] is None else f"{row['throttled']:,} ({row['throttled_ns'] / 1e6:,.0f} ms)",
            ", ".join(
                "-" if ns is None else f"{ns / 1e9:.1f} s" for ns in (row["cpu_pressure_ns"], row["io_pressure_ns"])
            ),
        )
        for row in rows
    ]
    return Grid(title, columns, cells)


def draw(found: Figures) -> bytes:
    """Return distributions and differences as a PNG picture. Raises `MissingExtra` without matplotlib."""
    # matplotlib is an extra, and its import takes longer than most commands run.
    from mace.shown.plots import png  # noqa: PLC0415
    from mace.shown.round_plots import Bar, Curve, Panel, drawn  # noqa: PLC0415

    panels, bars = [], []
    steps: dict[str, Callable[[dict[str, Any]], tuple[Any, Any]]] = {
        "lower bound": lambda row: (row["plain_diff_p50_us"], row["plain_ci95_us"]),
        "corrected": lambda row: (row["diff_p50_us"], row["ci95_us"]),
        "corrected, waiting taken out": lambda row: (
            row["without_waiting_diff_p50_us"],
            row["without_waiting_ci95_us"],
        ),
    }
    for (cell, parts), row in zip(found.cells().items(), found.rows()[::2], strict=True):
        curves = {
            "ping on the host": [_dithered(each.bare["untraced"]) for each in parts],
            "ping in the container": [_dithered(each.container["untraced"]) for each in parts],
            "`mace ping`, host RTT": [np.array(each.corrected, np.float64) for each in parts],
        }
        panels.append(Panel(_place(row), [Curve(name, np.concatenate(v) / 1000) for name, v in curves.items()]))
        for name, of in steps.items():
            value, interval = of(row)
            if value is not None and (cell.load != NO_LOAD or not name.endswith("out")):
                low, high = interval or (value, value)
                bars.append(Bar(_place(row), value, low, high, name))
    picture = drawn(
        panels,
        bars,
        title="Round trips of ping on the host, in a container, and corrected by `mace ping`",
        what="round trip, µs",
        bars_title="Difference to ping on the host with nothing tracing, median over repetitions, with 95 % intervals",
        note=f"{machine_text(found.machine)}\n{found.ledger().line()}",
    )
    return png(picture)
