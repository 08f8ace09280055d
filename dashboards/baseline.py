"""Dashboard that compares the kernel module with ftrace: the same traffic, captured by both sources."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard as build

from dashboards.overview import NS
from dashboards.panels import EXACT, LARGEST, dashboard, ledger, lines, losses, rows
from dashboards.query import VARIABLES, came, quantiles, select

_OF_A_RUN = ("host", "source")
_OF_A_PATH = tuple(name for name in VARIABLES if name != "device")


def make() -> build.Dashboard:
    """Return the dashboard."""
    made = dashboard(
        "baseline",
        "module against ftrace",
        "Compares the sources. Measure with one after the other under the same load, or with both at once; then each"
        " source also measures the cost of the other.",
        VARIABLES,
    )
    for panel in ledger(VARIABLES):
        made.with_panel(panel)
    made.with_panel(
        rows(
            "Overhead by source",
            f"Compare rows of the same container and direction. {EXACT}",
            select(
                quantiles("overhead_ns"),
                "overhead",
                chosen=_OF_A_PATH,
                tags=("host", "container", "direction", "source"),
            ),
            units=NS,
            sort_by=[("container", False), ("direction", False), ("source", False)],
            height=7,
        )
    )
    made.with_panel(
        rows(
            "Device by device and source",
            EXACT,
            select(
                quantiles("delay_ns"),
                "device_delay",
                chosen=VARIABLES,
                tags=("host", "container", "device", "direction", "segment", "source"),
            ),
            units=NS,
            sort_by=[("device", False), ("direction", False), ("source", False)],
            height=11,
        )
    )
    for name, field in (("Median", "p50_ns"), ("99th percentile", "p99_ns")):
        made.with_panel(
            lines(
                f"{name} of the overhead by source",
                LARGEST,
                [
                    select(
                        {"quantile": f'max("{field}")'},
                        "device_window",
                        chosen=_OF_A_PATH,
                        tags=("host", "container", "direction", "source"),
                        every=True,
                        segment="overhead",
                        width_s="10",
                    )
                ],
                unit="ns",
                alias="$tag_source $tag_container $tag_direction",
            )
        )
    made.with_panel(
        rows(
            "Cost of a probe",
            "Mean time of the timed calls of each hook's probe, measured by the source itself; it includes reading"
            " the clock. Only the module has rows: ftrace cannot measure its own cost. A hook without timed calls has"
            " no row.",
            select(
                {"mean": 'last("timed_ns") / last("timed")', "calls": 'last("calls")'},
                "mace_internal",
                chosen=_OF_A_RUN,
                tags=("host", "source", "hook"),
                above_0="timed",
                part="cost",
            ),
            units={"mean": "ns"},
            span=12,
            height=8,
        )
    )
    made.with_panel(
        lines(
            "Records by source",
            "Records received in each step.",
            [came("records", _OF_A_RUN, chosen=_OF_A_RUN, part="ledger")],
            unit="short",
            alias="$tag_source $tag_host",
        )
    )
    made.with_panel(losses(VARIABLES))
    made.with_panel(
        lines(
            "Processor time by source",
            "Processor time of the measuring process, in cores.",
            [
                select(
                    {"cores": 'non_negative_derivative(last("cpu_ns"), 1s) / 1000000000'},
                    "mace_internal",
                    chosen=_OF_A_RUN,
                    tags=_OF_A_RUN,
                    every=True,
                    part="process",
                )
            ],
            unit="short",
            alias="$tag_source $tag_host",
        )
    )
    return made
