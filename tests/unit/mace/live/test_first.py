"""The choice of the live source, and its options."""

import asyncio
from dataclasses import replace

import pytest

from collector import SOURCES
from collector.ftrace import source as ftrace_source
from collector.kmod import source as kmod_source
from collector.live.filter import Choice, SessionFilter, wanted
from contracts import config
from contracts.config import CaptureConfig
from contracts.errors import ConfigError, SourceError, Unavailable
from mace.live.first import FirstThatOpens, choice_of, chooses_after_reading, name_of
from tests.made_capture import HEADER


def test_every_source_can_be_selected():
    assert list(config.SOURCES) == ["auto", *SOURCES]


class Made:
    """A live source that opens, or raises `error`."""

    def __init__(self, name, error=None):
        self.name, self.error, self.closed = name, error, 0
        self.discarded, self.cost = 7, ()

    async def open(self):
        if self.error is not None:
            raise self.error
        return replace(HEADER, source=self.name)

    async def aclose(self):
        self.closed += 1


def sources_that_open(monkeypatch, **errors):
    """Replace the live sources; `errors` has the error of each that does not open. Returns the sources as made."""
    made = {}

    def make(name):
        made[name] = Made(name, errors.get(name))
        return made[name]

    for name, source in SOURCES.items():
        monkeypatch.setitem(
            SOURCES, name, replace(source, make=lambda *_, name=name: make(name), follow=lambda **_: None)
        )
    return made


def opened(config, **options):
    """Open the configured source, and close it; returns its name and what it says of the choice."""

    async def work():
        source = FirstThatOpens(config, **options)
        assert (source.told, source.discarded) == ("", 0)
        try:
            header = await source.open()
            assert source.discarded == 7
            return header.source, source.told
        finally:
            await source.aclose()

    return asyncio.run(work())


NO_MODULE = Unavailable("kmod", "the module is not loaded", "load it")
NO_BTF = Unavailable("bpf", "no BTF", "another kernel")
OTHER_OBJECT = SourceError("bpf: no program x: rebuild it")
NO_TRACEFS = Unavailable("ftrace", "no tracefs", "mount it")


@pytest.mark.parametrize(
    ("errors", "name", "told"),
    [
        ({}, "kmod", "source kmod"),
        ({"kmod": NO_MODULE}, "bpf", "source bpf (not kmod: the module is not loaded (load it))"),
        (
            {"kmod": NO_MODULE, "bpf": NO_BTF, "ftrace": None},
            "ftrace",
            "source ftrace (not kmod: the module is not loaded (load it); not bpf: no BTF (another kernel))",
        ),
        (
            {"kmod": NO_MODULE, "bpf": OTHER_OBJECT},
            "ftrace",
            "source ftrace (not kmod: the module is not loaded (load it); not bpf: no program x: rebuild it)",
        ),
    ],
)
def test_auto_takes_the_best_that_opens_and_says_why_not_a_better_one(monkeypatch, errors, name, told):
    made = sources_that_open(monkeypatch, **errors)
    assert opened(CaptureConfig()) == (name, told)
    assert list(made) == list(SOURCES)[: list(SOURCES).index(name) + 1]
    assert {source.closed for source in made.values()} == {1}
    assert name_of(CaptureConfig()) == name


def test_auto_says_of_every_source_why_it_cannot_run(monkeypatch):
    sources_that_open(monkeypatch, kmod=NO_MODULE, bpf=NO_BTF, ftrace=NO_TRACEFS)
    with pytest.raises(Unavailable) as raised:
        opened(CaptureConfig())
    assert str(raised.value) == (
        "source auto: no source can run: not kmod: the module is not loaded (load it); not bpf: no BTF"
        " (another kernel); not ftrace: no tracefs (mount it)"
    )


def test_a_named_source_is_the_only_one_that_is_tried(monkeypatch):
    made = sources_that_open(monkeypatch, ftrace=NO_TRACEFS)
    assert opened(CaptureConfig(source="bpf")) == ("bpf", "source bpf")
    with pytest.raises(Unavailable, match="ftrace: no tracefs; mount it"):
        opened(CaptureConfig(source="ftrace"))
    assert list(made) == ["bpf", "ftrace"]
    assert name_of(CaptureConfig(source="ftrace")) == "ftrace"


