"""The lab on the real kernel: its devices, its traffic, and that nothing of it is ever left."""

import errno
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from contracts.errors import LabError, Unavailable, UsageError
from mace.lab import (
    Layout,
    Runtime,
    Spec,
    attach,
    check,
    down,
    layouts,
    lifecycle,
    list_labs,
    netkit,
    netns,
    network,
    plan,
    running,
    state,
    up,
)
from tests.lab_leftovers import leftovers, machine, output, own_lab
from tests.places import ROOT

pytestmark = pytest.mark.needs("root", "netns")


@pytest.fixture
def name(request):
    """Provide a lab name of this test alone; the test must leave nothing behind, whether it passed or failed."""
    with own_lab(request.node.name) as chosen:
        yield chosen


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from mace.lab import Runtime, Spec, running
print("starting", flush=True)
with running(Spec({name!r}, containers=2, {more})) as lab:
    print("up", flush=True)
    lab.udp(count=10**8, duration_s=60)
"""


def start_run(name, more=""):
    """Start another process that makes the lab and sends traffic for ever."""
    script = SCRIPT.format(root=str(ROOT), name=name, more=more)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "starting\n"
    return process


def wait_for(condition, limit_s=20.0):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def status(name):
    return next((info.status for info in list_labs() if info.name == name), None)


# --- what it makes ------------------------------------------------------------------------------


def test_this_machine_can():
    assert check() == []


@pytest.mark.slow
@pytest.mark.parametrize("family", [4, 6])
def test_members_reach_each_other_from_the_first_packet(name, family):
    with running(Spec(name, containers=2)) as lab:
        assert lab.members == ("host", "remote", "c1", "c2")
        for sender, to in [("c1", "remote"), ("c2", "remote"), ("c1", "c2"), ("c1", "host"), ("host", "remote")]:
            result = lab.ping(sender, to, count=3, family=family)
            assert (result.sent, result.received, len(result.rtts_ns)) == (3, 3, 3)
            assert result.mean_rtt_ns > 0


@pytest.mark.slow
def test_set_up_takes_few_commands(name, monkeypatch):
    """The set-up is fast because it runs one batch per namespace, not one process per address."""
    started = []
    monkeypatch.setattr(
        netns, "run", lambda argv, run=netns.run, **options: started.append(argv) or run(argv, **options)
    )
    counts = []
    for containers in (1, 2, 5):
        started.clear()
        with running(Spec(name, containers=containers)):
            counts.append(len(started))
    assert counts[1] - counts[0] == (counts[2] - counts[1]) // 3 <= 3


def test_the_remote_sees_the_hosts_address_alone(name):
    code = "import socket; s = socket.create_server(('', 7)); print('ready', flush=True); print(s.accept()[1][0])"
    with running(Spec(name)) as lab:
        server = lab.popen("remote", [sys.executable, "-c", code])
        assert server.stdout.readline() == "ready\n"
        assert (
            lab.exec("c1", [sys.executable, "-c", "import socket; socket.create_connection(('203.0.113.2', 7))"]) == 0
        )
        assert server.communicate(timeout=10)[0] == "203.0.113.1\n"


def test_every_containers_device_is_called_eth0_and_the_outer_one_carries_the_default_route(name):
    with running(Spec(name, containers=3)) as lab:
        for container in lab.containers:
            inside = lab.popen(container, ["ip", "-o", "link", "show", "type", "veth"]).communicate()[0]
            assert inside.split(": ")[1].partition("@")[0] == "eth0"
        assert f" dev {lab.outer_device}" in lab.popen("host", ["ip", "route", "show", "default"]).communicate()[0]
        inodes = {lab.netns_inode(member) for member in lab.members}
        assert len(inodes) == 5
        assert netns.own_inode() not in inodes


@pytest.mark.slow
def test_many_containers(name):
    with running(Spec(name, containers=20, bridges=3)) as lab:
        assert all(lab.ping(container, count=1).received >= 1 for container in lab.containers)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "command", "shown"),
    [
        (Layout.OVERLAY, "ip -d link show type vxlan", "dstport 8472"),
        (Layout.FLANNEL, "ip -d link show type vxlan", "dstport 8472"),
        (Layout.CALICO, "ip route show", "198.51.100.2 dev veth"),
        (Layout.PTP, "ip rule", "from 198.51.100.2 lookup 100"),
        (Layout.CILIUM, "tc filter show dev OUTER ingress", "direct-action"),
    ],
)
def test_layouts_reach_everyone_both_ways_without_translation(name, layout, command, shown, monkeypatch):
    code = "import socket; s = socket.create_server(('', 7)); print('ready', flush=True); print(s.accept()[1][0])"
    told = "ip rule; ip route show table all; ip neigh show nud permanent; tc filter show dev OUTER ingress"
    with running(Spec(name, containers=2, layout=layout)) as lab:
        assert lab.network == f"layout {layout}, far end {lab.address('remote')}"
        assert shown in lab.popen("host", command.replace("OUTER", lab.outer_device).split()).communicate()[0]
        ways = [("c1", "remote"), ("remote", "c2"), ("c1", "c2"), ("c1", "host"), ("host", "c2")]
        for sender, to in ways:
            for family in (4, 6):
                assert lab.ping(sender, to, count=2, family=family).received == 2
        server = lab.popen("remote", [sys.executable, "-c", code])
        assert server.stdout.readline() == "ready\n"
        client = f"import socket; socket.create_connection(({lab.address('remote')!r}, 7))"
        assert lab.exec("c1", [sys.executable, "-c", client]) == 0
        assert server.communicate(timeout=10)[0] == f"{lab.address('c1')}\n"
        address, words = lab.address("c1"), ["sh", "-c", told.replace("OUTER", lab.outer_device)]
        before = lab.popen("host", words).communicate()[0].splitlines()
        with monkeypatch.context() as patch:
            patch.setattr(layouts, "build_container", lambda *_: (_ for _ in ()).throw(LabError("no luck")))
            with pytest.raises(LabError, match="no luck"):
                lab.add_container("c3")
        lab.remove_container("c1")
        assert not re.search(rf"\b{re.escape(address)}\b", lab.popen("host", words).communicate()[0])
        lab.add_container("c1")
        assert lab.tcp("c1", size=200_000, reverse=True).received == 200_000
        assert len(lab.popen("host", words).communicate()[0].splitlines()) == len(before)


@pytest.mark.parametrize(("layout", "kind"), [("ipip", "ipip"), ("netkit_l2", "netkit"), ("netkit_l3", "netkit")])
def test_a_layout_that_this_kernel_lacks_is_refused_with_the_reason(name, layout, kind, monkeypatch):
    """tests/kernel/guest/test_layouts.py makes them on a kernel that has them."""

    def refused(*_, **__):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(netkit, "add", refused)
    monkeypatch.setattr(layouts.netns, "run", refused)
    monkeypatch.setattr(network, "problems", lambda _: [])
    with pytest.raises(Unavailable, match=f"the kernel makes no {kind} device .*Operation not supported"):
        up(Spec(name, layout=Layout(layout)))


@pytest.mark.needs("rps")
def test_receive_softirqs_are_spread_over_the_cpus_that_the_specification_names(name):
    """Each kind of the host's devices has its own CPUs; containers that are added later have them too."""
    (missing,) = check(Spec(name, rps=("outer=1023",)))
    assert "CPU 1023 does not exist" in missing.why
    with running(Spec(name, layout=Layout.OVERLAY, rps=("vxlan=1", "veth=0-1"))) as lab:
        lab.add_container("c2")
        shown = "mount -t sysfs none /sys && cd /sys/class/net && grep . */queues/rx-0/rps_cpus"
        told = lab.popen("host", ["unshare", "--mount", "sh", "-c", shown]).communicate()[0]
        masks = {line.partition("/")[0]: int(line.rpartition(":")[2].replace(",", ""), 16) for line in told.split()}
        veths = {plan.place(lab.spec, f"c{n}", n - 1).veth: 3 for n in (1, 2)}
        assert {device: mask for device, mask in masks.items() if mask} == {plan.vxlan_device(name): 2, **veths}
        assert lab.ping("c1", count=5).received == 5


