"""Network namespaces: enter, look at, make and remove them.

Nothing here acts on the namespace that the caller is in: `enter` refuses it, and commands are given a path.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final, TypeVar

from contracts.errors import LabError, Unavailable

T = TypeVar("T")

NETNS_DIR: Final = Path("/run/netns")
"""Where iproute2 keeps named namespaces: files on which a namespace is mounted."""
COMMAND_LIMIT_S: Final = 30.0
"""A command of the set-up takes milliseconds; this is for a machine that hangs."""

_CLONE_NEWNET: Final = 0x4000_0000
_MNT_DETACH: Final = 2
_MS_BIND: Final = 0x1000
_SBIN: Final = "/usr/local/sbin:/usr/sbin:/sbin"
_libc: Final = ctypes.CDLL(None, use_errno=True)


def search_path() -> str:
    """PATH with the system directories, which an unprivileged login's PATH (kept by sudo or su) may lack."""
    return os.environ.get("PATH", "/usr/local/bin:/usr/bin:/bin") + ":" + _SBIN


def find_program(name: str) -> str | None:
    """Full path of a program; None if it is not installed."""
    return shutil.which(name, path=search_path())


def inode(path: Path) -> int:
    """Inode of the namespace mounted at `path`; 0 if there is none (no file, or a file with nothing mounted)."""
    try:
        found = path.stat()
    except OSError:
        return 0
    return found.st_ino if found.st_dev == Path("/proc/self/ns/net").stat().st_dev else 0


def own_inode() -> int:
    """Inode of the caller's network namespace."""
    return Path("/proc/self/ns/net").stat().st_ino


def enter(path: Path, action: Callable[[], T]) -> T:
    """Run `action` in the namespace at `path`, in a thread of its own that ends with it.

    The calling thread never changes namespace, so no failure can leave it in the wrong one. Raises `LabError`.
    """
    if inode(path) in (0, own_inode()):
        raise LabError(f"{path}: expected another network namespace than our own, found none")

    def switch() -> None:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _check(_libc.setns(fd, _CLONE_NEWNET), f"setns {path}")
        finally:
            os.close(fd)

    return _in_thread(switch, action)


def in_new(action: Callable[[], T]) -> T:
    """Run `action` in a nameless new network namespace, gone afterwards. Raises `OSError` where that is refused."""
    return _in_thread(lambda: _check(_libc.unshare(_CLONE_NEWNET), "unshare"), action)


def _in_thread(switch: Callable[[], None], action: Callable[[], T]) -> T:
    """Both in a thread of their own, since a namespace is a thread's; what they raise is raised here."""
    outcome: list[T] = []
    trouble: list[BaseException] = []

    def body() -> None:
        try:
            switch()
            outcome.append(action())
        except BaseException as error:  # noqa: BLE001 - raised again in the calling thread
            trouble.append(error)

    thread = threading.Thread(target=body, name="netns")
    thread.start()
    thread.join()
    if trouble:
        raise trouble[0]
    return outcome[0]


def enter_command(path: Path, argv: Iterable[str]) -> list[str]:
    """The command line that runs `argv` in the namespace at `path`.

    `nsenter`, not `ip netns exec`: the latter mounts a new /sys, which hides tracefs, cgroups and bpffs.
    """
    return ["nsenter", f"--net={path}", "--", *argv]


def run(argv: list[str], *, stdin: str = "", env: Mapping[str, str]) -> str:
    """Run a command of the set-up to its end and return what it printed. Raises `LabError` or `Unavailable`.

    In a session of its own, so that Ctrl-C on the terminal interrupts us and not the clean-up's commands.
    """
    program = find_program(argv[0])
    if program is None:
        raise Unavailable("lab", f"the program {argv[0]!r} is missing", remedy_for(argv[0]))
    try:
        done = subprocess.run(
            [program, *argv[1:]],
            check=False,
            input=stdin,
            capture_output=True,
            text=True,
            env=dict(env),
            timeout=COMMAND_LIMIT_S,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired as error:
        raise LabError(f"{' '.join(argv)}: no end after {COMMAND_LIMIT_S:.0f} s") from error
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}"
        raise LabError(f"{' '.join(argv)}: {said}")
    return done.stdout


_PACKAGES: Final = {
    "ip": "iproute2",
    "nft": "nftables",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "ping": "iputils-ping",
    "dockerd": "docker.io",
    "containerd": "docker.io",
    "runc": "docker.io",
    "iptables": "iptables",
    "busybox": "busybox-static",
    "ldd": "libc-bin",
}


def remedy_for(program: str) -> str:
    """What to do about a missing program."""
    return f"apt-get install {_PACKAGES.get(program, program)}"


def write_sysctls(path: Path, values: Mapping[str, int | str]) -> None:
    """Set sysctls in the namespace at `path`; keys are paths below /proc/sys/net. Raises `LabError`."""

    def body() -> None:
        for key, value in values.items():
            try:
                (Path("/proc/sys/net") / key).write_text(str(value))
            except OSError as error:
                raise LabError(f"sysctl net/{key} = {value}: {error.strerror}") from error

    enter(path, body)


def keep(source: Path, target: Path) -> None:
    """Mount the namespace at `source` (say /proc/PID/ns/net) at the new file `target`. Raises `OSError`."""
    target.touch(mode=0o444)
    _check(_libc.mount(bytes(source), bytes(target), b"none", _MS_BIND, None), f"mount {target}")


def remove(path: Path) -> bool:
    """Take away the name at `path`; the namespace goes when nothing else holds it. False if there was no such file."""
    if not path.exists():
        return False
    while True:  # mounted twice, if two set-ups ever met
        if _libc.umount2(bytes(path), _MNT_DETACH) != 0:
            if ctypes.get_errno() in (errno.EINVAL, errno.ENOENT):
                break
            _check(-1, f"umount {path}")
    path.unlink(missing_ok=True)
    return True


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
