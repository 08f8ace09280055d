"""/dev/mace without a module: the requests to the kernel, and the errors when it refuses."""

import errno
import fcntl
import os
from pathlib import Path

import numpy as np
import pytest

from collector.kmod import device
from collector.kmod.device import MaceDevice
from collector.live.filter import SessionFilter
from collector.live.places import Places
from contracts import abi
from contracts.abi import Ioctl
from contracts.errors import SourceError, Unavailable
from contracts.hooks import Hook


class FakeModule:
    """Answers ioctl(2) on a file of ours."""

    def __init__(self, monkeypatch):
        self.hello = np.zeros((), abi.HELLO)
        self.hello["abi_major"], self.hello["abi_minor"] = abi.ABI_MAJOR, abi.ABI_MINOR
        self.hello["record_bytes"], self.hello["subbuf_head_bytes"] = 64, 64
        self.hello["hooks"], self.hello["flags"] = 0b1_1111_1110, abi.HelloFlag.ALL
        self.hello["cpus"], self.hello["version"] = 4, b"9.9"
        self.hello["ring_bytes_min"], self.hello["ring_bytes_max"] = 8192, 1 << 26
        self.online = (0, 2)
        self.refuse = {}
        self.asked = []
        monkeypatch.setattr(fcntl, "ioctl", self.ioctl)

    def ioctl(self, fd, request, argument=0, mutate=True):
        request = Ioctl(request)
        if error := self.refuse.get(request):
            raise OSError(error, os.strerror(error))
        if request in (Ioctl.START, Ioctl.STOP):
            self.asked.append((request, None))
            return 0
        into = np.frombuffer(argument, getattr(abi, request.name))
        self.asked.append((request, into.copy()))
        if request is Ioctl.HELLO:
            into[0] = self.hello
        elif request is Ioctl.SETUP:
            into["ring_bytes"] = into["subbuf_bytes"] * into["subbufs"]
            into["cpu_count"] = len(self.online)
        elif request is Ioctl.STATS:
            cpu = int(into["cpu"][0])
            if cpu != abi.ALL_CPUS and cpu not in self.online:
                raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
            into["written"][0][Hook.NETIF_RX] = 5
            into["lost"][0][Hook.KFREE_SKB] = 2
        elif request is Ioctl.TAKE:
            into["first"], into["ready"], into["now_ns"] = 3, 2, 77
        elif request is Ioctl.COST:
            into["calls"][0][:] = 640
            into["timed"][0][:] = 10
            into["timed_ns"][0][:] = 2500
        return 0

    def last(self, request):
        return [argument for name, argument in self.asked if name is request][-1]


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def module(monkeypatch):
    return FakeModule(monkeypatch)


@pytest.fixture
def opened(module):
    made = MaceDevice(Path("/dev/zero"))  # a character device that can be mapped
    yield made
    made.close()


def set_up(opened, **options):
    return opened.setup(subbuf_bytes=4096, subbufs=4, watermark=2, flush_ms=100, **options)


def test_hello(module, opened):
    hello = opened.hello
    assert (hello.abi, hello.version, hello.cpus) == ((abi.ABI_MAJOR, abi.ABI_MINOR), "9.9", 4)
    assert (hello.sees_all, hello.netns_gone, hello.cookies) == (True, False, False)
    # A later minor version may have unknown fields.
    module.hello["flags"] = abi.HelloFlag.COOKIES | 1 << 31
    hello = opened.greet()
    assert (hello.sees_all, hello.netns_gone, hello.cookies) == (False, False, True)
    assert hello.hooks == tuple(Hook)[1:9]
    module.hello["hooks"] = 1 << Hook.KFREE_SKB | 1 << 15
    assert opened.greet().hooks == (Hook.KFREE_SKB,)


def test_places_are_named_as_records_name_them(module, opened):
    opened.record_at(Places((1 << 33 | 7, 8), ((1 << 33 | 9, 3),)))
    asked = module.last(Ioctl.PLACES)[0]
    assert (asked["netns_count"], asked["device_count"]) == (2, 1)
    assert asked["netns"].tolist() == [7, 8, *[0] * 14]
    assert asked["device"][0].tolist() == (9, 3)
    module.refuse[Ioctl.PLACES] = errno.ENOMEM
    with pytest.raises(SourceError, match="PLACES: Cannot allocate memory"):
        opened.record_at(Places())


def test_a_module_that_cannot_choose_places(module):
    module.hello["abi_minor"] = 1
    opened = MaceDevice(Path("/dev/zero"))
    try:
        with pytest.raises(SourceError, match=rf"speaks ABI {abi.ABI_MAJOR}\.1, .* from 1\.2 on; `mace module build`"):
            opened.record_at(Places((7,)))
    finally:
        opened.close()


def test_another_abi_is_refused_with_both_versions_and_the_remedy(module):
    module.hello["abi_major"] = abi.ABI_MAJOR + 1
    with pytest.raises(SourceError) as caught:
        MaceDevice(Path("/dev/zero"))
    text = str(caught.value)
    assert f"ABI {abi.ABI_MAJOR + 1}.{abi.ABI_MINOR}" in text
    assert f" {abi.ABI_MAJOR}.{abi.ABI_MINOR};" in text
    assert "mace module build" in text
    module.refuse[Ioctl.HELLO] = errno.ENOTTY
    with pytest.raises(SourceError, match="does not answer a HELLO"):
        MaceDevice(Path("/dev/zero"))


