import os
from pathlib import Path

import pytest

from collector.ftrace import tracefs
from collector.machine.processes import start_ticks
from contracts.errors import SourceError, Unavailable

STATS = """\
entries: 12
overrun: 100
commit overrun: 1
bytes: 76880
oldest event ts:  2712.300000
now ts:  2999.000000
dropped events: 10
read events: 7
"""


def test_stats_add_up_all_losses():
    assert tracefs.parse_stats(STATS) == tracefs.RingStats(entries=12, read=7, lost=111)
    with pytest.raises(SourceError, match="overrun"):
        tracefs.parse_stats("entries: 1\nread events: 4\n")


def test_the_usual_mount_is_preferred():
    mounts = "nodev /sys/kernel/debug/tracing tracefs rw 0 0\nnodev /sys/kernel/tracing tracefs rw 0 0\n"
    assert tracefs.mounted(mounts) == Path("/sys/kernel/tracing")
    assert tracefs.mounted("proc /proc proc rw 0 0\n") is None
    assert tracefs.mounted("t /mnt/a\\040b tracefs rw 0 0\n") == Path("/mnt/a b")


def test_not_root(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(Unavailable, match="root"):
        tracefs.find()


def test_tracefs_that_cannot_be_mounted(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(tracefs, "mounted", lambda mounts: None)

    def refuse(point):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(tracefs, "_mount", refuse)
    with pytest.raises(Unavailable, match="not mounted and cannot be: Operation not permitted; mount -t tracefs"):
        tracefs.find()


def test_only_instances_of_dead_runs_are_removed(tmp_path):
    instances = tmp_path / "instances"
    start = start_ticks(os.getpid())
    mine = f"mace-{os.getpid()}-{start}-00ff"
    reused_pid = f"mace-{os.getpid()}-{start - 1}-00ff"
    gone = "mace-4194304-17-00ff"  # above the largest possible PID
    for name in (mine, reused_pid, gone, "mace-mine", "other"):
        (instances / name).mkdir(parents=True)
    assert sorted(tracefs.remove_leftovers(tmp_path)) == sorted([reused_pid, gone])
    assert sorted(p.name for p in instances.iterdir()) == sorted([mine, "mace-mine", "other"])


def test_an_instance_in_use_is_left_alone(tmp_path):
    # The kernel refuses to remove an instance with an open file; here a directory that is not empty stands for it.
    busy = tmp_path / "instances/mace-4194304-17-00ff"
    busy.mkdir(parents=True)
    (busy / "file").touch()
    with pytest.raises(SourceError, match="cannot be removed"):
        tracefs.remove_leftovers(tmp_path)


def fake_instance(tmp_path):
    (tmp_path / "i").mkdir()
    return tracefs.Instance(tmp_path, tmp_path / "i")


def test_clock_of_the_wrong_kind(tmp_path):
    instance = fake_instance(tmp_path)
    (instance.path / "trace_clock").write_text("[local] global counter")
    with pytest.raises(Unavailable, match="no trace clock 'mono', only local, global, counter"):
        instance.set_clock("mono")
    # A kernel that accepts the name and chooses another clock.
    (instance.path / "trace_clock").write_text("[local] mono")
    with pytest.raises(SourceError, match="expected 'mono'"):
        instance.set_clock("mono")


def test_refused_writes_say_where_and_what(tmp_path):
    with pytest.raises(SourceError, match=r"absent: the kernel refuses '1': No such file"):
        tracefs.write(tmp_path / "absent", "1")
    with pytest.raises(SourceError, match="absent: cannot be read"):
        tracefs.read(tmp_path / "absent")


def test_a_kernel_without_buffer_percent_is_left_unchanged(tmp_path):
    made = fake_instance(tmp_path)
    made.set_readable_at(12)
    assert list(made.path.iterdir()) == []
    (made.path / "buffer_percent").write_text("50")
    made.set_readable_at(12)
    assert (made.path / "buffer_percent").read_text() == "12"
