"""The BPF programs, loaded once for several tests: in an emulator their verification takes as long as many tests."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from collector.bpf.libbpf import check
from collector.bpf.ring import BufferRing, MappedRing
from collector.bpf.session import Session
from collector.bpf.source import BpfConfig, BpfSource
from collector.live.filter import SessionFilter
from collector.live.ring_source import FollowsDevices
from collector.machine.kernel import kernel_version, online_cpus
from collector.machine.netns import cookie_here
from contracts.abi import RECORD, WORDS
from contracts.hooks import Hook

RING_BYTES = 8 << 20
LOADING = pytest.mark.timeout(1200)
"""Of tests that may be the first to load: the verifier of Linux 5.10 and 6.1 takes minutes in an emulator."""


class Loaded(Session):
    """A session that stays loaded when its user closes it."""

    kept: tuple[str, ...] = ()
    """Programs that stay attached from the beginning, because the kernel attaches them only once."""

    def __init__(self, wanted: SessionFilter, **options: Any) -> None:
        super().__init__(wanted, **options)
        self.attach()
        if kernel_version() < (5, 13):
            self.kept = self.programs.get(Hook.IP_RCV, ())
        self.detach()

    def forget_counts(self) -> None:
        """Set the programs' counts to zero, which they are for a source that loads the programs itself."""
        key, zeros = ctypes.c_uint32(0), np.zeros_like(self._counts)
        check(self._library.bpf_map_update_elem(self._counts_fd, ctypes.byref(key), zeros.ctypes.data, 0))

    def close(self) -> None:
        self.stop()
        self.detach()

    def detach(self) -> None:
        self._detach([name for name in self._links if name not in self.kept])

    def unload(self) -> None:
        super().detach()
        super().close()


def loaded(wanted: SessionFilter) -> Loaded:
    """Load the programs for a filter. Namespaces are identified by cookie where this kernel has cookies."""
    return Loaded(wanted, ring_bytes=RING_BYTES, wake_every=1024, cookies=bool(wanted.netns) and cookie_here() > 0)


@cache
def unfiltered() -> Loaded:
    """Return the programs without a filter; they stay loaded until the machine ends."""
    return loaded(SessionFilter())


class _SourceByInode(BpfSource):
    """A source whose session identifies namespaces by inode, as one without a filter by namespaces does here."""

    def _identify_by_cookie(self) -> bool:
        return False


def source(session: Loaded, follower: FollowsDevices | None = None, **config: Any) -> BpfSource:
    """Return a source that reads an already loaded session."""
    settings = BpfConfig(ring_kib_per_cpu=RING_BYTES >> 10, **config)
    return _SourceByInode(settings, follower, open_session=lambda *_, **__: session)


class Recording:
    """Rings of a session that records."""

    def __init__(self, session: Loaded) -> None:
        self.session = session
        self._before = session.counts()
        ring_of = MappedRing if session.maps_rings else BufferRing
        self._rings = [ring_of(cpu, session.add_ring(cpu), RING_BYTES) for cpu in online_cpus()]

    def read(self) -> npt.NDArray[Any]:
        """Return copies of the records since the last call, CPU after CPU, of dtype `RECORD`."""
        parts = [np.zeros(0, RECORD)]
        for ring in self._rings:
            for taken in ring.take()[0]:
                parts.append(taken.records.view(WORDS).copy().view(RECORD).reshape(-1))
                taken.given(len(taken.records))
            ring.release()
        return np.concatenate(parts)

    @property
    def lost(self) -> int:
        """Records lost since the recording began."""
        return int((self.session.counts()["lost_all"] - self._before["lost_all"]).sum())

    def close(self) -> None:
        for ring in self._rings:
            ring.close()


@contextlib.contextmanager
def recording(session: Loaded) -> Iterator[Recording]:
    """Attach the programs, and record within the block."""
    made = Recording(session)
    session.attach()
    try:
        session.start()
        yield made
    finally:
        session.stop()
        session.detach()
        made.close()
