"""Measure a lab with the real command line, and look at what it stored."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pyarrow.dataset as ds

MACE = (sys.executable, "-m", "mace")
ROOT = Path(__file__).parents[1]


def mace(*argv, check=True, **options):
    """Run a command to its end; returns the finished process with its output as text."""
    settings = {"capture_output": True, "text": True, "cwd": ROOT, "timeout": 120, **options}
    done = subprocess.run([*MACE, *map(str, argv)], check=False, **settings)
    if check:
        assert done.returncode == 0, done.stderr
    return done


class Measurement:
    """A `mace run` that is running; `stop` ends it as Ctrl-C does and gives its JSON."""

    def __init__(self, lab, folder, *options):
        self.store, self.capture = folder / "store", folder / "stream.mace"
        argv = ["run", "--lab", lab.name, "--store", self.store, "--record", self.capture, "--json", *options]
        self.process = subprocess.Popen(
            [*MACE, *map(str, argv)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )
        self.found = None
        # The capture's header is written when all is open, so the tracer is on by then.
        wait_for(lambda: (self.capture.exists() and self.capture.stat().st_size > 0) or self.process.poll() is not None)
        time.sleep(0.2)

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        out, err = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, err
        self.found = json.loads(out)
        return self.found

    def rows(self, **equal):
        """Rows of the store as a list of dicts, those whose columns have the given values."""
        table = ds.dataset(self.store / "delays", format="parquet", partitioning=None).to_table()
        # As an integer: Python's datetime has no nanoseconds.
        table = table.set_column(0, "utc_ns", table["time"].cast("int64"))
        rows = table.to_pylist()
        return [row for row in rows if all(row[name] == value for name, value in equal.items())]


@contextmanager
def measured(lab, folder, *options):
    """A measurement for the length of the block; what it found is in `.found` afterwards."""
    folder.mkdir(exist_ok=True)
    measurement = Measurement(lab, folder, *options)
    try:
        yield measurement
        measurement.stop()
    finally:
        if measurement.process.poll() is None:
            measurement.process.kill()
            measurement.process.communicate()


def wait_for(true, limit_s=30.0, what="it"):
    """Poll until `true()`; fails loudly after `limit_s`."""
    end = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end, f"waited {limit_s} s for {what}"
        time.sleep(0.02)


def paths(rows):
    """{packet: [row, ...]}: hops in order, without the row of the whole path and the delivery."""
    found = {}
    for row in rows:
        if row["segment"] in ("device", "outside"):
            found.setdefault(row["packet"], []).append(row)
    return {packet: sorted(hops, key=lambda row: row["position"]) for packet, hops in found.items()}