# --- same addresses -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", [4, 6])
def test_containers_with_equal_addresses_talk_at_the_same_time(name, family):
    with running(Spec(name, containers=4, bridges=2, same_addresses=True)) as lab:
        assert lab.address("c1", family) == lab.address("c2", family) != lab.address("c3", family)
        pings = [lab.start_ping(c, count=300, interval_s=0.001, family=family) for c in lab.containers]
        assert [p.wait().received for p in pings] == [300] * 4
        flows = [lab.start_udp(c, count=2000, rate_pps=4000, family=family) for c in lab.containers]
        assert [f.wait().received for f in flows] == [2000] * 4
        streams = [lab.start_tcp(c, size=5_000_000, family=family, reverse=True) for c in lab.containers]
        assert [s.wait().received for s in streams] == [5_000_000] * 4
        assert all(lab.ping(c, "host", count=2, family=family).received == 2 for c in lab.containers)


@pytest.mark.slow
def test_equal_addresses_with_equal_ports_get_their_own_replies(name):
    """NAT must distinguish two flows with equal 5-tuples."""
    server = (
        "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('', 7))\n"
        "print('ready', flush=True)\n"
        "while True: s.sendto(*s.recvfrom(100))"
    )
    client = (
        "import socket, sys, time; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('', 5555))\n"
        "s.settimeout(5); s.connect(('203.0.113.2', 7))\n"
        "for i in range(200):\n"
        "    m = f'{sys.argv[1]} {i}'.encode(); s.send(m); assert s.recv(100) == m\n"
        "time.sleep(1)"
    )
    with running(Spec(name, containers=2, bridges=2, same_addresses=True)) as lab:
        echo = lab.popen("remote", [sys.executable, "-c", server])
        assert echo.stdout.readline() == "ready\n"
        first = lab.popen("c1", [sys.executable, "-c", client, "c1"])
        # Not in the same microsecond, in which the kernel's NAT may drop one of two first packets (docs/lab.md).
        time.sleep(0.2)
        second = lab.popen("c2", [sys.executable, "-c", client, "c2"])
        assert [p.communicate(timeout=20)[1] for p in (first, second)] == ["", ""]
        assert [first.returncode, second.returncode] == [0, 0]


