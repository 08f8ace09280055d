"""Loading, opening and closing, thousands of times and under load, leak nothing and cause no kernel complaint.

The kernel's messages are read from the serial line after the machine is off (tests/kernel/vm.py): any warning fails the
whole machine.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from contracts.hooks import Hook
from mace.lab import Lab
from tests.kernel.guest.conftest import KO, lab_ifindex, load, unload
from tests.kernel.guest.reader import Session, netns_fd, within

LOADS = 160
USES = 10
LEAK_KIB = 8192
"""Noise of what the kernel has cached, beside traffic. Seen are 52 KiB a load, and a module takes more; and 0.8 MiB a
use, of 1 MiB for contexts and 360 KiB for packets of each CPU that the module allocates for sessions."""
OPENS = 2000
LEAK_OF_OPENS_KIB = OPENS // 2
"""The same without traffic. A leak of a session's structure, a KiB, is twice that; one of a ring is sixteen times as
much, and is counted by name besides."""


def unreclaimable_kib() -> int:
    """Memory that the kernel holds and cannot give back: slabs, vmalloc and per-CPU memory."""
    subprocess.run(["sync"], check=True)
    Path("/proc/sys/vm/drop_caches").write_text("3")
    sizes = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE))
    return sum(int(sizes[name]) for name in ("SUnreclaim", "VmallocUsed", "Percpu"))


def modules_mappings() -> int:
    """Pieces of vmalloc memory that code of ours asked for."""
    return sum("[mace]" in line for line in Path("/proc/vmallocinfo").read_text().splitlines())


@contextlib.contextmanager
def flood(lab: Lab) -> Iterator[None]:
    """Traffic that does not stop meanwhile, from both containers, bounded to ten minutes."""
    with (
        lab.start_udp("c1", count=120_000, rate_pps=200),
        lab.start_ping("c2", count=30_000, interval_s=0.02),
    ):
        yield


def test_loads_and_unloads_under_flood(lab: Lab) -> None:
    load()
    unload()
    before = unreclaimable_kib()
    with flood(lab):
        # A shell, because a process of Python's for each of a thousand commands would take most of the time.
        script = f"i=0; while [ $i -lt {LOADS} ]; do insmod {KO} && rmmod mace || exit 1; i=$((i+1)); done"
        subprocess.run(["busybox", "sh", "-c", script], check=True)
    assert unreclaimable_kib() - before < LEAK_KIB


def test_loads_uses_and_unloads_under_flood(lab: Lab) -> None:
    """With a session that runs and is full each time, so that every probe is taken off while it fires."""
    before = unreclaimable_kib()
    with flood(lab):
        for _ in range(USES):
            load()
            with Session() as session:
                session.setup(subbuf_bytes=4096, subbufs=2).start()
                session.readable(1)
                session.stop()
                stats, records = session.stats(), session.read()
                assert stats["written"].sum() == len(records)
            unload()
    assert unreclaimable_kib() - before < LEAK_KIB


def test_opens_maps_and_closes(module: None) -> None:
    def cycles(count: int) -> None:
        for _ in range(count):
            with Session() as session:
                session.setup(subbuf_bytes=4096, subbufs=2)
                session.map(0)
                session.map(1)

    cycles(100)
    mapped = modules_mappings()
    before = unreclaimable_kib()
    cycles(OPENS)
    assert modules_mappings() == mapped
    assert unreclaimable_kib() - before < LEAK_OF_OPENS_KIB
    with Session() as session:
        assert session.cost()["calls"].sum() == 0


def test_starts_and_stops_under_flood_count_exactly(module: None, lab: Lab) -> None:
    """Whenever it is stopped and however small the ring: what was written is read, to the last record."""
    with flood(lab):
        for number in range(12):
            with Session() as session:
                session.setup(subbuf_bytes=4096, subbufs=2 + number % 3 * 6)
                before = session.cost()["calls"].sum()
                session.start()
                records = [session.read_for(0.05)]
                session.stop()
                # At most what a ring holds is left; a read gives all of it.
                records.append(session.read())
                assert len(session.read()) == 0
                stats = session.stats()
                after = session.cost()["calls"].sum()
                assert stats["written"].sum() == sum(map(len, records))
                # Every call is a record or a loss, but for those while the session came and went.
                assert (stats["written"] + stats["lost"]).sum() <= after - before


DATAGRAMS = 700
"""More than two CPUs' rings of four sub-buffers hold: each has room for 63 records."""


def test_produced_is_read_and_lost_exactly(module: None, lab: Lab) -> None:
    """So many datagrams were sent through one device, so many records were read or counted as lost."""
    index = lab_ifindex(lab, "c2")
    sender = within(lab.netns_path("c2").name, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    with sender, flood(lab):
        for subbufs in (2, 4, 256):
            fd = netns_fd(lab.netns_path("c2").name)
            with Session() as session:
                session.setup(
                    subbuf_bytes=4096,
                    subbufs=subbufs,
                    hooks=[Hook.NET_DEV_QUEUE],
                    devices=[(fd, index)],
                    l4_protos=[socket.IPPROTO_UDP],
                )
                os.close(fd)
                session.start()
                for _ in range(DATAGRAMS):
                    sender.sendto(bytes(64), (lab.address("remote"), 9))
                session.stop()
                stats = session.stats()
                assert (stats["written"] + stats["lost"]).sum() == DATAGRAMS
                assert stats["written"].sum() == len(session.read())
                assert (stats["lost"].sum() > 0) == (subbufs < 256)


def test_readers_that_are_killed_leave_nothing(module: None, lab: Lab) -> None:
    with Session() as session:
        session.setup(subbuf_bytes=4096, subbufs=8).start()  # what the module keeps once there was a session
    mapped = modules_mappings()
    with flood(lab):
        for _ in range(6):
            child = os.fork()
            if child == 0:
                session = Session().setup(subbuf_bytes=4096, subbufs=8).start()
                while True:
                    session.read_for(1)
            os.kill(child, 0)
            threading.Event().wait(0.05)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    assert modules_mappings() == mapped


def test_namespaces_come_and_go_while_everything_runs(module: None, lab: Lab) -> None:
    script = (
        "i=0; while [ $i -lt 5 ]; do"
        " ip netns add storm$i && ip link add s$i type veth peer name eth0 netns storm$i"
        " && ip link set s$i up && ip -n storm$i link set eth0 up && ip -n storm$i link set lo up"
        " && ip netns del storm$i || exit 1; i=$((i+1)); done"
    )
    with flood(lab), Session() as session:
        session.setup(subbufs=64, watermark=8).start()
        storm = subprocess.Popen(["sh", "-c", script])
        read = [session.read()]
        while storm.poll() is None:
            read.append(session.read_for(0.1))
        assert storm.returncode == 0
        session.stop()
        read.append(session.read())
        stats = session.stats()
    records = np.concatenate(read)
    assert stats["written"].sum() == len(records)
    assert sum(lost for _, lost in session.gaps) <= stats["lost"].sum()
    assert len(np.unique(records["netns"])) > 3


def test_sessions_come_and_go_beside_each_other(module: None, lab: Lab) -> None:
    """Threads that open, start, read, stop and close at random, while packets fly."""
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        try:
            for _ in range(6):
                with Session() as session:
                    session.setup(subbuf_bytes=4096, subbufs=int(random.integers(2, 9))).start()
                    records = [session.read_for(float(random.uniform(0, 0.03)))]
                    session.stop()
                    records.append(session.read())
                    assert session.stats()["written"].sum() == sum(map(len, records))
        except BaseException as failure:  # noqa: BLE001 - raised below
            failures.append(failure)

    with flood(lab):
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
