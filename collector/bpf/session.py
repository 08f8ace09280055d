"""One session of the BPF programs: loads them for one filter, attaches them, and starts and stops the recording.

Nothing is pinned in bpffs. Programs, links and maps are file descriptors of this process, so the kernel removes them
when the process ends, even if it is killed.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import secrets
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from collector.bpf import libbpf, refusal
from collector.bpf.layout import CONFIG, COUNTS, NO_PLACE, RING, STATE
from collector.bpf.libbpf import Runs, check, library, pointer
from collector.bpf.object import OBJECT, BpfObject, has_functions
from collector.live.filter import SessionFilter
from collector.live.places import NETNS_MASK, Places
from collector.machine.kernel import highest_possible_cpu, kernel_version
from contracts.abi import RECORD
from contracts.errors import Unavailable
from contracts.hooks import BY_HOOK, TRACEPOINTS, Hook

_LOG = logging.getLogger(__name__)

STATS: Final = Path("/proc/sys/kernel/bpf_stats_enabled")
STATS_RIGHTS: Final = "CAP_SYS_ADMIN, or `sysctl kernel.bpf_stats_enabled=1`"
_WHAT: Final = "bpf"
_MAPPED_BYTES: Final = 1 << 29
"""Largest size of a mapped ring: the verifier's limit of an offset (BPF_MAX_VAR_OFF)."""
_WITHOUT_REASON: Final = "kfree_skb_without_reason"
_FUNCTIONS: Final = {"ip_rcv": "ip_rcv_core", "ipv6_rcv": "ip6_rcv_core"}
"""Name of each program of `Hook.IP_RCV` -> the kernel's function that it is attached to; docs/design/024 says why."""
UNSEEN: Final = "ingress of macvlan, ipvlan and bpf_redirect_peer is not seen"
"""What a session without `Hook.IP_RCV` lacks."""


def programs() -> tuple[dict[Hook, tuple[str, ...]], str]:
    """Return the names of the programs of each hook, and why `Hook.IP_RCV` is not among the hooks ("" if it is).

    The kernel has these hooks. `Hook.IP_RCV` is among them if the kernel attaches an empty program to each of its
    functions. Raises `Unavailable` if libbpf is missing, or the kernel's BTF is missing or unreadable.
    """
    with _btf() as btf:
        arguments = {info.hook: btf.arguments_of(info.name) for info in TRACEPOINTS}
        why_not = _refusal_of_functions(btf)
    found: dict[Hook, tuple[str, ...]] = {info.hook: (info.name,) for info in TRACEPOINTS if arguments[info.hook] > 0}
    # The drop reason is the third argument, since Linux 5.17.
    if 0 < arguments[Hook.KFREE_SKB] < 3:
        found[Hook.KFREE_SKB] = (_WITHOUT_REASON,)
    if not why_not:
        found[Hook.IP_RCV] = tuple(_FUNCTIONS)
    return found, why_not


def _refusal_of_functions(btf: libbpf.Btf) -> str:
    """Return why the kernel attaches no program to one of the functions of `Hook.IP_RCV`, or ""."""
    for function in _FUNCTIONS.values():
        if not btf.has_function(function):
            return f"this kernel's BTF has no function {function}"
        try:
            btf.try_function(function)
        except OSError as error:
            return f"the kernel refuses programs on its function {function} ({error.strerror})"
    return ""


@contextmanager
def _btf() -> Iterator[libbpf.Btf]:
    """Open the kernel's type information; raises `Unavailable`."""
    btf = libbpf.Btf()
    try:
        yield btf
    finally:
        btf.close()


def reads_pages() -> bool:
    """Return whether this kernel lets the programs read payload in a buffer's pages; raises `Unavailable`."""
    # The second function exists since Linux 6.4, at first for other kinds of programs.
    return has_functions("bpf_rdonly_cast", "bpf_dynptr_from_skb") and kernel_version() >= (6, 12)