# --- traffic ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_udp_delivers_the_requested_number_of_datagrams(name):
    with running(Spec(name)) as lab:
        result = lab.udp(count=10_000, rate_pps=20_000)
        assert (result.sent, result.received, result.errors) == (10_000, 10_000, 0)
        assert result.duration_s > 0.49  # at the requested rate
        fast = lab.udp(count=20_000, size=18)
        assert (fast.sent, fast.received) == (20_000, 20_000)
        empty = lab.udp(count=10, size=0)
        assert empty.received == 10


@pytest.mark.slow
def test_udp_echo_and_tcp_requests_give_round_trips(name):
    with running(Spec(name)) as lab:
        for result in (lab.udp(count=200, echo=True, family=6), lab.tcp_requests(count=200)):
            assert (result.sent, result.received, len(result.rtts_ns)) == (200, 200, 200)
            assert min(result.rtts_ns) > 0


@pytest.mark.slow
@pytest.mark.parametrize("reverse", [False, True])
def test_tcp_carries_every_byte(name, reverse):
    with running(Spec(name)) as lab:
        result = lab.tcp(size=50_000_001, reverse=reverse)
        assert (result.sent, result.received) == (50_000_001, 50_000_001)


def test_a_flood_is_bounded_and_has_no_single_round_trips(name):
    with running(Spec(name)) as lab:
        result = lab.ping(count=2000, flood=True)
        assert (result.sent, result.received, result.rtts_ns) == (2000, 2000, ())


@pytest.mark.slow
def test_a_stopped_flow_reports_its_counts(name):
    with running(Spec(name)) as lab:
        flows = [
            lab.start_udp(count=10**6, rate_pps=2000),
            lab.start_ping(count=10**6, interval_s=0.002),
            lab.start_tcp_requests(count=10**6, rate_pps=2000),
        ]
        time.sleep(0.5)
        with pytest.raises(TimeoutError):
            flows[0].wait(0.01)
        assert all(flow.running for flow in flows)
        for flow in flows:
            result = flow.stop()
            assert result.sent - 1 <= result.received <= result.sent  # one may be under way
            assert 0 < result.sent < 10**6
            assert not flow.running


@pytest.mark.slow
def test_traffic_ends_with_its_duration(name):
    with running(Spec(name)) as lab:
        result = lab.udp(count=10**9, rate_pps=1000, duration_s=0.5)
        assert result.duration_s >= 0.45  # not 11 days
        assert result.received == result.sent <= 500


