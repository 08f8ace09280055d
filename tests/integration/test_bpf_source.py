"""The BPF programs on the running kernel: compared with ftrace, filtered, killed, attached again and again, refused."""

import asyncio
import contextlib
import ctypes
import errno
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest

from collector.bpf import libbpf, session
from collector.bpf.libbpf import Btf, library
from collector.bpf.object import OBJECT, OLD_OBJECT, BpfObject
from collector.bpf.ring import BufferRing, MappedRing, Wakes, lost_before
from collector.bpf.source import BpfConfig, BpfSource
from collector.ftrace.source import FtraceConfig, FtraceSource
from collector.live.filter import SessionFilter
from collector.live.places import Places
from collector.machine.devices import DeviceFollower
from collector.machine.kernel import online_cpus
from contracts.abi import COLUMNS, HOOK_SLOTS, RECORD, WORDS
from contracts.errors import SourceError, Unavailable
from contracts.hooks import BY_HOOK, HOOKS, TRACEPOINTS, Hook
from contracts.records import Batch, Flag
from contracts.topology import Topology
from mace.lab import Spec, running
from tests import memory_cgroup
from tests.filtered_ftrace import Sender, cpu_choice
from tests.measuring import wait_for

pytestmark = [pytest.mark.needs("root", "bpf", "netns"), pytest.mark.timeout(180)]

COUNT = 300
SIZE = 1213
"""Payload of the pings, bytes: their length distinguishes them from all other traffic."""
TINY = 4096
"""Bytes of the smallest ring."""
CALL_OF_READ, CALL_OF_NOTHING = (b"\x85" + bytes(3) + number.to_bytes(4, "little") for number in (113, 9999))
"""Instructions that call bpf_probe_read_kernel(), and a function that no kernel has."""
DEVICE_HOOKS = [info.hook for info in BY_HOOK.values() if info.has_device]


def programs_of(pid):
    """Return the ids of the BPF programs of which a process has a file descriptor."""
    found = set()
    for file in Path(f"/proc/{pid}/fdinfo").iterdir():
        with contextlib.suppress(FileNotFoundError):  # of this process: the directory that is read here
            found |= set(map(int, re.findall(r"^prog_id:\s+(\d+)$", file.read_text(), re.MULTILINE)))
    return found


def is_loaded(program):
    fd = library().bpf_prog_get_fd_by_id(ctypes.c_uint32(program))
    if fd < 0:
        return False
    os.close(fd)
    return True


def of(sender, **more):
    return SessionFilter(netns=(f"/proc/{sender.process.pid}/ns/net",), **more)


@pytest.fixture(params=["new", "old"])
def programs_for(request, monkeypatch):
    """Load the programs for this kernel, then those for older ones, which fill BPF ring buffers."""
    if request.param == "old":
        monkeypatch.setattr(Btf, "has_function", lambda *_: False)
    return request.param


async def recorded(sources, work):
    """Run several sources while `work` runs, and return the items of each."""
    for source in sources:
        await source.open()

    async def read(source):
        return [item async for item in source.items()]

    reading = [asyncio.create_task(read(source)) for source in sources]
    try:
        await work()
        await asyncio.sleep(0.3)
    finally:
        for source in sources:
            source.request_stop()
        items = await asyncio.gather(*reading)
        for source in sources:
            await source.aclose()
    return items


def batch_of(items):
    return Batch.concatenate([item for item in items if isinstance(item, Batch)])


def steps(items):
    """Return (hook, device) of the pings' records in time order, a count of each buffer's sequence, and the records."""
    batch, sightings = batch_of(items), [i for i in items if isinstance(i, Topology)][-1].sightings
    mine = batch[(batch.l3_len == SIZE + 28) & np.isin(batch.hook, DEVICE_HOOKS)]
    names = [sightings[code].name for code in mine.dev.tolist()]
    told = list(zip(mine.hook.tolist(), names, strict=True))
    order = np.argsort(mine.skb_id, kind="stable")
    cuts = np.flatnonzero(np.diff(mine.skb_id[order])) + 1
    return told, Counter(tuple(told[at] for at in one) for one in np.split(order, cuts)), mine


