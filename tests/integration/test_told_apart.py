"""Containers with equal names and addresses, also ones that replace each other, are distinguished."""

import json
import subprocess
import time
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mace.lab import Runtime, Spec, running
from mace.lab.docker import IMAGE
from storage.query import StoreReader
from tests.brokers import free_port
from tests.measuring import PATHS, balanced, mace, measured, wait_for

pytestmark = [pytest.mark.needs("root", "tracefs", "netns"), pytest.mark.slow]


def by_netns(measurement, length):
    """Return {(container, netns inode of its eth0): packets sent} of echo requests of one length."""
    found = measurement.query(
        "SELECT container, CAST(split_part(device_id, ':', 1) AS BIGINT), count(*) FROM delays"
        f" WHERE device = 'eth0' AND direction = 'egress' AND segment = 'device' AND l3_len = {length} GROUP BY ALL"
    )
    return {(container, netns): count for container, netns, count in found}


def test_containers_with_equal_addresses_on_two_bridges(tmp_path):
    spec = Spec(name="twins", containers=2, bridges=2, same_addresses=True)
    with running(spec) as lab:
        assert lab.address("c1") == lab.address("c2")
        for container in lab.containers:
            lab.ping(container, count=2)
        with measured(lab, tmp_path) as measurement:
            flows = [lab.start_ping(container, count=300, size=111) for container in lab.containers]
            assert [flow.wait().received for flow in flows] == [300, 300]
        wanted = {(container, lab.netns_inode(container)): 300 for container in lab.containers}
    assert by_netns(measurement, 139) == wanted
    overhead = {(row["container"], row["direction"]): row["count"] for row in measurement.found["overhead"]}
    assert all(overhead[container, way] >= 300 for container in ("c1", "c2") for way in ("egress", "ingress"))


def test_two_labs_at_once(tmp_path):
    with running(Spec(name="one")) as one, running(Spec(name="two")) as two:
        for lab in (one, two):
            lab.ping("c1", count=2)
        with measured(one, tmp_path) as measurement:
            flows = [lab.start_ping("c1", count=200, size=112) for lab in (one, two)]
            assert [flow.wait().received for flow in flows] == [200, 200]
        # The other lab's packets cross no container device of this lab's host, and only the name eth0 is common to both
        # paths.
        assert by_netns(measurement, 140) == {("c1", one.netns_inode("c1")): 200}
        paths = measurement.query(f"SELECT direction, devices, count(*) FROM ({PATHS}) WHERE l3_len = 140 GROUP BY ALL")
    tag = one.outer_device[3:]
    whole = ["eth0", f"veth{tag}-c1", f"br{tag}", f"out{tag}", f"rem{tag}"]
    assert sorted(paths) == [("egress", whole, 200), ("ingress", whole[::-1], 200)]
    balanced(measurement.found)


def test_a_container_dies_and_a_new_one_takes_its_name(tmp_path):
    with running(Spec(name="heirs", containers=2)) as lab:
        lab.ping("c1", count=2)
        first = lab.netns_inode("c1")
        with measured(lab, tmp_path) as measurement:
            assert lab.ping("c1", count=100, size=113).received == 100
            lab.remove_container("c1")
            # The kernel gives a free inode to the next namespace, whoever makes it: spare containers take it, so that
            # the new one gets another.
            time.sleep(1)
            for number in range(9):
                lab.add_container(f"spare{number}")
                lab.add_container("c1")
                second = lab.netns_inode("c1")
                if first != second:
                    break
                lab.remove_container("c1")
            assert first != second
            # Two seconds suffice for a container's start, after which its devices are known.
            time.sleep(2)
            assert lab.ping("c1", count=150, size=113).received == 150
        assert by_netns(measurement, 141) == {("c1", first): 100, ("c1", second): 150}


def test_a_container_that_comes_while_measuring_is_followed(tmp_path):
    with running(Spec(name="guests")) as lab:
        with measured(lab, tmp_path) as measurement:
            lab.add_container("late")
            time.sleep(1)
            assert lab.ping("late", count=100, size=114).received == 100
        assert by_netns(measurement, 142) == {("late", lab.netns_inode("late")): 100}


def test_churn_under_traffic_leaves_other_containers_exact(tmp_path):
    with running(Spec(name="churn", containers=2)) as lab:
        lab.ping("c1", count=2)
        with measured(lab, tmp_path) as measurement:
            steady = lab.start_ping("c1", count=500, size=115, interval_s=0.01)
            for _ in range(8):
                lab.add_container("guest")
                flow = lab.start_udp("guest", count=100_000, rate_pps=2_000, duration_s=0.3, size=99)
                time.sleep(0.2)
                # The devices vanish while packets cross them.
                flow.close()
                lab.remove_container("guest")
            assert steady.wait().received == 500
        assert by_netns(measurement, 143) == {("c1", lab.netns_inode("c1")): 500}
    assert balanced(measurement.found).lost == 0


