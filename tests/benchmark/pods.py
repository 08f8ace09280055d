"""Cost of naming 1,000 pods from control groups and the kubelet's log folder, in a made tree of both.

The peer is the same work without a log folder, which names the pods by their UIDs. Half of the pods have a sidecar. In
each step, which the watches do once a second, one pod ends and another comes.
"""

import json
import shutil
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from collector.machine.containers import NOBODY, Called
from collector.machine.namespace_names import NamespaceNames
from collector.machine.netns import Found
from tests.benchmark.figures import figure, folder
from tests.places import ROOT

PODS = 1000
STEPS = 20
ROUNDS = 3


@dataclass
class Namespace:
    serial: int
    found: Found
    since_s: float
    by_process: Called = NOBODY

    @property
    def inode(self) -> int:
        return self.found.inode


class Node:
    """A node's processes and logs; each pod's namespace has the inode 4026532000 + its number."""

    def __init__(self, place: Path) -> None:
        self.proc, self.logs = place / "proc", place / "pods"
        self.uids: dict[int, str] = {}
        for number in range(PODS):
            self.add(number)

    def add(self, number: int) -> Namespace:
        uid = self.uids[number] = str(uuid.uuid4())
        group = (
            f"0::/kubepods.slice/kubepods-pod{uid.replace('-', '_')}.slice/cri-containerd-{uuid.uuid4().hex * 2}.scope"
        )
        process = self.proc / str(number + 2)
        process.mkdir(parents=True)
        (process / "cgroup").write_text(group + "\n")
        for container in ("app", "istio-proxy")[: 1 + number % 2]:
            (self._logs_of(number) / container).mkdir(parents=True)
        return Namespace(number, Found(4026532000 + number, pid=number + 2), time.monotonic())

    def remove(self, number: int) -> None:
        shutil.rmtree(self.proc / str(number + 2))
        shutil.rmtree(self._logs_of(number))

    def _logs_of(self, number: int) -> Path:
        return self.logs / f"team-{number % 20}_web-{number}-6d4cf56db6-8xk2p_{self.uids[number]}"


def measured(place: Path, *, with_logs: bool) -> dict[str, float]:
    """Return the CPU time of the first look and of a step, s, and the process's memory after all, MiB."""
    node = Node(place)
    names = NamespaceNames((), lambda: None, pod_logs=str(node.logs) if with_logs else "", proc=node.proc)
    here = {number: Namespace(number, Found(4026532000 + number), time.monotonic()) for number in range(PODS)}

    def step() -> float:
        began_s = time.thread_time()
        for number, namespace in here.items():
            names.renew(namespace, Found(namespace.inode, pid=number + 2))
        names.ask(here.values())
        if names.outdated:
            names.use()
        named = [names.of(namespace).container for namespace in here.values()]
        used_s = time.thread_time() - began_s
        assert all(name.startswith("team-") == with_logs for name in named), named
        return used_s

    first_s = step()
    for namespace in here.values():
        namespace.since_s = 0.0  # no longer young
    steps_s = []
    for number in range(STEPS):
        node.remove(number)
        here[number] = node.add(number)
        names._pods._look_at_s = 0.0  # a second later
        steps_s.append(step())
        here[number].since_s = 0.0
    resident = float(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * 4096 / 2**20
    return {"first_s": first_s, "step_s": sum(steps_s) / STEPS, "mib": resident}


def run() -> list[dict[str, Any]]:
    """Return the cores that following 1,000 pods takes, the CPU time of the first look, and the process's memory."""
    found: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    for _ in range(ROUNDS):
        for with_logs, rounds in found.items():
            with folder() as place:
                argv = [sys.executable, "-m", "tests.benchmark.pods", str(place), str(int(with_logs))]
                told = subprocess.run(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
            rounds.append(json.loads(told))
    made = []
    for name, unit, key in (
        ("pods_1000", "cores", "step_s"),
        ("pods_1000 first look", "s", "first_s"),
        ("pods_1000 memory", "MiB", "mib"),
    ):
        with_names, without = ([one[key] for one in found[which]] for which in (True, False))
        made.append(figure(name, unit, with_names, "no log folder", sorted(without)[ROUNDS // 2]))
    return made


if __name__ == "__main__":
    print(json.dumps(measured(Path(sys.argv[1]), with_logs=sys.argv[2] == "1")))
