"""The BPF programs on the running kernel: compared with ftrace, filtered, killed, attached again and again, refused."""

import asyncio
import contextlib
import ctypes
import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from collector.bpf import session
from collector.bpf.libbpf import Btf, library
from collector.bpf.object import OBJECT, OLD_OBJECT
from collector.bpf.source import BpfConfig, BpfSource
from collector.ftrace.source import FtraceConfig, FtraceSource
from collector.live.filter import SessionFilter
from collector.machine.devices import DeviceFollower
from contracts.errors import SourceError, Unavailable
from contracts.hooks import BY_HOOK, HOOKS, TRACEPOINTS, Hook
from contracts.records import Batch, Flag
from contracts.topology import Topology
from mace.lab import Spec, running
from tests.filtered_ftrace import Sender, cpu_choice

pytestmark = [pytest.mark.needs("root", "bpf", "netns"), pytest.mark.timeout(180)]

COUNT = 300
SIZE = 1213
"""Payload of the pings, bytes: their length distinguishes them from all other traffic."""
DEVICE_HOOKS = [info.hook for info in BY_HOOK.values() if info.has_device]


def programs_of(pid):
    """Return the ids of the BPF programs of which a process has a file descriptor."""
    found = set()
    for file in Path(f"/proc/{pid}/fdinfo").iterdir():
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
def test_attached_and_detached_again_and_again_under_a_flood():
    with Sender("mbpf", 200, cpu_choice()) as sender:
        one = session.Session(of(sender), ring_bytes=65536, wake_every=100, cookies=False)
        try:
            files = len(list(Path("/proc/self/fd").iterdir()))

            async def cycles():
                for _ in range(200):
                    await asyncio.gather(sender.send(), asyncio.to_thread(one.attach))
                    one.start()
                    assert one.attached == sum(map(len, one.programs.values()))
                    await sender.send()
                    one.stop()
                    await asyncio.gather(sender.send(), asyncio.to_thread(one.detach))

            asyncio.run(cycles())
            assert len(list(Path("/proc/self/fd").iterdir())) == files
            assert one.counts()["calls"].sum() >= 200 * sender.count
        finally:
            one.close()


# --- where the source cannot run ------------------------------------------------------------------------------


def test_without_btf(monkeypatch, tmp_path):
    monkeypatch.setattr(session, "BTF", tmp_path / "vmlinux")
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
    assert "the kernel refuses programs on its functions (Operation not permitted)" in status.detail
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


def test_what_the_kernel_allows_on_functions_is_loaded():
    """The trial with an empty program and the real programs come to the same, whatever this kernel allows."""
    chosen, refusal = session.programs()
    one = session.Session(
        SessionFilter(hooks=(Hook.NETIF_RX, Hook.IP_RCV)), ring_bytes=4096, wake_every=1, cookies=False
    )
    try:
        one.attach()
        assert one.refusal == refusal
        assert (Hook.IP_RCV in one.programs) == (not refusal)
        assert one.programs == {hook: chosen[hook] for hook in (Hook.NETIF_RX, Hook.IP_RCV) if hook in chosen}
        assert one.attached == sum(map(len, one.programs.values()))
    finally:
        one.close()
    with contextlib.closing(Btf()) as btf:
        assert btf.has_function("ip_rcv_core")
        assert not btf.has_function("no_such_function")
        with pytest.raises(FileNotFoundError):
            btf.try_function("no_such_function")


def test_cpus_whose_numbers_have_gaps(monkeypatch):
    monkeypatch.setattr(session, "highest_possible_cpu", lambda: 4096)
    status = BpfSource.check()
    assert not status.ok
    assert "have gaps" in status.detail
    assert status.remedy == "`--source ftrace`"


def test_no_object(tmp_path):
    with pytest.raises(Unavailable, match=r"the programs are not built.*\./dev setup"):
        session.Session(SessionFilter(), ring_bytes=4096, wake_every=1, cookies=False, path=tmp_path / "mace.bpf.o")


def test_without_rights():
    code = "from collector.bpf.source import BpfSource; s = BpfSource.check(); print(s.ok, s.detail, '|', s.remedy)"
    no_rights = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    done = subprocess.run([*no_rights, sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said, _, remedy = done.stdout.partition("|")
    assert said.startswith("False")
    assert "EPERM" in said
    assert "CAP_BPF and CAP_PERFMON" in remedy
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


def test_a_ring_that_is_too_small():
    with pytest.raises(ValueError, match="at least a page"):
        BpfConfig(ring_kib_per_cpu=1)
    assert [session.ring_bytes_of(kib) for kib in (1, 4, 5, 64, 100)] == [4096, 4096, 4096, 65536, 65536]
