"""Enters, inspects, makes and removes network namespaces.

No function changes the caller's own namespace: `enter` refuses it, and commands run in the namespace at a path.
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
"""Directory of iproute2's named namespaces: files on which a namespace is mounted."""
COMMAND_LIMIT_S: Final = 30.0
"""Time limit of a command. A command takes milliseconds; only a hanging machine reaches the limit."""

_CLONE_NEWNET: Final = 0x4000_0000
_MNT_DETACH: Final = 2
_MS_BIND: Final = 0x1000
_SBIN: Final = "/usr/local/sbin:/usr/sbin:/sbin"
_libc: Final = ctypes.CDLL(None, use_errno=True)


def search_path() -> str:
    """Return PATH with the sbin directories, which an unprivileged login's PATH (kept by sudo or su) may lack."""
    return os.environ.get("PATH", "/usr/local/bin:/usr/bin:/bin") + ":" + _SBIN


def find_program(name: str) -> str | None:
    """Return the full path of a program; None if it is not installed."""
    return shutil.which(name, path=search_path())


def inode(path: Path) -> int:
    """Return the inode of the namespace mounted at `path`; 0 if there is no file, or no namespace mounted on it."""
    try:
        found = path.stat()
    except OSError:
        return 0
    return found.st_ino if found.st_dev == Path("/proc/self/ns/net").stat().st_dev else 0


def own_inode() -> int:
    """Return the inode of the caller's network namespace."""
    return Path("/proc/self/ns/net").stat().st_ino


def enter(path: Path, action: Callable[[], T]) -> T:
    """Run `action` in the namespace at `path` and return its result.

    A new thread runs it and ends with it. The calling thread never changes its namespace, so no failure can leave it in
    the wrong one. Raises `LabError` if `path` is no namespace or the caller's own.
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
    """Run `action` in a new nameless network namespace, which is then removed. Raises `OSError` if that is refused."""
    return _in_thread(lambda: _check(_libc.unshare(_CLONE_NEWNET), "unshare"), action)


def _in_thread(switch: Callable[[], None], action: Callable[[], T]) -> T:
    """Run both functions in a new thread, because a namespace belongs to a thread; raises what they raise."""
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
    """Return the command line that runs `argv` in the namespace at `path`.

    It uses `nsenter`, because `ip netns exec` mounts a new /sys, which hides tracefs, cgroups and bpffs.
    """
    return ["nsenter", f"--net={path}", "--", *argv]


def run(argv: list[str], *, stdin: str = "", env: Mapping[str, str]) -> str:
    """Run a command to its end and return its standard output. Raises `LabError` or `Unavailable`."""
    done = completed(argv, stdin=stdin, env=env)
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}"
        raise LabError(f"{' '.join(argv)}: {said}")
    return done.stdout


def completed(argv: list[str], *, stdin: str = "", env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and return its exit status and output.

    The command has a session of its own, so that Ctrl-C on the terminal does not interrupt a clean-up's commands.
    Raises `LabError` if the command does not end in time, `Unavailable` if it is not installed.
    """
    program = find_program(argv[0])
    if program is None:
        raise Unavailable("lab", f"the program {argv[0]!r} is missing", remedy_for(argv[0]))
    try:
        return subprocess.run(
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
        raise LabError(f"{' '.join(argv)}: did not end within {COMMAND_LIMIT_S:.0f} s") from error


_PACKAGES: Final = {
    "ip": "iproute2",
    "bridge": "iproute2",
    "tc": "iproute2",
    "nft": "nftables",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "ping": "iputils-ping",
    "dockerd": "docker.io",
    "containerd": "containerd",
    "containerd-shim-runc-v2": "containerd",
    "ctr": "containerd",
    "runc": "docker.io",
    "iptables": "iptables",
    "podman": "podman netavark",
    "conmon": "conmon",
    "busybox": "busybox-static",
    "ldd": "libc-bin",
    "qemu-system-x86_64": "qemu-system-x86",
}


def remedy_for(program: str) -> str:
    """Return the command that installs a missing program."""
    if program == "apptainer":
        return "install Apptainer from https://apptainer.org; of Debian's releases only unstable has it"
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
    """Mount the namespace at `source` (for example /proc/PID/ns/net) on the new file `target`. Raises `OSError`."""
    target.touch(mode=0o444)
    _check(_libc.mount(bytes(source), bytes(target), b"none", _MS_BIND, None), f"mount {target}")


def remove(path: Path) -> bool:
    """Unmount and remove the name at `path`; returns False if there is no such file.

    The kernel removes the namespace when nothing else holds it.
    """
    if not path.exists():
        return False
    while True:  # two concurrent set-ups may have mounted it twice
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
