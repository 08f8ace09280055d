"""Dashboard of the measurement's own health: sinks, queues, processor time and memory."""

from __future__ import annotations

from collections.abc import Mapping

from grafana_foundation_sdk.builders import dashboard as build

from dashboards.panels import NOT_STORED, dashboard, ledger, lines, losses, rows
from dashboards.query import came, select

_CHOSEN = ("host", "source")
_SINK = ("host", "sink")
_OF_A_HOST = ("host",)


def _now(values: Mapping[str, str], part: str, *tags: str) -> str:
    return select(
        {name: f'last("{field}")' for name, field in values.items()},
        "mace_internal",
        chosen=_OF_A_HOST,
        tags=("host", *tags),
        every=True,
        part=part,
    )


def make() -> build.Dashboard:
    """Return the dashboard."""
    made = dashboard(
        "pipeline", "health of the pipeline", "Whether all measured rows are stored, and what measuring costs.", _CHOSEN
    )
    for panel in ledger(_CHOSEN):
        made.with_panel(panel)
    counted = ("taken", "stored", "waiting", *NOT_STORED, "left_out")
    made.with_panel(
        rows(
            "Accounts of the sinks",
            "Newest account of each sink: taken = stored + waiting + refused + over budget + dropped (buffer, spool) +"
            " left out by sampling.",
            select(
                {name.replace("_", " "): f'last("{name}")' for name in counted},
                "mace_internal",
                chosen=_OF_A_HOST,
                tags=_SINK,
                part="sink",
            ),
            units={},
            height=6,
        )
    )
    for title, meaning, query, unit, alias in (
        (
            "Rows stored",
            "Rows that the servers acknowledged in each step.",
            came("stored", _SINK, chosen=_OF_A_HOST, part="sink"),
            "short",
            "$tag_host $tag_sink",
        ),
        (
            "Rows waiting",
            "Rows in buffer, spool or requests under way. A rising line shows a server that is away or too slow.",
            _now({"waiting": "waiting"}, "sink", "sink"),
            "short",
            "$tag_host $tag_sink",
        ),
        (
            "Spool on the disk",
            "Size of the spool. At its limit the oldest rows are dropped and counted.",
            _now({"spool": "spool_bytes"}, "sink", "sink"),
            "bytes",
            "$tag_host $tag_sink",
        ),
        (
            "Duration of requests",
            "Duration of the last successful request in a step.",
            _now({"request": "delivery_ns"}, "sink", "sink"),
            "ns",
            "$tag_host $tag_sink",
        ),
        (
            "Failed requests",
            "Requests that failed in each step and are repeated.",
            came("retries", _SINK, chosen=_OF_A_HOST, part="sink"),
            "short",
            "$tag_host $tag_sink",
        ),
        (
            "Peak of each channel",
            "Largest number of items that have waited. A channel that is always full precedes a slow stage.",
            _now({"peak": "queue_peak"}, "queue", "queue"),
            "short",
            "$tag_host $tag_queue",
        ),
        (
            "Processor time",
            "Processor time of the process, in cores.",
            select(
                {"cores": 'non_negative_derivative(last("cpu_ns"), 1s) / 1000000000'},
                "mace_internal",
                chosen=_CHOSEN,
                tags=_CHOSEN,
                every=True,
                part="process",
            ),
            "short",
            "$tag_host $tag_source",
        ),
        (
            "Memory",
            "Resident bytes of the process.",
            _now({"resident": "resident_bytes"}, "process", "source"),
            "bytes",
            "$tag_host $tag_source",
        ),
        (
            "Open files",
            "File descriptors of the process. The number should not grow.",
            _now({"files": "open_files"}, "process", "source"),
            "short",
            "$tag_host $tag_source",
        ),
    ):
        made.with_panel(lines(title, meaning, [query], unit=unit, alias=alias))
    made.with_panel(losses(_CHOSEN))
    return made
