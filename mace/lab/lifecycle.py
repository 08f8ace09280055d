"""The life of a lab, from `up` to `down`.

There is one clean-up, written for the worst case: the previous run was killed at any instruction. It needs only the
state file and no cooperation of the processes that it ends. `up` runs it when it fails, `down` runs it always, and the
next `up` runs it on what a killed run has left.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Final

from collector.machine.kernel import boot_id
from contracts.config import CaptureConfig
from contracts.errors import LabError, Unavailable, UsageError, nearest
from mace.lab import cni, cni_list, containerd, engines, guest, holder, layouts, netns, network, plan, state
from mace.lab.engines import ENGINES
from mace.lab.plan import HOST, REMOTE, Family, FarEnd, Layout, Runtime, Spec
from mace.lab.state import Member, State
from mace.lab.traffic import Traffic

_LOG: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LabInfo:
    """One line of `mace lab list`."""

    name: str
    status: str
    """`up`; `starting` or `stopping` while a process makes or removes it; `broken` where `down` or `up` removes it."""
    runtime: str
    containers: tuple[str, ...]
    detail: str = ""
    """Why the lab is broken, or which process holds it."""


class Lab(Traffic):
    """A running test network. `up`, `running` and `attach` return one."""

    def __init__(self, record: State) -> None:
        self._state = record
        self._children: list[subprocess.Popen[str]] = []
        """Processes that this object has started, and has to reap and close the pipes of."""

    @property
    def name(self) -> str:
        return self._state.spec.name

    @property
    def spec(self) -> Spec:
        return self._state.spec

    @property
    def containers(self) -> tuple[str, ...]:
        return tuple(name for name in self._state.members if name not in plan.NO_CONTAINERS)

    @property
    def members(self) -> tuple[str, ...]:
        """Names of all members: `host`, `host2` of the layout overlay, `remote` and the containers."""
        return tuple(self._state.members)

    @property
    def outer_device(self) -> str:
        """Name of the host's device towards the remote."""
        return plan.outer_device(self.name)

    @property
    def docker_socket(self) -> Path | None:
        """Path of the API socket of the lab's Docker daemon or Podman service; None for the other runtimes."""
        return Path(self._state.docker_socket) if self._state.docker_socket else None

    @property
    def cri_socket(self) -> Path | None:
        """Path of the CRI socket of the lab's containerd; None for the other runtimes."""
        return containerd.socket_of(self._state) if self.spec.runtime is Runtime.CONTAINERD else None

    def shown_name(self, container: str) -> str:
        """Return the name that MACE's outputs have for a container: that of a pod has its namespace, for instance."""
        if self.spec.runtime is Runtime.CONTAINERD:
            return f"{containerd.NAMESPACE}/{container}"
        return f"root/{container}" if self.spec.runtime is Runtime.APPTAINER else container

    def netns_path(self, member: str) -> Path:
        """Return the path at which the member's network namespace is mounted."""
        return Path(self._member(member).path)

    def netns_inode(self, member: str) -> int:
        return self._member(member).inode

    @property
    def network(self) -> str:
        """Description of a network that CNI plugins have made, or of a layout; "" for the lab's own."""
        if self.spec.layout is not Layout.BRIDGE:
            return f"layout {self.spec.layout}, far end {self.address(REMOTE)}"
        if any(self.shares_host(name) for name in self.containers):
            return f"{', '.join(self.containers)} share the host's network, which adds nothing to their packets"
        if not self.spec.cni:
            return ""
        made = cni_list.parse(self.spec.cni)
        told = []
        for name in self.containers:
            found = self._member(name)
            told.append(" ".join(filter(None, (name, found.ipv4, found.ipv6))))
        return f"network {made.name}, by the CNI plugins {', '.join(made.types)}: {'; '.join(told)}"

    @property
    def far_end(self) -> str:
        """Description of a far end in a virtual machine, with its kernel; "" for one in a namespace."""
        found = self._state.guest
        if found is None:
            return ""
        how = "emulated" if found.accelerator == "tcg" else "with KVM"
        return f"far end {plan.wire(REMOTE)[0].ip}: a virtual machine, {how}, Linux {found.release}"

    def address(self, member: str, family: Family = 4) -> str:
        if member == REMOTE and REMOTE not in self._state.members:  # in a virtual machine
            return str(plan.wire(REMOTE)[family == 6].ip)
        if self.shares_host(member):
            return str(plan.wire(HOST)[family == 6].ip)
        found = self._member(member)
        address = found.ipv4 if family == 4 else found.ipv6
        if not address:
            raise UsageError(f"lab {self.name!r}: its network gives {member} no IPv{family} address")
        return address

    def families(self, member: str) -> tuple[Family, ...]:
        """Return the IP versions of which the member has an address. Raises `UsageError` for an unknown member."""
        found = self._member(member)
        if self.shares_host(member):
            return self.families(HOST)
        both: tuple[tuple[Family, str], ...] = ((4, found.ipv4), (6, found.ipv6))
        return tuple(family for family, address in both if address)

    def command(self, member: str, argv: list[str]) -> list[str]:
        """Return the command line that runs `argv` in the member's network namespace, otherwise on this machine."""
        path = self.netns_path(member)
        if netns.inode(path) != self.netns_inode(member):
            raise LabError(f"lab {self.name!r}: the namespace of {member} is gone ({path})")
        return netns.enter_command(path, argv)

    def inside(self, member: str, argv: list[str]) -> list[str]:
        """Return the command line that runs `argv`, a program of its image, in all namespaces of a container.

        For a member without a runtime, it runs in the member's network namespace alone.
        """
        engine, found = ENGINES.get(self.spec.runtime), self._member(member)
        if engine is None or member in plan.NO_CONTAINERS:
            return self.command(member, argv)
        return engine.command(self._state, found, argv)

    def shares_host(self, member: str) -> bool:
        """Return whether a container is in the host's network namespace."""
        return member != HOST and self.netns_inode(member) == self.netns_inode(HOST)

    def environment(self, member: str) -> dict[str, str]:
        """Return the environment that marks a process as the member's, so that it ends with the member."""
        return self._state.environment(member)

    def popen(self, member: str, argv: list[str], **options: Any) -> subprocess.Popen[str]:
        settings: dict[str, Any] = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "text": True,
            "env": self.environment(member),
            "start_new_session": True,
            **options,
        }
        self._children = [c for c in self._children if c.poll() is None or any(not p.closed for p in _pipes(c))]
        process: subprocess.Popen[str] = subprocess.Popen(self.command(member, argv), **settings)
        self._children.append(process)
        return process

    def exec(self, member: str, argv: list[str]) -> int:
        """Run a command in a member with our own standard streams; returns its exit status.

        The command enters the member's network namespace only, with Docker too. Every tool of the machine (tcpdump,
        this Python) can therefore run in a container whose image has no tools.
        """
        if not argv:
            raise UsageError("exec: no command")
        # Ctrl-C also reaches the command, which is in our foreground process group; we wait for it to end.
        with (
            _handlers(lambda *_: None, (signal.default_int_handler,), (signal.SIGINT,)),
            subprocess.Popen(self.command(member, argv), env=self.environment(member)) as process,
        ):
            try:
                return process.wait()
            finally:
                process.kill()

    def add_container(self, name: str) -> None:
        """Add a container to the running lab, in the lowest free slot: a removed container's addresses are used again.

        Raises `UsageError` if the name is taken or the lab is full, `LabError` if the container cannot be made.
        """
        with self._changing():
            if name in self._state.members:
                raise UsageError(f"lab {self.name!r} has a {name} already")
            taken = {m.slot for m in self._state.members.values()}
            slot = next(n for n in range(plan.MAX_CONTAINERS + 1) if n not in taken)
            place = plan.place(self.spec, name, slot)
            self._state.members[name] = _planned(self._state, place)
            self._state.save()
            try:
                _create_containers(self._state, [place])
            except BaseException:
                with _undisturbed():
                    _remove_member(self._state, name)
                    self._state.save()
                raise
            self._state.save()

    def remove_container(self, name: str) -> None:
        """Remove a container and end its processes. Its name and addresses can be used again."""
        with self._changing():
            if name in plan.NO_CONTAINERS:
                raise UsageError(f"{name} is no container")
            self._member(name)
            _remove_member(self._state, name)
            self._state.save()

    def close(self) -> None:
        """Remove the lab. A second call does nothing."""
        with _undisturbed(), state.locked(self.name):
            current = state.load(self.name)
            if current is not None and current.id == self._state.id:
                _clean(current)
            for child in self._children:
                child.wait()
                for pipe in _pipes(child):
                    with suppress(BrokenPipeError):
                        pipe.close()
            self._children.clear()

    def _member(self, name: str) -> Member:
        try:
            return self._state.members[name]
        except KeyError:
            if name == REMOTE:
                raise UsageError(
                    f"lab {self.name!r}: its far end is a virtual machine, which only answers ping"
                ) from None
            raise UsageError(
                f"lab {self.name!r} has no member {name!r}{nearest(name, self.members)}: {', '.join(self.members)}"
            ) from None

    @contextmanager
    def _changing(self) -> Iterator[None]:
        with state.locked(self.name):
            current = state.load(self.name)
            if current is None or current.id != self._state.id:
                raise LabError(f"lab {self.name!r} was taken down")
            self._state = current
            yield


