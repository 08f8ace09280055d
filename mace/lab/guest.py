"""A far end in a virtual machine: another kernel with its own caches, behind a tap device of the lab's host namespace.

    mace-lab-host:  out0 (tap) 203.0.113.1 ── QEMU ── eth0 203.0.113.2, a kernel that answers echo requests

The machine boots a kernel of this machine's disk with an initramfs made here: a static busybox that loads the modules
of the network device, sets the addresses and sleeps. The kernel itself answers pings. QEMU uses KVM if a machine boots
with it within `_KVM_S`; otherwise it emulates the CPU, which is slower. It runs in the lab's host namespace and carries
the lab's mark, by which the clean-up finds it.

Some arguments are needed for the emulation (QEMU 7.2): it crashes kernels that use cmpxchg16b, and only its CPU model
`max` has what newer kernels use.
"""

from __future__ import annotations

import lzma
import os
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import zstandard

from collector.machine.processes import start_ticks
from contracts.errors import LabError, Unavailable
from mace.lab import netns, plan
from mace.lab.plan import HOST, REMOTE, Spec
from mace.lab.state import GuestProcess, Process, State

QEMU: Final = "qemu-system-x86_64"
_MODULES: Final = ("virtio_pci", "virtio_net")
_ACCELERATORS: Final = {
    "kvm": ("-accel", "kvm", "-cpu", "host"),
    "tcg": ("-accel", "tcg,thread=single", "-cpu", "max"),
}
_KVM_S: Final = 20.0
"""Time to boot with KVM, seconds: it takes two or three; a KVM that is nested may hang."""
_EMULATED_S: Final = 180.0
"""Time to boot in an emulator on a busy machine, seconds; it takes about ten."""
_MEMORY: Final = "160M"
_MAC: Final = "52:54:00:00:71:02"
_INIT: Final = """\
#!/bin/busybox sh
B=/bin/busybox
$B mkdir -p /proc /sys
$B mount -t proc proc /proc
$B mount -t sysfs sysfs /sys
while read -r module; do $B insmod "/$module"; done </modules
echo 0 >/proc/sys/net/ipv6/conf/eth0/accept_dad
$B ip link set lo up
$B ip link set eth0 up
$B ip addr add {ipv4} dev eth0
$B ip -6 addr add {ipv6} dev eth0
while :; do $B sleep 3600; done
"""

_started: Final[dict[int, subprocess.Popen[bytes]]] = {}
"""Machines that are children of this process, by pid; this process has to reap them."""


@dataclass(frozen=True, slots=True)
class GuestKernel:
    """A kernel on this machine's disk."""

    image: Path
    modules: Path
    """Its directory in lib/modules, with modules.dep."""

    @property
    def release(self) -> str:
        return self.modules.name


def problems(spec: Spec) -> list[Unavailable]:
    """Return the reasons why no far end can run in a virtual machine here; empty if one can."""
    what = "lab --far-end guest"
    found = [
        Unavailable(what, f"the program {program!r} is missing", netns.remedy_for(program))
        for program in (QEMU, "busybox")
        if netns.find_program(program) is None
    ]
    if os.uname().machine != "x86_64":
        found.append(Unavailable(what, f"the machine has to be x86_64, this is {os.uname().machine}"))
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        found.append(Unavailable(what, "/dev/net/tun cannot be opened", "modprobe tun"))
    try:
        kernel_of(spec)
    except Unavailable as error:
        found.append(error)
    return found


def kernel_of(spec: Spec) -> GuestKernel:
    """Return the kernel to boot: the one that is named, otherwise the newest one that is found. Raises `Unavailable`.

    Searched are /boot, and the kernels that `./dev test-kernel` has fetched.
    """
    images = [Path(spec.guest_kernel)] if spec.guest_kernel else sorted(_images(), key=_age)
    for image in images:
        for modules in _modules_of(image):
            if image.is_file() and (modules / "modules.dep").is_file():
                return GuestKernel(image, modules)
    if spec.guest_kernel:
        why = f"{spec.guest_kernel}: no kernel, or no modules of it (lib/modules/RELEASE/modules.dep)"
    else:
        why = "there is no kernel with modules in /boot, nor one fetched by ./dev test-kernel"
    raise Unavailable(
        "lab --far-end guest", why, "name one (--guest-kernel FILE), or `./dev test-kernel --kernel 6.1 -- true`"
    )


def _images() -> Iterator[Path]:
    cache = Path(os.environ.get("MACE_CACHE") or Path.home() / ".cache" / "mace")
    for place, pattern in (
        (Path("/boot"), "vmlinuz-*"),
        (cache / "kernels/releases", "*/boot/vmlinuz-*"),
        (cache / "kernels/releases", "*/usr/lib/modules/*/vmlinuz"),
    ):
        yield from place.glob(pattern)


def _age(path: Path) -> float:
    with suppress(OSError):
        return -path.stat().st_mtime
    return 0.0


def _modules_of(image: Path) -> Iterator[Path]:
    """Yield where the modules of a kernel may be: beside it, in the tree that it is in, or on the machine."""
    release = image.name.removeprefix("vmlinuz-")
    yield image.parent
    for root in (image.parent.parent, image.parent.parent / "usr", Path("/"), Path("/usr")):
        yield root / "lib/modules" / release


