"""The container runtimes of a lab that are programs of their own: a row for each.

Their containers make their namespaces and networks themselves; `mace.lab.holder` cleans up after all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from collector.machine.cri import is_installed
from contracts.errors import Unavailable
from mace.lab import apptainer, cni, containerd, docker, image, netns
from mace.lab.plan import Placement, Runtime, Spec
from mace.lab.state import Member, State


@dataclass(frozen=True, slots=True)
class Engine:
    """A container runtime. Its functions raise `LabError`."""

    programs: tuple[str, ...]
    covered: tuple[str, ...]
    """The machine's paths that tmpfs mounts hide from the runtime."""
    start: Callable[[State], None]
    """Starts what the containers need, once for a lab, after the wire between host and remote is made."""
    create: Callable[[State, Placement], Member]
    """Makes one container; returns its namespace and addresses."""
    command: Callable[[State, Member, list[str]], list[str]]
    """Returns the command line that runs another one in all of a container's namespaces."""
    remove: Callable[[State, Member], None]
    """Removes one container."""
    holder: str
    """What the lab's holder is, for messages."""
    has_api: bool
    """Whether the holder answers Docker's API at a socket."""


def _daemon(runtime: Runtime, holder: str) -> Engine:
    needs = docker.DAEMONS[runtime]
    functions = docker.start, docker.create, docker.command, docker.remove
    return Engine(needs.programs, needs.covered, *functions, holder, has_api=True)


ENGINES: Final[dict[Runtime, Engine]] = {
    Runtime.DOCKER: _daemon(Runtime.DOCKER, "its Docker daemon"),
    Runtime.PODMAN: _daemon(Runtime.PODMAN, "its Podman service"),
    Runtime.CONTAINERD: Engine(
        containerd.PROGRAMS,
        containerd.COVERED,
        containerd.start,
        containerd.create,
        containerd.command,
        containerd.remove,
        "its containerd",
        has_api=False,
    ),
    Runtime.APPTAINER: Engine(
        apptainer.PROGRAMS,
        apptainer.COVERED,
        apptainer.start,
        apptainer.create,
        apptainer.command,
        apptainer.remove,
        "the process that holds its mounts",
        has_api=False,
    ),
}
"""Engine of each runtime; bare namespaces have none, the lab makes them itself."""


def problems(spec: Spec) -> list[Unavailable]:
    """Return the reasons why the lab's runtime cannot run here; empty if it can."""
    engine = ENGINES.get(spec.runtime)
    found = []
    if spec.runtime is Runtime.CONTAINERD:
        if not is_installed():
            found.append(Unavailable("lab --runtime containerd", "h2 is not installed", "pip install mace[cri]"))
        found += cni.problems(containerd.network_text(spec))
    return found + [
        Unavailable(f"lab --runtime {spec.runtime}", f"the program {program!r} is missing", netns.remedy_for(program))
        for program in ((*engine.programs, *image.PROGRAMS) if engine else ())
        if netns.find_program(program) is None
    ]