@pytest.mark.slow
def test_traffic_ends_with_the_process_that_asked_for_it(name):
    """Traffic ends at once with its process, not at the next clean-up."""
    run = start_run(name)
    assert run.stdout.readline() == "up\n"
    wait_for(lambda: len(state.processes(state.load(name).id)) == 2)
    lab_id = state.load(name).id
    run.kill()
    run.communicate()
    wait_for(lambda: state.processes(lab_id) == [], limit_s=2)
    assert down(name)


@pytest.mark.slow
def test_packets_without_a_listener_are_counted(name):
    with running(Spec(name)) as lab:
        flow = lab.start_udp(count=10**6, rate_pps=1000)
        flow._server.kill()
        time.sleep(0.3)
        with pytest.raises(LabError):
            flow.stop()


def test_exec_gives_the_exit_status_and_names_the_nearest_member(name):
    with running(Spec(name)) as lab:
        assert lab.exec("c1", ["sh", "-c", "exit 7"]) == 7
        with pytest.raises(UsageError, match="did you mean 'remote'"):
            lab.exec("remot", ["true"])
        with pytest.raises(UsageError):
            lab.exec("c1", [])


# --- come and go --------------------------------------------------------------------------------


@pytest.mark.slow
def test_containers_are_removed_and_names_reused(name):
    with running(Spec(name, containers=2)) as lab:
        old_address = lab.address("c1")
        sleeper = lab.popen("c1", ["sleep", "60"])
        lab.remove_container("c1")
        assert sleeper.wait(5) != 0
        assert lab.containers == ("c2",)
        with pytest.raises(UsageError):
            lab.ping("c1")
        lab.add_container("c1")
        assert lab.address("c1") == old_address
        # Immediately: the host's neighbour cache must not hold the old MAC.
        assert lab.ping("c1", count=3).received == 3
        lab.add_container("web")
        assert lab.ping("web", count=3).received == 3
        with pytest.raises(UsageError, match="already"):
            lab.add_container("web")
        for wrong in ("host", "remote", "no-dash"):
            with pytest.raises(UsageError):
                lab.add_container(wrong)
        with pytest.raises(UsageError):
            lab.remove_container("host")


@pytest.mark.slow
def test_a_container_that_cannot_be_made_leaves_the_lab_unchanged(name, monkeypatch):
    with running(Spec(name)) as lab:
        with monkeypatch.context() as patch:
            patch.setattr(network, "build_container", lambda *_: (_ for _ in ()).throw(LabError("no luck")))
            with pytest.raises(LabError, match="no luck"):
                lab.add_container("c2")
        assert lab.containers == ("c1",)
        assert status(name) == "up"
        lab.add_container("c2")
        assert lab.ping("c2", count=1).received >= 1


# --- several, and again -------------------------------------------------------------------------


@pytest.mark.slow
def test_two_labs_at_once_are_independent(name):
    with running(Spec(name)) as one:
        before = machine()
        with running(Spec(f"{name}-2")) as two:
            assert one.address("c1") == two.address("c1")
            flows = [lab.start_udp(count=2000, rate_pps=4000) for lab in (one, two)]
            assert [flow.wait().received for flow in flows] == [2000, 2000]
        assert leftovers(f"{name}-2") == []
        assert machine() == before
        assert one.ping(count=1).received >= 1


def test_a_lab_that_is_up_is_not_made_again(name):
    with running(Spec(name)) as lab:
        with pytest.raises(LabError, match="up already, held by process"):
            up(Spec(name))
        assert lab.ping(count=1).received >= 1


@pytest.mark.slow
def test_a_lab_stays_until_it_is_taken_down(name):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from mace.lab import *; up(Spec({name!r}))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
    assert status(name) == "up"
    lab = attach(name)
    assert lab.ping(count=1).received >= 1
    with pytest.raises(LabError, match="up already"):
        up(Spec(name))
    assert down(name)
    assert not down(name)
    with pytest.raises(LabError, match="not up"):
        attach(name)
    with pytest.raises(LabError):
        lab.ping(count=1)


@pytest.mark.slow
def test_a_lab_that_another_process_holds_is_taken_down_by_force_only(name):
    run = start_run(name)
    assert run.stdout.readline() == "up\n"
    with pytest.raises(LabError, match=f"held by process {run.pid}"):
        down(name)
    assert down(name, force=True)
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=20)


