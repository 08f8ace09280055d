"""Finding the network namespaces of the machine, and entering one.

A namespace is known by its inode in nsfs. Those with a process are found in /proc; those without one are bind
mounts (`ip netns add`, Docker's sandboxes) and stand in mountinfo, of which the kernel says when it changes
(proc_pid_mountinfo(5): a poll(2) returns POLLPRI), so nothing needs to know the directories.
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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mace.names import text_of
from mace.processes import start_ticks

_CLONE_NEWNET: Final = 0x40000000
_SO_NETNS_COOKIE: Final = 71
_MOUNTED: Final = re.compile(rb"^\S+ \S+ \S+ net:\[(\d+)\] (\S+) .* - nsfs ", re.MULTILINE)
_NAMED: Final = re.compile(r"(?:/var)?/run(?:/user/\d+)?/netns/([^/]+)")
_OTHERS: Final = re.compile(r"/proc/(?!1/)\d+/root(?=/)")
"""Other users' mount namespaces; that of process 1 is root's."""
_NSFS_MAGIC: Final = 0x6E736673
_SYS_OPENAT2: Final = 437
"""The same on all architectures, as all system calls since Linux 5.1 are."""
_RESOLVE_CACHED: Final = 0x20
_ESCAPED: Final = re.compile(rb"\\([0-7]{3})")
_libc: Final = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Found:
    """A network namespace and the ways to it."""

    inode: int
    name: str = ""
    """As `ip netns` shows it, if it does."""
    path: str = ""
    """Where it is mounted, if it is; reachable from this process."""
    pid: int = 0
    """Its first process, if it has one: the longest there, not the lowest id, since ids start anew at their limit."""


class Namespaces:
    """What the machine has now. Keeps one file open, to be polled for POLLPRI: the mounts changed."""

    def __init__(self) -> None:
        self._file = Path("/proc/self/mountinfo").open("rb", buffering=0)  # noqa: SIM115 - closed by close()
        self._mounts: dict[int, tuple[str, str]] = {}
        self._stale = True
        self._first: dict[int, int] = {}
        self.occupied: dict[int, list[int]] = {}
        """What `occupied` found at the last scan."""

    def close(self) -> None:
        self._file.close()

    def fileno(self) -> int:
        return self._file.fileno()

    def mounts_changed(self) -> None:
        """The next scan reads the mounts again."""
        self._stale = True

    def scan(self) -> dict[int, Found]:
        """All namespaces by inode: about 5 µs for each process, and 1 ms for 1000 mounts if they changed."""
        if self._stale:
            self._mounts = mounted()
            self._stale = False
        self.occupied = occupied()
        self._first = {inode: _first_of(pids, self._first.get(inode, 0)) for inode, pids in self.occupied.items()}
        return {
            inode: Found(inode, *self._mounts.get(inode, ("", "")), self._first.get(inode, 0))
            for inode in self._mounts.keys() | self._first.keys()
        }


def occupied() -> dict[int, list[int]]:
    """Inode of every namespace that has a process → the ids of all of them.

    Of each process the first thread counts: the others' namespaces are passing states (a runtime at work).
    """
    processes: dict[int, list[int]] = {}
    for pid in _processes():
        inode = inode_of(f"/proc/{pid}/ns/net")
        if inode is not None:
            processes.setdefault(inode, []).append(pid)
    return processes


def _first_of(pids: list[int], before: int) -> int:
    """The process that was first before, for as long as it is there; else the one that started first."""
    if before in pids:
        return before
    if len(pids) == 1:
        return pids[0]
    started = {pid: start_ticks(pid) for pid in pids}
    # One that has ended since it was listed comes last.
    return min(pids, key=lambda pid: (started[pid] < 0, started[pid], pid))


def hidden() -> dict[int, Found]:
    """Namespaces that an open file of some process keeps, or a mount that only others see.

    Looks at every file of every process (2 µs each): for the rare case that a veth leads to nowhere.
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
            continue  # it has ended
    return found


def _processes() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]  # noqa: PTH208 - fast: it is every second


def mounted() -> dict[int, tuple[str, str]]:
    """Inode of every namespace that is mounted → (name or "", path).

    Looks in our own mount namespace, then in that of process 1, which is another one where we run in a container.
    """
    found: dict[int, tuple[str, str]] = {}
    for process, root in (("1", "/proc/1/root"), ("self", "")):
        if root and (_same_mounts() or not os.access(root, os.R_OK)):
            continue
        for inode, place in _mounted_in(process):
            name = _name(place)
            if name or inode not in found:
                found[inode] = (name, root + place)
    return found


