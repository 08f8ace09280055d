"""Apache Spark reads a store with its defaults, on a cluster of two worker processes of its own.

spark_read          s, from the start of a process to its end: Spark reads every table, and the median of each device's
                    delays; the peer does the same with DuckDB

Times to the nanosecond, delays and numbers of packets of all rows are compared, in each table; a difference is an
error. PySpark (500 MB, with Spark itself) is installed into the cache on the first run, and nowhere else.
"""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

import duckdb

from contracts.cpus import CpuCounters, CpuReadings
from contracts.errors import Unavailable
from storage import segments
from storage.embedded import EmbeddedStore
from storage.tables import COLUMNS
from tests.benchmark.figures import figure, folder
from tests.kernel.kernels import cache_dir
from tests.made_results import HEADER, START_NS, make_delays, make_results, make_windows, with_rows
from tests.made_trips import made_trips

VERSION: Final = "4.3.0"
PY4J: Final = "0.10.9.9"
"""The version that PySpark's `Requires-Dist` names."""
PACKETS: Final = 20_000
CONTAINERS: Final = 4
BATCH_ROWS: Final = 16_384
LIMIT_S: Final = 900
MEDIANS: Final = (
    "SELECT device, direction, percentile_disc(0.5) WITHIN GROUP (ORDER BY delay_ns) AS p50_ns FROM delays"
    " WHERE segment = 'device' GROUP BY device, direction ORDER BY device, direction"
)
SUMS: Final = "count(*), bit_xor({ns}), CAST(sum({ns} % 1000003 * ({other} % 1000003)) AS BIGINT)"
"""Of each table: rows, times, and times with another number of the same row. The prime keeps products in 64 bits."""
OTHER: Final = {
    "delays": "delay_ns",
    "windows": "sum_ns",
    "ledger": "records",
    "runs": "monotonic_ns",
    "cpus": "processed",
    "round_trips": "coalesce(nic_rtt_ns, 0)",
}
SESSION: Final = """
import json, sys
from pyspark.sql import SparkSession

asked = json.loads(sys.argv[1])
spark = (
    SparkSession.builder.master("local-cluster[2,1,768]").config("spark.executor.memory", "768m")
    .config("spark.ui.enabled", "false")
    .config("spark.driver.host", "127.0.0.1").config("spark.driver.bindAddress", "127.0.0.1")
    .config("spark.sql.session.timeZone", "UTC").getOrCreate()
)
found = {}
for name, (view, path, sql) in asked.items():
    spark.read.parquet(path).createOrReplaceTempView(view)
    found[name] = [list(row) for row in spark.sql(sql).collect()]
spark.stop()
print(json.dumps(found))
"""


def run() -> list[dict[str, Any]]:
    library = _pyspark()
    with folder() as place:
        store = place / "store"
        asyncio.run(_fill(store))
        tables = [table for table in COLUMNS if (store / table).is_dir()]
        assert set(tables) == set(OTHER), tables
        begin = time.perf_counter()
        by_spark = _spark(library, store, tables, place)
        spark_s = time.perf_counter() - begin
        begin = time.perf_counter()
        by_duckdb = _duckdb(store, tables)
        duckdb_s = time.perf_counter() - begin
    for name, rows in by_duckdb.items():
        assert by_spark[name] == rows, f"{name}: Spark found {by_spark[name]}, DuckDB {rows}"
    return [figure("spark_read", "s", [spark_s], "DuckDB", duckdb_s)]


def _pyspark() -> Path:
    """Return the folder with PySpark, installed on the first call. Raises `Unavailable` if that fails."""
    library = cache_dir().parent / f"pyspark-{VERSION}"
    if not (library / "pyspark").is_dir():
        installing = library.with_name(f"{library.name}.{os.getpid()}")
        wanted = (f"pyspark=={VERSION}", f"py4j=={PY4J}")
        pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", installing, *wanted)
        done = subprocess.run(pip, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Unavailable("PySpark", f"pip cannot install it: {done.stderr.strip().splitlines()[-1]}")
        installing.rename(library)
    return library


async def _fill(path: Path) -> None:
    """Write a store with small segments and merged ones, of all tables that a machine without probes has."""
    readings = CpuReadings([CpuCounters(START_NS + 123_456_789, 0, 10, 1, 0)])
    delays = make_delays(PACKETS, containers=CONTAINERS)
    sink = EmbeddedStore(path, fsync=False, flush_interval_s=60.0, flush_rows=BATCH_ROWS, cpus=lambda: readings)
    await sink.open(HEADER)
    for at in range(0, len(delays), BATCH_ROWS):
        part = delays[at : at + BATCH_ROWS]
        results = make_results(part, containers=CONTAINERS, windows=make_windows(part[:200]))
        await sink.write(with_rows(results))
        if at == 0:
            sink.add_round_trips(made_trips())
    await sink.aclose()
    EmbeddedStore(path, fsync=False).merge()


def _asked(store: Path, tables: list[str], ns: str) -> dict[str, tuple[str, Path, str]]:
    """Return name → (view, folder, SQL)."""
    asked = {
        each: (each, store / each, f"SELECT {SUMS.format(ns=ns, other=OTHER[each])} FROM {each}") for each in tables
    }
    return asked | {"medians": ("delays", store / "delays", MEDIANS)}


def _spark(library: Path, store: Path, tables: list[str], place: Path) -> Any:
    asked = _asked(store, tables, "(unix_micros(time) * 1000 + time_remainder_ns)")
    (place / "session.py").write_text(SESSION, encoding="utf-8")
    environment = {
        "PYTHONPATH": str(library),
        "SPARK_HOME": str(library / "pyspark"),
        "SPARK_LOCAL_IP": "127.0.0.1",
        "PYSPARK_PYTHON": sys.executable,
    }
    done = subprocess.run(
        [sys.executable, place / "session.py", json.dumps(asked, default=str)],
        env=os.environ | environment,
        cwd=place,
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_S,
    )
    shutil.rmtree(library / "pyspark" / "work", ignore_errors=True)  # the workers' logs, which Spark puts there
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def _duckdb(store: Path, tables: list[str]) -> dict[str, list[list[Any]]]:
    """Return the same with DuckDB, from the live segments' paths."""
    asked = _asked(store, tables, "(epoch_us(time) * 1000 + time_remainder_ns)")
    found = {}
    with duckdb.connect() as connection:
        for name, (view, _, sql) in asked.items():
            paths = ", ".join(f"'{each.path}'" for each in segments.listing(store, view))
            connection.execute(
                f"CREATE OR REPLACE TEMP VIEW {view} AS FROM read_parquet([{paths}], hive_partitioning = false)"
            )
            found[name] = [list(row) for row in connection.execute(sql).fetchall()]
    return found
