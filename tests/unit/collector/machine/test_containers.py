import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from collector.machine import containers
from collector.machine.containers import (
    NOBODY,
    ApiError,
    Called,
    ContainerApi,
    NameService,
    Sharing,
    called_by_process,
    id_in_cgroup,
    is_made_up,
    name_in_cgroup,
)
from collector.machine.netns import inode_of

ID = "9f7f73d4a4e5d34db251316f1463bf4e6e20f268029740e8613acf0acdbcfe5d"
OTHER_ID = "18e8ebc3ea9404758433a3603af59f30810204a79e565ceff21aef423fab2a18"
OWN_NETNS = inode_of("/proc/self/ns/net")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (f"0::/system.slice/docker-{ID}.scope\n", "9f7f73d4a4e5"),
        (f"12:memory:/docker/{ID}\n1:name=systemd:/docker/{ID}\n", "9f7f73d4a4e5"),
        (f"0::/machine.slice/libpod-{ID}.scope/container\n", "9f7f73d4a4e5"),
        (f"0::/machine.slice/libpod-conmon-{ID}.scope\n", ""),
        (f"0::/kubepods.slice/kubepods-burstable.slice/pod1.slice/cri-containerd-{ID}.scope", "9f7f73d4a4e5"),
        (f"0::/kubepods/besteffort/pod7e2/{ID}\n", "9f7f73d4a4e5"),
        (f"0::/kubepods.slice/crio-{ID}.scope\n", "9f7f73d4a4e5"),
        (f"0::/system.slice/kubelet.service/kubepods-burstable.slice:cri-containerd:{ID}\n", "9f7f73d4a4e5"),
        (f"0::/docker/{ID}/docker/{OTHER_ID}\n", "18e8ebc3ea94"),
        ("0::/lxc.payload.web/init.scope\n", "web"),
        ("0::/lxc/web\n", "web"),
        ("0::/machine.slice/machine-debian.scope/payload\n", "debian"),
        (r"0::/machine.slice/machine-web\x2d1.scope/payload", "web-1"),
        (r"0::/machine.slice/machine-qemu\x2d3\x2ddb.scope/libvirt/emulator", "qemu-3-db"),
        (r"0::/machine.slice/machine-lxc\x2D7\x2dmail.example.scope", "lxc-7-mail.example"),
        (r"0::/machine.slice/systemd-nspawn@foo\x2dbar.service/payload", "foo-bar"),
        ("0::/machine.slice/systemd-nspawn@foo-bar.service/payload", "foo-bar"),
        (r"0::/machine.slice/machine-gr\xc3\xb6\xc3\x9fe.scope", "größe"),
        (r"0::/machine.slice/machine-a\x5cb.scope", r"a\b"),
        (r"0::/machine.slice/machine-\xff.scope", r"\xff"),
        (r"0::/lxc.payload.web\x2d1/init.scope", r"web\x2d1"),
        ("0::/lxc.payload.\udcff/init.scope", r"\xff"),
        ("0::/user.slice/user-1000.slice/session-2.scope\n", ""),
        ("0::/\n", ""),
        ("", ""),
    ],
)  # fmt: skip
def test_name_in_cgroup(text: str, name: str) -> None:
    assert name_in_cgroup(text) == name
    # The name is the beginning of the whole id.
    assert id_in_cgroup(text) == next((one for one in (ID, OTHER_ID) if name and one.startswith(name)), "")


def test_a_process_outside_containers_has_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "name_in_cgroup", lambda _text: "")
    comm = Path("/proc/self/comm").read_text().strip()
    assert called_by_process(os.getpid()) == Called(f"{comm}[{os.getpid()}]")


def test_id_of_a_process_in_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "_cgroup_of", lambda _pid, _proc: f"0::/system.slice/docker-{ID}.scope")
    assert called_by_process(os.getpid()) == Called("9f7f73d4a4e5", ID)


def test_name_of_a_process_that_is_not_utf_8(tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"gr\xf6\xdfe")
    odd.symlink_to("/bin/sleep")
    with subprocess.Popen([odd, "60"]) as process:
        try:
            eventually(lambda: not called_by_process(process.pid).name.startswith("python"))
            assert called_by_process(process.pid).name == rf"gr\xf6\xdfe[{process.pid}]"
        finally:
            process.kill()


def test_name_of_a_process_that_has_ended() -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    assert called_by_process(ended.pid) == NOBODY


def test_made_up_names() -> None:
    assert is_made_up("netns-3b0ee13c-d0a8-e5a0-7b1c-4d7e1c7c3e5f")
    assert is_made_up("cni-3b0ee13c-d0a8-e5a0-7b1c-4d7e1c7c3e5f")
    assert not is_made_up("netns-1")
    assert not is_made_up("web")
    assert not is_made_up("")


