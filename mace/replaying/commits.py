"""Commits parts that workers finish in any order: a recording's parts one after the other, each after its check."""

from __future__ import annotations

from collections.abc import Callable

from mace.replaying.assembly import Assembly
from mace.replaying.part import PartDone, PartTask


class Commits:
    """Finished parts that wait for the part before them."""

    def __init__(self, assembly: Assembly, told: Callable[[int, int], None]) -> None:
        """`told` is called with committed and total bytes after each commit."""
        self._assembly, self._told = assembly, told
        self._waiting: dict[tuple[int, int], PartDone] = {}
        self.repeated = 0
        """Number of parts that supposed a wrong state and are done again."""

    def __len__(self) -> int:
        """Return the number of finished parts that are not committed."""
        return len(self._waiting)

    def add(self, done: PartDone) -> PartTask | None:
        """Commit the parts of a recording whose turn it is after `done`.

        Returns the task of a part to do again, or None. Such a part began with a supposed state that was wrong; its new
        task has the right one. Raises the errors of `Assembly.commit`.
        """
        assembly, capture = self._assembly, done.capture
        self._waiting[capture, done.part] = done
        while (part := assembly.next_part(capture)) is not None:
            following = self._waiting.pop((capture, part), None)
            if following is None:
                return None
            if not assembly.follows(following):
                self.repeated += 1
                return assembly.task(capture, part)
            assembly.commit(following)
            self._told(assembly.bytes_committed, assembly.bytes_total)
        return None
