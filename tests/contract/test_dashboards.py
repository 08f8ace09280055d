"""Grafana dashboards: made by their code, valid for Grafana, in the catalogue's words, and honest about losses.

Every query is run on a real InfluxDB by tests/integration/test_dashboards.py.
"""

import json
import re
from pathlib import Path

import pytest
import yaml

from contracts.metrics import MEASUREMENTS, FieldKind
from dashboards.__main__ import DASHBOARDS, text
from tests import influxql
from tests.influxql import ALL, FILES, PanelQuery, Parts, take_apart
from tests.places import ROOT
from tests.typescript import GRAFANA, dashboards_held_to


def test_committed_json_is_what_the_code_makes():
    assert {path.stem for path in FILES} == set(DASHBOARDS)
    for name, make in DASHBOARDS.items():
        made = text(make)
        assert (influxql.FOLDER / f"{name}.json").read_text() == made, f"{name}: run python -m dashboards"


@pytest.mark.slow
@pytest.mark.needs("npm")
def test_grafana_s_own_types_accept_them(tmp_path):
    content = json.loads(FILES[0].read_text())
    # Each of these is a mistake of the kind that Grafana passes over in silence.
    broken = {
        "key": {**content, "panles": []},
        "panel": {**content, "panels": [{**content["panels"][0], "gridPos": {"x": 0, "y": 0, "w": "wide", "h": 4}}]},
        "option": {**content, "panels": [{**content["panels"][0], "options": {"graphMode": "nonsense"}}]},
    }
    wrong = [tmp_path / f"{name}.json" for name in broken]
    for path in wrong:
        path.write_text(json.dumps(broken[path.stem]))
    found = dashboards_held_to([*FILES, *wrong])
    assert {path.stem: found[str(path)] for path in FILES} == {path.stem: [] for path in FILES}
    assert all(found[str(path)] for path in wrong), found


# --- the catalogue ------------------------------------------------------------------------------

# What may be done with a number to show one for many. A mean of quantiles is no quantile, a maximum of counts no count.
ALLOWED = {
    FieldKind.SAMPLE: {"", "percentile", "count", "max"},
    FieldKind.COUNTER: {"last", "max"},
    FieldKind.GAUGE: {"last", "max"},
    FieldKind.HISTOGRAM: set(),
}
OF_WINDOWS = {"count": {"sum"}, "sum_ns": {"sum"}, "min_ns": {"min"}, "max_ns": {"max"}}


def innermost(parts: Parts) -> Parts:
    return innermost(parts.inner) if parts.inner else parts


def wrong_in(query: str) -> list[str]:
    """All that the catalogue has against a query."""
    parts = take_apart(query)
    wrong = []
    core = innermost(parts)
    if core.measurement not in MEASUREMENTS:
        return [f"no measurement {core.measurement}"]
    measurement = MEASUREMENTS[core.measurement]
    kinds = {field.name: field.kind for field in measurement.fields}
    wrong += [f"{core.measurement} has no tag {tag}" for tag in core.tags if tag not in measurement.tags]
    for function, name in core.fields:
        if not function and name in measurement.tags:
            continue
        if name not in kinds:
            wrong.append(f"{core.measurement} has no field {name}")
            continue
        may = OF_WINDOWS.get(name, {"max"}) if kinds[name] is FieldKind.WINDOW else ALLOWED[kinds[name]]
        if function not in may:
            wrong.append(f"{function or 'nothing'} of {name}, a {kinds[name]}")
    if core.measurement == "device_window" and "width_s" not in core.fixed:
        wrong.append("windows of both widths: every delay counts twice")
    if core.measurement == "mace_internal" and "part" not in core.fixed:
        wrong.append("mace_internal without its part")
    while parts.inner:
        wrong += [f"{name} is not of the subquery" for _, name in parts.fields if name not in parts.inner.aliases]
        parts = parts.inner
    return wrong


@pytest.mark.parametrize("one", [one for one in ALL if not one.is_variable], ids=lambda one: one.where)
def test_every_query_keeps_to_the_catalogue(one: PanelQuery):
    assert wrong_in(one.text) == []


def test_the_catalogue_would_notice():
    def query(values, measurement="device_window", where="$timeFilter AND \"width_s\" = '10'", by='"host"'):
        return f'SELECT {values} AS "x" FROM "{measurement}" WHERE {where} GROUP BY {by}'

    assert wrong_in(query('max("p99_ns")')) == []
    assert wrong_in(query('max("p99_us")')) == ["device_window has no field p99_us"]
    assert wrong_in(query('max("p99_ns")', by='"ifindex"')) == ["device_window has no tag ifindex"]
    assert wrong_in(query('max("p99_ns")', where='$timeFilter AND "hsot" =~ /^$host$/'))[0].endswith("no tag hsot")
    assert wrong_in(query('mean("p99_ns")')) == ["mean of p99_ns, a window"]
    assert wrong_in(query('sum("p50_ns")')) == ["sum of p50_ns, a window"]
    assert wrong_in(query('sum("count")', where="$timeFilter")) == ["windows of both widths: every delay counts twice"]
    assert wrong_in(query('max("delay")', "delays")) == ["no measurement delays"]
    inner = query('max("lost")', "mace_internal", "$timeFilter AND \"part\" = 'ledger'")
    assert wrong_in(f'SELECT sum("y") AS "z" FROM ({inner})') == ["y is not of the subquery"]


