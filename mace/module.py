"""`mace module`: the kernel module built, loaded, unloaded, and what is known of it.

Whatever can stand in the way (no headers, a kernel without modules, Secure Boot, ...) is an `Unavailable` that says
what is missing and what to do. All that is asked of the machine goes through a `Machine`, so that a test can be another
one.
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
"""Of what a failed build said last."""


def _run(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, env={**os.environ, "LC_ALL": "C"}
    )


@dataclass(frozen=True, slots=True)
class Machine:
    """What is asked of the machine."""

    root: Path = Path("/")
    """Where /proc, /sys, /lib and /etc are."""
    sources: Path = SOURCES
    release: str = field(default_factory=platform.release)
    uid: int = field(default_factory=os.geteuid)
    run: Callable[[Sequence[str]], subprocess.CompletedProcess[str]] = _run
    which: Callable[[str], str | None] = lambda name: shutil.which(
        name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin"
    )

    def read(self, path: str) -> str:
        """A small file's text without the white space around it; "" if there is none."""
        try:
            return (self.root / path).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return ""

    @property
    def kernel_build(self) -> Path:
        """Where the running kernel's headers are, if they are installed."""
        return self.root / "lib/modules" / self.release / "build"

    @property
    def built(self) -> Path:
        """What a build in the sources makes."""
        return self.sources / f"{NAME}.ko"

    @property
    def loaded(self) -> bool:
        """Whether the module is in the kernel."""
        return (self.root / "sys/module" / NAME).is_dir()

    @property
    def sessions(self) -> int:
        """Open files of /dev/mace; they hold the module."""
        count = self.read(f"sys/module/{NAME}/refcnt")
        return int(count) if count.isdecimal() else 0


@dataclass(frozen=True, slots=True)
class ModuleStatus:
    """What is known of the module."""

    loaded: bool
    detail: str
    remedy: str = ""
    version: str = ""
    abi: str = ""
    """Of the module, `major.minor`; "" where it could not be asked."""
    sessions: int = 0
    parameters: dict[str, str] = field(default_factory=dict)
    cost: tuple[HookCost, ...] = ()
    """Since it was loaded."""

    def as_dict(self) -> dict[str, Any]:
        """For machines: the fields, with the cost as a list of hook, calls, timed, timed_ns, ns_per_call."""
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
    """Whether it is loaded; if so what it says of itself, else what keeps it from being loaded."""
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
    """Build the module, for the running kernel or the one whose build directory is `kdir`; says where it is.

    Where DKMS is installed, and no other kernel is asked for, root leaves it to DKMS: it builds anew for new kernels.
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
                _WHAT, f"{kdir} is no build directory of a kernel", "the one with its Makefile and .config"
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
    """Put the module into the kernel (`NAME=VALUE` parameters); says what was done."""
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
    """Take it out of the kernel; says what was done."""
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
            "end them; `fuser -v /dev/mace` names their processes",
        )
    raise Unavailable(_WHAT, f"rmmod {NAME}: {_last(done.stderr)}", "the kernel's log (dmesg) may say more")


def show(found: ModuleStatus) -> str:
    """A status for people, a line a fact."""
    lines = [found.detail + (f"; {found.remedy}" if found.remedy else "")]
    if found.loaded:
        lines.append(f"version {found.version or 'unknown'}, {found.sessions} sessions open")
        lines += [f"parameter {name} = {value}" for name, value in found.parameters.items()]
        lines += [
            f"cost {BY_HOOK[c.hook].name}: {c.calls:,} calls, {c.ns_per_call:.0f} ns each ({c.timed:,} timed)"
            for c in found.cost
        ]
    return "\n".join(lines)


# --- what may stand in the way --------------------------------------------------------------------


def _modules(machine: Machine) -> None:
    if not (machine.root / "proc/modules").exists():
        raise Unavailable(
            _WHAT,
            f"kernel {machine.release} has no loadable modules (CONFIG_MODULES; there is no /proc/modules)",
            "another kernel; until then --source ftrace",
        )


def _root(machine: Machine, what: str) -> None:
    if machine.uid != 0:
        raise Unavailable(_WHAT, f"only root may {what} a module", f"sudo mace module {what}")


def _headers(machine: Machine) -> str:
    """The package that has the running kernel's headers."""
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
        raise Unavailable(_WHAT, f"{machine.sources}/dkms.conf names no PACKAGE_VERSION", "a whole checkout of MACE")
    package = f"{NAME}/{match[1]}"
    # Sources of the same version that were added before may be older than these.
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
        "sign it with a key that the machine knows: enrol one with `mokutil --import` and reboot (DKMS signs with"
        " /var/lib/dkms/mok.pub), or switch Secure Boot off"
    )
    if "Key was rejected" in said or "Required key not available" in said:
        return Unavailable(_WHAT, f"{what}: its signature is not accepted (Secure Boot)", enrol)
    if "Invalid module format" in said or "Exec format error" in said:
        made_for = _vermagic(machine.built)
        return Unavailable(
            _WHAT,
            f"{what}: it was built for another kernel"
            + (f" ({made_for})" if made_for else "")
            + f", this one is {machine.release}",
            "`mace module build`",
        )
    if "Operation not permitted" in said and locked:
        return Unavailable(_WHAT, f"{what}: the kernel is locked down ({locked[1]}: Secure Boot)", enrol)
    if "Operation not permitted" in said and machine.read("proc/sys/kernel/modules_disabled") == "1":
        return Unavailable(_WHAT, f"{what}: this boot admits no more modules (kernel.modules_disabled)", "reboot")
    if "Operation not permitted" in said or "Permission denied" in said:
        return Unavailable(_WHAT, f"{what}: not permitted", "root with CAP_SYS_MODULE; not in a container")
    if "Unknown symbol" in said:
        return Unavailable(
            _WHAT,
            f"{what}: it needs what this kernel has not: {_last(said)}",
            "`mace module build`; dmesg names the symbol",
        )
    if "Invalid argument" in said or "Invalid parameters" in said:
        return Unavailable(_WHAT, f"{what}: {_last(said)}", "parameters are NAME=VALUE; `modinfo -p` lists them")
    return Unavailable(_WHAT, f"{what}: {_last(said)}", "the kernel's log (dmesg) may say more")


def _vermagic(path: Path) -> str:
    """The kernel that a module was built for, as it says in its .modinfo."""
    try:
        match = re.search(rb"\0vermagic=([^\0 ]+)", path.read_bytes())
    except OSError:
        return ""
    return match[1].decode("ascii", "replace") if match else ""


def _last(said: str) -> str:
    lines = said.strip().splitlines()
    return lines[-1] if lines else "no message"
