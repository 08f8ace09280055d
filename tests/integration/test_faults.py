"""Faults of real machines cause a clear error, lose no acknowledged row and leave nothing behind."""

import json
import random
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from collector.capture.source import Capture
from contracts.records import Batch
from mace.lab import Spec, list_labs, running
from storage.sealing.check import check
from storage.sealing.keys import public_key
from storage.sealing.log import has_statement
from storage.sealing.places import has_seal, seal_path
from tests.measuring import MACE, ROOT, UNMOUNT_TRACEFS, balanced, mace, measured, wait_for
from tests.sealing import write_key

pytestmark = pytest.mark.needs("root", "tracefs", "netns")

TRACEFS = Path("/sys/kernel/tracing/instances")


FTRACE = ("--source", "ftrace")
"""The source that a killed process leaves something of, and by whose instance a test sees that it has begun."""


def instances(pid):
    return [path.name for path in TRACEFS.glob(f"mace-{pid}-*")]


def start(*argv):
    return subprocess.Popen(
        [*MACE, *map(str, argv)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )


AS_NOBODY = """
import contextlib, io, json, os, sys
from mace.cli import main
from tests.forked_commands import import_all
import_all()
os.setgroups([]), os.setgid(65534), os.setuid(65534)
for command in sys.argv[1:]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(command.split())
    print(json.dumps([status, out.getvalue(), err.getvalue()]))
"""
"""Runs a command as another user, after loading the program as root: other users may not be able to read the tree."""


@pytest.mark.slow
def test_without_root(tmp_path):
    live = ["run --no-store", f"record -o {tmp_path}/f.mace", "demo --duration 1", "lab up nobody"]
    argv = [MACE[0], "-c", AS_NOBODY, *live, "check --json"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, cwd=ROOT)
    *ended, (status, checked, _) = map(json.loads, done.stdout.splitlines())
    assert len(ended) == len(live)
    for number, out, err in ended:
        assert (number, out) == (1, "")
        assert err.startswith("mace: ")
        assert err.count("\n") == 1
        assert "root" in err
    # `mace check` reports what can run here, which is no error.
    assert status == 0
    parts = json.loads(checked)
    for part in (parts["source ftrace"], parts["lab netns"]):
        assert not part["ok"]
        assert "root" in part["detail"] + part["remedy"]
        assert part["remedy"]


@pytest.mark.slow
def test_without_tracefs():
    """The mount namespace has no tracefs, and may not mount one."""
    hide = f"{UNMOUNT_TRACEFS}; mount -t tmpfs -o ro none /sys/kernel; exec "
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-ec", hide + " ".join(MACE) + " run --no-store --duration 1"],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 1
    assert "tracefs" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.needs("bpf")
def test_auto_takes_bpf_and_where_it_cannot_run_ftrace():
    """The module is not loaded here. The second run's mount namespace hides the kernel's BTF."""
    argv = [*MACE, "run", "--no-store", "--duration", "0.2"]
    hiding = ["unshare", "--mount", "sh", "-ec", 'mount -t tmpfs none /sys/kernel/btf; exec "$@"', "sh"]
    said = []
    for prefix in ([], hiding):
        done = subprocess.run([*prefix, *argv], capture_output=True, text=True, check=False, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        said.append(" ".join(done.stderr.split()))
    assert "source bpf (not kmod: /dev/mace does not exist: the module is not loaded" in said[0]
    assert "not bpf" not in said[0]
    assert "source ftrace (not kmod: /dev/mace does not exist: the module is not loaded" in said[1]
    assert "; not bpf: this kernel has no BTF: /sys/kernel/btf/vmlinux does not exist (a kernel with" in said[1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_a_run_in_order(tmp_path, number):
    with running(Spec(name="sig")) as lab:
        to = ("--store", tmp_path / "s", "--record", tmp_path / "f.mace")
        run = start("run", *FTRACE, "--lab", "sig", *to, "--json")
        wait_for(lambda: instances(run.pid), what="the trace instance")
        lab.ping("c1", count=50)
        run.send_signal(number)
        out, err = run.communicate(timeout=60)
    assert run.returncode == 0, err
    assert json.loads(out)["packets"] >= 50
    assert not instances(run.pid)
    with Capture(tmp_path / "f.mace") as capture:
        assert sum(1 for _ in capture) > 0
        assert capture.truncated is None


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_kill_loses_no_acknowledged_row_and_the_next_start_cleans_up(tmp_path):
    dice, key = random.Random(7), write_key(tmp_path / "key.pem")
    with running(Spec(name="axe")) as lab:
        traffic = lab.start_udp("c1", count=10_000_000, rate_pps=3_000, duration_s=200)
        for turn in range(4):
            store, file = tmp_path / f"s{turn}", tmp_path / f"f{turn}.mace"
            to = ("--store", store, "--record", file, "--seal", key)
            run = start("run", *FTRACE, "--lab", "axe", *to, "--json")
            wait_for(lambda run=run: instances(run.pid), what="the trace instance")
            time.sleep(dice.uniform(0.0, 3.0))
            run.kill()
            run.communicate()
            assert len(instances(run.pid)) == 1
            if file.exists() and file.stat().st_size > 100:
                with Capture(file) as capture:
                    assert all(item is not None for item in capture)
            if (store / "store.json").exists():
                json.loads(mace("report", "--store", store, "--json").stdout)
            # Whatever was sealed before the kill verifies; a kill may come before the first statement.
            sealed = [each for each in (store, file) if has_seal(each) and has_statement(seal_path(each))]
            assert [(check(each).state, check(each).findings) for each in sealed] == [("open", [])] * len(sealed)
            following = mace("run", *FTRACE, "--lab", "axe", "--no-store", "--duration", "0.3", "--json")
            assert json.loads(following.stdout)["ledger"]["records"] > 0
            assert not instances(run.pid)
        traffic.close()


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_the_next_demo_cleans_up_after_a_killed_one(tmp_path):
    dice = random.Random(11)
    for _ in range(3):
        run = start("demo", "--duration", "3", "--json")
        time.sleep(dice.uniform(0.3, 3.5))
        run.kill()
        run.communicate()
    done = mace("demo", "--duration", "1", "--json")
    assert json.loads(done.stdout.splitlines()[-1])["packets"] > 0
    assert "demo" not in {info.name for info in list_labs()}
    assert not instances(run.pid)


@pytest.mark.slow
def test_a_device_that_disappears_under_its_packets(tmp_path):
    with running(Spec(name="gone", containers=2)) as lab, measured(lab, tmp_path) as measurement:
        flow = lab.start_udp("c2", count=1_000_000, rate_pps=5_000, duration_s=3)
        time.sleep(1)
        subprocess.run(lab.command("c2", ["ip", "link", "del", "eth0"]), check=True)
        time.sleep(1)
        flow.close()
    ledger = measurement.found["ledger"]
    named = ("matched", "unmatched", "ambiguous", "expired", "dropped", "in_flight")
    assert ledger["records"] == sum(ledger[name] for name in named) > 0


@pytest.mark.slow
def test_a_disk_that_fills_up(tmp_path):
    """The run ends with an error; what was stored before can be read."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "mace-test", disk], check=True)
    try:
        with running(Spec(name="full")) as lab:
            run = start("run", *FTRACE, "--lab", "full", "--store", disk / "store", "--duration", "60", "--json")
            wait_for(lambda: instances(run.pid), what="the trace instance")
            # At this rate some flushes, a second apart, succeed before one fails.
            flow = lab.start_udp("c1", count=10_000_000, rate_pps=5_000, duration_s=40)
            _, err = run.communicate(timeout=60)
            flow.close()
        assert run.returncode == 1
        assert "No space left" in err
        assert str(disk) in err
        assert not instances(run.pid)
        found = json.loads(mace("report", "--store", disk / "store", "--json").stdout)
        balanced(found)
        assert found["packets"] > 0
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def records_in(file):
    with Capture(file) as capture:
        return sum(len(item) for item in capture if isinstance(item, Batch))


@pytest.mark.slow
def test_a_recording_that_is_ended_or_killed_can_be_replayed(tmp_path):
    killed, key = None, write_key(tmp_path / "key.pem")
    with running(Spec(name="tape")) as lab:
        for number in (signal.SIGKILL, signal.SIGTERM):
            file = tmp_path / f"{number}.mace"
            run = start("record", *FTRACE, "-o", file, "--lab", "tape", "--seal", key, "--json")
            wait_for(lambda file=file: file.exists() and file.stat().st_size > 0, what="the recording")
            assert killed is None or not instances(killed), "the next start removes what a kill left"
            lab.ping("c1", count=50)
            # Each request and reply has some twenty records; other traffic only adds to them.
            wait_for(lambda file=file: records_in(file) >= 50 * 18, what="the pings' records")
            run.send_signal(number)
            out, err = run.communicate(timeout=60)
            with Capture(file) as capture:
                assert all(item is not None for item in capture)
                assert (capture.truncated is None) == (number == signal.SIGTERM)
            sealed = check(file, key=public_key(key))
            assert (sealed.state, sealed.findings) == ("intact" if number == signal.SIGTERM else "open", [])
            assert sealed.unsealed <= 1
            found = json.loads(mace("replay", file, "--json").stdout)
            assert balanced(found).records == records_in(file)
            assert found["packets"] >= 50
            if number == signal.SIGKILL:
                killed = run.pid
                assert len(instances(killed)) == 1
    assert run.returncode == 0, err
    assert json.loads(out)["records"] == records_in(file)
    assert not instances(run.pid)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_a_demo_at_any_moment(number):
    """A signal while the demo makes the lab, measures or prints leaves no lab, trace instance or rows."""
    stores = set(Path(tempfile.gettempdir()).glob("mace-demo-*"))
    run = start("demo", "--duration", "0.5")
    wait_for(lambda: "demo" in {info.name for info in list_labs()}, what="the lab")
    time.sleep(random.Random(number).uniform(0.0, 1.2))
    run.send_signal(number)
    _, err = run.communicate(timeout=60)
    assert run.returncode in (0, 128 + number), err
    assert "demo" not in {info.name for info in list_labs()}
    assert not instances(run.pid)
    assert set(Path(tempfile.gettempdir()).glob("mace-demo-*")) <= stores


@pytest.mark.slow
def test_two_writers_on_one_store(tmp_path):
    with running(Spec(name="pair")) as lab, measured(lab, tmp_path) as measurement:
        second = mace("run", "--lab", "pair", "--store", measurement.store, "--duration", "1", check=False)
    assert second.returncode == 1
    assert str(measurement.process.pid) in second.stderr
    assert second.stderr.count("\n") <= 2


@pytest.mark.slow
def test_a_missing_lab():
    done = mace("run", "--lab", "nosuch", "--no-store", check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "nosuch" in done.stderr