def test_one_of_several_simultaneous_starts_succeeds(name):
    results = []

    def attempt():
        try:
            results.append(up(Spec(name)))
        except LabError as error:
            results.append(error)

    threads = [threading.Thread(target=attempt) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(isinstance(result, lifecycle.Lab) for result in results) == 1
    assert all("up already" in str(result) for result in results if isinstance(result, LabError))
    assert attach(name).ping(count=1).received >= 1
    assert down(name)


# --- accidents ----------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["build_wire", "build_bridges", "build_container", "add_namespaces"])
def test_a_failure_at_any_step_leaves_nothing(name, monkeypatch, step):
    def fail(*_args, **_settings):
        raise LabError("no luck")

    monkeypatch.setattr(network, step, fail)
    with pytest.raises(LabError, match="no luck"), running(Spec(name)):
        pytest.fail("it came up")
    assert leftovers(name) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("when", ["setting up", "under traffic"])
def test_signals_end_it_cleanly(name, number, when):
    run = start_run(name)
    if when == "under traffic":
        assert run.stdout.readline() == "up\n"
        time.sleep(0.1)
    else:
        wait_for(lambda: state.load(name) is not None)
    run.send_signal(number)
    run.send_signal(number)  # further signals must not interrupt the clean-up
    run.communicate(timeout=20)
    assert run.returncode == (-signal.SIGINT if number == signal.SIGINT else 128 + number)
    assert leftovers(name) == []


@pytest.mark.slow
@pytest.mark.parametrize("remover", ["up", "down"])
def test_the_next_start_cleans_up_after_kill_9_under_traffic(name, remover):
    run = start_run(name)
    assert run.stdout.readline() == "up\n"
    run.kill()
    run.communicate()
    assert status(name) == "broken"
    if remover == "down":
        assert down(name)
    else:
        with running(Spec(name)) as lab:
            assert lab.ping(count=1).received >= 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_the_next_start_cleans_up_after_kill_9_during_set_up(name, seed):
    moments = random.Random(seed)
    for turn in range(6 if seed == 1 else 16):
        run = start_run(name, "bridges=2, same_addresses=True")
        time.sleep(moments.uniform(0, 0.2))
        run.kill()
        run.communicate()
        if turn % 2:
            down(name)
        else:
            with running(Spec(name)) as lab:
                assert lab.ping(count=1).received >= 1
        assert leftovers(name) == []


def test_a_bridge_may_have_a_name_that_abbreviates_a_keyword_of_ip(name, monkeypatch):
    """`ip link add broad ...` reads the name as the option `broadcast` unless `name` precedes it."""
    monkeypatch.setattr(plan, "device_tag", lambda lab: "oad")
    with running(Spec(name)) as lab:
        assert lab.ping(count=1).received >= 1


@pytest.mark.slow
def test_a_lab_without_state_file_is_found_by_name(name):
    up(Spec(name))
    (state.STATE_DIR / f"{name}.json").unlink()
    assert status(name) == "broken"
    with running(Spec(name)) as lab:
        assert lab.ping(count=1).received >= 1


def test_a_damaged_state_file_does_not_prevent_removal(name):
    up(Spec(name))
    (state.STATE_DIR / f"{name}.json").write_text("{")
    assert status(name) == "broken"
    assert down(name)
    assert leftovers(name) == []


@pytest.mark.slow
def test_a_lab_with_a_missing_namespace_is_broken_and_made_anew(name):
    lab = up(Spec(name))
    netns.remove(lab.netns_path("c1"))
    assert status(name) == "broken"
    with pytest.raises(LabError, match="gone"):
        lab.ping(count=1)
    with running(Spec(name)) as again:
        assert again.ping(count=1).received >= 1


def test_a_foreign_process_in_a_member_survives_and_keeps_no_device(name):
    with running(Spec(name)) as lab:
        env = {"PATH": os.environ["PATH"]}
        stranger = subprocess.Popen(lab.command("c1", ["sleep", "60"]), env=env)
        wait_for(lambda: Path(f"/proc/{stranger.pid}/comm").read_text() == "sleep\n")
    try:
        assert stranger.poll() is None
        links = output("nsenter", f"--net=/proc/{stranger.pid}/ns/net", "ip", "-o", "link")
        assert len(links.splitlines()) == 1  # lo
    finally:
        stranger.kill()
        stranger.wait()


def test_sysctls_of_the_machines_own_namespace_are_refused():
    with pytest.raises(LabError, match="our own"):
        netns.write_sysctls(Path("/proc/self/ns/net"), {"ipv4/ip_forward": 1})


# --- docker -------------------------------------------------------------------------------------


@pytest.mark.needs("docker")
@pytest.mark.timeout(120)
@pytest.mark.slow
def test_docker_containers_reach_the_remote_and_leave_nothing(name):
    assert check(Spec(runtime=Runtime.DOCKER)) == []
    with running(Spec(name, containers=2, runtime=Runtime.DOCKER)) as lab:
        assert [lab.ping(c, count=2, family=f).received for c in ("c1", "c2") for f in (4, 6)] == [2] * 4
        assert lab.udp("c2", count=2000, rate_pps=10_000).received == 2000
        assert lab.tcp("c1", size=5_000_000).received == 5_000_000
        # MACE finds the lab's containers like those of any Docker daemon.
        with socket.socket(socket.AF_UNIX) as api:
            api.connect(str(lab.docker_socket))
            api.sendall(b"GET /containers/json HTTP/1.0\r\n\r\n")
            answer = b"".join(iter(lambda: api.recv(65536), b""))
        assert b'"/c1"' in answer
        assert b'"/c2"' in answer
        inside = ["docker", "-H", f"unix://{lab.docker_socket}", "exec", "c1", "ping", "-c", "2", lab.address("remote")]
        assert "2 received" in subprocess.run(inside, capture_output=True, text=True, check=True).stdout
        lab.remove_container("c1")
        lab.add_container("c1")
        assert lab.netns_inode("c1") not in (0, lab.netns_inode("host"), netns.own_inode())
        assert lab.ping("c1", count=2).received == 2
    assert leftovers(name) == []


@pytest.mark.slow
@pytest.mark.needs("docker")
@pytest.mark.timeout(120)
@pytest.mark.parametrize("moment_s", [0.3, 0.8, None])
def test_the_next_start_cleans_up_after_a_killed_docker(name, moment_s):
    run = start_run(name, "runtime=Runtime.DOCKER")
    if moment_s is None:
        assert run.stdout.readline() == "up\n"
    else:
        time.sleep(moment_s)
    run.kill()
    run.communicate()
    assert status(name) == "broken"
    assert down(name)
    assert leftovers(name) == []


@pytest.mark.slow
@pytest.mark.needs("docker")
@pytest.mark.timeout(120)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_process_of_an_unfinished_container_ends_with_the_lab(name, frozen):
    # `runc init` whose parent was killed: its environment has no mark, but it is in the container's cgroup.
    up(Spec(name, runtime=Runtime.DOCKER))
    cgroup, control, word = next(
        (path, control, word)
        for control, word in (("freezer.state", "FROZEN"), ("cgroup.freeze", "1"))
        for path in Path("/sys/fs/cgroup").glob(f"**/mace-lab-{name}")
        if (path / control).exists()
    )
    inner = cgroup / "in-the-making"
    inner.mkdir()
    with subprocess.Popen(["/bin/sleep", "1000"], env={}) as stray:
        (inner / "cgroup.procs").write_text(str(stray.pid))
        if frozen:
            (inner / control).write_text(word)
        assert down(name)
        assert stray.wait(timeout=10) == -signal.SIGKILL
    assert leftovers(name) == []


@pytest.mark.slow
@pytest.mark.needs("docker")
@pytest.mark.timeout(240)
def test_two_docker_labs_at_once(name):
    with running(Spec(name, runtime=Runtime.DOCKER)) as one:
        with running(Spec(f"{name}-2", runtime=Runtime.DOCKER)) as two:
            assert [lab.ping(count=2).received for lab in (one, two)] == [2, 2]
        assert leftovers(f"{name}-2") == []
        one.add_container("later")
        assert one.ping("later", count=2).received == 2


@pytest.mark.slow
@pytest.mark.needs("docker")
@pytest.mark.timeout(120)
def test_a_docker_daemon_that_died_makes_the_lab_broken(name):
    up(Spec(name, runtime=Runtime.DOCKER))
    os.kill(state.load(name).daemon.pid, signal.SIGKILL)
    wait_for(lambda: status(name) == "broken")
    assert down(name)
