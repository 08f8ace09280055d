"""Names of Kubernetes pods from a container runtime's CRI socket, where the kubelet's log folder cannot be seen.

containerd and CRI-O serve the Container Runtime Interface (k8s.io/cri-api, runtime.v1) by gRPC on a unix socket. MACE
asks for two lists: the sandboxes that are ready, and the containers. Only a few fields of them are read. Where the
runtime has a stream of events (containerd from 1.7, CRI-O if it is switched on), each event has the state of one pod,
and the lists are fetched once a minute; elsewhere every few seconds.

The socket has the rights of root on the machine. It is asked only while a pod is seen whose name the log folder does
not have.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Final

from collector.machine.asking import AskingThread
from collector.machine.pods import Pod, containers_text
from contracts.names import text_of
from contracts.pods import is_container_name, pod_name, shown_name

CRI_SOCKETS: Final = ("/run/containerd/containerd.sock", "/run/crio/crio.sock")
_SERVICE: Final = "/runtime.v1.RuntimeService/"
_READY_SANDBOXES: Final = bytes.fromhex("0a021200")
"""ListPodSandboxRequest{filter {state {state: SANDBOX_READY (0, the default)}}}."""
_TIMEOUT_S: Final = 2.0
_ASK_AGAIN_S: Final = (0.05, 0.1, 0.2, 0.4, 0.8, *(1.0,) * 60)
"""Pauses between queries for missing pods; then as for new containers. A sandbox is not ready before its CNI plugins
have ended, which is within a minute."""
_NEW_CONTAINERS_S: Final = 3.0
_RELIST_S: Final = 60.0
"""Interval of the lists if events tell what is new: a stream that has broken silently costs at most this."""
_DELETED: Final = 3
"""ContainerEventType CONTAINER_DELETED_EVENT."""


class CriError(Exception):
    """A runtime did not answer, or its answer is not understood."""


class NoEvents(CriError):
    """A runtime has no stream of events."""


def is_installed() -> bool:
    """Return whether the library of the extra `cri` is installed."""
    return importlib.util.find_spec("h2") is not None


class CriSocket:
    """Lists the pods of one runtime."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._socket: socket.socket | None = None

    def events(self) -> Iterator[tuple[str, Pod]]:
        """Yield the UID and the state of a pod after each event in it, until the runtime ends the stream.

        Raises `CriError`, and `NoEvents` if the runtime has no such stream. Waits for ever, until `interrupt`.
        """
        from collector.machine.grpc_calls import Unimplemented, stream  # noqa: PLC0415 (an extra)

        try:
            with self._connected() as sock:
                for event in stream(sock, f"{_SERVICE}GetContainerEvents", b""):
                    # containerd leaves the state out if it has failed to read it.
                    if not (status := _bytes(event, 4)) and _number(event, 2) != _DELETED:
                        status = self._sandbox_status(_bytes(event, 1))
                    uid, name = _named(status)
                    if uid:
                        names = {text_of(_bytes(_bytes(one, 2), 1)) for one in _messages(event, 5)}
                        yield uid, Pod(name, containers_text(filter(is_container_name, names)))
        except Unimplemented as failure:
            raise NoEvents(str(failure)) from failure
        except (OSError, ValueError) as failure:
            raise CriError(f"{self._path}: {failure}") from failure
        finally:
            self._socket = None

    def _sandbox_status(self, sandbox: bytes) -> bytes:
        """Return the PodSandboxStatus of a sandbox; empty if there is no such sandbox."""
        with suppress(CriError):
            return CriSocket(self._path).status(sandbox)
        return b""

    def status(self, sandbox: bytes) -> bytes:
        """Return the PodSandboxStatus of the sandbox with this id; raises `CriError`."""
        request = b"\x0a" + bytes([len(sandbox)]) + sandbox  # PodSandboxStatusRequest{pod_sandbox_id}; up to 127 bytes
        try:
            return _bytes(self._calls(("PodSandboxStatus", request))[0], 1)
        except (OSError, ValueError) as failure:
            raise CriError(f"{self._path}: {failure}") from failure

    def pods(self) -> dict[str, Pod]:
        """Return the pods whose sandbox is ready, by UID; raises `CriError`."""
        try:
            sandboxes, containers = self._calls(
                ("ListPodSandbox", _READY_SANDBOXES),
                ("ListContainers", b""),
            )
            started: dict[bytes, set[str]] = {}
            for container in _messages(containers, 1):
                name = text_of(_bytes(_bytes(container, 3), 1))
                if is_container_name(name):
                    started.setdefault(_bytes(container, 2), set()).add(name)
            found = {}
            for sandbox in _messages(sandboxes, 1):
                uid, name = _named(sandbox)
                if uid:
                    found[uid] = Pod(name, containers_text(started.get(_bytes(sandbox, 1), ())))
        except (OSError, ValueError) as failure:
            raise CriError(f"{self._path}: {failure}") from failure
        return found

    def interrupt(self) -> None:
        """Make `pods` fail, and `events` end, if they wait in another thread."""
        sock = self._socket
        if sock is not None:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # not connected yet, or no longer

    def _calls(self, *calls: tuple[str, bytes]) -> list[bytes]:
        """Call methods, and return their answers. Raises `OSError`, and `ValueError` for an answer that is none."""
        from collector.machine.grpc_calls import call  # noqa: PLC0415 (an extra)

        with self._connected() as sock:
            try:
                return call(sock, [(_SERVICE + method, message) for method, message in calls], _TIMEOUT_S)
            finally:
                self._socket = None

    def _connected(self) -> socket.socket:
        """Return a connected socket, which `interrupt` shuts down. Raises `OSError`."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket = sock
        try:
            sock.settimeout(_TIMEOUT_S)
            sock.connect(self._path)
        except BaseException:
            sock.close()
            raise
        return sock


def _named(sandbox: bytes) -> tuple[str, str]:
    """Return UID and name of the pod of a PodSandbox or a PodSandboxStatus; two empty texts without a proper name."""
    metadata = _bytes(sandbox, 2)
    pod, uid, namespace = (text_of(_bytes(metadata, number)) for number in (1, 2, 3))
    name = shown_name(namespace, pod)
    return (uid, name) if uid and pod_name(name).pod else ("", "")


# --- messages (protobuf's encoding) ---------------------------------------------------------------------


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (number, value) of a message's fields; raises ValueError for damage. Fixed-size values are bytes."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        if tag & 7 == 0:
            number, at = _varint(message, at)
            yield tag >> 3, number
            continue
        if tag & 7 == 2:
            size, at = _varint(message, at)
        elif tag & 7 in (1, 5):
            size = 8 if tag & 7 == 1 else 4
        else:
            raise ValueError(f"message: wire type {tag & 7}")
        if size > len(message) - at:
            raise ValueError("message: a field is longer than the message")
        yield tag >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(message) and shift < 70:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise ValueError("message: a number has no end")


def _messages(message: bytes, number: int) -> list[bytes]:
    return [value for field, value in fields(message) if field == number and isinstance(value, bytes)]


def _number(message: bytes, number: int) -> int:
    """Return the last value of a field of a number, 0 without one."""
    return ([value for field, value in fields(message) if field == number and isinstance(value, int)] or [0])[-1]


def _bytes(message: bytes, number: int) -> bytes:
    """Return the last value of a field of bytes, empty without one."""
    return (_messages(message, number) or [b""])[-1]


# --- the thread -----------------------------------------------------------------------------------------


class _Events:
    """Follows the events of one runtime in a thread of its own; `note` is called there."""

    def __init__(self, path: str, note: Callable[[str, Pod], None]) -> None:
        self._cri, self._note = CriSocket(path), note
        self._ending = False
        self.since_s = time.monotonic()
        self.never = False
        """Whether the runtime has no events."""
        self._thread = threading.Thread(target=self._run, name="mace-pod-events", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether events still come."""
        return self._thread.is_alive()

    def leave(self) -> None:
        """Let the thread end: at once if it is connected, otherwise with the next event."""
        self._ending = True
        self._cri.interrupt()

    def end(self) -> None:
        """End the thread, and wait for it."""
        while self._thread.is_alive():
            self.leave()  # repeated: before the thread is connected an interrupt has no effect
            self._thread.join(0.05)

    def _run(self) -> None:
        try:
            for uid, pod in self._cri.events():
                if self._ending:
                    return
                self._note(uid, pod)
        except NoEvents:
            self.never = True
        except CriError:
            pass  # the lists say why the runtime does not answer


