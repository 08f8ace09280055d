"""The ring counts every lost record, and shows each loss where it happened."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import select
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from collector.kmod.source import KmodConfig
from contracts import abi
from contracts.hooks import Hook
from mace.lab import Lab
from tests.kernel.guest.reader import SUBBUF_BYTES, Session, opened_in, refused
from tests.kernel.vm import POSSIBLE_CPUS
from tests.measuring import on_one_cpu

PAGE = mmap.PAGESIZE


@pytest.mark.usefixtures("module")
def test_overflow_is_counted_by_cpu_and_hook_and_shown_as_gaps(lab: Lab) -> None:
    """A witness with a large ring tells what a small one that is seldom read should have had."""
    with Session() as small, Session() as witness:
        witness.setup(subbufs=512, watermark=64, hooks=[Hook.NET_DEV_QUEUE, Hook.NETIF_RECEIVE_SKB])
        small.setup(subbuf_bytes=PAGE, subbufs=2, hooks=[Hook.NET_DEV_QUEUE, Hook.NETIF_RECEIVE_SKB])
        witness.start()
        small.start()
        read = []
        flow = lab.start_udp("c1", count=6000)
        while flow.running:
            time.sleep(0.02)
            read.append(small.read())
        flow.wait()
        small.stop()
        witness.stop()
        read += [small.read(), small.read()]
        everything = witness.read()
        records = np.concatenate(read)
        for cpu in range(os.cpu_count() or 1):
            stats, truth = small.stats(cpu), witness.stats(cpu)
            of_cpu = records[records["cpu"] == cpu]
            assert stats["written"].sum() == len(of_cpu)
            for hook in (Hook.NET_DEV_QUEUE, Hook.NETIF_RECEIVE_SKB):
                assert stats["written"][hook] == (of_cpu["hook"] == hook).sum()
            # The witness began a moment earlier and ended a moment later.
            assert truth["lost"].sum() == 0
            assert 0 <= truth["written"].sum() - (stats["written"] + stats["lost"]).sum() < 50
            told = sum(lost for gap_cpu, lost in small.gaps if gap_cpu == cpu)
            # What was lost after the last record is in the counts alone.
            assert told <= stats["lost"].sum()
        assert small.stats()["lost"].sum() > 1000
        assert sum(lost for _, lost in small.gaps) > 0
        # What was kept is what happened: every record that was read is one of the witness's.
        columns = ["ts_ns", "skb_id", "packet_key", "ifindex", "hook", "cpu"]
        ours, theirs = (set(map(tuple, part[columns].tolist())) for part in (records, everything))
        assert ours <= theirs


@pytest.mark.usefixtures("module")
def test_gaps_lie_where_records_are_missing(lab: Lab) -> None:
    with Session() as session, on_one_cpu():
        session.setup(subbuf_bytes=PAGE, subbufs=4, hooks=[Hook.NETIF_RECEIVE_SKB]).start()
        lab.udp("c1", count=3000)
        first = session.read()
        lost = session.stats(0)["lost"].sum()
        assert lost > 0
        assert session.gaps == []
        lab.udp("c1", count=10)
        session.stop()
        second = session.read()
        told = [records for cpu, records in session.gaps if cpu == 0]
        assert told == [lost]
        assert session.stats(0)["lost"].sum() == lost
        of_first, of_second = (part["ts_ns"][part["cpu"] == 0] for part in (first, second))
        assert of_first.max() <= of_second.min()


@pytest.mark.usefixtures("module")
def test_sub_buffers_that_were_handed_over_do_not_change_until_released(lab: Lab) -> None:
    with Session() as session:
        session.setup(subbuf_bytes=PAGE, subbufs=4).start()
        lab.udp("c1", count=500)
        before = {}
        for cpu in range(os.cpu_count() or 1):
            taken = session.take(cpu)
            assert taken["ready"] <= 4
            before[cpu] = (int(taken["ready"]), bytes(session.map(cpu)))
        lab.udp("c1", count=500)
        for cpu, (ready, memory) in before.items():
            if ready == 4:  # all of it is with us
                assert bytes(session.map(cpu)) == memory
            again = session.take(cpu, flags=0)
            assert again["ready"] >= ready
        assert any(ready == 4 for ready, _ in before.values())
        session.stop()


@pytest.mark.usefixtures("module")
def test_poll_wakes_at_the_watermark_and_at_the_flush_interval(lab: Lab) -> None:
    with Session() as session:
        session.setup(subbuf_bytes=PAGE, subbufs=64, watermark=4, flush_ms=10_000).start()
        session.read()
        assert not session.readable(0.3)
        flow = lab.start_udp("c1", count=2000, rate_pps=2000)
        assert session.readable(5)  # half as long as the flush takes
        assert max(int(session.take(cpu, flags=0)["ready"]) for cpu in range(os.cpu_count() or 1)) >= 4
        flow.wait()
    with Session() as session:
        session.setup(subbufs=8, watermark=8, flush_ms=200).start()
        session.read()
        lab.ping("c1", count=1)
        assert session.readable(10)  # a few records, far from the watermark
        assert len(session.read()) > 0


@pytest.mark.usefixtures("module")
def test_sizes_and_memory_are_bounded() -> None:
    with Session() as session:
        most = int(session.hello()["ring_bytes_max"])
        for wrong in (
            {"subbuf_bytes": 0},
            {"subbuf_bytes": PAGE // 2},
            {"subbuf_bytes": PAGE + 64},
            {"subbuf_bytes": 8 << 20},
            {"subbuf_bytes": 1 << 31},
            {"subbufs": 0},
            {"subbufs": 1},
            {"subbufs": 0xFFFFFFFF},
            {"subbufs": most // SUBBUF_BYTES + 1},
            {"watermark": 0},
            {"watermark": 65},
            {"flush_ms": 0},
            {"flush_ms": 10_001},
            {"sample_shift": 32},
            {"flags": 2},
            {"pad2": 1},
            {"pad3": 1},
            {"ring_bytes": 1},
            {"cpu_count": 1},
        ):
            refused(errno.EINVAL, session.setup, **wrong)
        refused(errno.EPROTO, session.setup, abi_major=abi.ABI_MAJOR + 1)
        refused(errno.EOPNOTSUPP, session.setup, hooks=[0])
        refused(errno.EOPNOTSUPP, session.setup, hooks=[15])
        refused(errno.EBADF, session.setup, netns_fds=[1000])
        refused(errno.EINVAL, session.setup, netns_fds=[0])
        refused(errno.EINVAL, session.start)
        refused(errno.EINVAL, session.stats)
        refused(errno.EINVAL, session.take, 0)
        # After all that it can still be set up, once.
        session.setup()
        refused(errno.EBUSY, session.setup)
        session.start()
        refused(errno.EBUSY, session.start)
        refused(errno.EINVAL, session.take, 0, release=1)
        refused(errno.EINVAL, session.take, 0, flags=2)
        refused(errno.ENXIO, session.take, 1000)
        refused(errno.ENXIO, session.stats, 1000)
        session.stop()
        session.stop()


def test_parameters_bound_all_sessions_together(load_module: Callable[..., None]) -> None:
    load_module("max_total_mib=16", "max_sessions=3", "max_ring_mib=8")
    with Session() as first, Session() as second, Session() as third:
        refused(errno.EBUSY, Session)
        first.setup(subbufs=64)  # 4 MiB for each of two CPUs
        refused(errno.ENOMEM, second.setup, subbufs=96)
        refused(errno.EINVAL, second.setup, subbufs=129)
        second.setup(subbufs=64)
        refused(errno.ENOMEM, third.setup, subbufs=2)
        second.close()
        third.setup(subbufs=64)
    with Session() as again:
        again.setup(subbufs=128)


@pytest.mark.usefixtures("module")
def test_limits_fit_every_cpu_that_there_can_be() -> None:
    """One session with the collector's rings in each of two namespaces, and one of the host's, beside each other."""
    possible = Path("/sys/devices/system/cpu/possible").read_text().strip()
    cpus = int(possible.rpartition("-")[2]) + 1
    assert cpus == POSSIBLE_CPUS
    limits = {
        name: int((Path("/sys/module/mace/parameters") / name).read_text())
        for name in ("max_total_mib", "max_netns_mib", "host_mib")
    }
    ring_mib = KmodConfig().ring_kib_per_cpu // 1024
    assert min(limits["max_netns_mib"], limits["host_mib"]) >= cpus * ring_mib
    assert limits["max_total_mib"] - limits["host_mib"] >= 2 * cpus * ring_mib


def test_a_small_machine_keeps_the_limit_that_was(load_module: Callable[..., None]) -> None:
    load_module("max_total_mib=64")
    parameters = Path("/sys/module/mace/parameters")
    assert [int((parameters / name).read_text()) for name in ("max_netns_mib", "host_mib")] == [16, 16]


def test_a_namespace_has_a_quota_and_the_host_a_reserve(load_module: Callable[..., None], lab: Lab) -> None:
    load_module("max_sessions=6", "max_netns_sessions=3", "host_sessions=2", "max_total_mib=32", "max_netns_mib=16")
    c1, c2 = (lab.netns_path(name).name for name in ("c1", "c2"))
    with contextlib.ExitStack() as stack:
        of_c1 = [stack.enter_context(opened_in(c1)) for _ in range(3)]
        refused(errno.EBUSY, opened_in, c1)
        of_c2 = stack.enter_context(opened_in(c2))
        # Four of six: the other two are the host's.
        refused(errno.EBUSY, opened_in, c2)
        of_host = [stack.enter_context(Session()) for _ in range(2)]
        refused(errno.EBUSY, Session)
        # 4 MiB for each of two CPUs: 8 MiB; a namespace has 16, all containers 24 of 32.
        of_c1[0].setup(subbufs=64)
        of_c1[1].setup(subbufs=64)
        refused(errno.ENOMEM, of_c1[2].setup, subbufs=2)
        of_c2.setup(subbufs=64)
        of_host[0].setup(subbufs=64)
        refused(errno.ENOMEM, of_host[1].setup, subbufs=2)
        of_c1.pop().close()
        stack.enter_context(opened_in(c2))
        of_c1.pop().close()
        of_host[1].setup(subbufs=64)


@pytest.mark.usefixtures("module")
def test_memory_is_charged_to_who_asked_for_it() -> None:
    """Rings count against the memory cgroup of the opener: a container cannot take the host's memory with them."""
    group = Path("/sys/fs/cgroup/mace-charged")
    Path("/sys/fs/cgroup/cgroup.subtree_control").write_text("+memory")
    group.mkdir()
    try:
        child = os.fork()
        if child == 0:
            (group / "cgroup.procs").write_text(str(os.getpid()))
            before = int((group / "memory.current").read_text())
            with Session() as session:
                session.setup(subbufs=128)  # 8 MiB for each CPU
                charged = int((group / "memory.current").read_text()) - before
                (group / "memory.max").write_text(str(24 << 20))
                with Session() as more:
                    try:
                        more.setup(subbufs=512)
                        os._exit(2)
                    except OSError as error:
                        os._exit(0 if error.errno == errno.ENOMEM and charged >= 16 << 20 else 3)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == 0  # -9: killed for want of memory, instead of being refused it
    finally:
        group.rmdir()