@pytest.mark.slow
@pytest.mark.needs("tracefs")
def test_ftrace_sees_the_same_hops_in_the_same_order():
    with running(Spec(name="bpfw")) as lab:
        lab.ping("c1", count=2)
        sources = (BpfSource(BpfConfig(), DeviceFollower()), FtraceSource(FtraceConfig(), DeviceFollower()))
        bpf, ftrace = asyncio.run(
            recorded(sources, lambda: asyncio.to_thread(lab.ping, "c1", count=COUNT, size=SIZE, interval_s=0.01))
        )
    ours, of_buffers, mine = steps(bpf)
    theirs, of_their_buffers, _ = steps(ftrace)
    assert len(ours) > 10 * COUNT
    assert ours == theirs
    assert of_buffers == of_their_buffers
    assert batch_of(bpf).lost == batch_of(ftrace).lost == 0
    # Each request and each reply keeps one key from its first device to its last.
    assert len(np.unique(mine.content.packet_key)) == 2 * COUNT
    assert (mine.content.flags & Flag.KEY).all()


class OlderSource(BpfSource):
    """A source whose programs call no function that Linux 5.10 lacks."""

    async def open(self):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Btf, "has_function", lambda *_: False)
            await super().open()


def packets_of(items):
    """Return the key of each different packet at each hook of a device, by the rest of what its records say."""
    batch = batch_of(items)
    batch = batch[np.isin(batch.hook, DEVICE_HOOKS) & np.isin(batch.content.l4_proto, (1, 6))]
    told = batch.content
    rest = zip(
        batch.hook.tolist(), batch.l3_len.tolist(), batch.gso_segs.tolist(),
        told.l4_src.tolist(), told.l4_dst.tolist(), told.l4_seq.tolist(), told.l4_bits.tolist(), told.ip_id.tolist(),
        (told.flags & ~np.uint8(Flag.KEY)).tolist(),
        strict=True,
    )  # fmt: skip
    return dict(zip(rest, told.packet_key.tolist(), strict=True))


@pytest.mark.slow
def test_the_programs_of_older_kernels_record_the_same_and_lack_keys_of_payload_in_pages_only():
    with running(Spec(name="bpfo")) as lab:

        def work():
            lab.ping("c1", count=50, size=SIZE)
            lab.tcp("c1", size=500_000)

        config = BpfConfig(wanted=SessionFilter(netns=(str(lab.netns_path("c1")),)))
        sources = (BpfSource(config), OlderSource(config))
        new, old = asyncio.run(recorded(sources, lambda: asyncio.to_thread(work)))
    keys, older = packets_of(new), packets_of(old)
    assert keys.keys() == older.keys()
    assert all(keys.values())
    without = [packet for packet, key in older.items() if key == 0]
    assert {packet: older[packet] for packet in older.keys() - set(without)}.items() <= keys.items()
    assert 0 < len(without) < len(older)
    assert all(packet[6] & 0x10 and packet[1] > 100 for packet in without), "only TCP segments with data"


@pytest.mark.slow
@pytest.mark.usefixtures("programs_for")
def test_a_filtered_session_has_no_other_packet_and_two_at_once_have_the_same():
    with Sender("mbpa", 500, cpu_choice()) as mine, Sender("mbpb", 500, cpu_choice()) as other:
        config = BpfConfig(ring_kib_per_cpu=1024, wanted=of(mine, l4_protocols=(17,)))
        sources = (BpfSource(config), BpfSource(config))

        async def both():
            await asyncio.gather(mine.send(), other.send())

        items = asyncio.run(recorded(sources, both))
        netns = Path(f"/proc/{mine.process.pid}/ns/net").stat().st_ino
    for one in items:
        batch = batch_of(one)
        sightings = [i for i in one if isinstance(i, Topology)][-1].sightings
        queued = batch[batch.hook == Hook.NET_DEV_QUEUE]
        # The n-th datagram has n bytes of payload.
        assert (queued.l3_len - 28).tolist() == list(range(500))
        assert {sightings[code].netns for code in np.unique(batch.dev).tolist()} <= {netns, 0}
        assert batch.lost == 0
        assert Counter(batch.hook.tolist())[Hook.NET_DEV_START_XMIT] == 500


