"""Draws experiments in rounds: distributions of round trips, and medians with their intervals.

matplotlib is an extra: importing this module without it raises `MissingExtra`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from contracts.errors import MissingExtra
from mace.shown.plots import COLOURS, STYLE

try:
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
except ModuleNotFoundError as e:
    raise MissingExtra("plot", "matplotlib") from e

_CUT: Final = 0.99
"""A curve is drawn up to this share of its values: a few long round trips would compress the rest."""


@dataclass(frozen=True, slots=True)
class Curve:
    """One distribution of a panel."""

    name: str
    values_us: npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture: distributions of the same thing under several conditions."""

    title: str
    curves: Sequence[Curve]


@dataclass(frozen=True, slots=True)
class Bar:
    """A figure and its interval. Bars with one label are adjacent, bars of one group have the same colour."""

    label: str
    value_us: float
    low_us: float
    high_us: float
    group: str


def drawn(panels: Sequence[Panel], bars: Sequence[Bar], *, title: str, what: str, bars_title: str, note: str) -> Figure:
    """Return a figure with the panels' cumulative distributions, three in a row, and below them the bars as points."""
    columns = min(3, max(1, len(panels)))
    rows = -(-len(panels) // columns)
    with mpl.rc_context(STYLE):
        whole = Figure(figsize=(13, 3.6 * rows + 0.8 + 0.17 * len(bars)), layout="constrained")
        FigureCanvasAgg(whole)
        whole.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold")
        heights = [*[3.4] * rows, 0.8 + 0.17 * len(bars)]
        grid = whole.add_gridspec(rows + 1, columns, height_ratios=heights)
        for number, panel in enumerate(panels):
            _distributions(whole.add_subplot(grid[number // columns, number % columns]), panel, what)
        _points(whole.add_subplot(grid[rows, :]), bars, bars_title)
        whole.supxlabel(note, x=0.01, ha="left", fontsize=9, color="#555555")
    return whole


def _distributions(axes: Any, panel: Panel, what: str) -> None:
    axes.set_title(panel.title)
    axes.set_xlabel(what)
    axes.set_ylabel("share of shorter round trips")
    for number, curve in enumerate(panel.curves):
        values = np.sort(curve.values_us)
        share = (np.arange(len(values)) + 0.5) / max(1, len(values))
        shown = share <= _CUT
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(values[shown], share[shown], color=colour, lw=1.6, label=curve.name)
    axes.set_ylim(0, 1)
    axes.legend(loc="lower right")


def _points(axes: Any, bars: Sequence[Bar], title: str) -> None:
    axes.set_title(title)
    axes.axvline(0, color="#888888", lw=1)
    groups = list(dict.fromkeys(bar.group for bar in bars))
    labels = list(dict.fromkeys(bar.label for bar in bars))
    for bar in bars:
        number = groups.index(bar.group)
        y = labels.index(bar.label) + (number - (len(groups) - 1) / 2) * 0.6 / len(groups)
        colour = COLOURS[number % len(COLOURS)]
        first = bar.label == labels[0]
        axes.plot([bar.low_us, bar.high_us], [y, y], color=colour, lw=2)
        axes.plot([bar.value_us], [y], "o", color=colour, ms=5, label=bar.group if first else None)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlabel("µs")
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.62 / (0.8 + 0.17 * len(bars))), ncols=len(groups))
