"""Fixtures: the module, loaded for the duration of a test, and the lab."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mace.lab import Lab, Spec, running

KO = os.environ.get("MACE_KO", "")
SECURITYFS = Path("/sys/kernel/security")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "last: changes the machine for good, so it runs after all other tests")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("last") is not None)


def load(*parameters: str) -> None:
    subprocess.run(["insmod", KO, *parameters], check=True, capture_output=True, text=True)


def unload() -> None:
    subprocess.run(["rmmod", "mace"], check=True, capture_output=True, text=True)


def lockdown(level: str) -> None:
    """Lock the kernel down, until the machine ends."""
    if not (SECURITYFS / "lockdown").exists():
        subprocess.run(["mount", "-t", "securityfs", "securityfs", SECURITYFS], check=True)
    (SECURITYFS / "lockdown").write_text(level)


def lab_ifindex(lab: Lab, container: str) -> int:
    """Return the index of a container's device in its namespace."""
    shown = subprocess.run(
        ["ip", "-n", lab.netns_path(container).name, "-j", "link", "show", "dev", "eth0"],
        check=True,
        capture_output=True,
        text=True,
    )
    return int(json.loads(shown.stdout)[0]["ifindex"])


@pytest.fixture(scope="session", autouse=True)
def in_a_memory_cgroup() -> None:
    """Run tests, and processes that they start, in a memory cgroup, like services of systemd and containers."""
    group = Path("/sys/fs/cgroup")
    (group / "cgroup.subtree_control").write_text("+memory")
    (group / "tests").mkdir()
    (group / "tests/cgroup.procs").write_text(str(os.getpid()))


@pytest.fixture
def load_module() -> Iterator[Callable[..., None]]:
    """A function that loads the module with parameters; the module is unloaded afterwards."""
    yield load
    if Path("/sys/module/mace").exists():
        unload()


@pytest.fixture
def module(load_module: Callable[..., None]) -> None:
    """The module, loaded with default parameters."""
    load_module()


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """A lab of two containers whose neighbours are resolved, so that no packet waits for ARP or ND."""
    with running(Spec(name="vm", containers=2)) as made:
        for family in (4, 6):
            for container in made.containers:
                made.ping(container, count=2, family=family)
        yield made
