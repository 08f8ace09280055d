"""Follows the recipes of CONTRIBUTING.md with a toy of each kind in a copy of the tree; the named checks must pass.

All toys go into one copy, each by the steps of its recipe and no others, and pytest runs there once. What a recipe
forgets fails here: a step as a check of the toy, a file as one that was touched and is not named.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch

import pytest

from tests.places import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

COPIED = (
    *(
        "contracts",
        "collector",
        "correlator",
        "storage",
        "mace",
        "kmod",
        "bpf",
        "dashboards",
        "deploy",
        "tests",
        "docs",
    ),
    *("README.md", "CONTRIBUTING.md", "pyproject.toml", "requirements.lock", "docker-compose.yml", ".env.example"),
)


class Tree:
    """A copy of the project."""

    def __init__(self, place):
        self.place = place
        self.touched = set()
        """Names of the files that were written since the last recipe began."""
        for name in COPIED:
            source, target = ROOT / name, place / name
            if source.is_dir():
                # Compiled files are copied, too: they are valid for the copy, whose sources have the same times.
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.o", "*.ko", "*.cmd"))
            else:
                shutil.copy2(source, target)

    def write(self, name, text):
        path = self.place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        self.touched.add(name)

    def insert(self, name, before, text):
        """Insert text in front of a text that occurs once in a file."""
        there = (self.place / name).read_text()
        assert there.count(before) == 1, f"{name} has {there.count(before)} of {before!r}"
        self.write(name, there.replace(before, text + before))

    def replace(self, name, old, new):
        """Replace a text that occurs once in a file."""
        there = (self.place / name).read_text()
        assert there.count(old) == 1, f"{name} has {there.count(old)} of {old!r}"
        self.write(name, there.replace(old, new))

    def append(self, name, text):
        self.write(name, (self.place / name).read_text() + text)

    def run(self, *argv):
        """Run Python in the copy, and return exit status and output."""
        environment = {**os.environ, "PYTHONPATH": str(self.place)}
        done = subprocess.run(
            [sys.executable, *argv], cwd=self.place, env=environment, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout + done.stderr

    def made(self, name, *argv):
        """Let a Python program write a file."""
        status, said = self.run(*argv)
        assert status == 0, said
        self.touched.add(name)


@dataclass(frozen=True)
class Recipe:
    """A paragraph of CONTRIBUTING.md, and a toy."""

    steps: Callable[[Tree], None]
    tests: tuple[str, ...]
    """Files whose tests are run."""
    choose: tuple[str, ...]
    """Words in the names of the tests that concern the toy; each word is in at least one name."""


RECIPES: dict[str, Recipe] = {}


def recipe(title, *, tests, choose):
    def kept(steps):
        RECIPES[title] = Recipe(steps, tests, choose)
        return steps

    return kept


# --- a capture source ------------------------------------------------------------------------------

SOURCE = '''"""A live source for tests of recipes: a bell whose strokes are packets."""

import time
from collections.abc import AsyncIterator, Iterator

from collector.gaps import marker
from collector.live.filter import Choice
from collector.live.ring_source import FollowsDevices, RingSource
from collector.merge import Merger
from collector.pages.decoding import Sightings
from contracts import clock
from contracts.config import CaptureConfig
from contracts.hooks import BY_HOOK, Hook
from contracts.interfaces import Status, StreamHeader, StreamItem
from contracts.records import Batch
from contracts.schema import HookCost
from contracts.topology import Device

ROOM = 1000


class Bell:
    """Holds at most `ROOM` strokes until they are read, and counts further ones as lost."""

    def __init__(self) -> None:
        self.strokes_ns: list[int] = []
        self.lost = 0

    def strike(self) -> None:
        """Strike the bell: one packet."""
        if len(self.strokes_ns) < ROOM:
            self.strokes_ns.append(time.monotonic_ns())
        else:
            self.lost += 1


class BellSource(RingSource):
    """A `contracts.interfaces.Source`."""

    def __init__(self, devices: FollowsDevices | None = None, bell: Bell | None = None) -> None:
        self._bell = bell or Bell()
        self._merger = Merger(1_000_000)
        self._last_ns = 0
        super().__init__(
            "toybell", host="", hold_back_ms=1, follower=devices, watermark=self._merger, seen=Sightings(), filling=1
        )

    @staticmethod
    def check() -> Status:
        """Report that it cannot run, so that `auto` never takes it."""
        return Status(False, "there is no bell", "install a bell")

    @property
    def cost(self) -> tuple[HookCost, ...]:
        """Nothing."""
        return ()

    async def _acquire(self) -> StreamHeader:
        self._began_ns = self._last_ns = time.monotonic_ns()
        await self._follow(wakes=True)
        self._merger.add_cpu(0, self._began_ns)
        return self._header(1, clock.measure(), [BY_HOOK[Hook.NETIF_RX].tracepoint])

    def _give_back(self) -> None: ...

    def _learned(self, devices: tuple[Device, ...]) -> None: ...

    def _taken(self, until_ns: int | None) -> Iterator[Batch]:
        batch = self._merger.flush() if until_ns is None else self._merger.take(until_ns)
        if len(batch):
            yield batch

    def _listen(self) -> None:
        now_ns = time.monotonic_ns()
        bell, strokes_ns = self._bell, self._bell.strokes_ns
        if strokes_ns:
            self._merger.push(0, Batch.of(len(strokes_ns), ts_ns=strokes_ns, hook=[Hook.NETIF_RX] * len(strokes_ns)))
            self._last_ns = strokes_ns[-1]
        if bell.lost:
            self._merger.push(0, marker(0, self._last_ns, bell.lost, now_ns))
        bell.strokes_ns, bell.lost = [], 0
        self._merger.complete(0, now_ns)

    async def items(self) -> AsyncIterator[StreamItem]:
        """See `Source`."""
        yield self._topology(self._began_ns)
        while not self._stopping:
            self._listen()
            for item in self._released():
                yield item
            self._devices_changed()
            await self._pause(0.01, None)
        self._listen()
        for item in self._released(to_the_end=True):
            yield item


def choice(config: CaptureConfig) -> Choice:
    """Every stroke is recorded."""
    return Choice()


def configured(config: CaptureConfig, devices: FollowsDevices, host: str = "") -> BellSource:
    """The source."""
    return BellSource(devices)
'''

SOURCE_TEST = '''"""Strokes beyond the room are counted as lost."""

from collector.toybell.source import ROOM, Bell


def test_strokes_beyond_the_room_are_lost():
    bell = Bell()
    for _ in range(ROOM + 1):
        bell.strike()
    assert (len(bell.strokes_ns), bell.lost) == (ROOM, 1)
'''


@recipe(
    "A capture source.",
    tests=(
        *("tests/contract/test_sources.py", "tests/contract/test_packaging.py", "tests/contract/test_commands.py"),
        *("tests/contract/test_configuration_doc.py", "tests/unit/mace/live/test_first.py"),
        "tests/unit/collector/toybell/test_source.py",
    ),
    choose=(
        *("toybell", "every_source_has_its_maker", "sources_do_not_import", "import_contracts_hold", "choices_in_help"),
        *("the_table_is_the_code", "every_source_can_be_selected", "beyond_the_room_are_lost"),
    ),
)
def a_capture_source(tree):
    tree.write("collector/toybell/__init__.py", '"""A bell, for tests of recipes."""\n')
    tree.write("collector/toybell/source.py", SOURCE)
    tree.replace("contracts/sources.py", '"ftrace")', '"ftrace", "toybell")')
    package = "collector/__init__.py"
    tree.insert(package, "from contracts.config", "from collector.toybell import source as bell\n")
    tree.insert(
        package,
        '}\n"""Live sources by name',
        '    "toybell": LiveSource(bell.BellSource.check, bell.configured, bell.choice),\n',
    )
    tree.insert("pyproject.toml", '    "collector.tracecmd",\n', '    "collector.toybell",\n')
    tree.made("docs/configuration.md", "-m", "tests.contract.test_configuration_doc")
    tree.write("tests/unit/collector/toybell/test_source.py", SOURCE_TEST)
    kit = "tests/contract/test_sources.py"
    tree.insert(kit, "from contracts.errors", "from collector.toybell.source import Bell, BellSource\n")
    tree.insert(
        kit,
        "def file(name):\n",
        """@contextmanager
def toybell(_):
    followers, bell = Followers(), Bell()

    async def happens():
        for _ in range(STEP):
            bell.strike()

    yield Made(lambda: BellSource(followers(), bell), followers.break_, happens, followers.news, followers.held)


""",
    )
    tree.replace(kit, "LIVE = {", 'LIVE = {"toybell": toybell, ')


