"""`mace top` in a real terminal, tmux, over a real lab: what is on the screen, its files, and how it leaves."""

import itertools
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import termios
from contextlib import contextmanager
from pathlib import Path

import pytest

from collector.capture.source import Capture
from contracts.records import Batch
from mace.lab import Spec, running
from tests.measuring import mace, trace_instances, wait_for
from tests.places import ROOT

MACE_TOP = (sys.executable, "-m", "mace", "top")
CAPTURE = ROOT / "docs/example.mace"
NUMBERS = itertools.count()
FAILING = """
import asyncio, pathlib, sys
from contracts.errors import SourceError
from mace import cli
from mace.commands import settings

async def fails():
    while not pathlib.Path("fail").exists():
        await asyncio.sleep(0.02)
    raise SourceError("the ring is gone")

settings.lasting = lambda _: fails
sys.exit(cli.main(sys.argv[1:]))
"""
"""`mace` whose live measurement fails as soon as a file appears."""


class Terminal:
    """A terminal of 80 × 24 in a tmux server of its own, that runs a shell."""

    def __init__(self, folder):
        self.name = f"mace-top-{os.getpid()}-{next(NUMBERS)}"
        self.folder = folder
        # The shell's own prompt would differ from machine to machine.
        environment = os.environ | {"PS1": "$ ", "PYTHONPATH": str(ROOT), "TMUX": "", "LC_ALL": "C.UTF-8"}
        size = ("-x", "80", "-y", "24")
        argv = ("-f", os.devnull, "new-session", "-d", *size, "-c", str(folder), "exec sh")
        self._tmux(*argv, environment=environment)

    def _tmux(self, *argv, environment=None):
        done = subprocess.run(
            ["tmux", "-L", self.name, *argv], capture_output=True, text=True, check=False, env=environment, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def type(self, text):
        self._tmux("send-keys", "-l", text)

    def press(self, *keys):
        self._tmux("send-keys", *keys)

    def shown(self, *options):
        return self._tmux("capture-pane", "-p", *options)

    def has(self, pattern):
        """Wait for a text on the screen, a regular expression; returns the match."""
        found = []

        def there():
            found[:] = [re.search(pattern, self.shown(), re.MULTILINE)]
            return found[0]

        try:
            wait_for(there, limit_s=120, what=repr(pattern))
        except AssertionError as error:
            raise AssertionError(f"{error}; the screen shows\n{self.shown()}") from None
        return found[0]

    def run(self, *argv):
        """Run a command in the shell, which prints its status behind it."""
        self.type(f"{shlex.join(map(str, argv))}; echo status $?")
        self.press("Enter")

    def pid(self, of):
        """Return the process id of the command that runs in the shell."""
        [shell] = self._tmux("list-panes", "-F", "#{pane_pid}").split()
        for child in Path(f"/proc/{shell}/task/{shell}/children").read_text().split():
            if of in Path(f"/proc/{child}/cmdline").read_text():
                return int(child)
        raise AssertionError(f"no {of} in the terminal:\n{self.shown()}")

    def is_as_before(self):
        """Return whether the shell reads lines again: its input is echoed, and the alternate screen is left."""
        return self._tmux("display-message", "-p", "#{alternate_on} #{cursor_flag}").split() == ["0", "1"]

    def end(self):
        subprocess.run(["tmux", "-L", self.name, "kill-server"], capture_output=True, check=False, timeout=60)
        # tmux leaves its socket behind.
        Path(os.environ.get("TMUX_TMPDIR", "/tmp"), f"tmux-{os.getuid()}", self.name).unlink(missing_ok=True)


@contextmanager
def terminal(folder):
    made = Terminal(folder)
    try:
        yield made
    finally:
        made.end()


@pytest.fixture(scope="module")
def lab():
    with running(Spec(name=f"top{os.getpid()}", containers=2)) as made:
        # From here on no packet waits for a neighbour.
        for name in made.containers:
            made.ping(name, count=2)
        yield made


@pytest.fixture
def measured(lab, tmp_path):
    """A terminal in which `mace top` measures the lab, while c1 pings."""
    with terminal(tmp_path) as made:
        pings = lab.start_ping("c1", count=100_000)
        try:
            made.run(*MACE_TOP, "--lab", lab.name, "--source", "ftrace", "--cpus")
            made.has(r"c1 +egress +\d")
            yield made
        finally:
            pings.close()


@pytest.mark.slow
@pytest.mark.needs("root", "tracefs", "netns", "tmux")
class TestOverALab:
    def test_it_shows_measures_records_and_leaves(self, measured, lab, tmp_path):
        measured.has(r"c1 +ingress +\d[\d.,]* +\d[\d.,]* +\d[\d.,]* +\d[\d.,]* .*[▁▂▃▄▅▆▇█]")
        measured.has(r"lost 0 · discarded 0 · records \d")
        pid = measured.pid("top")
        measured.press("Enter")
        for device in ("eth0", "veth", "br", "out", "rem"):
            measured.has(rf"^    {device}\S* +(overhead|outside) +\d")
        measured.type("w")
        measured.has(r"packet \d+ of c1, \d+ bytes")
        measured.press("q")
        measured.has("container▴")
        measured.type("r")
        capture = tmp_path / measured.has(r"recording to (mace-\w+\.mace)")[1]
        measured.has(r"REC [1-9]")
        measured.type("r")
        measured.has("recorded [0-9,]+ records")
        measured.has(r"t: ([1-9]|10) s kept")
        measured.type("t")
        measured.has(r"wrote the last \d+\.\d s to (mace-\w+\.pftrace)")
        measured.type("q")
        measured.has(r"^status 0$")
        assert measured.is_as_before()
        measured.has(r"matched \d")
        assert trace_instances(pid) == []
        with Capture(capture) as found:
            assert sum(len(item) for item in found if isinstance(item, Batch)) > 0
            assert not found.truncated
        assert "c1" in mace("replay", capture).stdout
        [trace] = tmp_path.glob("*.pftrace")
        assert trace.stat().st_size > 1_000

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_ends_it_and_restores_the_terminal(self, measured, number):
        pid = measured.pid("top")
        os.kill(pid, number)
        measured.has(r"^status 0$")
        assert measured.is_as_before()
        assert trace_instances(pid) == []

    def test_the_page_of_cpus(self, measured):
        def counted():
            """Open the page of CPUs; leave it unless an interval of ten seconds has ended."""
            measured.type("c")
            there = measured.has("Stages: CPU|nothing is counted yet")[0].startswith("Stages")
            if not there:
                measured.type("c")
            return there

        wait_for(counted, limit_s=120, what="an interval of stages")
        measured.has(r"eth0 +c1 +egress +\d → \d")
        measured.type("c")
        measured.has("container▴")

    def test_ctrl_c_ends_it(self, measured):
        pid = measured.pid("top")
        measured.press("C-c")
        measured.has(r"^status 0$")
        assert measured.is_as_before()
        assert trace_instances(pid) == []

    def test_packets_that_were_left_out_are_not_written_to_a_file(self, lab, tmp_path):
        """The source ftrace records them all the same."""
        with terminal(tmp_path) as made:
            made.run(*MACE_TOP, "--lab", lab.name, "--source", "ftrace", "--container", "c1")
            made.has("container▴")
            made.type("r")
            made.has("ftrace records every packet")
            made.type("q")
            made.has(r"^status 0$")
        assert list(tmp_path.iterdir()) == []

    def test_a_terminal_that_closes_ends_it(self, measured):
        pid = measured.pid("top")
        measured.end()
        wait_for(lambda: not Path(f"/proc/{pid}").exists(), limit_s=120, what="the process to end")
        assert trace_instances(pid) == []

    def test_a_measurement_that_fails_restores_the_terminal_and_says_why(self, lab, tmp_path):
        with terminal(tmp_path) as made:
            made.run(sys.executable, "-c", FAILING, "top", "--lab", lab.name, "--source", "ftrace")
            made.has("container▴")
            pid = made.pid("top")
            (tmp_path / "fail").touch()
            made.has(r"^mace: the ring is gone$")
            made.has(r"^status 1$")
            assert made.is_as_before()
            assert "Traceback" not in made.shown()
            assert trace_instances(pid) == []


@pytest.mark.slow
@pytest.mark.needs("tmux")
def test_a_recording_is_looked_at(tmp_path):
    with terminal(tmp_path) as made:
        made.run(*MACE_TOP, CAPTURE)
        made.has(r"c1 +egress +\d")
        made.type("3")
        before = made.has(r"60 s to (\S+) UTC")[1]
        made.type("1b")
        made.has(r"1 s to (?!" + before + r")\S+ UTC")
        made.type("n")
        made.has(r"1 s to " + before)
        made.type("r")
        made.has("a store has no records")
        made.type("q")
        made.has(r"^status 0$")
        assert made.is_as_before()


@pytest.mark.slow
@pytest.mark.needs("tmux")
def test_without_colour(tmp_path):
    with terminal(tmp_path) as made:
        made.run("env", "NO_COLOR=1", *MACE_TOP, CAPTURE)
        made.has(r"c1 +egress +\d")
        used = {each for codes in re.findall(r"\x1b\[([\d;]+)m", made.shown("-e")) for each in codes.split(";")}
        assert "7" in used  # reverse, at the cursor
        assert not [each for each in used if re.fullmatch(r"3[0-8]|4[0-8]|9\d|10\d", each)], used
        made.type("q")
        made.has(r"^status 0$")


@pytest.mark.slow
@pytest.mark.needs("tmux")
@pytest.mark.parametrize(
    ("argv", "environment", "told"),
    [
        ((), {"TERM": "dumb"}, "TERM=dumb names no terminal"),
        (("--store", "/nosuch"), {}, "/nosuch: no such directory"),
        ((str(ROOT / "README.md"),), {}, "no format that can be replayed"),
        (("--store", "x", "--source", "bpf"), {}, "--source is for measuring"),
        (("--until", "5m"), {}, "--until is a time in a store or recording"),
    ],
)
def test_what_cannot_be_shown_is_said_in_one_line(tmp_path, argv, environment, told):
    with terminal(tmp_path) as made:
        made.run("env", *(f"{name}={value}" for name, value in environment.items()), *MACE_TOP, *argv)
        made.has(r"^status [12]$")
        text = made.shown().replace("\n", "")
        assert "Traceback" not in text
        assert told in text


@pytest.mark.slow
def test_without_the_library_it_names_the_extra(tmp_path):
    (tmp_path / "textual.py").write_text("raise ImportError('no module', name='textual')\n")
    master, tty = pty.openpty()
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "TERM": "xterm"}
    done = subprocess.run(
        [*MACE_TOP, CAPTURE], stdin=tty, stdout=tty, stderr=tty, check=False, env=environment, timeout=120
    )
    told = os.read(master, 1 << 16).decode()
    os.close(tty)
    os.close(master)
    assert done.returncode == 1
    assert told.split("\r\n")[:-1] == ["mace: top: the Python module textual is not installed; pip install 'mace[top]'"]


@pytest.mark.slow
def test_a_terminal_that_takes_nothing_does_not_keep_it_from_ending(tmp_path):
    """Nobody reads this terminal: its buffer is full after the first drawings."""
    master, tty = pty.openpty()
    termios.tcsetwinsize(tty, (200, 400))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm"}
    process = subprocess.Popen([*MACE_TOP, CAPTURE], stdin=tty, stdout=tty, stderr=tty, env=environment, cwd=tmp_path)
    try:
        drawn = b""
        while b"mace top" not in drawn:
            drawn += os.read(master, 1 << 16)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 0
    finally:
        process.kill()
        process.wait()
        os.close(tty)
        os.close(master)