def test_name_in_lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "_LABS", tmp_path)
    (tmp_path / "my-lab.json").write_text("{}")
    assert containers.name_in_lab("mace-my-lab-c12") == "c12"
    assert containers.name_in_lab("mace-no-lab-c1") == ""
    assert containers.name_in_lab("mace-my-lab") == ""
    assert containers.name_in_lab("my-lab-c1") == ""
    assert containers.name_in_lab("") == ""


# --- the API --------------------------------------------------------------------------------------

Answer = bytes | Callable[[socket.socket], None]


class Daemon:
    """A scripted container daemon. `answers`: path → answer; `asked`: the requested paths, in order."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.answers: dict[str, Answer] = {}
        self.asked: list[str] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen()
        self._connections: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection = self._listener.accept()[0]
                self._connections.append(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError, IndexError), connection, connection.makefile("rb") as lines:
            while line := lines.readline():
                path = line.split()[1].decode()
                while lines.readline().strip():
                    pass
                self.asked.append(path)
                answer = self.answers.get(path, http(404, b"{}"))
                if callable(answer):
                    answer(connection)
                    return
                connection.sendall(answer)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def runs(self, identity: str, name: str, pid: int, network_mode: str = "bridge") -> None:
        """Add a container."""
        listed = self.answers.get("/containers/json", http(200, b"[]"))
        assert isinstance(listed, bytes)
        entries = json.loads(listed.partition(b"\r\n\r\n")[2])
        entries.append({"Id": identity, "Names": [f"/{name}", "/friend/alias"]})
        self.answers["/containers/json"] = http(200, json.dumps(entries).encode())
        inspected = {"Id": identity, "State": {"Pid": pid}, "HostConfig": {"NetworkMode": network_mode}}
        self.answers[f"/containers/{identity}/json"] = http(200, json.dumps(inspected).encode())


def http(status: int, body: bytes) -> bytes:
    return b"HTTP/1.1 %d Whatever\r\nContent-Length: %d\r\n\r\n" % (status, len(body)) + body


def names(api: ContainerApi) -> dict[int, str]:
    """Return the names by inode of the network namespace."""
    return {inode: called.name for inode, called in api.running() if inode}


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path / "sock")
    yield daemon
    daemon.close()


def test_names_by_api(daemon: Daemon) -> None:
    daemon.runs(ID, "web", os.getpid())
    api = ContainerApi(daemon.path)
    assert api.running() == [(OWN_NETNS, Called("web", ID))]
    # A container that is known and lives is not inspected again.
    assert names(api) == {OWN_NETNS: "web"}
    assert daemon.asked == ["/containers/json", f"/containers/{ID}/json", "/containers/json"]


def test_a_container_that_shares_a_namespace_does_not_name_it(daemon: Daemon) -> None:
    daemon.runs(ID, "web", os.getpid())
    daemon.runs(OTHER_ID, "sidecar", os.getpid(), f"container:{ID}")
    assert names(ContainerApi(daemon.path)) == {OWN_NETNS: "web"}


def test_a_container_without_a_process_is_inspected_again(daemon: Daemon) -> None:
    daemon.runs(ID, "web", 0)
    api = ContainerApi(daemon.path)
    assert names(api) == {}
    daemon.answers[f"/containers/{ID}/json"] = http(200, json.dumps({"State": {"Pid": os.getpid()}}).encode())
    assert names(api) == {OWN_NETNS: "web"}


def test_a_container_that_ends_between_list_and_inspection(daemon: Daemon) -> None:
    daemon.runs(ID, "web", os.getpid())
    daemon.answers[f"/containers/{ID}/json"] = http(404, b'{"message": "No such container"}')
    assert names(ContainerApi(daemon.path)) == {}


def test_a_container_without_a_name_has_its_short_id(daemon: Daemon) -> None:
    daemon.runs(ID, "web", os.getpid())
    daemon.answers["/containers/json"] = http(200, json.dumps([{"Id": ID}]).encode())
    assert names(ContainerApi(daemon.path)) == {OWN_NETNS: "9f7f73d4a4e5"}


@pytest.mark.parametrize(
    "answer",
    [
        http(500, b'{"message": "out of order"}'),
        http(404, b"not found"),
        http(200, b"<html>"),
        http(200, b"\xff\xfe{"),
        http(200, b"null"),
        http(200, b'{"Id": 1}'),
        http(200, b'[1, "two"]'),
        http(200, b'[{"Id": 5}]'),
        http(200, b'[{"Id": ""}]'),
        http(200, b"[" * 200_000),
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n[]",
        b"HTTP/1.1 200 OK\r\nContent-Length: -4\r\n\r\n[",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"\0" * 100_000,
        lambda connection: connection.close(),
    ],
)
def test_an_api_with_invalid_answers(daemon: Daemon, answer: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "_API_TIMEOUT_S", 0.3)
    daemon.answers["/containers/json"] = answer
    with pytest.raises(ApiError):
        ContainerApi(daemon.path).running()


@pytest.mark.parametrize(
    "state", ["null", "[]", '{"State": 5}', '{"State": {"Pid": "many"}}', '{"State": {"Pid": -1}}']
)
def test_an_inspection_without_content(daemon: Daemon, state: str) -> None:
    daemon.runs(ID, "web", os.getpid())
    daemon.answers[f"/containers/{ID}/json"] = http(200, state.encode())
    assert names(ContainerApi(daemon.path)) == {}


def test_a_missing_api(tmp_path: Path) -> None:
    with pytest.raises(ApiError, match="No such file"):
        ContainerApi(str(tmp_path / "nothing")).running()
    (tmp_path / "file").touch()
    with pytest.raises(ApiError, match="refused"):
        ContainerApi(str(tmp_path / "file")).running()


def trickle(connection: socket.socket) -> None:
    """Send a few bytes from time to time, without end."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    with contextlib.suppress(OSError):
        while True:
            connection.sendall(b" ")
            time.sleep(0.01)