def check(spec: Spec | None = None) -> list[Unavailable]:
    """Return the reasons why the lab, by default the usual one, cannot be made here; empty if it can.

    It makes each kind of device once, in a nameless namespace that is removed.
    """
    if os.geteuid() != 0:
        return [Unavailable("lab", "network namespaces need root", "run it with sudo")]
    found = [
        Unavailable("lab", f"the program {program!r} is missing", netns.remedy_for(program))
        for program in ("ip", "nft", "nsenter", "ping", *(layouts.programs(spec.layout) if spec else ()))
        if netns.find_program(program) is None
    ]
    if spec is not None:
        found += engines.problems(spec) + network.rps_problems(spec)
    if spec is not None and spec.cni and spec.runtime is not Runtime.CONTAINERD:
        found += cni.problems(spec.cni)
    if spec is not None and spec.far_end is FarEnd.GUEST:
        found += guest.problems(spec)
    if found:
        return found
    env = {**os.environ, "PATH": netns.search_path(), "LC_ALL": "C"}
    try:
        layout = spec.layout if spec else Layout.BRIDGE
        return netns.in_new(lambda: network.problems(env) or layouts.problems(layout, env))
    except OSError as error:
        return [Unavailable("lab", f"no network namespace can be made ({error})", "run it outside of a container")]


