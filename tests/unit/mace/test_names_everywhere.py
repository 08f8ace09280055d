"""Names that imitate markup or control sequences stay plain text in every output."""

import csv
import io
import json
import logging
import re
import unicodedata
from contextlib import closing
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.text import Text
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from collector.perfetto.wire import PacketReader
from contracts import strict_json
from contracts.config import PrometheusConfig
from contracts.figures import DevicePlace, Distribution, Summary
from contracts.names import printable, text, text_of
from contracts.schema import Segment
from contracts.topology import Device, Sighting, Topology
from contracts.vitals import Vitals
from contracts.wire import Decoder, Encoder
from mace import cli
from mace.shown import lines, logs, plots, tables, terminal
from storage.lines import Budget, StreamLines, key
from storage.perfetto.file import PerfettoTrace
from storage.perfetto.sink import HostTracks
from storage.prometheus import Endpoint
from storage.query import Series, TypicalPath
from tests.made_results import HEADER, HOST_NETNS, make_delays, make_results, make_windows
from tests.nasty_names import NASTY, named_devices
from tests.unit.storage.stored import fill

DEVICES = named_devices(NASTY)
DELAYS = make_delays(12 * len(NASTY), containers=len(NASTY))
RESULTS = make_results(DELAYS, devices=DEVICES, windows=make_windows(DELAYS))
CLEAN = [text(name) for name in NASTY]
NAMED = {text(name) or "none" for name in NASTY}
ODD_HEADER = replace(HEADER, host="h,=\\[red]\x1b", command=("mace", "run", "\udcff", "[/]"))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("named") / "store [red]"
    fill(path, [RESULTS], head=ODD_HEADER)
    return path


def is_safe(shown):
    """Return whether a terminal shows the text unchanged: only visible characters and newlines."""
    return all(c.isprintable() or c == "\n" for c in shown)


# The rules.


@pytest.mark.parametrize("name", NASTY)
def test_shown_names_are_printable_and_distinct(name):
    shown = printable(name)
    assert shown.isprintable()
    assert shown == name or not name.isprintable()
    assert sum(printable(other) == shown for other in NASTY) == 1


@pytest.mark.parametrize("name", NASTY)
def test_stored_names_are_unicode(name):
    assert text(name).encode().decode() == text(name)
    assert "\0" not in text(name)
    assert text(name) == name or "\0" in name or re.search("[\ud800-\udfff]", name)
    assert text(text(name)) == text(name)


@settings(max_examples=200)
@given(st.text(max_size=20))
def test_any_text_is_shown_safely(name):
    assert printable(name).isprintable()
    # No control, format or unassigned characters, and no separator but the space.
    assert not {c for c in printable(name) if unicodedata.category(c)[0] in "CZ"} - {" "}


@settings(max_examples=200)
@given(st.binary(max_size=15), st.binary(max_size=15))
def test_names_of_different_bytes_stay_different(one, other):
    if b"\\" not in one + other:
        assert (text_of(one) == text_of(other)) == (one == other)


def test_a_device_and_its_sighting_have_the_same_name():
    raw = b"e\xff\x80"
    assert Device(1, 2, raw.decode("utf-8", "surrogateescape"), "").name == Sighting(text_of(raw)).name == "e\\xff\\x80"


# Output for people.


@pytest.mark.slow
@pytest.mark.parametrize("console", [Console, terminal.PlainConsole])
def test_tables(console, monkeypatch):
    """Tables show names as text on any console of Rich."""
    file = io.StringIO()
    made = console() if console is terminal.PlainConsole else console(markup=True)
    made.file, made.width = file, 400
    summary = Summary()
    summary.add(RESULTS)
    summary.note = "\x1b[31m[/]"
    tables.show(summary, made)
    shown = file.getvalue()
    assert is_safe(shown)
    for name in NASTY:
        if name:
            assert printable(name) in shown
    assert "\\x1b[31m[/]" in shown


@pytest.mark.slow
def test_reports(store, capsys):
    for argv in (["--runs"], ["--worst", "3"], []):
        assert cli.main(["report", "--store", str(store), *argv]) == 0
        shown = capsys.readouterr().out
        assert is_safe(shown)
    for name in filter(None, NASTY):
        assert printable(name)[:20] in shown  # the table folds its cells


def test_a_query_as_a_table(store, capsys):
    assert cli.main(["query", "--store", str(store), 'SELECT DISTINCT container AS "[/x]" FROM delays']) == 0
    shown = capsys.readouterr().out
    assert is_safe(shown)
    assert shown.startswith("[/x]")
    for name in filter(None, NASTY):
        assert printable(name)[:150] in shown


