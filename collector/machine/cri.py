"""Names of Kubernetes pods from a container runtime's CRI socket, where the kubelet's log folder cannot be seen.

containerd and CRI-O serve the Container Runtime Interface (k8s.io/cri-api, runtime.v1) by gRPC on a unix socket. MACE
asks for two lists: the sandboxes that are ready, and the containers. Only a few fields of them are read.

The socket has the rights of root on the machine. It is asked only while a pod is seen whose name the log folder does
not have.
"""

from __future__ import annotations

import importlib.util
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
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
_ASK_AGAIN_S: Final = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
"""Pauses between queries for missing pods; then as for new containers."""
_NEW_CONTAINERS_S: Final = 3.0


class CriError(Exception):
    """A runtime did not answer, or its answer is not understood."""


def is_installed() -> bool:
    """Return whether the library of the extra `cri` is installed."""
    return importlib.util.find_spec("h2") is not None


class CriSocket:
    """Lists the pods of one runtime."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._socket: socket.socket | None = None

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
                metadata = _bytes(sandbox, 2)
                pod, uid, namespace = (text_of(_bytes(metadata, number)) for number in (1, 2, 3))
                if pod_name(shown_name(namespace, pod)).pod and uid:
                    of_pod = started.get(_bytes(sandbox, 1), ())
                    found[uid] = Pod(shown_name(namespace, pod), containers_text(of_pod))
        except (OSError, ValueError) as failure:
            raise CriError(f"{self._path}: {failure}") from failure
        return found

    def interrupt(self) -> None:
        """Make `pods` fail if it is waiting in another thread."""
        sock = self._socket
        if sock is not None:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # not connected yet, or no longer

    def _calls(self, *calls: tuple[str, bytes]) -> list[bytes]:
        """Call methods, and return their answers. Raises `OSError`, and `ValueError` for an answer that is none."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
            self._socket = sock
            try:
                from collector.machine.grpc_calls import call  # noqa: PLC0415 (an extra)

                sock.settimeout(_TIMEOUT_S)
                sock.connect(self._path)
                return call(sock, [(_SERVICE + method, message) for method, message in calls], _TIMEOUT_S)
            finally:
                self._socket = None


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


def _bytes(message: bytes, number: int) -> bytes:
    """Return the last value of a field of bytes, empty without one."""
    return (_messages(message, number) or [b""])[-1]


# --- the thread -----------------------------------------------------------------------------------------


class RuntimePods(AskingThread):
    """Asks the runtimes for pods.

    `pods` is replaced, never modified; then `on_change` is called in the thread.
    """

    def __init__(self, sockets: Sequence[str], on_change: Callable[[], None]) -> None:
        super().__init__("mace-pod-names", on_change)
        self._sockets = sockets if is_installed() else ()
        self._wanted: frozenset[str] = frozenset()
        self._asking: CriSocket | None = None
        self.pods: Mapping[str, Pod] = {}
        """UID → pod, of the wanted ones."""
        self.errors: Mapping[str, str] = {}
        """Socket → error of the last query."""

    def want(self, uids: frozenset[str]) -> None:
        """Set the pods to name; new ones are asked for at once."""
        with self._condition:
            new, self._wanted = uids - self._wanted, uids
            if new and any(os.path.exists(path) for path in self._sockets):  # noqa: PTH110
                self._ask_for_new()

    def _interrupt(self) -> None:
        if (asking := self._asking) is not None:
            asking.interrupt()

    def _pause_s(self, attempt: int) -> float | None:
        if not self._wanted:
            return None
        missing = self._wanted - self.pods.keys()
        return _ASK_AGAIN_S[attempt] if missing and attempt < len(_ASK_AGAIN_S) else _NEW_CONTAINERS_S

    def _ask(self) -> None:
        # A pod whose sandbox has ended, or whose runtime does not answer, keeps its name while it is wanted.
        found = dict(self.pods)
        errors = {}
        for path in self._sockets:
            if not os.path.exists(path):  # noqa: PTH110
                continue
            self._asking = CriSocket(path)
            try:
                found |= self._asking.pods()
            except CriError as failure:
                errors[path] = str(failure)
            self._asking = None
            if self._stopping:
                return
        pods = {uid: pod for uid, pod in found.items() if uid in self._wanted}
        changed = pods != self.pods
        self.errors = errors
        if changed:
            self.pods = pods
        self._asked.set()
        if changed:
            self._on_change()
