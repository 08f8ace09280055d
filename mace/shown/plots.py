"""Draws a store: overhead over time, distributions per device, the hops of a typical packet to scale.

matplotlib is an extra: importing this module without it raises `MissingExtra`.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any, Final

import numpy as np

from contracts.errors import MaceError, MissingExtra
from contracts.figures import Distribution, FigureKey, Summary, labels_of
from contracts.histogram import middles
from contracts.names import printable
from contracts.schema import Direction, Segment
from mace.shown import tables
from storage.query import Series, TypicalPath

try:
    import matplotlib as mpl
    from matplotlib import dates
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
except ModuleNotFoundError as e:
    raise MissingExtra("plot", "matplotlib") from e

COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
"""Colours that colour-blind people can distinguish too: Okabe and Ito 2008, "Color Universal Design"."""
_OF_SEGMENT: Final = {Segment.DEVICE: "#0072B2", Segment.OUTSIDE: "#BBBBBB", Segment.DELIVERY: "#CC79A7"}
_MEANING: Final = {
    Segment.DEVICE: "added by the container's path",
    Segment.OUTSIDE: "the host's own packets cross it too",
    Segment.DELIVERY: "from the device to the reader",
}
_DASHES: Final[dict[Direction, Any]] = {Direction.EGRESS: "-", Direction.INGRESS: "--", Direction.UNKNOWN: ":"}
_MAX_SERIES: Final = 8
STYLE: Final[Any] = {
    "font.size": 9.5,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.fonttype": "path",
}


def figure(summary: Summary, paths: Sequence[TypicalPath], series: Sequence[Series], *, title: str) -> Figure:
    """Return a figure of 13 × 9.5 inches with all three pictures, and the ledger under them."""
    with drawing():
        whole = Figure(figsize=(13, 9.5), layout="constrained")
        FigureCanvasAgg(whole)
        whole.suptitle(printable(title), parse_math=False, x=0.01, ha="left", fontsize=14, fontweight="bold")
        shown = _paths_shown(paths)
        grid = whole.add_gridspec(2, 2, height_ratios=(1, 1.25))
        _draw_series(whole.add_subplot(grid[0, :]), series)
        _draw_distributions(whole.add_subplot(grid[1, 0]), _rows_shown(summary, shown))
        _draw_waterfall(whole.add_subplot(grid[1, 1]), shown)
        counted = f"packets {summary.packets:,} · {summary.ledger.line()}"
        told = [counted, summary.grades.line(), *summary.losses(), summary.note]
        whole.supxlabel(
            "\n".join(printable(t) for t in told if t),
            parse_math=False,
            x=0.01,
            ha="left",
            fontsize=9,
            color="#B00020" if summary.losses() else "#555555",
        )
    return whole


def png(drawn: Figure) -> bytes:
    """Return the figure as PNG with 150 dots per inch."""
    data = io.BytesIO()
    with drawing():
        drawn.savefig(data, format="png", dpi=150)
    return data.getvalue()


def write_png(drawn: Figure, path: Path) -> None:
    """Write the figure as PNG. Raises `MaceError` if the file cannot be written."""
    _write(path, png(drawn))


def shown(label: str) -> str:
    """Return a name as a curve's label: matplotlib omits labels that begin with an underscore from the legend."""
    label = printable(label)
    return f" {label}" if label.startswith("_") else label


def as_text(legend: Any) -> None:
    """Draw a legend's labels literally: matplotlib would draw text between dollar signs as a formula (mathtext)."""
    for text in legend.get_texts():
        text.set_parse_math(False)


@contextmanager
def drawing() -> Iterator[None]:
    """Apply the style, and suppress warnings of missing glyphs, which the picture shows as boxes."""
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        yield


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as e:
        raise MaceError(f"{path}: cannot write the picture: {e.strerror}") from e


def _paths_shown(paths: Sequence[TypicalPath]) -> list[TypicalPath]:
    """Return the paths of the container with the most packets, in both directions."""
    if not paths:
        return []
    busiest = max(paths, key=lambda p: p.hops[0][2].count if p.hops else 0)
    return sorted(
        (p for p in paths if (p.host, p.container, p.netns) == (busiest.host, busiest.container, busiest.netns)),
        key=lambda p: p.direction,
    )


def _rows_shown(summary: Summary, shown: Sequence[TypicalPath]) -> list[tuple[FigureKey, Distribution]]:
    """Return the rows to draw as curves: the shown container's path if there is one, else the tables' first devices."""
    if shown:
        return [((place, p.direction, segment), delays) for p in shown for place, segment, delays in p.hops]
    return summary.rows(Segment.DEVICE, Segment.OUTSIDE, Segment.DELIVERY)[: 2 * _MAX_SERIES]


def _colours() -> Iterator[str]:
    return cycle(COLOURS)


def _nothing(axes: Any) -> None:
    axes.text(0.5, 0.5, "nothing to draw", transform=axes.transAxes, ha="center", va="center", color="#888888")
    axes.grid(visible=False)


