"""Dashboard of one container's packets, hop by hop."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard as build

from dashboards.panels import EXACT, bars, dashboard, ledger, lines, losses, rows
from dashboards.query import VARIABLES, by, select, where

_STAGE = ("host", "container", "device", "direction", "cpu", "moved")
_CORES = select(
    {"cores": 'non_negative_derivative(last("sum_ns"), 1s) / 1000000000'},
    "cpu_stage",
    chosen=VARIABLES,
    tags=(*_STAGE, "netns", "source"),
    every=True,
    measure="run",
)
_WORK = f'SELECT sum("cores") AS "cores" FROM ({_CORES}) WHERE $timeFilter{by(("host", "cpu"), every=True)}'
_MEAN = {"mean": 'sum("sum_ns") / sum("count")'}


def make() -> build.Dashboard:
    """Return the dashboard."""
    made = dashboard(
        "path",
        "packet path",
        "Devices that a container's packets cross, in order. Choose one container and one direction.",
        VARIABLES,
    )
    for panel in ledger(VARIABLES):
        made.with_panel(panel)
    made.with_panel(
        rows(
            "Hop by hop",
            "Rank is the device's position on the way out of the container. Mean, largest delay and count are exact"
            " over the selected time range. Quantiles cannot be averaged: each is the largest of the windows of 10 s.",
            select(
                {
                    **_MEAN,
                    "worst p50": 'max("p50_ns")',
                    "worst p99": 'max("p99_ns")',
                    "max": 'max("max_ns")',
                    "packets": 'sum("count")',
                },
                "device_window",
                chosen=VARIABLES,
                tags=("host", "container", "direction", "rank", "device", "kind", "role", "segment"),
                width_s="10",
            ),
            units=dict.fromkeys(("mean", "worst p50", "worst p99", "max"), "ns"),
            sort_by=[("direction", False), ("rank", False)],
            height=10,
        )
    )
    for direction, what in (("egress", "out of the container"), ("ingress", "into the container")):
        made.with_panel(
            bars(
                f"Median of each device, {what}",
                EXACT,
                select(
                    {"p50": 'percentile("delay_ns", 50)'},
                    "device_delay",
                    chosen=VARIABLES,
                    tags=("host", "container", "device", "segment"),
                    direction=direction,
                ),
                unit="ns",
                alias="$tag_container $tag_device ($tag_segment)",
            )
        )
    for direction, what in (("egress", "out of the container"), ("ingress", "into the container")):
        made.with_panel(
            lines(
                f"Mean of each device, stacked, {what}",
                "The means of the devices from the container's to the outer device add up to the mean overhead. A mean"
                " is the sum of all delays divided by their count, and so exact for any step.",
                [
                    select(
                        _MEAN,
                        "device_window",
                        chosen=VARIABLES,
                        tags=("host", "container", "rank", "device"),
                        every=True,
                        segment="device",
                        direction=direction,
                        width_s="10",
                    )
                ],
                unit="ns",
                alias="$tag_rank $tag_device $tag_container",
                stacked=True,
            )
        )
    made.with_panel(
        lines(
            "Work of each CPU",
            "CPU time that packets of the chosen containers took, in cores; needs --cpus. If one CPU is near 1 while"
            " others idle, it limits the rate. Counted in intervals of 10 s.",
            [_WORK],
            unit="short",
            alias="$tag_host CPU $tag_cpu",
            stacked=True,
            span=24,
        )
    )
    made.with_panel(
        rows(
            "Stages by CPU",
            "Stages that each CPU ran since the run began, and their mean; moved: another CPU had passed the packets"
            " on. Needs --cpus.",
            select(
                {"stages": 'max("count")', "mean run": 'max("sum_ns") / max("count")'},
                "cpu_stage",
                chosen=VARIABLES,
                tags=_STAGE,
                measure="run",
            ),
            units={"mean run": "ns"},
            sort_by=[("stages", True)],
        )
    )
    made.with_panel(
        rows(
            "Newest packets",
            "Last 200 crossings stored, one row for each device. Position is the hop's index in the packet's path.",
            'SELECT "delay_ns", "position", "l3_len", "host", "container", "device", "direction", "segment",'
            f' "grade", "source" FROM "device_delay" WHERE {where(VARIABLES)}{by(())} ORDER BY time DESC LIMIT 200',
            units={"delay_ns": "ns", "l3_len": "bytes"},
            height=10,
            time=True,
        )
    )
    made.with_panel(losses(VARIABLES))
    return made