# --- a file format ---------------------------------------------------------------------------------

FORMAT = '''"""A format for tests of recipes: a line TOY, then a line per packet."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from collector.reading.options import Description, FileOptions
from collector.reading.reader import FileReader
from contracts.clock import ClockPair
from contracts.interfaces import StreamHeader, StreamItem
from contracts.errors import CaptureError, Unavailable
from contracts.hooks import Hook
from contracts.records import Batch
from contracts.topology import Device, Sighting, Topology
from contracts.version import VERSION

MAGIC = b"TOY\\n"


def recognises(head: bytes) -> bool:
    """Return whether the first line is TOY."""
    return head.startswith(MAGIC)


def describe(paths: Sequence[Path], options: FileOptions) -> Description:
    """Return the header and the time of the first record."""
    with ToyReader(paths[0]) as reader:
        return Description(reader.header, reader.header.clock.utc_ns)


def reader(paths: Sequence[Path], options: FileOptions) -> FileReader:
    """Return a reader of the only file."""
    return ToyReader(paths[0])


class ToyReader(FileReader):
    """Reads the times, ns, at which packets were queued on eth0: a line each after the first."""

    discarded = 0
    warnings = ()
    bytes_read = 0

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = None

    @property
    def bytes_total(self) -> int:
        """Size of the file."""
        return self._path.stat().st_size

    def _open(self) -> StreamHeader:
        try:
            self._file = self._path.open(errors="replace")
        except OSError as error:
            raise Unavailable(str(self._path), str(error), "name a toy") from error
        self._file.readline()
        clock = ClockPair(0, 1_750_000_000_000_000_000, 0)
        return StreamHeader("toyfile", "a host", "a run", "6.1", "", 1, clock, ("net:net_dev_queue",), VERSION)

    def items(self) -> Iterator[StreamItem]:
        """Yield a topology and all records in one batch."""
        try:
            times = sorted(int(line) for line in self._file)
        except ValueError as error:
            raise CaptureError(self._path, 0, "a line that is no number") from error
        if not all(0 <= time_ns < 1 << 62 for time_ns in times):
            raise CaptureError(self._path, 0, "a time out of range")
        if not times:
            return
        yield Topology(times[0], 1, (Device(1, 2, "eth0", "veth"),), (Sighting("eth0", 1, 2),))
        columns = {"ts_ns": times, "hook": [Hook.NET_DEV_QUEUE] * len(times), "skb_id": list(range(len(times)))}
        yield Batch.of(len(times), **columns)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
'''


