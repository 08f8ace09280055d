"""InfluxQL queries for Grafana; InfluxDB 1.x, 2.x and 3.x all serve InfluxQL.

    select({"p50": 'percentile("delay_ns", 50)'}, "device_delay", tags=("container",))

All queries keep three rules on how numbers may be combined:

- counts and sums are added;
- quantiles of several windows are combined by their maximum (`max`), never by a mean; an exact quantile over a longer
  time is computed from the rows of single packets (`percentile`);
- a counter is shown as the largest value that its run reached, or as its increase (`non_negative_difference`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

VARIABLES: Final = ("host", "container", "device", "direction", "source")
"""The dashboards' variables; each has the name of the tag from whose values it chooses."""

QUANTILES: Final = {"p50": 50, "p99": 99, "p99.9": 99.9}


def where(chosen: Sequence[str] = (), **fixed: str) -> str:
    """Return a condition: Grafana's time range, the choices of variables, and fixed values of tags."""
    # With "All" a variable is `.*`, which also matches rows that do not have the tag.
    parts = ["$timeFilter", *(f'"{name}" =~ /^${name}$/' for name in chosen)]
    return " AND ".join([*parts, *(f"\"{tag}\" = '{value}'" for tag, value in fixed.items())])


def by(tags: Sequence[str], *, every: bool = False) -> str:
    """Return a GROUP BY clause, with `every` also by Grafana's step; an empty step has no row instead of a 0."""
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
    """Return one query. `values`: displayed name -> expression.

    `above_0` names a field that is a divisor: its zeros are excluded, because InfluxQL evaluates 0 / 0 as 0.
    """
    shown = ", ".join(f'{expression} AS "{name}"' for name, expression in values.items())
    condition = where(chosen, **fixed) + (f' AND "{above_0}" > 0' if above_0 else "")
    return f'SELECT {shown} FROM "{measurement}" WHERE {condition}{by(tags, every=every)}'


def quantiles(field: str) -> dict[str, str]:
    """Return expressions for exact quantiles, maximum and count of a field in rows of single packets."""
    found = {name: f'percentile("{field}", {percent})' for name, percent in QUANTILES.items()}
    return found | {"max": f'max("{field}")', "packets": f'count("{field}")'}


def worst_quantiles() -> dict[str, str]:
    """Return expressions for the largest of each quantile over windows."""
    return {"p50": 'max("p50_ns")', "p99": 'max("p99_ns")', "p99.9": 'max("p999_ns")'}


def reached(fields: Sequence[str], tags: Sequence[str], *, chosen: Sequence[str], part: str) -> str:
    """Return a query of counters of `mace_internal`: the largest value of each, summed over `tags`."""
    outer = ", ".join(f'sum("{name}") AS "{name.replace("_", " ")}"' for name in fields)
    inner = select({name: f'max("{name}")' for name in fields}, "mace_internal", chosen=chosen, tags=tags, part=part)
    return f"SELECT {outer} FROM ({inner})"


def came(field: str, tags: Sequence[str], *, chosen: Sequence[str], part: str) -> str:
    """Return a query of a counter's increase in each step; the restart of a new run counts as 0."""
    value = f'non_negative_difference(last("{field}"))'
    return select({field.replace("_", " "): value}, "mace_internal", chosen=chosen, tags=tags, every=True, part=part)


def tag_values(tag: str, measurement: str, *given: str) -> str:
    """Return a variable's query: the values of a tag that fit the choices of the variables `given`."""
    condition = " AND ".join(f'"{name}" =~ /^${name}$/' for name in given)
    return f'SHOW TAG VALUES FROM "{measurement}" WITH KEY = "{tag}"' + (f" WHERE {condition}" if given else "")
