"""The BPF programs on this kernel: late CPUs, readers that are killed, attaching under load, refusals.

What the programs see is compared with the module and with ftrace in test_equals_ftrace.py, what a filter lets through
in test_isolation.py.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import platform
import resource
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from collector.bpf.libbpf import library
from collector.bpf.source import BpfSource
from collector.machine.kernel import online_cpus
from contracts.errors import Unavailable
from contracts.hooks import Hook
from contracts.records import Batch
from mace.lab import Lab
from tests import memory_cgroup
from tests.kernel.guest import programs
from tests.kernel.guest.conftest import lockdown
from tests.kernel.guest.programs import recording
from tests.kernel.guest.test_cycles import flood
from tests.kernel.guest.test_sessions import udp_echo
from tests.measuring import on_one_cpu

pytestmark = programs.LOADING

CYCLES = 20
"""A thousand take an emulator four minutes; the host's tests attach a thousand times."""
LATE = 2
"""A CPU that is present and was not started."""


def wait_for(condition: Callable[[], object], limit_s: float = 60) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def test_a_cpu_that_comes_online_later_gets_a_ring(lab: Lab) -> None:
    """Its records are in the stream, and those from before its ring are counted as lost: none is missing."""
    session = programs.unfiltered()
    source = programs.source(session)
    batches: list[Batch] = []
    online = Path(f"/sys/devices/system/cpu/cpu{LATE}/online")

    async def run() -> None:
        await source.open()
        seen = asyncio.Event()

        async def read() -> None:
            async for item in source.items():
                if isinstance(item, Batch):
                    batches.append(item)
                    if (item.cpu == LATE).any():
                        seen.set()

        reading = asyncio.create_task(read())
        before = session.counts()["calls"][LATE].sum()
        await asyncio.to_thread(online.write_text, "1")
        await asyncio.to_thread(echo_on_late_cpu, lab)
        assert session.counts()["calls"][LATE].sum() > before
        await seen.wait()
        source.request_stop()
        await reading

    first = session.counts()
    try:
        asyncio.run(asyncio.wait_for(run(), 240))
        last = session.counts()
    finally:
        asyncio.run(source.aclose())
        online.write_text("0")
    whole = Batch.concatenate(batches)
    calls, lost = (last[name] - first[name] for name in ("calls", "lost"))
    # IP's hook has no record of a packet that it is handed where it was received.
    calls[:, Hook.IP_RCV] = 0
    # The count of calls is not atomic: an interrupted one may be missing.
    assert (whole.cpu == LATE).sum() + lost[LATE].sum() >= calls[LATE].sum() > 200
    assert whole.lost >= lost.sum() == last["lost_all"].sum() - first["lost_all"].sum()


def echo_on_late_cpu(lab: Lab) -> None:
    with on_one_cpu(LATE):
        udp_echo(lab, "c1", 40)


def test_a_ring_that_is_full_counts_by_cpu_and_hook(lab: Lab) -> None:
    """The datagrams that found no room are counted, at each hook, and the next record tells how many there were."""
    session = programs.unfiltered()
    with recording(session) as made, on_one_cpu(0):
        before = session.counts()
        while not made.lost:
            udp_echo(lab, "c1", 500)
        # Nothing empties the ring meanwhile, and other packets of the machine are lost as well.
        earlier = made.lost
        lost = session.counts()["lost"] - before["lost"]
        assert earlier <= lost.sum() <= made.lost
        assert (lost[0] > 0).sum() > 2
        assert not lost[[cpu for cpu in range(session.possible_cpus) if cpu not in online_cpus()]].any()
        made.read()
        udp_echo(lab, "c1", 1)
        told = made.read()
    mine = told[told["cpu"] == 0]
    counted = session.counts()["lost_all"][0] & 0xFFFFFF
    assert int.from_bytes(mine["pad"][-1].tobytes(), "little") == counted


def test_a_killed_reader_leaves_nothing_attached(lab: Lab) -> None:
    session = programs.unfiltered()
    child = os.fork()
    if child == 0:
        session.attach()
        session.start()
        signal.pause()
    try:
        wait_for(lambda: called(lab, session))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    session.start()
    try:
        # The kernel detaches a moment after the process.
        wait_for(lambda: not called(lab, session))
    finally:
        session.stop()


