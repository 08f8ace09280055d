"""Measures a lab with the real command line, and queries the rows that it stored."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import duckdb

from collector.ftrace import tracefs
from contracts.ledger import Ledger
from tests.places import ROOT

MACE = (sys.executable, "-m", "mace")
TRACE_INSTANCES = Path("/sys/kernel/tracing/instances")


def mace(*argv, check=True, **options):
    """Run a command to its end, and return the finished process with its output as text."""
    settings = {"capture_output": True, "text": True, "cwd": ROOT, "timeout": 120, **options}
    done = subprocess.run([*MACE, *map(str, argv)], check=False, **settings)
    if check:
        assert done.returncode == 0, done.stderr
    return done


UNMOUNT_TRACEFS = "umount --all --lazy --types tracefs,debugfs"
"""Shell command for a mount namespace of its own; machines differ in where tracefs and debugfs are mounted."""


@contextmanager
def on_one_cpu(cpu=0):
    """What is started here, and with it what its packets pass through, runs on one CPU."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@cache
def well_traced_cpu():
    """Return the first CPU whose switches away from its idle task the kernel records; some kernels lack them on some.

    A tool that wakes on another CPU has waited for it for an unknown time (`correlator.waiting`). A CPU that is never
    idle here lacks nothing.
    """
    instance = tracefs.Instance.create(tracefs.find())
    try:
        instance.enable("sched:sched_switch")
        instance.record(on=True)
        cpus = sorted(os.sched_getaffinity(0))
        for cpu in cpus:
            with on_one_cpu(cpu):
                subprocess.run(["sh", "-c", "sleep 0.02; sleep 0.02; sleep 0.02"], check=True)
        seen = {cpu: (instance.cpu(cpu) / "trace").read_text() for cpu in cpus}
    finally:
        instance.remove()
    counts = {cpu: (text.count(" next_pid=0 "), text.count(" prev_pid=0 ")) for cpu, text in seen.items()}
    good = [cpu for cpu, (to_idle, from_idle) in counts.items() if from_idle or to_idle <= 1]
    assert good, f"this kernel records no switch from an idle task; switches to and from one, by CPU: {counts}"
    return good[0]


def start(*argv, **options):
    """Start a command, which the caller has to end."""
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT, **options}
    return subprocess.Popen([*MACE, *map(str, argv)], **settings)


def trace_instances(pid):
    """Return the names of the trace instances that a process has made and not removed."""
    return [path.name for path in TRACE_INSTANCES.glob(f"mace-{pid}-*")]


class RunningMace:
    """A running `mace run`; `stop` ends it like Ctrl-C and returns its JSON."""

    def __init__(self, lab, folder, *options, start=start):
        self.store, self.capture = folder / "store", folder / "stream.mace"
        self.process = start(
            "run", "--lab", lab.name, "--store", self.store, "--record", self.capture, "--json", *options
        )
        self.found = None
        # The capture's header is written when the source is open, so that the tracer is on. An emulator needs long.
        try:
            wait_for(lambda: self._begun() or self.process.poll() is not None, limit_s=120)
        except AssertionError:
            self.kill()
            raise

    def _begun(self):
        return self.capture.exists() and self.capture.stat().st_size > 0

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        out, err = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, err
        self.found = json.loads(out)
        return self.found

    def kill(self):
        """Kill the command if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()

    def query(self, sql):
        """Return the rows of an SQL query over the tables `delays`, `windows`, `ledger` and `runs`, as tuples."""
        return query(self.store, sql).fetchall()

    def rows(self, **equal):
        """Return rows of `delays` as a list of dicts, filtered by the given values of columns."""
        where = " AND ".join(f"{name} = '{value}'" for name, value in equal.items()) or "true"
        # As an integer: Python's datetime has no nanoseconds.
        found = query(
            self.store,
            "SELECT * EXCLUDE (time, time_remainder_ns), epoch_ns(time) + time_remainder_ns AS utc_ns FROM delays"
            f" WHERE {where}",
        )
        names = [column[0] for column in found.description]
        return [dict(zip(names, row, strict=True)) for row in found.fetchall()]


def query(store, sql):
    """Query the Parquet files of a store with DuckDB, independent of MACE's own reader."""
    database = duckdb.connect()
    for table in ("delays", "windows", "ledger", "runs"):
        if any((store / table).rglob("*.parquet")):
            database.execute(f"CREATE VIEW {table} AS SELECT * FROM {files(store, table)}")
    return database.execute(sql)


def files(store, table):
    """Return the SQL name of a store's table."""
    return f"read_parquet('{store / table}/**/*.parquet', hive_partitioning = false)"


PATHS = """
SELECT packet, direction, l3_len, container, list(device ORDER BY position) AS devices
FROM delays WHERE segment IN ('device', 'outside') GROUP BY packet, direction, l3_len, container
"""
"""SQL of each packet's devices in order, for use inside another query."""


@contextmanager
def measured(lab, folder, *options, start=start):
    """Run a measurement for the duration of the block; its JSON is in `.found` afterwards."""
    folder.mkdir(exist_ok=True)
    measurement = RunningMace(lab, folder, *options, start=start)
    try:
        yield measurement
        measurement.stop()
    finally:
        measurement.kill()


def wait_for(true, limit_s=30.0, what="it"):
    """Poll until `true()` holds; fails after `limit_s`."""
    end = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end, f"waited {limit_s} s for {what}"
        time.sleep(0.02)


def balanced(found):
    """Return the ledger of a command's JSON, after checking that it adds up."""
    ledger = Ledger(**found["ledger"])
    assert ledger.imbalance == 0, ledger.line()
    return ledger
