"""The compiled extension: sanitizers, the checks of `./dev lint`, when `./dev` compiles it, and other processors.

Each check is also shown to fail, on a copy of the C with one fault.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.places import ROOT

SOURCE = ROOT / "collector/compiled"
BUILT = SOURCE / "loops.abi3.so"
MACROS = ["-DPy_LIMITED_API=0x030B0000", "-isystem", sysconfig.get_path("include")]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]

EM_AARCH64 = 183
"""`e_machine` of an ELF file, two bytes at 18 (elf(5), /usr/include/elf.h)."""

EXERCISED = ["tests/unit/collector/compiled", "tests/unit/collector/pages", "tests/property/test_tracedat_fuzz.py"]
"""Tests that call the extension, most of them with made-up or damaged input."""

pytestmark = pytest.mark.needs("gcc")


def copy(tmp_path: Path, name: str = "", old: str = "", new: str = "") -> Path:
    """Return a copy of the C in which `new` replaces the first `old` of one file."""
    folder = tmp_path / "compiled"
    shutil.copytree(SOURCE, folder, ignore=shutil.ignore_patterns("*.so", "*.py*"))
    if name:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))
    return folder


def run(*command: object, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=os.environ | environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900, check=False,
    )  # fmt: skip


# --- sanitizers ---------------------------------------------------------------------------------


def compiled(folder: Path, *flags: str) -> Path:
    """Compile the C with AddressSanitizer and UndefinedBehaviorSanitizer; returns the extension."""
    extension = folder / "loops.abi3.so"
    common = ["-std=c11", "-O1", "-g", "-shared", "-fPIC", *SANITIZE, *MACROS]
    done = run("gcc", *common, *flags, "-o", extension, *folder.glob("*.c"))
    assert done.returncode == 0, done.stdout
    return extension


def sanitized(extension: Path) -> dict[str, str]:
    """Return the environment in which a Python with the plugin `tests.sanitized` runs such an extension."""
    return {
        "LD_PRELOAD": run("gcc", "-print-file-name=libasan.so").stdout.strip(),
        "MACE_EXTENSION": str(extension),
        # Python keeps memory until it exits, and has an allocator that the sanitizer does not see into.
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONMALLOC": "malloc",
        # The same examples in each run.
        "CI": "yes",
    }


def under_sanitizers(folder: Path, tests: list[str]) -> subprocess.CompletedProcess[str]:
    # -s: a sanitizer ends the process at once, and with it the output that pytest would have captured.
    options = ["-q", "-s", "-p", "no:cacheprovider", "-p", "tests.sanitized"]
    return run(sys.executable, "-m", "pytest", *options, *tests, **sanitized(compiled(folder)))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_sanitizer_finds_a_fault(tmp_path: Path) -> None:
    done = under_sanitizers(copy(tmp_path), EXERCISED)
    assert done.returncode == 0, done.stdout[-5000:]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "old", "new", "found"),
    [
        ("pages.c", "if (at == to->room)", "if (at > to->room)", "AddressSanitizer: heap-buffer-overflow"),
        ("pages.c", "uint32_t)offset;", "uint32_t)(offset + INT32_MAX);", "runtime error: signed integer overflow"),
    ],
)
def test_sanitizers_find_a_planted_fault(tmp_path: Path, name: str, old: str, new: str, found: str) -> None:
    tests = ["tests/unit/collector/compiled", "tests/unit/collector/pages/test_decoding.py::test_each_field_by_name"]
    done = under_sanitizers(copy(tmp_path, name, old, new), tests)
    assert done.returncode != 0
    assert found in done.stdout


# --- memory -------------------------------------------------------------------------------------

FAILING = """
#include <stdlib.h>

#undef calloc
#undef realloc

static int left;

__attribute__((visibility("default"))) void fail_after(int allocations)
{
	left = allocations;
}

void *failing_calloc(size_t count, size_t size)
{
	return left-- ? calloc(count, size) : NULL;
}

void *failing_realloc(void *memory, size_t size)
{
	return left-- ? realloc(memory, size) : NULL;
}
"""
"""Allocators of which the one after `fail_after(n)` and n successful calls fails."""

SCRIPT = """
import ctypes, os
import numpy as np
import tests.sanitized
from collector.compiled import loops

fail_after = ctypes.CDLL(os.environ["MACE_EXTENSION"]).fail_after
names, index = np.arange(1, 1001, dtype=np.uint64), np.empty(1000, np.uint32)
failed = 0
while True:
    fail_after(failed)
    try:
        loops.distinct(names, names, index)
    except MemoryError:
        failed += 1
    else:
        break
