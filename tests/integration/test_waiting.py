"""A tool that has to wait for a CPU in a real container: the waits are found, and come out of the host RTT."""

import json
import os
import re
import subprocess
import sys
from contextlib import ExitStack, contextmanager

import pytest

from mace.lab import HOST, REMOTE, Spec, running
from mace.trials.experiment import load
from tests.measuring import (
    MACE,
    TRACE_INSTANCES,
    mace,
    measured,
    on_one_cpu,
    trace_instances,
    wait_for,
    well_traced_cpu,
)
from tests.places import ROOT

pytestmark = [pytest.mark.needs("root", "tracefs", "netns"), pytest.mark.slow]

COUNT = 40
HOG = (
    "import time\n"
    "while True:\n"
    "    until = time.monotonic() + 0.006\n"
    "    while time.monotonic() < until: pass\n"
    "    time.sleep(0.004)\n"
)
"""It takes a CPU from everything else for 6 ms of 10, as a process with a real-time priority."""
DELAY_S = "0.004"
"""Until the far end answers: an answer that comes at once mostly finds the tool still running."""
CLIENT = f"""
import socket, struct, sys, time
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.connect((sys.argv[1], 53))
sock.settimeout(60)
question = struct.pack("!HHHHHH", 7, 0, 1, 0, 0, 0) + b"\\1x\\7example\\0" + struct.pack("!HH", 1, 1)
print("sent_utc_s,rtt_ms,protocol,id")
for n in range({COUNT}):
    time.sleep(0.005)
    wall, begin = time.time_ns(), time.perf_counter_ns()
    sock.send(question)
    sock.recv(512)
    took = time.perf_counter_ns() - begin
    print(f"{{wall // 10**9}}.{{wall % 10**9:09d}},{{took / 1e6:.6f}},udp,{{sock.getsockname()[1]}}")
"""
"""A tool that nobody knows, with the user's clock."""


@pytest.fixture(scope="module")
def lab():
    with running(Spec(name="waiting")) as place:
        place.ping("c1", count=2)
        yield place


@contextmanager
def ended(process):
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def there():
    return ("taskset", "-c", str(well_traced_cpu()))


def in_the_way():
    return ended(subprocess.Popen([*there(), "chrt", "--fifo", "1", sys.executable, "-c", HOG]))


def answering(lab):
    script = ROOT / "tests" / "answering.py"
    server = lab.popen(REMOTE, [sys.executable, str(script), "dns", lab.address(REMOTE), DELAY_S])
    assert server.stdout.readline() == "ready\n"
    return ended(server)


def test_waiting_for_a_cpu_comes_out_of_the_host_rtt(lab):
    with answering(lab), in_the_way():
        argv = ("wrap", "--no-probes", "--lab", lab.name, "--container", "c1", "--tool", "csv", "--json", "--")
        found = json.loads(mace(*argv, *there(), sys.executable, "-c", CLIENT, lab.address(REMOTE)).stdout)
    paired = [row for row in found["samples"] if row["reason"] == "paired"]
    assert len(paired) > COUNT // 2  # a request held up for long is not always told from another
    rows = [row for row in paired if "temporal_error_ns" in row]
    assert found["waiting"]["known"] == len(rows)
    assert len(rows) > 0.9 * len(paired)  # now and then a kernel does not record a switch
    for row in rows:
        assert 0 <= row["temporal_error_ns"] <= row["tool_rtt_ns"]
        without_ns = row["host_rtt_lower_bound_ns"] - row["temporal_error_ns"]
        assert row["host_rtt_lower_bound_without_waiting_ns"] == without_ns
    # The tool slept when its answer arrived, so that all its waiting to receive is in its round trip.
    received = sum(row["waited_receive_ns"] for row in rows)
    assert 0 < received <= sum(row["temporal_error_ns"] for row in rows) + len(rows) * 1_000
    held_up = [row for row in rows if row["temporal_error_ns"] > 1_000_000]
    assert held_up
    # Without the far end, which waits as well: its waits are in the NIC RTT.
    with_it, without = (
        sum(row[name] - row["nic_rtt_ns"] for row in held_up)
        for name in ("host_rtt_lower_bound_ns", "host_rtt_lower_bound_without_waiting_ns")
    )
    assert 0 < 2 * without < with_it


@pytest.mark.needs("curl")
def test_the_children_of_a_shell_are_followed(lab):
    """A packet that waits for an address resolution leaves no task at its queue: that sample is unknown."""
    url = f"http://{lab.address(REMOTE)}/"
    script = ROOT / "tests" / "answering.py"
    server = lab.popen(REMOTE, [sys.executable, str(script), "http", lab.address(REMOTE)])
    command = f"for n in $(seq 30); do curl -s -o /dev/null -w '%{{json}}\\n' {url}; done"
    with ended(server):
        assert server.stdout.readline() == "ready\n"
        # On one CPU: where the shell and its child run at once, MACE does not say which of them sent.
        argv = ("wrap", "--lab", lab.name, "--container", "c1", "--json", "--", *there(), "sh", "-c", command)
        found = json.loads(mace(*argv).stdout)
    assert 0 < found["waiting"]["known"] <= found["paired"]


def test_ping_says_where_it_waited(lab):
    with on_one_cpu(well_traced_cpu()):
        done = mace("ping", "--lab", lab.name, "--container", "c1", "-c", "5", "-i", "0.05", lab.address(REMOTE))
    assert re.search(r"^temporal error +[345] ", done.stdout, re.MULTILINE)
    assert re.search(r"^lower bound without it +[345] ", done.stdout, re.MULTILINE)


