"""Dashboard of containers and their devices: the delay that they add, the packets, and the records missing."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard as build

from dashboards.panels import EXACT, LARGEST, dashboard, ledger, lines, losses, rows
from dashboards.query import VARIABLES, quantiles, select, worst_quantiles

NS = dict.fromkeys(("p50", "p99", "p99.9", "max"), "ns")
_OF_A_PATH = tuple(name for name in VARIABLES if name != "device")


def make() -> build.Dashboard:
    """Return the dashboard."""
    made = dashboard(
        "overview",
        "overview",
        "Delay that the container path adds to packets, by container and by device, and the records missing.",
        VARIABLES,
    )
    for panel in ledger(VARIABLES):
        made.with_panel(panel)
    made.with_panel(
        rows(
            "Overhead of the container path",
            f"Delay added between the container's device and the host's outer device. {EXACT}",
            select(quantiles("overhead_ns"), "overhead", chosen=_OF_A_PATH, tags=("host", "container", "direction")),
            units=NS,
            sort_by=[("p99", True)],
            height=8,
        )
    )
    made.with_panel(
        lines(
            "Overhead over time",
            LARGEST,
            [
                select(
                    worst_quantiles(),
                    "device_window",
                    chosen=_OF_A_PATH,
                    tags=("host", "container", "direction"),
                    every=True,
                    segment="overhead",
                    width_s="10",
                )
            ],
            unit="ns",
            alias="$tag_container $tag_direction $col",
        )
    )
    made.with_panel(
        lines(
            "Packets per second",
            "Packets seen over the whole path of a container: the sum of the windows of 1 s in a step, divided by the"
            " step's length.",
            [
                select(
                    {"packets": 'sum("count") / ($__interval_ms / 1000)'},
                    "device_window",
                    chosen=_OF_A_PATH,
                    tags=("host", "container", "direction"),
                    every=True,
                    segment="overhead",
                    width_s="1",
                )
            ],
            unit="pps",
            alias="$tag_container $tag_direction",
        )
    )
    made.with_panel(
        rows(
            "Device by device",
            "Segment `device` is part of the overhead; `outside` is a device that a host process's packet crosses"
            f" too; `delivery` is from the container's device to the reader. {EXACT}",
            select(
                quantiles("delay_ns"),
                "device_delay",
                chosen=VARIABLES,
                tags=("host", "container", "device", "kind", "direction", "segment"),
            ),
            units=NS,
            sort_by=[("p99", True)],
            height=11,
        )
    )
    made.with_panel(
        lines(
            "99th percentile by device",
            LARGEST,
            [
                select(
                    {"p99": 'max("p99_ns")'},
                    "device_window",
                    chosen=VARIABLES,
                    tags=("host", "container", "device", "direction"),
                    every=True,
                    segment="device",
                    width_s="10",
                )
            ],
            unit="ns",
            alias="$tag_container $tag_device $tag_direction",
        )
    )
    made.with_panel(losses(VARIABLES))
    return made
