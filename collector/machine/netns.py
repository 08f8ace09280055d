"""Finding the network namespaces of the machine, and entering one.

A namespace is identified by its inode in nsfs. Namespaces with a process are found in /proc. Those without one are bind
mounts (`ip netns add`, Docker's sandboxes), which mountinfo lists; the kernel reports changes of mountinfo
(proc_pid_mountinfo(5): poll(2) returns POLLPRI), so that no directory needs to be known or watched.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from collector.machine.processes import start_ticks
from contracts.names import text_of

_CLONE_NEWNET: Final = 0x40000000
_SO_NETNS_COOKIE: Final = 71
_MOUNTED: Final = re.compile(rb"^\S+ \S+ \S+ net:\[(\d+)\] (\S+) .* - nsfs ", re.MULTILINE)
_NAMED: Final = re.compile(r"(?:/var)?/run(?:/user/\d+)?/netns/([^/]+)")
_OTHERS: Final = re.compile(r"/proc/(?!1/)\d+/root(?=/)")
"""Paths into other processes' mount namespaces, which any user may control; that of process 1 is root's."""
_NSFS_MAGIC: Final = 0x6E736673
_SYS_OPENAT2: Final = 437
"""Number of openat2(2): since Linux 5.1 new system calls have the same number on all architectures."""
_RESOLVE_CACHED: Final = 0x20
_ESCAPED: Final = re.compile(rb"\\([0-7]{3})")
_libc: Final = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Found:
    """A network namespace and the ways to open it."""

    inode: int
    name: str = ""
    """Name that `ip netns` shows; "" if it has none."""
    path: str = ""
    """Path of its mount, reachable from this process; "" if it is not mounted."""
    pid: int = 0
    """Its first process, 0 without one. The first is the oldest, not the lowest id, because ids wrap at their limit."""


NetnsOf = Callable[[int], int | None]
"""Returns the inode of the network namespace of the process with that id; None if it cannot be found out."""


class Namespaces:
    """Lists the machine's network namespaces. Its file descriptor polls as POLLPRI when mounts have changed.

    `of_process` returns the inode of a process's namespace.
    """

    def __init__(self, of_process: NetnsOf | None = None) -> None:
        self._of_process = of_process or netns_of
        self._file = Path("/proc/self/mountinfo").open("rb", buffering=0)  # noqa: SIM115 - closed by close()
        self._mounts: dict[int, tuple[str, str]] = {}
        self._stale = True
        self._first: dict[int, int] = {}
        self.occupied: dict[int, list[int]] = {}
        """Result of the function `occupied` at the last scan."""

    def close(self) -> None:
        self._file.close()

    def fileno(self) -> int:
        return self._file.fileno()

    def mounts_changed(self) -> None:
        """Make the next scan read the mounts again."""
        self._stale = True

    def scan(self) -> dict[int, Found]:
        """Return all namespaces by inode; takes about 5 µs per process, and 1 ms for 1000 mounts if they changed."""
        if self._stale:
            self._mounts = mounted()
            self._stale = False
        self.occupied = occupied(self._of_process)
        self._first = {inode: _first_of(pids, self._first.get(inode, 0)) for inode, pids in self.occupied.items()}
        return {
            inode: Found(inode, *self._mounts.get(inode, ("", "")), self._first.get(inode, 0))
            for inode in self._mounts.keys() | self._first.keys()
        }


def netns_of(pid: int) -> int | None:
    """Return the inode of a process's namespace; None without the right to trace the process (ptrace(2))."""
    return inode_of(f"/proc/{pid}/ns/net")


def occupied(of_process: NetnsOf = netns_of) -> dict[int, list[int]]:
    """Return inode → ids of the processes for every namespace that has a process.

    A process counts for the namespace of its first thread: other threads change namespaces temporarily (a runtime at
    work).
    """
    processes: dict[int, list[int]] = {}
    for pid in _processes():
        inode = of_process(pid)
        if inode is not None:
            processes.setdefault(inode, []).append(pid)
    return processes