FORMAT_TEST = '''"""Toy files of any content."""

import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from collector.files import recording
from contracts.errors import CaptureError


@given(st.binary(max_size=40))
def test_any_content_is_read_or_refused(content):
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "a.toy"
        path.write_bytes(b"TOY\\n" + content)
        try:
            with recording(path).reader() as reader:
                list(reader.items())
        except CaptureError:
            pass
'''


@recipe(
    "A file format.",
    tests=(
        *("tests/contract/test_sources.py", "tests/contract/test_packaging.py", "tests/contract/test_commands.py"),
        "tests/property/test_toyfile_fuzz.py",
    ),
    choose=(
        *("toyfile", "every_source_has_its_maker", "sources_do_not_import", "import_contracts_hold", "choices_in_help"),
        "any_content_is_read",
    ),
)
def a_file_format(tree):
    tree.write("collector/toyfile/__init__.py", '"""Toys, for tests of recipes."""\n')
    tree.write("collector/toyfile/source.py", FORMAT)
    files = "collector/files.py"
    tree.insert(
        files,
        "from collector.tracecmd import source as tracecmd_source\n",
        "from collector.toyfile import source as toyfile_source\n",
    )
    kind = "toyfile_source.recognises, toyfile_source.describe, toyfile_source.reader"
    tree.insert(files, "FORMATS: Final", f'TOYFILE: Final = FileFormat("toyfile", "a toy", {kind})\n')
    tree.insert(files, '    FileFormat("mace", ', "    TOYFILE,\n")
    tree.insert("pyproject.toml", '    "collector.tracecmd",\n', '    "collector.toyfile",\n')
    tree.insert("mace/commands/choices.py", '"mace", "trace.dat"', '"toyfile", ')
    tree.write("tests/golden/toyfile/a.toy", "TOY\n" + "".join(f"{n * 1000 + 5}\n" for n in range(600)))
    tree.insert("tests/places.py", '    "pcap pair": (', '    "toyfile": (GOLDEN / "toyfile" / "a.toy",),\n')
    tree.write("tests/property/test_toyfile_fuzz.py", FORMAT_TEST)
    tree.insert("docs/traces.md", "| `pcap` | tcpdump", "| `toyfile` | no tool | times only |\n")


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
    return Status(True, config.sinks.toylines.path)


