"""`mace module`: builds, loads, unloads and describes the kernel module.

An obstacle (no headers, a kernel without modules, Secure Boot, ...) raises an `Unavailable` that says what is missing
and what to do. The machine is read through a `Machine`, which a test can replace.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from collector.kmod.device import MaceDevice
from contracts import abi
from contracts.errors import MaceError, Unavailable
from contracts.hooks import BY_HOOK
from contracts.schema import HookCost

NAME: Final = "mace"
SOURCES: Final = Path(__file__).resolve().parents[1] / "kmod"
_WHAT: Final = "module"
_INSTEAD: Final = "until then --source ftrace needs no module"
_TOLD_LINES: Final = 12
"""An error message repeats this many of the last lines that a failed build printed."""


def _run(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, env={**os.environ, "LC_ALL": "C"}
    )


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine as the functions of this module see it: files, programs, kernel release and user."""

    root: Path = Path("/")
    """The directory that contains /proc, /sys, /lib and /etc."""
    sources: Path = SOURCES
    release: str = field(default_factory=platform.release)
    uid: int = field(default_factory=os.geteuid)
    run: Callable[[Sequence[str]], subprocess.CompletedProcess[str]] = _run
    which: Callable[[str], str | None] = lambda name: shutil.which(
        name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin"
    )

    def read(self, path: str) -> str:
        """Return a small file's text without surrounding white space; "" if the file cannot be read."""
        try:
            return (self.root / path).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return ""

    @property
    def kernel_build(self) -> Path:
        """The build directory of the running kernel, which exists if its headers are installed."""
        return self.root / "lib/modules" / self.release / "build"

    @property
    def built(self) -> Path:
        """The module file that a build in the sources writes."""
        return self.sources / f"{NAME}.ko"

    @property
    def loaded(self) -> bool:
        """Whether the module is in the kernel."""
        return (self.root / "sys/module" / NAME).is_dir()

    @property
    def sessions(self) -> int:
        """Number of open files of /dev/mace; the module cannot be unloaded while there is one."""
        count = self.read(f"sys/module/{NAME}/refcnt")
        return int(count) if count.isdecimal() else 0


@dataclass(frozen=True, slots=True)
class ModuleStatus:
    """Whether the kernel module is loaded, and its version, parameters and cost."""

    loaded: bool
    detail: str
    remedy: str = ""
    version: str = ""
    abi: str = ""
    """The module's ABI, `major.minor`; "" if /dev/mace could not be opened."""
    sessions: int = 0
    parameters: dict[str, str] = field(default_factory=dict)
    cost: tuple[HookCost, ...] = ()
    """What each probe has cost since the module was loaded."""

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for JSON; `cost` is a list of objects with hook, calls, timed, timed_ns, ns_per_call."""
        return {
            "loaded": self.loaded,
            "detail": self.detail,
            "remedy": self.remedy,
            "version": self.version,
            "abi": self.abi,
            "sessions": self.sessions,
            "parameters": self.parameters,
            "cost": [cost.as_dict() for cost in self.cost],
        }


def status(machine: Machine = Machine(), open_device: Callable[[], MaceDevice] = MaceDevice) -> ModuleStatus:
    """Return the module's status: what the loaded module reports, or else what prevents loading it."""
    if not machine.loaded:
        try:
            _modules(machine)
        except Unavailable as error:
            return ModuleStatus(False, error.why, error.remedy)
        if machine.built.exists():
            return ModuleStatus(False, f"not loaded; {machine.built} is built", "`mace module load`")
        return ModuleStatus(False, "not loaded", "`mace module build`, then `mace module load`")
    folder = machine.root / "sys/module" / NAME / "parameters"
    parameters = (
        {each.name: machine.read(f"sys/module/{NAME}/parameters/{each.name}") for each in sorted(folder.iterdir())}
        if folder.is_dir()
        else {}
    )
    version, sessions = machine.read(f"sys/module/{NAME}/version"), machine.sessions
    ours = f"{abi.ABI_MAJOR}.{abi.ABI_MINOR}"
    try:
        device = open_device()
    except MaceError as error:
        return ModuleStatus(True, f"loaded, but: {error}", "", version, "", sessions, parameters)
    try:
        spoken = ".".join(map(str, device.hello.abi))
        return ModuleStatus(
            True,
            f"loaded, ABI {spoken} (this MACE: {ours})",
            "",
            version,
            spoken,
            sessions,
            parameters,
            device.cost(),
        )
    finally:
        device.close()