def called(lab: Lab, session: programs.Loaded) -> bool:
    """Whether the programs run when a packet passes."""
    before = session.counts()["calls"]
    udp_echo(lab, "c1", 1)
    calls = session.counts()["calls"] - before
    if session.kept:
        calls[:, Hook.IP_RCV] = 0
    return bool(calls.any())


def test_attached_and_detached_under_flood(lab: Lab) -> None:
    session = programs.unfiltered()
    files, links = len(list(Path("/proc/self/fd").iterdir())), links_of_the_kernel()
    others = sum(map(len, session.programs.values())) - len(session.kept)
    with flood(lab):
        for _ in range(CYCLES):
            session.attach()
            assert links_of_the_kernel() == links + others
            session.start()
            session.stop()
            session.detach()
    assert len(list(Path("/proc/self/fd").iterdir())) == files
    wait_for(lambda: links_of_the_kernel() == links)
    assert not called(lab, session)


def links_of_the_kernel() -> int:
    """Return how many attachments the kernel has, of all processes."""
    number, count = ctypes.c_uint32(0), 0
    while library().bpf_link_get_next_id(number, ctypes.byref(number)) == 0:
        count += 1
    return count


# --- refusals ---------------------------------------------------------------------------------------


CAP_PERFMON, CAP_BPF = 38, 39


def checked(*kept: int, locked_bytes: int | None = None) -> str:
    """Return what `BpfSource.check` says in a child that has only these capabilities, and a limit of locked memory."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if locked_bytes is not None:
                resource.setrlimit(resource.RLIMIT_MEMLOCK, (locked_bytes, locked_bytes))
            only(kept)
            os.write(theirs, str(BpfSource.check()).encode())
        finally:
            os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as told:
        found = told.read()
    os.waitpid(child, 0)
    assert "ok=False" in found
    assert "\n" not in found
    return found


def only(kept: Iterable[int]) -> None:
    """Give up all capabilities but these (capset(2))."""
    low, high = np.array([sum(1 << number for number in kept)], np.uint64).view(np.uint32).tolist()
    version, own_pid = 0x20080522, 0
    head = (ctypes.c_uint32 * 2)(version, own_pid)
    # Effective, permitted and inheritable, of the lower and of the upper 32.
    data = (ctypes.c_uint32 * 6)(low, low, 0, high, high, 0)
    assert ctypes.CDLL(None).capset(head, data) == 0


def test_without_rights_whatever_the_kernel_allows_to_everybody() -> None:
    """`unprivileged_bpf_disabled` concerns programs of other kinds, so its value is no remedy."""
    setting = Path("/proc/sys/kernel/unprivileged_bpf_disabled")
    before = setting.read_text()
    for value in (0, 2):
        setting.write_text(str(value))
        try:
            assert "CAP_PERFMON and CAP_BPF missing" in checked()
        finally:
            setting.write_text(before)
    assert ": CAP_PERFMON missing" in checked(CAP_BPF)


@pytest.mark.skipif(not platform.release().startswith("5.10"), reason="Linux 5.11 and later charge the cgroup")
def test_too_little_locked_memory() -> None:
    assert "more locked memory than the limit of 64 KiB" in checked(CAP_BPF, CAP_PERFMON, locked_bytes=64 << 10)


@pytest.mark.skipif(platform.release().startswith("5.10"), reason="Linux 5.10 charges no cgroup")
def test_a_memory_limit() -> None:
    session = programs.unfiltered()
    session.add_ring(0)  # as large as all others, and within the machine's memory
    with memory_cgroup.limited(4), pytest.raises(Unavailable, match=r"no memory for a ring of 8 MiB; .*cgroup"):
        session.add_ring(0)
    session.add_ring(0)


@pytest.mark.last
def test_lockdown() -> None:
    """Nothing can end the lockdown but a reboot: this test is the machine's last one."""
    lockdown("confidentiality")
    status = BpfSource.check()
    assert not status.ok
    assert "locked down" in status.detail
    assert "lockdown=integrity" in status.remedy
