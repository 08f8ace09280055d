"""Static checks of the module's C: compilers, checkers and formatters.

Each check is also shown to fail, on a copy of the module with one fault.
"""

import re
import shutil
import subprocess

import pytest

from tests.kernel.build import HARMLESS, SOURCE, build
from tests.kernel.kernels import KERNELS, KernelUnavailable, fetch, source_scripts

HEADER = SOURCE / "uapi/mace.h"

# For the first fetch and build of a kernel, and for other builds at the same time.
BUILDS = [pytest.mark.slow, pytest.mark.needs("root", "qemu"), pytest.mark.timeout(900)]
# The scripts are extracted once from 130 MB of kernel source.
SCRIPTS = [pytest.mark.slow, pytest.mark.needs("root", "qemu", "perl"), pytest.mark.timeout(900)]


def builds(test):
    return _marked(test, BUILDS)


def scripts(test):
    return _marked(test, SCRIPTS)


def _marked(test, marks):
    for mark in marks:
        test = mark(test)
    return test


def sources(folder):
    return sorted(path for path in folder.rglob("*.[ch]") if not path.name.endswith(".mod.c"))


def copy(tmp_path, name, old, new):
    """Return a copy of the module in which `new` replaces the first `old` of one file."""
    folder = tmp_path / "kmod"
    shutil.copytree(SOURCE, folder, ignore=shutil.ignore_patterns("*.o", "*.ko", "*.mod", "*.mod.c", ".*.cmd"))
    path = folder / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    return folder


def ran(command, cwd):
    """Run a program, and return exit status and output, both streams."""
    done = subprocess.run(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, check=False
    )
    return done.returncode, done.stdout


# --- the compiler's warnings, and sparse ---------------------------------------------------------

AFTER_INCLUDES = "\nMODULE_LICENSE("
A_WARNING = "\nint mace_bad(void);\nint mace_bad(void)\n{\n\tint unused;\n\n\treturn 0;\n}\n" + AFTER_INCLUDES
NO_USER = (
    "\nint mace_bad(void __user *data);\nint mace_bad(void __user *data)\n{\n\treturn *(int *)data;\n}\n"
    + AFTER_INCLUDES
)
SPARSE = {"C": "2", "CHECK": "sparse"}
KBUILD = re.compile(r"make(\[\d+\])?: (Entering|Leaving) directory|  [A-Z]+ (\[M\])? *\S+$")


@builds
@pytest.mark.parametrize("name", KERNELS)
def test_builds_without_a_warning(name):
    build(fetch(name), extra={"W": "1"})  # which raises


@builds
def test_a_warning_fails(tmp_path):
    with pytest.raises(KernelUnavailable, match="unused variable"):
        build(fetch("6.1"), copy(tmp_path, "mace_main.c", AFTER_INCLUDES, A_WARNING))


# Not the newest kernel: its chroot has no sparse, and Debian 12's sparse finds nothing there that it misses in 6.12.
@builds
@pytest.mark.needs("sparse")
@pytest.mark.parametrize("name", [name for name, wanted in KERNELS.items() if wanted.builds_in is None])
def test_sparse_is_silent(name):
    log = build(fetch(name), extra=SPARSE).log
    checked = set(re.findall(r"^  CHECK +\S+/(\S+)$", log, re.MULTILINE))
    assert checked == {path.name for path in SOURCE.glob("*.c") if not path.name.endswith(".mod.c")}
    assert [line for line in log.splitlines() if not KBUILD.match(line) and not HARMLESS.search(line)] == []


@builds
@pytest.mark.needs("sparse")
def test_sparse_sees_user_memory_touched(tmp_path):
    with pytest.raises(KernelUnavailable, match="cast removes address space '__user' of expression"):
        build(fetch("6.1"), copy(tmp_path, "mace_main.c", AFTER_INCLUDES, NO_USER), extra=SPARSE)


# --- the kernel's own scripts --------------------------------------------------------------------

# Ignored checks, which cannot hold here:
IGNORED = (
    # A macro that begins a function's definition has a parameter's name as argument, which cannot stand in parentheses.
    "MACRO_ARG_PRECEDENCE",
    # _Static_assert, of C itself: the header is compiled outside the kernel, where there is no static_assert().
    "CAMELCASE",
)
TABLE = ("COMPLEX_MACRO", "MACRO_ARG_REUSE", "TRAILING_SEMICOLON")
"""Ignored checks of MACE_HOOKS, a macro that is a list of rows, and of the macros for its rows: nothing there can stand
in parentheses. The kernel has such lists, too (__BPF_FUNC_MAPPER in include/uapi/linux/bpf.h)."""


def checkpatch(folder, cwd):
    # checkpatch leaves a file in its working directory.
    options = ["--no-tree", "--terse", "--strict", "--max-line-length=100", "--show-types"]
    script = source_scripts() / "checkpatch.pl"
    table = folder / "mace_probes.c"
    others = [path for path in sources(folder) if path != table]
    done = [
        ran(["perl", script, *options, "--ignore", ",".join(ignored), "-f", *paths], cwd)
        for ignored, paths in ((IGNORED, others), (IGNORED + TABLE, [table]))
    ]
    return max(status for status, _ in done), "".join(said for _, said in done)


def kernel_doc(folder, cwd):
    return ran(["perl", source_scripts() / "kernel-doc", "-none", "-Werror", *sources(folder)], cwd)


@scripts
def test_checkpatch_is_silent(tmp_path):
    status, said = checkpatch(SOURCE, tmp_path)
    assert status == 0, said


