"""The system calls of /dev/mace, with errors turned into messages that name cause and remedy.

One `MaceDevice` is one session of the module; `kmod/uapi/mace.h` documents the calls and their order.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from collector.live.filter import SessionFilter
from collector.live.places import NETNS_MASK, Places
from contracts import abi
from contracts.abi import HelloFlag, Ioctl, TakeFlag
from contracts.errors import SourceError, Unavailable
from contracts.hooks import HOOKS, Hook
from contracts.schema import HookCost
from contracts.version import VERSION

PATH: Final = Path("/dev") / abi.DEVICE_NAME
_LOADED: Final = Path("/sys/module") / abi.DEVICE_NAME
_WHAT: Final = "kmod"
_LOAD_IT: Final = "`mace module load` (and before, for this kernel, `mace module build`)"
_EVERYTHING: Final = SessionFilter()
_PLACES_SINCE: Final = (1, 2)
"""ABI that has PLACES."""
_OTHER_ABI: Final = "`mace module build` and `mace module load`, or install the MACE that goes with the module"


@dataclass(frozen=True, slots=True)
class Hello:
    """The module's version and limits, and what this session may read (struct mace_hello)."""

    abi: tuple[int, int]
    version: str
    hooks: tuple[Hook, ...]
    """Hooks that the kernel has and this MACE knows."""
    sees_all: bool
    """Whether the session sees every network namespace, not only the opener's."""
    netns_gone: bool
    """Whether the opener's namespace has died, so that no record will follow."""
    cookies: bool
    """Whether records can identify namespaces by cookie (Linux 5.14)."""
    netns: int
    cpus: int
    ring_bytes_min: int
    ring_bytes_max: int
    load_id: int


@dataclass(frozen=True, slots=True)
class TakenSubBuffers:
    """Result of a TAKE."""

    first: int
    """Index in the ring of the oldest sub-buffer that is handed over."""
    ready: int
    """Number of sub-buffers handed over, from `first` on, wrapping at the ring's end."""
    now_ns: int
    """CLOCK_MONOTONIC; with `flush` all records from before this time are handed over."""


@dataclass(frozen=True, slots=True)
class Stats:
    """Records that passed the filter so far, `written` to a ring or `lost`: int64 arrays of 16, indexed by hook."""

    written: npt.NDArray[np.int64]
    lost: npt.NDArray[np.int64]


