"""The compiled extensions: sanitizers, the checks of `./dev lint`, when `./dev` compiles it, and other processors.

Each check is also shown to fail, on a copy of the C with one fault.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib import import_module
from pathlib import Path

import pytest

from tests.places import ROOT

LOOPS, JOINER = "collector.compiled.loops", "correlator.compiled.joiner"
MACROS = ["-DPy_LIMITED_API=0x030B0000", "-isystem", sysconfig.get_path("include")]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]

EM_AARCH64 = 183
"""`e_machine` of an ELF file, two bytes at 18 (elf(5), /usr/include/elf.h)."""

EXERCISED = {
    LOOPS: ["tests/unit/collector/compiled", "tests/unit/collector/pages", "tests/property/test_tracedat_fuzz.py"],
    JOINER: [
        "tests/unit/correlator/compiled",
        "tests/unit/correlator/test_links.py",
        "tests/property/test_joined_lives.py",
        "tests/property/test_engine_reference.py::test_the_engine_agrees_with_the_reference",
    ],
}
"""Tests that call each extension, most of them with made-up or damaged input."""
SOURCES = {name: ROOT / name.rpartition(".")[0].replace(".", "/") for name in EXERCISED}
"""The folder of each extension's C."""
BUILT = {name: folder / f"{name.rpartition('.')[2]}.abi3.so" for name, folder in SOURCES.items()}

pytestmark = pytest.mark.needs("gcc")


def copy(tmp_path: Path, extension: str, name: str = "", old: str = "", new: str = "") -> Path:
    """Return a copy of an extension's C in which `new` replaces the first `old` of one file."""
    folder = tmp_path / extension
    shutil.copytree(SOURCES[extension], folder, ignore=shutil.ignore_patterns("*.so", "*.py*"))
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
    """Compile such a copy with AddressSanitizer and UndefinedBehaviorSanitizer; returns the extension."""
    extension = folder / BUILT[folder.name].name
    common = ["-std=c11", "-O1", "-g", "-shared", "-fPIC", *SANITIZE, *MACROS]
    done = run("gcc", *common, *flags, "-o", extension, *folder.glob("*.c"))
    assert done.returncode == 0, done.stdout
    return extension


def sanitized(extension: Path) -> dict[str, str]:
    """Return the environment in which a Python with the plugin `tests.sanitized` runs such an extension."""
    return {
        "LD_PRELOAD": run("gcc", "-print-file-name=libasan.so").stdout.strip(),
        "MACE_EXTENSION": f"{extension.parent.name}={extension}",
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
@pytest.mark.parametrize("extension", EXERCISED)
def test_no_sanitizer_finds_a_fault(tmp_path: Path, extension: str) -> None:
    done = under_sanitizers(copy(tmp_path, extension), EXERCISED[extension])
    assert done.returncode == 0, done.stdout[-5000:]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("extension", "name", "old", "new", "found"),
    [
        (LOOPS, "pages.c", "if (at == to->room)", "if (at > to->room)", "AddressSanitizer: heap-buffer-overflow"),
        (LOOPS, "pages.c", "uint32_t)offset;", "uint32_t)(offset + INT32_MAX);", "signed integer overflow"),
        (JOINER, "lives.c", "life->count == life->room", "life->count > life->room", "heap-buffer-overflow"),
    ],
)
def test_sanitizers_find_a_planted_fault(
    tmp_path: Path, extension: str, name: str, old: str, new: str, found: str
) -> None:
    tests = {
        LOOPS: [
            "tests/unit/collector/compiled",
            "tests/unit/collector/pages/test_decoding.py::test_each_field_by_name",
        ],
        JOINER: ["tests/unit/correlator/compiled"],
    }
    done = under_sanitizers(copy(tmp_path, extension, name, old, new), tests[extension])
    assert done.returncode != 0
    assert found in done.stdout


# --- memory -------------------------------------------------------------------------------------

FAILING = """
#include <stdlib.h>

#undef aligned_alloc
#undef calloc
#undef malloc
#undef realloc

static int left = -1;

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

void *failing_malloc(size_t size)
{
	return left-- ? malloc(size) : NULL;
}

void *failing_aligned_alloc(size_t alignment, size_t size)
{
	return left-- ? aligned_alloc(alignment, size) : NULL;
}
"""
"""Allocators of which the one after `fail_after(n)` and n successful calls fails."""

BEGIN = """
import ctypes
import numpy as np
import tests.sanitized

fail_after = ctypes.CDLL(tests.sanitized.PATH).fail_after
"""
LOOPS_SCRIPT = """
from collector.compiled import loops

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
JOINER_SCRIPT = """
from correlator.engine import Engine, EngineConfig
from tests.traffic import REPLY, REQUEST, Tape, topology

tape = Tape()
for number in range(400):
    tape.packet(REQUEST, 1_000 * number, skb=number + 1, step=number % 90, key=[number + 1] * len(REQUEST.split()))
    tape.packet("r:out0 R:out0", 1_000 * number, skb=number + 10_000, step=2 + number, key=[number + 1] * 2)
    tape.packet("Q:eth0 " + "X:eth0 " * (number % 40), 1_000 * number, skb=number + 20_000, step=2)
    tape.packet("Q:eth0", 1_000 * number, skb=number + 30_000)
    tape.packet("Q:eth0", 1_000 * number, skb=number + 40_000)
batch = tape.batch()


