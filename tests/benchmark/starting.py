"""Start-up cost of commands: their help, and `mace hooks`; the peer is `pip --help`, which is in Python, too.

CPU time is that of the whole process, user space and kernel; memory is its peak. All modules are compiled beforehand.
"""

import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mace.commands import registry
from tests.benchmark.figures import MACE, figure, folder

ROUNDS = 7
PEER = (sys.executable, "-m", "pip", "--help")


LAUNCHER = """
import os, sys
argv, rounds = sys.argv[2:], int(sys.argv[1])
nothing = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
for _ in range(rounds):
    _, status, used = os.wait4(os.posix_spawn(argv[0], argv, os.environ, file_actions=nothing), 0)
    if status:
        sys.exit(f"{argv}: {status}")
    print(used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)
"""
"""Program that starts a command repeatedly. It is small, because a process's peak is at least that of its parent."""


def _of(argv: Sequence[str], place: Path) -> tuple[list[float], list[float]]:
    """Return CPU times, s, and peaks of memory, MiB, of several rounds, after one round that compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(place)
    told = subprocess.run(
        [sys.executable, "-I", "-S", "-c", LAUNCHER, str(ROUNDS + 1), *argv],
        env=environment, stdout=subprocess.PIPE, text=True, check=True,
    ).stdout  # fmt: skip
    rounds = [tuple(map(float, line.split())) for line in told.splitlines()][1:]
    return [cpu for cpu, _ in rounds], [memory for _, memory in rounds]


def run() -> list[dict[str, Any]]:
    """Return s and MiB of each help; the slowest and the largest help are compared with the targets."""
    names = ["", *registry.GROUPS, *(command.name for command in registry.COMMANDS)]
    calls = {f"{name} --help".strip(): [*MACE, *name.split(), "--help"] for name in names} | {"hooks": [*MACE, "hooks"]}
    with folder() as place:
        peer_cpu, peer_memory = (statistics.median(each) for each in _of(PEER, place))
        found = {name: _of(argv, place) for name, argv in calls.items()}
    made = []
    for name, (cpu, memory) in found.items():
        made.append(figure(f"cli_start {name}", "s", cpu, "pip --help", peer_cpu))
        made.append(figure(f"cli_start_memory {name}", "MiB", memory, "pip --help", peer_memory))
    slowest = max((cpu for cpu, _ in found.values()), key=statistics.median)
    largest = max((memory for _, memory in found.values()), key=statistics.median)
    made.append(figure("cli_start", "s", slowest, "pip --help", peer_cpu))
    made.append(figure("cli_start_memory", "MiB", largest, "pip --help", peer_memory))
    return made
