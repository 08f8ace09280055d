"""The choice of the live source, and its options."""

import asyncio
import signal
from types import SimpleNamespace

import pytest

from collector import SOURCES, LiveSource
from collector.bpf import source as bpf_source
from collector.ftrace import source as ftrace_source
from collector.kmod import source as kmod_source
from collector.live.filter import Choice, SessionFilter, in_kernel, wanted
from contracts import config
from contracts.config import CaptureConfig
from contracts.errors import ConfigError, SourceError, Unavailable
from contracts.interfaces import Progress, Status
from correlator.engine import EngineConfig
from mace.live import pipeline
from tests.made_capture import HEADER


def test_every_source_can_be_selected():
    assert list(config.SOURCES) == ["auto", *SOURCES]


@pytest.mark.parametrize(
    ("kmod", "bpf", "ftrace", "name", "why"),
    [
        (Status(True, "x"), Status(True, "z"), Status(True, "y"), "kmod", ""),
        (
            Status(False, "the module is not loaded", "load it"),
            Status(True, "z"),
            Status(True, "y"),
            "ftrace",
            "(load it)",
        ),
        (Status(False, "a"), Status(True, "z"), Status(False, "no tracefs", "mount it"), "bpf", "(mount it)"),
        (
            Status(False, "a"),
            Status(False, "c"),
            Status(False, "b"),
            "ftrace",
            "not kmod: a; not ftrace: b; not bpf: c",
        ),
    ],
)
def test_auto_takes_the_best_and_says_why_not_a_better_one(monkeypatch, kmod, bpf, ftrace, name, why):
    monkeypatch.setitem(SOURCES, "kmod", LiveSource(lambda: kmod, kmod_source.configured, in_kernel))
    monkeypatch.setitem(SOURCES, "bpf", LiveSource(lambda: bpf, bpf_source.configured, in_kernel))
    monkeypatch.setitem(SOURCES, "ftrace", LiveSource(lambda: ftrace, ftrace_source.configured, ftrace_source.choice))
    found, reason = pipeline.chosen_source(CaptureConfig())
    assert found == name
    assert why in reason
    assert bool(reason) == (name != "kmod")
    assert type(pipeline.live_source(CaptureConfig())).__name__.lower() == f"{name}source"
    assert pipeline.chosen_source(CaptureConfig(source="kmod")) == ("kmod", "")


def test_the_module_gets_the_filter():
    capture = CaptureConfig(
        sample_shift=3,
        containers=("web",),
        netns=("blue", "/proc/1/ns/net"),
        devices=("lo",),
        protocols=("udp", "255"),
        ring_mib=4,
    )
    source = kmod_source.configured(capture, None)
    assert source.config.ring_kib_per_cpu == 4096
    assert source.config.wanted == SessionFilter(
        containers=("web",),
        netns=("/run/netns/blue", "/proc/1/ns/net"),
        devices=("lo",),
        l4_protocols=(17, 255),
        sample_shift=3,
    )


@pytest.mark.parametrize("name", ["kmod", "ftrace"])
def test_the_host_has_its_configured_name(name):
    source = pipeline.live_source(CaptureConfig(source=name), config.RunConfig(host="edge-7").host)
    assert source.config.host == "edge-7"
    assert pipeline.live_source(CaptureConfig(source=name)).config.host == ""


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"protocols": ("udpp",)}, "did you mean 'udp'"),
        ({"protocols": ("256",)}, "0 to 255"),
        ({"containers": ("",)}, "expected names or ids"),
        ({"netns": ("x",) * 17}, "at most 16"),
    ],
)
def test_unknown_names_are_refused(wrong, told):
    with pytest.raises(ConfigError, match=told):
        wanted(CaptureConfig(**wrong))


@pytest.mark.parametrize(
    ("filtered", "keys"),
    [({"sample_shift": 1}, "sample_shift"), ({"protocols": ("udp",), "netns": ("x",)}, "netns, protocols")],
)
def test_a_filter_that_ftrace_cannot_apply(monkeypatch, filtered, keys):
    config = CaptureConfig(**filtered)
    with pytest.raises(Unavailable, match=rf"\[capture\] {keys} cannot be applied"):
        ftrace_source.configured(config, None)
    sources_that_run(monkeypatch, "ftrace", "bpf")
    name, why = pipeline.chosen_source(config)
    assert name == "bpf"
    assert f"not ftrace: ftrace's events have no namespace, protocol or content, so that [capture] {keys}" in why


