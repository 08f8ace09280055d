import io
import json
import os
import re
import shutil
import signal
import sys
import threading
import time

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from contracts.errors import UsageError
from mace import cli
from storage import sql, tables
from storage.query import StoreReader
from tests.made_results import make_delays, make_results, make_windows
from tests.unit.storage.stored import fill

COUNT = "SELECT container, count(*) AS n, max(time) AS last FROM delays GROUP BY ALL ORDER BY container"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    made = tmp_path_factory.mktemp("store") / "store"
    delays = make_delays(1000, containers=2)
    fill(made, [make_results(delays, containers=2, windows=make_windows(delays))])
    return made


@pytest.fixture
def query(path, capsysbinary):
    """Run `mace query` on the store; returns status, stdout and stderr as text."""

    def run(*argv):
        status = cli.main(["query", "--store", str(path), *map(str, argv)])
        out, err = capsysbinary.readouterr()
        return status, out.decode(), err.decode()

    return run


def test_json_csv_and_parquet_hold_the_same(query, path, tmp_path):
    status, out, err = query(COUNT, "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["columns"] == ["container", "n", "last"]
    assert sum(n for _, n, _ in found["rows"]) == pq.read_table(path / "delays", partitioning=None).num_rows
    last = found["rows"][0][2]
    assert "T" in last
    assert last.endswith("Z")
    table = pyarrow.csv.read_csv(io.BytesIO(query(COUNT, "--format=csv")[1].encode()))
    assert [[r["container"], r["n"]] for r in table.to_pylist()] == [row[:2] for row in found["rows"]]
    assert query(COUNT, "--parquet", tmp_path / "out.parquet")[0] == 0
    assert pq.read_table(tmp_path / "out.parquet")["n"].to_pylist() == [row[1] for row in found["rows"]]


def test_the_table_and_its_last_line(query):
    _, out, _ = query("SELECT packet, delay_ns FROM delays")
    assert "rows" in out.splitlines()[-1]
    assert len(out.splitlines()) <= 1003


def test_sql_from_stdin(query, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("SELECT 7 AS seven"))
    assert json.loads(query("-", "--json")[1]) == {"columns": ["seven"], "rows": [[7]]}


def test_lists_nulls_and_types_without_json_form(query):
    _, out, _ = query(
        "SELECT [1, 2] AS l, NULL AS n, 'nan'::DOUBLE AS f, DATE '2025-01-02' AS d, 5::HUGEINT AS h", "--json"
    )
    assert json.loads(out)["rows"] == [[[1, 2], None, None, "2025-01-02", 5]]
    assert '"[1, 2]"' in query("SELECT [1, 2] AS l", "--format=csv")[1]


def test_every_table_can_be_queried_even_if_empty(path):
    for name, columns in tables.COLUMNS.items():
        assert sql.table(StoreReader(path), f"FROM {name} LIMIT 0").column_names == [c.name for c in columns]


def test_tables_and_columns_are_listed(query):
    assert "delay_ns" in query()[1]
    assert set(json.loads(query("--json")[1])["tables"]) == set(tables.COLUMNS)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("SELECT delay FROM delays", "did you mean 'delays'|did you mean 'delay_ns'"),
        ("SELECT contaner FROM delays", "did you mean 'container'"),
        ("FROM delay", "did you mean 'delays'"),
        ("FROM nothing_like_it", "there are delays, windows, minutes, ten_minutes, hours, ledger, runs, cost"),
        ("SELEC 1", "syntax error"),
        ("SELECT 1; SELECT 2", "2 SQL statements"),
        ("", "0 SQL statements"),
        ("COPY delays TO '/tmp/stolen.csv'", "only read: expected a SELECT, found COPY"),
        ("CREATE TABLE t AS SELECT 1", "only read"),
        ("DROP VIEW delays", "only read"),
        ("ATTACH '/tmp/other.db'", "only read"),
        ("SET enable_external_access = true", "only read"),
        ("EXPLAIN ANALYZE COPY delays TO '/tmp/stolen.csv'", "only read"),
        ("SELECT * FROM read_csv('/etc/passwd')", "disabled by configuration"),
        ("SELECT 1 / (SELECT count(*) FROM delays WHERE delay_ns = 'x')", "Conversion"),
    ],
)
def test_refusals_have_one_line(query, path, text, told):
    with pytest.raises(UsageError, match=told):
        sql.table(StoreReader(path), text)
    status, out, err = query(text, "--json")
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1


