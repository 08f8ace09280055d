"""Every command works with closed or full standard streams, other encodings and other time zones."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from mace import cli
from mace.commands import registry
from tests.forked_commands import CommandCase, run
from tests.measuring import ROOT
from tests.sealing import new_key
from tests.unit.storage.stored import fill

CAPTURE = str(ROOT / "docs/example.mace")
PINGED = (
    "PING 203.0.113.2 (203.0.113.2) 56(84) bytes of data.\n64 bytes from 203.0.113.2: icmp_seq=1 ttl=64 time=0.1 ms\n"
)
SQL = "SELECT time, container, delay_ns, '→ µ é' AS odd FROM delays ORDER BY time, packet LIMIT 3"

COMMANDS = {
    "check": (["check"], 0),
    "demo": (["demo"], 1),
    "lab up": (["lab", "up", "nosuch"], 1),
    "lab down": (["lab", "down", "nosuch"], 0),
    "lab list": (["lab", "list"], 0),
    "lab exec": (["lab", "exec", "--lab", "nosuch", "c1", "true"], 1),
    "lab traffic": (["lab", "traffic", "ping", "--lab", "nosuch"], 1),
    "module build": (["module", "build", "--kdir", "/nosuch"], 1),
    "module load": (["module", "load"], None),
    "module unload": (["module", "unload"], None),
    "module status": (["module", "status"], 0),
    "run": (["run", "--duration", "0.1", "--no-store"], 1),
    "top": (["top"], 1),
    "record": (["record", "-o", "{tmp}/x.mace", "--duration", "0.1"], 1),
    "ingest": (["ingest", "--broker", "mqtt://127.0.0.1:1", "--duration", "0.1", "--store", "{tmp}/ingested"], 0),
    "replay": (["replay", CAPTURE], 0),
    "ping": (["ping", "--netns", "nosuch", "127.0.0.1"], 1),
    "correct": (["correct", "-", CAPTURE, "--container", "c1", "--tool", "ping"], 0),
    "wrap": (["wrap", "--netns", "nosuch", "true"], 1),
    "experiment": (["experiment"], 1),
    "calibrate": (["calibrate"], 1),
    "compare": (["compare"], 1),
    "report": (["report", "--store", "{store}"], 0),
    "serve": (["serve", "--store", "{tmp}/nosuch"], 1),
    "query": (["query", "--store", "{store}", SQL], 0),
    "export perfetto": (["export", "perfetto", CAPTURE, "--force", "-o", "{tmp}/x.pftrace"], 0),
    "export otlp": (["export", "otlp", CAPTURE, "--force", "-o", "{tmp}/x.jsonl"], 0),
    "verify": (["verify", "plain"], 1),
    "store check": (["store", "check", "--store", "{store}"], 0),
    "store convert": (["store", "convert", "--store", "{store}"], 0),
    "verify-seal": (["verify-seal", "{sealed}"], 0),
    "hooks": (["hooks"], 0),
}
"""Command -> a call of it that ends soon, and its ordinary exit status; None if the status depends on the machine."""
MORE = {
    "query --json": (["query", "--store", "{store}", SQL, "--json"], 0),
    "query csv": (["query", "--store", "{store}", SQL, "--format=csv"], 0),
    "query large csv": (["query", "--store", "{store}", "FROM delays", "--format=csv"], 0),
    "query -": (["query", "--store", "{store}", "-"], 0),
    "report --json": (["report", "--store", "{store}", "--json"], 0),
    "report --runs": (["report", "--store", "{store}", "--runs"], 0),
    "replay --json": (["replay", CAPTURE, "--json"], 0),
    "--help": (["--help"], 0),
    "--version": (["--version"], 0),
    "usage": (["report", "--nosuch"], 2),
    "wrong SQL": (["query", "--store", "{store}", "SELECT nosuch FROM delays"], 2),
}
ALL = COMMANDS | MORE
ODD = {
    "plain": {},
    "stdout closed": {"stdout": None},
    "stdout full": {"stdout": "/dev/full"},
    "stderr closed": {"stderr": None},
    "stderr full": {"stderr": "/dev/full"},
    "stdin closed": {"stdin": None},
    "latin-1": {"encoding": "latin-1"},
    "ascii": {"encoding": "ascii"},
    "New York": {"environment": {"TZ": "America/New_York"}},
}
STDIN = {"correct": PINGED, "query -": SQL}
ZONED = {"query --json", "query csv", "report --runs"}
PAIRS = [
    (name, odd)
    for name in ALL
    for odd in ODD
    if (name in COMMANDS and (odd != "latin-1" or name in {"correct", "report", "query"}))
    or odd in {"plain", "stdout full", "ascii"}
    or (odd == "New York" and name in ZONED)
    or (odd == "stdin closed" and name in STDIN)
]


def test_every_command_has_a_call():
    assert {command.name for command in registry.COMMANDS} == set(COMMANDS)


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    place = tmp_path_factory.mktemp("walk")
    store = place / "store"
    cli.main(["replay", CAPTURE, "--store", str(store)])
    for name, text in STDIN.items():
        (place / name).write_text(text)
    sealed = place / "sealed"
    fill(sealed, [], seal=new_key(place))
    cases = {}
    for name, (argv, _) in ALL.items():
        here = [each.format(tmp=place, store=store, sealed=sealed) if "{" in each else each for each in argv]
        case = CommandCase(here, stdin=str(place / name) if name in STDIN else os.devnull, unprivileged=not reads(here))
        for odd, changes in ODD.items():
            if (name, odd) in PAIRS:
                cases[name, odd] = replace(case, **changes)
    return dict(zip(cases, run(cases.values(), place), strict=True))


def reads(argv):
    """Return whether a command only works on files; others are run as an unprivileged user."""
    return argv[0] in {"replay", "correct", "report", "serve", "query", "export", "ingest", "store", "verify-seal"}


def complaints(done):
    return [line for line in done.err.decode("utf-8", "replace").splitlines() if line.startswith("mace: ")]


def cases(*odd):
    return pytest.mark.parametrize(("name", "odd"), [pair for pair in PAIRS if pair[1] in odd])


@pytest.mark.slow
class TestEveryCommand:
    @cases("plain")
    def test_ordinary_streams(self, walked, name, odd):
        done, expected = walked[name, odd], ALL[name][1]
        assert done.status in ({0, 1} if expected is None else {expected}), done
        if name != "usage":
            assert len(complaints(done)) == (done.status != 0), done

    @cases(*ODD)
    def test_no_traceback_and_no_status_of_pythons_own(self, walked, name, odd):
        done = walked[name, odd]
        assert b"Traceback" not in done.err, done
        assert b"Exception ignored" not in done.err, done
        assert done.status in {0, 1, 2}, done

    @cases("stdout closed", "stdout full")
    def test_a_failed_write_of_results_is_reported_in_one_line(self, walked, name, odd):
        plain, done = walked[name, "plain"], walked[name, odd]
        if not plain.out:
            assert (done.status, done.err) == (plain.status, plain.err)
            return
        assert done.status == 1, done
        why = "Bad file descriptor" if odd == "stdout closed" else "No space left on device"
        assert complaints(done) == [f"mace: cannot write: {why}"]

    @cases("stderr closed", "stderr full")
    def test_without_standard_error_the_exit_status_is_unchanged(self, walked, name, odd):
        plain, done = walked[name, "plain"], walked[name, odd]
        assert done.out == plain.out
        # A stream that the user has closed is no failure; a failed write is.
        unsaid = odd == "stderr full" and plain.err
        assert done.status == (plain.status or int(bool(unsaid)))

    @cases("stdin closed")
    def test_without_standard_input_only_its_reader_fails(self, walked, name, odd):
        plain, done = walked[name, "plain"], walked[name, odd]
        if name in STDIN:
            assert done.status == 1
            assert [c.partition(";")[0] for c in complaints(done)] == ["mace: standard input: Bad file descriptor"]
        else:
            assert (done.status, done.out) == (plain.status, plain.out)

    @cases("latin-1", "ascii")
    def test_characters_that_the_encoding_lacks_are_substituted(self, walked, name, odd):
        plain, done = walked[name, "plain"], walked[name, odd]
        assert done.status == plain.status, done
        assert len(done.out.splitlines()) == len(plain.out.splitlines())
        if odd == "ascii" and "csv" not in name:
            assert done.out.isascii()

    @cases("New York")
    def test_the_time_zone_changes_nothing(self, walked, name, odd):
        plain, done = walked[name, "plain"], walked[name, odd]
        assert (done.status, done.out) == (plain.status, plain.out)


@pytest.mark.slow
def test_tables_keep_their_columns_in_ascii(walked):
    out = walked["report", "ascii"].out.decode("ascii")
    assert "> network" in out
    assert "us" in out
    plain = walked["report", "plain"].out.decode()
    assert [len(line) for line in out.splitlines()] == [len(line) for line in plain.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("streams", [">&-", "> /dev/full", "2>&-", "2> /dev/full", "<&-", ">&- 2>&- <&-"])
def test_a_process_of_its_own(streams, tmp_path):
    """Python itself starts with a closed stream in a new process."""
    done = subprocess.run(
        ["sh", "-c", f'"$0" -m mace hooks --json {streams}', sys.executable],
        capture_output=True, text=True, check=False, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    wrong = ">&- 2" in streams or streams in {">&-", "> /dev/full"}
    assert done.returncode == int(wrong)
    if not wrong:
        assert json.loads(done.stdout)["hooks"]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_output_to_a_closed_stream_reaches_no_file(tmp_path):
    """Without standard output the first opened file would get its descriptor."""
    store = tmp_path / "store"
    shutil.rmtree(store, ignore_errors=True)
    [done] = run([CommandCase(["replay", CAPTURE, "--store", str(store)], stdout=None)], tmp_path)
    assert (done.status, complaints(done)) == (1, ["mace: cannot write: Bad file descriptor"])
    [found] = run(
        [CommandCase(["query", "--store", str(store), "SELECT count(*) AS n FROM delays", "--json"])], tmp_path
    )
    assert json.loads(found.out)["rows"][0][0] > 0
