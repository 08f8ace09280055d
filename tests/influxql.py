"""Extracts the dashboards' queries from Grafana's JSON, and parses as much of their InfluxQL as tests need."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.places import ROOT

FOLDER = ROOT / "dashboards/json"
FILES = sorted(FOLDER.glob("*.json"))


@dataclass(frozen=True)
class PanelQuery:
    """One query of a panel, or of a variable."""

    where: str
    text: str
    panel: dict[str, Any]
    is_variable: bool = False


def asked(path: Path) -> Iterator[PanelQuery]:
    """Return all queries of a dashboard."""
    content = json.loads(path.read_text())
    for panel in content["panels"]:
        for target in panel["targets"]:
            yield PanelQuery(f"{path.stem}: {panel['title']} {target['refId']}", target["query"], panel)
    for variable in content["templating"]["list"]:
        if variable["type"] == "query":
            yield PanelQuery(f"{path.stem}: ${variable['name']}", variable["query"], variable, is_variable=True)


ALL = [one for path in FILES for one in asked(path)]


@dataclass
class Parts:
    """A query without its subqueries: identifiers by the clause in which they occur."""

    measurement: str
    fields: list[tuple[str, str]]
    """(function or "", name) of each field in the SELECT clause."""
    aliases: list[str]
    tags: list[str]
    """Names of tags in the WHERE and GROUP BY clauses."""
    fixed: dict[str, str]
    inner: "Parts | None" = None


_QUERY = re.compile(
    r'SELECT (?P<values>.*?) FROM (?:"(?P<measurement>\w+)"|\((?P<inner>.*)\))'
    r"(?: WHERE (?P<where>.*?))?(?: GROUP BY (?P<by>.*?))?(?: fill\(none\))?(?P<tail> ORDER BY time DESC LIMIT \d+)?"
)


def take_apart(text: str) -> Parts:
    """Parse a query; raises `ValueError` for text that does not look like a query of the dashboards."""
    match = _QUERY.fullmatch(text)
    if match is None:
        raise ValueError(f"not understood: {text}")
    values = match["values"]
    aliases = re.findall(r' AS "([^"]+)"', values)
    without = re.sub(r' AS "[^"]+"', "", values)
    fields = re.findall(r'(?:(\w+)\()?"(\w+)"', without)
    condition = match["where"] or ""
    return Parts(
        measurement=match["measurement"] or "",
        fields=fields,
        aliases=aliases,
        tags=re.findall(r'"(\w+)" =', condition) + re.findall(r'"(\w+)"', match["by"] or ""),
        fixed=dict(re.findall(r"\"(\w+)\" = '([^']*)'", condition)),
        inner=take_apart(match["inner"]) if match["inner"] else None,
    )


def as_grafana_would(text: str, *, interval_s: int, since_ns: int, until_ns: int, chosen: dict[str, str]) -> str:
    """Return the query as Grafana sends it, with macros and variables replaced."""
    text = text.replace("$timeFilter", f"time >= {since_ns} AND time <= {until_ns}")
    text = text.replace("$__interval_ms", str(interval_s * 1000)).replace("$__interval", f"{interval_s}s")
    for name, value in chosen.items():
        text = re.sub(rf"\${name}\b", lambda _, value=value: value, text)
    if "$" in text.replace("$/", ""):
        raise ValueError(f"something is left for Grafana to replace: {text}")
    return text