def sources_that_run(monkeypatch, *names):
    for name, source in SOURCES.items():
        status = Status(name in names, "-")
        monkeypatch.setitem(SOURCES, name, LiveSource(lambda status=status: status, source.make, source.choice))


def test_where_packets_are_chosen():
    config = CaptureConfig(containers=("web", "db"), devices=("eth1",), protocols=("udp",), sample_shift=3)
    said = "only one packet in 8 of protocol udp at container web, container db, device eth1, chosen in the kernel"
    for name in ("kmod", "bpf"):
        assert pipeline.choice_of(config, name) == Choice(said)
        assert pipeline.choice_of(CaptureConfig(), name) == Choice()
    assert pipeline.choice_of(CaptureConfig(), "ftrace") == Choice()
    by_name = "only packets at device eth1, chosen in the kernel: by name, in every network namespace"
    assert pipeline.choice_of(CaptureConfig(devices=("eth1",)), "ftrace") == Choice(by_name)
    assert ftrace_source.configured(CaptureConfig(devices=("eth1",)), None).config.devices == ("eth1",)
    assert pipeline.choice_of(CaptureConfig(containers=("web",)), "ftrace").after_reading
    assert ftrace_source.configured(CaptureConfig(containers=("web",), devices=("eth1",)), None).config.devices == ()


def test_a_device_whose_name_no_event_filter_can_hold():
    assert ftrace_source.configured(CaptureConfig(devices=('a"b',)), None).config.devices == ('a"b',)
    with pytest.raises(Unavailable, match="the kernel's event filter cannot hold"):
        ftrace_source.configured(CaptureConfig(devices=("a'b\"",)), None)


def test_a_recording_of_some_containers_needs_a_source_that_chooses_in_the_kernel(monkeypatch):
    config = CaptureConfig(containers=("web",))
    sources_that_run(monkeypatch, "ftrace", "bpf")
    assert pipeline.chosen_source(config)[0] == "ftrace"
    assert pipeline.chosen_source(config, raw=True)[0] == "bpf"
    with pytest.raises(Unavailable, match="cannot be limited to containers"):
        pipeline.choice_of(config, "ftrace", raw=True)


def test_signal_handlers_are_restored():
    """SIGTERM removes a lab around a measurement, also after the measurement has ended."""
    told = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, _: told.append(number)) for number in numbers}

    async def measure(number):
        asked = asyncio.Event()
        async with pipeline.stopped_by_signals(SimpleNamespace(interrupt=asked.set)):
            signal.raise_signal(number)
            async with asyncio.timeout(30):
                await asked.wait()
        assert told == []

    try:
        for number in numbers:
            asyncio.run(measure(number))
            signal.raise_signal(number)
            assert told.pop() == number
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Draining:
    """A source that still yields items after it was asked to stop."""

    def __init__(self):
        self.begun, self.asked, self.drained = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.discarded, self.cost = 0, ()

    async def open(self):
        return HEADER

    async def items(self):
        self.begun.set()
        await self.asked.wait()
        await self.drained.wait()
        yield Progress(1)

    def request_stop(self):
        self.asked.set()

    async def aclose(self):
        pass


@pytest.mark.parametrize(("signals", "cut_off"), [(0, False), (1, False), (2, True)])
def test_only_the_second_signal_ends_a_run_at_once(signals, cut_off):
    async def measure():
        source, stop = Draining(), pipeline.Stop()
        work = asyncio.create_task(pipeline.run(source, [], engine=EngineConfig(), stop=stop))
        await source.begun.wait()
        stop.request()
        for _ in range(signals):
            stop.interrupt()
        if not cut_off:
            source.drained.set()
        async with asyncio.timeout(30):
            await work

    if cut_off:
        with pytest.raises(SourceError, match="by a second signal"):
            asyncio.run(measure())
    else:
        asyncio.run(measure())