print(failed, index.tolist() == list(range(1, 1001)))
"""


@pytest.mark.slow
def test_every_failed_allocation_raises(tmp_path: Path) -> None:
    folder = copy(tmp_path)
    (folder / "failing.c").write_text(FAILING)
    declared = ["-include", "stdlib.h", "-Dcalloc=failing_calloc", "-Drealloc=failing_realloc"]
    extension = compiled(folder, *declared)
    done = run(sys.executable, "-c", SCRIPT, **sanitized(extension))
    # Names and slots at first, and both again for each of five times that the table grows from 32 names to 1024.
    assert (done.returncode, done.stdout.split()) == (0, ["12", "True"]), done.stdout


# --- lint ---------------------------------------------------------------------------------------


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the function of `./dev` that checks the C, on a folder in the place of the tree's own."""
    text = (ROOT / "dev").read_text()
    function = "lint_extension() {" + text.partition("\nlint_extension() {")[2].partition("\n}\n")[0] + "\n}\n"
    return run("sh", "-c", f"BIN={Path(sys.executable).parent}\n{function.replace('collector/compiled', str(folder))}"
               "\nlint_extension", cwd=folder)  # fmt: skip


@pytest.mark.needs("cppcheck")
def test_the_c_is_clean(tmp_path: Path) -> None:
    done = lint(copy(tmp_path))
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.needs("cppcheck")
@pytest.mark.parametrize(
    ("name", "old", "new", "found"),
    [
        ("names.c", "const size_t slot_count =", "const uint32_t slot_count =", "-Werror=conversion"),
        ("names.c", "calloc(slot_count, sizeof(*slots))", "malloc(sizeof(slots))", "pointerSize"),
    ],
)
def test_lint_finds_a_planted_fault(tmp_path: Path, name: str, old: str, new: str, found: str) -> None:
    done = lint(copy(tmp_path, name, old, new))
    assert done.returncode != 0
    assert found in done.stdout


# --- the binary ---------------------------------------------------------------------------------


def test_the_binary_needs_no_python_but_its_stable_abi() -> None:
    """It is linked with no Python library, and uses numpy through buffers alone, so one binary serves all versions."""
    from collector.compiled import loops

    assert Path(loops.__file__) == BUILT
    for path in SOURCE.glob("*.[ch]"):
        assert "numpy" not in path.read_text()


def test_a_tree_in_which_nothing_was_compiled_says_so_in_one_line(tmp_path: Path) -> None:
    for package in ("contracts", "collector", "correlator", "storage", "mace"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    (tmp_path / "x.mace").touch()
    done = run(sys.executable, "-m", "mace", "replay", "x.mace", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    (line,) = done.stdout.splitlines()
    assert "its compiled part cannot be loaded" in line
    assert "./dev setup" in line


@pytest.mark.needs("arm64")
@pytest.mark.parametrize("name", sorted(path.name for path in SOURCE.glob("*.c")))
def test_it_compiles_for_arm64(tmp_path: Path, name: str) -> None:
    """The object is not linked; Python's own headers are those of this machine, and say the same for arm64."""
    made = tmp_path / "made.o"
    flags = ["--target=aarch64-linux-gnu", "-isystem", "/usr/aarch64-linux-gnu/include", "-std=c11", "-O2", *MACROS]
    done = run("clang", *flags, "-Wall", "-Wextra", "-Wconversion", "-Werror", "-c", "-o", made, SOURCE / name)
    assert (done.returncode, done.stdout) == (0, "")
    machine = int.from_bytes(made.read_bytes()[18:20], "little")
    assert machine == EM_AARCH64


def test_it_is_compiled_again_after_a_change(tmp_path: Path) -> None:
    text = (ROOT / "dev").read_text()
    function = "extension_is_built() {" + text.partition("\nextension_is_built() {")[2].partition("\n}\n")[0] + "\n}\n"
    folder = tmp_path / "collector/compiled"
    folder.parent.mkdir()
    shutil.copytree(SOURCE, folder)
    shutil.copy(ROOT / "setup.py", tmp_path)
    built = folder / BUILT.name

    def is_built() -> bool:
        return run("sh", "-c", f"{function}extension_is_built", cwd=tmp_path).returncode == 0

    def age(path: Path, ns: int) -> None:
        os.utime(path, ns=(ns, ns))

    sources = [tmp_path / "setup.py", *folder.glob("*.[ch]")]
    for path in [*folder.iterdir(), *sources]:
        age(path, 1_000_000_000)
    age(built, 2_000_000_000)
    assert is_built()
    for path in sources:
        age(path, 3_000_000_000)
        assert not is_built(), path
        age(path, 1_000_000_000)
    age(folder / "loops.pyi", 3_000_000_000)
    assert is_built()
    built.unlink()
    assert not is_built()
