"""A virtual machine that runs one command on a kernel, with a copy-on-write view of the host's files, and ends.

    host /    -- virtiofsd, in a mount namespace where all is read-only -->  lower half of the guest's root, an overlay
    (RAM of the guest)                                                       upper half
    exchange  -- virtiofsd, writable -->  /run/exchange: the command in, its output and results out
    serial line  -->  the kernel's messages, and the exit status at the end

The guest thus has the host's Python, environment and tools, and its changes to them end with it.

QEMU emulates in software if KVM does not run the kernel; emulation works the same everywhere. Some of its arguments are
necessary (measured on QEMU 7.2; without them kernels crash even without MACE's module):

- clearcpuid=cx16: the emulation of cmpxchg16b crashes 6.12 in 11 boots of 12. The CPU model must be `max`, and keep
  cx16, because numpy requires the features of such a CPU.
- AVX2 is emulated since QEMU 7.2, but incorrectly: numpy.isin of 64-bit numbers gives wrong matches. Without AVX2 in
  the CPU duckdb does not start, so that the libraries are configured not to use it (`NO_AVX`).
- tcg,thread=single: with a thread for each CPU, tracepoints toggled under traffic crash the guest.
- q35: microvm hangs in one boot of three.

QEMU always exits with 0. The guest's exit status is therefore a marker on the serial line, which is also searched for
the kernel's complaints.
"""

import lzma
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import zstandard

from tests.kernel.kernels import KERNELS, KEYRING, Kernel, KernelUnavailable, fetched, mirror

GUEST_INIT = Path(__file__).with_name("guest_init.sh")
EXCHANGE = Path("/run/exchange")  # the exchange directory in the guest
VIRTIOFSD = (Path("/usr/lib/qemu/virtiofsd"),)  # virtiofsd in C, of QEMU 7; the one in Rust has other options

MEMORY = "1G"  # pytest, numpy and the rings take 300 MB, the overlay's upper half the rest
MODULES = ("virtio_pci", "virtio_rng", "virtiofs", "overlay")  # and their dependencies

POSSIBLE_CPUS = 8
"""CPUs of the machine. All are present, but the kernel starts two: since 6.12 an absent CPU is not a possible one."""
ALWAYS = "clearcpuid=cx16 maxcpus=2"

# What finds memory misused in kernels without KASAN, and costs the tests no time that could be measured. slub_debug
# fills what is freed (P) and fences every object of a slab (Z), and looks when it is freed or given out again (F): all
# four kernels have it. KFENCE, which 6.12 and 7 have, puts one object each 10 ms beside an unmapped page. What they say
# begins with BUG. The watchdogs are patient, because the host may be busy.
CHECKS = "watchdog_thresh=60 slub_debug=FZP kfence.sample_interval=10"

NO_AVX = {
    "NPY_DISABLE_CPU_FEATURES": "X86_V3",
    "ARROW_USER_SIMD_LEVEL": "SSE4_2",
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2",
}
"""Environment of the command that keeps libraries from using AVX2; see the top of this file."""

EMULATED = ("-accel", "tcg,thread=single", "-cpu", "max")
KVM = ("-accel", "kvm", "-cpu", "host")
KVM_PROBE_S = 20
"""Time limit for a boot with KVM, which takes two or three seconds. A /dev/kvm that does not work (nested in some
hypervisors) ends in an internal error at once, or is very slow."""

MARKER = re.compile(r"mace-guest: exit status (\d+)")

COMPLAINT = re.compile(
    r"\bOops\b|\bBUG\b|\bWARNING: |Kernel panic|INFO: task |INFO: rcu|rcu: INFO|unregister_netdevice: waiting"
    r"|possible circular|possible recursive|inconsistent lock state|suspicious RCU|KASAN|UBSAN|kmemleak"
    r"|general protection fault|unable to handle|refcount_t:|Bad page|(list_add|list_del) corruption|DEBUG_LOCKS"
    r"|mace-guest: (no|cannot) "
)
"""Messages of a kernel with a problem, and of guest_init.sh."""


def complaints(serial: str) -> tuple[str, ...]:
    """Return the lines of a serial log that report a problem of the kernel."""
    return tuple(line for line in serial.splitlines() if COMPLAINT.search(line))


class MachineFailed(Exception):
    """The machine could not be started, hung, or ended without an exit status; the message has the end of its log."""


