"""The module, loaded for the length of a test, and the lab."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mace.lab import Lab, Spec, running

KO = os.environ.get("MACE_KO", "")


def load(*parameters: str) -> None:
    subprocess.run(["insmod", KO, *parameters], check=True, capture_output=True, text=True)


def unload() -> None:
    subprocess.run(["rmmod", "mace"], check=True, capture_output=True, text=True)


def lab_ifindex(lab: Lab, container: str) -> int:
    """Index of a container's device in its namespace."""
    shown = subprocess.run(
        ["ip", "-n", lab.netns_path(container).name, "-j", "link", "show", "dev", "eth0"],
        check=True,
        capture_output=True,
        text=True,
    )
    return int(json.loads(shown.stdout)[0]["ifindex"])


@pytest.fixture(scope="session", autouse=True)
def in_a_memory_cgroup() -> None:
    """Tests, and what they start, run in one, as every service of systemd and every container does."""
    group = Path("/sys/fs/cgroup")
    (group / "cgroup.subtree_control").write_text("+memory")
    (group / "tests").mkdir()
    (group / "tests/cgroup.procs").write_text(str(os.getpid()))


@pytest.fixture
def load_module() -> Iterator[Callable[..., None]]:
    """Loads the module with parameters; unloaded afterwards."""
    yield load
    if Path("/sys/module/mace").exists():
        unload()


@pytest.fixture
def module(load_module: Callable[..., None]) -> None:
    """The module as it is by default."""
    load_module()


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """Two containers; their neighbours are known, so that no packet waits for ARP or ND."""
    with running(Spec(name="vm", containers=2)) as made:
        for family in (4, 6):
            for container in made.containers:
                made.ping(container, count=2, family=family)
        yield made
