"""collector/bpf/layout.py agrees with the C compiler on bpf/mace_bpf.h: every struct and field, in both directions."""

import re
import subprocess

import pytest

from collector.bpf import layout
from collector.bpf.ring import SLOT_BYTES
from contracts import abi
from tests.places import ROOT

HEADER = ROOT / "bpf" / "mace_bpf.h"
TEXT = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)


def structs():
    """Return the names of the fields of each struct in the header."""
    found = {}
    for name, body in re.findall(r"^struct (\w+) \{\n(.*?)^\};", TEXT, re.MULTILINE | re.DOTALL):
        found[name] = re.findall(r"^\t\w+ (\w+)(?:\[\w+\])?;$", body, re.MULTILINE)
        assert len(found[name]) == body.count(";"), f"struct {name} is written in a way that this test does not read"
    return found


def test_the_structs_are_the_same():
    assert {name: list(dtype.names) for name, dtype in layout.STRUCTS.items()} == structs()


@pytest.mark.needs("cc")
def test_every_field_is_where_the_compiler_puts_it(tmp_path):
    asked = [(struct, field) for struct, fields in structs().items() for field in fields]
    source, program = tmp_path / "layout.c", tmp_path / "layout"
    lines = [f'printf("%zu %zu\\n", offsetof(struct {s}, {f}), sizeof(((struct {s} *)0)->{f}));' for s, f in asked]
    lines += [f'printf("%zu\\n", sizeof(struct {s}));' for s in structs()]
    source.write_text(
        f'#include <stddef.h>\n#include <stdio.h>\n#include "{HEADER}"\nint main(void)\n{{\n'
        + "\n".join(lines)
        + "\n}\n"
    )
    subprocess.run(["cc", "-std=gnu11", "-Wall", "-Werror", "-o", program, source], check=True, timeout=60)
    printed = subprocess.run([program], capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
    got = [tuple(map(int, line.split())) for line in printed]
    for (struct, field), (offset, size) in zip(asked, got, strict=False):
        mirror, at = layout.STRUCTS[struct].fields[field]
        assert (at, mirror.itemsize) == (offset, size), f"struct {struct}, {field}"
    for struct, (size,) in zip(structs(), got[len(asked) :], strict=True):
        assert layout.STRUCTS[struct].itemsize == size, f"struct {struct}"


def test_the_pad_holds_what_was_lost():
    """The pad is the upper bytes of a record's last word, and a slot is 8 bytes of head and a record of 64."""
    _, at = abi.RECORD.fields["pad"]
    assert (at, abi.RECORD.itemsize - at) == (64 - layout.LOST_BITS // 8, layout.LOST_BITS // 8)
    assert SLOT_BYTES == 72


def test_the_programs_find_the_pad_in_the_last_word():
    programs = (ROOT / "bpf" / "mace.bpf.c").read_text()
    number, shift = (
        int(re.search(rf"^#define {name} (\d+)$", programs, re.MULTILINE)[1])
        for name in ("MACE_LAST_WORD", "MACE_PAD_SHIFT")
    )
    assert number * 8 + shift // 8 == abi.RECORD.fields["pad"][1]
    assert 64 - shift == layout.LOST_BITS


def test_a_written_slot_has_the_mark_in_the_hook_and_no_hook_has_it():
    assert int(re.search(r"^#define MACE_WRITTEN (\w+)$", TEXT, re.MULTILINE)[1], 16) == layout.WRITTEN
    assert layout.WRITTEN >= abi.HOOK_SLOTS
    _, at = abi.RECORD.fields["hook"]
    assert at // 8 == abi.RECORD.itemsize // 8 - 1, "the mark is in the last word"
    assert at % 8 == 0, "the mark is in the word's lowest byte"
    assert layout.RING.itemsize % 64 == 0, "no slot is in two cache lines"


def test_the_numbers_of_the_walk_are_the_same():
    described = re.search(r"^#define MACE_WALK_DEVICES (\d+)$", TEXT, re.MULTILINE)[1]
    assert int(described) == layout.WALK_DEVICES
    walked = re.findall(r"^\tMACE_WALK_(\w+) = (\d+),$", TEXT, re.MULTILINE)
    assert {name: int(number) for name, number in walked} == dict(layout.Walked.__members__)