@pytest.mark.usefixtures("module")
def test_a_mapping_cannot_be_written_or_grown() -> None:
    with Session() as session:
        refused(errno.ENXIO, mmap.mmap, session.fd, PAGE, mmap.MAP_SHARED, mmap.PROT_READ)
        session.setup()
        size = session.ring_bytes
        refused(errno.EACCES, mmap.mmap, session.fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        refused(errno.EACCES, mmap.mmap, session.fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_EXEC)
        for length in (PAGE, size - PAGE, size + PAGE, 2 * size):
            refused(errno.EINVAL, mmap.mmap, session.fd, length, mmap.MAP_SHARED, mmap.PROT_READ)
        refused(errno.ENXIO, mmap.mmap, session.fd, size, mmap.MAP_SHARED, mmap.PROT_READ, offset=PAGE)
        refused(errno.ENXIO, mmap.mmap, session.fd, size, mmap.MAP_SHARED, mmap.PROT_READ, offset=1000 * size)
        mapped = session.map(0)
        # /proc tells the flags of the mapping: "mw" is that it may be made writable.
        flags = Path("/proc/self/smaps").read_text().partition("/dev/mace")[2].partition("VmFlags:")[2].splitlines()[0]
        assert "mw" not in flags.split()
        assert "me" not in flags.split()
        assert len(mapped) == size


@pytest.mark.usefixtures("module")
def test_mapped_memory_outlives_the_module_being_asked_to_go() -> None:
    """An open file, or a mapping alone, pins the module."""
    session = Session().setup()
    mapped = session.map(0)
    os.close(session.fd)
    session.fd = -1
    done = subprocess.run(["rmmod", "mace"], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert mapped[:64] == bytes(64)
    session.close()


@contextlib.contextmanager
def offline(cpu: int) -> Iterator[Path]:
    """Without this CPU; a file that takes it back when "1" is written."""
    online = Path(f"/sys/devices/system/cpu/cpu{cpu}/online")
    online.write_text("0")
    try:
        yield online
    finally:
        online.write_text("1")


@pytest.mark.usefixtures("module")
def test_a_cpu_that_comes_online_has_a_ring_from_its_first_packet_on(lab: Lab) -> None:
    with contextlib.ExitStack() as stack:
        with offline(1) as online:
            session = stack.enter_context(Session()).setup(hooks=[Hook.NETIF_RECEIVE_SKB], subbufs=16)
            later = stack.enter_context(Session())
            session.start()
            refused(errno.ENXIO, session.take, 1)
            refused(errno.ENXIO, session.map, 1)
            charged = int(Path("/sys/fs/cgroup/tests/memory.current").read_text())
            online.write_text("1")
            # Half of it: each CPU charges up to 64 pages ahead, and other memory of the group comes and goes.
            assert int(Path("/sys/fs/cgroup/tests/memory.current").read_text()) - charged >= 8 << 16
            with on_one_cpu(1):
                lab.ping("c1", count=20, interval_s=0.01)
        session.stop()
        stats = session.stats()
        records = session.read()
        assert stats["lost"].sum() == 0
        # 20 requests, received on three devices, and as many replies, on two
        assert stats["written"].sum() == len(records) >= 100
        assert (records["cpu"] == 1).sum() == session.stats(1)["written"].sum() >= 20
        # Whoever has no rings yet gets them at SETUP.
        later.setup(subbufs=2)
        later.take(1)


def test_a_cpu_that_no_memory_is_left_for_loses_its_records_openly(load_module: Callable[..., None], lab: Lab) -> None:
    load_module("max_total_mib=4")
    with Session() as session, offline(1) as online:
        session.setup(hooks=[Hook.NETIF_RECEIVE_SKB], subbufs=64)
        online.write_text("1")
        session.start()
        with on_one_cpu(1):
            lab.ping("c1", count=20, interval_s=0.01)
        session.stop()
        refused(errno.ENXIO, session.take, 1)
        refused(errno.ENXIO, session.map, 1)
        taken = session.take(0)
        assert (taken["ready"] > 0) == (session.stats(0)["written"].sum() > 0)
        total = session.stats()
        assert total["lost"][Hook.NETIF_RECEIVE_SKB] >= 20
        assert (total["written"] + total["lost"]).sum() >= 100


def calls_between_cpus() -> int:
    """Interrupts so far by which one CPU has had another one run a function."""
    rows = Path("/proc/interrupts").read_text().splitlines()
    return sum(int(n) for row in rows if row.split()[0] == "CAL:" for n in row.split()[1:] if n.isdecimal())


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize("call", [Session.stats, lambda session: session.take(1, flags=0)], ids=["STATS", "TAKE"])
def test_who_only_looks_interrupts_no_other_cpu(call: Callable[[Session], object]) -> None:
    with Session().setup(subbufs=2) as session, on_one_cpu(0):
        before = calls_between_cpus()
        for _ in range(2000):
            call(session)
        # The kernel has its own, some tens a second.
        assert calls_between_cpus() - before < 500


@pytest.mark.usefixtures("module")
def test_a_container_flushes_another_cpu_at_most_every_10_ms(lab: Lab) -> None:
    """It may be a CPU that somebody has isolated."""
    with opened_in(lab.netns_path("c1").name).setup(subbufs=2) as session, on_one_cpu(0):
        session.take(1)
        began = time.monotonic()
        for _ in range(20):
            session.take(1)
        assert time.monotonic() - began >= 20 * 0.01


@pytest.mark.usefixtures("module")
def test_what_was_handed_over_until_a_time_is_all_until_then(lab: Lab) -> None:
    """Also while the clock is slewed to and fro, which makes its fast reading step back a little."""
    flow = lab.start_udp("c1", count=1500, rate_pps=1000)
    with Session() as session, slewed_clock():
        session.setup(subbuf_bytes=PAGE, subbufs=256).start()
        until = [0, 0]
        while flow.running:
            for cpu in range(2):
                taken = session.take(cpu)
                for number in range(int(taken["ready"])):
                    at = (int(taken["first"]) + number) % 256 * PAGE
                    subbuf = session.map(cpu)[at : at + PAGE]
                    count = int(np.frombuffer(subbuf, abi.SUBBUF, 1)["records"][0])
                    records = np.frombuffer(subbuf, abi.RECORD, count, offset=abi.SUBBUF.itemsize)
                    assert records["ts_ns"].min() >= until[cpu]
                    assert records["ts_ns"].max() <= taken["now_ns"]
                session.take(cpu, release=int(taken["ready"]), flags=0)
                assert taken["now_ns"] >= until[cpu]
                until[cpu] = int(taken["now_ns"])
        session.stop()
    flow.wait()


@contextlib.contextmanager
def slewed_clock() -> Iterator[None]:
    """The clock's rate is changed to and fro by as much as adjtimex(2) allows."""
    libc, stop = ctypes.CDLL(None, use_errno=True), threading.Event()
    timex = np.zeros(208, np.uint8)  # struct timex
    modes, freq = timex[:4].view("<u4"), timex[16:24].view("<i8")

    def set_rate(scaled_ppm: int) -> None:
        modes[0], freq[0] = 2, scaled_ppm  # ADJ_FREQUENCY, in 2**-16 ppm
        assert libc.adjtimex(ctypes.c_void_p(timex.ctypes.data)) >= 0

    def work() -> None:
        while not stop.wait(0.002):
            set_rate(500 << 16)
            set_rate(-500 << 16)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        set_rate(0)


class Page:
    """A page of memory that can be made read-only, as an argument of ioctl()."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, PAGE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.libc = ctypes.CDLL(None, use_errno=True)

    def refused(self, session: Session, request: int, argument: npt.NDArray[np.void]) -> None:
        """The call cannot give its results: EFAULT."""
        self.memory[: argument.nbytes] = argument.tobytes()
        for prot in (mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE):
            assert self.libc.mprotect(ctypes.c_void_p(self.address), ctypes.c_size_t(PAGE), prot) == 0
            if prot == mmap.PROT_READ:
                result = self.libc.ioctl(session.fd, ctypes.c_ulong(request), ctypes.c_void_p(self.address))
                assert (result, ctypes.get_errno()) == (-1, errno.EFAULT)
        assert self.memory[: argument.nbytes] == argument.tobytes()


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize("flags", [0, abi.TakeFlag.FLUSH])
def test_a_take_that_fails_has_done_nothing(lab: Lab, flags: int) -> None:
    page = Page()
    with Session() as session, on_one_cpu():
        session.setup(subbuf_bytes=PAGE, subbufs=8, flush_ms=20).start()
        lab.ping("c1", count=20, interval_s=0.01)
        session.stop()
        before = session.take(0)
        assert before["ready"] > 1
        records = bytes(session.map(0))
        with Session() as other:
            for wrong in (before["ready"] + 1, 0xFFFFFFFF):
                refused(errno.EINVAL, session.take, 0, release=int(wrong))
            take = np.zeros((), abi.TAKE)
            take["flags"], take["release"] = flags, 1
            page.refused(session, abi.Ioctl.TAKE, take)
            refused(errno.EINVAL, other.take, 0)
        after = session.take(0, flags=0)
        assert (after["first"], after["ready"]) == (before["first"], before["ready"])
        assert bytes(session.map(0)) == records
        assert session.stats()["written"].sum() == len(session.read())


@pytest.mark.usefixtures("module")
def test_a_setup_that_fails_has_done_nothing(lab: Lab) -> None:
    page = Page()
    wanted = np.zeros((), abi.SETUP)
    wanted["abi_major"], wanted["subbuf_bytes"], wanted["subbufs"] = abi.ABI_MAJOR, PAGE, 1024
    wanted["watermark"], wanted["flush_ms"] = 1, 50
    with Session() as session:
        held = int(Path("/sys/fs/cgroup/tests/memory.current").read_text())
        for _ in range(20):
            page.refused(session, abi.Ioctl.SETUP, wanted)
        assert int(Path("/sys/fs/cgroup/tests/memory.current").read_text()) - held < 10 * 1024 * PAGE
        refused(errno.EINVAL, session.start)
        refused(errno.EINVAL, session.stats)
        refused(errno.EINVAL, session.take, 0)
        refused(errno.ENXIO, mmap.mmap, session.fd, 1024 * PAGE, mmap.MAP_SHARED, mmap.PROT_READ)
        session.setup(subbufs=2, hooks=[Hook.NETIF_RX])
        session.start()
        lab.ping("c1", count=5)
        session.stop()
        assert set(session.read()["hook"].tolist()) == {Hook.NETIF_RX}


@pytest.mark.usefixtures("module")
def test_own_cost_is_counted(lab: Lab) -> None:
    with Session() as session:
        before = session.cost()
        session.setup(subbufs=512).start()
        lab.ping("c1", count=200, flood=True)
        session.stop()
        after = session.cost()
        written = session.stats()["written"]
    calls = after["calls"] - before["calls"]
    assert after["every"] == 64
    # No filter: every call is a record, except where IP takes a packet from the device that received it.
    filtered = np.arange(len(written)) == Hook.IP_RCV
    assert np.array_equal(calls[: len(written)][~filtered], written[~filtered])
    assert (calls[: len(written)] >= written).all()
    timed = after["timed"] - before["timed"]
    assert (timed <= calls // 64 + 2).all()  # of each of two CPUs one may be over
    assert timed[Hook.NETIF_RECEIVE_SKB] > 0
    spent = after["timed_ns"] - before["timed_ns"]
    assert (spent[timed > 0] > 0).all()


def test_nothing_is_registered_while_nobody_reads(load_module: Callable[..., None], lab: Lab) -> None:
    load_module("cost_every=1")
    with Session() as session:
        lab.ping("c1", count=10, flood=True)
        assert session.cost()["calls"].sum() == 0
        session.setup(hooks=[Hook.NETIF_RX]).start()
        lab.ping("c1", count=10, flood=True)
        session.stop()
        calls = session.cost()["calls"]
        assert calls[Hook.NETIF_RX] > 0
        assert calls.sum() == calls[Hook.NETIF_RX]
        lab.ping("c1", count=10, flood=True)
        assert np.array_equal(session.cost()["calls"], calls)


@pytest.mark.usefixtures("module")
def test_poll_without_records_does_not_hang_up() -> None:
    with Session() as session:
        poll = select.poll()
        poll.register(session.fd, select.POLLIN)
        assert poll.poll(10) == []
