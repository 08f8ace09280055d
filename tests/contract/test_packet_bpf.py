"""The BPF programs' packet parser, compiled for user space, agrees with the reader of packet captures.

`test_packet_module.py` compares the module's parser with the same reader. If the whole packet is in the buffer's linear
part, all fields are equal. If some bytes are in pages, the parser finds the same key, or none if the key needs them.
"""

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest

from contracts import abi
from contracts.abi import Flag
from tests.contract.test_packet_module import SPLITS, WHOLE, variants
from tests.kernel.guest.test_packets import CASES, READ, ether, ipv4, ipv6, read_of_captures, tcp

pytestmark = pytest.mark.needs("cc")
HERE = Path(__file__).parent
BPF = HERE.parents[1] / "bpf"


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    library = tmp_path_factory.mktemp("bpf") / "packet.so"
    options = [
        "-std=gnu11",
        "-O1",
        "-g",
        "-fno-strict-aliasing",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-shared",
        "-fPIC",
        f"-I{BPF}",
    ]
    done = subprocess.run(
        ["cc", *options, "-o", library, HERE / "packet_bpf.c"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


@pytest.fixture(params=[(1, 1), (1, 0), (0, 0)], ids=["Linux 6.12", "Linux 6.2", "Linux 5.10"])
def programs(request, library):
    """Return the parser of a kernel that loads bytes in place and reads pages, or cannot do either."""
    for ability, value in zip(("direct", "paged"), request.param, strict=True):
        ctypes.c_int.in_dll(library, ability).value = value
    library.forget()
    return library


def read(programs, frame, linear=WHOLE):
    return recognise(programs, frame, linear)[0]


def recognise(programs, frame, linear=WHOLE):
    """Return the record of a frame, and whether the parser recognised it as the frame before."""
    record = np.zeros((), abi.RECORD)
    recognised = programs.read_frame(frame, len(frame), linear, ctypes.c_void_p(record.ctypes.data))
    return record, bool(recognised)


def told(record):
    return {field: int(record[field]) for field in READ} | {"flags": int(record["flags"]) & ~Flag.VLAN}


def captured_of(frames):
    columns = read_of_captures(frames)
    return [{field: int(getattr(columns, field)[at]) for field in (*READ, "flags")} for at in range(len(frames))]


def check_linear(programs, frame, expected):
    """Put part of the packet into pages: the parser finds the same key, or none if a part lies in pages."""
    for linear in SPLITS:
        record = told(read(programs, frame, linear))
        if record["flags"] & Flag.KEY:
            assert record == expected, (frame.hex(), linear)
        else:
            assert record["packet_key"] == 0
            assert linear < len(frame) - 14 or not expected["flags"] & Flag.KEY


@pytest.mark.parametrize("name", CASES)
def test_each_case(programs, name):
    case = CASES[name]
    record = read(programs, case.frame)
    fields = {field: int(value) for field, value in case.fields.items()}
    assert {field: int(record[field]) for field in fields} == fields
    assert f"{record['packet_key']:016x}" == f"{case.key:016x}"
    check_linear(programs, case.frame, captured_of([case.frame])[0])


@pytest.mark.parametrize("seed", range(3))
def test_cut_and_changed_packets(programs, seed):
    frames = list(variants(seed))
    for frame, expected in zip(frames, captured_of(frames), strict=True):
        assert told(read(programs, frame)) == expected, frame.hex()
        check_linear(programs, frame, expected)


def test_nothing_is_read_outside_the_linear_part(programs):
    for frame in variants(7):
        for linear in SPLITS:
            read(programs, frame, linear)
    assert ctypes.c_int.in_dll(programs, "violations").value == 0


READ_ANEW = {
    "geneve with options",
    "arp",
    "unknown ethertype",
    "ip header longer than the packet",
    "ip header too short",
    "ipv6 called ipv4",
    "length that lies upwards",
    "extension header cut off",
}
"""Frames whose key needs more bytes than an entry holds, that have too few bytes, or that are not IP."""


@pytest.mark.parametrize("name", CASES)
def test_a_packet_is_recognised_at_the_next_hook(programs, name):
    frame = CASES[name].frame
    first, recognised = recognise(programs, frame)
    assert not recognised
    again, recognised = recognise(programs, frame)
    assert recognised is (name not in READ_ANEW)
    assert again == first


@pytest.mark.parametrize("name", CASES)
def test_no_changed_byte_is_taken_for_the_packet_before(programs, name):
    frame = CASES[name].frame[:200]
    changed = []
    for at in range(14, len(frame)):
        for bit in (0, 5):
            other = bytearray(frame)
            other[at] ^= 1 << bit
            changed.append(bytes(other))
    for other, expected in zip(changed, captured_of(changed), strict=True):
        read(programs, frame)
        assert told(read(programs, other)) == expected, other.hex()


@pytest.mark.parametrize("seed", range(3))
def test_no_packet_of_another_length_is_taken_for_the_packet_before(programs, seed):
    random = np.random.default_rng(seed)
    frames = list(variants(seed))
    for frame, expected in zip(frames, captured_of(frames), strict=True):
        for linear in random.choice(SPLITS, 3).tolist():
            record = told(read(programs, frame, linear))
            assert record == expected or not record["flags"] & Flag.KEY, (frame.hex(), linear)


@pytest.mark.parametrize("bytes_of_payload", [1, 7, 8, 15, 16, 40])
@pytest.mark.parametrize(("protocol", "ip", "headers"), [(0x0800, ipv4, 52), (0x86DD, ipv6, 72)])
def test_payload_in_pages_is_part_of_the_key_where_the_kernel_can_read_it(
    programs, protocol, ip, headers, bytes_of_payload
):
    payload = b"abcdefghijklmnopqrst" * 2
    frames = [
        ether(protocol, ip(6, tcp(bytes(byte ^ change for byte in payload[:bytes_of_payload])))) for change in (0, 1)
    ]
    can_read = bool(ctypes.c_int.in_dll(programs, "paged").value)
    for frame, expected in zip(frames, captured_of(frames), strict=True):
        first, recognised = recognise(programs, frame, headers)
        assert not recognised or not can_read
        assert bool(first["flags"] & Flag.KEY) is can_read
        assert told(first) == expected or not can_read
        assert recognise(programs, frame, headers) == (first, True)


def test_a_program_that_reads_no_pages_has_the_key_that_another_has_read(programs):
    """As at the hook `ip_rcv`, which follows a reception on its CPU. What it reads itself, others do not recognise."""
    frame = ether(0x0800, ipv4(6, tcp(b"abcdefghijklmnopqrst")))
    reads = ctypes.c_int.in_dll(programs, "pages")
    can_read = bool(ctypes.c_int.in_dll(programs, "paged").value)
    try:
        reads.value = 0
        alone = read(programs, frame, 52)
        assert not alone["flags"] & Flag.KEY
        reads.value = 1
        first, recognised = recognise(programs, frame, 52)
        assert recognised is not can_read
        assert bool(first["flags"] & Flag.KEY) is can_read
        reads.value = 0
        assert recognise(programs, frame, 52) == (first, True)
        assert not recognise(programs, other_payload(frame, 14 + 20 + 4), 52)[1]
    finally:
        reads.value = 1


@pytest.mark.parametrize(
    ("name", "at", "length"),
    [
        *((name, *place) for name in ("tcp", "udp") for place in ((15, 1), (22, 1), (24, 2), (26, 8))),
        *(("ipv6 udp", *place) for place in ((15, 3), (21, 1), (22, 32))),
    ],
)
def test_what_routers_rewrite_leaves_a_packet_recognised(programs, name, at, length):
    frame = CASES[name].frame
    then = bytearray(frame)
    then[at : at + length] = bytes(byte ^ 0x05 for byte in frame[at : at + length])
    read(programs, frame)
    record, recognised = recognise(programs, bytes(then))
    assert recognised
    assert told(record) == captured_of([bytes(then)])[0]


def other_payload(frame, at):
    return frame[:at] + bytes([frame[at] ^ 1]) + frame[at + 1 :]


TCP, UDP = CASES["tcp"].frame, CASES["udp"].frame
OTHER_UDP = other_payload(UDP, 14 + 20 + 8 + 3)


@pytest.mark.parametrize("remembered", [None, TCP, UDP], ids=["nothing", "tcp", "udp"])
@pytest.mark.parametrize(
    ("frame", "other"),
    [(TCP, UDP), (UDP, OTHER_UDP), (OTHER_UDP, OTHER_UDP)],
    ids=["other protocol", "other payload", "equal"],
)
def test_an_interrupt_within_a_program_mixes_no_packets(programs, frame, other, remembered):
    """An interrupt reads another packet between any two reads of a program that uses the same entry."""
    expected, of_other = captured_of([frame, other])
    left = ctypes.c_int.in_dll(programs, "reads_until_interrupt")
    for reads in range(1, 40):
        programs.forget()
        if remembered:
            read(programs, remembered)
        programs.interrupt_with(other, len(other), reads)
        assert told(read(programs, frame)) == expected
        if left.value:
            break
        assert told(read(programs, frame)) == expected
        assert told(read(programs, other)) == of_other
    left.value = 0
    assert 2 < reads < 39


def test_the_identity_of_a_buffer_is_siphash(programs):
    """Compare with the vector for the bytes 0 to 7 of the reference implementation (Aumasson and Bernstein, 2012)."""
    programs.hash_of_skb.restype = ctypes.c_uint64
    words = [ctypes.c_uint64(number) for number in (0x0706050403020100, 0x0706050403020100, 0x0F0E0D0C0B0A0908)]
    assert programs.hash_of_skb(*words) == 0x93F5F5799A932462