def up(spec: Spec, *, detached: bool = True) -> Lab:
    """Make a lab and return it, after removing what a killed run has left of one with the same name.

    A `detached` lab stays until `down`; any other counts as left over when this process has ended.
    Raises `Unavailable`, or `LabError` when a lab of that name is up or cannot be made.
    """
    if found := check(spec):
        raise found[0]
    with _terminable(), state.locked(spec.name):
        old = _load_or_forget(spec.name)
        if old is not None:
            why = _trouble(old)
            if not why:
                held = f", held by process {old.owner.pid}" if old.owner else ""
                raise LabError(f"lab {spec.name!r} is up already{held}; `mace lab down {spec.name}` removes it")
            _LOG.warning("lab %r: removing what is left of it (%s)", spec.name, why)
            _clean(old)
        _remove_strays(spec.name)
        _refuse_same_bridge(spec)

        record = State(spec, owner=None if detached else state.this_process())
        for member, (ipv4, ipv6) in plan.ends(spec).items():
            path = netns.NETNS_DIR / plan.netns_name(spec.name, member)
            record.members[member] = Member(str(path), ipv4=ipv4, ipv6=ipv6)
        places = [plan.place(spec, name, slot) for slot, name in enumerate(plan.container_names(spec))]
        for place in places:
            record.members[place.name] = _planned(record, place)
        if (engine := ENGINES.get(spec.runtime)) is not None:
            record.made_directories = holder.directories_to_make(spec.name, engine.covered)
            record.docker_socket = str(record.directory / "docker.sock") if engine.has_api else ""
        if spec.cni:
            record.cni_path = cni.plugin_path()
        record.save()
        try:
            _create_host(record)
            _create_containers(record, places)
            record.phase = state.UP
            record.save()
        except BaseException:
            with _undisturbed():
                _clean(record)
            raise
        return Lab(record)