def test_a_record_of_another_size_is_refused(module):
    module.hello["record_bytes"] = 72
    with pytest.raises(SourceError, match=r"\(72, 64\) bytes, expected \(64, 64\)"):
        MaceDevice(Path("/dev/zero"))


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.ENOENT, "the module is not loaded; `mace module load`"),
        (errno.ENXIO, "the module is not loaded"),
        (errno.EACCES, "may not be opened; run as root"),
        (errno.EPERM, "CAP_NET_RAW"),
        (errno.EBUSY, "max_sessions"),
        (errno.ENOMEM, "no memory"),
        (errno.EIO, "cannot be opened"),
    ],
)
def test_errors_of_open_have_a_remedy(module, monkeypatch, number, told):
    def refuse(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(Unavailable, match=told):
        MaceDevice()


def test_a_machine_without_the_module(tmp_path):
    with pytest.raises(Unavailable, match="is not loaded"):
        MaceDevice(tmp_path / "mace")


def test_setup_passes_the_configuration(module, opened):
    wanted = SessionFilter(
        netns=("/proc/self/ns/net",), l4_protocols=(6, 255), sample_shift=4, hooks=(Hook.NETIF_RX, Hook.KFREE_SKB)
    )
    assert set_up(opened, wanted=wanted) == module.online
    asked = module.last(Ioctl.SETUP)[0]
    assert [int(asked[n]) for n in ("abi_major", "subbuf_bytes", "subbufs", "watermark", "flush_ms")] == [
        abi.ABI_MAJOR,
        4096,
        4,
        2,
        100,
    ]
    given = asked["filter"]
    assert (given["hooks"], given["sample_shift"], given["netns_count"], given["device_count"]) == (0x108, 4, 0, 0)
    assert given["l4_protos"].tolist() == [1 << 6, 0, 0, 1 << 63]
    assert not any(int(asked[n]) for n in ("flags", "pad2", "pad3", "ring_bytes", "cpu_count"))
    set_up(opened, cookies=True)
    assert module.last(Ioctl.SETUP)[0]["flags"] == abi.SetupFlag.COOKIES


@pytest.mark.parametrize(
    ("number", "kind", "told"),
    [
        (errno.EPROTO, SourceError, "mace module build"),
        (errno.ENOMEM, Unavailable, "no memory for rings of 0.015625 MiB"),
        (errno.EOPNOTSUPP, Unavailable, "does not have all of the hooks"),
        (errno.EINVAL, Unavailable, "the module refuses"),
        (errno.EIO, SourceError, "SETUP: Input/output error"),
    ],
)
def test_errors_of_setup_have_a_remedy(module, opened, number, kind, told):
    module.refuse[Ioctl.SETUP] = number
    with pytest.raises(kind, match=told):
        set_up(opened)


def test_bounds_are_checked_before_the_kernel_refuses_them(module, opened):
    with pytest.raises(Unavailable, match="max_ring_mib"):
        opened.setup(subbuf_bytes=1 << 22, subbufs=32, watermark=2, flush_ms=100)
    assert not [name for name, _ in module.asked if name is Ioctl.SETUP]
    for wrong in ({"sample_shift": 32}, {"l4_protocols": (256,)}, {"netns": (None,) * 17}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SessionFilter(**wrong)


def test_a_wrong_count_of_rings_is_refused(module, opened, monkeypatch):
    monkeypatch.setattr(opened, "has_ring", lambda cpu: cpu == 0)
    with pytest.raises(SourceError, match="1 CPUs have a ring, the module says 2"):
        set_up(opened)


def test_take_stats_cost(module, opened):
    taken = opened.take(2, release=3, flush=True)
    assert (taken.first, taken.ready, taken.now_ns) == (3, 2, 77)
    asked = module.last(Ioctl.TAKE)[0]
    assert [int(asked[n]) for n in ("cpu", "flags", "release")] == [2, abi.TakeFlag.FLUSH, 3]
    opened.take(0)
    assert module.last(Ioctl.TAKE)[0]["flags"] == 0
    stats = opened.stats()
    assert module.last(Ioctl.STATS)[0]["cpu"] == abi.ALL_CPUS
    assert (stats.written[Hook.NETIF_RX], stats.lost[Hook.KFREE_SKB], stats.written.sum()) == (5, 2, 5)
    cost = opened.cost()
    assert [(c.hook, c.calls, c.timed, c.ns_per_call) for c in cost] == [(h, 640, 10, 250) for h in tuple(Hook)[1:9]]
    opened.start()
    opened.stop()
    assert [name for name, _ in module.asked[-2:]] == [Ioctl.START, Ioctl.STOP]


def test_a_session_of_one_namespace_has_no_cost(module):
    module.hello["flags"] = 0
    one = MaceDevice(Path("/dev/zero"))
    assert one.cost() == ()
    one.close()


def test_a_call_that_fails_is_named(module, opened):
    module.refuse[Ioctl.TAKE] = errno.EINVAL
    with pytest.raises(SourceError, match="/dev/zero: TAKE: Invalid argument"):
        opened.take(0)


def test_a_ring_is_mapped_read_only_and_unmapped(module, opened):
    set_up(opened)
    ring = opened.map(2)
    assert len(ring) == 4 * 4096
    assert memoryview(ring).readonly
    opened.close()
    assert ring.closed
    opened.close()


def test_a_view_that_outlives_the_mapping_does_not_crash(module, opened):
    set_up(opened)
    view = np.frombuffer(opened.map(0), np.uint8)
    opened.close()
    assert view.sum() == 0


def test_no_descriptor_is_left_behind(module):
    before = open_files()
    module.hello["abi_major"] = 99
    with pytest.raises(SourceError):
        MaceDevice(Path("/dev/zero"))
    assert open_files() == before
    assert str(device.PATH) == "/dev/mace"
