"""Virtual machines that run beside the tests which measure nothing, so that a whole run takes less time.

tests on this kernel   integration tests that need tracefs or BPF; no virtual machine runs beside them
all others             two virtual machines at a time run beside them, at a lower priority
tests of the machines  each waits for its own machine
"""

import pytest

from tests.kernel.matrix import Matrix, Task
from tests.places import TESTS

_INTEGRATION = TESTS / "integration"
_THIS_KERNEL = {"tracefs", "bpf"}
_MACHINES = TESTS / "kernel" / "test_kernels.py"


def arrange(items: list[pytest.Item]) -> None:
    """Sort the tests into the order at the top of this file; within a group the order stays."""
    items.sort(key=lambda item: 0 if _alone(item) else 2 if item.path == _MACHINES else 1)


def _alone(item: pytest.Item) -> bool:
    needs = {name for mark in item.iter_markers("needs") for name in mark.args}
    return item.path.is_relative_to(_INTEGRATION) and bool(needs & _THIS_KERNEL)


class Machines:
    """The machines of the selected kernels: `-k 6.12` boots one. They start once, before the second group."""

    def __init__(self, items: list[pytest.Item]) -> None:
        mine = [item for item in items if isinstance(item, pytest.Function) and item.path == _MACHINES]
        self._names = [item.callspec.params["name"] for item in mine]
        self._matrix: Matrix | None = None

    def before(self, item: pytest.Item) -> bool:
        """Whether the machines have to start before this test."""
        return self._matrix is None and bool(self._names) and not _alone(item)

    def started(self) -> Matrix:
        """Start the machines unless they run; return them."""
        if self._matrix is None:
            self._matrix = Matrix(self._names, Task())
        return self._matrix

    def end(self) -> None:
        """End the machines that still run."""
        if self._matrix is not None:
            self._matrix.end()