def capture_of(capture: CaptureConfig, place: Lab) -> CaptureConfig:
    """Return the `[capture]` configuration, changed to measure this lab."""
    sockets = (str(place.docker_socket),) if place.docker_socket else ()
    return replace(
        capture,
        host_netns=str(place.netns_path(plan.HOST)),
        outer=(place.outer_device,),
        remote_netns=tuple(place.netns_path(m).name for m in (plan.HOST2, REMOTE) if m in place.members),
        container_sockets=(*capture.container_sockets, *sockets),
        cri_sockets=(*capture.cri_sockets, *((str(place.cri_socket),) if place.cri_socket else ())),
    )


def attach(name: str = "lab") -> Lab:
    """Return the running lab of that name, which any process may have made. Raises `LabError` if it is not up."""
    record = state.load(name)
    if record is None:
        known = [info.name for info in list_labs()]
        raise LabError(f"lab {name!r} is not up{nearest(name, known)}; `mace lab up` makes one")
    if why := _trouble(record):
        raise LabError(f"lab {name!r} is broken ({why}); `mace lab down {name}` removes it")
    return Lab(record)


def down(name: str = "lab", *, force: bool = False) -> bool:
    """Remove a lab in any state; returns False if there was none.

    Raises `LabError` if a living process holds the lab (`running`), unless `force`.
    """
    Spec(name=name)  # the name becomes part of paths
    if not _exists(name):
        state.tidy(name)
        return False
    if os.geteuid() != 0:
        raise Unavailable("lab", "network namespaces need root", "run it with sudo")
    with _undisturbed(), state.locked(name):
        record = _load_or_forget(name)
        if record is not None:
            owner = record.owner
            if not force and owner is not None and owner.alive() and owner != state.this_process():
                raise LabError(f"lab {name!r} is held by process {owner.pid}; end that process, or use --force")
            _clean(record)
        return _remove_strays(name) or record is not None


def list_labs() -> list[LabInfo]:
    """Return all labs of this machine, including those that killed runs have left behind."""
    strays = {found[0] for found in map(plan.parse_netns_name, _netns_names()) if found}
    infos = []
    for name in sorted({*state.names(), *strays}):
        try:
            record = state.load(name)
        except LabError as error:
            infos.append(LabInfo(name, "broken", "", (), str(error)))
            continue
        if record is None:
            infos.append(LabInfo(name, "broken", "", (), "no state file"))
            continue
        members = tuple(member for member in record.members if member not in plan.NO_CONTAINERS)
        why = _trouble(record)
        owner = record.owner
        status, detail = "up", f"held by process {owner.pid}" if owner and not why else ""
        if why:
            busy = state.is_locked(name) and record.phase != state.UP
            status, detail = (record.phase, "") if busy else ("broken", why)
        runtime = "cni" if record.spec.cni and record.spec.runtime is Runtime.NETNS else record.spec.runtime.value
        infos.append(LabInfo(name, status, runtime, members, detail))
    return infos


def _refuse_same_bridge(spec: Spec) -> None:
    """Raise `LabError` if another lab has a bridge of a name that the lab's CNI configuration gives to one.

    ftrace records devices by name alone: it would take the packets of both bridges for packets of either.
    """
    wanted = set(cni_list.parse(spec.cni).bridges) if spec.cni else set()
    for name in state.names() if wanted else ():
        if name == spec.name:
            continue
        with suppress(LabError):  # another lab's file that cannot be read is that lab's trouble
            other = state.load(name)
            if other is None or not other.spec.cni or (_trouble(other) and not state.is_locked(name)):
                continue
            both = wanted & set(cni_list.parse(other.spec.cni).bridges)
            if both:
                told = ", ".join(sorted(both))
                raise UsageError(
                    f"lab {name!r} is up and has a bridge {told}, too, and the kernel's tracepoints name a device by"
                    f' its name alone: give the bridge another name in the file ("bridge": "..."), or remove that lab'
                    f" (`mace lab down {name}`)"
                )


