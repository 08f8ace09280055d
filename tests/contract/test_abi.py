"""contracts/abi.py equals the compiler's view of kmod/uapi/mace.h: every field, constant and request, both ways."""

import re
import subprocess
from enum import Enum

import numpy as np
import pytest

from contracts import abi
from contracts.hooks import HOOKS, Hook, Way
from contracts.records import CONTENT_DTYPES, DTYPES
from tests.places import ROOT

HEADER = ROOT / "kmod" / "uapi" / "mace.h"
TEXT = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
TYPES = {"__u64": "<u8", "__u32": "<u4", "__s32": "<i4", "__u16": "<u2", "__u8": "u1"}
ENUMS = {
    "MACE_FLAG_": abi.Flag,
    "MACE_HELLO_": abi.HelloFlag,
    "MACE_SETUP_": abi.SetupFlag,
    "MACE_TAKE_": abi.TakeFlag,
    "MACE_IOC_": abi.Ioctl,
}
OF_THE_HEADER_ONLY = {"MACE_STATIC_ASSERT", "MACE_HOOK_COUNT"}


def structs():
    """Return struct -> {field: C type} of the header."""
    found = {}
    for name, body in re.findall(r"^struct (\w+) \{\n(.*?)^\};", TEXT, re.MULTILINE | re.DOTALL):
        fields = re.findall(r"^\t(.+?) (\w+)(?:\[\w+\])?;$", body, re.MULTILINE)
        assert len(fields) == body.count(";"), f"struct {name} is written in a way that this test does not read"
        found[name] = {field: kind for kind, field in fields}
    return found


def constants():
    """Return the names of all defines and enumerators of the header."""
    defines = re.findall(r"^#define (MACE_\w+)(?:\(|[ \t]+\S)", TEXT, re.MULTILINE)
    enumerators = re.findall(r"^\t(MACE_\w+)(?: = \d+)?,?$", TEXT, re.MULTILINE)
    return sorted({*defines, *enumerators} - OF_THE_HEADER_ONLY)