@pytest.mark.slow
def test_plots_and_web_pages(store, tmp_path, capsys):
    page, picture = tmp_path / "x.html", tmp_path / "x.png"
    argv = ["report", "--store", str(store), "--html", str(page), "--png", str(picture)]
    assert cli.main(argv) == 0, capsys.readouterr().err
    assert picture.stat().st_size > 10_000
    html = page.read_text()
    assert is_safe(html)
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "$x^$" in html


@pytest.mark.slow
@pytest.mark.parametrize("name", ["$x^$", "_hidden", "😀", "\\$a$", "<script>alert(1)</script>", "\x1b[31m", "\ufeff"])
def test_a_plot_of_one_name(name):
    place = DevicePlace.of(replace(DEVICES[0], name=name, container=name), 0)
    delays = Distribution()
    delays.add(1, 1000, 1000, 1000, np.array([100]), np.array([1]))
    direction = next(iter(RESULTS.rows.windows)).direction
    path = TypicalPath("h", name, name, direction, [(place, Segment.DEVICE, delays)])
    series = [Series(name, direction, [1, 2], [3, 4], [5, 6], 1)]
    figure = plots.figure(Summary(), [path], series, title=name)
    data = io.StringIO()
    with plots.drawing():
        figure.savefig(data, format="svg")
    assert is_safe(data.getvalue())
    assert "<script" not in data.getvalue()
    told = [each.get_text() for each in figure.findobj(Text) if printable(name) in each.get_text()]
    # Title, legend of either picture, the waterfall's title and its hop.
    assert len(told) >= 5
    assert not any(each.get_parse_math() for each in figure.findobj(Text) if printable(name) in each.get_text())


@pytest.mark.parametrize("name", [*NASTY, "\x1b[31m\n[/]"])
def test_warnings_log_lines_and_errors(name, capsys):
    terminal.warn(terminal.PlainConsole(stderr=True, width=400), [f"w{name}w"])
    lines.line(f"l{name}l")
    lines.complaint(f"c{name}c")
    assert cli.main(["query", "--store", f"/nosuch{name.replace(chr(0), '')}", "SELECT 1"]) == 1
    out, err = capsys.readouterr()
    assert out == f"l{printable(name)}l\n"
    assert is_safe(out + err)
    assert err.count("\n") == 3
    assert f"w{printable(name)}w" in err


def test_log_lines_are_lines(capsys, monkeypatch):
    logger = logging.getLogger("test_names")
    logger.propagate = False
    handler = logs._Shown(debug=False)
    monkeypatch.setenv("COLUMNS", "200")
    logger.addHandler(handler)
    try:
        logger.warning("host %s says nothing", "x\x1b[31m\nmace: forged [/]")
        try:
            raise ValueError("\x1b[2J")
        except ValueError:
            logger.exception("failed")
    finally:
        logger.removeHandler(handler)
    err = capsys.readouterr().err
    assert is_safe(err)
    assert err.splitlines()[0].rstrip().endswith("host x\\x1b[31m\\nmace: forged [/] says nothing")
    assert "ValueError: \\x1b[2J" in err


# Output for programs.


