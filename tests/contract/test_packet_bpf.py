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
from tests.kernel.guest.test_packets import CASES, READ, read_of_captures

pytestmark = pytest.mark.needs("cc")
HERE = Path(__file__).parent
BPF = HERE.parents[1] / "bpf"


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    library = tmp_path_factory.mktemp("bpf") / "packet.so"
    options = ["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{BPF}"]
    done = subprocess.run(
        ["cc", *options, "-o", library, HERE / "packet_bpf.c"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


def read(programs, frame, linear=WHOLE):
    record = np.zeros((), abi.RECORD)
    programs.read_frame(frame, len(frame), linear, ctypes.c_void_p(record.ctypes.data))
    return record


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


def test_the_identity_of_a_buffer_is_siphash(programs):
    """Compare with the vector for the bytes 0 to 7 of the reference implementation (Aumasson and Bernstein, 2012)."""
    programs.hash_of_skb.restype = ctypes.c_uint64
    words = [ctypes.c_uint64(number) for number in (0x0706050403020100, 0x0706050403020100, 0x0F0E0D0C0B0A0908)]
    assert programs.hash_of_skb(*words) == 0x93F5F5799A932462