class MaceDevice:
    """A session of the module.

    The constructor raises `Unavailable` if the module grants no session, `SourceError` if module and MACE are
    incompatible.
    """

    def __init__(self, path: Path = PATH) -> None:
        self._path = path
        self._maps: dict[int, mmap.mmap] = {}
        self._ring_bytes = 0
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise self._unavailable(error) from error
        try:
            self.hello = self.greet()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the session. Arrays that are views of a ring keep its memory, and the session, until they are freed."""
        maps, self._maps = self._maps, {}
        for one in maps.values():
            try:
                one.close()
            except BufferError:
                pass  # views exist; freeing the last one unmaps the ring
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def fileno(self) -> int:
        """Return the file descriptor: readable when a ring reaches its watermark, or records have waited `flush_ms`."""
        return self._fd

    # --- calls ------------------------------------------------------------------------------------

    def greet(self) -> Hello:
        """Call HELLO; raises `SourceError` if the module speaks another ABI than this MACE."""
        got = np.zeros((), abi.HELLO)
        try:
            self._call(Ioctl.HELLO, got)
        except OSError as error:
            # The request's number contains the size of its struct: a module with another struct refuses the number.
            if error.errno == errno.ENOTTY:
                raise SourceError(
                    f"{self._path}: the module ({_version_loaded()}) does not answer a HELLO of ABI"
                    f" {abi.ABI_MAJOR}.{abi.ABI_MINOR}, which this MACE {VERSION} speaks; {_OTHER_ABI}"
                ) from error
            raise self._failed("HELLO", error) from error
        major, minor = int(got["abi_major"]), int(got["abi_minor"])
        version = bytes(got["version"]).partition(b"\0")[0].decode("ascii", "replace")
        if major != abi.ABI_MAJOR:
            raise SourceError(
                f"{self._path}: the module {version} speaks ABI {major}.{minor}, this MACE {VERSION}"
                f" {abi.ABI_MAJOR}.{abi.ABI_MINOR}; {_OTHER_ABI}"
            )
        sizes = (int(got["record_bytes"]), int(got["subbuf_head_bytes"]))
        if sizes != (abi.RECORD.itemsize, abi.SUBBUF.itemsize):
            raise SourceError(
                f"{self._path}: the module {version} has records and heads of {sizes} bytes, expected"
                f" {(abi.RECORD.itemsize, abi.SUBBUF.itemsize)} in ABI {major}.{minor}: a defect of the module"
            )
        # Ignore flags of a newer module.
        flags = HelloFlag(int(got["flags"]) & sum(HelloFlag))
        return Hello(
            abi=(major, minor),
            version=version,
            hooks=tuple(info.hook for info in HOOKS if int(got["hooks"]) >> info.hook & 1),
            sees_all=HelloFlag.ALL in flags,
            netns_gone=HelloFlag.NETNS_GONE in flags,
            cookies=HelloFlag.COOKIES in flags,
            netns=int(got["netns"]),
            cpus=int(got["cpus"]),
            ring_bytes_min=int(got["ring_bytes_min"]),
            ring_bytes_max=int(got["ring_bytes_max"]),
            load_id=int(got["load_id"]),
        )

    def setup(
        self,
        *,
        subbuf_bytes: int,
        subbufs: int,
        watermark: int,
        flush_ms: int,
        wanted: SessionFilter = _EVERYTHING,
        cookies: bool = False,
    ) -> tuple[int, ...]:
        """Call SETUP: make rings of `subbufs` times `subbuf_bytes` for the CPUs online, and return the CPUs' numbers.

        With `cookies` (if `hello` offers them) records identify a namespace by its cookie, else by its inode. The
        places of `wanted` are left to `record_at`. Bounds are those of struct mace_setup. Raises `Unavailable` if the
        machine or the caller's rights do not allow it, `SourceError` for any other failure.
        """
        if not self.hello.ring_bytes_min <= subbuf_bytes * subbufs <= self.hello.ring_bytes_max:
            raise Unavailable(
                _WHAT,
                f"a ring of {subbuf_bytes * subbufs:,} bytes, where the module allows"
                f" {self.hello.ring_bytes_min:,} to {self.hello.ring_bytes_max:,}",
                f"another [capture] ring_mib, or write more to {_LOADED}/parameters/max_ring_mib",
            )
        asked = np.zeros((), abi.SETUP)
        asked["abi_major"] = abi.ABI_MAJOR
        asked["flags"] = abi.SetupFlag.COOKIES if cookies else 0
        asked["subbuf_bytes"], asked["subbufs"] = subbuf_bytes, subbufs
        asked["watermark"], asked["flush_ms"] = watermark, flush_ms
        _fill(asked["filter"], wanted)
        try:
            self._call(Ioctl.SETUP, asked)
        except OSError as error:
            raise self._failed_setup(error, asked) from error
        self._ring_bytes = int(asked["ring_bytes"])
        if self._ring_bytes != subbuf_bytes * subbufs:
            raise SourceError(
                f"{self._path}: rings of {self._ring_bytes} bytes, expected {subbufs} times {subbuf_bytes}: a defect of"
                " the module"
            )
        cpus = tuple(cpu for cpu in range(self.hello.cpus) if self.has_ring(cpu))
        # Another CPU may have come online meanwhile, so that more rings than `cpu_count` are possible.
        if len(cpus) < int(asked["cpu_count"]) or not cpus:
            raise SourceError(
                f"{self._path}: {len(cpus)} CPUs have a ring, the module says {asked['cpu_count']}: a defect of the"
                " module"
            )
        return cpus

    def record_at(self, places: Places) -> None:
        """Call PLACES: record packets at these places only, from now on. Needs SETUP first; raises `SourceError`.

        The places name namespaces as the session's records do: by cookie with `cookies` of `setup`, else by inode.
        """
        if self.hello.abi < _PLACES_SINCE:
            raise SourceError(
                f"{self._path}: the module {self.hello.version} speaks ABI {'.'.join(map(str, self.hello.abi))}, and"
                f" chooses containers, namespaces and devices from {'.'.join(map(str, _PLACES_SINCE))} on; {_OTHER_ABI}"
            )
        asked = np.zeros((), abi.PLACES)
        asked["netns_count"], asked["device_count"] = len(places.netns), len(places.devices)
        for i, netns in enumerate(places.netns):
            asked["netns"][i] = netns & NETNS_MASK
        for i, (netns, ifindex) in enumerate(places.devices):
            asked["device"][i] = (netns & NETNS_MASK, ifindex)
        self._try(Ioctl.PLACES, asked)

    def start(self) -> None:
        """Call START: record from now on; raises `SourceError`."""
        self._try(Ioctl.START, None)

    def stop(self) -> None:
        """Call STOP: no record is written once it returns. Harmless if the session is not recording."""
        self._try(Ioctl.STOP, None)

    def take(self, cpu: int, *, release: int = 0, flush: bool = False) -> TakenSubBuffers:
        """Call TAKE: release the `release` oldest sub-buffers of a CPU and return those that are ready.

        With `flush` the module also hands over the sub-buffer that it is filling. Raises `SourceError`.
        """
        asked = np.zeros((), abi.TAKE)
        asked["cpu"], asked["release"] = cpu, release
        asked["flags"] = TakeFlag.FLUSH if flush else 0
        self._try(Ioctl.TAKE, asked)
        return TakenSubBuffers(int(asked["first"]), int(asked["ready"]), int(asked["now_ns"]))

    def stats(self, cpu: int | None = None) -> Stats:
        """Call STATS for one CPU, or for all (None), including CPUs without a ring; raises `SourceError`."""
        asked = np.zeros((), abi.STATS)
        asked["cpu"] = abi.ALL_CPUS if cpu is None else cpu
        self._try(Ioctl.STATS, asked)
        return Stats(asked["written"].astype(np.int64), asked["lost"].astype(np.int64))

    def cost(self) -> tuple[HookCost, ...]:
        """Call COST: return the cost of each hook's probes since the module was loaded; raises `SourceError`.

        Empty for a session that sees its own namespace only, which may not read the cost.
        """
        if not self.hello.sees_all:
            return ()
        got = np.zeros((), abi.COST)
        self._try(Ioctl.COST, got)
        return tuple(
            HookCost(hook, int(got["calls"][hook]), int(got["timed"][hook]), int(got["timed_ns"][hook]))
            for hook in self.hello.hooks
        )

    def map(self, cpu: int) -> mmap.mmap:
        """Map one CPU's ring read-only; raises `SourceError`. `close` unmaps it."""
        try:
            # Python checks the length against a file's size only for regular files, not for a character device.
            made = mmap.mmap(
                self._fd,
                self._ring_bytes,
                flags=mmap.MAP_SHARED,
                prot=mmap.PROT_READ,
                offset=cpu * self._ring_bytes,
            )
        except OSError as error:
            raise self._failed(f"mapping the ring of CPU {cpu}", error) from error
        self._maps[cpu] = made
        return made

    # --- inside -----------------------------------------------------------------------------------

    def _call(self, request: Ioctl, argument: npt.NDArray[Any] | None) -> None:
        if argument is None:
            fcntl.ioctl(self._fd, request)
        else:
            fcntl.ioctl(self._fd, request, argument.reshape(1).view(np.uint8).data, True)

    def _try(self, request: Ioctl, argument: npt.NDArray[Any] | None) -> None:
        try:
            self._call(request, argument)
        except OSError as error:
            raise self._failed(request.name, error) from error

    def has_ring(self, cpu: int) -> bool:
        """Return whether a CPU has a ring: CPUs online at SETUP have one, and most that came online later."""
        asked = np.zeros((), abi.STATS)
        asked["cpu"] = cpu
        try:
            self._call(Ioctl.STATS, asked)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return False
            raise self._failed("STATS", error) from error
        return True

    def _failed(self, what: str, error: OSError) -> SourceError:
        return SourceError(f"{self._path}: {what}: {error.strerror}")

    def _failed_setup(self, error: OSError, asked: npt.NDArray[Any]) -> Exception:
        why = error.strerror or ""
        size = int(asked["subbuf_bytes"]) * int(asked["subbufs"]) / 2**20
        match error.errno:
            case errno.EPROTO:
                return SourceError(
                    f"{self._path}: the module {self.hello.version} refuses ABI {abi.ABI_MAJOR}; {_OTHER_ABI}"
                )
            case errno.ENOMEM:
                return Unavailable(
                    _WHAT,
                    f"no memory for rings of {size:g} MiB per CPU",
                    f"a smaller [capture] ring_mib, or write more to max_total_mib (in a container: max_netns_mib) in"
                    f" {_LOADED}/parameters",
                )
            case errno.EOPNOTSUPP:
                return Unavailable(
                    _WHAT, "this kernel does not have all of the hooks", "leave out [capture] hooks, or another kernel"
                )
            case errno.EINVAL:
                return Unavailable(
                    _WHAT,
                    f"the module refuses the settings ({why}): rings of {size:g} MiB per CPU",
                    "change the [capture] keys",
                )
        return self._failed("SETUP", error)

    def _unavailable(self, error: OSError) -> Unavailable:
        match error.errno:
            case errno.ENOENT | errno.ENXIO | errno.ENODEV:
                return Unavailable(_WHAT, f"{self._path} does not exist: the module is not loaded", _LOAD_IT)
            case errno.EACCES | errno.EPERM:
                return Unavailable(
                    _WHAT,
                    f"{self._path} may not be opened",
                    "run as root; in a container give it the device and CAP_NET_RAW",
                )
            case errno.EBUSY:
                return Unavailable(
                    _WHAT,
                    "the module allows no further session",
                    "end one, or write more to max_sessions (in a container: max_netns_sessions) in"
                    f" {_LOADED}/parameters",
                )
            case errno.ENOMEM:
                return Unavailable(_WHAT, "no memory for a session", "end other processes")
        return Unavailable(_WHAT, f"{self._path} cannot be opened: {error.strerror}")


def _fill(into: npt.NDArray[Any], wanted: SessionFilter) -> None:
    """Write hooks, sample and protocols into a struct mace_filter. `record_at` sets the places."""
    into["hooks"] = sum(1 << hook for hook in set(wanted.hooks))
    into["sample_shift"] = wanted.sample_shift
    for protocol in wanted.l4_protocols:
        into["l4_protos"][protocol // 64] |= np.uint64(1 << protocol % 64)


def _version_loaded() -> str:
    try:
        return (_LOADED / "version").read_text(encoding="ascii").strip()
    except OSError:
        return "of unknown version"
