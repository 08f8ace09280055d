"""Write every dashboard as JSON for Grafana: `python -m dashboards`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Final

from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.cog.encoder import JSONEncoder

from dashboards import baseline, fleet, overview, path, pipeline, rtt

JSON: Final = Path(__file__).with_name("json")
DASHBOARDS: Final[dict[str, Callable[[], build.Dashboard]]] = {
    "overview": overview.make,
    "path": path.make,
    "rtt": rtt.make,
    "baseline": baseline.make,
    "fleet": fleet.make,
    "pipeline": pipeline.make,
}

_OF_INTERVALS: Final = ("auto", "auto_min", "auto_count")
"""Keys that the SDK writes into every variable, although Grafana's schema allows them in interval variables only."""


def text(make: Callable[[], build.Dashboard]) -> str:
    """Return a dashboard as JSON text; the same code gives the same text."""
    made = make().build()
    for number, panel in enumerate(made.panels or [], 1):
        panel.id_val = number  # keeps links to a panel valid
    plain = json.loads(json.dumps(made, cls=JSONEncoder))
    for variable in plain["templating"]["list"]:
        for key in _OF_INTERVALS:
            variable.pop(key, None)
    return json.dumps(plain, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for name, make in DASHBOARDS.items():
        (JSON / f"{name}.json").write_text(text(make))
