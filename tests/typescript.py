"""Types that others publish in TypeScript, fetched once from npm: what their software takes, as they see it."""

import json
import re
import subprocess
from pathlib import Path

from tests.kernel import kernels

CONTRACT = Path(__file__).with_name("contract")
GRAFANA = "11.6.0"
"""The Grafana of the SDK's schema and of the image in docker-compose.yml."""
PACKAGES = (
    f"@grafana/schema@{GRAFANA}",
    "kubernetes-types@1.30.0",
    "ts-json-schema-generator@2.4.0",
    "ajv@8.20.0",
)


def modules() -> Path:
    """A node_modules with PACKAGES, in the cache. Raises `kernels.KernelUnavailable`."""
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
    """What is wrong in each of the objects, if they are to be of that type."""
    return json.loads(_node("held_to_types.cjs", path, kind, given=json.dumps(values, default=str)))


def dashboards_held_to(files: list[Path]) -> dict[str, list[str]]:
    """What is wrong in each file, for Grafana's types of dashboards and of our kinds of panels."""
    return json.loads(_node("dashboard_schema.cjs", *files))


def _node(script: str, *args: str | Path, given: str = "") -> str:
    return subprocess.run(
        ["node", CONTRACT / script, modules(), *args],
        input=given, capture_output=True, text=True, timeout=240, check=True,
    ).stdout  # fmt: skip