def test_a_ping_with_the_users_clock_is_known_by_its_command(lab):
    argv = (
        "wrap",
        "--lab",
        lab.name,
        "--container",
        "c1",
        "--json",
        "--",
        "nice",
        "ping",
        "-U",
        "-c",
        "3",
        "-i",
        "0.05",
    )
    assert json.loads(mace(*argv, lab.address(REMOTE)).stdout)["tool"] == "ping -U"


def test_where_tasks_cannot_be_followed_pings_are_corrected_all_the_same(lab, tmp_path):
    """In a PID namespace of its own, the kernel's numbers of tasks mean nothing to MACE."""
    config = tmp_path / "mace.toml"
    config.write_text(f'[capture]\nhost_netns = "{lab.netns_path(HOST)}"\nouter = ["{lab.outer_device}"]\n')
    where = ("--config", config, "--netns", lab.netns_path("c1"))
    argv = ["ping", *map(str, where), "-c", "3", "-i", "0.05", lab.address(REMOTE)]
    done = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", *MACE, *argv],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "3 of 3 samples paired" in done.stdout
    said = " ".join(done.stdout.split())
    assert "waiting for a CPU is not known: ftrace: this process has a PID namespace of its own; give" in said
    assert "temporal error" not in said


ECHO = """
import socket, sys, time
listening = socket.create_server((sys.argv[1], 7000))
print("ready", flush=True)
while True:
    connection, _ = listening.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while data := connection.recv(64):
        time.sleep(0.004)
        connection.send(data)
"""
READER = f"""
import os, socket, sys
sock = socket.create_connection((sys.argv[1], 7000))
sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
print(os.getpid(), flush=True)
sys.stdin.readline()
for _ in range({COUNT}):
    sock.send(bytes(32))
    sock.recv(64)
"""


@contextmanager
def beside_a_busy_process():
    with in_the_way():
        yield []


@contextmanager
def under_a_quota():
    """A control group with a quota, which a busy loop on the reader's CPU uses up: each CPU has a share of its own."""
    load.check("quota")
    with ExitStack() as ending:
        with on_one_cpu(well_traced_cpu()):
            made = ending.enter_context(load.applied("quota", os.environ, 60))
        yield ["sh", "-c", f'echo $$ >{made.group}/cgroup.procs && exec "$@"', "sh"]


def follows(process, pid):
    """Return whether a run of MACE follows the task."""
    listed = (TRACE_INSTANCES / name / "set_event_pid" for name in trace_instances(process.pid))
    return any(str(pid) in path.read_text().split() for path in listed)


@pytest.mark.parametrize("source", ["ftrace", pytest.param("bpf", marks=pytest.mark.needs("bpf"))])
@pytest.mark.parametrize("held_up", [beside_a_busy_process, under_a_quota])
def test_a_delivery_says_how_much_of_it_was_waiting(lab, held_up, source, tmp_path):
    """Figures, rows and windows of `mace run --waiting`, with a reader that gets too little of its CPU."""
    address = lab.address(REMOTE)
    with ended(lab.popen(REMOTE, [sys.executable, "-c", ECHO, address])) as server, held_up() as before:
        assert server.stdout.readline() == "ready\n"
        argv = [*before, *there(), sys.executable, "-c", READER, address]
        with ended(lab.popen("c1", argv)) as reader:
            pid = int(reader.stdout.readline())
            with measured(lab, tmp_path, "--waiting", "--source", source) as run:
                wait_for(lambda: follows(run.process, pid))
                reader.stdin.write("\n")
                reader.stdin.flush()
                reader.wait(timeout=60)
    (delivery,) = (row for row in run.found["delivery"] if row["container"] == "c1")
    (waiting,) = (row for row in run.found["waiting"] if row["container"] == "c1")
    assert delivery["count"] >= COUNT
    assert delivery["count"] // 2 < waiting["count"] <= delivery["count"]  # some switches may lack a record
    wholes, waits = ({row["packet"]: row for row in run.rows(segment=name)} for name in ("delivery", "waiting"))
    assert len(waits) == waiting["count"]
    for packet, row in waits.items():
        assert (row["utc_ns"], row["device"]) == (wholes[packet]["utc_ns"], wholes[packet]["device"])
        assert 0 <= row["delay_ns"] <= wholes[packet]["delay_ns"]
    long = [packet for packet in waits if wholes[packet]["delay_ns"] > 1_000_000]
    # Since Linux 6.18 a quota stops a task where it returns to user space, which is after it has read.
    assert long or held_up is under_a_quota
    assert 2 * sum(waits[packet]["delay_ns"] for packet in long) >= sum(wholes[packet]["delay_ns"] for packet in long)
    in_windows = "SELECT sum(count), sum(sum_ns) FROM windows WHERE segment = 'waiting' AND width_s = 1"
    assert run.query(in_windows) == [(len(waits), sum(row["delay_ns"] for row in waits.values()))]
    with_readers = mace("report", "--store", run.store)
    assert "in delivery" in with_readers.stdout


def test_without_being_asked_no_task_is_followed(lab, tmp_path):
    with measured(lab, tmp_path, "--source", "ftrace") as run:
        names = trace_instances(run.process.pid)
        lab.ping("c1", count=2)
    assert len(names) == 1  # the source's own
    assert "waiting" not in run.found


def test_a_run_that_cannot_follow_tasks_says_why(lab):
    done = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", *MACE, "run", "--waiting", "--no-store", "--duration", "1"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "this process has a PID namespace of its own" in done.stderr