def copies_in(ring):
    """Return copies of all records in a ring, and release them."""
    assert ring.waiting <= 1, "programs wrote to slots that the reader had not released"
    stretches, complete = ring.take()
    ring.copy_out()
    ring.release()
    return [taken.records for taken in stretches], complete


@pytest.mark.slow
def test_a_flood_into_tiny_rings_is_written_or_counted_and_no_record_is_torn(programs_for):
    """On each CPU a sender fills the ring again and again, and other programs interrupt its programs."""
    one = session.Session(SessionFilter(), ring_bytes=TINY, wake_every=1, cookies=False)
    assert one.maps_rings == (programs_for == "new")
    found = {cpu: [] for cpu in online_cpus()}
    began_ns = time.monotonic_ns()
    with closing(one), ExitStack() as stack:
        senders = [stack.enter_context(Sender(f"mbp{cpu}", 10_000, cpu)) for cpu in found]
        kind = MappedRing if one.maps_rings else BufferRing
        rings = [kind(cpu, one.add_ring(cpu), TINY) for cpu in found]
        one.attach()
        one.start()

        async def flood():
            sending = asyncio.gather(*(sender.send() for sender in senders))
            while not sending.done():
                for ring in rings:
                    found[ring.cpu] += copies_in(ring)[0]
                await asyncio.sleep(0)
            await sending

        # Twenty times as many records as a ring has slots, however seldom the senders let the reader run.
        while min(sum(map(len, pieces)) for pieces in found.values()) < 20 * TINY // RECORD.itemsize:
            asyncio.run(flood())
        one.stop()
        one.detach()
        # A program may still be running.
        for ring in rings:
            complete = False
            while not complete:
                records, complete = copies_in(ring)
                found[ring.cpu] += records
        counts = one.counts()
        for ring in rings:
            ring.close()
    ended_ns = time.monotonic_ns()
    assert counts["lost"].sum() > 100
    lengths = set()
    for cpu, pieces in found.items():
        records = np.concatenate([piece.view(WORDS) for piece in pieces]).view(COLUMNS).reshape(-1)
        written = np.bincount(records["hook"], minlength=HOOK_SLOTS)
        # IP's hook has no record of a packet that it is handed where it was received.
        others = np.arange(HOOK_SLOTS) != Hook.IP_RCV
        assert (written + counts["lost"][cpu])[others].tolist() == counts["calls"][cpu][others].tolist()
        told = lost_before(records, 0)
        assert told[-1] <= counts["lost_all"][cpu] == counts["lost"][cpu].sum()
        assert set(records["cpu"].tolist()) == {cpu}
        assert began_ns < records["ts_ns"].min() <= records["ts_ns"].max() < ended_ns
        mine = records[(records["l4_proto"] == 17) & (records["l4_dst"] == 9) & np.isin(records["hook"], DEVICE_HOOKS)]
        lengths |= set(zip(mine["packet_key"].tolist(), mine["l3_len"].tolist(), strict=True))
    # The key covers the length, so a record of two packets' halves has a pair of its own.
    assert len({key for key, _ in lengths}) == len(lengths) > 100


@pytest.mark.slow
@pytest.mark.usefixtures("programs_for")
def test_each_datagram_is_in_the_stream_or_counted_there_as_lost():
    """Rings that are always too small: every tick finds losses, and records that wrap."""
    with Sender("mbpl", 20_000, cpu_choice()) as sender:
        config = BpfConfig(ring_kib_per_cpu=4, wanted=of(sender, hooks=(Hook.NET_DEV_QUEUE,)))

        async def send():
            await sender.send()

        (items,) = asyncio.run(recorded([BpfSource(config)], send))
    batch = batch_of(items)
    assert batch.lost > 0
    assert np.count_nonzero(batch.hook == Hook.NET_DEV_QUEUE) + batch.lost == sender.count


