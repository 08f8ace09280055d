"""The guest's tests, on every kernel: one test here for each.

All machines are started together, two at a time, and each test waits for its own.
"""

from collections.abc import Callable, Iterator

import pytest

from tests.kernel.kernels import KERNELS
from tests.kernel.matrix import TIMEOUT_S, Matrix, Task

pytestmark = [
    pytest.mark.slow,
    pytest.mark.needs("root", "qemu"),
    # Whichever test comes first waits for the fetching, too, and any for a machine that was started before its own.
    pytest.mark.timeout(3 * TIMEOUT_S),
]


@pytest.fixture(scope="module")
def matrix(request: pytest.FixtureRequest) -> Iterator[Matrix]:
    """Machines of the kernels that were selected, so that -k 6.12 boots one."""
    mine = [item for item in request.session.items if isinstance(item, pytest.Function) and item.path == request.path]
    chosen = {item.callspec.params["name"] for item in mine}
    with Matrix([name for name in KERNELS if name in chosen], Task()) as started:
        yield started


@pytest.mark.parametrize("name", KERNELS)
def test_the_module_on(name: str, matrix: Matrix, record_property: Callable[[str, object], None]) -> None:
    result = matrix.futures[name].result()
    if not result.good:
        pytest.fail(f"kernel {name} ({result.release}):\n{result.report()}", pytrace=False)
    print(f"kernel {name} ({result.release}): {result.output.strip().splitlines()[-1]}")
    record_property("release", result.release)
