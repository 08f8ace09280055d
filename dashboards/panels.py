"""Parts that all dashboards share: variables, the ledger panels at the top, and kinds of panels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from grafana_foundation_sdk.builders import bargauge, common, stat, table, timeseries
from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.cog import builder as cog_builder
from grafana_foundation_sdk.cog import variants
from grafana_foundation_sdk.models import common as common_model
from grafana_foundation_sdk.models import dashboard as model

from dashboards.query import came, reached, tag_values

DATASOURCE: Final = model.DataSourceRef(type_val="influxdb", uid="${datasource}")
MIN_STEP: Final = "10s"
"""Smallest step of graphs: quantiles are of windows of 10 s, and a finer step would have gaps."""

MISSING: Final = ("lost", "discarded")
"""Categories of records that never reached the correlator."""
NOT_TIED: Final = ("unmatched", "ambiguous", "expired", "dropped")
"""Categories of records that gave no delay."""
NOT_STORED: Final = ("refused", "over_budget", "dropped_buffer", "dropped_spool")
"""Categories of rows that are in no database, and so in no dashboard."""

LARGEST: Final = (
    "Quantiles of several windows cannot be averaged: a point that covers several windows of 10 s shows the largest of"
    " their quantiles. Each is read from the window's histogram, with a relative error of at most 0.4 %."
)
EXACT: Final = (
    "Quantiles are exact, over the rows of single packets in the selected time range. If the sink samples"
    " ([sinks.influxdb] sample), quantiles and the count of packets are of the sample."
)


class _Query(variants.Dataquery):
    """An InfluxQL query, for which the SDK has no class. The keys are those of Grafana's own editor."""

    def __init__(self, ref_id: str, query: str, *, as_table: bool, alias: str) -> None:
        self._payload: dict[str, object] = {
            "refId": ref_id,
            "datasource": DATASOURCE,
            "query": query,
            "rawQuery": True,
            "resultFormat": "table" if as_table else "time_series",
        }
        if alias:
            self._payload["alias"] = alias

    def to_json(self) -> dict[str, object]:
        """Return the query for the SDK's encoder."""
        return self._payload


class _Target(cog_builder.Builder[variants.Dataquery]):
    def __init__(self, query: _Query) -> None:
        self._query = query

    def build(self) -> variants.Dataquery:
        """Return the query for the SDK's panels."""
        return self._query


def _target(query: str, *, ref_id: str = "A", as_table: bool = False, alias: str = "") -> _Target:
    return _Target(_Query(ref_id, query, as_table=as_table, alias=alias))


# Dashboards -----------------------------------------------------------------------------------------------


def dashboard(uid: str, title: str, description: str, variables: Sequence[str]) -> build.Dashboard:
    """Return an empty dashboard, with variables and links to the other dashboards."""
    made = (
        build.Dashboard(f"MACE: {title}")
        .uid(f"mace-{uid}")
        .description(description)
        .tags(["mace"])
        .readonly()
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .time("now-1h", "now")
        .refresh("30s")
        .timezone("browser")
        .link(
            build.DashboardLink("MACE")
            .type(model.DashboardLinkType.DASHBOARDS)
            .tags(["mace"])
            .as_dropdown(True)
            .include_vars(True)
            .keep_time(True)
        )
        .with_variable(build.DatasourceVariable("datasource").label("InfluxDB").type("influxdb"))
    )
    for position, name in enumerate(variables):
        made.with_variable(_variable(name, tuple(variables[:position])))
    return made


_ASKED_OF: Final = {"host": "mace_internal", "source": "mace_internal"}
"""Variable -> measurement with its values. All others are in windows, which exist without rows of single packets."""


def _variable(name: str, before: Sequence[str]) -> build.QueryVariable:
    measurement = _ASKED_OF.get(name, "device_window")
    # `mace_internal` has only the tags of hosts and sources.
    given = [other for other in before if measurement == "device_window" or other in _ASKED_OF]
    return (
        build.QueryVariable(name)
        .datasource(DATASOURCE)
        .query(tag_values(name, measurement, *given))
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.NATURAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(model.VariableOption(selected=True, text="All", value="$__all"))
    )


# The ledger -----------------------------------------------------------------------------------------------


def ledger(chosen: Sequence[str]) -> list[Any]:
    """Return the three panels at the top of every dashboard: what the other panels do not show."""
    seen = tuple(name for name in chosen if name in _ASKED_OF)
    runs = "Each is the largest value that a run reached in the selected time range, summed over hosts and sources."
    return [
        number(
            "Records missing",
            f"Lost: the kernel's ring did not store them. Discarded: a bounded buffer of MACE's discarded them. {runs}"
            " All panels below lack these records.",
            reached(MISSING, ("host", "source"), chosen=seen, part="ledger"),
            span=6,
            red_from=1,
        ),
        number(
            "Records without a delay",
            "Unmatched: no partner was seen. Ambiguous: several devices or packets fit. Expired: the partner did not"
            f" arrive in time. Dropped: the kernel dropped the packet. {runs}",
            reached(NOT_TIED, ("host", "source"), chosen=seen, part="ledger"),
            span=9,
        ),
        number(
            "Rows not stored",
            "Rows that the server refused, that exceeded the series budget, or that a full buffer or spool dropped:"
            f" they were measured, but are in no dashboard. {runs.replace('sources', 'sinks')}",
            reached(NOT_STORED, ("host", "sink"), chosen=tuple(name for name in seen if name == "host"), part="sink"),
            span=9,
            red_from=1,
        ),
    ]