def make(config: Config, vitals: Vitals) -> Lines:
    """The sink."""
    return Lines(Path(config.sinks.toylines.path), vitals.account("toylines"))
'''


@recipe(
    "A sink.",
    tests=("tests/contract/test_sinks.py", "tests/contract/test_configuration_doc.py"),
    choose=("toylines", "every_sink_has_its_makers", "the_table_is_the_code", "the_defaults_on_the_page"),
)
def a_sink(tree):
    tree.write("storage/toylines.py", SINK)
    tree.insert(
        "storage/__init__.py",
        '    "mqtt": SinkKind(',
        '    "toylines": SinkKind("storage.toylines", "", lambda config: bool(config.sinks.toylines.path)),\n',
    )
    tree.insert(
        "contracts/config.py",
        "@dataclass(frozen=True, slots=True)\nclass SinksConfig:",
        "@dataclass(frozen=True, slots=True)\nclass ToyLinesConfig:\n"
        '    """`[sinks.toylines]`: a file with a line for each slice."""\n\n'
        '    path: str = _key("", "The file; empty: no such sink.")\n\n\n',
    )
    tree.insert(
        "contracts/config.py", "    mqtt: MqttRowsConfig = ", "    toylines: ToyLinesConfig = ToyLinesConfig()\n"
    )
    tree.made("docs/configuration.md", "-m", "tests.contract.test_configuration_doc")
    kit = "tests/contract/test_sinks.py"
    tree.insert(kit, "Config, InfluxConfig, MqttConfig", "ToyLinesConfig, ")
    tree.insert(
        kit,
        "MAKERS = {\n",
        "@contextmanager\ndef toylines(place):\n"
        '    with configured(SinksConfig(toylines=ToyLinesConfig(str(place / "lines")))) as made:\n'
        "        yield made\n\n\n",
    )
    tree.insert(kit, '    "prometheus": prometheus,\n    "mqtt"', '    "toylines": toylines,\n')
    tree.insert(kit, '"store"}\n"""Sinks', '"toylines", ')


# --- a command -------------------------------------------------------------------------------------

COMMAND = '''"""`mace toycount`: how many hooks there are."""

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
'''


@recipe(
    "A command.",
    tests=("tests/contract/test_commands.py", "tests/unit/mace/shown/test_streams.py"),
    choose=("toycount", "readmes_table", "every_command_is_one_file", "every_command_has_a_call"),
)
def a_command(tree):
    tree.write("mace/commands/toycount.py", COMMAND)
    tree.insert(
        "mace/commands/registry.py",
        '    Command("hooks", "where packets are observed"),',
        '    Command("toycount", "how many hooks there are"),\n',
    )
    tree.insert("README.md", "| `mace hooks` |", "| `mace toycount` | how many hooks there are |\n")
    streams = "tests/unit/mace/shown/test_streams.py"
    tree.insert(streams, '    "hooks": (["hooks"], 0),', '    "toycount": (["toycount"], 0),\n')


# --- a hook ----------------------------------------------------------------------------------------

PROBE = """static void mace_probe_netif_rx_entry(void *data, const struct sk_buff *skb)
{
	mace_observe_at_device(MACE_HOOK_NETIF_RX_ENTRY, skb, skb->dev, 0);
}

"""

KERNELS_FIELDS = (
    "__data_loc char[] name, unsigned int napi_id, u16 queue_mapping, void * skbaddr, bool vlan_tagged, "
    "u16 vlan_proto, u16 vlan_tci, u16 protocol, u8 ip_summed, u32 hash, bool l4_hash, unsigned int len, "
    "unsigned int data_len, unsigned int truesize, bool mac_header_valid, int mac_header, u8 nr_frags, "
    "u16 gso_size, u16 gso_type"
)

GOLDEN_TEST = '''"""What the toy hook's capture holds."""

