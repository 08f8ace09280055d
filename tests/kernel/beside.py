"""Virtual machines that run beside tests which only compute, so that the guests' tests take no extra time.

integration tests      the machine is theirs: they measure
all others             two virtual machines at a time beside them
tests of the machines  each waits for its own
"""

import pytest

from tests.kernel.matrix import Matrix, Task
from tests.places import TESTS

_ALONE = TESTS / "integration"
_MACHINES = TESTS / "kernel" / "test_kernels.py"


def arrange(items: list[pytest.Item]) -> None:
    """Sort the tests into the order given at the top of this file; the sort is stable."""
    items.sort(key=lambda item: 0 if _alone(item) else 2 if item.path == _MACHINES else 1)


def _alone(item: pytest.Item) -> bool:
    return item.path.is_relative_to(_ALONE)


class Machines:
    """The machines of the selected kernels (-k 6.12 boots one). They start once, when measuring tests are done."""

    def __init__(self, items: list[pytest.Item]) -> None:
        mine = [item for item in items if isinstance(item, pytest.Function) and item.path == _MACHINES]
        self._names = [item.callspec.params["name"] for item in mine]
        self._matrix: Matrix | None = None

    def before(self, item: pytest.Item) -> bool:
        """Return whether the machines should be started before a test."""
        return self._matrix is None and bool(self._names) and not _alone(item)

    def started(self) -> Matrix:
        """Return all machines, started."""
        if self._matrix is None:
            self._matrix = Matrix(self._names, Task())
        return self._matrix

    def end(self) -> None:
        """End the machines that still run."""
        if self._matrix is not None:
            self._matrix.end()
