import json
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from contracts.errors import LabError, UsageError
from mace.lab import FarEnd, Layout, Runtime, Spec, plan, state, traffic

# Each example covers all places of a lab, so that few examples suffice.
FEW = settings(max_examples=20)
SPECS = st.builds(
    Spec,
    name=st.from_regex(r"[a-z0-9]([a-z0-9-]{0,22}[a-z0-9])?", fullmatch=True),
    containers=st.integers(1, 29),
    bridges=st.integers(2, 8),
    same_addresses=st.booleans(),
)
DOCUMENTATION = [ip_network(net) for net in ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "2001:db8::/32")]


def all_places(spec: Spec) -> list[plan.Placement]:
    return [plan.place(spec, f"c{slot + 1}", slot) for slot in range(plan.capacity(spec))]


@pytest.mark.slow
@FEW
@given(SPECS)
def test_all_addresses_are_reserved_for_documentation(spec):
    addresses = [a for p in all_places(spec) for a in (p.ipv4, p.ipv6)]
    addresses += [a for b in plan.bridges(spec) for a in (b.ipv4, b.ipv6)]
    addresses += [*plan.wire("host"), *plan.wire("remote")]
    for address in addresses:
        assert any(address.ip in net for net in DOCUMENTATION if net.version == address.version)


@pytest.mark.slow
@FEW
@given(SPECS)
def test_a_container_shares_its_bridges_subnet_and_all_are_masqueraded(spec):
    net4, net6 = plan.bridge_networks()
    for place in all_places(spec):
        assert place.ipv4.network == place.bridge.ipv4.network
        assert place.ipv6.network == place.bridge.ipv6.network
        assert place.ipv4.network.subnet_of(net4)
        assert place.ipv6.network.subnet_of(net6)
        assert place.ipv4.ip not in (place.ipv4.network.network_address, place.ipv4.network.broadcast_address)


@FEW
@given(SPECS)
def test_addresses_are_unique_on_a_bridge_and_differ_between_bridges_unless_asked_to_be_the_same(spec):
    places = all_places(spec)
    gateways = [(b.name, b.ipv4.ip, b.mac) for b in plan.bridges(spec)]
    on_bridge = [(p.bridge.name, p.ipv4.ip, p.mac) for p in places] + gateways
    assert len({(bridge, ip) for bridge, ip, _ in on_bridge}) == len(on_bridge)
    assert len({(bridge, mac) for bridge, _, mac in on_bridge}) == len(on_bridge)
    first = [p for p in places if p.slot < spec.bridges]
    assert len({(p.ipv4, p.ipv6) for p in first}) == (1 if spec.same_addresses else spec.bridges)


def test_a_full_bridge_still_has_room_in_its_subnet():
    spec = Spec(containers=250)
    assert plan.capacity(spec) == 250
    assert plan.place(spec, "c250", 249).ipv4.ip == ip_address("198.51.100.251")
    with pytest.raises(UsageError, match="full"):
        plan.place(spec, "c251", 250)


def test_device_names_fit_the_kernels_15_characters():
    longest = Spec(name="another")
    assert len(plan.place(longest, "a234567", 0).veth) == 15
    assert len(plan.bridges(Spec(name="another", bridges=8))[-1].name) <= 15


def test_devices_of_two_labs_have_different_names():
    def names(lab):
        spec = Spec(name=lab, containers=2, bridges=2)
        places = [plan.place(spec, f"c{n}", n) for n in range(2)]
        host_side = {p.veth for p in places} | {b.name for b in plan.bridges(spec)}
        return host_side | {plan.outer_device(lab), plan.remote_device(lab)}

    labs = ["lab", "demo", "a", "b", "another-lab", "0", "1"]
    assert len(set().union(*map(names, labs))) == sum(len(names(lab)) for lab in labs)


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": ""},
        {"name": "../etc"},
        {"name": "a/b"},
        {"name": "-a"},
        {"name": "A"},
        {"name": "x" * 25},
        {"containers": 0},
        {"containers": 251},
        {"bridges": 0},
        {"bridges": 9},
        {"same_addresses": True},
        {"runtime": Runtime.DOCKER, "bridges": 2, "containers": 2},
        {"runtime": Runtime.DOCKER, "layout": Layout.CALICO},
        {"runtime": Runtime.PODMAN, "bridges": 2, "containers": 2},
        {"runtime": Runtime.APPTAINER, "layout": Layout.PTP},
        {"layout": Layout.FLANNEL, "bridges": 2},
        {"layout": Layout.PTP, "far_end": FarEnd.GUEST},
    ],
)
def test_impossible_labs_are_refused(wrong):
    with pytest.raises(UsageError):
        Spec(**wrong)


@pytest.mark.parametrize("name", ["host", "remote", "", "C1", "1c", "a-b", "a" * 8, "c1\n"])
def test_invalid_container_names(name):
    with pytest.raises(UsageError):
        plan.check_container_name(name)


@given(SPECS, st.from_regex(r"[a-z][a-z0-9]{0,6}", fullmatch=True))
def test_namespace_names_say_which_lab_and_member(spec, member):
    assert plan.parse_netns_name(plan.netns_name(spec.name, member)) == (spec.name, member)


@pytest.mark.parametrize("name", ["mace", "mace-", "mace-c1", "mace--c1", "x-lab-c1", "mace-lab-", "mace-lab-C1", "c1"])
def test_foreign_namespaces_are_not_recognised(name):
    assert plan.parse_netns_name(name) is None