import json

from collector.files import recording
from contracts.hooks import Hook
from contracts.records import Batch
from tests.places import GOLDEN

PLACE = GOLDEN / "toyhook"


def test_the_toyhook_is_in_its_capture():
    with recording(PLACE / "capture.mace").reader() as reader:
        batch = Batch.concatenate([item for item in reader.items() if isinstance(item, Batch)])
    assert batch.hook.tolist() == json.loads((PLACE / "expected.json").read_text())
    assert Hook.NETIF_RX_ENTRY in batch.hook
'''

GOLDEN_CAPTURE = """
from pathlib import Path

from contracts.hooks import Hook
from contracts.records import Batch
from tests.made_capture import TOPOLOGY, capture_bytes

hooks = [Hook.NETIF_RX_ENTRY, Hook.NETIF_RX]
times = [TOPOLOGY.from_ns + 500, TOPOLOGY.from_ns + 600]
batch = Batch.of(2, ts_ns=times, hook=hooks, dev=[1, 1], skb_id=[7, 7], l3_len=[84, 84])
Path("tests/golden/toyhook").mkdir()
Path("tests/golden/toyhook/capture.mace").write_bytes(capture_bytes([TOPOLOGY, batch]))
Path("tests/golden/toyhook/expected.json").write_text(str([int(hook) for hook in hooks]))
"""


@recipe(
    "A hook.",
    tests=(
        *("tests/contract/test_abi.py", "tests/contract/test_docs.py", "tests/unit/contracts/test_hooks.py"),
        *("tests/unit/collector/ftrace/test_source.py", "tests/unit/collector/pages/test_decoding.py"),
        *("tests/unit/collector/kmod/test_source.py", "tests/property/test_candidates.py"),
        "tests/golden/test_toyhook.py",
    ),
    choose=(
        *("test_abi.py", "hook_is_on_its_page", "test_hooks.py", "ftrace/test_source.py", "pages/test_decoding.py"),
        *("kmod/test_source.py", "test_candidates.py", "toyhook"),
    ),
)
def a_hook(tree):
    table = "contracts/hooks.py"
    tree.insert(table, "    LOST = 255\n", "    NETIF_RX_ENTRY = 10\n")
    tree.insert(
        table,
        ")\n\nALONG: Final",
        '    HookInfo(Hook.NETIF_RX_ENTRY, "E", "net:netif_rx_entry", Way.RECEIVE, "A toy."),\n',
    )
    tree.insert(table, "Hook.NETIF_RX, Hook.NAPI", "Hook.NETIF_RX_ENTRY, ")
    header = "kmod/uapi/mace.h"
    tree.insert(header, " * @MACE_HOOK_COUNT:", " * @MACE_HOOK_NETIF_RX_ENTRY: net:netif_rx_entry\n")
    tree.insert(header, "\tMACE_HOOK_COUNT\n", "\tMACE_HOOK_NETIF_RX_ENTRY = 10,\n")
    tree.replace(header, "#define MACE_ABI_MINOR 2\n", "#define MACE_ABI_MINOR 3\n")
    tree.replace("contracts/abi.py", "ABI_MINOR: Final = 2\n", "ABI_MINOR: Final = 3\n")
    probes = "kmod/mace_probes.c"
    tree.replace(
        probes,
        "\tROW(KFREE_SKB, kfree_skb, AT_END)\n",
        "\tROW(KFREE_SKB, kfree_skb, AT_END) \\\n\tROW(NETIF_RX_ENTRY, netif_rx_entry, AT_DEVICE)\n",
    )
    tree.insert(probes, "/**\n * struct mace_probe - a row", PROBE)
    tree.insert(
        "docs/hooks.md",
        "\nOne echo request from a container",
        "| 10 | E | `net:netif_rx_entry` | receive | A toy. |\n",
    )
    tree.insert(
        "tests/ring_pages.py",
        '    "skb:skb_copy_datagram_iovec": (',
        f'    "net:netif_rx_entry": (2301, "{KERNELS_FIELDS}"),\n',
    )
    tree.write("tests/golden/test_toyhook.py", GOLDEN_TEST)
    tree.made("tests/golden/toyhook/capture.mace", "-c", GOLDEN_CAPTURE)


# --- what is written, and a page -------------------------------------------------------------------


@recipe(
    "A measurement, tag or field",
    tests=("tests/contract/test_metrics_doc.py", "tests/contract/test_dashboards.py"),
    choose=("test_metrics_doc.py", "the_page_is_the_catalogue"),
)
def a_field(tree):
    tree.insert("contracts/metrics.py", '    _counter("records", "Records seen', '    _gauge("toys", "Toys about."),\n')
    tree.made("docs/metrics.md", "-m", "tests.contract.test_metrics_doc")


COLUMN_TEST = '''"""The toy column, the slow way."""

