"""Trace instances in tracefs: made for one run and removed afterwards.

An instance (Documentation/trace/ftrace.rst, "Instances") has its own ring buffers, clock and enabled events, so that
MACE neither sees nor disturbs other tracers of the machine. The instance's name identifies the process that made it:

    mace-<pid>-<start time of that process>-<random>

The next run thereby recognises and removes the instances of runs that were killed.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from collector.machine.processes import start_ticks
from contracts.errors import SourceError, Unavailable

_log = logging.getLogger(__name__)

DEFAULT_MOUNT: Final = Path("/sys/kernel/tracing")
_FIRST_PID_NAMESPACE: Final = 0xEFFFFFFC
"""PROC_PID_INIT_INO (include/linux/proc_ns.h): inode of the PID namespace whose numbers the events have."""
_NAME: Final = re.compile(r"mace-(?P<pid>\d+)-(?P<start>\d+)-[0-9a-f]+")
_LOSSES: Final = ("overrun", "commit overrun", "dropped events")


def _decode_mount_point(text: str) -> Path:
    """Return a path of /proc/mounts, which writes blanks and backslashes in octal (fs/proc_namespace.c, `mangle`)."""
    return Path(re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), text))


def mounted(mounts: str) -> Path | None:
    """Return the mount point of tracefs in the text of /proc/mounts, preferably `DEFAULT_MOUNT`; None without one."""
    points = [
        _decode_mount_point(f[1]) for line in mounts.splitlines() if len(f := line.split()) > 2 and f[2] == "tracefs"
    ]
    return DEFAULT_MOUNT if DEFAULT_MOUNT in points else next(iter(points), None)


def _mount(point: Path) -> None:
    """Mount tracefs; raises `OSError`. Python has no mount(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    # MS_NOSUID | MS_NODEV | MS_NOEXEC (include/uapi/linux/mount.h), as in systemd's unit for tracefs.
    if libc.mount(b"tracefs", os.fsencode(point), b"tracefs", ctypes.c_ulong(2 | 4 | 8), None):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(point))


def find() -> Path:
    """Return the root of tracefs, and mount tracefs if necessary; raises `Unavailable` with the remedy."""
    if os.geteuid() != 0:
        raise Unavailable("ftrace", "tracefs is for root only", "run as root (sudo)")
    point = mounted(Path("/proc/self/mounts").read_text(encoding="utf-8", errors="surrogateescape"))
    if point is None:
        remedy = f"mount -t tracefs nodev {DEFAULT_MOUNT} (in a container: -v {DEFAULT_MOUNT}:{DEFAULT_MOUNT})"
        try:
            _mount(DEFAULT_MOUNT)
        except OSError as error:
            why = "this kernel has no tracefs" if error.errno in (errno.ENODEV, errno.ENOENT) else error.strerror
            raise Unavailable("ftrace", f"tracefs is not mounted and cannot be: {why}", remedy) from error
        point = DEFAULT_MOUNT
    if not (point / "instances").is_dir() or not (point / "events/header_page").is_file():
        raise Unavailable(
            "ftrace", f"{point} has no instances or no events", "a kernel with CONFIG_EVENT_TRACING is needed"
        )
    return point


def read(path: Path) -> str:
    """Return the text of a tracefs file; raises `SourceError` with its path."""
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from error


def write(path: Path, text: str) -> None:
    """Set a tracefs file, in one write(2); raises `SourceError` with the path and the value."""
    _put(path, text, os.O_TRUNC)


def append(path: Path, text: str) -> None:
    """Add to the list in a tracefs file, in one write(2); raises `SourceError` with the path and the value."""
    _put(path, text, os.O_APPEND)


def _put(path: Path, text: str, how: int) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | how)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)
    except OSError as error:
        raise SourceError(f"{path}: the kernel refuses {text!r}: {error.strerror}") from error


def remove_leftovers(root: Path) -> list[str]:
    """Remove the instances of runs that have ended, and return their names.

    A live run keeps its rings open, and the kernel does not remove an instance with an open file (EBUSY). The instance
    of a process that this PID namespace cannot see is thereby safe.
    """
    removed = []
    for instance in (root / "instances").iterdir():
        match = _NAME.fullmatch(instance.name)
        if match is None or start_ticks(int(match["pid"])) == int(match["start"]):
            continue
        try:
            instance.rmdir()
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.ENOENT):
                raise SourceError(f"{instance}: left by a run that is gone, and cannot be removed: {error}") from error
            continue
        removed.append(instance.name)
    return removed


def refuse_pid_namespace() -> None:
    """Raise `Unavailable` in a PID namespace of its own, because events have the host's task numbers."""
    if Path("/proc/self/ns/pid").stat().st_ino != _FIRST_PID_NAMESPACE:
        raise Unavailable(
            "ftrace", "this process has a PID namespace of its own", "give the container the host's: --pid=host"
        )


