"""The options that choose packets, and how they change `[capture]`."""

import argparse

import pytest

from contracts.config import CaptureConfig
from mace.commands import settings
from mace.commands.options import FilterOptions, typed, with_filter

NOTHING = ""
IN_FILE = """
[capture]
containers = ["db"]
netns = ["blue"]
devices = ["br0"]
protocols = ["icmp"]
sample_shift = 2
"""
FILE = CaptureConfig(containers=("db",), netns=("blue",), devices=("br0",), protocols=("icmp",), sample_shift=2)


def options(*argv):
    parser = argparse.ArgumentParser()
    with_filter(parser)
    return typed(FilterOptions, parser.parse_args(argv))


@pytest.mark.parametrize(
    ("argv", "file", "found"),
    [
        ((), NOTHING, CaptureConfig()),
        ((), IN_FILE, FILE),
        (("--container", "a", "b", "--container", "c"), NOTHING, CaptureConfig(containers=("a", "b", "c"))),
        (
            ("--device", "eth1", "--protocol", "udp", "6", "--sample", "1/8"),
            NOTHING,
            CaptureConfig(devices=("eth1",), protocols=("udp", "6"), sample_shift=3),
        ),
        # The command line alone says where packets are recorded.
        (
            ("--container", "web"),
            IN_FILE,
            CaptureConfig(containers=("web",), protocols=("icmp",), sample_shift=2),
        ),
        (
            ("--device", "eth1", "--protocol", "tcp"),
            IN_FILE,
            CaptureConfig(devices=("eth1",), protocols=("tcp",), sample_shift=2),
        ),
        (
            ("--sample", "1/1"),
            IN_FILE,
            CaptureConfig(containers=("db",), netns=("blue",), devices=("br0",), protocols=("icmp",)),
        ),
    ],
)
def test_options_replace_keys(tmp_path, argv, file, found):
    path = tmp_path / "mace.toml"
    path.write_text(file)
    assert settings.configured(path, chosen=options(*argv)).capture == found


@pytest.mark.parametrize("given", ["1/3", "1/0", "8", "2/8", "1/-8", "1/4294967296", "x", "1/8 ", "1/1_6"])
def test_a_sample_that_is_no_power_of_two(capsys, given):
    with pytest.raises(SystemExit):
        options("--sample", given)
    assert "expected 1/N, N a power of two up to 2147483648: 1/8, for example" in capsys.readouterr().err
