"""What goes wrong on real machines: a clear error, nothing lost that was acknowledged, nothing left behind."""

import json
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from collector.capture_source import Capture
from mace.lab import Spec, list_labs, running
from tests.measuring import MACE, ROOT, mace, measured, wait_for

pytestmark = pytest.mark.needs("root", "tracefs", "netns")

TRACEFS = Path("/sys/kernel/tracing/instances")


def instances(pid):
    return [path.name for path in TRACEFS.glob(f"mace-{pid}-*")]


def start(*argv):
    return subprocess.Popen(
        [*MACE, *map(str, argv)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )


def test_without_root():
    """As another user, who has become so once the program was loaded: the tree may lie where only root can read."""
    program = (
        "import os, sys; from mace.cli import main; os.setgroups([]); os.setgid(65534); os.setuid(65534);"
        " sys.exit(main(['run', '--no-store', '--duration', '1']))"
    )
    done = subprocess.run([MACE[0], "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("mace: ")
    assert done.stderr.count("\n") == 1
    assert "root" in done.stderr


def test_without_tracefs():
    """In a mount namespace in which nothing of the kind is mounted, and may not be."""
    hide = (
        "umount -l /sys/kernel/tracing; mount -t tmpfs -o ro none /sys/kernel && exec "
        + " ".join(MACE)
        + " run --no-store --duration 1"
    )
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", hide], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 1
    assert "tracefs" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_a_run_in_order(tmp_path, number):
    with running(Spec(name="sig")) as lab:
        run = start("run", "--lab", "sig", "--store", tmp_path / "s", "--record", tmp_path / "f.mace", "--json")
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
def test_kill_at_any_moment_loses_nothing_acknowledged_and_the_next_start_tidies_up(tmp_path):
    dice = random.Random(7)
    with running(Spec(name="axe")) as lab:
        traffic = lab.start_udp("c1", count=10_000_000, rate_pps=3_000, duration_s=200)
        for turn in range(8):
            store, file = tmp_path / f"s{turn}", tmp_path / f"f{turn}.mace"
            run = start("run", "--lab", "axe", "--store", store, "--record", file, "--json")
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
            following = mace("run", "--lab", "axe", "--no-store", "--duration", "0.3", "--json")
            assert json.loads(following.stdout)["ledger"]["records"] > 0
            assert not instances(run.pid)
        traffic.close()


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_killed_demo_is_tidied_up_by_the_next(tmp_path):
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
    assert ledger["records"] == sum(ledger[name] for name in named) > 10_000


@pytest.mark.slow
def test_a_disk_that_fills_up(tmp_path):
    """The run ends with an error; what was stored before can be read."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "mace-test", disk], check=True)
    try:
        with running(Spec(name="full")) as lab:
            run = start("run", "--lab", "full", "--store", disk / "store", "--duration", "60", "--json")
            wait_for(lambda: instances(run.pid), what="the trace instance")
            flow = lab.start_udp("c1", count=10_000_000, duration_s=40)
            _, err = run.communicate(timeout=60)
            flow.close()
        assert run.returncode == 1
        assert "No space left" in err
        assert str(disk) in err
        assert not instances(run.pid)
        found = json.loads(mace("report", "--store", disk / "store", "--json").stdout)
        assert found["packets"] >= 0
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.slow
def test_two_writers_on_one_store(tmp_path):
    with running(Spec(name="pair")) as lab, measured(lab, tmp_path) as measurement:
        second = mace("run", "--lab", "pair", "--store", measurement.store, "--duration", "1", check=False)
    assert second.returncode == 1
    assert str(measurement.process.pid) in second.stderr
    assert second.stderr.count("\n") <= 2


def test_a_lab_that_is_not_there():
    done = mace("run", "--lab", "nosuch", "--no-store", check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "nosuch" in done.stderr