def build(machine: Machine = Machine(), kdir: Path | None = None) -> str:
    """Build the module for the running kernel, or for the kernel whose build directory is `kdir`; return its place.

    Root builds through DKMS if DKMS is installed and `kdir` is not given, because DKMS rebuilds the module for each new
    kernel. Raises `Unavailable`.
    """
    if not (machine.sources / "Makefile").exists():
        raise Unavailable(_WHAT, f"{machine.sources} has no sources of the module", "build in a checkout of MACE")
    if kdir is None:
        _modules(machine)
    for tools, package in ((("make",), "make"), (("gcc", "clang", "cc"), "gcc")):
        if not any(map(machine.which, tools)):
            raise Unavailable(_WHAT, f"{package} is not installed", f"install the package {package}")
    place = kdir or machine.kernel_build
    if not (place / "Makefile").exists():
        if kdir is not None:
            raise Unavailable(
                _WHAT, f"{kdir} is no build directory of a kernel", "name the directory with its Makefile and .config"
            )
        raise Unavailable(
            _WHAT,
            f"the headers of kernel {machine.release} are not installed ({place} is not there)",
            f"install {_headers(machine)}; {_INSTEAD}",
        )
    if kdir is None and machine.uid == 0 and machine.which("dkms"):
        return _build_by_dkms(machine)
    done = machine.run(["make", "-C", str(machine.sources), f"KDIR={place}", "modules"])
    if done.returncode:
        raise _build_failed("make", done)
    return str(machine.built)


def load(parameters: Sequence[str] = (), machine: Machine = Machine()) -> str:
    """Load the module with `NAME=VALUE` parameters; return a line that says how. Raises `Unavailable`."""
    _root(machine, "load")
    _modules(machine)
    if machine.loaded:
        return f"loaded already (version {machine.read(f'sys/module/{NAME}/version') or 'unknown'})"
    installed = machine.run(["modprobe", NAME, *parameters]) if machine.which("modprobe") else None
    if installed is not None and installed.returncode == 0:
        return "loaded (modprobe)"
    said = installed.stderr if installed is not None else ""
    known = installed is not None and "not found" not in said
    if known and not machine.built.exists():
        raise _load_failed(machine, said, f"modprobe {NAME}")
    if not machine.built.exists():
        raise Unavailable(_WHAT, f"not installed, and {machine.built} is not built", "`mace module build`")
    done = machine.run(["insmod", str(machine.built), *parameters])
    if done.returncode:
        raise _load_failed(machine, done.stderr, f"insmod {machine.built}")
    return f"loaded ({machine.built})"


def unload(machine: Machine = Machine()) -> str:
    """Unload the module; return "unloaded" or "not loaded". Raises `Unavailable` while sessions are open."""
    _root(machine, "unload")
    if not machine.loaded:
        return "not loaded"
    sessions = machine.sessions
    done = machine.run(["rmmod", NAME])
    if done.returncode == 0:
        return "unloaded"
    if "in use" in done.stderr or sessions:
        raise Unavailable(
            _WHAT,
            f"in use: {sessions} sessions are open" if sessions != 1 else "in use: 1 session is open",
            "end the processes that `fuser -v /dev/mace` lists",
        )
    raise Unavailable(_WHAT, f"rmmod {NAME}: {_last(done.stderr)}", "the kernel's log (dmesg) may say more")


def show(found: ModuleStatus) -> str:
    """Format a status for people, one fact per line."""
    lines = [found.detail + (f"; {found.remedy}" if found.remedy else "")]
    if found.loaded:
        lines.append(f"version {found.version or 'unknown'}, {found.sessions} sessions open")
        lines += [f"parameter {name} = {value}" for name, value in found.parameters.items()]
        lines += [
            f"cost {BY_HOOK[c.hook].name}: {c.calls:,} calls, {c.ns_per_call:.0f} ns each ({c.timed:,} timed)"
            for c in found.cost
        ]
    return "\n".join(lines)


# --- obstacles ------------------------------------------------------------------------------------


def _modules(machine: Machine) -> None:
    if not (machine.root / "proc/modules").exists():
        raise Unavailable(
            _WHAT,
            f"kernel {machine.release} has no loadable modules (CONFIG_MODULES; there is no /proc/modules)",
            f"boot a kernel with loadable modules; {_INSTEAD}",
        )


def _root(machine: Machine, what: str) -> None:
    if machine.uid != 0:
        raise Unavailable(_WHAT, f"only root may {what} a module", f"sudo mace module {what}")