import mace
from tests.places import DOCS


def test_the_toycolumn_is_as_counted_by_hand():
    rows = 0
    for results in mace.open(DOCS / "example.mace").results():
        delays = results.rows.delays
        for length, odd in zip(delays.l3_len.tolist(), delays.toy_odd.tolist(), strict=True):
            assert odd == (length % 2 == 1)
            rows += 1
    assert rows
'''


@recipe(
    "A metric or a column.",
    tests=(
        *("tests/contract/test_docs.py", "tests/unit/storage/test_tables.py", "tests/unit/storage/test_query.py"),
        "tests/property/test_toycolumn.py",
    ),
    choose=("toycolumn", "every_stored_column_is_on_its_page", "test_tables.py"),
)
def a_column(tree):
    schema, meaning = "contracts/schema.py", "Whether the packet has an odd number of bytes."
    tree.insert(
        schema,
        """
    _DTYPES: ClassVar[dict[str, str]] = {
        "utc_ns": "<i8",
        "packet": "<u8",""",
        f'    toy_odd: npt.NDArray[np.bool_]\n    """{meaning}"""\n',
    )
    tree.replace(schema, '        "waited": "?",\n', '        "waited": "?",\n        "toy_odd": "?",\n')
    made = "        return Delays(**columns"
    tree.replace("correlator/lives.py", f"{made})\n", f'{made}, toy_odd=columns["l3_len"] % 2 == 1)\n')
    tables = "storage/tables.py"
    tree.insert(tables, ")\nWINDOWS: Final", f'    Column("toy_odd", pa.bool_(), "{meaning}"),\n')
    last, end = "            of.names(_container_id),\n", '        ],\n        schema=SCHEMAS["delays"],\n'
    tree.replace(tables, last + end, f"{last}            pa.array(delays.toy_odd),\n{end}")
    tree.insert("docs/store.md", "\n## `windows`\n", f"| `toy_odd` | bool | {meaning} |\n")
    tree.write("tests/property/test_toycolumn.py", COLUMN_TEST)


STATE_TEST = '''"""An engine that continues from a state knows the hook of the last record before the cut."""

