"""Checks data against the TypeScript types that other projects publish, fetched once from npm."""

import json
import re
import subprocess
from pathlib import Path

from tests.kernel import kernels

CONTRACT = Path(__file__).with_name("contract")
GRAFANA = "11.6.0"
"""Version of Grafana: that of the SDK's schema and of the image in docker-compose.yml."""
PACKAGES = (
    f"@grafana/schema@{GRAFANA}",
    "kubernetes-types@1.30.0",
    "ts-json-schema-generator@2.4.0",
    "ajv@8.20.0",
)


def modules() -> Path:
    """Return a node_modules directory with PACKAGES in the cache; raises `kernels.KernelUnavailable`."""
    place = kernels.cache_dir().parent / "npm" / re.sub(r"[^\w.-]+", "-", "-".join(PACKAGES))
    with kernels.locked("npm"):
        if not (place / "node_modules").is_dir():
            place.parent.mkdir(exist_ok=True)
            with kernels.scratch("npm") as folder:
                # No scripts: none of them needs one, and a package's script may do anything.
                kernels.run(
                    ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", folder, *PACKAGES],
                    what="types from npm",
                )
                place.mkdir(exist_ok=True)
                # TypeScript finds packages by this name.
                (folder / "node_modules").rename(place / "node_modules")
    return place / "node_modules"


def held_to(path: str, kind: str, values: list[object]) -> list[list[str]]:
    """Return for each object the errors against a type."""
    return json.loads(_node("held_to_types.cjs", path, kind, given=json.dumps(values, default=str)))


def dashboards_held_to(files: list[Path]) -> dict[str, list[str]]:
    """Return for each file the errors against Grafana's types of dashboards and of the panels that MACE uses."""
    return json.loads(_node("dashboard_schema.cjs", *files))


def _node(script: str, *args: str | Path, given: str = "") -> str:
    return subprocess.run(
        ["node", CONTRACT / script, modules(), *args],
        input=given, capture_output=True, text=True, timeout=240, check=True,
    ).stdout  # fmt: skip