def test_no_store(tmp_path):
    assert cli.main(["query", "SELECT 1", "--store", str(tmp_path / "none")]) == 1


# Every type --------------------------------------------------------------------------------------------------------

TYPES = {
    "'2025-01-02 03:04:05.123456789'::TIMESTAMP_NS": "2025-01-02T03:04:05.123456789",
    "'2025-01-02 03:04:05.5'::TIMESTAMP": "2025-01-02T03:04:05.500000",
    "'2025-01-02 03:04:05'::TIMESTAMP_S": "2025-01-02T03:04:05",
    "'2025-01-02 03:04:05.12'::TIMESTAMP_MS": "2025-01-02T03:04:05.120",
    "'2025-01-02 03:04:05+02'::TIMESTAMPTZ": "2025-01-02T01:04:05.000000Z",
    "'infinity'::TIMESTAMP": "infinity",
    "'-infinity'::TIMESTAMPTZ": "-infinity",
    "'20000-01-01'::TIMESTAMP": "20000-01-01T00:00:00.000000",
    "'2025-01-02'::DATE": "2025-01-02",
    "'infinity'::DATE": "infinity",
    "'-infinity'::DATE": "-infinity",
    "'0044-03-15 (BC)'::DATE": "-0043-03-15",
    "'0001-12-31 (BC)'::DATE": "0000-12-31",
    "'0002-12-31 (BC) 01:02:03'::TIMESTAMPTZ": "-0001-12-31T01:02:03.000000Z",
    "'12001-12-31 (BC)'::DATE": "-12000-12-31",
    "'03:04:05.5'::TIME": "03:04:05.500000",
    "'24:00:00'::TIME": "24:00:00",
    "'03:04:05.5+05:30'::TIMETZ": "03:04:05.5+05:30",
    "INTERVAL '1 month 2 days 3.5 seconds'": "1 month 2 days 00:00:03.5",
    "'\\xAA\\x00a'::BLOB": "\\xAA\\x00a",
    "'10101'::BIT": "10101",
    "'550e8400-e29b-41d4-a716-446655440000'::UUID": "550e8400-e29b-41d4-a716-446655440000",
    "170141183460469231731687303715884105727::HUGEINT": 170141183460469231731687303715884105727,
    "340282366920938463463374607431768211455::UHUGEINT": "340282366920938463463374607431768211455",
    "18446744073709551615::UBIGINT": 18446744073709551615,
    "1.10::DECIMAL(5,2)": "1.10",
    "7::DECIMAL(5,0)": 7,
    "'a'::ENUM('a', 'b')": "a",
    "'inf'::FLOAT": None,
    "'-inf'::DOUBLE": None,
    "'nan'::DOUBLE": None,
    "1.5::FLOAT": 1.5,
    "true": True,
    "NULL": None,
    "'{\"a\": 1}'::JSON": '{"a": 1}',
    "MAP {'a': 1}": [["a", 1]],
    "union_value(num := 1)": 1,
    "{'a': 1}": {"a": 1},
    "[]": [],
    "12345678901234567890123456789012345678901234::BIGNUM": "12345678901234567890123456789012345678901234",
}