import json
from dataclasses import replace

from contracts.hooks import Hook
from correlator.engine import Engine
from mace.replaying.checkpoint import state_from_json, state_to_json
from tests.traffic import Tape, topology


def test_the_toylast_survives_a_cut_and_is_in_the_digest():
    tape = Tape()
    tape.packet("Q:eth0 X:eth0", 100, skb=1, step=10)
    engine = Engine(0)
    engine.feed(topology())
    engine.feed(tape.batch())
    engine.stop_at(1_000)
    state = engine.state(1_000)
    assert state.toy_last == Hook.NET_DEV_START_XMIT
    resumed = Engine(0, state=state_from_json(json.loads(json.dumps(state_to_json(state))))).state(1_000)
    assert (resumed.toy_last, resumed.digest()) == (state.toy_last, state.digest())
    assert replace(state, toy_last=-1).digest() != state.digest()
'''


@recipe(
    "State of the engine.",
    tests=("tests/property/test_engine_reference.py", "tests/unit/correlator/test_toylast.py"),
    choose=("resumes_from_the_state", "survives_a_cut"),
)
def state_of_the_engine(tree):
    engine, state, checkpoint = "correlator/engine.py", "correlator/state.py", "mace/replaying/checkpoint.py"
    tree.insert(engine, "        self._gaps = NO_GAPS\n", "        self._toy_last = -1\n")
    tree.replace(
        engine,
        "= state.latest_ns, state.began_ns\n",
        "= state.latest_ns, state.began_ns\n            self._toy_last = state.toy_last\n",
    )
    tree.insert(
        engine,
        "        self._asked.note(records)\n",
        "        if len(batch):\n            self._toy_last = int(batch.hook[-1])\n",
    )
    tree.replace(
        engine,
        "            self._began_ns,\n        )",
        "            self._began_ns,\n            self._toy_last,\n        )",
    )
    tree.insert(
        state, "\n    def digest", '    toy_last: int\n    """Hook of the last record; -1 if there was none."""\n'
    )
    tree.replace(state, "self.began_ns is None)", "self.began_ns is None, self.toy_last)")
    tree.replace(
        checkpoint,
        '"began_ns": state.began_ns,\n',
        '"began_ns": state.began_ns,\n        "toy_last": state.toy_last,\n',
    )
    tree.replace(checkpoint, 'given["began_ns"],\n', 'given["began_ns"],\n        given["toy_last"],\n')
    tree.replace("mace/replaying/assembly.py", "_NOTES: Final = 3\n", "_NOTES: Final = 4\n")
    tree.write("tests/unit/correlator/test_toylast.py", STATE_TEST)


@recipe(
    "A deployment's file.",
    tests=("tests/contract/test_deployment.py",),
    choose=("toy.toml", "no_service_has_more_rights", "every_setting_is_in_the_example"),
)
def a_deployments_file(tree):
    tree.write("deploy/mace/toy.toml", '[sinks.influxdb]\nurl = "http://influxdb:8086"\nbucket = "toys"\n')
    tree.insert(
        "docker-compose.yml",
        "\nnetworks:\n",
        """
  toy:
    <<: *mace
    profiles: [replay]
    restart: "no"
    healthcheck: { test: ["CMD", "true"] }
    mem_limit: ${TOY_MEMORY:-1g}
    volumes:
      - ./deploy/mace:/etc/mace:ro
    networks: [store]
""",
    )
    tree.append(".env.example", "\n# Of the toy.\nTOY_MEMORY=1g\n")


VIEW = '''def toyview(store: StoreReader, asked: Asked) -> View:
    """Return the number of packets of each direction."""
    base = _base(store, asked)
    found = store.grouped(base.where, ("direction",), segments=asked.segments(), source=asked.source)
    columns = {"direction": [way for (way,) in found], "count": [delays.count for delays in found.values()]}
    return View(columns, _noted(store, base.about()))


