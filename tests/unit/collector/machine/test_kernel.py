"""The version of the running kernel, from the names that distributions give their kernels."""

import os
from types import SimpleNamespace

import pytest

from collector.machine.kernel import kernel_version


@pytest.mark.parametrize(
    ("release", "version"),
    [
        ("6.18.44-fc-v857", (6, 18)),
        ("5.10.0-46-cloud-amd64", (5, 10)),
        ("7.0-rc3", (7, 0)),
        ("6.11.0+", (6, 11)),
        ("6.1-custom", (6, 1)),
    ],
)
def test_the_first_two_numbers(monkeypatch, release, version):
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(release=release))
    assert kernel_version() == version
