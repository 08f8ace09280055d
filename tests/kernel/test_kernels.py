"""Runs the guest's tests on every kernel, one test here for each kernel.

These tests run last: their machines are started before the tests that only compute (`tests/kernel/beside.py`), and each
test waits for its own machine.
"""

from collections.abc import Callable

import pytest

from tests.kernel.kernels import KERNELS
from tests.kernel.matrix import TIMEOUT_S, Matrix

pytestmark = [
    pytest.mark.slow,
    pytest.mark.needs("root", "qemu"),
    # The first test also waits for fetching, and each test for machines that were started before its own.
    pytest.mark.timeout(3 * TIMEOUT_S),
]


@pytest.mark.parametrize("name", KERNELS)
def test_the_module_on(name: str, machines: Matrix, record_property: Callable[[str, object], None]) -> None:
    result = machines.futures[name].result()
    if not result.good:
        pytest.fail(f"kernel {name} ({result.release}):\n{result.report()}", pytrace=False)
    print(f"kernel {name} ({result.release}): {result.output.strip().splitlines()[-1]}")
    record_property("release", result.release)