def _mounted_in(process: str) -> list[tuple[int, str]]:
    """(inode, place) of each namespace that is mounted where the process is; a place is as the process sees it."""
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
        return True


def _name(place: str) -> str:
    """`x` for /run/netns/x, root's or a user's; nothing elsewhere: what Docker calls its sandboxes says nothing."""
    named = _NAMED.fullmatch(place)
    return text_of(os.fsencode(named[1])) if named else ""


def path_of(named: str) -> str:
    """Path of the network namespace that a person names: by a name in /run/netns, or by the path itself."""
    return named if "/" in named else f"/run/netns/{named}"


def inode_of(path: str) -> int | None:
    """Inode of the network namespace behind /proc/PID/ns/net, None if it is none or may not be known."""
    try:
        target = os.readlink(path)  # noqa: PTH115 - "net:[4026531840]", not a path
    except OSError:
        return None
    return int(target[5:-1]) if target.startswith("net:[") else None


def open_netns(found: Found) -> int | None:
    """A file descriptor on the namespace (it pins the namespace: close it soon), None if it cannot be reached."""
    for path in (found.path, f"/proc/{found.pid}/ns/net" if found.pid else ""):
        if not path:
            continue
        try:
            fd = open_nsfs(path)
        except OSError:
            continue
        # The process or the mount may be another one by now.
        if os.fstat(fd).st_ino == found.inode:
            return fd
        os.close(fd)
    return None


def open_nsfs(path: str) -> int:
    """A file descriptor on the network namespace at `path`, which any user may have chosen. Never blocks.

    Whoever has a user namespace mounts what he likes on such a path: a FIFO, a device, a file system of his own whose
    answers never come. So the path is walked in the kernel's cache alone where another mount namespace lies on the
    way, what it leads to is held without being opened (O_PATH), and opened only once the kernel says that it is a
    namespace. Raises OSError: EINVAL where it is none, EAGAIN where finding out would have to wait.
    """
    held = _held(path)
    try:
        if _file_system_of(held) != _NSFS_MAGIC:
            raise OSError(errno.EINVAL, "no namespace", path)
        return os.open(f"/proc/self/fd/{held}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    finally:
        os.close(held)


def _held(path: str) -> int:
    """An O_PATH file descriptor on what `path` leads to."""
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
            # Before Linux 5.12, which has RESOLVE_CACHED; 5.6 has the call.
            if error.errno not in (errno.EINVAL, errno.ENOSYS):
                raise
            return os.open(below, flags, dir_fd=root)
    finally:
        os.close(root)


def _file_system_of(fd: int) -> int:
    """The magic number of a file's file system: the first word of fstatfs(2)'s struct statfs, which has 120 bytes."""
    told = ctypes.create_string_buffer(256)
    if _libc.fstatfs(fd, told):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), "fstatfs")
    return ctypes.c_long.from_buffer(told).value


def _openat2(directory: int, path: str, flags: int, resolve: int) -> int:
    """openat2(2), which Python does not have."""
    how = struct.pack("=QQQ", flags, 0, resolve)
    fd: int = _libc.syscall(_SYS_OPENAT2, directory, os.fsencode(path), how, ctypes.c_size_t(len(how)))
    if fd < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), path)
    return fd


def leave_for_new_netns() -> int:
    """Move this thread alone into a new, empty network namespace; a file descriptor to return to it.

    Never from the main thread (/proc/self/ns is that of the main thread) nor from one that goes back to a pool.
    """
    _own_thread()
    if _libc.unshare(_CLONE_NEWNET):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), "unshare(CLONE_NEWNET)")
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def cookie_here() -> int:
    """The cookie of this thread's network namespace (SO_NETNS_COOKIE, Linux 5.14); 0 where the kernel tells none."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as any_socket:
            told = any_socket.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)
    except OSError:
        return 0
    return int.from_bytes(told, sys.byteorder)


@contextlib.contextmanager
def inside(netns_fd: int, home_fd: int) -> Iterator[None]:
    """This thread in another network namespace for a moment. Stays pinned until left: be quick."""
    _own_thread()
    _setns(netns_fd)
    try:
        yield
    finally:
        _setns(home_fd)


def _setns(fd: int) -> None:
    # os.setns came with Python 3.12.
    if _libc.setns(fd, _CLONE_NEWNET):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), "setns")


def _own_thread() -> None:
    if threading.current_thread() is threading.main_thread():
        raise RuntimeError("the main thread must stay in its network namespace")
