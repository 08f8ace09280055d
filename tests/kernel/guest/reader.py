"""The module's ABI, call by call, for tests that make invalid calls, which the collector never makes."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from contracts import abi

DEVICE: Final = "/dev/mace"
SUBBUF_BYTES: Final = 1 << 16
_libc: Final = ctypes.CDLL(None, use_errno=True)


def call(fd: int, request: int, argument: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Call ioctl with a structure, which the kernel may change; raises OSError."""
    fcntl.ioctl(fd, request, memoryview(argument).cast("B"), True)
    return argument


class Session:
    """An open /dev/mace; a context manager."""

    def __init__(self, fd: int | None = None) -> None:
        self.fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC) if fd is None else fd
        self.maps: dict[int, mmap.mmap] = {}
        self.ring_bytes = 0
        self.subbuf_bytes = 0
        self.gaps: list[tuple[int, int]] = []
        """(cpu, records lost) of each gap read so far."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for mapped in self.maps.values():
            mapped.close()
        self.maps.clear()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def hello(self) -> npt.NDArray[Any]:
        return call(self.fd, abi.Ioctl.HELLO, np.zeros((), abi.HELLO))

    def setup(
        self,
        *,
        subbuf_bytes: int = SUBBUF_BYTES,
        subbufs: int = 64,
        watermark: int = 1,
        flush_ms: int = 50,
        hooks: Iterable[int] = (),
        netns_fds: Sequence[int] = (),
        devices: Sequence[tuple[int, int]] = (),
        l4_protos: Iterable[int] = (),
        sample_shift: int = 0,
        **others: Any,
    ) -> Self:
        """Call SETUP; `others` sets fields of the structure to invalid values."""
        setup = np.zeros((), abi.SETUP)
        setup["abi_major"] = abi.ABI_MAJOR
        setup["subbuf_bytes"] = subbuf_bytes
        setup["subbufs"] = subbufs
        setup["watermark"] = watermark
        setup["flush_ms"] = flush_ms
        wanted = setup["filter"]
        wanted["hooks"] = sum(1 << hook for hook in hooks)
        wanted["sample_shift"] = sample_shift
        wanted["netns_count"] = len(netns_fds)
        wanted["netns_fd"][: len(netns_fds)] = netns_fds
        wanted["device_count"] = len(devices)
        for index, device in enumerate(devices):
            wanted["device"][index] = device
        for proto in l4_protos:
            wanted["l4_protos"][proto // 64] |= np.uint64(1 << proto % 64)
        for name, value in others.items():
            setup[name] = value
        done = call(self.fd, abi.Ioctl.SETUP, setup)
        self.ring_bytes = int(done["ring_bytes"])
        self.subbuf_bytes = subbuf_bytes
        return self

    def places(self, netns: Sequence[int] = (), devices: Sequence[tuple[int, int]] = ()) -> Self:
        """Call PLACES with namespaces as records name them, and devices in them; raises OSError."""
        asked = np.zeros((), abi.PLACES)
        asked["netns_count"], asked["device_count"] = len(netns), len(devices)
        asked["netns"][: len(netns)] = netns
        for index, device in enumerate(devices):
            asked["device"][index] = device
        call(self.fd, abi.Ioctl.PLACES, asked)
        return self

    def start(self) -> Self:
        fcntl.ioctl(self.fd, abi.Ioctl.START)
        return self

    def stop(self) -> None:
        fcntl.ioctl(self.fd, abi.Ioctl.STOP)

    def map(self, cpu: int) -> mmap.mmap:
        if cpu not in self.maps:
            self.maps[cpu] = mmap.mmap(
                self.fd, self.ring_bytes, mmap.MAP_SHARED, mmap.PROT_READ, offset=cpu * self.ring_bytes
            )
        return self.maps[cpu]

    def take(self, cpu: int, *, release: int = 0, flags: int = abi.TakeFlag.FLUSH) -> npt.NDArray[Any]:
        take = np.zeros((), abi.TAKE)
        take["cpu"] = cpu
        take["release"] = release
        take["flags"] = flags
        return call(self.fd, abi.Ioctl.TAKE, take)

    def stats(self, cpu: int = abi.ALL_CPUS) -> npt.NDArray[Any]:
        stats = np.zeros((), abi.STATS)
        stats["cpu"] = cpu
        return call(self.fd, abi.Ioctl.STATS, stats)

    def cost(self) -> npt.NDArray[Any]:
        return call(self.fd, abi.Ioctl.COST, np.zeros((), abi.COST))

    def readable(self, timeout_s: float) -> bool:
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        return any(event & select.POLLIN for _, event in poll.poll(timeout_s * 1000))

    def read(self) -> npt.NDArray[Any]:
        """Return all current records, CPU after CPU, copied and released."""
        parts = [np.zeros(0, abi.RECORD)]
        for cpu in range(os.cpu_count() or 1):
            taken = self.take(cpu)
            first, ready = int(taken["first"]), int(taken["ready"])
            memory = np.frombuffer(self.map(cpu), np.uint8)
            for number in range(ready):
                at = (first + number) % (self.ring_bytes // self.subbuf_bytes) * self.subbuf_bytes
                head = memory[at : at + abi.SUBBUF.itemsize].view(abi.SUBBUF)[0]
                assert head["cpu"] == cpu
                if head["lost"]:
                    self.gaps.append((cpu, int(head["lost"])))
                start = at + abi.SUBBUF.itemsize
                records = memory[start : start + int(head["records"]) * abi.RECORD.itemsize].view(abi.RECORD)
                parts.append(records.copy())
            del memory
            if ready:
                self.take(cpu, release=ready, flags=0)
        return np.concatenate(parts)

    def read_for(self, duration_s: float) -> npt.NDArray[Any]:
        """Return the records that arrive within a time; reads at least once, however late it is."""
        parts = [self.read()]
        deadline = time.monotonic() + duration_s
        while (left := deadline - time.monotonic()) > 0:
            self.readable(min(left, 0.1))
            parts.append(self.read())
        return np.concatenate(parts)


def refused(number: int, call: Callable[..., object], *args: object, **kwargs: object) -> None:
    """Check that the call in the block fails with this errno."""
    found = 0
    try:
        call(*args, **kwargs)
    except OSError as error:
        found = error.errno or 0
    assert found == number, f"{os.strerror(found)}, expected {os.strerror(number)}"


def netns_fd(name: str) -> int:
    """Open a namespace of /run/netns, and return its file descriptor."""
    return os.open(f"/run/netns/{name}", os.O_RDONLY | os.O_CLOEXEC)


def enter_netns(fd: int) -> None:
    """Move this thread (or process) into a network namespace; for forked children only."""
    if _libc.setns(fd, 0x40000000):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def within(name: str, make: Callable[[], Any]) -> Any:
    """Return the result of `make`, called in a namespace of /run/netns; a socket stays in that namespace."""
    made: list[Any] = []

    def work() -> None:
        fd = netns_fd(name)
        enter_netns(fd)
        os.close(fd)
        made.append(make())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return made[0]


def opened_in(name: str) -> Session:
    """Return a session that a process in a namespace of /run/netns opened, with its rights; raises OSError."""
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    child = os.fork()
    if child == 0:
        status = 255
        try:
            enter_netns(netns_fd(name))
            socket.send_fds(theirs, [b"x"], [Session().fd])
            status = 0
        except OSError as error:
            status = error.errno or status
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    theirs.close()
    with mine:
        if status:
            raise OSError(status, os.strerror(status))
        return Session(socket.recv_fds(mine, 1, 1)[1][0])