def _first_of(pids: list[int], before: int) -> int:
    """Return `before` while that process is among `pids`, else the process that started first."""
    if before in pids:
        return before
    if len(pids) == 1:
        return pids[0]
    started = {pid: start_ticks(pid) for pid in pids}
    # A process that has ended since it was listed sorts last.
    return min(pids, key=lambda pid: (started[pid] < 0, started[pid], pid))


def hidden() -> dict[int, Found]:
    """Return, by inode, the namespaces kept by an open file of a process or by a mount in another mount namespace.

    The search visits every open file of every process (2 µs each). It is meant for the rare veth whose peer's namespace
    is not found otherwise.
    """
    found: dict[int, Found] = {}
    seen: set[str] = set()
    for pid in _processes():
        try:
            mounts = os.readlink(f"/proc/{pid}/ns/mnt")  # noqa: PTH115 - not a path
            if mounts not in seen:
                seen.add(mounts)
                for inode, place in _mounted_in(str(pid)):
                    found.setdefault(inode, Found(inode, path=f"/proc/{pid}/root{place}"))
            for fd in os.listdir(f"/proc/{pid}/fd"):  # noqa: PTH208
                held = inode_of(f"/proc/{pid}/fd/{fd}")
                if held is not None:
                    found.setdefault(held, Found(held, path=f"/proc/{pid}/fd/{fd}"))
        except OSError:
            continue  # the process has ended
    return found


def _processes() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]  # noqa: PTH208 - fast: it is every second


def mounted() -> dict[int, tuple[str, str]]:
    """Return inode → (name or "", path or "") of every mounted namespace.

    The mounts are those of process 1, if it has another mount namespace (MACE runs in a container), and MACE's own. A
    mount of process 1 has no path if this process may not enter its root directory.
    """
    found: dict[int, tuple[str, str]] = {}
    if not _same_mounts():
        reachable = os.access("/proc/1/root", os.R_OK)
        for inode, place in _mounted_in("1"):
            _prefer(found, inode, _name(place), f"/proc/1/root{place}" if reachable else "")
    for inode, place in _mounted_in("self"):
        _prefer(found, inode, _name(place), place)
    return found


def _prefer(found: dict[int, tuple[str, str]], inode: int, name: str, path: str) -> None:
    """Enter a mount of a namespace, unless another mount says more: a name first, then a path."""
    before = found.get(inode, ("", ""))
    if name or not before[0]:
        found[inode] = (name, path) if path else (name, before[1])


def _mounted_in(process: str) -> list[tuple[int, str]]:
    """Return (inode, path as the process sees it) of each namespace mounted in a process's mount namespace."""
    try:
        table = Path(f"/proc/{process}/mountinfo").read_bytes()
    except OSError:
        return []
    return [
        (int(inode), os.fsdecode(_ESCAPED.sub(lambda octal: bytes([int(octal[1], 8)]), escaped)))
        for inode, escaped in _MOUNTED.findall(table)
    ]


def _same_mounts() -> bool:
    try:
        return os.readlink("/proc/1/ns/mnt") == os.readlink("/proc/self/ns/mnt")  # noqa: PTH115 - not a path
    except OSError:
        return False


def _name(place: str) -> str:
    """Return `x` for /run/netns/x (root's or a user's), "" for other paths: Docker's sandbox names identify nothing."""
    named = _NAMED.fullmatch(place)
    return text_of(os.fsencode(named[1])) if named else ""


def path_of(named: str) -> str:
    """Return the path of a network namespace that a user gives by name (in /run/netns) or by path."""
    return named if "/" in named else f"/run/netns/{named}"


def inode_of(path: str) -> int | None:
    """Return the inode of the network namespace behind a link such as /proc/PID/ns/net; None if it cannot be read."""
    try:
        target = os.readlink(path)  # noqa: PTH115 - "net:[4026531840]", not a path
    except OSError:
        return None
    return int(target[5:-1]) if target.startswith("net:[") else None


