"""The recipes of CONTRIBUTING.md, followed with a toy of each kind in a copy of the tree: the checks they name pass.

Each toy is put in by the steps of its recipe and no others, so a step that a recipe forgets fails here.
"""

import os
import shutil
import subprocess
import sys

import pytest

from tests.places import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

COPIED = (
    *("contracts", "collector", "correlator", "storage", "mace", "tests", "docs"),
    *("README.md", "CONTRIBUTING.md", "pyproject.toml", "requirements.lock"),
)


class Tree:
    """A copy of the project."""

    def __init__(self, place):
        self.place = place
        for name in COPIED:
            source, target = ROOT / name, place / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "fuzz"))
            else:
                shutil.copy(source, target)

    def write(self, name, text):
        path = self.place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def insert(self, name, before, text):
        """Put text in front of the only place in a file that reads so."""
        path = self.place / name
        there = path.read_text()
        assert there.count(before) == 1, f"{name} has {there.count(before)} of {before!r}"
        path.write_text(there.replace(before, text + before))

    def run(self, *argv):
        """Exit status and output of Python in the copy."""
        environment = {**os.environ, "PYTHONPATH": str(self.place), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            [sys.executable, *argv], cwd=self.place, env=environment, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout + done.stderr

    def check(self, *tests, choose):
        """Tests pass in the copy; `choose` is pytest's -k, and each of its words chooses one at least."""
        status, said = self.run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", " or ".join(choose), *tests)
        assert status == 0, said
        for word in choose:
            _, listed = self.run("-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-k", word, *tests)
            assert "::" in listed, f"no test is chosen by {word}"


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path / "copy")


def test_a_command(tree):
    tree.write(
        "mace/commands/count.py",
        '''"""`mace count`: how many hooks there are."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from contracts.hooks import HOOKS
from mace.commands.console import Console
from mace.commands.options import JSON, with_format


@dataclass(frozen=True, slots=True)
class Options:
    """What can be asked of it."""

    format: str


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    with_format(parser)


def run(options: Options, console: Console) -> int:
    """Print the number."""
    if options.format == JSON:
        console.json({"hooks": len(HOOKS)})
    else:
        console.line(f"{len(HOOKS)} hooks")
    return 0
''',
    )
    tree.insert(
        "mace/commands/registry.py",
        '    Command("hooks", "where packets are observed"),',
        '    Command("count", "how many hooks there are"),\n',
    )
    tree.insert("README.md", "| `mace hooks` |", "| `mace count` | how many hooks there are |\n")
    streams = "tests/unit/mace/shown/test_streams.py"
    tree.insert(streams, '    "hooks": (["hooks"], 0),', '    "count": (["count"], 0),\n')
    assert tree.run("-m", "mace", "count") == (0, "8 hooks\n")
    tree.check(
        *("tests/contract/test_commands.py", streams),
        choose=(
            "count and not TestEveryCommand",
            "readmes_table",
            "every_command_is_one_file",
            "every_command_is_walked",
        ),
    )


SINK = '''"""A sink for tests of recipes: a line of JSON for each slice of results."""

import json
from pathlib import Path

from contracts.config import Config
from contracts.interfaces import Status, StreamHeader
from contracts.results import Results
from contracts.schema import RoundTrips
from contracts.vitals import Account, Vitals


class Lines:
    """Both the shared sink and its streams."""

    def __init__(self, path: Path, account: Account) -> None:
        self._path, self._account = path, account

    async def open(self, header: StreamHeader | None = None) -> None:
        """Nothing to acquire."""

    def stream(self) -> "Lines":
        """Streams have nothing of their own."""
        return self

    async def write(self, results: Results | RoundTrips) -> None:
        """Append."""
        if isinstance(results, Results):
            rows = len(results.rows.delays) + len(results.rows.windows)
            with self._path.open("a") as file:
                file.write(json.dumps({"rows": rows}) + "\\n")
            self._account.taken += rows
            self._account.stored += rows

    async def aclose(self) -> None:
        """Nothing to release."""


def check(config: Config) -> Status:
    """It always can."""
    return Status(True, config.sinks.lines.path)


def make(config: Config, vitals: Vitals) -> Lines:
    """The sink."""
    return Lines(Path(config.sinks.lines.path), vitals.account("lines"))
'''