@given(SPECS)
def test_namespaces_of_two_labs_are_distinct(spec):
    assume(spec.name != "lab")
    ours = {plan.netns_name("lab", member) for member in ("host", "remote", "c1", "c2")}
    assert not ours & {plan.netns_name(spec.name, member) for member in ("host", "remote", "c1", "c2")}


@pytest.fixture
def state_dir(tmp_path, monkeypatch):
    monkeypatch.setattr(state, "STATE_DIR", tmp_path)
    return tmp_path


def test_state_survives_the_file(state_dir):
    record = state.State(Spec(name="s", containers=2, layout=Layout.CALICO), owner=state.this_process())
    record.members["c1"] = state.Member("/run/netns/mace-s-c1", inode=7, slot=0, ipv4="198.51.100.2")
    record.save()
    assert state.load("s") == record
    assert state.names() == ["s"]
    record.forget()
    assert state.load("s") is None
    assert list(state_dir.iterdir()) == []


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"version": 99}', '{"version": 1}', '{"version": 1, "spec": 3}']
)
def test_a_damaged_state_file_is_an_error_that_names_it(state_dir, content):
    (state_dir / "s.json").write_text(content)
    with pytest.raises(LabError, match=r"s\.json"):
        state.load("s")


def test_a_state_file_under_another_name_is_refused(state_dir):
    state.State(Spec(name="s")).save()
    (state_dir / "s.json").rename(state_dir / "t.json")
    with pytest.raises(LabError, match="lab 't'"):
        state.load("t")


def test_an_id_that_would_match_foreign_processes_is_refused(state_dir):
    state.State(Spec(name="s")).save()
    text = (state_dir / "s.json").read_text()
    (state_dir / "s.json").write_text(json.dumps({**json.loads(text), "id": ""}))
    with pytest.raises(LabError):
        state.load("s")


def test_a_recycled_process_number_is_another_process():
    this = state.this_process()
    assert this.alive()
    assert not state.Process(this.pid, this.start_ticks - 1).alive()


def test_the_lock_is_exclusive_and_leaves_no_file(state_dir, monkeypatch):
    monkeypatch.setattr(state, "LOCK_LIMIT_S", 0.05)
    with state.locked("s"):
        assert state.is_locked("s")
        with pytest.raises(LabError, match="another process"), state.locked("s"):
            pass
    assert not state.is_locked("s")
    assert list(state_dir.iterdir()) == []


def test_ping_output_is_parsed():
    text = (
        "PING 203.0.113.2 (203.0.113.2) 56(84) bytes of data.\n"
        "64 bytes from 203.0.113.2: icmp_seq=1 ttl=63 time=0.095 ms\n"
        "64 bytes from 203.0.113.2: icmp_seq=3 ttl=63 time=1.50 ms\n"
        "\n--- 203.0.113.2 ping statistics ---\n"
        "3 packets transmitted, 2 received, 33.3333% packet loss, time 2041ms\n"
        "rtt min/avg/max/mdev = 0.095/0.797/1.500/0.702 ms\n"
    )
    result = traffic._ping_result(text, None)
    assert (result.sent, result.received, result.duration_s) == (3, 2, 2.041)
    assert result.rtts_ns == (95_000, 1_500_000)
    assert result.mean_rtt_ns == 797_500


def test_a_flood_has_a_mean_but_no_single_round_trips():
    text = (
        "5 packets transmitted, 5 received, 0% packet loss, time 1ms\n"
        "rtt min/avg/max/mdev = 0.009/0.014/0.020/0.004 ms, ipg/ewma 0.250/0.015 ms\n"
    )
    result = traffic._ping_result(text, None)
    assert result.rtts_ns == ()
    assert result.mean_rtt_ns == 14_000


@pytest.mark.parametrize(
    ("count", "rate_pps", "duration_s"),
    [(10_000, 0, 0), (10_000, 1000, 0), (1_000_000, 100_000, 0), (10**9, 0, 30), (10, 0.1, 0), (1000, 0, 3600)],
)
def test_the_time_limit_exceeds_the_requested_duration(count, rate_pps, duration_s):
    limit_s = traffic._limit_s(count, rate_pps, duration_s)
    asked_s = count / (rate_pps or 60_000)
    assert limit_s > min(asked_s, duration_s or asked_s)
    assert limit_s <= traffic.MAX_LIMIT_S


@pytest.mark.parametrize(
    ("words", "masks"),
    [
        ((), {}),
        (("outer=0",), {"outer": 1}),
        (("vxlan=1", "veth=0-2,5"), {"vxlan": 2, "veth": 0b100111}),
        (("veth=0", "veth=3"), {"veth": 0b1001}),
    ],
)
def test_the_cpus_of_receive_softirqs(words, masks):
    assert plan.rps_masks(Spec(layout=Layout.OVERLAY, rps=words)) == masks


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"rps": ("vxlan=1",)}, "there are outer, veth"),
        ({"rps": ("vxlna=1",), "layout": Layout.OVERLAY}, "did you mean 'vxlan'"),
        ({"rps": ("veth",)}, "expected DEVICE=CPUS"),
        ({"rps": ("veth=all",)}, "expected DEVICE=CPUS"),
        ({"rps": ("veth=2-1",)}, "the range 2-1 is empty"),
        ({"rps": ("veth=1",), "runtime": Runtime.DOCKER}, "needs the netns runtime"),
    ],
)
def test_impossible_cpus_are_refused(values, why):
    with pytest.raises(UsageError, match=why):
        Spec(**values)