@dataclass(frozen=True, slots=True)
class Result:
    """Result of a command in a machine."""

    release: str  # of the kernel
    exit_status: int
    output: str  # of the command, both streams
    complaints: tuple[str, ...]  # lines of the serial log
    serial: str
    boot_s: float  # until the command was started
    seconds: float  # until the machine was off

    @property
    def good(self) -> bool:
        return self.exit_status == 0 and not self.complaints

    def report(self) -> str:
        """Return the output to read after a failure."""
        parts = [self.output.rstrip()]
        if self.complaints:
            first = self.serial.index(self.complaints[0])
            around = self.serial[first:].splitlines()[:60]
            parts += ["--- the kernel complains:", *self.complaints, "--- from the first on:", *around]
        return "\n".join([*parts, f"--- exit status {self.exit_status}"])


def missing() -> str | None:
    """Return why no machine can be started here, or None if one can."""
    for program in (
        "qemu-system-x86_64",
        "busybox",
        "setpriv",
        "unshare",
        "apt-get",
        "depmod",
        "make",
        "gcc",
        "debootstrap",
    ):
        if shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin") is None:
            return f"the program {program} is not installed"
    if _virtiofsd() is None:
        return f"there is no {' or '.join(map(str, VIRTIOFSD))} (Debian 12: qemu-system-common)"
    if os.uname().machine != "x86_64":
        return f"the kernels are for x86_64, this is {os.uname().machine}"
    if not all(fetched(name) for name in KERNELS):
        try:
            mirror()
        except KernelUnavailable as error:
            return str(error)
        if not KEYRING.exists():
            return f"there is no {KEYRING} (package debian-archive-keyring)"
    return None


def _virtiofsd() -> Path | None:
    return next((path for path in VIRTIOFSD if path.exists()), None)


_kvm_lock = threading.Lock()
_kvm: dict[str, bool] = {}