def test_a_sink(tree):
    tree.write("storage/lines_of_json.py", SINK)
    tree.insert(
        "storage/__init__.py",
        '    "mqtt": SinkKind(',
        '    "lines": SinkKind("storage.lines_of_json", "", lambda config: bool(config.sinks.lines.path)),\n',
    )
    tree.insert(
        "contracts/config.py",
        "@dataclass(frozen=True, slots=True)\nclass SinksConfig:",
        "@dataclass(frozen=True, slots=True)\nclass LinesConfig:\n"
        '    """`[sinks.lines]`: a file with a line for each slice."""\n\n'
        '    path: str = _key("", "The file; empty: no such sink.")\n\n\n',
    )
    tree.insert("contracts/config.py", "    mqtt: MqttRowsConfig = ", "    lines: LinesConfig = LinesConfig()\n")
    assert tree.run("-m", "tests.contract.test_configuration_doc")[0] == 0
    kit = "tests/contract/test_sinks.py"
    tree.insert(kit, "Config, InfluxConfig, MqttConfig", "LinesConfig, ")
    tree.insert(
        kit,
        "MAKERS = {\n",
        "@contextmanager\ndef lines(place):\n"
        '    with configured(SinksConfig(lines=LinesConfig(str(place / "lines")))) as made:\n        yield made\n\n\n',
    )
    tree.insert(kit, '    "prometheus": prometheus,\n    "mqtt"', '    "lines": lines,\n')
    tree.insert(kit, '"store"}\n"""Lossless', '"lines", ')
    tree.check(
        *(kit, "tests/contract/test_configuration_doc.py"),
        choose=("lines", "every_sink_has_its_makers", "the_table_is_the_code"),
    )


FORMAT = '''"""A format for tests of recipes: a line that says TOY, and a capture behind it."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from collector.reading.options import Description, FileOptions
from collector.reading.reader import FileReader
from contracts.clock import ClockPair
from contracts.interfaces import StreamHeader, StreamItem
from contracts.errors import Unavailable
from contracts.hooks import Hook
from contracts.records import Batch
from contracts.topology import Device, Sighting, Topology
from contracts.version import VERSION

MAGIC = b"TOY\\n"


def recognises(head: bytes) -> bool:
    """By its first line."""
    return head.startswith(MAGIC)


def describe(paths: Sequence[Path], options: FileOptions) -> Description:
    """From the header."""
    with ToyReader(paths[0]) as reader:
        return Description(reader.header, reader.header.clock.utc_ns)


def reader(paths: Sequence[Path], options: FileOptions) -> FileReader:
    """Of the only file."""
    return ToyReader(paths[0])


class ToyReader(FileReader):
    """Each line behind the first is a time in ns at which a packet was queued on eth0."""

    discarded = 0
    warnings = ()
    bytes_read = 0

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = None

    @property
    def bytes_total(self) -> int:
        """Of the file."""
        return self._path.stat().st_size

    def _open(self) -> StreamHeader:
        try:
            self._file = self._path.open()
        except OSError as error:
            raise Unavailable(str(self._path), str(error), "name a toy") from error
        self._file.readline()
        clock = ClockPair(0, 1_750_000_000_000_000_000, 0)
        return StreamHeader("toy", "a host", "a run", "6.1", "", 1, clock, ("net:net_dev_queue",), VERSION)

    def items(self) -> Iterator[StreamItem]:
        """All in one batch."""
        times = [int(line) for line in self._file]
        yield Topology(times[0], 1, (Device(1, 2, "eth0", "veth"),), (Sighting("eth0", 1, 2),))
        columns = {"ts_ns": times, "hook": [Hook.NET_DEV_QUEUE] * len(times), "skb_id": list(range(len(times)))}
        yield Batch.of(len(times), **columns)

    def close(self) -> None:
        """The file."""
        if self._file is not None:
            self._file.close()
            self._file = None
'''


def test_a_file_format(tree):
    tree.write("collector/toy/__init__.py", '"""Toys, for tests of recipes."""\n')
    tree.write("collector/toy/source.py", FORMAT)
    tree.insert(
        "collector/files.py",
        "from collector.tracecmd import source as tracecmd_source\n",
        "from collector.toy import source as toy_source\n",
    )
    tree.insert(
        "collector/files.py",
        "FORMATS: Final",
        'TOY: Final = FileFormat("toy", "a toy", toy_source.recognises, toy_source.describe, toy_source.reader)\n',
    )
    files = tree.place / "collector/files.py"
    whole = files.read_text()
    at = whole.index("(", whole.index("FORMATS: Final")) + 1
    files.write_text(whole[:at] + "TOY, " + whole[at:])
    tree.insert("pyproject.toml", '    "collector.tracecmd",\n', '    "collector.toy",\n')
    tree.write("tests/golden/toy/a.toy", "TOY\n" + "".join(f"{n * 1000 + 5}\n" for n in range(600)))
    tree.insert("tests/places.py", '    "pcap pair": (', '    "toy": (GOLDEN / "toy" / "a.toy",),\n')
    tree.insert("mace/commands/choices.py", '"mace", "trace.dat"', '"toy", ')
    tree.check(
        *("tests/contract/test_sources.py", "tests/contract/test_packaging.py", "tests/contract/test_commands.py"),
        choose=("toy", "every_source_has_its_maker", "every_source_is_kept", "import_contracts_hold", "what_help_says"),
    )