def open_netns(found: Found) -> int | None:
    """Open the namespace and return its file descriptor, or None if the namespace cannot be reached.

    The descriptor keeps the namespace alive: close it soon.
    """
    for path in (found.path, f"/proc/{found.pid}/ns/net" if found.pid else ""):
        if not path:
            continue
        try:
            fd = open_nsfs(path)
        except OSError:
            continue
        # The process or the mount may have been replaced since the scan.
        if os.fstat(fd).st_ino == found.inode:
            return fd
        os.close(fd)
    return None


def open_nsfs(path: str) -> int:
    """Open the network namespace at `path`, which any user may have chosen, and return its descriptor. Never blocks.

    The owner of a user namespace can mount anything on such a path: a FIFO, a device, a mute file system.
    A path through another mount namespace is therefore resolved from the kernel's cache alone. The target is first held
    without being opened (O_PATH), and opened only if the kernel identifies it as a namespace. Raises `OSError`: EINVAL
    if the target is no namespace, EAGAIN if resolving the path would have to wait.
    """
    held = _held(path)
    try:
        if _file_system_of(held) != _NSFS_MAGIC:
            raise OSError(errno.EINVAL, "no namespace", path)
        return os.open(f"/proc/self/fd/{held}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    finally:
        os.close(held)


def _held(path: str) -> int:
    """Return an O_PATH file descriptor of the target of `path`."""
    flags = os.O_PATH | os.O_CLOEXEC
    other = _OTHERS.match(path)
    if other is None:
        return os.open(path, flags)
    root = os.open(other[0], flags)
    try:
        below = path[len(other[0]) :].lstrip("/")
        try:
            return _openat2(root, below, flags, _RESOLVE_CACHED)
        except OSError as error:
            # RESOLVE_CACHED needs Linux 5.12, openat2(2) Linux 5.6.
            if error.errno not in (errno.EINVAL, errno.ENOSYS):
                raise
            return os.open(below, flags, dir_fd=root)
    finally:
        os.close(root)


def _file_system_of(fd: int) -> int:
    """Return the magic number of a file's file system: the first word of struct statfs (120 bytes; fstatfs(2))."""
    told = ctypes.create_string_buffer(256)
    if _libc.fstatfs(fd, told):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), "fstatfs")
    return ctypes.c_long.from_buffer(told).value


def _openat2(directory: int, path: str, flags: int, resolve: int) -> int:
    """Call openat2(2), which Python lacks."""
    how = struct.pack("=QQQ", flags, 0, resolve)
    fd: int = _libc.syscall(_SYS_OPENAT2, directory, os.fsencode(path), how, ctypes.c_size_t(len(how)))
    if fd < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), path)
    return fd


def leave_for_new_netns() -> int:
    """Move this thread alone into a new, empty network namespace, and return a descriptor of that namespace.

    Call it neither from the main thread, whose namespaces /proc/self/ns shows, nor from a thread of a pool.
    """
    _own_thread()
    if _libc.unshare(_CLONE_NEWNET):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), "unshare(CLONE_NEWNET)")
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def cookie_here() -> int:
    """Return the cookie of this thread's network namespace (SO_NETNS_COOKIE, Linux 5.14); 0 on older kernels."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as any_socket:
            told = any_socket.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)
    except OSError:
        return 0
    return int.from_bytes(told, sys.byteorder)


@contextlib.contextmanager
def inside(netns_fd: int, home_fd: int) -> Iterator[None]:
    """Run the block with this thread in another network namespace, which it keeps alive: the block must be short."""
    _own_thread()
    _setns(netns_fd)
    try:
        yield
    finally:
        _setns(home_fd)


def _setns(fd: int) -> None:
    # os.setns needs Python 3.12.
    if _libc.setns(fd, _CLONE_NEWNET):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), "setns")


def _own_thread() -> None:
    if threading.current_thread() is threading.main_thread():
        raise RuntimeError("the main thread must stay in its network namespace")
