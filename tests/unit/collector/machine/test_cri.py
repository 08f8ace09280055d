"""What a CRI socket may answer; tests/integration/test_pods.py has a real containerd."""

import contextlib
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import RequestReceived
from hypothesis import given
from hypothesis import strategies as st

from collector.machine import cri, name_checks
from collector.machine.cri import CriError, CriSocket, NoEvents, RuntimePods, fields
from collector.machine.grpc_calls import _message
from collector.machine.name_checks import check_cri
from collector.machine.namespace_names import NamespaceNames
from collector.machine.pods import Pod
from tests.containerd import message
from tests.measuring import wait_for

UID = "3b1f0c1a-5d3e-4a53-8f0e-1234567890ab"


@given(st.binary(max_size=200))
def test_damaged_messages_are_refused(data: bytes) -> None:
    try:
        for number, value in fields(data):
            assert number >= 0
            assert isinstance(value, int) or value in data
    except ValueError:
        pass


def test_fields_of_a_message() -> None:
    assert list(fields(message(f1="a", f2=300, f3=message(f1="b")))) == [(1, b"a"), (2, 300), (3, b"\n\x01b")]
    assert list(fields(b"\x09" + bytes(8) + b"\x15" + bytes(4))) == [(1, bytes(8)), (2, bytes(4))]
    for wrong in (b"\x0a\x05a", b"\x08", b"\x80" * 12, b"\x0b", b"\x09\x00"):
        with pytest.raises(ValueError, match="message: "):
            list(fields(wrong))


def test_one_message_that_is_not_compressed() -> None:
    assert _message(b"\0\0\0\0\x02ab") == b"ab"
    for wrong in (b"", b"\0\0\0\0\x03ab", b"\x01\0\0\0\x02ab", b"\0\0\0\0\x02ab\0\0\0\0\0"):
        with pytest.raises(ValueError, match="one gRPC message"):
            _message(wrong)


@contextlib.contextmanager
def served(path: Path, answer: Callable[[socket.socket], object]) -> Iterator[str]:
    """Serve a socket: each connection is given to `answer`, and then closed."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()

        def serve() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection, contextlib.suppress(OSError):
                    connection.recv(1 << 16)
                    answer(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield str(path)
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


SETTINGS = b"\0\0\0\x04\0\0\0\0\0"
GOAWAY = struct.pack(">BHBBIII", 0, 8, 7, 0, 0, 0, 2)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"", "closed before the answer"),
        (SETTINGS, r"no complete answer within 0\.2 s"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", r"no gRPC server|no complete answer"),
        (bytes(64), "no gRPC server"),
        (SETTINGS + GOAWAY, "ended the call"),
    ],
)
def test_servers_that_are_no_runtimes(answer: bytes, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cri, "_TIMEOUT_S", 0.2)

    def answered(connection: socket.socket) -> None:
        connection.sendall(answer)
        while answer and connection.recv(1 << 16):
            pass

    with served(tmp_path / "s", answered) as path:
        with pytest.raises(CriError, match=why):
            CriSocket(path).pods()
        status = check_cri([path])
        assert not status.ok
        assert re.search(why, status.detail)


def test_a_runtime_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cri, "_TIMEOUT_S", 0.1)
    done = threading.Event()
    with served(tmp_path / "s", lambda _: done.wait(60)) as path:
        with pytest.raises(CriError, match=r"no complete answer within 0\.1 s"):
            CriSocket(path).pods()
        done.set()


def test_the_end_does_not_wait_for_a_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cri, "_TIMEOUT_S", 3600)
    asked, done = threading.Event(), threading.Event()

    def hang(_: socket.socket) -> None:
        asked.set()
        done.wait(60)

    with served(tmp_path / "s", hang) as path:
        pods = RuntimePods([path], lambda: None)
        pods.want(frozenset({UID}))
        assert asked.wait(60)
        pods.close()
        assert pods.pods == {}
        done.set()


@contextlib.contextmanager
def runtime(path: Path, answers: dict[str, list[bytes] | None], *, lasting: str = "") -> Iterator[str]:
    """Serve the CRI: each method's answers, None for a method that is missing; calls of `lasting` do not end."""

    def serve(sock: socket.socket) -> None:
        connection = H2Connection(H2Configuration(client_side=False, header_encoding="utf-8"))
        connection.initiate_connection()
        with sock, contextlib.suppress(OSError):
            sock.sendall(connection.data_to_send())
            while data := sock.recv(1 << 16):
                for event in connection.receive_data(data):
                    if not isinstance(event, RequestReceived):
                        continue
                    stream = event.stream_id
                    method = dict(event.headers)[":path"].rpartition("/")[2]
                    told = answers[method]
                    head = [(":status", "200"), ("content-type", "application/grpc")]
                    if told is None:
                        connection.send_headers(stream, [*head, ("grpc-status", "12")], end_stream=True)
                        continue
                    connection.send_headers(stream, head)
                    for each in told:
                        connection.send_data(stream, struct.pack(">BI", 0, len(each)) + each)
                    if method != lasting:
                        connection.send_headers(stream, [("grpc-status", "0")], end_stream=True)
                sock.sendall(connection.data_to_send())

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        serving: list[threading.Thread] = []

        def accept() -> None:
            while True:
                try:
                    sock, _ = listening.accept()
                except OSError:
                    return
                serving.append(threading.Thread(target=serve, args=(sock,)))
                serving[-1].start()

        accepting = threading.Thread(target=accept)
        accepting.start()
        try:
            yield str(path)
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            for thread in (accepting, *serving):
                thread.join()