@scripts
@pytest.mark.parametrize(
    ("bad", "finding"),
    [("if(1)\n\t\treturn 0;", "SPACING"), ("return (0);", "RETURN_PARENTHESES"), ("BUG();", "AVOID_BUG")],
)
def test_checkpatch_can_fail(tmp_path, bad, finding):
    worse = f"\nint mace_bad(void)\n{{\n\t{bad}\n}}\n{AFTER_INCLUDES}"
    status, said = checkpatch(copy(tmp_path, "mace_main.c", AFTER_INCLUDES, worse), tmp_path)
    assert status != 0
    assert finding in said


@scripts
def test_kernel_doc_is_silent(tmp_path):
    status, said = kernel_doc(SOURCE, tmp_path)
    assert (status, said) == (0, "")


@scripts
def test_kernel_doc_can_fail(tmp_path):
    status, said = kernel_doc(copy(tmp_path, "uapi/mace.h", " * @ip_id: ", " * @ip_identity: "), tmp_path)
    assert status != 0
    assert "'ip_id' not described" in said


# --- checks without a tool -----------------------------------------------------------------------


def test_no_version_of_a_kernel_is_compared():
    """Distributions port changes back: Kbuild examines the headers instead of comparing versions."""
    for path in sources(SOURCE):
        assert not re.search(r"LINUX_VERSION_CODE|KERNEL_VERSION|linux/version", path.read_text()), path


def test_differences_between_kernels_are_found_in_their_headers():
    asked = set(re.findall(r"MACE_HAVE_(\w+)", (SOURCE / "mace_compat.h").read_text()))
    assert asked == set(re.findall(r"call mace-have, (\w+),", (SOURCE / "Kbuild").read_text()))


def test_numbers_from_user_space_index_rings_in_one_place():
    """A CPU that executes a branch speculatively must not read behind the array: array_index_nospec()."""
    assert "rings[" not in (SOURCE / "mace_chardev.c").read_text()
    text = (SOURCE / "mace_session.c").read_text()
    looked_up = re.findall(r"session->rings\[(.+?)\](?=[,;)])", text)
    assert [index for index in looked_up if index != "cpu"] == ["array_index_nospec(cpu, nr_cpu_ids)"]
    assert "stats->cpu]" not in text


# --- the format ----------------------------------------------------------------------------------


def clang_format(folder, cwd):
    return ran(["clang-format", "--dry-run", "-Werror", *sources(folder)], cwd)


@pytest.mark.needs("clang-format")
def test_clang_format_has_nothing_to_change(tmp_path):
    status, said = clang_format(SOURCE, tmp_path)
    assert (status, said) == (0, "")


@pytest.mark.needs("clang-format")
def test_clang_format_can_fail(tmp_path):
    status, said = clang_format(copy(tmp_path, "uapi/mace.h", "\t__u64 ts_ns;", "    __u64 ts_ns;"), tmp_path)
    assert status != 0
    assert "[-Wclang-format-violations]" in said


# --- the ABI header ------------------------------------------------------------------------------

COMPILERS = [
    pytest.param(["cc", "-std=c11", "-x", "c"], marks=pytest.mark.needs("cc"), id="C"),
    pytest.param(["c++", "-std=c++17", "-x", "c++"], marks=pytest.mark.needs("c++"), id="C++"),
]


def compiled(compiler, folder, cwd):
    source = cwd / "alone"
    source.write_text('#include "mace.h"\n')  # as the main file it would cause warnings about unused constants
    options = ["-Wall", "-Wextra", "-Wpadded", "-Werror", "-fsyntax-only", f"-I{folder / 'uapi'}"]
    return ran([*compiler, *options, source], cwd)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_the_header_compiles_alone_and_hides_no_padding(compiler, tmp_path):
    status, said = compiled(compiler, SOURCE, tmp_path)
    assert status == 0, said


@pytest.mark.parametrize("compiler", COMPILERS)
def test_hidden_padding_is_found(compiler, tmp_path):
    # The size is unchanged, so that the header's own assertion holds.
    worse = copy(tmp_path, "uapi/mace.h", "\t__u32 ready;\n\t__u32 pad;\n", "\t__u32 ready;\n")
    status, said = compiled(compiler, worse, tmp_path)
    assert status != 0
    assert "-Werror=padded" in said


def documented(text):
    """Return for each struct its fields in order, and the names that its kernel-doc explains."""
    found = {}
    heads = list(re.finditer(r"^struct (\w+) \{\n(.*?)^\};", text, re.MULTILINE | re.DOTALL))
    assert heads
    for head in heads:
        name, body = head.groups()
        fields = re.findall(r"^\t.+? (\w+)(?:\[\w+\])?;", body, re.MULTILINE)
        assert len(fields) == body.count(";"), f"struct {name} is written in a way that this test does not read"
        doc = re.search(rf"/\*\*\n \* struct {name} - \S((?!\*/).)*\*/\n\Z", text[: head.start()], re.DOTALL)
        found[name] = fields, re.findall(r"^ \* @(\w+): \S", doc[0], re.MULTILINE) if doc else None
    return found


def test_every_field_of_the_header_is_explained():
    for name, (fields, explained) in documented(HEADER.read_text()).items():
        assert explained == fields, f"struct {name}"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (" * @ip_id: ", " * ip_id: "),
        (" * @ip_id: IPv4 identification, host byte order; 0 for IPv6\n", " * @ip_id:\n"),
        ("/**\n * struct mace_record -", "/*\n * struct mace_record -"),
    ],
)
def test_a_field_that_is_not_explained_is_found(old, new):
    text = HEADER.read_text()
    assert old in text
    fields, explained = documented(text.replace(old, new))["mace_record"]
    assert explained != fields