class Scraped:
    """The endpoint's histograms at one time."""

    def __init__(self, listen):
        with urllib.request.urlopen(f"http://{listen}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        counts = [sample for sample in samples if sample.name == "mace_device_delay_seconds_count"]
        self.series = {tuple(sorted(sample.labels.items())) for sample in counts}
        self.containers = {sample.labels["container"] for sample in counts}
        self.places = {(sample.labels["netns"], sample.labels["device"]) for sample in counts}
        self.dropped = next(sample.value for sample in samples if sample.name == "mace_series_dropped_total")


def test_series_of_containers_that_came_and_went_are_gone(tmp_path):
    """After a hundred containers have come and gone, the endpoint serves the same series as before."""
    listen = f"127.0.0.1:{free_port()}"
    (tmp_path / "c.toml").write_text("[sinks.prometheus]\ngone_s = 1\n")
    with (
        running(Spec(name="fleeting", containers=1)) as lab,
        measured(lab, tmp_path, "--config", tmp_path / "c.toml", "--prometheus", listen),
    ):
        lab.ping("c1", count=5)
        # The container's device, its other end, the bridge, the outer device, and the remote's.
        wait_for(lambda: len(Scraped(listen).places) == 5, what="the series of what stays")
        before = Scraped(listen)
        assert before.containers == {"c1"}
        shown = set()
        for number in range(100):
            lab.add_container(f"guest{number}")
            lab.ping(f"guest{number}", count=3)
            if number % 10 == 9:
                shown |= Scraped(listen).containers
            lab.remove_container(f"guest{number}")
        assert len(shown) > 10, "they were served while they were there"
        wait_for(lambda: Scraped(listen).containers == {"c1"}, what="the series of what has gone to go")
        last = Scraped(listen)
        assert last.places == before.places
        # Each direction through a device and, at the container's own device, also the whole path.
        assert len(last.series) <= 4 * len(last.places)
        assert last.dropped >= 100


@pytest.mark.needs("docker")
def test_real_docker_containers(tmp_path):
    with running(Spec(name="dock", containers=2, runtime=Runtime.DOCKER)) as lab:
        for container in lab.containers:
            lab.ping(container, count=2)
        with measured(lab, tmp_path) as measurement:
            time.sleep(1)
            flows = [lab.start_ping(container, count=200, size=116) for container in lab.containers]
            assert [flow.wait().received for flow in flows] == [200, 200]
        found = by_netns(measurement, 144)
        assert sorted(found.values()) == [200, 200]
        assert {netns for _, netns in found} == {lab.netns_inode(container) for container in lab.containers}
        assert {name for name, _ in found} == set(lab.containers)


@pytest.mark.needs("docker")
def test_a_docker_container_is_renamed_and_another_is_on_the_host_s_network(tmp_path):
    """In the live run, the store and a replay, one container has its new name, and the other is listed as on the host's
    network.
    """
    with running(Spec(name="named", containers=1, runtime=Runtime.DOCKER)) as lab:

        def docker(*argv):
            told = subprocess.run(
                ["docker", "-H", f"unix://{lab.docker_socket}", *argv], capture_output=True, text=True, check=False
            )
            assert told.returncode == 0, told.stderr
            return told.stdout.strip()

        def newest_name(container_id):
            known = StoreReader(measurement.store).containers()
            return next((one.container for one in known if one.container_id == container_id), None)

        pinging = ["ping", "-i", "0.05", "-s", "117", lab.address("remote")]
        agent = docker("run", "--detach", "--name", "agent", "--network", "host", IMAGE, "/bin/sleep", "2147483647")
        with measured(lab, tmp_path) as measurement:
            web = docker("run", "--detach", "--name", "web-tmp", IMAGE, *pinging)
            wait_for(lambda: newest_name(web) == "web-tmp", what="packets under the first name")
            docker("rename", "web-tmp", "web")
            wait_for(lambda: newest_name(web) == "web", what="packets under the second name")
    replayed = json.loads(mace("replay", measurement.capture, "--store", tmp_path / "again", "--json").stdout)
    reported = json.loads(mace("report", "--store", measurement.store, "--json").stdout)
    again = json.loads(mace("report", "--store", tmp_path / "again", "--json").stdout)
    old_name = json.loads(mace("report", "--store", measurement.store, "--container", "web-tmp", "--json").stdout)
    for found in (measurement.found, replayed, reported, again):
        assert found["on_host_network"] == ["agent"]
        rows = [each for each in found["overhead"] if each["direction"] == "egress" and each["container"] != "c1"]
        assert [(each["container"], each["container_id"]) for each in rows] == [("web", web)]
        assert "web-tmp" not in json.dumps(found)
    assert {each["container"] for each in old_name["overhead"]} == {"web"}
    (sharer,) = measurement.query("SELECT DISTINCT unnest(on_host_network) FROM ledger")
    assert sharer == ({"container": "agent", "container_id": agent},)
    shown = mace("report", "--store", measurement.store).stdout
    assert "on the host's own network, with no device to cross: agent" in shown
    assert "web-tmp" not in shown