STATUS = message(f1="sandbox", f2=message(f1="db-0", f2=UID, f3="default"))
APP = message(f1="c", f2=message(f1="app"))


def test_events_and_the_status_that_an_event_lacks(tmp_path: Path) -> None:
    """An event of a deleted sandbox, and one of a pod without a proper name, tell nothing."""
    events = [
        message(f1="sandbox", f2=1, f4=STATUS),
        message(f1="sandbox", f2=1, f5=[APP, message(f1="d", f2=message(f1="sidecar"))]),
        message(f1="sandbox", f2=3),
        message(f1="other", f2=1, f4=message(f1="o", f2=message(f1="no/name", f2="u", f3="default"))),
    ]
    answers: dict[str, list[bytes] | None] = {"GetContainerEvents": events, "PodSandboxStatus": [message(f1=STATUS)]}
    with runtime(tmp_path / "s", answers) as path:
        assert list(CriSocket(path).events()) == [
            (UID, Pod("default/db-0")),
            (UID, Pod("default/db-0", "app,sidecar")),
        ]
    without: dict[str, list[bytes] | None] = {"GetContainerEvents": events[1:2], "PodSandboxStatus": None}
    with runtime(tmp_path / "t", without) as path:
        assert list(CriSocket(path).events()) == []
    with runtime(tmp_path / "u", {"GetContainerEvents": None}) as path, pytest.raises(NoEvents, match="status 12"):
        list(CriSocket(path).events())


@pytest.mark.parametrize("events", [True, False], ids=["events", "no events"])
def test_lists_are_fetched_now_and_then_if_events_come(
    events: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cri, "_NEW_CONTAINERS_S", 0.0)
    listed = [message(f1=STATUS)]
    told: list[bytes] | None = [message(f1="sandbox", f2=1, f4=STATUS, f5=APP)] if events else None
    answers = {"ListPodSandbox": listed, "ListContainers": [b""], "GetContainerEvents": told}
    with runtime(tmp_path / "s", answers, lasting="GetContainerEvents") as path:
        changed = threading.Event()
        pods = RuntimePods([path], changed.set)
        pods.want(frozenset({UID}))
        wait_for(lambda: pods.pods == {UID: Pod("default/db-0", "app" if events else "")}, what="the pod")
        if events:
            wait_for(pods._followed, what="the stream")
            assert pods._pause_s(0) == cri._RELIST_S
            # Nobody to name: the runtime is left alone.
            pods.want(frozenset())
            wait_for(lambda: not pods._events[path].alive, what="the end of the stream")
        else:
            wait_for(lambda: pods._events[path].never, what="the refusal")
            assert not pods._followed()
            assert pods._pause_s(0) == cri._NEW_CONTAINERS_S
        pods.close()


def test_no_thread_without_pods_or_sockets(tmp_path: Path) -> None:
    for sockets in ([], [str(tmp_path / "none")]):
        pods = RuntimePods(sockets, lambda: None)
        pods.want(frozenset({UID}))
        pods.wait(3600)
        assert pods._thread is None
        pods.close()


def test_the_log_folder_precedes_the_runtime(tmp_path: Path) -> None:
    (tmp_path / f"default_db-0_{UID}" / "postgres").mkdir(parents=True)
    names = NamespaceNames((), lambda: None, pod_logs=str(tmp_path), cri_sockets=())
    names._pods.look(frozenset({UID}))
    names._runtime_pods.pods = {UID: Pod("default/other"), "b": Pod("default/b")}
    assert names.outdated
    names.use()
    assert names._pods_used == {UID: Pod("default/db-0", "postgres"), "b": Pod("default/b")}


def test_check_of_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = check_cri([str(tmp_path / "none")])
    assert not status.ok
    assert "none exists" in status.detail
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "dead"))
    status = check_cri([str(tmp_path / "dead")])
    assert not status.ok
    assert "refused" in status.detail
    monkeypatch.setattr(name_checks, "is_installed", lambda: False)
    status = check_cri([str(tmp_path / "dead")])
    assert not status.ok
    assert "mace[cri]" in status.remedy
