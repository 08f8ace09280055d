"""Dashboard of round trips of tools in containers, with and without the delay of the containers' devices."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.builders import timeseries

from dashboards.panels import dashboard, ledger, lines, losses, rows
from dashboards.query import select

_CHOSEN = ("host", "container", "source")
_RTTS = {
    "tool": "tool_rtt_ns",
    "host": "host_rtt_ns",
    "host, lower bound": "host_rtt_lower_bound_ns",
    "NIC": "nic_rtt_ns",
}
_SAMPLES = "Exact quantiles of the round trips in the selected time range that could be corrected (reason `paired`)."

_HOST = (
    "The host RTT is there where mace ping or mace wrap sent probes; the lower bound, the tool's round trip less the"
    " time in the container's devices, is always there."
)


def make() -> build.Dashboard:
    """Return the dashboard."""
    made = dashboard(
        "rtt",
        "round trips",
        "Round trip times that the tool reported, that a host process would have measured (by probes, and otherwise its"
        " lower bound alone), and from the host's outer device and back to it.",
        ("host", "source", "container"),
    )
    for panel in ledger(_CHOSEN):
        made.with_panel(panel)
    columns = {
        f"{name} {quantile}": f'percentile("{field}", {percent})'
        for quantile, percent in (("p50", 50), ("p99", 99))
        for name, field in _RTTS.items()
    }
    made.with_panel(
        rows(
            "Tool, host and NIC",
            f"{_SAMPLES} {_HOST}",
            select(
                {**columns, "samples": 'count("tool_rtt_ns")'},
                "rtt",
                chosen=_CHOSEN,
                tags=("host", "container", "tool", "source"),
                reason="paired",
            ),
            units=dict.fromkeys(columns, "ns"),
            height=7,
        )
    )
    for quantile, percent in (("Median", 50), ("99th percentile", 99)):
        made.with_panel(
            _over_time(
                f"{quantile} of tool, host and NIC",
                f"{_SAMPLES} {_HOST} Each point covers the round trips that began in the step.",
                {name: f'percentile("{field}", {percent})' for name, field in _RTTS.items()},
            )
        )
    made.with_panel(
        _over_time(
            "Overhead of request and response",
            "Medians of the delay that the container's devices added on the way out and on the way in.",
            {"egress": 'percentile("egress_ns", 50)', "ingress": 'percentile("ingress_ns", 50)'},
        )
    )
    made.with_panel(
        _over_time(
            "Waiting for a CPU",
            "The temporal error: the part of a round trip in which the tool was ready, but no CPU ran it. It is there"
            " where mace ping or mace wrap could follow the tool's tasks.",
            {name: f'percentile("temporal_error_ns", {share})' for name, share in (("p50", 50), ("p99", 99))},
        )
    )
    made.with_panel(
        rows(
            "Samples by reason",
            "All samples that the tool reported: `paired`, or the reason why a sample could not be corrected.",
            select({"samples": 'count("seq")'}, "rtt", chosen=_CHOSEN, tags=("host", "container", "tool", "reason")),
            units={},
            span=12,
            height=8,
        )
    )
    made.with_panel(losses(_CHOSEN))
    return made


def _over_time(title: str, meaning: str, columns: dict[str, str]) -> timeseries.Panel:
    """Return a panel with these columns of the paired round trips, for each container and tool."""
    chosen = select(columns, "rtt", chosen=_CHOSEN, tags=("host", "container", "tool"), every=True, reason="paired")
    return lines(title, meaning, [chosen], unit="ns", alias="$tag_container $tag_tool $col")
