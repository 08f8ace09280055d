"""The module's packet parser, compiled for user space, agrees with the reader of packet captures.

tests/kernel/guest/test_packets.py compares the module itself with both in virtual machines; this test can afford many
more packets.
"""

import ctypes
import re
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest

from contracts import abi
from tests.kernel.guest.test_packets import CASES, READ, ether, ipv4, ipv6, read_of_captures, tcp

pytestmark = pytest.mark.needs("cc")
HERE = Path(__file__).parent
KMOD = HERE.parents[1] / "kmod"
WHOLE = 1 << 14
SPLITS = (0, 8, 20, 28, 40, 52, 60, 80, WHOLE)
"""Numbers of a packet's bytes in the buffer's linear part."""


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    folder = tmp_path_factory.mktemp("module")
    for source in KMOD.glob("*.[ch]"):
        for name in re.findall(r"^#include <((?:linux|net|asm)/\S+)>$", source.read_text(), re.MULTILINE):
            if name not in ("linux/types.h", "linux/ioctl.h", "linux/if_ether.h"):
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).touch()
    library = folder / "packet.so"
    options = [
        "-std=gnu11",
        "-O1",
        "-g",
        "-Wall",
        "-Werror",
        "-shared",
        "-fPIC",
        f"-I{folder}",
        f"-I{HERE}",
        f"-I{KMOD}",
    ]
    done = subprocess.run(
        ["cc", *options, "-o", library, HERE / "packet_module.c"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = ctypes.CDLL(str(library))
    assert found.prepare() == 0
    return found


def read(module, frame, linear=WHOLE, buffer=0):
    record = np.zeros((), abi.RECORD)
    module.read_frame(frame, len(frame), linear, buffer, ctypes.c_void_p(record.ctypes.data))
    return record


def told(record):
    return {field: int(record[field]) for field in READ} | {"flags": int(record["flags"]) & ~abi.Flag.VLAN}


@pytest.mark.parametrize("name", CASES)
def test_each_case_wherever_its_bytes_are(module, name):
    case = CASES[name]
    for linear in np.repeat(SPLITS, 2).tolist():  # read, and recognised
        record = read(module, case.frame, linear)
        fields = {field: int(value) for field, value in case.fields.items()}
        assert {field: int(record[field]) for field in fields} == fields
        assert f"{record['packet_key']:016x}" == f"{case.key:016x}"


CUT_OFF = (
    "ip header longer than the packet",
    "length that lies upwards",
    "extension header cut off",
    "vxlan with nothing inside",
)
"""Frames whose kind depends on missing bytes, and which are not remembered."""


def is_recognised(module, frame, then, linear=WHOLE, buffers=(0, 0)):
    """Return whether `then`, parsed after `frame`, is recognised as the same packet."""
    module.forget()
    read(module, frame, linear, buffers[0])
    module.mark()
    return bool(read(module, then, linear, buffers[1])["drop_reason"])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("buffers", [(0, 0), (0, 1)], ids=["in place", "moved"])
def test_each_case_is_recognised(module, name, buffers):
    frame = CASES[name].frame
    assert is_recognised(module, frame, frame, buffers=buffers) is (name not in CUT_OFF)


@pytest.mark.parametrize("bytes_of_payload", range(20))
@pytest.mark.parametrize(("protocol", "headers"), [(0x0800, 52), (0x86DD, 72)])
def test_a_stream_is_recognised_with_a_short_payload_in_pages(module, protocol, headers, bytes_of_payload):
    ip = {0x0800: ipv4, 0x86DD: ipv6}[protocol]
    frame = ether(protocol, ip(6, tcp(b"abcdefghijklmnopqrst"[:bytes_of_payload])))
    assert is_recognised(module, frame, frame, linear=headers)


TUNNELS = {
    "vxlan": lambda frame: ipv4(17, struct.pack("!4HII", 5000, 4789, 16 + len(frame), 0, 0x08000000, 7 << 8) + frame),
    "geneve": lambda frame: ipv4(17, struct.pack("!4HII", 5000, 6081, 16 + len(frame), 0, 0x6558, 7 << 8) + frame),
    "gretap": lambda frame: ipv4(47, struct.pack("!HHI", 0x2000, 0x6558, 7) + frame),
    "gre": lambda frame: ipv4(47, struct.pack("!H", 0) + frame[12:]),
    "ipip": lambda frame: ipv4(4, frame[14:]),
}
"""Name -> the packet that carries the packet of a frame."""
INNER = [name for name, case in CASES.items() if name not in CUT_OFF]


@pytest.mark.parametrize("kind", TUNNELS)
def test_a_tunnel_is_read_the_same_after_the_packet_that_went_into_it(module, kind):
    """Read each case, then its tunnel twice and one that differs, in one buffer or two, with more or less in place."""
    inners = [CASES[name].frame for name in INNER]
    tunnels = [ether(0x0800, TUNNELS[kind](frame)) for frame in inners]
    changed = [frame[:-1] + bytes([frame[-1] ^ 1]) for frame in tunnels]
    of_tunnels, of_changed = read_of_captures(tunnels), read_of_captures(changed)
    for at, (inner, tunnel, other) in enumerate(zip(inners, tunnels, changed, strict=True)):
        for linear in (44, 90, 130, WHOLE):
            for buffer in (0, 1):
                module.forget()
                read(module, inner, max(linear - len(tunnel) + len(inner), 20))
                for captured, frame in ((of_tunnels, tunnel), (of_tunnels, tunnel), (of_changed, other)):
                    expected = {field: int(getattr(captured, field)[at]) for field in (*READ, "flags")}
                    assert told(read(module, frame, linear, buffer)) == expected, (INNER[at], linear, buffer)


FORWARDED = {
    "type of service": (15, 1),
    "TTL": (22, 1),
    "header checksum": (24, 2),
    "addresses": (26, 8),
    "source port": (34, 2),
}
IN_TCP = {"destination port": (36, 2), "TCP checksum": (50, 2)}


@pytest.mark.parametrize(
    ("name", "at", "length"),
    [(name, *place) for name in ("tcp", "udp") for place in FORWARDED.values()]
    + [("tcp", *place) for place in IN_TCP.values()]
    + [("udp", 40, 2), ("ipv6 udp", 15, 3), ("ipv6 udp", 21, 1), ("ipv6 udp", 22, 32)],
)
def test_what_routers_and_nat_rewrite_leaves_a_packet_the_same(module, name, at, length):
    frame = CASES[name].frame
    then = bytearray(frame)
    then[at : at + length] = bytes(byte ^ 0x15 for byte in frame[at : at + length])
    assert is_recognised(module, frame, bytes(then))
    captured = read_of_captures([bytes(then)])
    expected = {field: int(getattr(captured, field)[0]) for field in (*READ, "flags")}
    assert told(read(module, bytes(then))) == expected


def variants(seed):
    """Yield frames that are cut and changed, each followed by the frame that it was made of."""
    random = np.random.default_rng(seed)
    for case in CASES.values():
        frame = case.frame[:260]
        for length in range(14, len(frame), 5):
            yield frame[:length]
        for bytes_changed in (1, 1, 1, 1, 1, 1, 2, 3):
            other = np.frombuffer(frame, np.uint8).copy()
            other[random.integers(12, len(other), bytes_changed)] ^= np.uint8(1 << random.integers(0, 8))
            yield other.tobytes()
            yield frame


@pytest.mark.parametrize("seed", range(3))
def test_cut_and_changed_packets_in_buffers_that_are_used_again(module, seed):
    random = np.random.default_rng(seed)
    frames = list(variants(seed))
    captured = read_of_captures(frames)
    for at, frame in enumerate(frames):
        expected = {field: int(getattr(captured, field)[at]) for field in (*READ, "flags")}
        for _ in range(2):
            linear, buffer = int(random.choice(SPLITS)), int(random.integers(0, 4))
            assert told(read(module, frame, linear, buffer)) == expected, (frame.hex(), linear)