def compiled(tmp_path, lines):
    """Compile the header with these statements, run the program, and return its output."""
    source, program = tmp_path / "abi.c", tmp_path / "abi"
    source.write_text(
        '#include <stddef.h>\n#include <stdio.h>\n#include "mace.h"\nint main(void)\n{\n'
        + "".join(f"\t{line}\n" for line in lines)
        + "\treturn 0;\n}\n"
    )
    compiler = ["cc", "-std=gnu11", "-Wall", "-Wextra", "-Werror", f"-I{HEADER.parent}"]
    done = subprocess.run([*compiler, "-o", program, source], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    printed = subprocess.run([program], capture_output=True, text=True, timeout=10, check=True).stdout
    return [line.split() for line in printed.splitlines()]


def mirrored(name):
    """Return the value of a constant of the header in Python."""
    if name in {"MACE_HOOK_SLOTS", "MACE_IOC_MAGIC"}:
        return getattr(abi, name.removeprefix("MACE_"))
    if name.startswith("MACE_HOOK_"):
        return Hook[name.removeprefix("MACE_HOOK_")]
    for prefix, enum in ENUMS.items():
        if name.startswith(prefix):
            return enum[name.removeprefix(prefix)]
    return getattr(abi, name.removeprefix("MACE_"))


def test_the_structs_are_the_same():
    assert list(abi.STRUCTS) == list(structs())
    for name, fields in structs().items():
        assert list(abi.STRUCTS[name].names) == list(fields), f"fields of struct {name}"


@pytest.mark.needs("cc")
def test_every_field_has_the_compilers_offset(tmp_path):
    asked = [(struct, field) for struct, fields in structs().items() for field in fields]
    got = compiled(
        tmp_path,
        [
            f'printf("%zu %zu\\n", offsetof(struct {s}, {f}), sizeof(((struct {s} *)0)->{f}));' for s, f in asked
        ] + [f'printf("%zu\\n", sizeof(struct {s}));' for s in structs()],
    )  # fmt: skip
    for (struct, field), (offset, size) in zip(asked, got, strict=False):
        mirror, at = abi.STRUCTS[struct].fields[field]
        assert (at, mirror.itemsize) == (int(offset), int(size)), f"struct {struct}, {field}"
    for struct, (size,) in zip(structs(), got[len(asked) :], strict=True):
        assert abi.STRUCTS[struct].itemsize == int(size), f"struct {struct}"


def test_every_field_has_its_type():
    for struct, fields in structs().items():
        for field, kind in fields.items():
            base = abi.STRUCTS[struct].fields[field][0].base
            if kind == "char":
                assert base.kind == "S", f"struct {struct}, {field}"
            elif kind.startswith("struct "):
                assert base == abi.STRUCTS[kind.removeprefix("struct ")], f"struct {struct}, {field}"
            else:
                assert base == np.dtype(TYPES[kind]), f"struct {struct}, {field}"


@pytest.mark.needs("cc")
def test_every_constant_has_its_value(tmp_path):
    numbers = [name for name in constants() if name != "MACE_DEVICE_NAME"]
    got = compiled(tmp_path, [f'printf("%llu\\n", (unsigned long long){name});' for name in numbers])
    for name, (value,) in zip(numbers, got, strict=True):
        assert mirrored(name) == int(value), name
    assert compiled(tmp_path, ["puts(MACE_DEVICE_NAME);"]) == [[abi.DEVICE_NAME]]


def test_python_has_only_constants_of_the_header():
    known = set(constants())
    for prefix, enum in (*ENUMS.items(), ("MACE_HOOK_", [hook for hook in Hook if hook is not Hook.LOST])):
        for member in enum:
            assert isinstance(member, Enum)
            assert f"{prefix}{member.name}" in known, f"{prefix}{member.name}"
    for name, value in vars(abi).items():
        if name.isupper() and not name.startswith("_") and isinstance(value, int | str):
            assert f"MACE_{name}" in known, name


def test_the_modules_table_of_hooks_is_ours():
    """Number, name and what is known of the packet there; and a probe of each, whose type the compiler checks."""
    probes = (HEADER.parents[1] / "mace_probes.c").read_text()
    where = {Way.TRANSMIT: "AT_DEVICE", Way.RECEIVE: "AT_DEVICE", Way.DELIVERY: "NO_DEVICE", Way.END: "AT_END"}
    tables = dict(re.findall(r"^#define MACE_(TRACEPOINTS|OTHER_HOOKS)\(ROW\)((?:.*\\\n)*.*)$", probes, re.MULTILINE))
    for name, wanted in (("TRACEPOINTS", True), ("OTHER_HOOKS", False)):
        rows = re.findall(r"\bROW\((\w+), (\w+), (\w+)\)", tables[name])
        infos = [info for info in HOOKS if info.is_tracepoint is wanted]
        assert rows == [(info.hook.name, info.name, where[info.way]) for info in infos]
    for info in HOOKS:
        assert re.search(rf"^(static void |MACE_DEFINE_\w+\()mace_probe_{info.name}\b", probes, re.MULTILINE), info.name


def test_the_view_for_batches_shows_the_records_fields():
    records = np.zeros(3, abi.RECORD)
    for value, name in enumerate(abi.RECORD.names, 1):
        records[name] = np.arange(value, value + 3).reshape(3, *[1] * (records[name].ndim - 1))
    seen = records.view(abi.COLUMNS)
    apart = abi.columns(np.ascontiguousarray(records.view(abi.WORDS).T))
    assert seen["place"].tolist() == [int(r["netns"]) | int(r["ifindex"]) << 32 for r in records]
    assert apart.keys() == set(abi.COLUMNS.names) == (DTYPES.keys() | CONTENT_DTYPES.keys() | {"place"}) - {"dev"}
    for name, column in apart.items():
        assert np.array_equal(column, seen[name]), name
        if name != "place":
            assert np.array_equal(column, records[name]), name
            # Reasons are wider in the kernel than in a batch.
            wanted = "<u4" if name == "drop_reason" else (DTYPES | CONTENT_DTYPES)[name]
            assert seen[name].dtype == column.dtype == wanted, name