class RuntimePods(AskingThread):
    """Asks the runtimes for pods, and follows their events.

    `pods` is replaced, never modified; then `on_change` is called in one of the threads.
    """

    def __init__(self, sockets: Sequence[str], on_change: Callable[[], None]) -> None:
        super().__init__("mace-pod-names", on_change)
        self._sockets = sockets if is_installed() else ()
        self._wanted: frozenset[str] = frozenset()
        self._asking: CriSocket | None = None
        self._events: dict[str, _Events] = {}
        self._noted: dict[str, Pod] = {}
        """Pods of events since the lists were last asked for."""
        self.pods: Mapping[str, Pod] = {}
        """UID → pod, of the wanted ones."""
        self.errors: Mapping[str, str] = {}
        """Socket → error of the last query."""

    def want(self, uids: frozenset[str]) -> None:
        """Set the pods to name; new ones are asked for at once."""
        with self._condition:
            new, self._wanted = uids - self._wanted, uids
            if not uids:
                for events in self._events.values():
                    events.leave()
            if new and any(os.path.exists(path) for path in self._sockets):  # noqa: PTH110
                self._ask_for_new()

    def close(self) -> None:
        """End the threads, even if they wait for a runtime."""
        super().close()
        for events in self._events.values():
            events.end()

    def _note(self, uid: str, pod: Pod) -> None:
        """Use a pod's state from an event."""
        with self._condition:
            known = self.pods.get(uid)
            if not pod.containers and known is not None:
                pod = Pod(pod.name, known.containers)
            self._noted[uid] = pod
            if uid not in self._wanted or pod == known:
                return
            self.pods = {**self.pods, uid: pod}
        self._on_change()

    def _follow(self, path: str) -> None:
        """Follow the events of a runtime, unless it has none."""
        with self._condition:
            before = self._events.get(path)
            if self._wanted and not self._stopping and (before is None or not (before.alive or before.never)):
                self._events[path] = _Events(path, self._note)

    def _followed(self) -> bool:
        """Whether events tell what is new, of all runtimes, and did so already when the lists were last asked for."""
        there = [path for path in self._sockets if os.path.exists(path)]  # noqa: PTH110
        young_s = time.monotonic() - _NEW_CONTAINERS_S
        known = [self._events[path] for path in there if path in self._events]
        return len(known) == len(there) and all(one.alive and one.since_s < young_s for one in known)

    def _interrupt(self) -> None:
        if (asking := self._asking) is not None:
            asking.interrupt()

    def _pause_s(self, attempt: int) -> float | None:
        if not self._wanted:
            return None
        missing = self._wanted - self.pods.keys()
        if missing and attempt < len(_ASK_AGAIN_S):
            return _ASK_AGAIN_S[attempt]
        return _RELIST_S if self._followed() else _NEW_CONTAINERS_S

    def _ask(self) -> None:
        # A pod whose sandbox has ended, or whose runtime does not answer, keeps its name while it is wanted.
        with self._condition:
            found = dict(self.pods)
            self._noted = {}
        errors = {}
        for path in self._sockets:
            if not os.path.exists(path):  # noqa: PTH110
                continue
            self._follow(path)
            self._asking = CriSocket(path)
            try:
                found |= self._asking.pods()
            except CriError as failure:
                errors[path] = str(failure)
            self._asking = None
            if self._stopping:
                return
        self.errors = errors
        with self._condition:
            found |= self._noted  # newer than the lists
            pods = {uid: pod for uid, pod in found.items() if uid in self._wanted}
            changed = pods != self.pods
            if changed:
                self.pods = pods
        self._asked.set()
        if changed:
            self._on_change()
