import json

import pytest

from contracts.errors import UsageError
from mace.lab import FarEnd, Layout, Runtime, Spec, cni_list

BRIDGE = {"type": "bridge", "ipam": {"type": "host-local", "subnet": "192.0.2.0/24"}, "capabilities": {"ips": True}}


def text(**changes):
    return json.dumps({"cniVersion": "1.0.0", "name": "pods", "plugins": [BRIDGE, {"type": "tuning"}], **changes})


def test_bridges_have_the_names_that_plugins_give_them():
    plugins = [
        BRIDGE,
        {**BRIDGE, "bridge": "br-pods"},
        {"type": "ptp", "bridge": "none"},
        {**BRIDGE, "bridge": 5},
        BRIDGE,
    ]
    assert cni_list.parse(text(plugins=plugins)).bridges == ("cni0", "br-pods")


def test_a_request_is_the_plugins_configuration_with_names_results_and_the_labs_directory(tmp_path):
    network = cni_list.parse(text())
    assert (network.name, network.types) == ("pods", ("bridge", "tuning"))
    assert network.programs == ("bridge", "tuning", "host-local")
    assert network.request(0, None, tmp_path) == {
        "type": "bridge",
        "cniVersion": "1.0.0",
        "name": "pods",
        "ipam": {"type": "host-local", "subnet": "192.0.2.0/24", "dataDir": f"{tmp_path}/networks"},
    }
    assert network.request(1, {"ips": []}, tmp_path) == {
        "type": "tuning",
        "cniVersion": "1.0.0",
        "name": "pods",
        "dataDir": f"{tmp_path}/tuning",
        "prevResult": {"ips": []},
    }
    assert network.plugins[0] == BRIDGE


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[]", "expected an object, found"),
        (json.dumps(BRIDGE), 'put it into the list "plugins"'),
        (text(name="../etc"), 'name "../etc"'),
        (text(name=None), "name null"),
        (text(cniVersion="0.2.0"), 'cniVersion "0.2.0", expected 0.3.0'),
        (text(cniVersion=1), "cniVersion 1,"),
        (text(plugins=[]), "plugins []"),
        (text(plugins="bridge"), 'plugins "bridge"'),
        (text(plugins=[3]), "plugin 1 is 3"),
        (text(plugins=[BRIDGE, {}]), "plugin 2 has type null"),
        (text(plugins=[{"type": "../../bin/sh"}]), 'plugin 1 has type "../../bin/sh"'),
        (text(plugins=[{"type": "ptp", "ipam": []}, {"type": "ptp", "ipam": "x"}]), 'ipam is "x"'),
        (text(plugins=[{"type": "ptp", "ipam": {}}, {"type": "ptp", "ipam": {"a": 1}}]), "ipam of plugin 2 has type"),
        (text(plugins=[{"type": "ptp", "ipam": {"type": "dhcp"}}]), "ipam dhcp needs a daemon"),
    ],
)
def test_other_files_are_refused_in_one_line(content, told):
    with pytest.raises(UsageError) as caught:
        Spec(cni=content) if content else cni_list.parse(content)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change", [{"bridges": 2}, {"layout": Layout.PTP}, {"runtime": Runtime.DOCKER}, {"far_end": FarEnd.GUEST}]
)
def test_a_cni_network_has_neither_bridges_nor_docker_nor_a_guest(change):
    with pytest.raises(UsageError, match="CNI network"):
        Spec(cni=text(), **change)