def test_json(store, capsys):
    assert cli.main(["report", "--store", str(store), "--json"]) == 0
    out = capsys.readouterr().out
    assert out.isascii()
    assert {row["container"] for row in json.loads(out)["overhead"]} == NAMED
    assert cli.main(["query", "--store", str(store), "SELECT DISTINCT container, device FROM delays", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {device for _, device in rows} >= set(CLEAN)


def test_csv_and_parquet(store, tmp_path, capsysbinary):
    sql = "SELECT DISTINCT container FROM delays WHERE role = 'inner' AND container != ''"
    assert cli.main(["query", "--store", str(store), sql, "--format", "csv"]) == 0
    out = capsysbinary.readouterr().out.decode()
    assert is_safe(out)
    assert out.count("\n") == 1 + len(NASTY)
    assert {row[0] for row in csv.reader(io.StringIO(out))} == {"container"} | {printable(name) for name in NAMED}
    assert cli.main(["query", "--store", str(store), sql, "--parquet", str(tmp_path / "x.parquet")]) == 0
    assert set(pq.read_table(tmp_path / "x.parquet")["container"].to_pylist()) == NAMED


def influx_reads(line):
    """Tags of a line as InfluxDB reads them: a backslash escapes `,`, `=` and a space, and is itself elsewhere."""
    series = re.match(r"(?:\\.|[^ \\]|\\)+?(?= )", re.sub(r"\\([, =])", lambda m: f"\\{ord(m[1]):03d}", line))[0]
    tags = dict(part.split("=", 1) for part in series.split(",")[1:])
    return {k: re.sub(r"\\(044|032|061)", lambda m: chr(int(m[1])), v) for k, v in tags.items()}


def victoria_reads(line):
    """Tags of a line as VictoriaMetrics reads them: a backslash escapes itself, too."""
    tags, part, at = [], "", 0
    while line[at] != " ":
        if line[at] == "\\" and line[at + 1] in ",= \\":
            part += {",": "\ue000", "=": "\ue001"}.get(line[at + 1], line[at + 1])
            at += 2
        elif line[at] == ",":
            tags.append(part)
            part, at = "", at + 1
        else:
            part, at = part + line[at], at + 1
    pairs = (tag.split("=", 1) for tag in [*tags[1:], part])
    return {k: v.replace("\ue000", ",").replace("\ue001", "=") for k, v in pairs}


@pytest.mark.parametrize("name", NASTY)
def test_line_protocol(name):
    """Lines are parsed as both databases document it; tests/integration/test_influxdb.py uses real servers."""
    line = key("rtt", {"host": "h", "container": name, "tool": "t"}) + " seq=1i 1\n"
    assert line.count("\n") == 1
    found = influx_reads(line)
    assert found == victoria_reads(line)
    assert found == {"host": "h", "tool": "t"} | ({"container": found["container"]} if name else {})
    plain = not re.search(r"[\x00-\x1f\x7f\\]|[\ud800-\udfff]", name)
    assert not plain or found.get("container", "") == name


def test_line_protocol_keeps_names_apart():
    lines = {key("rtt", {"container": name}) for name in NASTY}
    assert len(lines) == len(NASTY)


def test_lines_of_packets_have_the_tags_they_should():
    lines = StreamLines(ODD_HEADER, Budget(10_000))
    made = b"".join(bytes(each.data) for each in lines.packets(DELAYS, DEVICES, 1 << 20)).decode().split("\n")[:-1]
    assert len(made) == len(DELAYS)
    names = {"host", "container", "netns", "device", "kind", "direction", "segment", "source", "grade", "slot"}
    assert all(set(victoria_reads(line)) <= names for line in made)


@pytest.mark.slow
def test_prometheus():
    endpoint = Endpoint(PrometheusConfig(listen="127.0.0.1:0"), Vitals())
    endpoint.add(ODD_HEADER, RESULTS)
    for accept in ("", "application/openmetrics-text; version=1.0.0"):
        body, _ = endpoint.metrics(accept)
        assert b"\0" not in body
    families = text_string_to_metric_families(endpoint.metrics("")[0].decode())
    samples = [s for f in families for s in f.samples if s.name == "mace_device_delay_seconds_count"]
    assert {s.labels["container"] for s in samples} == NAMED | {""}
    assert {s.labels["host"] for s in samples} == {ODD_HEADER.host}


def test_perfetto(tmp_path):
    trace = PerfettoTrace(tmp_path / "x.pftrace")
    tracks = HostTracks(trace, ODD_HEADER)
    tracks.devices(DEVICES)
    tracks.windows(RESULTS.rows.windows)
    tracks.finish()
    trace.close()
    with closing(PacketReader(tmp_path / "x.pftrace")) as reader:
        raw = b"".join(packet.data for packet in reader)
    for name in NAMED:
        assert f"container {name}".encode() in raw


def test_the_wire():
    encoder, decoder = Encoder(), Decoder()
    topology = Topology(0, HOST_NETNS, DEVICES)
    found = [decoder.frame(frame) for frame in (encoder.header(ODD_HEADER), encoder.topology(topology))]
    assert found == [ODD_HEADER, topology]


def test_arrow_over_mqtt(tmp_path):
    from storage import tables

    made = tables.delays_table(ODD_HEADER, DELAYS, DEVICES)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, made.schema) as writer:
        writer.write_table(made)
    back = pa.ipc.open_stream(sink.getvalue()).read_all()
    assert set(back["container"].to_pylist()) == NAMED | {""}
    assert set(back["host"].to_pylist()) == {ODD_HEADER.host}


# Strict JSON.


@pytest.mark.slow
@settings(max_examples=200)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=())),
        lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=3), inside, max_size=3),
        max_leaves=8,
    )
)
def test_json_is_strict(value):
    def refuse(what):
        raise AssertionError(what)

    told = strict_json.dumps(value)
    assert told.isascii()
    json.loads(told, parse_constant=refuse)
    assert not re.search(r"\\ud[89a-f]", re.sub(r"\\ud[89ab]..\\ud[c-f]..", "", told.replace("\\\\", "")))


def test_json_of_numbers_of_numpy():
    assert strict_json.dumps([np.float64("inf"), np.float64(1.5)]) == "[null,1.5]"
    with pytest.raises(TypeError):
        strict_json.dumps(object())