@contextmanager
def running(spec: Spec | None = None) -> Iterator[Lab]:
    """Make a lab for a `with` block and remove it on every way out of the block.

    In the main thread SIGTERM ends the block as Ctrl-C does, unless the program has a handler of its own.
    """
    with _terminable():
        lab = up(spec or Spec(), detached=False)
        try:
            yield lab
        finally:
            lab.close()


def _pipes(process: subprocess.Popen[str]) -> list[IO[str]]:
    return [pipe for pipe in (process.stdin, process.stdout, process.stderr) if pipe is not None]


def _planned(record: State, place: plan.Placement) -> Member:
    if ENGINES.get(record.spec.runtime) is not None:  # runtimes assign addresses themselves
        return Member(str(holder.handle(record, place.name)), slot=place.slot)
    path = netns.NETNS_DIR / plan.netns_name(record.spec.name, place.name)
    if record.spec.cni:  # so do CNI plugins
        return Member(str(path), slot=place.slot)
    return Member(str(path), slot=place.slot, ipv4=str(place.ipv4.ip), ipv6=str(place.ipv6.ip))


def _create_host(record: State) -> None:
    env = record.environment()
    ends = plan.ends(record.spec)
    names = [plan.netns_name(record.spec.name, member) for member in ends]
    network.add_namespaces(names, env)
    _note_inodes(record, ends)
    network.build_wire(record.spec, env)
    if record.spec.far_end is FarEnd.GUEST:
        guest.start(record)
    engine = ENGINES.get(record.spec.runtime)
    if record.spec.cni or record.spec.runtime is Runtime.CONTAINERD:
        network.route_back(record.spec.name, env)
    if engine is not None:
        engine.start(record)
    elif record.spec.cni:
        pass  # the plugins make everything, container by container
    elif record.spec.layout is Layout.BRIDGE:
        network.build_bridges(record.spec, env)
    else:
        layouts.build_host(record.spec, env)
    for kind, cpus in plan.rps_masks(record.spec).items():
        if kind != "veth":
            device = {"outer": plan.outer_device, "vxlan": plan.vxlan_device}[kind](record.spec.name)
            network.spread_softirqs(record.spec.name, device, cpus, env)


def _create_containers(record: State, places: list[plan.Placement]) -> None:
    if (engine := ENGINES.get(record.spec.runtime)) is not None:
        for place in places:
            record.members[place.name] = engine.create(record, place)
        _note_inodes(record, [place.name for place in places])
        return
    env = record.environment()
    network.add_namespaces([plan.netns_name(record.spec.name, place.name) for place in places], env)
    _note_inodes(record, [place.name for place in places])
    rps = plan.rps_masks(record.spec)
    for place in places:
        if record.spec.cni:
            network.prepare_container(record.spec.name, place.name, env)
            cni.add(record, place.name)
        elif record.spec.layout is Layout.BRIDGE:
            network.build_container(record.spec, place, env)
        else:
            layouts.build_container(record.spec, place, env)
        if "veth" in rps:
            network.spread_softirqs(record.spec.name, place.veth, rps["veth"], env)


def _note_inodes(record: State, members: Any) -> None:
    for member in members:
        path = Path(record.members[member].path)
        record.members[member].inode = netns.inode(path)
        if record.members[member].inode in (0, netns.own_inode()):
            raise LabError(f"{path}: expected a new network namespace there")


def _remove_member(record: State, name: str) -> None:
    member = record.members[name]
    path = Path(member.path)
    state.kill(record.id, name)
    if (engine := ENGINES.get(record.spec.runtime)) is not None:
        engine.remove(record, member)
    else:
        if record.spec.cni:
            cni.delete(record, name)
        else:
            layouts.remove_container(record.spec, plan.place(record.spec, name, member.slot), record.environment())
        _remove_namespace(path, record.environment())
    del record.members[name]


