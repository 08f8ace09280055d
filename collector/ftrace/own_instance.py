"""A trace instance for one tracer, with the ring of each CPU that is online.

The tracers that run beside a source (`scheduling`, `softirqs`) record their events in an instance of their own, so that
neither the source nor another program changes what they see.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterator
from typing import Final

from collector.ftrace import tracefs
from collector.ftrace.rings import PageBuffer, ReadRing
from collector.machine.kernel import online_cpus
from collector.pages.decoding import Stretch
from collector.pages.formats import parse_header_page

_PAGES: Final = 64
"""Pages that are decoded at once."""


class OwnInstance:
    """`open` and `close` are a pair. All errors are `Unavailable` and `SourceError`."""

    def __init__(self) -> None:
        self.instance: tracefs.Instance | None = None
        """None before `open` and after `close`."""
        self.cpus: list[int] = []
        """CPUs with a ring, in the order in which they were found online."""
        self._rings: dict[int, ReadRing] = {}

    def open(self, prepare: Callable[[tracefs.Instance], None]) -> None:
        """Make the instance, whose rings' pages go into `buffer`; `prepare` sets it up and starts it.

        If `prepare` fails, the instance is removed.
        """
        tracefs.refuse_pid_namespace()
        root = tracefs.find()
        tracefs.remove_leftovers(root)
        self.instance = instance = tracefs.Instance.create(root)
        # For a program that exits without close. After a kill the next run removes the instance.
        atexit.register(self._remove)
        try:
            self.buffer = PageBuffer(parse_header_page(instance.header_page()), _PAGES)
            prepare(instance)
        except BaseException:
            self.close()
            raise

    def open_cpus(self) -> list[int]:
        """Open the rings of CPUs that are online and have none yet, and return these CPUs."""
        assert self.instance is not None
        new = [cpu for cpu in online_cpus() if cpu not in self._rings]
        for cpu in new:
            self._rings[cpu] = ReadRing(self.instance.cpu(cpu) / "trace_pipe_raw", self.buffer.layout)
            self.cpus.append(cpu)
        return new

    def taken(self) -> Iterator[Stretch]:
        """Yield what the rings hold, CPU by CPU. A stretch's pages are in `buffer` until the next one is yielded."""
        for cpu, ring in self._rings.items():
            empty = False
            while not empty:
                taken = ring.take(self.buffer)
                empty = taken.empty
                if taken.pages:
                    yield Stretch(cpu, taken.pages, taken.skip)

    def close(self) -> None:
        """Remove the instance. Safe to call again."""
        try:
            self._remove()
        finally:
            atexit.unregister(self._remove)

    def _remove(self) -> None:
        for ring in self._rings.values():
            ring.close()
        self._rings.clear()
        self.cpus.clear()
        if self.instance is not None:
            instance, self.instance = self.instance, None
            instance.remove()