def start(record: State) -> None:
    """Start the machine and wait until it answers; `record` then names it. Raises `Unavailable`, `LabError`."""
    if found := problems(record.spec):
        raise found[0]
    kernel = kernel_of(record.spec)
    record.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    (record.directory / "initramfs").write_bytes(_initramfs(kernel))
    trials = [("kvm", _KVM_S)] if os.access("/dev/kvm", os.R_OK | os.W_OK) else []
    why = ""
    for accelerator, limit_s in [*trials, ("tcg", _EMULATED_S)]:
        process = _boot(record, kernel, accelerator)
        record.guest = GuestProcess(Process(process.pid, start_ticks(process.pid)), accelerator, kernel.release)
        record.save()
        why = _awaited(record, process, limit_s)
        if not why:
            return
        process.kill()
        process.wait()
        del _started[process.pid]
    raise LabError(f"the far end's virtual machine (Linux {kernel.release}) {why}; {_complaint(record.directory)}")


def clean(record: State) -> None:
    """Reap the machine, which has been ended, and remove its files."""
    if record.guest is not None and (child := _started.pop(record.guest.process.pid, None)) is not None:
        child.wait()
    for name in ("initramfs", "guest.log", "serial"):
        (record.directory / name).unlink(missing_ok=True)
    with suppress(OSError):  # a Docker daemon's files are removed by its own clean-up
        record.directory.rmdir()


def _boot(record: State, kernel: GuestKernel, accelerator: str) -> subprocess.Popen[bytes]:
    directory = record.directory
    argv = [
        *(QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-machine", "q35", "-smp", "1"),
        *(*_ACCELERATORS[accelerator], "-m", _MEMORY, "-serial", f"file:{directory / 'serial'}"),
        *("-netdev", f"tap,id=wire,ifname={plan.outer_device(record.spec.name)},script=no,downscript=no"),
        *("-device", f"virtio-net-pci,netdev=wire,mac={_MAC},romfile="),
        *("-kernel", str(kernel.image), "-initrd", str(directory / "initramfs")),
        *("-append", "console=ttyS0 loglevel=4 panic=-1 clearcpuid=cx16"),
    ]
    with (directory / "guest.log").open("wb") as log:
        process = subprocess.Popen(
            netns.enter_command(Path(record.members[HOST].path), argv), stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT, env=record.environment(), cwd=directory, start_new_session=True,
        )  # fmt: skip
    _started[process.pid] = process
    return process


def _awaited(record: State, process: subprocess.Popen[bytes], limit_s: float) -> str:
    """Wait until the machine answers a ping; returns why it does not, "" if it does."""
    address = str(plan.wire(REMOTE)[0].ip)
    argv = netns.enter_command(Path(record.members[HOST].path), ["ping", "-n", "-c", "1", "-W", "1", address])
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            return f"ended with status {process.returncode}"
        done = subprocess.run(argv, check=False, capture_output=True, env=record.environment(), timeout=30)
        if done.returncode == 0:
            return ""
    return f"did not answer within {limit_s:.0f} s"


def _complaint(directory: Path) -> str:
    """Return the last lines of QEMU and of the machine's serial line."""
    lines: list[str] = []
    for name in ("guest.log", "serial"):
        with suppress(OSError):
            lines += (directory / name).read_text(errors="replace").strip().splitlines()[-2:]
    return " / ".join(lines) or "it has said nothing"


# The initramfs --------------------------------------------------------------------------------------------


def _initramfs(kernel: GuestKernel) -> bytes:
    """Return an archive with busybox, the init script, and the modules in the order in which they are loaded."""
    busybox = netns.find_program("busybox")
    assert busybox is not None
    content = Path(busybox).read_bytes()
    if b"/ld-linux" in content:
        raise Unavailable("lab --far-end guest", f"{busybox} is linked with libraries", netns.remedy_for("busybox"))
    ipv4, ipv6 = plan.wire(REMOTE)
    modules = {_name(path): _plain(path) for path in _with_dependencies(kernel)}
    files = {
        "bin/busybox": content,
        "init": _INIT.format(ipv4=ipv4, ipv6=ipv6).encode(),
        "modules": "".join(f"{name}\n" for name in modules).encode(),
        **modules,
    }
    parts = [_cpio("bin", 0o040755, b"")]
    parts += [_cpio(name, 0o100755, data) for name, data in files.items()]
    return b"".join([*parts, _cpio("TRAILER!!!", 0, b"")])


def _cpio(name: str, mode: int, data: bytes) -> bytes:
    """Return one entry of an archive in the format `newc` (Documentation/driver-api/early-userspace)."""
    path = name.encode() + b"\0"
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path), 0)
    head = b"070701" + b"".join(b"%08x" % value for value in fields) + path
    return _padded(head) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _with_dependencies(kernel: GuestKernel) -> Iterable[Path]:
    """Return the files of `_MODULES` and of what they need, in the order of loading; built-in ones have none."""
    needs: dict[str, list[str]] = {}
    for line in (kernel.modules / "modules.dep").read_text().splitlines():
        module, _, rest = line.partition(":")
        needs[module] = rest.split()
    by_name = {_name(Path(path)): path for path in needs}
    chosen: dict[str, None] = {}
    for name in _MODULES:
        path = by_name.get(f"{name.replace('-', '_')}.ko")
        if path is not None:  # otherwise it is built in
            # modules.dep lists the module to load first last.
            chosen |= dict.fromkeys([*reversed(needs[path]), path])
    return [kernel.modules / path for path in chosen]


def _name(path: Path) -> str:
    """Return the module's file name without compression: `virtio-rng.ko.xz` is `virtio_rng.ko`."""
    return path.name.split(".")[0].replace("-", "_") + ".ko"


def _plain(path: Path) -> bytes:
    """Return the content of a module, which a guest may be unable to decompress."""
    data = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(data)
    if path.suffix == ".zst":
        return zstandard.ZstdDecompressor().decompressobj().decompress(data)
    return data
