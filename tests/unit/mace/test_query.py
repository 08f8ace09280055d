import io
import json
import sys

import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from mace import cli
from mace.errors import UsageError
from storage import sql, tables
from storage.query import Store
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
    """Run `mace query` on the store; status, stdout and stderr as text."""

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
    table = pyarrow.csv.read_csv(io.BytesIO(query(COUNT, "--csv")[1].encode()))
    assert [[r["container"], r["n"]] for r in table.to_pylist()] == [row[:2] for row in found["rows"]]
    assert query(COUNT, "--parquet", tmp_path / "out.parquet")[0] == 0
    assert pq.read_table(tmp_path / "out.parquet")["n"].to_pylist() == [row[1] for row in found["rows"]]


def test_a_table_for_people_and_its_end(query):
    _, out, _ = query("SELECT packet, delay_ns FROM delays")
    assert "rows" in out.splitlines()[-1]
    assert len(out.splitlines()) <= 1003


def test_sql_from_stdin(query, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("SELECT 7 AS seven"))
    assert json.loads(query("-", "--json")[1]) == {"columns": ["seven"], "rows": [[7]]}


def test_lists_nulls_and_what_json_does_not_know(query):
    _, out, _ = query(
        "SELECT [1, 2] AS l, NULL AS n, 'nan'::DOUBLE AS f, DATE '2025-01-02' AS d, 5::HUGEINT AS h", "--json"
    )
    assert json.loads(out)["rows"] == [[[1, 2], None, None, "2025-01-02", 5]]
    assert '"[1, 2]"' in query("SELECT [1, 2] AS l", "--csv")[1]


def test_every_table_can_be_asked_also_where_it_is_empty(path):
    for name, columns in tables.COLUMNS.items():
        assert sql.table(Store(path), f"FROM {name} LIMIT 0").column_names == [c.name for c in columns]


def test_tables_and_columns_are_listed(query):
    assert "delay_ns" in query()[1]
    assert set(json.loads(query("--json")[1])["tables"]) == set(tables.COLUMNS)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("SELECT delay FROM delays", "did you mean 'delays'|did you mean 'delay_ns'"),
        ("SELECT contaner FROM delays", "did you mean 'container'"),
        ("FROM delay", "did you mean 'delays'"),
        ("FROM nothing_like_it", "there are delays, windows, ledger, runs, cost"),
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
def test_what_is_refused_is_told_in_one_line(query, path, text, told):
    with pytest.raises(UsageError, match=told):
        sql.table(Store(path), text)
    status, out, err = query(text, "--json")
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1


def test_no_store(tmp_path):
    assert cli.main(["query", "SELECT 1", "--store", str(tmp_path / "none")]) == 1