def strict(text):
    def refuse(what):
        raise AssertionError(f"{what} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.slow
def test_every_type_at_any_depth_is_strict_json(query):
    columns = ", ".join(
        f"{sql} AS plain{n}, [{sql}, NULL] AS list{n}, {{'x': {sql}}} AS struct{n}, [{{'x': [{sql}]}}] AS deep{n},"
        f" MAP {{1: {sql}}} AS map{n}, union_value(u := {sql}) AS union{n}, array_value({sql}, {sql}) AS array{n}"
        for n, sql in enumerate(TYPES)
    )
    status, out, err = query(f"SELECT {columns}", "--json")
    assert (status, err) == (0, "")
    [row] = strict(out)["rows"]
    for n, (literal, value) in enumerate(TYPES.items()):
        found = row[7 * n : 7 * n + 7]
        expected = [value, [value, None], {"x": value}, [{"x": [value]}], [[1, value]], value, [value, value]]
        assert found == expected, literal
    for form in ("--format=csv", ""):
        status, out, err = query(f"SELECT {columns}", *filter(None, [form]))
        assert (status, err) == (0, "")
        assert not {"NaN", "Infinity", "Timestamp", "datetime", "MonthDayNano"} & set(re.split("[^A-Za-z]+", out))


def test_nulls_and_slices_of_nested_values(query):
    sql = (
        "SELECT CASE WHEN i % 3 = 0 THEN NULL ELSE {'a': i} END AS s, CASE WHEN i % 3 = 1 THEN NULL ELSE [i, NULL] END"
        " AS l, CASE WHEN i % 3 = 2 THEN NULL ELSE MAP {i: 'x'} END AS m FROM range(3000) r(i) ORDER BY i"
    )
    _, out, _ = query(sql, "--json")
    assert strict(out)["rows"] == [
        [
            None if i % 3 == 0 else {"a": i},
            None if i % 3 == 1 else [i, None],
            None if i % 3 == 2 else [[i, "x"]],
        ]
        for i in range(3000)
    ]


@pytest.mark.slow
def test_times_are_the_same_everywhere(query):
    for asked, shown in (
        ("SELECT list(time ORDER BY time) AS t FROM delays", r'\["2025-06-15T15:06:40\.\d{9}Z", "'),
        ("SELECT {'t': time} AS s FROM delays LIMIT 1", r'\{"t": "2025-06-15T15:06:40\.\d{9}Z"\}'),
        ("SELECT time FROM delays LIMIT 1", r"2025-06-15T15:06:40\.\d{9}Z"),
    ):
        for form in ("--format=csv", ""):
            assert re.search(shown, query(asked, *filter(None, [form]))[1].replace('""', '"')), (asked, form)


def test_days_are_those_of_utc(query, monkeypatch):
    columns = "date_trunc('day', min(time)) AS d, extract(hour FROM min(time)) AS h, min(time)::VARCHAR AS v"
    told = set()
    for zone in ("UTC", "America/New_York", "Asia/Kolkata"):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        told.add(query(f"SELECT {columns} FROM delays", "--json")[1])
    monkeypatch.undo()
    time.tzset()
    [one] = told
    assert json.loads(one)["rows"][0][:2] == ["2025-06-15T00:00:00.000000Z", 15]
    assert json.loads(one)["rows"][0][2].endswith("+00")


# Limits -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_is_bounded_and_the_working_directory_unchanged(query, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = query("SELECT list(i) AS l FROM range(100000000) r(i)", "--json", "--memory-mib", 64)
    assert (status, out) == (1, "")
    assert err == "mace: the query needs more than its memory limit of 64 MiB; raise it with --memory-mib\n"
    # A sort that exceeds the memory limit spills to the disk, but not into the working directory.
    sql = "SELECT count(*) AS n FROM (SELECT * FROM range(5000000) r(i) ORDER BY hash(i))"
    assert strict(query(sql, "--json", "--memory-mib", 64)[1])["rows"] == [[5000000]]
    assert not list(tmp_path.iterdir())


ENDLESS = "SELECT count(*) FROM range(1000000000) a(i), range(1000000000) b(j) WHERE hash(i + j) % 7 = 3"


def test_a_query_ends_at_its_time_limit(query):
    assert query(ENDLESS, "--timeout", "0.2") == (1, "", "mace: the query took longer than --timeout allows\n")


@pytest.mark.parametrize("wrong", ["0", "-1", "nan", "x"])
def test_invalid_limits(query, wrong):
    for option in ("--timeout", "--memory-mib"):
        with pytest.raises(SystemExit):
            query("SELECT 1", option, wrong)


def test_ctrl_c_ends_a_query(query):
    """Ctrl-C arrives while DuckDB is working, which its thread's CPU time shows."""

    def interrupt():
        while not any(thread.name.startswith("mace-query") for thread in threading.enumerate()):
            time.sleep(0.01)
        begun = time.process_time()
        while time.process_time() < begun + 0.2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    helper = threading.Thread(target=interrupt, daemon=True)
    helper.start()
    try:
        assert query(ENDLESS)[:2] == (130, "")
    finally:
        helper.join()


# Damage -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(tmp_path):
    made = tmp_path / "broken"
    for run in ("run-1", "run-2"):
        delays = make_delays(500, seed=1)
        fill(made, [make_results(delays)], run)
    segments = sorted((made / "delays").rglob("*.parquet"))
    assert len(segments) > 1
    return made, segments[0]


@pytest.mark.parametrize(
    "damage", [lambda raw: b"", lambda raw: raw[:100], lambda raw: raw[:99] + bytes(999) + raw[1098:]]
)
@pytest.mark.parametrize("form", ["--json", "--format=csv", ""])
def test_a_damaged_segment_is_named_or_skipped_and_counted(broken, damage, form, capfd):
    made, segment = broken
    rows = pq.read_metadata(segment).num_rows
    segment.write_bytes(damage(segment.read_bytes()))
    argv = [
        "query",
        "--store",
        str(made),
        "SELECT count(*) AS n FROM (SELECT DISTINCT * FROM delays)",
        *filter(None, [form]),
    ]
    assert cli.main(argv) == 1
    out, err = capfd.readouterr()
    assert not out
    assert err.startswith(f"mace: {segment}: damaged: ")
    assert err.count("\n") == 1
    assert cli.main([*argv, "--skip-damaged"]) == 0
    assert capfd.readouterr().err == f"1 damaged segments ({rows:,} rows) were skipped\n"


@pytest.mark.slow
def test_foreign_rows_are_reported(tmp_path, path, capsys):
    made = tmp_path / "foreign"
    shutil.copytree(path, made)
    for change in (lambda rows, n: pa.nulls(n, pa.int64()), None):
        segment = next((made / "delays").rglob("*.parquet"))
        rows = pq.ParquetFile(segment).read().replace_schema_metadata(None)  # without a checksum
        column = "delay_ns" if change else "direction"
        values = change(rows, len(rows)) if change else pa.array(["sideways"] * len(rows))
        pq.write_table(rows.set_column(rows.column_names.index(column), column, values), segment)
        assert cli.main(["report", "--store", str(made)]) == 1
        err = capsys.readouterr().err
        assert err.startswith(f"mace: {made}: the store has rows that MACE does not write")
        assert err.count("\n") == 1


@pytest.mark.parametrize("raw", [b"\xff\xfe", b"{", b"[]", b"[" * 100_000, b'{"schema": "1"}', b'{"schema": 99}'])
def test_an_invalid_store_json(tmp_path, raw, capsys):
    (tmp_path / "store.json").write_bytes(raw)
    assert cli.main(["query", "--store", str(tmp_path), "SELECT 1"]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"mace: {tmp_path / 'store.json'}: ") or "schema version" in err
    assert err.count("\n") == 1


def test_types_unknown_to_parquet_are_reported(query, tmp_path):
    file = tmp_path / "x.parquet"
    assert query("SELECT INTERVAL 1 day AS i, '1'::BIT AS b, '01:00:00+02'::TIMETZ AS t", "--parquet", file)[0] == 0
    assert pq.read_table(file).to_pylist() == [{"i": "1 day", "b": "1", "t": "01:00:00+02"}]
    status, _, err = query("SELECT union_value(u := 1) AS u", "--parquet", tmp_path / "y.parquet")
    assert status == 1
    assert err.count("\n") == 1
    assert "y.parquet" in err
