"""Dashboard of all hosts side by side."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard as build

from dashboards.panels import LARGEST, MISSING, NOT_TIED, dashboard, ledger, lines, losses, rows
from dashboards.query import came, select

_CHOSEN = ("host", "source")
_LEDGER = ("records", "matched", *NOT_TIED, "in_flight", *MISSING)


def make() -> build.Dashboard:
    """Return the dashboard."""
    made = dashboard("fleet", "fleet", "All hosts: which host stands out, and which is silent.", _CHOSEN)
    for panel in ledger(_CHOSEN):
        made.with_panel(panel)
    made.with_panel(
        rows(
            "Ledger of each host",
            "Newest row of each host: records = matched + unmatched + ambiguous + expired + dropped + in flight.",
            select(
                {name.replace("_", " "): f'last("{name}")' for name in _LEDGER},
                "mace_internal",
                chosen=_CHOSEN,
                tags=_CHOSEN,
                part="ledger",
            ),
            units={},
            span=18,
            height=9,
        )
    )
    made.with_panel(
        rows(
            "Last report",
            "Time of each host's newest row in the selected time range, and the records of its run until then.",
            select({"records": 'last("records")'}, "mace_internal", chosen=_CHOSEN, tags=_CHOSEN, part="ledger"),
            units={},
            span=6,
            height=9,
            sort_by=[("Time", False)],
            time=True,
        )
    )
    made.with_panel(
        lines(
            "Records of each host",
            "Records received in each step. A line that ends shows a host that is silent.",
            [came("records", _CHOSEN, chosen=_CHOSEN, part="ledger")],
            unit="short",
            alias="$tag_host $tag_source",
        )
    )
    made.with_panel(
        lines(
            "99th percentile of the overhead, worst container of each host",
            LARGEST,
            [
                select(
                    {"p99": 'max("p99_ns")'},
                    "device_window",
                    chosen=_CHOSEN,
                    tags=("host",),
                    every=True,
                    segment="overhead",
                    width_s="10",
                )
            ],
            unit="ns",
            alias="$tag_host",
        )
    )
    made.with_panel(
        rows(
            "Containers of the fleet",
            "Mean, largest delay and count are exact. Quantiles cannot be averaged: each is the largest of the windows"
            " of 10 s.",
            select(
                {
                    "mean": 'sum("sum_ns") / sum("count")',
                    "worst p99": 'max("p99_ns")',
                    "max": 'max("max_ns")',
                    "packets": 'sum("count")',
                },
                "device_window",
                chosen=_CHOSEN,
                tags=("host", "container", "direction"),
                segment="overhead",
                width_s="10",
            ),
            units=dict.fromkeys(("mean", "worst p99", "max"), "ns"),
            sort_by=[("worst p99", True)],
            height=10,
        )
    )
    made.with_panel(losses(_CHOSEN))
    return made