def _clean(record: State) -> None:
    """Remove a lab's processes, devices, namespaces and files, and the state file last."""
    if record.boot_id != boot_id():  # only files survived the reboot: no process, no mount
        record.boot_id, record.id, record.daemon, record.guest = boot_id(), State(record.spec).id, None, None
    record.phase = state.STOPPING
    record.save()
    env = record.environment()
    state.kill(record.id)
    if record.spec.cni:
        for name in record.members:
            cni.delete(record, name)  # nothing for containers whose runtime calls the plugins
    _remove_namespaces(record.spec.name, env)
    # Again, because an `ip netns add` may have finished after its parent was killed and before it was killed itself.
    state.kill(record.id)
    _remove_namespaces(record.spec.name, env)
    guest.clean(record)
    holder.clean(record)
    record.forget()


def _remove_namespaces(lab: str, env: dict[str, str]) -> bool:
    found = False
    names = [name for name in _netns_names() if (plan.parse_netns_name(name) or ("", ""))[0] == lab]
    # The host's namespace first: removing its ends of the veth pairs removes the other ends.
    for name in sorted(names, key=lambda name: not name.endswith("-" + HOST)):
        found |= _remove_namespace(netns.NETNS_DIR / name, env)
    return found


def _remove_namespace(path: Path, env: dict[str, str]) -> bool:
    if netns.inode(path) not in (0, netns.own_inode()):
        network.remove_devices(path, env)
    return netns.remove(path)


def _remove_strays(name: str) -> bool:
    """Remove namespaces with this lab's name that no state file lists, because the file was removed."""
    return _remove_namespaces(name, State(Spec(name=name)).environment())


def _load_or_forget(name: str) -> State | None:
    """Return the lab's state; None without a state file or with a damaged one, which is removed.

    The clean-up also finds a lab's namespaces by their names, so it does not need a damaged file.
    """
    try:
        return state.load(name)
    except LabError as error:
        _LOG.warning("%s", error)
        State(Spec(name=name)).forget()
        return None


def _trouble(record: State) -> str:
    """Return why a lab is broken; "" if it is not."""
    if record.boot_id != boot_id():
        return "the machine has rebooted since it was made"
    if record.phase != state.UP:
        return f"{'its set-up' if record.phase == state.STARTING else 'its removal'} was interrupted"
    if record.owner is not None and not record.owner.alive():
        return f"its process {record.owner.pid} has ended"
    if record.daemon is not None and not record.daemon.alive():
        return f"{ENGINES[record.spec.runtime].holder} has ended"
    if record.guest is not None and not record.guest.process.alive():
        return "its far end, a virtual machine, has ended"
    for name, member in record.members.items():
        if not member.inode or netns.inode(Path(member.path)) != member.inode:
            return f"the namespace of {name} is missing"
    return ""


def _exists(name: str) -> bool:
    return name in state.names() or any((plan.parse_netns_name(n) or ("",))[0] == name for n in _netns_names())


def _netns_names() -> list[str]:
    return sorted(p.name for p in netns.NETNS_DIR.iterdir()) if netns.NETNS_DIR.is_dir() else []


_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _leave(number: int, _frame: object) -> None:
    """Handle a signal: unwind the stack with the exit status that a shell shows for this signal."""
    raise SystemExit(128 + number)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Defer Ctrl-C, SIGTERM and SIGHUP until the block is done, so that no signal interrupts a clean-up.

    Handlers and not a signal mask: a mask belongs to one thread, and Python runs handlers in the main thread whichever
    thread received the signal. A program's own handlers stay, because they usually do not raise.
    """
    pending: list[int] = []
    raising = (signal.SIG_DFL, signal.default_int_handler, _leave)
    with _handlers(lambda number, _frame: pending.append(number), raising, _SIGNALS):
        yield
    for number in pending[:1]:
        signal.raise_signal(number)


def _terminable() -> AbstractContextManager[None]:
    """Make SIGTERM and SIGHUP unwind the stack where they would otherwise end the process."""
    return _handlers(_leave, (signal.SIG_DFL,), _SIGNALS[1:])


@contextmanager
def _handlers(
    handler: Callable[[int, Any], object], instead_of: tuple[object, ...], signals: tuple[signal.Signals, ...]
) -> Iterator[None]:
    """Replace handlers that are in `instead_of` by `handler` for the block; does nothing outside the main thread."""
    previous: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in signals:
            if signal.getsignal(number) in instead_of:
                previous[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