@pytest.mark.parametrize("one", [one for one in ALL if one.is_variable], ids=lambda one: one.where)
def test_every_variable_asks_for_a_tag(one: PanelQuery):
    match = re.fullmatch(r'SHOW TAG VALUES FROM "(\w+)" WITH KEY = "(\w+)"(?: WHERE (.*))?', one.text)
    assert match, one.text
    tags = MEASUREMENTS[match[1]].tags
    assert match[2] == one.panel["name"]
    assert {match[2], *re.findall(r'"(\w+)" =~', match[3] or "")} <= set(tags)
    assert one.panel["multi"]
    assert one.panel["includeAll"]
    assert one.panel["allValue"] == ".*", "All must also match rows without the tag"


# --- what a reader relies on --------------------------------------------------------------------


def test_variables_that_were_promised():
    names = {path.stem: {one.panel["name"] for one in influxql.asked(path) if one.is_variable} for path in FILES}
    for name in ("overview", "path", "baseline"):
        assert names[name] == {"host", "container", "device", "direction", "source"}
    assert all({"host", "source"} <= found for found in names.values())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_query_chooses_by_every_variable_that_its_measurement_knows(path: Path):
    """Else a choice would leave a panel unmoved that looks as if it obeyed."""
    variables = {one.panel["name"] for one in influxql.asked(path) if one.is_variable}
    of_rows = {"device_window", "device_delay", "overhead", "rtt"}
    for one in influxql.asked(path):
        if one.is_variable:
            continue
        core = innermost(take_apart(one.text))
        if core.measurement not in of_rows:
            continue
        expected = variables & set(MEASUREMENTS[core.measurement].tags)
        if core.measurement == "overhead" or core.fixed.get("segment") == "overhead":
            expected -= {"device"}  # of a whole path; its device is the container's own
        missing = expected - set(core.tags)
        assert not missing, f"{one.where}: does not choose by {', '.join(missing)}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_losses_stand_first(path: Path):
    panels = json.loads(path.read_text())["panels"]
    top = [panel for panel in panels if panel["gridPos"]["y"] == 0]
    shown = {name for panel in top for target in panel["targets"] for _, name in take_apart(target["query"]).fields}
    assert shown == {
        *("lost", "discarded", "unmatched", "ambiguous", "expired", "dropped"),
        *("refused", "over_budget", "dropped_buffer", "dropped_spool"),
    }
    over_time = {name for panel in panels[3:] for t in panel["targets"] for _, name in take_apart(t["query"]).fields}
    assert {"lost", "discarded"} <= over_time


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_panel_says_what_its_numbers_are(path: Path):
    content = json.loads(path.read_text())
    assert len({panel["id"] for panel in content["panels"]}) == len(content["panels"])
    cells = [
        (x, y)
        for panel in content["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells)), "panels overlap"
    assert max(x for x, _ in cells) < 24
    for panel in content["panels"]:
        assert len(panel["description"]) > 20, panel["title"]
        queries = " ".join(target["query"] for target in panel["targets"])
        if re.search(r'max\("p\d', queries):
            assert "cannot be averaged" in panel["description"] or "largest is shown" in panel["description"]
        for target in panel["targets"]:
            assert target["datasource"] == {"type": "influxdb", "uid": "${datasource}"}


def test_provisioning_points_at_what_is_there():
    folder = ROOT / "dashboards/provisioning"
    provider = yaml.safe_load((folder / "dashboards/mace.yaml").read_text())["providers"][0]
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    mounts = dict(mount.split(":")[:2] for mount in compose["services"]["grafana"]["volumes"] if mount.startswith("."))
    inside = {place: source for source, place in mounts.items()}
    assert inside[provider["options"]["path"]] == "./dashboards/json"
    assert inside["/etc/grafana/provisioning"] == "./dashboards/provisioning"
    source = yaml.safe_load((folder / "datasources/mace.yaml").read_text())["datasources"][0]
    assert source["type"] == "influxdb"
    assert source["jsonData"]["version"] == "InfluxQL"
    assert f"grafana:{GRAFANA}" in compose["services"]["grafana"]["image"]
