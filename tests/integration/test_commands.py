"""The command line on the real kernel: the README's tour word by word, labs of both runtimes, terminal output."""

import json
import os
import pty
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from mace.cli import main
from mace.lab import Spec, down, list_labs, running
from tests.measuring import MACE, ROOT, wait_for

pytestmark = [pytest.mark.needs("root", "tracefs", "netns"), pytest.mark.slow]


def test_the_readmes_five_minutes(tmp_path):
    """The README's commands run literally, with a shorter duration and another directory."""
    [script] = re.findall(r"## Five minutes\n\n```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    first = tmp_path / "first"
    for old, new in (
        (". .venv/bin/activate", "set -e"),
        ("/tmp/first", str(first)),
        ("--duration 20", "--duration 100"),
        ("sleep 3 ", f"until [ -s {first}.mace ]; do sleep 0.1; done "),
        ("--count 1000", "--count 100"),
        ("-c 5", "-c 2"),
        ("\nwait\n", "\nkill $!\nwait $!\n"),
    ):
        assert old in script
        script = script.replace(old, new)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    try:
        done = subprocess.run(
            ["bash", "-c", script], capture_output=True, text=True, check=False, env=os.environ | {"PATH": path}
        )
    finally:
        left = down("lab", force=True)
    assert done.returncode == 0, done.stderr
    assert not left, "the tour takes its lab down"
    said = done.stdout
    assert "lab lab is up: host, remote, c1, c2" in said
    assert "lab lab: removed" in said
    assert "2 received" in said
    # Run, report and replay have the same ledger, and the same figures for each container.
    for line in (r"packets [\d,]+ · ledger: records [\d,]+ · matched [\d,]+", r"c[12] +(?:egress|ingress) +[\d,]+ .*"):
        found = re.findall(line, said)
        assert len(found) >= 3
        assert {said.count(each) >= 3 for each in found} == {True}, found
    assert "c1 → network: typical path" in said
    page = first.with_suffix(".html").read_text()
    assert {name in re.search("<noscript>(.*?)</noscript>", page, re.S)[1] for name in ("c1", "c2")} == {True}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("runtime", ["netns", pytest.param("docker", marks=pytest.mark.needs("docker"))])
def test_a_lab_by_its_commands(runtime, capfd):
    name = f"cmd-{runtime}"

    def said(*argv, status=0):
        assert main(["lab", *argv]) == status
        return capfd.readouterr()

    try:
        made = said("up", name, "--runtime", runtime, "--containers", "2")
        assert made.out == f"lab {name} is up: host, remote, c1, c2\n"
        [listed] = [one for one in json.loads(said("list", "--json").out)["labs"] if one["name"] == name]
        assert (listed["status"], listed["runtime"], listed["containers"]) == ("up", runtime, ["c1", "c2"])
        again = said("up", name, status=1).err
        assert again.startswith("mace: ")
        assert again.count("\n") == 1
        assert name in again
        said("exec", "--lab", name, "c1", "--", "sh", "-c", "exit 7", status=7)
        assert "eth0" in said("exec", "--lab", name, "c2", "--", "ip", "link").out
        for kind in ("ping", "udp", "tcp"):
            sent = said("traffic", kind, "--lab", name, "--from", "c2", "--count", "5").out
            assert json.loads(sent)["received"] == 5
    finally:
        taken = said("down", name).out
    assert taken == f"lab {name}: removed\n"
    assert said("down", name).out == f"lab {name}: no such lab\n"
    assert name not in {info.name for info in list_labs()}


@contextmanager
def terminal():
    """Yield the file descriptor of a terminal, and a function that returns what was written to it so far."""
    ours, theirs = pty.openpty()
    said = bytearray()

    def read():
        try:
            while found := os.read(ours, 65536):
                said.extend(found)
        except OSError:
            # EIO: no process has the other end open.
            return

    reader = threading.Thread(target=read, daemon=True)
    reader.start()

    def told():
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.decode(errors="replace"))

    try:
        yield theirs, told
    finally:
        os.close(theirs)
        reader.join(timeout=10)
        os.close(ours)


TERMINAL = {"TERM": "xterm-256color", "COLUMNS": "120"}


def test_a_terminal_shows_a_table_while_it_runs():
    with running(Spec(name="live")) as lab, terminal() as (stderr, told):
        argv = [*MACE, "run", "--lab", "live", "--no-store"]
        environment = os.environ | TERMINAL
        with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=stderr, cwd=ROOT, env=environment) as run:
            try:
                wait_for(lambda: "measuring" in told() or run.poll() is not None, what="the beginning")
                flow = lab.start_ping("c1", count=2_000, interval_s=0.01)
                wait_for(lambda: re.search(r"c1 +egress +\d", told()) and "ledger: records" in told(), what="a table")
                assert run.poll() is None
                libraries = Path(f"/proc/{run.pid}/maps").read_text()
                flow.close()
            finally:
                run.terminate()
                out, _ = run.communicate(timeout=60)
    assert run.returncode == 0
    # Without a store, a run spares the 30 MiB of Arrow.
    assert "numpy" in libraries
    assert not re.search(r"arrow|duckdb", libraries)
    # The result is on stdout, once.
    assert out.decode().count("Time of each packet in the container's devices") == 1


GOLDEN = "tests/golden/both-sources"


@pytest.mark.parametrize(
    ("command", "file", "times"),
    [
        ("replay {file}", "docs/example.mace", 1),
        ("replay {file} --store {new}", "docs/example.mace", 1),
        ("export perfetto {file} -o {new} --worst 3", "docs/example.mace", 2),
        (f"correct {GOLDEN}/ping.txt {{file}} --container c1", f"{GOLDEN}/ftrace.mace", 1),
    ],
)
def test_a_terminal_shows_the_progress_of_long_work(tmp_path, command, file, times):
    argv = [*MACE, *command.format(file=file, new=tmp_path / "new").split()]
    with terminal() as (stderr, told):
        subprocess.run(argv, stdout=subprocess.PIPE, stderr=stderr, cwd=ROOT, env=os.environ | TERMINAL, check=True)
    size = times * (ROOT / file).stat().st_size / 1000
    assert f"{size:.1f}/{size:.1f} kB" in told()
