"""The levels of names that `mace check` reports, with what is missing for each."""

import socket

import pytest

from collector.machine import name_checks
from collector.machine.containers import ApiError
from collector.machine.name_checks import check_pods, check_processes, check_runtimes


@pytest.fixture
def proc(tmp_path, monkeypatch):
    """Provide a /proc of a machine whose processes are all visible."""
    monkeypatch.setattr(name_checks, "in_initial_pid_namespace", lambda _: True)
    (tmp_path / "1/net/stat").mkdir(parents=True)
    (tmp_path / "1/cgroup").write_text("0::/init.scope\n")
    return tmp_path


def test_processes_of_the_machine_are_visible(proc):
    assert check_processes(proc).ok


def test_hidden_processes(proc):
    (proc / "1/cgroup").unlink()
    status = check_processes(proc)
    assert not status.ok
    assert "hidden" in status.detail
    assert "hidepid" in status.remedy


def test_in_a_container_of_its_own(proc, monkeypatch):
    monkeypatch.setattr(name_checks, "in_initial_pid_namespace", lambda _: False)
    status = check_processes(proc)
    assert not status.ok
    assert "hostPID" in status.remedy


def test_no_runtime(tmp_path):
    status = check_runtimes([str(tmp_path / "none.sock")])
    assert not status.ok
    assert "none.sock" in status.detail
    assert "container_sockets" in status.remedy


def test_a_runtime_that_does_not_listen(tmp_path):
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "dead.sock"))
    status = check_runtimes([str(tmp_path / "dead.sock")])
    assert not status.ok
    assert "dead.sock" in status.detail
    assert status.remedy


class MadeApi:
    """A container API with two containers, or an error."""

    def __init__(self, path):
        self.path = path

    def running(self):
        if "bad" in self.path:
            raise ApiError(f"{self.path}: HTTP 500")
        return [1, 2]


def test_a_runtime_that_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(name_checks, "ContainerApi", MadeApi)
    (tmp_path / "good.sock").touch()
    status = check_runtimes([str(tmp_path / "none.sock"), str(tmp_path / "good.sock")])
    assert (status.ok, status.detail) == (True, f"2 containers at {tmp_path}/good.sock")


def test_a_runtime_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(name_checks, "ContainerApi", MadeApi)
    (tmp_path / "bad.sock").touch()
    assert check_runtimes([str(tmp_path / "bad.sock")]).detail.endswith("HTTP 500")


def test_a_socket_that_this_user_may_not_open(tmp_path, monkeypatch):
    monkeypatch.setattr(name_checks.os, "access", lambda *_: False)
    (tmp_path / "closed.sock").touch()
    status = check_runtimes([str(tmp_path / "closed.sock")])
    assert not status.ok
    assert "cannot be opened by this user" in status.detail
    assert "rights of root" in status.remedy


def test_a_log_folder_of_pods(tmp_path):
    (tmp_path / "default_web-0_3b1f0c1a-5d3e-4a53-8f0e-1234567890ab").mkdir()
    (tmp_path / "other").mkdir()
    status = check_pods(str(tmp_path))
    assert status.ok
    assert status.detail.startswith("1 pods in ")


def test_no_log_folder_of_pods(tmp_path):
    (tmp_path / "file").write_text("")
    for folder, why in (("", "empty"), (str(tmp_path / "none"), "does not exist"), (str(tmp_path / "file"), "listed")):
        status = check_pods(folder)
        assert not status.ok
        assert why in status.detail
        assert status.remedy
