"""The parts of the follower that need no other namespace: parsing the kernel's messages and tables."""

import asyncio
import os
import struct
import subprocess
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collector.machine import containers, devices, netns
from collector.machine.containers import NOBODY, Called
from collector.machine.devices import DeviceFollower, _Namespace, check, snapshot
from collector.machine.namespace_names import NamespaceNames
from collector.machine.netns import Found, inode_of, leave_for_new_netns, open_netns, path_of
from collector.machine.rtnetlink import Link, _messages, _parse_event, parse_default_route, parse_link
from contracts.errors import Unavailable


def attribute(kind: int, payload: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(payload), kind) + payload + bytes(-len(payload) % 4)


def u32(value: int) -> bytes:
    return struct.pack("=I", value)


def link_message(*attributes: bytes, ifindex: int = 7, arp_type: int = 1, family: int = 0) -> bytes:
    return struct.pack("=BxHiII", family, arp_type, ifindex, 0, 0) + b"".join(attributes)


def linkinfo(kind: str, *data: bytes) -> bytes:
    return attribute(18, attribute(1, kind.encode() + b"\0") + attribute(2, b"".join(data)))


def parsed(message: bytes) -> Link:
    return parse_link(message, 0, len(message))


def test_hardware() -> None:
    assert parsed(link_message(attribute(3, b"eth0\0"))) == Link(7, "eth0", "", 0, None, 0)


def test_loopback_is_known_by_its_type_not_its_name() -> None:
    assert parsed(link_message(attribute(3, b"me\0"), arp_type=772)).kind == "loopback"
    assert parsed(link_message(attribute(3, b"lo\0"))).kind == ""


def test_veth_across_namespaces() -> None:
    message = link_message(
        attribute(3, b"eth0\0"), attribute(5, u32(7)), attribute(37, u32(3)), attribute(10, u32(2)), linkinfo("veth")
    )
    assert parsed(message) == Link(7, "eth0", "veth", 7, 3, 2)


def test_a_peer_in_a_namespace_without_a_number() -> None:
    assert parsed(link_message(attribute(5, u32(9)), attribute(37, u32(0xFFFFFFFF)))).link_nsid == -1


def test_a_link_to_itself_is_ignored() -> None:
    assert parsed(link_message(attribute(5, u32(7)))).link == 0


def test_vxlan_has_its_lower_device_among_its_options() -> None:
    assert parsed(link_message(linkinfo("vxlan", attribute(1, u32(42)), attribute(3, u32(5))))).link == 5


def test_flag_bits_of_an_attribute_s_type_are_ignored() -> None:
    assert parsed(link_message(attribute(18 | 0x8000, attribute(1, b"bridge\0")))).kind == "bridge"


def test_a_name_of_any_bytes() -> None:
    assert parsed(link_message(attribute(3, b"\xffeth\0"))).name == r"\xffeth"


def route(*attributes: bytes, dst_len: int = 0, table: int = 254, kind: int = 1, flags: int = 0) -> frozenset[int]:
    message = struct.pack("=8BI", 2, dst_len, 0, 0, table, 3, 0, kind, flags) + b"".join(attributes)
    return parse_default_route(message, 0, len(message))


def test_default_routes() -> None:
    device = attribute(4, u32(3))
    assert route(device) == {3}
    assert route(device, dst_len=8) == frozenset()
    assert route(device, table=255) == frozenset()
    assert route(device, kind=7) == frozenset()  # unreachable
    assert route(device, flags=0x200) == frozenset()  # a cache entry
    assert route(device, attribute(15, u32(254)), table=0) == {3}
    assert route(device, attribute(15, u32(1000)), table=252) == frozenset()


def test_a_default_route_over_two_devices() -> None:
    gateway = attribute(5, bytes(4))
    hops = b"".join(struct.pack("=HBBi", 8 + len(gateway), 0, 0, ifindex) + gateway for ifindex in (3, 8))
    assert route(attribute(9, hops)) == {3, 8}
    assert route(attribute(9, bytes(32))) == {0}


@given(st.binary(max_size=200))
def test_arbitrary_messages_are_parsed_or_refused(data: bytes) -> None:
    for kind, _, start, end in _messages(data):
        assert 16 <= start <= end <= len(data)
        try:
            _parse_event(data, kind, start, end, 1)
        except (struct.error, IndexError):
            pass
    for parse in (parse_link, parse_default_route):
        try:
            parse(bytes(16) + data, 0, 16 + len(data))
        except struct.error:
            pass


MOUNTS = rb"""22 27 0:21 / /proc rw,relatime - proc proc rw
44 43 0:4 net:[4026532384] /run/netns/web rw shared:2 - nsfs nsfs rw
45 43 0:4 net:[4026532384] /run/netns/web rw shared:2 - nsfs nsfs rw
46 43 0:4 mnt:[4026532385] /run/snapd/ns/x.mnt rw - nsfs nsfs rw
47 43 0:4 net:[4026532386] /run/docker/netns/ef7a524de436 rw - nsfs nsfs rw
48 43 0:4 net:[4026532387] /run/user/1000/netns/a\040b rw - nsfs nsfs rw
49 43 0:4 net:[4026532388] /srv/netns/own rw - nsfs nsfs rw
50 43 0:4 net:[4026532388] /run/netns/own rw - nsfs nsfs rw
51 43 0:4 /net:[1] /run/netns/fake rw - tmpfs tmpfs rw
"""