def hang(connection: socket.socket) -> None:
    connection.recv(1)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("answer", [hang, trickle])
def test_an_answer_without_end_is_cut_off(daemon: Daemon, answer: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "_API_TIMEOUT_S", 0.2)
    daemon.answers["/containers/json"] = answer
    # One answer never begins, the other would take hours: both are given up.
    with pytest.raises(ApiError):
        ContainerApi(daemon.path).running()


# --- the service ----------------------------------------------------------------------------------


@pytest.fixture
def service(daemon: Daemon) -> Iterator[NameService]:
    service = NameService([daemon.path, daemon.path], lambda: None)
    yield service
    service.close()


def eventually(condition: Callable[[], bool], limit_s: float = 5) -> None:
    end_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end_s, "it did not happen"
        time.sleep(0.005)


def test_containers_that_share_a_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parent process names Apptainer's containers, the control group all others."""
    with contextlib.ExitStack() as running:

        def process(title: str) -> subprocess.Popen[bytes]:
            started = running.enter_context(subprocess.Popen([title, "60"], executable="/bin/sleep"))
            running.callback(started.kill)
            return started

        web, other, plain, own = (process("sleep").pid for _ in range(4))
        argv = ["Apptainer runtime parent: probe", "-c", "sleep 60; :"]
        waiting = running.enter_context(subprocess.Popen(argv, executable="/bin/sh", start_new_session=True))
        running.callback(lambda: os.killpg(waiting.pid, signal.SIGKILL))
        children = Path(f"/proc/{waiting.pid}/task/{waiting.pid}/children")
        eventually(lambda: bool(children.read_text()))
        apptainer = int(children.read_text())
        cgroups = {
            web: f"0::/system.slice/docker-{ID}.scope",
            other: f"0::/docker/{OTHER_ID}",
            own: "0::/lxc.payload.ours/init.scope",
            os.getpid(): "0::/lxc.payload.ours/init.scope",
        }
        monkeypatch.setattr(containers, "_cgroup_of", lambda pid, _proc: cgroups.get(pid, "0::/"))
        sharing, pids = Sharing(), [web, other, plain, own, waiting.pid, apptainer, os.getpid()]
        assert Sharing().among([waiting.pid], 0.0) == set()  # it stays there if its container has another namespace
        assert called_by_process(apptainer) == Called(f"probe[{waiting.pid}]")
        docker, probe = Called(ID[:12], ID), Called(f"probe[{waiting.pid}]")
        assert sharing.among(pids, 0.0) == {docker, Called(OTHER_ID[:12], OTHER_ID), probe}
        cgroups[plain] = cgroups.pop(other)
        assert sharing.among(pids, 1.9) == {docker, Called(OTHER_ID[:12], OTHER_ID), probe}
        cgroups.clear()
        assert sharing.among(pids, 2.1) == {docker, Called(OTHER_ID[:12], OTHER_ID), probe}  # not asked again
        assert sharing.among([plain, apptainer], 2.2) == {Called(OTHER_ID[:12], OTHER_ID), probe}
        assert sharing.among([web], 2.3) == set()  # another process with that number
        assert sharing.among([], 2.4) == set()


