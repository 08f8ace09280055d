"""Writes expected.json: `python -m tests.golden.figures.make`, only where a figure changes for a reason.

README.md says what it holds.
"""

import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mace import cli
from storage.tables import grown
from tests.places import DOCS, GOLDEN, ROOT

EXPECTED = Path(__file__).with_name("expected.json")
TABLES = ("delays", "windows", "ledger")
_WRITTEN_S = 1_750_000_000
_READ_ALONE = (".mace", ".dat", ".pftrace", ".txt")
_PAIRS = {"inner": "outer", "at-eth0": "at-outer"}


def inputs() -> dict[str, list[str | Path]]:
    """Return name of an input → arguments of `mace replay` that select it, its files as paths."""
    files = [DOCS / "example.mace", *sorted(GOLDEN.rglob("*"))]
    found: dict[str, list[str | Path]] = {}
    for path in files:
        if {"fuzz", "figures", "extreme-times"} & set(path.parts):
            continue
        if path.suffix in _READ_ALONE:
            found[str(path.relative_to(ROOT))] = [path]
        for inner, outer in _PAIRS.items():
            if ".pcap" in path.name and inner in path.name:
                other = path.with_name(path.name.replace(inner, outer))
                found[str(path.relative_to(ROOT))] = ["--inner", path, "--outer", other]
    return found


def figures(arguments: list[str | Path]) -> dict[str, Any]:
    """Return exit status and number of packets of a replay, and a digest of each of its figures and stored columns."""
    shown = io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        with redirect_stdout(shown), redirect_stderr(io.StringIO()):
            given = [_dated(one, Path(folder)) if isinstance(one, Path) else one for one in arguments]
            status = cli.main(["replay", "--json", "--store", str(store), *given])
        digests = {table: dict(_digests(store / table)) for table in TABLES}
    told = json.loads(shown.getvalue() or "{}")
    digests["figures"] = {name: _digest(value) for name, value in told.items()}
    return {"status": status, "packets": told.get("packets"), **digests}


def _dated(path: Path, folder: Path) -> str:
    """Return a copy with a known modification time, which dates the formats that have no time of day."""
    copy = Path(shutil.copy(path, folder))
    os.utime(copy, (_WRITTEN_S, _WRITTEN_S))
    return str(copy)


def _digests(folder: Path) -> Iterator[tuple[str, str]]:
    segments = sorted(folder.rglob("*.parquet"))
    if not segments:
        return
    table = pa.concat_tables([grown(pq.read_table(path, partitioning=None), folder.name) for path in segments])
    for name in table.column_names:
        column = table.column(name)
        plain = column if not pa.types.is_dictionary(column.type) else pc.cast(column, column.type.value_type)
        yield name, _digest(plain.to_pylist())


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


if __name__ == "__main__":
    found = {name: figures(arguments) for name, arguments in inputs().items()}
    EXPECTED.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