class Session:
    """The BPF programs, loaded for one filter.

    The constructor loads the programs and attaches none. It raises `Unavailable` if the machine or the caller's rights
    do not allow it, `SourceError` if the object file belongs to another version of MACE; nothing stays loaded then.
    `ring_bytes` is the size of each CPU's ring, a power of two and at least one page. A CPU wakes the reader every
    `wake_every` records. With `cookies` records identify a namespace by its cookie, else by its inode. `wanted` gives
    hooks, protocols and the sample; a filter by place records nothing before `record_at`.

    If the kernel refuses the programs of `Hook.IP_RCV`, at loading or at attaching, the session has the other hooks,
    and `refusal` says why.
    """

    def __init__(
        self, wanted: SessionFilter, *, ring_bytes: int, wake_every: int, cookies: bool, path: Path = OBJECT
    ) -> None:
        self._library = library()
        self._ring_bytes = ring_bytes
        self._links: dict[str, int] = {}
        self._rings: dict[int, int] = {}
        self._stats = -1
        self._state: npt.NDArray[Any] | None = None
        """struct mace_state in the programs' memory, of dtype `STATE` and shape (); None while nothing is loaded."""
        self._state_memory: mmap.mmap | None = None
        chosen, self.refusal = programs()
        self.programs: dict[Hook, tuple[str, ...]] = {
            h: names for h, names in chosen.items() if not wanted.hooks or h in wanted.hooks
        }
        if not self.programs:
            raise Unavailable(_WHAT, "this kernel has none of the tracepoints", "a kernel with CONFIG_NET and tracing")
        self.possible_cpus = check(self._library.libbpf_num_possible_cpus())
        if (highest := highest_possible_cpu()) >= self.possible_cpus:
            raise Unavailable(
                _WHAT,
                f"the numbers of the possible CPUs have gaps: {self.possible_cpus} CPUs, the last is {highest}",
                "`--source ftrace`",
            )
        self._object = BpfObject(path)
        """Its maps are those of all programs."""
        self._parts: list[BpfObject] = []
        """The same file, opened once for each thread that loads some of the programs."""
        self._loaded: dict[str, BpfObject] = {}
        """The part that has a program, by the program's name."""
        self.maps_rings: Final = not self._object.old
        """Whether rings are mapped arrays (`ring.MappedRing`), else BPF ring buffers (`ring.BufferRing`)."""
        try:
            self._load(path, wanted, wake_every, cookies)
            self._map_loaded()
        except BaseException:
            self.close()
            raise

    @property
    def attached(self) -> int:
        """Number of programs that are attached."""
        return len(self._links)

    def close(self) -> None:
        """Stop recording, detach the programs and release all resources; a second call has no effect."""
        self._set_recording(on=False)
        self.detach()
        rings, self._rings = self._rings, {}
        for fd in rings.values():
            os.close(fd)
        self.time_runs(on=False)
        self._state = None
        if self._state_memory is not None:
            self._state_memory.close()
            self._state_memory = None
        self._unload()

    # --- loading --------------------------------------------------------------------------------

    def _load(self, path: Path, wanted: SessionFilter, wake_every: int, cookies: bool) -> None:
        """Load the programs. If the kernel refuses them with those of `Hook.IP_RCV`, load the others alone."""
        try:
            self._object.select(())
            self._prepare(wanted, wake_every, cookies)
            self._create_maps()
            self._load_programs(path)
        except Unavailable as error:
            if not self._has_others():
                raise
            self._unload()
            self._object = BpfObject(path)
            del self.programs[Hook.IP_RCV]
            self._load(path, wanted, wake_every, cookies)
            self._lacks_ip_rcv(error.why)

    def _has_others(self) -> bool:
        """Return whether the session has programs of `Hook.IP_RCV`, and can do without them."""
        return Hook.IP_RCV in self.programs and len(self.programs) > 1

    def _lacks_ip_rcv(self, why: str) -> None:
        self.refusal = f"the kernel refuses the programs of ip_rcv ({why})"
        _LOG.warning("bpf: %s, so %s", self.refusal, UNSEEN)

    def _names(self) -> list[str]:
        """Return the names of the programs to load. Those of `Hook.IP_RCV` need the one that notes receptions."""
        names = [name for names in self.programs.values() for name in names]
        noting = BY_HOOK[Hook.NETIF_RECEIVE_SKB].name
        return [*names, *([noting] if Hook.IP_RCV in self.programs and noting not in names else [])]

    def _prepare(self, wanted: SessionFilter, wake_every: int, cookies: bool) -> None:
        check(self._library.bpf_map__set_max_entries(self._object.map("mace_rings"), self.possible_cpus))
        config = self._object.memory_of(".rodata", CONFIG)
        config["skb_key"] = np.frombuffer(secrets.token_bytes(16), np.uint64)
        config["wake_every"], config["cookies"] = wake_every, cookies
        config["paged"] = reads_pages()
        config["hooks"] = sum(1 << hook for hook in self.programs)
        config["ring_slots"] = self._ring_bytes // RECORD.itemsize
        config["sample_mask"] = (1 << wanted.sample_shift) - 1
        config["place_filtered"] = wanted.by_place
        for protocol in wanted.l4_protocols:
            config["l4_protos"][protocol // 64] |= np.uint64(1 << protocol % 64)
        config["l4_filtered"] = bool(wanted.l4_protocols)

    def _create_maps(self) -> None:
        # The verifier and the array of rings need a ring of the right size.
        pattern = self._make_ring()
        try:
            check(self._library.bpf_map__set_inner_map_fd(self._object.map("mace_rings"), pattern))
            self._object.load()
        finally:
            os.close(pattern)

    def _load_programs(self, path: Path) -> None:
        """Load the programs in as many threads as CPUs may run: most of the time is the verifier's.

        With CAP_BPF the kernel verifies several programs at once.
        """
        names = self._names()
        cpus = min(len(os.sched_getaffinity(0)), len(names))
        for share in (names[i::cpus] for i in range(cpus)):
            part = BpfObject(path, old=self._object.old)
            self._parts.append(part)
            part.select(share)
            part.share_maps(self._object)
            self._loaded |= dict.fromkeys(share, part)
        with ThreadPoolExecutor(len(self._parts)) as threads:
            list(threads.map(BpfObject.load, self._parts))

    def _unload(self) -> None:
        """Unload the programs and free the maps."""
        parts, self._parts, self._loaded = self._parts, [], {}
        for part in (*parts, self._object):
            part.close()

    def _map_loaded(self) -> None:
        counts = self._object.map("mace_cpus")
        self._counts_fd = self._object.map_fd("mace_cpus")
        self._counts = np.zeros((self.possible_cpus, self._library.bpf_map__value_size(counts)), np.uint8)
        self._rings_fd = self._object.map_fd("mace_rings")
        # libbpf's pointer leads to its own copy of the global data; the programs read the map's memory.
        state = self._object.map_fd(".bss")
        self._state_memory = mmap.mmap(state, STATE.itemsize, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._state = np.frombuffer(self._state_memory, STATE).reshape(())
        self._fds = {
            hook: [self._loaded[name].program_fd(name) for name in names] for hook, names in self.programs.items()
        }

    # --- recording ------------------------------------------------------------------------------

    def add_ring(self, cpu: int) -> int:
        """Create the ring of a CPU and return its file descriptor, which `close` closes.

        Raises `Unavailable` if the kernel refuses the memory.
        """
        fd = self._make_ring()
        if cpu in self._rings:
            os.close(self._rings[cpu])
        self._rings[cpu] = fd
        libbpf.put(self._rings_fd, cpu, fd)
        return fd

    def _make_ring(self) -> int:
        size = self._ring_bytes
        if self.maps_rings and size > _MAPPED_BYTES:
            raise Unavailable(
                _WHAT,
                f"a ring of {size >> 20:,} MiB is larger than a program can address",
                f"[capture] ring_mib of at most {_MAPPED_BYTES >> 20}",
            )
        try:
            return libbpf.create_mapped(RING.itemsize + size) if self.maps_rings else libbpf.create_ring_buffer(size)
        except OSError as error:
            raise refusal.of_ring(error, size) from error

    @property
    def wakes_fd(self) -> int:
        """File descriptor of the BPF ring buffer that wakes the reader of mapped arrays."""
        return self._object.map_fd("mace_wakes")

    def attach(self) -> None:
        """Attach the programs, which record only after `start`; raises `Unavailable`.

        If the kernel does not attach those of `Hook.IP_RCV`, the session continues without them.
        """
        at_ip = self.programs.get(Hook.IP_RCV, ())
        self._attach([name for name in self._names() if name not in at_ip])
        try:
            self._attach(at_ip)
        except Unavailable as error:
            if not self._has_others():
                raise
            del self.programs[Hook.IP_RCV], self._fds[Hook.IP_RCV]
            self._detach(self._links.keys() - set(self._names()))
            self._lacks_ip_rcv(error.why)

    def _attach(self, names: Sequence[str]) -> None:
        """Attach those programs that are not attached."""
        for name in names:
            if name not in self._links:
                try:
                    self._links[name] = pointer(self._library.bpf_program__attach(self._loaded[name].program(name)))
                except OSError as error:
                    raise refusal.of_attaching(name, error) from error

    def detach(self) -> None:
        """Detach the programs.

        Before Linux 5.13 those of `Hook.IP_RCV` cannot be attached again: commit f3a95075549e ("bpf: Allow trampoline
        re-attach for tracing and lsm programs").
        """
        self._detach(tuple(self._links))

    def _detach(self, names: Collection[str]) -> None:
        for name in names:
            self._library.bpf_link__destroy(self._links.pop(name))

    def start(self) -> None:
        """Start recording."""
        self._set_recording(on=True)

    def stop(self) -> None:
        """Stop recording. A program that is running may still write its record, within microseconds."""
        self._set_recording(on=False)

    def _set_recording(self, *, on: bool) -> None:
        if self._state is not None:
            self._state["recording"] = on

    def record_at(self, places: Places) -> None:
        """Record packets at these places only, from now on. The session's filter must be one by place.

        Packets at a place that stays pass the filter throughout.
        """
        assert self._state is not None
        _replace(self._state["netns"], self._state["netns_count"], places.netns)
        devices = [ifindex << 32 | netns & NETNS_MASK for netns, ifindex in places.devices]
        _replace(self._state["device"], self._state["device_count"], devices)

    def counts(self) -> npt.NDArray[Any]:
        """Return a copy of the programs' counts, of dtype `COUNTS`, indexed by possible CPU; raises `OSError`."""
        key = ctypes.c_uint32(0)
        check(self._library.bpf_map_lookup_elem(self._counts_fd, ctypes.byref(key), self._counts.ctypes.data))
        return np.ndarray((self.possible_cpus,), COUNTS, self._counts, 0, (self._counts.shape[1],)).copy()

    def runs(self) -> dict[Hook, Runs]:
        """Return the kernel's counts for the programs of each hook; raises `OSError`."""
        return {hook: sum(map(libbpf.runs_of, fds), Runs(0, 0, 0)) for hook, fds in self._fds.items()}

    def time_runs(self, *, on: bool) -> bool:
        """Switch the kernel's timing of all BPF programs on or off; return whether this session has it on.

        The kernel refuses to switch it on without CAP_SYS_ADMIN, but root can have it always on (a sysctl).
        """
        if on and self._stats < 0:
            self._stats = self._library.bpf_enable_stats(0)
        elif not on and self._stats >= 0:
            stats, self._stats = self._stats, -1
            os.close(stats)
        return self._stats >= 0 or (on and _are_runs_timed())


def _are_runs_timed() -> bool:
    """Return whether the kernel times all BPF programs all the time."""
    try:
        return STATS.read_text(encoding="utf-8").strip() == "1"
    except OSError:
        return False


def ring_bytes_of(kib: int) -> int:
    """Return the largest ring size that fits in `kib` KiB, in bytes: a power of two, and at least one page."""
    return max(1 << (max(kib * 1024, 1).bit_length() - 1), mmap.PAGESIZE)


def _replace(slots: npt.NDArray[Any], count: npt.NDArray[Any], wanted: Sequence[int]) -> None:
    """Make `wanted` the elements of `slots` in use, while the programs read both.

    An element is one store of 64 bits, and the count follows it: x86-64 keeps stores in order.
    """
    for i in np.flatnonzero(~np.isin(slots[:count], np.array(wanted, np.uint64))).tolist():
        slots[i] = NO_PLACE
    for number in wanted:
        used = slots[:count].tolist()
        if number not in used:
            at = used.index(NO_PLACE) if NO_PLACE in used else len(used)
            slots[at] = number
            count[...] = max(len(used), at + 1)
    count[...] = np.flatnonzero(slots[:count] != NO_PLACE).max(initial=-1) + 1