def test_a_container_without_a_namespace_of_its_own_is_named(
    daemon: Daemon, service: NameService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(containers, "_RENAMED_S", 0.05)
    daemon.runs(ID, "web-tmp", os.getpid(), "host")
    daemon.runs(OTHER_ID, "nobody's question", os.getpid())
    service.want({}, frozenset((ID,)))
    service.wait(5)
    assert service.of_ids == {ID: "web-tmp"}
    for answer in ("web", "web-2"):
        del daemon.answers["/containers/json"]
        daemon.runs(ID, answer, os.getpid(), "host")
        eventually(lambda answer=answer: service.of_ids == {ID: answer})  # type: ignore[misc]
    # The name outlives the daemon.
    daemon.answers["/containers/json"] = http(503, b"")
    eventually(lambda: bool(service.errors))
    assert service.of_ids == {ID: "web-2"}


def test_the_service_asks_the_daemon_only_until_it_has_the_names(daemon: Daemon, service: NameService) -> None:
    assert OWN_NETNS is not None
    daemon.runs(ID, "web", os.getpid())
    service.want({OWN_NETNS: 1})
    service.wait(5)
    assert service.names == {OWN_NETNS: "web"}
    assert service.called == {OWN_NETNS: Called("web", ID)}
    asked = len(daemon.asked)
    for _ in range(20):
        service.want({OWN_NETNS: 1})
        time.sleep(0.01)
    assert len(daemon.asked) == asked


def test_a_container_that_is_renamed_has_its_new_name(
    daemon: Daemon, service: NameService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(containers, "_RENAMED_S", 0.05)
    assert OWN_NETNS is not None
    daemon.runs(ID, "web-tmp", os.getpid())
    service.want({OWN_NETNS: 1})
    service.wait(5)
    assert service.names == {OWN_NETNS: "web-tmp"}
    for name in ("web", "web-2", "web"):
        del daemon.answers["/containers/json"]
        daemon.runs(ID, name, os.getpid())
        eventually(lambda name=name: service.names == {OWN_NETNS: name})  # type: ignore[misc]
    # The service learns the name without another inspection.
    assert daemon.asked.count(f"/containers/{ID}/json") == 1


def test_names_survive_a_restart_of_the_daemon(
    daemon: Daemon, service: NameService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(containers, "_RENAMED_S", 0.05)
    assert OWN_NETNS is not None
    daemon.runs(ID, "web", os.getpid())
    service.want({OWN_NETNS: 1})
    service.wait(5)
    listed = daemon.answers["/containers/json"]
    daemon.answers["/containers/json"] = http(503, b"")
    eventually(lambda: bool(service.errors))
    assert service.names == {OWN_NETNS: "web"}
    daemon.answers["/containers/json"] = http(200, b"[]")  # a daemon first has to find them again
    eventually(lambda: not service.names)
    daemon.answers["/containers/json"] = listed
    eventually(lambda: service.names == {OWN_NETNS: "web"})


def test_a_daemon_without_names_is_asked_a_few_times_only(
    daemon: Daemon, service: NameService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(containers, "_RENAMED_S", 0.001)
    monkeypatch.setattr(containers, "_ASK_AGAIN_S", (0.001,) * 3)
    daemon.answers["/containers/json"] = http(200, b"[]")
    service.want({1: 1})
    eventually(lambda: len(daemon.asked) >= 4)
    time.sleep(0.05)
    assert len(daemon.asked) == 4


def test_the_new_name_is_there_within_five_seconds() -> None:
    # The pause plus the longest answer.
    assert containers._RENAMED_S + containers._API_TIMEOUT_S <= 5


def test_the_service_asks_again_while_a_namespace_has_no_name(daemon: Daemon, service: NameService) -> None:
    assert OWN_NETNS is not None
    daemon.runs(OTHER_ID, "starting", 0)
    service.want({OWN_NETNS: 1})
    service.wait(5)
    assert not service.names
    daemon.runs(ID, "web", os.getpid())
    eventually(lambda: service.names == {OWN_NETNS: "web"})


def test_a_new_namespace_with_an_old_inode_does_not_keep_the_name(daemon: Daemon, service: NameService) -> None:
    assert OWN_NETNS is not None
    daemon.runs(ID, "web", os.getpid())
    service.want({OWN_NETNS: 1})
    service.wait(5)
    del daemon.answers["/containers/json"]
    daemon.runs(OTHER_ID, "web2", os.getpid())
    service.want({OWN_NETNS: 2})
    assert not service.names
    eventually(lambda: service.names == {OWN_NETNS: "web2"})


@pytest.mark.timeout(60)
def test_a_hanging_daemon_delays_nothing(daemon: Daemon, service: NameService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "_API_TIMEOUT_S", 3600)
    daemon.answers["/containers/json"] = hang
    service.want({1: 1})
    service.wait(0.05)
    eventually(lambda: bool(daemon.asked))
    service.close()


def test_the_error_of_an_api_is_kept(daemon: Daemon, service: NameService) -> None:
    daemon.answers["/containers/json"] = http(500, b"")
    service.want({1: 1})
    service.wait(5)
    assert "HTTP 500" in service.errors[daemon.path]


def test_no_socket_no_thread(tmp_path: Path) -> None:
    service = NameService([str(tmp_path / "none")], lambda: None)
    service.want({1: 1})
    service.wait(5)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mace-")]
    service.close()