def _headers(machine: Machine) -> str:
    """Return the name of the package with the running kernel's headers, and the command that installs it."""
    about = machine.read("etc/os-release")
    families = set(" ".join(re.findall(r'^ID(?:_LIKE)?="?([^"\n]*)', about, re.MULTILINE)).split())
    if families & {"debian", "ubuntu"}:
        return f"linux-headers-{machine.release} (sudo apt-get install linux-headers-{machine.release})"
    if families & {"fedora", "rhel", "centos"}:
        return f"kernel-devel-{machine.release} (sudo dnf install kernel-devel-{machine.release})"
    return f"the headers of kernel {machine.release} (linux-headers-{machine.release} on Debian and Ubuntu)"


def _build_by_dkms(machine: Machine) -> str:
    about = (machine.sources / "dkms.conf").read_text(encoding="utf-8")
    match = re.search(r'^PACKAGE_VERSION="([^"]+)"', about, re.MULTILINE)
    if match is None:
        raise Unavailable(_WHAT, f"{machine.sources}/dkms.conf names no PACKAGE_VERSION", "build in a checkout of MACE")
    package = f"{NAME}/{match[1]}"
    # DKMS may hold older sources of the same version, and would build these.
    if machine.run(["dkms", "status", package]).stdout.strip():
        machine.run(["dkms", "remove", package, "--all"])
    for argv in (
        ["dkms", "add", str(machine.sources)],
        ["dkms", "build", package, "-k", machine.release],
        ["dkms", "install", package, "-k", machine.release, "--force"],
    ):
        done = machine.run(argv)
        if done.returncode:
            raise _build_failed(" ".join(argv[:2]), done)
    return f"{package}, installed by DKMS for {machine.release}"


def _build_failed(what: str, done: subprocess.CompletedProcess[str]) -> Unavailable:
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line.lower()] or lines
    return Unavailable(
        _WHAT,
        f"{what} failed with status {done.returncode}:\n  " + "\n  ".join(errors[-_TOLD_LINES:]),
        "please report it, with the kernel's version" if errors is not lines else "",
    )


def _load_failed(machine: Machine, said: str, what: str) -> Unavailable:
    locked = re.search(r"\[(integrity|confidentiality)\]", machine.read("sys/kernel/security/lockdown"))
    enrol = (
        "sign it with a key that the machine trusts: enrol one with `mokutil --import` and reboot (DKMS signs with"
        " /var/lib/dkms/mok.pub), or switch Secure Boot off"
    )
    if "Key was rejected" in said or "Required key not available" in said:
        return Unavailable(_WHAT, f"{what}: the kernel refuses the module's signature (Secure Boot)", enrol)
    if "Invalid module format" in said or "Exec format error" in said:
        made_for = _vermagic(machine.built)
        return Unavailable(
            _WHAT,
            f"{what}: the module was built for another kernel"
            + (f" ({made_for})" if made_for else "")
            + f", this kernel is {machine.release}",
            "`mace module build`",
        )
    if "Operation not permitted" in said and locked:
        return Unavailable(_WHAT, f"{what}: the kernel is locked down ({locked[1]}: Secure Boot)", enrol)
    if "Operation not permitted" in said and machine.read("proc/sys/kernel/modules_disabled") == "1":
        return Unavailable(
            _WHAT, f"{what}: the kernel refuses modules until the next boot (kernel.modules_disabled)", "reboot"
        )
    if "Operation not permitted" in said or "Permission denied" in said:
        return Unavailable(_WHAT, f"{what}: not permitted", "load it as root with CAP_SYS_MODULE, outside a container")
    if "Unknown symbol" in said:
        return Unavailable(
            _WHAT,
            f"{what}: the module needs a symbol that this kernel does not have: {_last(said)}",
            "`mace module build`; dmesg names the symbol",
        )
    if "Invalid argument" in said or "Invalid parameters" in said:
        return Unavailable(_WHAT, f"{what}: {_last(said)}", "parameters are NAME=VALUE; `modinfo -p` lists them")
    return Unavailable(_WHAT, f"{what}: {_last(said)}", "the kernel's log (dmesg) may say more")


def _vermagic(path: Path) -> str:
    """Return the release of the kernel that a module was built for, from its .modinfo section; "" if unknown."""
    try:
        match = re.search(rb"\0vermagic=([^\0 ]+)", path.read_bytes())
    except OSError:
        return ""
    return match[1].decode("ascii", "replace") if match else ""


def _last(said: str) -> str:
    lines = said.strip().splitlines()
    return lines[-1] if lines else "no message"
