"""Lists the devices of all network namespaces, with CAP_BPF and CAP_PERFMON alone.

The program `walk_devices` (`bpf/mace_devices.h`) follows the kernel's lists of namespaces and devices. No packet runs
it: each call of `Walk.devices` does.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from collector.bpf import libbpf
from collector.bpf.layout import NETDEV, WALK_DEVICES, Walked
from collector.bpf.object import OBJECT, BpfObject
from contracts.errors import SourceError

_PROGRAM: Final = "walk_devices"
_DESCRIBED: Final = "mace_netdevs"
_ATTEMPTS: Final = 100
"""How often a walk begins again because the place to continue at was removed."""
_RUNS: Final = 1 << 16
"""Largest number of runs of a walk: two million devices. A walk of more follows a list that does not end."""


class NetDevice(NamedTuple):
    """One element of `NetDevices`, as plain Python values; `bpf/mace_bpf.h` documents the fields."""

    netns_cookie: int
    netns: int
    proc_stat: int
    ifindex: int
    peer_netns: int
    peer_ifindex: int
    lower_netns: int
    lower_ifindex: int
    master_ifindex: int
    type: int
    initial: int
    pad: int
    name: bytes
    kind: bytes


NetDevices = npt.NDArray[Any]
"""Devices, of dtype `layout.NETDEV`, without duplicates, sorted by inode of the namespace and ifindex."""


class Walk:
    """The loaded program. The constructor raises `Unavailable`, or `SourceError` for another version's object file."""

    def __init__(self, path: Path = OBJECT) -> None:
        self._memory: mmap.mmap | None = None
        self._described = b""
        self._devices: NetDevices = np.empty(0, NETDEV)
        self._object = BpfObject(path)
        try:
            self._object.select([_PROGRAM])
            self._object.select_maps([_DESCRIBED, "mace_walks"])
            self._object.load()
            self._program_fd = self._object.program_fd(_PROGRAM)
            size = WALK_DEVICES * NETDEV.itemsize
            self._memory = mmap.mmap(self._object.map_fd(_DESCRIBED), size, mmap.MAP_SHARED, mmap.PROT_READ)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Unload the program; a second call has no effect."""
        if self._memory is not None:
            self._memory.close()
            self._memory = None
        self._object.close()

    def devices(self) -> NetDevices:
        """Return all devices of all namespaces; the array of the last call itself if nothing has changed.

        A device that moves or is renamed meanwhile may be missing or have its old name; the next call returns it right.
        Raises `SourceError` if the lists keep changing.
        """
        for _ in range(_ATTEMPTS):
            described = self._walk()
            if described is not None:
                if described != self._described:
                    self._described, self._devices = described, _sorted(described)
                return self._devices
        raise SourceError("bpf: the machine's network namespaces and devices change too fast to be listed")

    def _walk(self) -> bytes | None:
        """Return the elements that the runs of a whole walk filled; None if the place to continue at was removed."""
        pieces: list[bytes] = []
        for number in range(_RUNS):
            walked = libbpf.run(self._program_fd, number == 0)
            if walked == Walked.LOST:
                return None
            assert self._memory is not None
            pieces.append(self._memory[:])
            if walked == Walked.DONE:
                return b"".join(pieces)
        return None


def _sorted(described: bytes) -> NetDevices:
    """Return the devices of elements of the map, each once, sorted."""
    every: NetDevices = np.frombuffer(described, NETDEV)
    every = every[every["ifindex"] > 0]
    _, first = np.unique(every["netns"].astype(np.uint64) << np.uint64(32) | every["ifindex"], return_index=True)
    return every[first]