def test_no_source_is_opened_to_learn_that_none_chooses_after_reading(monkeypatch):
    made = sources_that_open(monkeypatch, kmod=NO_MODULE)
    assert not chooses_after_reading(CaptureConfig())
    assert not chooses_after_reading(CaptureConfig(source="ftrace", devices=("eth1",)))
    assert chooses_after_reading(CaptureConfig(source="ftrace", containers=("web",)))
    assert not made


def test_with_a_container_auto_has_to_know_the_source(monkeypatch):
    made = sources_that_open(monkeypatch, kmod=NO_MODULE)
    assert not chooses_after_reading(CaptureConfig(containers=("web",)))
    assert list(made) == ["kmod", "bpf"]
    sources_that_open(monkeypatch, kmod=NO_MODULE, bpf=NO_BTF)
    assert chooses_after_reading(CaptureConfig(containers=("web",)))


def test_a_wrong_setting_is_no_reason_to_try_another_source(monkeypatch):
    made = sources_that_open(monkeypatch, kmod=ConfigError("no device 'eth9'"))
    with pytest.raises(ConfigError, match="eth9"):
        opened(CaptureConfig())
    assert list(made) == ["kmod"]


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
        path=False,
        netns=("/run/netns/blue", "/proc/1/ns/net"),
        devices=("lo",),
        l4_protocols=(17, 255),
        sample_shift=3,
    )


def test_the_host_has_its_configured_name():
    for name, source in SOURCES.items():
        assert source.make(CaptureConfig(source=name), None, "edge-7").config.host == "edge-7"


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
    sources_that_open(monkeypatch, kmod=NO_MODULE, bpf=NO_BTF)
    with pytest.raises(Unavailable, match=rf"not ftrace: ftrace's events have no .*, so that \[capture\] {keys}"):
        opened(config)


def test_where_packets_are_chosen():
    config = CaptureConfig(containers=("web", "db"), devices=("eth1",), protocols=("udp",), sample_shift=3)
    said = "only one packet in 8 of protocol udp at container web, container db, device eth1, chosen in the kernel"
    for name in ("kmod", "bpf"):
        assert choice_of(config, name) == Choice(said)
        assert choice_of(CaptureConfig(), name) == Choice()
    assert choice_of(CaptureConfig(), "ftrace") == Choice()
    by_name = "only packets at device eth1, chosen in the kernel: by name, in every network namespace"
    assert choice_of(CaptureConfig(devices=("eth1",)), "ftrace") == Choice(by_name)
    assert ftrace_source.configured(CaptureConfig(devices=("eth1",)), None).config.devices == ("eth1",)
    assert choice_of(CaptureConfig(containers=("web",)), "ftrace").after_reading
    assert ftrace_source.configured(CaptureConfig(containers=("web",), devices=("eth1",)), None).config.devices == ()
    on_the_way = "only packets at container web and the bridges and outer devices on the way, chosen in the kernel"
    assert choice_of(CaptureConfig(containers=("web",)), "bpf").told == on_the_way
    assert wanted(CaptureConfig(containers=("web",))).path
    assert not wanted(CaptureConfig(netns=("web",))).path


def test_a_device_whose_name_no_event_filter_can_hold():
    assert ftrace_source.configured(CaptureConfig(devices=('a"b',)), None).config.devices == ('a"b',)
    with pytest.raises(Unavailable, match="the kernel's event filter cannot hold"):
        ftrace_source.configured(CaptureConfig(devices=("a'b\"",)), None)


def test_a_recording_of_some_containers_needs_a_source_that_chooses_in_the_kernel(monkeypatch):
    config = CaptureConfig(containers=("web",))
    sources_that_open(monkeypatch, kmod=NO_MODULE, bpf=NO_BTF)
    name, told = opened(config)
    assert (name, told.split("; ")[-1]) == (
        "ftrace",
        "only packets at container web, chosen after reading: ftrace records every packet",
    )
    with pytest.raises(Unavailable, match=r"not bpf: .*; not ftrace: ftrace records every packet"):
        opened(config, raw=True)
    with pytest.raises(Unavailable, match="cannot be limited to containers"):
        choice_of(config, "ftrace", raw=True)
