"""The kernel versions in the hook table."""

import pytest

from contracts.hooks import ALONG, HOOKS, silent_on


@pytest.mark.parametrize(
    ("release", "silent"),
    [
        ("5.10.0-46-amd64", False),
        ("6.1.0-57-cloud-amd64", False),
        ("6.17.9", False),
        ("6.18.0", True),
        ("6.18-rc1", True),
        ("7.3.4+deb13-cloud-amd64", True),
        ("10.0", True),
        ("", False),
        ("unknown", False),
    ],
)
def test_kernels_that_free_read_datagrams_without_a_tracepoint(release, silent):
    assert bool(silent_on(release)) is silent


def test_every_hook_at_a_device_has_its_place_along_the_way():
    for way, hooks in ALONG.items():
        assert set(hooks) == {info.hook for info in HOOKS if info.way is way}
        assert len(set(hooks)) == len(hooks)
    assert set(ALONG) == {info.way for info in HOOKS if info.has_device}


def test_letters_of_hooks_are_distinct():
    assert len({info.letter for info in HOOKS}) == len(HOOKS)