@dataclass(frozen=True, slots=True)
class RingStats:
    """The kernel's counts of one CPU's ring (`per_cpu/cpuN/stats`): events since the instance was made."""

    entries: int
    """Events written and not yet read."""
    read: int
    lost: int
    """Events overwritten before they were read, or dropped."""


class Instance:
    """One trace instance; `create` and `remove` are a pair."""

    def __init__(self, root: Path, path: Path) -> None:
        self.root, self.path = root, path

    @classmethod
    def create(cls, root: Path) -> Instance:
        """Make a new, stopped instance; raises `SourceError`."""
        pid = os.getpid()
        path = root / "instances" / f"mace-{pid}-{start_ticks(pid)}-{secrets.token_hex(4)}"
        try:
            path.mkdir()
        except OSError as error:
            raise SourceError(f"{path}: the trace instance cannot be made: {error.strerror}") from error
        instance = cls(root, path)
        try:
            # A new instance records at once (trace_array_create_dir). Stop it until the settings are made.
            instance.record(on=False)
        except BaseException:
            instance.remove()
            raise
        return instance

    def remove(self) -> None:
        """Remove the instance with its rings and enabled events; raises `SourceError`. Its files must be closed."""
        try:
            self.path.rmdir()
        except FileNotFoundError:
            return
        except OSError as error:
            raise SourceError(f"{self.path}: the trace instance cannot be removed: {error.strerror}") from error

    def record(self, *, on: bool) -> None:
        """Start or stop writing into the rings."""
        write(self.path / "tracing_on", "1" if on else "0")

    def set_clock(self, clock: str) -> None:
        """Choose the clock of the timestamps; raises `Unavailable` or `SourceError` if the kernel does not use it."""
        offered = read(self.path / "trace_clock").replace("[", "").replace("]", "").split()
        if clock not in offered:
            raise Unavailable(
                "ftrace", f"this kernel has no trace clock {clock!r}, only {', '.join(offered)}", "Linux 4.2 or later"
            )
        write(self.path / "trace_clock", clock)
        in_use = re.search(r"\[(\S+)\]", read(self.path / "trace_clock"))
        if in_use is None or in_use[1] != clock:
            raise SourceError(f"{self.path}: the trace clock is {in_use and in_use[1]!r}, expected {clock!r}")

    def set_option(self, name: str, *, on: bool) -> None:
        """Switch a trace option. Without the option in this kernel, off has no effect and on raises `SourceError`."""
        try:
            write(self.path / "trace_options", name if on else f"no{name}")
        except SourceError:
            if on:
                raise
            _log.debug("ftrace: no option %s on this kernel", name)

    def set_ring_size(self, per_cpu_kib: int, subbuf_kib: int | None = None) -> None:
        """Set the size of each CPU's ring; raises `SourceError`, for example if memory is short."""
        if subbuf_kib is not None:
            write(self.path / "buffer_subbuf_size_kb", str(subbuf_kib))
        write(self.path / "buffer_size_kb", str(per_cpu_kib))

    def set_readable_at(self, percent: int) -> None:
        """Set the fill, %, from which on poll(2) reports a CPU's ring as readable; no effect before Linux 5.0."""
        if (self.path / "buffer_percent").exists():
            write(self.path / "buffer_percent", str(percent))

    def has_event(self, event: str) -> bool:
        return self._event(event).is_dir()

    def event_format(self, event: str) -> str:
        return read(self._event(event) / "format")

    def enable(self, event: str) -> None:
        write(self._event(event) / "enable", "1")

    def set_filter(self, event: str, condition: str) -> None:
        """Record an event only if its fields fulfil a condition (Documentation/trace/events.rst, 5. Event filtering).

        Raises `SourceError` if the kernel refuses the condition.
        """
        write(self._event(event) / "filter", condition)

    def _event(self, event: str) -> Path:
        return self.path / "events" / event.replace(":", "/")

    def header_page(self) -> str:
        """Return the text of the page layout: the instance's own since Linux 6.8, where its page size can differ."""
        own = self.path / "events/header_page"
        return read(own if own.exists() else self.root / "events/header_page")

    def cpu(self, cpu: int) -> Path:
        return self.path / "per_cpu" / f"cpu{cpu}"

    def stats(self, cpu: int) -> RingStats:
        """Return the kernel's counts for one CPU's ring; raises `SourceError`."""
        return parse_stats(read(self.cpu(cpu) / "stats"))


def parse_stats(text: str) -> RingStats:
    """Parse the text of `per_cpu/cpuN/stats`; raises `SourceError` if a count is missing."""
    values = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    try:
        return RingStats(
            entries=int(values["entries"]), read=int(values["read events"]), lost=sum(int(values[k]) for k in _LOSSES)
        )
    except (KeyError, ValueError) as error:
        raise SourceError(f"per_cpu stats: {error} in {text!r}") from error
