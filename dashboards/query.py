"""InfluxQL for Grafana, which InfluxDB 1.x, 2.x and 3.x all serve.

    select("percentile", {"p50": ...})

Three rules that all queries keep, because numbers of a window cannot be put together in any way:

- counts and sums are added;
- a quantile of several windows is shown as the largest of theirs (`max`), never as a mean; an exact one over a longer
  time comes from the rows of single packets (`percentile`);
- a counter is shown as the largest value that its run reached, or as what came to it (`non_negative_difference`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

VARIABLES: Final = ("host", "container", "device", "direction", "source")
"""The dashboards' variables; each is named as the tag that it chooses from."""

QUANTILES: Final = {"p50": 50, "p99": 99, "p99.9": 99.9}


def where(chosen: Sequence[str] = (), **fixed: str) -> str:
    """The condition: Grafana's time range, the variables' choice, and tags that the panel is about."""
    # With "All" a variable is `.*`, which also matches rows that do not have the tag.
    parts = ["$timeFilter", *(f'"{name}" =~ /^${name}$/' for name in chosen)]
    return " AND ".join([*parts, *(f"\"{tag}\" = '{value}'" for tag, value in fixed.items())])


def by(tags: Sequence[str], *, every: bool = False) -> str:
    """GROUP BY; with `every` also by Grafana's step. An empty step has no row: it is not a 0."""
    groups = [*(["time($__interval)"] if every else []), *(f'"{tag}"' for tag in tags)]
    return (f" GROUP BY {', '.join(groups)}" if groups else "") + (" fill(none)" if every else "")


def select(
    values: Mapping[str, str],
    measurement: str,
    *,
    chosen: Sequence[str] = (),
    tags: Sequence[str] = (),
    every: bool = False,
    above_0: str = "",
    **fixed: str,
) -> str:
    """One query; `values` are expressions by the name that they are shown under.

    `above_0` is a field by which is divided: InfluxQL says 0 where nothing is divided by nothing.
    """
    shown = ", ".join(f'{expression} AS "{name}"' for name, expression in values.items())
    condition = where(chosen, **fixed) + (f' AND "{above_0}" > 0' if above_0 else "")
    return f'SELECT {shown} FROM "{measurement}" WHERE {condition}{by(tags, every=every)}'


def quantiles(field: str) -> dict[str, str]:
    """Exact ones, of the rows of single packets, and how many rows these are."""
    found = {name: f'percentile("{field}", {percent})' for name, percent in QUANTILES.items()}
    return found | {"max": f'max("{field}")', "packets": f'count("{field}")'}


def worst_quantiles() -> dict[str, str]:
    """Of windows: the largest of each."""
    return {"p50": 'max("p50_ns")', "p99": 'max("p99_ns")', "p99.9": 'max("p999_ns")'}


def reached(fields: Sequence[str], tags: Sequence[str], *, chosen: Sequence[str], part: str) -> str:
    """Counters of `mace_internal`: the largest value that each run reached, added up over `tags`."""
    outer = ", ".join(f'sum("{name}") AS "{name.replace("_", " ")}"' for name in fields)
    inner = select({name: f'max("{name}")' for name in fields}, "mace_internal", chosen=chosen, tags=tags, part=part)
    return f"SELECT {outer} FROM ({inner})"


def came(field: str, tags: Sequence[str], *, chosen: Sequence[str], part: str) -> str:
    """What came to a counter in each step; a new run's beginning counts as nothing."""
    value = f'non_negative_difference(last("{field}"))'
    return select({field.replace("_", " "): value}, "mace_internal", chosen=chosen, tags=tags, every=True, part=part)


def tag_values(tag: str, measurement: str, *given: str) -> str:
    """A variable's query: the tag's values, among those that fit what is chosen in the variables before it."""
    condition = " AND ".join(f'"{name}" =~ /^${name}$/' for name in given)
    return f'SHOW TAG VALUES FROM "{measurement}" WITH KEY = "{tag}"' + (f" WHERE {condition}" if given else "")