@pytest.mark.slow
@pytest.mark.usefixtures("programs_for")
def test_programs_wake_the_reader_again_after_more_wakeups_than_fit():
    one = session.Session(SessionFilter(), ring_bytes=TINY << 4, wake_every=1, cookies=False)
    with closing(one), closing(select.epoll()) as waking, Sender("mbpw", 1000, cpu_choice()) as sender:
        fds = {cpu: one.add_ring(cpu) for cpu in online_cpus()}
        kind = MappedRing if one.maps_rings else BufferRing
        rings = [kind(cpu, fd, TINY << 4) for cpu, fd in fds.items()]
        wakes = Wakes(one.wakes_fd) if one.maps_rings else None
        for fd in [one.wakes_fd] if wakes else fds.values():
            waking.register(fd, select.EPOLLIN | select.EPOLLET)
        one.attach()
        one.start()
        for _ in range(3):
            asyncio.run(sender.send())
            assert waking.poll(30), "no program has woken the reader"
            if wakes:
                wakes.empty()
            for ring in rings:
                copies_in(ring)
            waking.poll(0)
        one.stop()
        for ring in rings:
            ring.close()
        if wakes:
            wakes.close()


@pytest.mark.slow
def test_a_killed_collector_leaves_nothing_attached():
    code = (
        "import asyncio\n"
        "from collector.bpf.source import BpfConfig, BpfSource\n"
        "async def run():\n"
        "    await BpfSource(BpfConfig(ring_kib_per_cpu=64)).open()\n"
        "    print('open', flush=True)\n"
        "    await asyncio.sleep(600)\n"
        "asyncio.run(run())\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as collector:
        try:
            assert collector.stdout.readline() == "open\n"
            programs = programs_of(collector.pid)
            assert len(programs) == sum(map(len, session.programs()[0].values()))
            assert all(map(is_loaded, programs))
        finally:
            collector.send_signal(signal.SIGKILL)
    for _ in range(300):
        if not any(map(is_loaded, programs)):
            return
        time.sleep(0.1)  # the kernel frees the programs a moment after the process
    pytest.fail("programs of the killed collector are still loaded after 30 s")


@pytest.mark.slow
def test_attached_and_detached_a_thousand_times_under_a_flood():
    """Loading takes seconds, so that the same loaded programs are attached."""
    with Sender("mbpf", 200, cpu_choice()) as sender:
        one = session.Session(of(sender), ring_bytes=65536, wake_every=128, cookies=False)
        one.record_at(Places(netns=(Path(f"/proc/{sender.process.pid}/ns/net").stat().st_ino,)))
        try:
            files = len(list(Path("/proc/self/fd").iterdir()))
            loaded = programs_of("self")

            def cycles():
                for _ in range(1000):
                    one.attach()
                    one.start()
                    assert one.attached == sum(map(len, one.programs.values()))
                    one.stop()
                    one.detach()

            async def under_a_flood():
                cycling = asyncio.create_task(asyncio.to_thread(cycles))
                while not cycling.done():
                    await sender.send()
                await cycling

            asyncio.run(under_a_flood())
            assert len(list(Path("/proc/self/fd").iterdir())) == files
            assert programs_of("self") == loaded
            assert one.counts()["calls"].sum() > 0
            # Attached once more, the programs see every datagram.
            before = one.counts()
            one.attach()
            one.start()
            asyncio.run(sender.send())
            one.detach()
            seen = one.counts()["lost"] - before["lost"]
            assert seen[:, Hook.NET_DEV_QUEUE].sum() == sender.count
        finally:
            one.close()


# --- where the source cannot run ------------------------------------------------------------------------------


def test_without_btf(monkeypatch, tmp_path):
    monkeypatch.setattr(libbpf, "BTF", tmp_path / "vmlinux")
    status = BpfSource.check()
    assert not status.ok
    assert status.detail.startswith("this kernel has no BTF")
    assert "CONFIG_DEBUG_INFO_BTF" in status.remedy


@pytest.mark.parametrize("kept", [0, 100, 5000])
def test_a_truncated_object(tmp_path, kept):
    path = tmp_path / "mace.bpf.o"
    path.write_bytes(OBJECT.read_bytes()[:kept])
    with pytest.raises(Unavailable, match=r"is no BPF object.*make -C bpf") as raised:
        session.Session(SessionFilter(), ring_bytes=4096, wake_every=1, cookies=False, path=path)
    assert "\n" not in str(raised.value)


def test_an_object_without_a_program(tmp_path):
    """An object file of another version is an error that `mace check` reports in one line."""
    path = tmp_path / "mace.bpf.o"
    path.write_bytes(OBJECT.read_bytes().replace(b"consume_skb\0", b"consume_xyz\0"))
    with pytest.raises(SourceError, match=r"no program consume_skb.*make -C bpf") as raised:
        session.Session(SessionFilter(), ring_bytes=4096, wake_every=1, cookies=False, path=path)
    assert "\n" not in str(raised.value)


def test_the_other_programs_run_where_the_kernel_refuses_those_on_functions(monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Btf, "try_function", refuse)
    status = BpfSource.check()
    assert status.ok
    assert f"programs on {len(TRACEPOINTS)} of {len(HOOKS)} hooks, without ip_rcv" in status.detail
    assert "the kernel refuses programs on its function ip_rcv_core (Operation not permitted)" in status.detail
    one = session.Session(SessionFilter(), ring_bytes=4096, wake_every=1, cookies=False)
    try:
        assert one.programs.keys() == {info.hook for info in TRACEPOINTS}
        one.attach()
        assert one.attached == len(TRACEPOINTS)
    finally:
        one.close()


def without_function(folder):
    """Put the objects in a folder, with a program on a function that no kernel has."""
    for path in (OBJECT, OLD_OBJECT):
        (folder / path.name).write_bytes(path.read_bytes().replace(b"/ip_rcv_core\0", b"/ip_rcv_none\0"))


def test_the_other_programs_run_where_only_the_real_ones_on_functions_are_refused(monkeypatch, tmp_path, caplog):
    """libbpf gives up a whole object with a program on a function that the kernel lacks."""
    without_function(tmp_path)
    monkeypatch.setattr(Btf, "try_function", lambda *_: None)
    monkeypatch.setattr("collector.bpf.source.OBJECT", tmp_path / OBJECT.name)
    status = BpfSource.check()
    assert status.ok
    assert f"programs on {len(TRACEPOINTS)} of {len(HOOKS)} hooks, without ip_rcv" in status.detail
    assert "the kernel refuses the programs of ip_rcv" in status.detail
    assert [record.getMessage().count("refuses the programs of ip_rcv") for record in caplog.records] == [1]
    caplog.clear()
    one = session.Session(
        SessionFilter(hooks=(Hook.NETIF_RX, Hook.IP_RCV)),
        ring_bytes=4096,
        wake_every=1,
        cookies=False,
        path=tmp_path / OBJECT.name,
    )
    try:
        one.attach()
        assert one.programs.keys() == {Hook.NETIF_RX}
        assert one.attached == 1
    finally:
        one.close()


def test_programs_that_are_refused_altogether_are_an_error(monkeypatch, tmp_path, caplog):
    """One line, and none that says that the others run."""
    without_function(tmp_path)
    monkeypatch.setattr(Btf, "try_function", lambda *_: None)
    with pytest.raises(Unavailable) as raised:
        session.Session(
            SessionFilter(hooks=(Hook.IP_RCV,)),
            ring_bytes=4096,
            wake_every=1,
            cookies=False,
            path=tmp_path / OBJECT.name,
        )
    assert "\n" not in str(raised.value)
    assert not caplog.records


@pytest.mark.parametrize("lacking", ["ip_rcv_core", "ip6_rcv_core"])
def test_the_hook_needs_both_functions(monkeypatch, lacking):
    """With one of them only, the packets of a whole family would be missing in silence."""
    has_function = Btf.has_function
    monkeypatch.setattr(Btf, "try_function", lambda *_: None)
    assert session.programs()[0][Hook.IP_RCV] == ("ip_rcv", "ipv6_rcv")
    monkeypatch.setattr(Btf, "has_function", lambda btf, name: name != lacking and has_function(btf, name))
    chosen, refusal = session.programs()
    assert chosen.keys() == {info.hook for info in TRACEPOINTS}
    assert refusal == f"this kernel's BTF has no function {lacking}"


def test_the_trial_of_a_function_that_does_not_exist():
    with contextlib.closing(Btf()) as btf:
        assert btf.has_function("ip_rcv_core")
        assert not btf.has_function("no_such_function")
        with pytest.raises(FileNotFoundError):
            btf.try_function("no_such_function")


class RefusesToAttach:
    """libbpf, but one program cannot be attached."""

    def __init__(self, program):
        self._program = program

    def __getattr__(self, name):
        return getattr(library(), name)

    def bpf_program__attach(self, program):
        if program != self._program:
            return library().bpf_program__attach(program)
        ctypes.set_errno(errno.ENOENT)
        return None


def test_the_other_programs_run_where_those_on_functions_cannot_be_attached(monkeypatch, caplog):
    """Two programs on tracepoints stand for those on functions, which this kernel may refuse to load."""
    stand_ins = ("consume_skb", "napi_gro_receive_entry")
    chosen = {Hook.NETIF_RX: ("netif_rx",), Hook.IP_RCV: stand_ins}
    monkeypatch.setattr(session, "programs", lambda: (dict(chosen), ""))
    one = session.Session(SessionFilter(), ring_bytes=4096, wake_every=1, cookies=False)
    with contextlib.closing(one):
        monkeypatch.setattr(one, "_library", RefusesToAttach(one._loaded[stand_ins[1]].program(stand_ins[1])))
        one.attach()
        assert one.programs == {Hook.NETIF_RX: ("netif_rx",)}
        assert one.runs().keys() == {Hook.NETIF_RX}
        assert one.attached == 1
        assert "napi_gro_receive_entry cannot be attached: No such file or directory" in one.refusal
        assert [record.getMessage().count("ingress of macvlan") for record in caplog.records] == [1]
        one.detach()
        assert one.attached == 0
        one.attach()
        assert one.attached == 1
    del chosen[Hook.NETIF_RX]
    alone = session.Session(SessionFilter(), ring_bytes=4096, wake_every=1, cookies=False)
    with contextlib.closing(alone):
        monkeypatch.setattr(alone, "_library", RefusesToAttach(alone._loaded[stand_ins[1]].program(stand_ins[1])))
        with pytest.raises(Unavailable, match="napi_gro_receive_entry cannot be attached"):
            alone.attach()


def test_receptions_are_noted_but_not_recorded_where_only_ips_hook_is_wanted(monkeypatch):
    """A program on a tracepoint stands for those on functions, which this kernel may refuse to load."""
    chosen = {Hook.IP_RCV: ("netif_rx",), Hook.NETIF_RECEIVE_SKB: ("netif_receive_skb",)}
    monkeypatch.setattr(session, "programs", lambda: (dict(chosen), ""))
    one = session.Session(SessionFilter(hooks=(Hook.IP_RCV,)), ring_bytes=4096, wake_every=1, cookies=False)
    with closing(one), Sender("mbph", 10, 0) as sender:
        assert one.programs.keys() == {Hook.IP_RCV}
        rings = [MappedRing(cpu, one.add_ring(cpu), 4096) for cpu in online_cpus()]
        one.attach()
        one.start()
        asyncio.run(sender.send())
        wait_for(lambda: one.counts()["calls"][:, Hook.NETIF_RECEIVE_SKB].sum() >= 10)
        one.stop()
        assert not one.counts()["lost"].any()
        assert not any(copies_in(ring)[0] for ring in rings)
        for ring in rings:
            ring.close()


def test_cpus_whose_numbers_have_gaps(monkeypatch):
    monkeypatch.setattr(session, "highest_possible_cpu", lambda: 4096)
    status = BpfSource.check()
    assert not status.ok
    assert "have gaps" in status.detail
    assert status.remedy == "`--source ftrace`"


def test_no_object(tmp_path):
    with pytest.raises(Unavailable, match=r"the programs are not built.*\./dev setup"):
        session.Session(SessionFilter(), ring_bytes=4096, wake_every=1, cookies=False, path=tmp_path / "mace.bpf.o")


@pytest.mark.parametrize(("kept", "missing"), [("", "CAP_PERFMON and CAP_BPF"), (",+bpf", "CAP_PERFMON")])
def test_without_rights(kept, missing):
    code = "from collector.bpf.source import BpfSource; s = BpfSource.check(); print(s.ok, s.detail, '|', s.remedy)"
    few_rights = ["setpriv", f"--bounding-set=-all{kept}", "--inh-caps=-all"]
    done = subprocess.run([*few_rights, sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said, _, remedy = done.stdout.partition("|")
    assert said.startswith("False")
    assert said.strip().endswith(f": {missing} missing")
    assert "CAP_BPF and CAP_PERFMON" in remedy
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


@pytest.mark.parametrize("cpus", [1, 3, 64])
def test_each_program_is_loaded_once_by_as_many_threads_as_cpus(monkeypatch, cpus):
    shares = []
    select = BpfObject.select
    monkeypatch.setattr(session.os, "sched_getaffinity", lambda _: range(cpus))
    monkeypatch.setattr(BpfObject, "select", lambda self, names: shares.append(names) or select(self, names))
    with closing(session.Session(SessionFilter(), ring_bytes=4096, wake_every=1, cookies=False)) as one:
        of_maps, *parts = shares
        assert not of_maps
        programs = sorted(name for names in one.programs.values() for name in names)
        assert len(parts) == min(cpus, len(programs))
        assert sorted(name for part in parts for name in part) == programs
        one.attach()
        assert one.attached == len(programs)


def test_a_ring_that_is_too_large():
    with pytest.raises(Unavailable, match=r"1,024 MiB.*ring_mib of at most 512$") as raised:
        session.Session(SessionFilter(), ring_bytes=1 << 30, wake_every=1, cookies=False)
    assert "\n" not in str(raised.value)


def test_the_verifiers_verdict_is_told(tmp_path):
    path = tmp_path / "mace.bpf.o"
    path.write_bytes(OBJECT.read_bytes().replace(CALL_OF_READ, CALL_OF_NOTHING))
    with pytest.raises(Unavailable, match=r"verifier.*9999") as raised:
        session.Session(SessionFilter(), ring_bytes=4096, wake_every=1, cookies=False, path=path)
    assert "\n" not in str(raised.value)


@pytest.mark.slow
@pytest.mark.needs("memory_cgroup")
def test_a_memory_limit():
    """A cgroup that has room for the programs, and for no ring."""
    one = session.Session(SessionFilter(), ring_bytes=512 << 20, wake_every=1, cookies=False)
    try:
        with memory_cgroup.limited(64), pytest.raises(Unavailable, match=r"no memory for a ring of 512 MiB; .*cgroup"):
            one.add_ring(0)
    finally:
        one.close()


def test_a_ring_that_is_too_small():
    with pytest.raises(ValueError, match="at least a page"):
        BpfConfig(ring_kib_per_cpu=1)
    assert [session.ring_bytes_of(kib) for kib in (1, 4, 5, 64, 100)] == [4096, 4096, 4096, 65536, 65536]
