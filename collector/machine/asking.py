"""A thread that asks services of the machine, so that one that hangs delays names alone."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable


class AskingThread(ABC):
    """Asks at once for what is new, and again after pauses, in a daemon thread that starts with the first question.

    A subclass sets what it wants and calls `_ask_for_new` with `_condition` held; its `_ask` sets `_asked` when all is
    asked, and returns early once `_stopping`.
    """

    def __init__(self, name: str, on_change: Callable[[], None]) -> None:
        self._name = name
        self._on_change = on_change
        self._condition = threading.Condition()
        self._asked = threading.Event()
        self._asked.set()
        self._fresh = False
        self._stopping = False
        self._thread: threading.Thread | None = None

    def wait(self, timeout_s: float) -> None:
        """Wait until the services were asked for all that is wanted, at most `timeout_s`; at once without services."""
        self._asked.wait(timeout_s)

    def close(self) -> None:
        """End the thread, even if it waits for a service."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        while self._thread is not None and self._thread.is_alive():
            # Repeated: before the thread is connected an interrupt has no effect.
            self._interrupt()
            self._thread.join(0.05)

    def _ask_for_new(self) -> None:
        if self._stopping:
            return
        self._asked.clear()
        self._fresh = True
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        self._condition.notify()

    def _run(self) -> None:
        attempt = 0
        while True:
            with self._condition:
                if not self._fresh and not self._stopping:
                    self._condition.wait(self._pause_s(attempt))
                if self._stopping:
                    return
                attempt = 0 if self._fresh else attempt + 1
                self._fresh = False
            self._ask()

    @abstractmethod
    def _pause_s(self, attempt: int) -> float | None:
        """Return the pause until the next query, s; None to wait for something new."""

    @abstractmethod
    def _ask(self) -> None:
        """Ask all services, in the thread."""

    @abstractmethod
    def _interrupt(self) -> None:
        """Let the thread's present wait for a service fail."""
