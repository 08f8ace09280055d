"""Runs a watch of this machine's devices in a thread of its own, and hands over its newest snapshot."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final, NamedTuple, Protocol

from contracts.errors import SourceError
from contracts.topology import Device, Sharer

log = logging.getLogger(__name__)

_STOP_S: Final = 10.0
"""How long the end of a run waits for the thread that follows devices: 100 times what it takes on a busy machine."""


class Snapshot(NamedTuple):
    """The machine's devices at one time."""

    devices: tuple[Device, ...] = ()
    """All devices with their roles, sorted."""
    on_host_network: tuple[Sharer, ...] = ()


class Watch(Protocol):
    """Watches the machine's devices. One thread calls `open`, then `step` again and again, and `close` at the end."""

    host_netns: int
    """Inode of the host's namespace; known after `open`."""

    def open(self) -> Snapshot:
        """Return the first snapshot; raises `Unavailable`."""
        ...

    def step(self) -> Snapshot | None:
        """Wait for a change for a while; return a new snapshot if there was one, else None."""
        ...

    def wake(self) -> None:
        """Make `step` return; callable from any thread at any time."""
        ...

    def close(self) -> None:
        """Release all resources; called after a failed `open` too."""
        ...


class WakeFile:
    """A file descriptor that becomes readable when another thread calls `wake`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fd = -1

    def open(self) -> None:
        """Create the file; before, `wake` has no effect."""
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        return self._fd

    def wake(self) -> None:
        """Make the file readable; callable from any thread at any time."""
        with self._lock:
            if self._fd >= 0:
                os.eventfd_write(self._fd, 1)

    def rest(self) -> None:
        """Make the file unreadable until the next `wake`."""
        os.eventfd_read(self._fd)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            os.close(self._fd)
            self._fd = -1


class Follower:
    """Follows the devices of this machine: a `collector.live.ring_source.FollowsDevices`."""

    def __init__(self, watch: Watch) -> None:
        self.host_netns = 0
        """Inode of the host's namespace; known after `open`."""
        self.on_host_network: tuple[Sharer, ...] = ()
        """Containers on the host's network, of the same snapshot as the devices that `poll` returned last."""
        self.on_news: Callable[[], object] = lambda: None
        """Called, from the follower's thread, when the next `poll` will return devices or raise."""
        self._watch = watch
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._newest: deque[Snapshot] = deque(maxlen=1)
        """Hands snapshots from the thread to `poll`; appending and popping are atomic."""
        self._failure: BaseException | None = None

    async def open(self) -> None:
        """Start following; the next `poll` returns the first snapshot. Raises `Unavailable`."""
        opened: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(opened,), name="mace-devices", daemon=True)
        self._thread.start()
        await asyncio.shield(asyncio.wrap_future(opened))
        self.host_netns = self._watch.host_netns

    def poll(self) -> tuple[Device, ...] | None:
        """Return all devices with their roles, sorted, if anything changed since the last call, else None.

        The call does not wait. It updates `on_host_network`; a container that joins or leaves the host's network is a
        change too. Raises `SourceError` if the follower's thread has failed.
        """
        if self._failure is not None:
            raise SourceError(f"devices can no longer be followed: {self._failure}") from self._failure
        try:
            devices, self.on_host_network = self._newest.popleft()
        except IndexError:
            return None
        return devices

    async def aclose(self) -> None:
        """Stop following. Safe to call again, and after a failed or cancelled `open`."""
        if self._thread is not None:
            self._stopping.set()
            self._watch.wake()
            await asyncio.to_thread(self._thread.join, _STOP_S)
            if self._thread.is_alive():
                log.warning("devices: the thread that follows them does not end; the run ends without it")
            self._thread = None

    def _run(self, opened: Future[None]) -> None:
        try:
            self._newest.append(self._watch.open())
            opened.set_result(None)
            while not self._stopping.is_set():
                taken = self._watch.step()
                if taken is not None:
                    self._newest.append(taken)
                    self.on_news()
        except BaseException as failure:  # noqa: BLE001 - handed to open() or poll(), which raise it
            if opened.done():
                self._failure = failure
                self.on_news()
            else:
                opened.set_exception(failure)
        finally:
            self._watch.close()