def kvm_works(kernel: Kernel) -> bool:
    """Return whether this machine's KVM runs the unmodified kernel, by trying it once for each kernel."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    with _kvm_lock:
        # One kernel that does not run suffices to avoid KVM.
        if not all(_kvm.values()):
            return False
        if kernel.release not in _kvm:
            try:
                found = boot(kernel, ["true"], cwd=Path("/"), timeout_s=KVM_PROBE_S, kvm=True)
                _kvm[kernel.release] = found.good
            except MachineFailed:
                _kvm[kernel.release] = False
        return _kvm[kernel.release]


def boot(
    kernel: Kernel,
    command: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 300,
    results: Path | None = None,
    stop: threading.Event | None = None,
    counted: bool = False,
    kvm: bool | None = None,
) -> Result:
    """Run `command` in a machine of its own and wait for the end of both.

    `env` is added to the guest's environment. Files in the guest's directory MACE_GUEST_RESULTS are copied to
    `results`, if that is given. Another thread may end the machine by setting `stop`. With `counted`, for benchmarks,
    the guest's clocks count instructions, one per nanosecond, and its kernel does not check for misused memory. `kvm`
    None: use KVM if it works and nothing is counted. No process is left behind in any case. Raises MachineFailed.
    """
    if kvm is None:
        kvm = not counted and kvm_works(kernel)
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mace-vm-", ignore_cleanup_errors=True)))
        exchange = work / "exchange"
        (exchange / "results").mkdir(parents=True)
        (exchange / "modules_dir").write_text(f"{kernel.modules_dir}\n")
        (exchange / "command.sh").write_text(_command(command, cwd, env or {}))
        (exchange / "output.txt").touch()
        machine = _Machine(kernel, work, exchange, counted=counted, kvm=kvm)
        stack.callback(machine.end)
        machine.start()
        try:
            machine.wait(timeout_s, stop or threading.Event())
        finally:
            if results is not None:
                results.mkdir(parents=True, exist_ok=True)
                shutil.copytree(exchange / "results", results, dirs_exist_ok=True)
                shutil.copyfile(exchange / "output.txt", results / "output.txt")
                (results / "serial.txt").write_text(machine.serial())
        return machine.result()


def _command(command: Sequence[str], cwd: Path, env: Mapping[str, str]) -> str:
    told = {
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "MACE_GUEST": "1",
        "MACE_GUEST_RESULTS": str(EXCHANGE / "results"),
        **NO_AVX,
        **env,
    }
    lines = [f"export {name}={shlex.quote(value)}" for name, value in told.items()]
    # When the command began, by the host's clock: a file's time would be by the guest's clock.
    return "\n".join([*lines, f": >{EXCHANGE}/started", f"cd {shlex.quote(str(cwd))} || exit", shlex.join(command), ""])


class _Machine:
    """QEMU and the two servers of files, from start to end."""

    def __init__(self, kernel: Kernel, work: Path, exchange: Path, *, counted: bool, kvm: bool):
        self.kernel = kernel
        self.work = work
        self.exchange = exchange
        self.counted = counted
        self.kvm = kvm
        self.processes: list[subprocess.Popen[bytes]] = []
        self.began_s = time.monotonic()
        self.boot_s = 0.0

    def start(self) -> None:
        initramfs = self.work / "initramfs.cpio"
        initramfs.write_bytes(_initramfs(self.kernel, self.work / "initramfs"))
        # Attributes of files are cached without expiry, because files do not change during a test.
        host = self._serve("host", Path("/"), "always", read_only=True)
        exchange = self._serve("exchange", self.exchange, "none", read_only=False)
        log = (self.work / "qemu.log").open("wb")
        with log:
            self.qemu = self._spawn(
                [
                    # Other processes have priority: the guest's tests have no limits but those against hanging.
                    *("nice", "-n", "10"),
                    *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
                    *("-machine", "q35,memory-backend=memory", "-smp", str(POSSIBLE_CPUS)),
                    *(KVM if self.kvm else EMULATED),
                    *("-m", MEMORY, "-object", f"memory-backend-memfd,id=memory,size={MEMORY},share=on"),
                    *("-nic", "none", "-device", "virtio-rng-pci"),
                    *("-serial", f"file:{self.work / 'serial.txt'}"),
                    *("-chardev", f"socket,id=host,path={host}"),
                    *("-device", "vhost-user-fs-pci,chardev=host,tag=host"),
                    *("-chardev", f"socket,id=exchange,path={exchange}"),
                    *("-device", "vhost-user-fs-pci,chardev=exchange,tag=exchange"),
                    *("-kernel", str(self.kernel.vmlinuz), "-initrd", str(initramfs)),
                    # Warnings and worse on the console. A panic ends QEMU, an oops does not: what comes after it is
                    # worth reading.
                    *("-append", f"console=ttyS0 loglevel=5 panic=-1 {ALWAYS} {'' if self.counted else CHECKS}"),
                    # A nanosecond of the guest's clock is one instruction then, whatever the host's load.
                    *(("-icount", "shift=0,sleep=off") if self.counted else ()),
                ],
                log=log,
            )

    def _serve(self, name: str, folder: Path, cache: str, *, read_only: bool) -> Path:
        """Export a folder, and return the address of its socket."""
        virtiofsd = _virtiofsd()
        if virtiofsd is None:
            raise MachineFailed(missing() or "no virtiofsd")
        path = self.work / f"{name}.sock"
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening,
            (self.work / f"{name}.log").open("wb") as log,
        ):
            # This process listens instead of virtiofsd, so that QEMU never connects too early and virtiofsd needs no
            # writable folder.
            listening.bind(str(path))
            listening.listen(1)
            options = f"source={folder},sandbox=chroot,cache={cache},log_level=warn"
            command = [str(virtiofsd), f"--fd={listening.fileno()}", "-f", "-o", options]
            if read_only:
                # The guest's root could remount a share writable, but here even virtiofsd cannot write. Mounts that
                # refuse (some of the kernel's own) have no files of users.
                remount = "mount -o remount,bind,ro / && cut -d' ' -f5 /proc/self/mountinfo | while read -r place; do"
                remount += ' mount -o remount,bind,ro "$place" 2>/dev/null || :; done; exec "$@"'
                command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", remount, "sh", *command]
            self._spawn(command, log=log, keep=[listening.fileno()])
        return path

    def _spawn(self, command: Sequence[str], *, log: IO[bytes], keep: Sequence[int] = ()) -> subprocess.Popen[bytes]:
        # setpriv ends the servers if this process is killed. In a process group of their own they get no Ctrl-C, which
        # this process handles.
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=keep,
            process_group=0,
        )
        self.processes.append(process)
        return process

    def wait(self, timeout_s: float, stop: threading.Event) -> None:
        deadline_s = time.monotonic() + timeout_s
        while self.qemu.poll() is None:
            if not self.boot_s and (self.exchange / "started").exists():
                self.boot_s = time.monotonic() - self.began_s
            if time.monotonic() > deadline_s:
                raise MachineFailed(self._failure(f"hung: killed after {timeout_s:.0f} s"))
            if stop.wait(0.1):
                raise MachineFailed(f"kernel {self.kernel.name}: stopped")
        self.seconds = time.monotonic() - self.began_s

    def end(self) -> None:
        for process in reversed(self.processes):
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()

    def serial(self) -> str:
        path = self.work / "serial.txt"
        return path.read_bytes().decode(errors="replace").replace("\r", "") if path.exists() else ""

    def result(self) -> Result:
        serial = self.serial()
        marker = MARKER.search(serial)
        if marker is None:
            raise MachineFailed(self._failure(f"ended without an exit status (QEMU exits {self.qemu.returncode})"))
        return Result(
            release=self.kernel.release,
            exit_status=int(marker[1]),
            output=self._output(),
            complaints=complaints(serial),
            serial=serial,
            boot_s=self.boot_s,
            seconds=self.seconds,
        )

    def _output(self) -> str:
        return (self.exchange / "output.txt").read_bytes().decode(errors="replace")

    def _failure(self, why: str) -> str:
        parts = [f"the machine with kernel {self.kernel.name} ({self.kernel.release}) {why}"]
        logs = {path.name: path.read_text(errors="replace") for path in sorted(self.work.glob("*.log"))}
        for name, text in {**logs, "output": self._output(), "serial": self.serial()}.items():
            if text.strip():
                parts += [f"--- end of {name}:", *text.rstrip().splitlines()[-60:]]
        if found := complaints(self.serial()):
            parts += ["--- the kernel complains:", *found]
        return "\n".join(parts)


# --- initramfs ----------------------------------------------------------------------------------


def _initramfs(kernel: Kernel, folder: Path) -> bytes:
    """Return an initramfs with busybox, guest_init.sh and the modules that the guest needs to mount its root."""
    (folder / "bin").mkdir(parents=True)
    busybox = shutil.which("busybox")
    assert busybox is not None, missing()
    if b"/ld-linux" in Path(busybox).read_bytes():
        raise MachineFailed(f"{busybox} is linked with libraries, which the initramfs has not: install busybox-static")
    shutil.copy(busybox, folder / "bin/busybox")
    shutil.copy(GUEST_INIT, folder / "init")
    # The kernel runs /init by its first line, which needs /bin/sh.
    (folder / "bin/sh").symlink_to("busybox")
    names = []
    for module in _with_dependencies(kernel):
        name, data = _module(module)
        (folder / name).write_bytes(data)
        names.append(name)
    (folder / "modules").write_text("".join(f"{name}\n" for name in names))
    paths = b"".join(bytes(path.relative_to(folder)) + b"\n" for path in sorted(folder.rglob("*")))
    packed = subprocess.run(
        ["busybox", "cpio", "-o", "-H", "newc"], input=paths, cwd=folder, capture_output=True, check=False, timeout=60
    )
    if packed.returncode != 0:
        raise MachineFailed(f"the initramfs: {packed.stderr.decode(errors='replace')}")
    return packed.stdout


def _with_dependencies(kernel: Kernel) -> list[Path]:
    """Return the files of MODULES and their dependencies, dependencies first; built-in modules have no file."""
    needs: dict[Path, list[Path]] = {}
    for line in (kernel.modules_dir / "modules.dep").read_text().splitlines():
        module, _, rest = line.partition(":")
        # modules.dep lists the module to load first last.
        needs[Path(module)] = [Path(word) for word in reversed(rest.split())]
    builtin = {_name(Path(line)) for line in (kernel.modules_dir / "modules.builtin").read_text().split()}
    by_name = {_name(path): path for path in needs}
    chosen: list[Path] = []
    for name in MODULES:
        if name in by_name:
            chosen += [path for path in (*needs[by_name[name]], by_name[name]) if path not in chosen]
        elif name not in builtin:
            raise MachineFailed(f"kernel {kernel.release} has no module {name}")
    return [kernel.modules_dir / path for path in chosen]


def _name(path: Path) -> str:
    # The file virtio-rng.ko.xz has the module virtio_rng.
    return path.name.split(".")[0].replace("-", "_")


def _module(path: Path) -> tuple[str, bytes]:
    """Return name and content of the uncompressed module: not every kernel here can decompress modules."""
    data = path.read_bytes()
    if path.suffix == ".xz":
        data = lzma.decompress(data)
    elif path.suffix == ".zst":
        data = zstandard.ZstdDecompressor().decompressobj().decompress(data)
    return f"{_name(path)}.ko", data
