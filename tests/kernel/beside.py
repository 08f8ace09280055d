"""Machines that run beside the tests which only compute: a run is shorter by what the guests' tests take.

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
    """Put the tests into the order that this file begins with; what stands together stays together."""
    items.sort(key=lambda item: 0 if _alone(item) else 2 if item.path == _MACHINES else 1)


def _alone(item: pytest.Item) -> bool:
    return item.path.is_relative_to(_ALONE)


class Machines:
    """The machines of the kernels that were selected, so that -k 6.12 boots one. They start once, when they may."""

    def __init__(self, items: list[pytest.Item]) -> None:
        mine = [item for item in items if isinstance(item, pytest.Function) and item.path == _MACHINES]
        self._names = [item.callspec.params["name"] for item in mine]
        self._matrix: Matrix | None = None

    def before(self, item: pytest.Item) -> bool:
        """Whether the machines should run by now."""
        return self._matrix is None and bool(self._names) and not _alone(item)

    def started(self) -> Matrix:
        """All of them, under way."""
        if self._matrix is None:
            self._matrix = Matrix(self._names, Task())
        return self._matrix

    def end(self) -> None:
        """End those that still run."""
        if self._matrix is not None:
            self._matrix.end()
