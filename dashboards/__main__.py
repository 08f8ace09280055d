"""Write every dashboard as Grafana reads it: `python -m dashboards`."""

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
"""The SDK writes these into every variable; Grafana's own schema knows them in variables of type interval only."""


def text(make: Callable[[], build.Dashboard]) -> str:
    """The dashboard as JSON, the same for the same code."""
    made = make().build()
    for number, panel in enumerate(made.panels or [], 1):
        panel.id_val = number  # so that a link to a panel stays good
    plain = json.loads(json.dumps(made, cls=JSONEncoder))
    for variable in plain["templating"]["list"]:
        for key in _OF_INTERVALS:
            variable.pop(key, None)
    return json.dumps(plain, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for name, make in DASHBOARDS.items():
        (JSON / f"{name}.json").write_text(text(make))
