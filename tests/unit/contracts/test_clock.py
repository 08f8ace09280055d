import ctypes
import subprocess

import pytest

from contracts import clock, wire
from contracts.clock import ClockPair, KernelClock
from contracts.errors import WireError

FIELDS = ("modes", "maxerror", "esterror", "status", "tai")
PROGRAM = """
#include <stddef.h>
#include <stdio.h>
#include <sys/timex.h>
int main(void)
{
    printf("%zu", sizeof(struct timex));
OFFSETS
}
"""


def test_a_pair_knows_the_kernels_state():
    pair = clock.measure()
    assert pair.uncertainty_ns >= 0
    assert pair.kernel is not None
    assert pair.kernel.state in ("synchronised", "unsynchronised")
    assert pair.kernel.max_error_ns >= 0
    assert wire.clock_of(wire.clock_fields(pair)) == pair


@pytest.mark.needs("cc")
def test_the_structure_is_that_of_the_c_library(tmp_path):
    told = "\n".join(f'    printf(" %zu", offsetof(struct timex, {name}));' for name in FIELDS)
    (tmp_path / "timex.c").write_text(PROGRAM.replace("OFFSETS", told))
    subprocess.run(["cc", "-o", tmp_path / "timex", tmp_path / "timex.c"], check=True)
    found = subprocess.run([tmp_path / "timex"], capture_output=True, text=True, check=True).stdout
    ours = [ctypes.sizeof(clock._Timex), *(getattr(clock._Timex, name).offset for name in FIELDS)]
    assert [int(word) for word in found.split()] == ours


def test_a_pair_without_the_kernels_state_is_written_as_before():
    pair = ClockPair(1, 2, 3)
    assert wire.clock_fields(pair) == {"monotonic_ns": 1, "utc_ns": 2, "uncertainty_ns": 3}
    assert str(pair) == "UTC - CLOCK_MONOTONIC = 1 ± 3 ns; how far UTC itself was off is not recorded"


@pytest.mark.parametrize(
    "kernel", [3, {}, {"state": 1}, {"state": "x", "max_error_ns": -1}, {"state": "x", "max_error_ns": 1 << 70}]
)
def test_hostile_clocks_are_refused(kernel):
    with pytest.raises(WireError):
        wire.clock_of(wire.clock_fields(ClockPair(1, 2, 3, KernelClock("x", 1, 1))) | {"kernel": kernel})
