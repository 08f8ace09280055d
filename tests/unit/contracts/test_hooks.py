"""Statements of the hook table about kernel releases."""

import pytest

from contracts.hooks import silent_on


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
