"""CPU quotas and pressure of a process's control groups, from made-up trees of both versions."""

import os

import pytest

from collector.machine.cgroups import CpuGroups, CpuWant, cpu_want

PID = 4711
V2 = {
    "proc/4711/cgroup": "0::/system.slice/tool.scope\n",
    "proc/self/mounts": "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n",
    "proc/pressure/cpu": "some avg10=0.00 avg60=0.00 avg300=0.00 total=900\n",
    "sys/fs/cgroup/cpu.stat": "usage_usec 5\nuser_usec 5\n",
    "sys/fs/cgroup/system.slice/cpu.stat": "usage_usec 5\nnr_periods 9\nnr_throttled 1\nthrottled_usec 30\n",
    "sys/fs/cgroup/system.slice/tool.scope/cpu.stat": "nr_periods 4\nnr_throttled 2\nthrottled_usec 200\n",
    "sys/fs/cgroup/system.slice/tool.scope/cpu.pressure": (
        "some avg10=0.00 avg60=0.00 avg300=0.00 total=70\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=3\n"
    ),
}
V1 = {
    "proc/4711/cgroup": "3:cpu,cpuacct:/tool\n2:cpuset:/\n0::/\n",
    "proc/self/mounts": (
        "cgroup /sys/fs/cgroup/cpuset cgroup rw,cpuset 0 0\n"
        "cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,cpu,cpuacct 0 0\n"
        "cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n"
    ),
    "proc/pressure/cpu": "some avg10=0.00 avg60=0.00 avg300=0.00 total=900\n",
    "sys/fs/cgroup/cpu,cpuacct/cpu.stat": "nr_periods 0\nnr_throttled 0\nthrottled_time 0\n",
    "sys/fs/cgroup/cpu,cpuacct/tool/cpu.stat": "nr_periods 4\nnr_throttled 2\nthrottled_time 200000\n",
}


def tree(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "want"),
    [
        (V2, CpuWant(3, 230_000, 70_000)),
        (V1, CpuWant(2, 200_000, 900_000)),
        # The kernel was built without pressure.
        ({name: text for name, text in V1.items() if "pressure" not in name}, CpuWant(2, 200_000, None)),
        # The group is not to be seen here, as in a container with a part of the tree.
        (V2 | {"proc/4711/cgroup": "0::/elsewhere\n"}, CpuWant(0, 0, 900_000)),
        ({"proc/4711/cgroup": "0::/\n", "proc/self/mounts": ""}, CpuWant(None, None, None)),
        ({}, CpuWant(None, None, None)),
    ],
)
def test_totals(tmp_path, files, want):
    root = tree(tmp_path, files)
    assert cpu_want(CpuGroups.of(PID, root), root) == want


def test_the_difference_is_what_was_added():
    assert CpuWant(5, 300, None).since(CpuWant(3, 100, 7)) == CpuWant(2, 200, None)


def test_of_this_process():
    """Whatever this machine has: a total never falls."""
    groups = CpuGroups.of(os.getpid())
    first = cpu_want(groups)
    added = cpu_want(groups).since(first)
    assert all(value is None or value >= 0 for value in (added.throttled, added.throttled_ns, added.pressure_ns))