def losses(chosen: Sequence[str]) -> Any:
    """Return a panel of the records lost and discarded over time."""
    seen = tuple(name for name in chosen if name in _ASKED_OF)
    return lines(
        "Records lost and discarded",
        "Records lost and discarded in each step. Delays of the same time lack these records.",
        [came(field, ("host", "source"), chosen=seen, part="ledger") for field in MISSING],
        unit="short",
        alias="$col $tag_host $tag_source",
        bars=True,
    )


# Kinds of panels ------------------------------------------------------------------------------------------


def number(title: str, meaning: str, query: str, *, span: int, red_from: float | None = None) -> stat.Panel:
    """Return a panel of large figures, one for each column of the query."""
    steps = [model.Threshold(value=None, color="green")]
    if red_from is not None:
        steps.append(model.Threshold(value=red_from, color="red"))
    return (
        stat.Panel()
        .title(title)
        .description(meaning)
        .datasource(DATASOURCE)
        .height(4)
        .span(span)
        .unit("short")
        .decimals(0)
        .thresholds(build.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(steps))
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
        .graph_mode(common_model.BigValueGraphMode.NONE)
        .text_mode(common_model.BigValueTextMode.VALUE_AND_NAME)
        .with_target(_target(query, alias="$col"))
    )


def lines(
    title: str,
    meaning: str,
    queries: Sequence[str],
    *,
    unit: str,
    alias: str,
    span: int = 12,
    height: int = 8,
    stacked: bool = False,
    bars: bool = False,
) -> timeseries.Panel:
    """Return a graph over time; a step without a row stays empty."""
    panel = (
        timeseries.Panel()
        .title(title)
        .description(meaning)
        .datasource(DATASOURCE)
        .height(height)
        .span(span)
        .unit(unit)
        .min(0)
        .interval(MIN_STEP)
        .line_width(1)
        .fill_opacity(100 if bars else 30 if stacked else 5)
        .draw_style(common_model.GraphDrawStyle.BARS if bars else common_model.GraphDrawStyle.LINE)
        .show_points(common_model.VisibilityMode.AUTO)
        .legend(
            common.VizLegendOptions()
            .display_mode(common_model.LegendDisplayMode.TABLE)
            .placement(common_model.LegendPlacement.RIGHT)
            .show_legend(True)
            .calcs(["max", "lastNotNull"])
        )
        .tooltip(
            common.VizTooltipOptions()
            .mode(common_model.TooltipDisplayMode.MULTI)
            .sort(common_model.SortOrder.DESCENDING)
        )
    )
    if stacked or bars:
        panel.stacking(common.StackingConfig().mode(common_model.StackingMode.NORMAL))
    for position, query in enumerate(queries):
        panel.with_target(_target(query, ref_id=chr(ord("A") + position), alias=alias))
    return panel


def rows(
    title: str,
    meaning: str,
    query: str,
    *,
    units: Mapping[str, str],
    span: int = 24,
    height: int = 9,
    sort_by: Sequence[tuple[str, bool]] = (),
    time: bool = False,
) -> table.Panel:
    """Return a table. `units`: column -> unit. `sort_by`: (column, whether descending)."""
    panel = (
        table.Panel()
        .title(title)
        .description(meaning)
        .datasource(DATASOURCE)
        .height(height)
        .span(span)
        .filterable(True)
        .cell_height(common_model.TableCellHeight.SM)
        .cell_options(common_model.TableAutoCellOptions())
        .with_target(_target(query, as_table=True))
    )
    if not time:
        # The time of an aggregate without steps is the beginning of the time range, which says nothing.
        panel.with_transformation(
            model.DataTransformerConfig(id_val="organize", options={"excludeByName": {"Time": True}})
        )
    for column, unit in units.items():
        panel.override_by_name(column, [model.DynamicConfigValue(id_val="unit", value=unit)])
    if sort_by:
        panel.sort_by([common.TableSortByFieldState().display_name(name).desc(desc) for name, desc in sort_by])
    return panel


def bars(title: str, meaning: str, query: str, *, unit: str, alias: str, span: int = 12, height: int = 9) -> Any:
    """Return a panel of horizontal bars, one for each series."""
    return (
        bargauge.Panel()
        .title(title)
        .description(meaning)
        .datasource(DATASOURCE)
        .height(height)
        .span(span)
        .unit(unit)
        .min(0)
        .orientation(common_model.VizOrientation.HORIZONTAL)
        .display_mode(common_model.BarGaugeDisplayMode.BASIC)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
        .with_target(_target(query, alias=alias))
    )
