"""Labs whose network CNI plugins make: Debian's plugins, run as a container runtime runs them."""

import base64
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from contracts.config import CaptureConfig, Config
from contracts.errors import LabError, UsageError
from mace.commands import settings
from mace.lab import Layout, Spec, attach, cni, down, list_labs, running, state, up
from mace.trials import networks
from mace.trials.verify import verdict
from mace.trials.verify.scenarios import Scenario
from tests.lab_leftovers import own_lab
from tests.measuring import balanced, mace
from tests.places import ROOT

pytestmark = pytest.mark.needs("root", "netns", "cni")

ADDRESSES = {
    "type": "host-local",
    "ranges": [[{"subnet": "192.0.2.0/26"}], [{"subnet": "2001:db8:2::/64"}]],
    "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
}
BRIDGE = {"type": "bridge", "bridge": "cnitest0", "isGateway": True, "ipMasq": True, "ipam": ADDRESSES}
PORTS = {"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]}
PORTMAP = {"type": "portmap", "capabilities": {"portMappings": True}, "runtimeConfig": PORTS}
NEAR = {"type": "host-local", "subnet": "203.0.113.0/24", "rangeStart": "203.0.113.64", "rangeEnd": "203.0.113.99"}


def conflist(*plugins, version="1.0.0"):
    return json.dumps({"cniVersion": version, "name": "podnet", "plugins": plugins})


@pytest.fixture
def name(request):
    with own_lab(request.node.name) as chosen:
        yield chosen


@pytest.fixture
def spied(tmp_path, monkeypatch):
    """Put a script before each plugin: it notes the call, then becomes the plugin. Provides a reader of the calls."""
    notes = tmp_path / "notes"
    folder = tmp_path / "spies"
    folder.mkdir()
    for plugin in Path("/usr/lib/cni").iterdir():
        spy = folder / plugin.name
        spy.write_text(
            f"#!{sys.executable} -IS\n"
            "import json, os, sys\n"
            "asked = sys.stdin.read()\n"
            "said = {key: value for key, value in os.environ.items() if key.startswith('CNI_')}\n"
            f"said['plugin'], said['asked'] = {plugin.name!r}, json.loads(asked)\n"
            "said['inside'] = os.stat('/proc/self/ns/net').st_ino\n"
            f"print(json.dumps(said), file=open({str(notes)!r}, 'a'))\n"
            "r, w = os.pipe(); os.write(w, asked.encode()); os.close(w); os.dup2(r, 0)\n"
            f"os.execv({str(plugin)!r}, [{str(plugin)!r}])\n"
        )
        spy.chmod(0o755)
    monkeypatch.setenv("CNI_PATH", str(folder))

    def calls():
        """Return the calls so far of the plugins in the list, without those for addresses."""
        every = [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []
        return [call for call in every if call["plugin"] != "host-local"]

    return calls


@pytest.mark.slow
def test_a_bridge_with_ports_tuning_and_firewall(name):
    plugins = (BRIDGE, PORTMAP, {"type": "tuning", "mtu": 1400}, {"type": "firewall"})
    with running(Spec(name, containers=2, cni=conflist(*plugins))) as lab:
        for sender, to in [("c1", "remote"), ("c1", "c2"), ("c1", "host"), ("remote", "c2")]:
            for family in (4, 6):
                assert lab.ping(sender, to, count=2, family=family).received == 2
        assert lab.families("c1") == (4, 6)
        shown = json.loads(lab.popen("c1", ["ip", "-j", "addr", "show", "eth0"]).communicate()[0])[0]
        assert shown["mtu"] == 1400
        assert {lab.address("c1"), lab.address("c1", 6)} <= {each["local"] for each in shown["addr_info"]}
        assert "8080" in lab.popen("host", ["iptables", "-t", "nat", "-S"]).communicate()[0]
        assert next(info.runtime for info in list_labs() if info.name == name) == "cni"
        assert f"c2 {lab.address('c2')} {lab.address('c2', 6)}" in lab.network


@pytest.mark.slow
@pytest.mark.parametrize(
    "plugin",
    [
        {"type": "ptp", "ipam": {"type": "host-local", "subnet": "192.0.2.0/26", "routes": [{"dst": "0.0.0.0/0"}]}},
        {"type": "macvlan", "mode": "bridge", "ipam": NEAR},
    ],
    ids=lambda plugin: plugin["type"],
)
def test_networks_without_masquerade_are_reached_from_the_remote(name, plugin):
    with running(Spec(name, cni=conflist(plugin))) as lab:
        assert lab.ping("c1", count=2).received == 2
        assert lab.ping("remote", "c1", count=2).received == 2
        assert lab.udp("c1", count=20, echo=True).received == 20
        with pytest.raises(UsageError, match="gives c1 no IPv6 address"):
            lab.ping("c1", "c1", family=6)


@pytest.mark.slow
def test_plugins_get_what_the_specification_says(name, spied):
    text = conflist(BRIDGE, PORTMAP)
    with running(Spec(name, containers=2, cni=text)) as lab:
        host, inner = lab.netns_inode("host"), str(lab.netns_path("c1"))
        files = lab._state.directory / "cni"
        (kept,) = [json.loads(p.read_text()) for p in (files / "results").iterdir() if p.name.endswith("-c1-eth0")]
        assert len(list((files / "networks" / "podnet").glob("192.0.2.*"))) == 2
        lab.remove_container("c2")
        assert len(list((files / "networks" / "podnet").glob("192.0.2.*"))) == 1
        lab.add_container("c3")
        lab.remove_container("c3")
    calls = [call for call in spied() if call["CNI_CONTAINERID"].endswith("c1")]
    assert [(c["CNI_COMMAND"], c["plugin"]) for c in calls] == [
        ("ADD", "bridge"), ("ADD", "portmap"), ("DEL", "portmap"), ("DEL", "bridge"),
    ]  # fmt: skip
    for call in calls:
        assert (call["inside"], call["CNI_NETNS"], call["CNI_IFNAME"]) == (host, inner, "eth0")
        assert call["CNI_PATH"] == os.environ["CNI_PATH"]
        assert (call["asked"]["name"], call["asked"]["cniVersion"]) == ("podnet", "1.0.0")
        assert "capabilities" not in call["asked"]
    assert len({call["CNI_CONTAINERID"] for call in calls}) == 1
    bridge, portmap, *deletions = (call["asked"] for call in calls)
    assert "prevResult" not in bridge
    assert portmap["prevResult"]["ips"][0]["address"] == "192.0.2.2/26"
    assert portmap["runtimeConfig"] == PORTS
    for asked in deletions:
        assert asked["prevResult"] == kept["result"]
    assert (kept["kind"], kept["containerId"]) == ("cniCacheV1", calls[0]["CNI_CONTAINERID"])
    assert base64.b64decode(kept["config"]).decode() == text
    every = [(c["CNI_COMMAND"], c["plugin"]) for c in spied()]
    assert every.count(("ADD", "bridge")) == every.count(("DEL", "bridge")) == 3


@pytest.mark.slow
def test_a_plugins_error_is_one_line_with_its_code_and_undoes_what_came_before(name, spied):
    full = {"type": "bridge", "bridge": "cnitest0", "ipam": {"type": "host-local", "subnet": "192.0.2.0/30"}}
    broken = {"type": "tuning", "sysctl": {"net.no.such": "1"}}
    told = r"CNI plugin tuning, ADD of c1: code \d+: .*no/such.*"
    with pytest.raises(LabError, match=told) as caught:
        up(Spec(name, cni=conflist(full, broken)))
    assert "\n" not in str(caught.value)
    assert [(c["CNI_COMMAND"], c["plugin"]) for c in spied()] == [
        ("ADD", "bridge"), ("ADD", "tuning"), ("DEL", "tuning"), ("DEL", "bridge"),
    ]  # fmt: skip
    with running(Spec(name, cni=conflist(full, version="0.3.1"))) as lab:
        with pytest.raises(LabError, match=r"CNI plugin bridge, ADD of c2: code \d+: .*no IP addresses available"):
            lab.add_container("c2")
        assert lab.ping("c1", "c1", count=1).received == 1
        assert attach(name).containers == ("c1",)
    *_, last = spied()
    assert (last["CNI_COMMAND"], "prevResult" in last["asked"]) == ("DEL", False), "DEL has a result from 0.4.0 on"


def test_two_labs_have_no_bridge_of_one_name(name, spied):
    """ftrace could not distinguish their packets; the message says what to do, and nothing is left of the second."""
    with own_lab("second") as second, running(Spec(name, cni=conflist(BRIDGE))):
        same = Spec(second, cni=conflist({**BRIDGE, "isGateway": False}, PORTMAP))
        with pytest.raises(
            UsageError, match=rf"lab '{name}' is up and has a bridge cnitest0, too.*mace lab down {name}"
        ):
            up(same)
        assert second not in {info.name for info in list_labs()}
        with running(Spec(second, cni=conflist({**BRIDGE, "bridge": "cnitest1"}))) as lab:
            assert lab.ping("c1", count=1).received == 1
    with own_lab("third") as third, running(Spec(third, cni=conflist(BRIDGE))) as lab:
        assert lab.ping("c1", count=1).received == 1


@pytest.mark.slow
@pytest.mark.needs("tracefs", "ifb")
def test_packets_behind_a_bandwidth_limit_are_matched_both_ways(name):
    """The plugin sends what a pod sends through an ifb device and back to the pod's pair."""
    limit = {f"{way}Rate": 100_000_000 for way in ("ingress", "egress")}
    limit |= {f"{way}Burst": 100_000_000 for way in ("ingress", "egress")}
    ptp = {"type": "ptp", "ipam": {"type": "host-local", "subnet": "192.0.2.0/26", "routes": [{"dst": "0.0.0.0/0"}]}}
    scenario = Scenario(
        "limited",
        "UDP and its echo behind the plugin bandwidth",
        lambda stage: stage.talk(("udp", "c1", 96, 2000)),
        spec=Spec(name, cni=conflist(ptp, {"type": "bandwidth", **limit})),
    )
    found = verdict.verdict(scenario, Config(capture=CaptureConfig(source="ftrace")), packets=200)
    assert (found.packets, found.precision, found.recall, found.wrong) == (400, 1.0, 1.0, 0)


@pytest.mark.slow
@pytest.mark.needs("tracefs")
def test_two_networks_are_compared_device_by_device(name, tmp_path):
    file = tmp_path / "pods.conflist"
    file.write_text(conflist(BRIDGE))
    with running(Spec(name, layout=Layout.CALICO)):
        argv = ("--networks", name, file, "--sources", "ftrace", "--rounds", "1", "--count", "100", "--json")
        found = json.loads(mace("compare", *argv).stdout)
    ours, pods = found["networks"][name], found["networks"]["pods"]
    assert (found["source"], ours["trips"], pods["trips"]) == ("ftrace", 100, 100)
    assert ours["difference_us"] == 0
    assert pods["difference_us"] == pytest.approx(pods["rtt_p50_us"] - ours["rtt_p50_us"], abs=0.03)
    devices = {(row["direction"], row["part"]): row for row in found["devices"]}
    for direction in ("egress", "ingress"):
        for part in ("container's veth", "pair's host end", "outer device", "far end's veth"):
            row = devices[direction, part]
            assert min(row[name]["count"], row["pods"]["count"]) >= 100
        assert name not in devices[direction, "bridge"], "routed, without a bridge"
        assert devices[direction, "bridge"]["pods"]["devices"] == ["cnitest0"]
        for each in (ours, pods):
            assert each[f"overhead_{direction}"]["p50_us"] > 0
            assert each["small_pps"] > 0
            balanced(each)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["bridge"], "at least two"),
        (["bridge", "bridge"], "bridge is there twice"),
        (["bridge", "flanel"], r"no 'flanel' \(did you mean 'flannel'\?\)"),
        (["bridge", "nosuch.conflist"], "nosuch.conflist: No such file"),
    ],
)
def test_impossible_comparisons_are_refused(words, told):
    with pytest.raises(UsageError, match=told):
        networks.chosen(words, settings.network_text)