'''

VIEW_TEST = """

def test_toyview_counts_packets(store):
    assert sum(view(store, "toyview", Asked(run="run-1")).columns["count"]) == PACKETS
"""


@recipe(
    "A view of the web page.",
    tests=("tests/unit/mace/shown/test_views.py",),
    choose=("toyview",),
)
def a_view_of_the_web_page(tree):
    views, page = "mace/shown/views.py", "mace/shown/page/page.js"
    tree.insert(views, "VIEWS: Final", VIEW)
    tree.insert(views, '    "runs": Kind(', '    "toyview": Kind(toyview, "packets by direction"),\n')
    section = '      { title: "Slowest packets"'
    tree.insert(page, section, '      { title: "Toys", view: "toyview", asked: its, draw: mace.drawToys },\n')
    tree.insert(
        "mace/shown/page/charts.js",
        "  mace.drawSpark",
        "  mace.drawToys = (place, view) => place.append(view.packets);\n",
    )
    tree.append("tests/unit/mace/shown/test_views.py", VIEW_TEST)


@recipe(
    "A page.",
    tests=("tests/contract/test_docs.py",),
    choose=("every_page_is_in_the_index", "links_have_a_target", "files_that_pages_name"),
)
def a_page(tree):
    tree.write("docs/toys.md", "# Toys\n\nThey are counted in `storage/internal.py` ([hooks](hooks.md)).\n")
    tree.insert("docs/README.md", "| Why is it built", "| Which toys are there? | [toys.md](toys.md) |\n")


# --- what came of it -------------------------------------------------------------------------------


@dataclass
class Followed:
    """Files that each recipe touched in the copy, and the results of the tests."""

    touched: dict[str, set[str]] = field(default_factory=dict)
    outcomes: dict[str, str] = field(default_factory=dict)
    said: str = ""


OUTCOME = re.compile(r"^(PASSED|FAILED|ERROR) (tests/\S+::.*?)(?: - .*)?$", re.MULTILINE)


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    tree, found = Tree(tmp_path_factory.mktemp("recipes") / "copy"), Followed()
    for title, one in RECIPES.items():
        tree.touched = set()
        one.steps(tree)
        found.touched[title] = tree.touched
    tests = dict.fromkeys(name for one in RECIPES.values() for name in one.tests)
    words = dict.fromkeys(word.rpartition("/")[2] for one in RECIPES.values() for word in one.choose)
    # TestEveryCommand runs all commands, which the recipes need not repeat.
    choice = f"({' or '.join(words)}) and not TestEveryCommand"
    _, found.said = tree.run("-m", "pytest", "-q", "-rpfE", "-p", "no:cacheprovider", "-k", choice, *tests)
    found.outcomes = {name: outcome for outcome, name in OUTCOME.findall(found.said)}
    found.said = re.sub(r"^PASSED .*\n", "", found.said, flags=re.MULTILINE)
    return found


@pytest.mark.parametrize("title", RECIPES)
def test_its_checks_pass(title, followed):
    for word in RECIPES[title].choose:
        outcomes = {name: outcome for name, outcome in followed.outcomes.items() if word in name}
        assert outcomes, f"no test is chosen by {word}: {followed.said}"
        assert set(outcomes.values()) == {"PASSED"}, followed.said


@pytest.mark.parametrize("title", RECIPES)
def test_it_names_every_file(title, followed):
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (paragraph,) = re.findall(rf"^\*\*{re.escape(title)}\*\*(.*?)^$", text, re.MULTILINE | re.DOTALL)
    named = {re.sub(r"<\w+>", "*", name) for name in re.findall(r"`([^`\s]+)`", paragraph)}
    unnamed = {
        name
        for name in followed.touched[title]
        if not any(fnmatch(name, pattern + "*" * pattern.endswith("/")) for pattern in named)
    }
    assert not unnamed, f"{title} does not name them"


def test_every_recipe_is_followed():
    text = (ROOT / "CONTRIBUTING.md").read_text().partition("## Recipes")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\*\*(.+?)\*\*", text, re.MULTILINE)) == RECIPES.keys()
