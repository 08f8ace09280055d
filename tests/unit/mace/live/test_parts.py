"""What `mace check` says of a filter: where each source applies it, or why it cannot."""

import pytest

from collector import SOURCES, LiveSource
from contracts.config import CaptureConfig, Config
from contracts.errors import ConfigError
from contracts.interfaces import Status
from mace.live import parts


@pytest.fixture
def check(monkeypatch):
    for name, source in list(SOURCES.items()):
        status = Status(name != "kmod", "found", "load it" if name == "kmod" else "")
        monkeypatch.setitem(SOURCES, name, LiveSource(lambda status=status: status, source.make, source.choice))
    return lambda **capture: parts.statuses(Config(capture=CaptureConfig(**capture)))


def test_without_a_filter(check):
    found = check()
    assert [found[f"source {name}"].detail for name in SOURCES] == ["found"] * len(SOURCES)


def test_where_a_filter_is_applied(check):
    found = check(containers=("web",))
    assert found["source kmod"] == Status(False, "found", "load it")
    assert found["source bpf"].detail == (
        "found; only packets at container web and the bridges and outer devices on the way, chosen in the kernel"
    )
    assert found["source ftrace"].detail.endswith("chosen after reading: ftrace records every packet")


def test_a_filter_that_a_source_cannot_apply(check):
    found = check(protocols=("udp",))
    assert found["source bpf"].ok
    assert not found["source ftrace"].ok
    assert "[capture] protocols cannot be applied" in found["source ftrace"].detail
    assert "--source bpf" in found["source ftrace"].remedy


def test_a_protocol_that_nobody_knows(check):
    with pytest.raises(ConfigError, match="did you mean 'udp'"):
        check(protocols=("udpp",))