def test_mounted_namespaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mountinfo").write_bytes(MOUNTS)

    def path(_: str) -> Path:
        return tmp_path / "mountinfo"

    monkeypatch.setattr(netns, "Path", path)
    monkeypatch.setattr(netns, "_same_mounts", lambda: True)
    assert netns.mounted() == {
        4026532384: ("web", "/run/netns/web"),
        4026532386: ("", "/run/docker/netns/ef7a524de436"),
        4026532387: ("a b", "/run/user/1000/netns/a b"),
        4026532388: ("own", "/run/netns/own"),
    }


def test_the_own_namespace_is_found_among_processes() -> None:
    own = inode_of("/proc/self/ns/net")
    assert own is not None
    assert os.getpid() in netns.occupied()[own]


def test_other_files_have_no_namespace_inode(tmp_path: Path) -> None:
    assert inode_of("/proc/self/ns/mnt") is None
    assert inode_of("/proc/self/exe") is None
    assert inode_of(str(tmp_path / "nothing")) is None


def test_a_namespace_is_opened_only_if_it_is_still_the_same() -> None:
    own = inode_of("/proc/self/ns/net")
    assert own is not None
    fd = open_netns(Found(own, pid=os.getpid()))
    assert fd is not None
    assert os.fstat(fd).st_ino == own
    os.close(fd)
    assert open_netns(Found(own + 1, path="/proc/self/ns/net", pid=os.getpid())) is None
    assert open_netns(Found(own)) is None


def test_the_main_thread_stays_in_its_namespace() -> None:
    assert threading.current_thread() is threading.main_thread()
    with pytest.raises(RuntimeError, match="main thread"):
        leave_for_new_netns()


def refuse() -> int:
    raise PermissionError(1, "Operation not permitted", "unshare(CLONE_NEWNET)")


def test_without_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "leave_for_new_netns", refuse)
    before = len(list(Path("/proc/self/fd").iterdir()))
    status = check()
    assert not status.ok
    assert "root" in status.remedy
    with pytest.raises(Unavailable, match="run as root"):
        snapshot()

    async def follow() -> None:
        follower = DeviceFollower()
        with pytest.raises(Unavailable, match="run as root"):
            await follower.open()
        await follower.aclose()
        await follower.aclose()

    asyncio.run(follow())
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_without_room_for_a_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> int:
        raise OSError(28, "No space left on device", "unshare(CLONE_NEWNET)")

    monkeypatch.setattr(devices, "leave_for_new_netns", full)
    assert "max_net_namespaces" in check().remedy


@pytest.mark.needs("root")
def test_for_real_without_capabilities() -> None:
    program = "from collector.machine.devices import check; s = check(); print(s.ok, s.remedy)"
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--clear-groups", "--bounding-set=-all", os.sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(devices.__file__).parent.parent,
    )
    if "No such file" in done.stderr or "Permission denied" in done.stderr:
        pytest.skip("an unprivileged user may not read this checkout or its Python")
    assert done.stdout.startswith("False run as root"), done.stderr


def test_a_namespace_is_named_by_its_name_or_its_path():
    assert path_of("web") == "/run/netns/web"
    assert path_of("/proc/1/ns/net") == "/proc/1/ns/net"


ID, OTHER_ID = "a" * 64, "b" * 64
DRAWN = "cni-3b0ee13c-d0a8-e5a0-7b1c-4d7e1c7c3e5f"
INODE = 4026532000


@pytest.mark.parametrize(
    ("name", "by_api", "by_process", "called"),
    [
        ("", {INODE: Called("web", ID)}, Called(ID[:12], ID), ("net:[4026532000]", "web", ID)),
        ("", {}, Called(ID[:12], ID), ("net:[4026532000]", ID[:12], ID)),
        ("", {}, Called("sleep[7]"), ("net:[4026532000]", "sleep[7]", "")),
        ("", {}, NOBODY, ("net:[4026532000]", "", "")),
        (DRAWN, {INODE: Called("web", ID)}, NOBODY, (DRAWN, "web", ID)),
        (DRAWN, {}, Called(ID[:12], ID), (DRAWN, ID[:12], ID)),
        # Namespaces made by hand, perhaps inside a container: the runtime does not rename them.
        ("blue", {}, Called(ID[:12], ID), ("blue", "blue", "")),
        ("mace-lab-c1", {}, Called(ID[:12], ID), ("mace-lab-c1", "c1", "")),
        ("mace-lab-c1", {INODE: Called("web", ID)}, NOBODY, ("mace-lab-c1", "c1", "")),
        # Another namespace in a container whose own namespace the API names.
        ("", {7: Called("web", ID)}, Called(ID[:12], ID), ("net:[4026532000]", ID[:12], "")),
        ("", {7: Called("web", OTHER_ID)}, Called(ID[:12], ID), ("net:[4026532000]", ID[:12], ID)),
    ],
)
def test_an_id_goes_with_the_runtime_s_name(
    name: str,
    by_api: dict[int, Called],
    by_process: Called,
    called: tuple[str, str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(containers, "_LABS", tmp_path)
    (tmp_path / "lab.json").write_text("{}")
    names = NamespaceNames((), lambda: None)
    names._service.called = by_api
    names.use()
    namespace = _Namespace(5, 1, Found(INODE, name), 0.0, by_process=by_process)
    assert names.of(namespace) == (*called, "")