@pytest.mark.slow
def test_the_command_line(name, tmp_path):
    file = tmp_path / "pods.conflist"
    file.write_text(conflist(BRIDGE))
    done = mace("lab", "up", name, "--cni", file)
    assert "network podnet, by the CNI plugins bridge: c1 192.0.2.2 2001:db8:2::2" in done.stdout
    file.unlink()  # the lab has what it needs
    assert attach(name).ping("c1", count=3).received == 3
    file.write_text(conflist(BRIDGE, version="1.1.0"))
    assert down(name)
    failed = mace("lab", "up", name, "--cni", file, check=False)
    assert failed.returncode == 1
    (line,) = [line for line in failed.stderr.splitlines() if line.startswith("mace: ")]
    assert line.startswith('mace: CNI plugin bridge, ADD of c1: code 1: incompatible CNI versions; config is "1.1.0"')


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"pods\.conflist: No such file"):
        settings.network_text(tmp_path / "pods.conflist")


@pytest.mark.slow
def test_the_next_clean_up_deletes_after_kill_9(name, spied):
    """A lab killed while a plugin runs, and its result therefore unknown, is deleted without a result."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from mace.lab import Layout, Spec, running\n"
        "from mace.lab import cni\n"
        "cni._keep = lambda *_: (print('added', flush=True), sys.stdin.read())\n"
        f"with running(Spec({name!r}, cni={conflist(BRIDGE)!r})): pass\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as made:
        assert made.stdout.readline() == "added\n"
        made.send_signal(signal.SIGKILL)
    assert state.load(name).members["c1"].cni_id
    assert down(name)
    assert [(c["CNI_COMMAND"], "prevResult" in c["asked"]) for c in spied()] == [("ADD", False), ("DEL", False)]


def test_missing_plugins_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("CNI_PATH", str(tmp_path))
    (one, other) = cni.problems(conflist(BRIDGE))
    assert "'bridge'" in str(one)
    assert "'host-local'" in str(other)