def _draw_series(axes: Any, series: Sequence[Series]) -> None:
    axes.set_title("Overhead over time: median (line) and 99th percentile (thin)")
    axes.set_ylabel("delay, µs (log)")
    if not series:
        _nothing(axes)
        return
    colour = dict(zip(dict.fromkeys(s.container for s in series), _colours(), strict=False))
    for each in series[: 2 * _MAX_SERIES]:
        when = np.array(each.utc_ns, "datetime64[ns]")
        style = {"color": colour[each.container], "linestyle": _DASHES[each.direction]}
        alone = "o" if len(when) == 1 else None
        label = shown(f"{each.container or 'host'} {each.direction.name.lower()}")
        axes.plot(when, np.array(each.p50_ns) / 1000, lw=1.8, marker=alone, label=label, **style)
        axes.plot(when, np.array(each.p99_ns) / 1000, lw=0.8, marker=alone, alpha=0.55, **style)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(_plain_number)
    axes.yaxis.set_minor_formatter(_sparse_minor)
    axes.margins(x=0.01)
    locator: Any = dates.AutoDateLocator(tz="UTC")  # type: ignore[no-untyped-call]
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(dates.ConciseDateFormatter(locator, tz="UTC"))  # type: ignore[no-untyped-call]
    axes.set_xlabel("time, UTC")
    hidden = max(0, len(series) - 2 * _MAX_SERIES)
    more = f"and {hidden} more, not drawn" if hidden else None
    as_text(axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), title=more))


def _draw_distributions(axes: Any, rows: Sequence[tuple[FigureKey, Distribution]]) -> None:
    axes.set_title("How many packets took longer, device by device")
    axes.set_xlabel("delay, µs (log)")
    axes.set_ylabel("share of packets with a longer delay (log)")
    if not rows:
        _nothing(axes)
        return
    labels = labels_of([key[0] for key, _ in rows])
    names = [labels[key[0]] + (" delivery" if key[2] is Segment.DELIVERY else "") for key, _ in rows]
    colour = dict(zip(dict.fromkeys(names), _colours(), strict=False))
    least, left = 1.0, np.inf
    for name, ((_, direction, _), delays) in zip(names, rows, strict=True):
        bins, counts = delays.histogram()
        longer = 1 - np.cumsum(counts) / counts.sum()
        # The last step would go to zero, which a logarithmic axis cannot show: the line ends at the largest delay.
        x, y = np.maximum(middles(bins), 1) / 1000, np.append(1.0, longer[:-1])
        axes.step(x, y, where="post", color=colour[name], linestyle=_DASHES[direction], lw=1.4)
        least, left = min(least, float(y[-1])), min(left, delays.quantiles((0.005,))[0] / 1000)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(least * 0.7, 1.4)
    # Further left nearly every packet has a longer delay, and the curves are flat.
    axes.set_xlim(left=max(left, 0.001))
    axes.xaxis.set_major_formatter(_plain_number)
    axes.yaxis.set_major_formatter(_percent)
    lines = [Line2D([], [], color=c, lw=2, label=shown(name)) for name, c in colour.items()]
    seen = sorted({key[1] for key, _ in rows})
    lines += [Line2D([], [], color="#555555", linestyle=_DASHES[d], label=d.name.lower()) for d in seen]
    as_text(axes.legend(handles=lines, loc="lower left"))


def _draw_waterfall(axes: Any, paths: Sequence[TypicalPath]) -> None:
    owner = (paths[0].container or paths[0].netns) if paths else ""
    title = f"Typical packet of {printable(owner)}, hop by hop" if owner else "Typical packet, hop by hop"
    axes.set_title(title, parse_math=False)
    axes.set_xlabel("µs since the first hop: medians, one after the other")
    if not paths:
        _nothing(axes)
        return
    names: list[str] = []
    rows: list[tuple[float, float, float, Segment]] = []
    y = 0.0
    ticks: list[float] = []
    longest = max(sum(d.quantiles((0.5,))[0] for _, _, d in p.hops) for p in paths) / 1000 or 1.0
    for path in paths:
        axes.text(0, y - 0.1, path.direction.name.lower(), fontweight="bold", va="center")
        y += 0.75
        at = 0.0
        for place, segment, delays in path.hops:
            took = delays.quantiles((0.5,))[0] / 1000
            rows.append((y, at, took, segment))
            ticks.append(y)
            names.append("to the reader" if segment is Segment.DELIVERY else place.device)
            at += took
            y += 1
        y += 0.4
    for where, start, took, segment in rows:
        axes.barh(where, max(took, longest / 400), left=start, height=0.72, color=_OF_SEGMENT[segment])
        axes.text(start + took + longest * 0.012, where, tables.microseconds(took * 1000), va="center", fontsize=8.5)
    axes.set_yticks(ticks, list(map(printable, names)), parse_math=False)
    axes.set_ylim(y - 0.5, -0.7)
    axes.set_xlim(0, longest * 1.12)
    axes.grid(visible=False, axis="y")
    used = list(dict.fromkeys(r[3] for r in rows))
    axes.legend(
        handles=[Patch(color=_OF_SEGMENT[s], label=_MEANING[s]) for s in used],
        loc="upper center",
        bbox_to_anchor=(0.45, -0.13),
        ncols=len(used),
        columnspacing=1.2,
        handlelength=1.2,
    )


def _plain_number(value: float, _: int | None = None) -> str:
    return f"{value:g}"


def _percent(value: float, _: int | None = None) -> str:
    return f"{value * 100:g} %"


def _sparse_minor(value: float, _: int | None = None) -> str:
    """Label only 2 and 5 of the minor ticks 2, 3, ... 9 of a logarithmic axis, for lack of room."""
    return f"{value:g}" if f"{value:e}"[0] in "25" else ""