def results():
    engine = Engine(0, EngineConfig(crossings=True, slice_ns=500_000, open_records=1_000))
    made = [result for item in (topology(), batch) for result in engine.feed(item)]
    engine.state(int(batch.ts_ns[-1]) + 1) if not engine.stop_at(int(batch.ts_ns[-1])) else None
    made.append(engine.finish())
    return made[-1].totals


wanted = results()
failed, left = 0, 0
while True:
    fail_after(left)
    try:
        totals = results()
    except MemoryError:
        failed, left = failed + 1, left + 1 + left // 16
    else:
        break
print(failed, totals == wanted)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("extension", "script"), [(LOOPS, LOOPS_SCRIPT), (JOINER, JOINER_SCRIPT)])
def test_every_failed_allocation_raises(tmp_path: Path, extension: str, script: str) -> None:
    folder = copy(tmp_path, extension)
    (folder / "failing.c").write_text(FAILING)
    names = ("aligned_alloc", "calloc", "malloc", "realloc")
    declared = ["-include", "stdlib.h", *(f"-D{name}=failing_{name}" for name in names)]
    made = compiled(folder, *declared)
    done = run(sys.executable, "-c", BEGIN + script, **sanitized(made))
    assert done.returncode == 0, done.stdout
    failed, same = done.stdout.split()
    assert int(failed) >= 12
    assert same == "True"


# --- lint ---------------------------------------------------------------------------------------


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the function of `./dev` that checks the C, on a folder in the place of the tree's own."""
    text = (ROOT / "dev").read_text()
    function = "lint_extensions() {" + text.partition("\nlint_extensions() {")[2].partition("\n}\n")[0] + "\n}\n"
    for name, source in SOURCES.items():
        given = str(folder) if name == folder.name else str(source)
        function = function.replace(str(source.relative_to(ROOT)), given)
    return run("sh", "-c", f"BIN={Path(sys.executable).parent}\n{function}\nlint_extensions", cwd=folder)


@pytest.mark.needs("cppcheck")
def test_the_c_is_clean(tmp_path: Path) -> None:
    done = lint(copy(tmp_path, LOOPS))
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.needs("cppcheck")
@pytest.mark.parametrize(
    ("extension", "name", "old", "new", "found"),
    [
        (LOOPS, "names.c", "const size_t slot_count =", "const uint32_t slot_count =", "-Werror=conversion"),
        (LOOPS, "names.c", "calloc(slot_count, sizeof(*slots))", "malloc(sizeof(slots))", "pointerSize"),
        (JOINER, "windows.c", "const size_t size = 2 *", "const uint32_t size = 2 *", "-Werror=conversion"),
    ],
)
def test_lint_finds_a_planted_fault(tmp_path: Path, extension: str, name: str, old: str, new: str, found: str) -> None:
    done = lint(copy(tmp_path, extension, name, old, new))
    assert done.returncode != 0
    assert found in done.stdout


# --- the binary ---------------------------------------------------------------------------------


@pytest.mark.parametrize("extension", BUILT)
def test_the_binary_needs_no_python_but_its_stable_abi(extension: str) -> None:
    """It is linked with no Python library, and uses numpy through buffers alone, so one binary serves all versions."""
    assert Path(import_module(extension).__file__ or "") == BUILT[extension]
    for path in SOURCES[extension].glob("*.[ch]"):
        assert "numpy/" not in path.read_text()


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
@pytest.mark.parametrize(
    "source", [path for folder in SOURCES.values() for path in sorted(folder.glob("*.c"))], ids=str
)
def test_it_compiles_for_arm64(tmp_path: Path, source: Path) -> None:
    """The object is not linked; Python's own headers are those of this machine, and say the same for arm64."""
    made = tmp_path / "made.o"
    flags = ["--target=aarch64-linux-gnu", "-isystem", "/usr/aarch64-linux-gnu/include", "-std=c11", "-O2", *MACROS]
    done = run("clang", *flags, "-Wall", "-Wextra", "-Wconversion", "-Werror", "-c", "-o", made, source)
    assert (done.returncode, done.stdout) == (0, "")
    machine = int.from_bytes(made.read_bytes()[18:20], "little")
    assert machine == EM_AARCH64


def test_it_is_compiled_again_after_a_change(tmp_path: Path) -> None:
    text = (ROOT / "dev").read_text()
    name = "extensions_are_built() {"
    function = name + text.partition(f"\n{name}")[2].partition("\n}\n")[0] + "\n}\n"
    folders = [tmp_path / folder.relative_to(ROOT) for folder in SOURCES.values()]
    for source, folder in zip(SOURCES.values(), folders, strict=True):
        shutil.copytree(source, folder)
    shutil.copy(ROOT / "setup.py", tmp_path)
    binaries = [folder / built.name for folder, built in zip(folders, BUILT.values(), strict=True)]

    def is_built() -> bool:
        return run("sh", "-c", f"{function}extensions_are_built", cwd=tmp_path).returncode == 0

    def age(path: Path, ns: int) -> None:
        os.utime(path, ns=(ns, ns))

    sources = [tmp_path / "setup.py", *(path for folder in folders for path in folder.glob("*.[ch]"))]
    for path in [*(path for folder in folders for path in folder.iterdir()), *sources]:
        age(path, 1_000_000_000)
    for built in binaries:
        age(built, 2_000_000_000)
    assert is_built()
    for path in sources:
        age(path, 3_000_000_000)
        assert not is_built(), path
        age(path, 1_000_000_000)
    age(folders[0] / "loops.pyi", 3_000_000_000)
    assert is_built()
    binaries[1].unlink()
    assert not is_built()
