"""Structure and packaging: imports between folders, names, the lock, licences, the shell script."""

import ast
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.places import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TOP_LEVEL = ["contracts", "collector", "correlator", "storage", "mace"]
LOCK = (ROOT / "requirements.lock").read_text()


def normalized(name: str) -> str:
    """Return a distribution's name as package indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirement_name(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match, requirement
    return normalized(match[0])


def direct_requirements() -> list[str]:
    project = PROJECT["project"]
    extras = project["optional-dependencies"].values()
    return [*project["dependencies"], *(requirement for extra in extras for requirement in extra)]


# --- arrows -------------------------------------------------------------------------------------


def lint_imports(config: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("lint-imports")
    return subprocess.run(
        [program, "--no-cache", "--no-logo", "--config", config],
        cwd=cwd, env={"PYTHONPATH": str(cwd), "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


ROOMS = "commands above experiments, tools, sessions and replays, views, the lab"


def test_import_contracts_hold() -> None:
    done = lint_imports(ROOT / "pyproject.toml", ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "line", "broken"),
    [
        ("correlator/planted.py", "import storage", "stages never import each other"),
        ("storage/planted.py", "import mace.cli", "contracts below, stages between, composition above"),
        ("contracts/errors.py", "import collector", "contracts below, stages between, composition above"),
        ("correlator/engine.py", "import time", "the engine has no clock, no chance, no input and output"),
        ("correlator/planted.py", "import time", "the engine has no clock, no chance, no input and output"),
        ("collector/kmod/source.py", "import collector.ftrace.rings", "sources never import each other"),
        ("collector/reading/reader.py", "import collector.capture.source", "sources never import each other"),
        ("mace/shown/planted.py", "import mace.live.session", ROOMS),
        ("mace/api.py", "import mace.commands.run", ROOMS),
        ("collector/planted.py", "import pyarrow", "only storage and the composition know databases and pictures"),
    ],
)
def test_import_contracts_can_fail(tmp_path: Path, module: str, line: str, broken: str) -> None:
    for package in TOP_LEVEL:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / module).open("a") as file:
        file.write(f"\n{line}\n")
    done = lint_imports(tmp_path / "pyproject.toml", tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{broken} BROKEN" in " ".join(done.stdout.split())


def test_sources_do_not_import_each_other() -> None:
    (kept_apart,) = [c for c in PROJECT["tool"]["importlinter"]["contracts"] if c["id"] == "sources"]
    folders = {f"collector.{path.parent.name}" for path in (ROOT / "collector").glob("*/source.py")}
    assert set(kept_apart["modules"]) == folders


def test_contracts_import_few_libraries() -> None:
    """Reading a capture on a laptop imports the contracts: they may need numpy and zstandard, but no database."""
    allowed = {"contracts", "numpy", "zstandard", *sys.stdlib_module_names}
    for path in (ROOT / "contracts").rglob("*.py"):
        tree = ast.parse(path.read_text())
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert {module.split(".")[0] for module in imported} <= allowed, path


# --- names --------------------------------------------------------------------------------------


def test_nobody_else_claims_our_names() -> None:
    """MACE's import names are top-level: another distribution with a `collector` would shadow it, or be shadowed."""
    claims = importlib.metadata.packages_distributions()
    for name in TOP_LEVEL:
        assert set(claims.get(name, [])) <= {"mace"}, f"{name} is also claimed by {claims[name]}"


def test_imports_come_from_this_tree() -> None:
    code = "import sys; [__import__(n) for n in sys.argv[1:]]; print(*(sys.modules[n].__file__ for n in sys.argv[1:]))"
    # Isolated and in another folder, so that only the installation counts, not the working directory.
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, *TOP_LEVEL], cwd="/", capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == [str(ROOT / name / "__init__.py") for name in TOP_LEVEL]


def test_application_not_library() -> None:
    assert "Private :: Do Not Upload" in PROJECT["project"]["classifiers"]
    scripts = importlib.metadata.entry_points(group="console_scripts", name="mace")
    assert [script.value for script in scripts] == ["mace.__main__:main"]


@pytest.mark.parametrize("package", TOP_LEVEL)
def test_types_are_shipped(package: str) -> None:
    assert (ROOT / package / "py.typed").exists()


def test_one_version() -> None:
    import mace

    assert mace.__version__ == PROJECT["project"]["version"]


# --- dependencies -------------------------------------------------------------------------------


def test_every_dependency_has_both_bounds_or_a_reason() -> None:
    for requirement in direct_requirements():
        assert ">=" in requirement, f"{requirement}: no lower bound"
        # setuptools only builds the one path line; its major number moves several times a year.
        assert "<" in requirement or requirement.startswith("setuptools"), f"{requirement}: no upper bound"


def test_every_dependency_is_explained() -> None:
    """Every dependency is explained, and every explanation is of a dependency."""
    text = (ROOT / "docs/design/002-dependencies.md").read_text()
    explained = {normalized(name) for name in re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)}
    assert explained == {requirement_name(requirement) for requirement in direct_requirements()}


def test_lock_has_every_dependency() -> None:
    locked = {normalized(name) for name in re.findall(r"^([A-Za-z0-9._-]+)==", LOCK, re.MULTILINE)}
    missing = {requirement_name(requirement) for requirement in direct_requirements()} - locked
    assert not missing, "run ./dev lock"


def test_lock_has_hashes_and_no_addresses() -> None:
    entries = re.split(r"\n(?=[A-Za-z0-9])", LOCK.split("\n", 1)[1])
    assert len(entries) > 20
    for entry in entries:
        assert re.match(r"[A-Za-z0-9._-]+==\S+", entry), entry.splitlines()[0]
        assert "--hash=sha256:" in entry, entry.splitlines()[0]
    # An address would send every machine to one index, and name it to all who read.
    assert not re.search(r"://|^\s*(-i|-f|--(extra-)?index-url|--find-links|--trusted-host)\b", LOCK, re.MULTILINE)
    assert " @ " not in LOCK
    assert not re.search(r"(?<![\w.])/[\w.-]+/", LOCK), "a path of one machine"


def test_environment_is_the_locked_one() -> None:
    """The tests run with the locked versions; otherwise they would test other versions than users get."""
    for line in re.findall(r"^[A-Za-z0-9._-]+==[^\\\n]+", LOCK, re.MULTILINE):
        locked = Requirement(line)
        if locked.marker is None or locked.marker.evaluate():  # some are only for other interpreters
            assert importlib.metadata.version(locked.name) in locked.specifier, f"{locked.name}: run ./dev setup"


# --- licences -----------------------------------------------------------------------------------


def test_licences() -> None:
    assert PROJECT["project"]["license"] == "Apache-2.0 AND GPL-2.0-only AND MIT"
    assert "MIT License" in (ROOT / "mace/shown/page/uPlot.LICENSE").read_text()[:100]
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:200]
    # The kernel lets only GPL-compatible modules and programs use the tracepoint interface.
    kernel_licence = (ROOT / "kmod/LICENSE").read_text()
    assert (ROOT / "bpf/LICENSE").read_text() == kernel_licence
    assert "GNU GENERAL PUBLIC LICENSE\n                       Version 2, June 1991" in kernel_licence


# --- the front door -----------------------------------------------------------------------------

SCRIPTS = ["dev", ".ci/run", "deploy/make-secrets", "deploy/influxdb/10-users.sh"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_posix_sh(script: str) -> None:
    path = ROOT / script
    assert path.stat().st_mode & 0o111, "not executable"
    assert path.read_text().startswith("#!/bin/sh\n")
    # dash is Debian's sh and knows no bashisms.
    shell = shutil.which("dash") or "/bin/sh"
    subprocess.run([shell, "-n", path], check=True, timeout=30)


def test_dev_help_names_every_command() -> None:
    text = (ROOT / "dev").read_text()
    commands = re.search(r"\n    case \$command in\n(.*?)\n    \*\)", text, re.DOTALL)
    assert commands
    names = re.findall(r"^    (\w+)(?: \|.*)?\)$", commands[1], re.MULTILINE)
    assert len(names) >= 8
    done = subprocess.run([ROOT / "dev", "help"], capture_output=True, text=True, timeout=30, check=True)
    for name in names:
        assert re.search(rf"^  {name}\b", done.stdout, re.MULTILINE), f"./dev help does not name {name}"


def test_dev_refuses_unknown_commands() -> None:
    done = subprocess.run([ROOT / "dev", "tset"], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "unknown command: tset" in done.stderr
    assert "usage: ./dev" in done.stderr


# --- the wheel ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_the_wheel_installs_runs_by_itself(tmp_path: Path) -> None:
    """The installed wheel runs with only its own files and the locked dependencies on the path, without the tree."""
    tree, wheels, installed = (tmp_path / name for name in ("tree", "wheels", "installed"))
    tree.mkdir()
    (tree / "bpf").mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "bpf/LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    for package in TOP_LEVEL:
        shutil.copytree(ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, tree]
    subprocess.run(build, capture_output=True, text=True, timeout=200, check=True)
    (wheel,) = wheels.iterdir()
    # The oldest supported Python: the compiled extension uses the stable ABI alone, so that later ones can load it.
    assert "-cp311-abi3-linux_" in wheel.name
    install = [*pip, "install", "--no-deps", "--no-index", "--target", installed, wheel]
    subprocess.run(install, capture_output=True, text=True, timeout=200, check=True)
    # -S: no .pth file is read, so the editable install is not found.
    code = "import sys; sys.path += sys.argv[1:3]; del sys.argv[1:3]; from mace.__main__ import main; sys.exit(main())"
    dependencies = sysconfig.get_paths()["purelib"]

    def mace(*argv: object) -> str:
        run = [sys.executable, "-I", "-S", "-c", code, installed, dependencies, *map(str, argv)]
        done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    store = tmp_path / "store"
    assert "source ftrace" in json.loads(mace("check", "--json"))
    for folder, name in (("collector/compiled", "loops"), ("correlator/compiled", "joiner")):
        shipped = {path.name for path in (installed / folder).iterdir()} - {"__pycache__"}
        assert shipped == {"__init__.py", f"{name}.abi3.so", f"{name}.pyi"}
    # The wheel has the BPF programs if they were built.
    for name in ("mace.bpf.o", "mace_old.bpf.o"):
        assert (installed / "collector/bpf" / name).exists() == (ROOT / "collector/bpf" / name).exists()
    replayed = json.loads(mace("replay", ROOT / "docs" / "example.mace", "--store", store, "--json"))
    assert json.loads(mace("report", "--store", store, "--json"))["packets"] == replayed["packets"] > 0
    mace("report", "--store", store, "--html", tmp_path / "page.html")  # the page's files are in the wheel
    assert "mace-data" in (tmp_path / "page.html").read_text()
    counted = mace("query", "--store", store, "--format", "csv", "SELECT count(DISTINCT packet) AS packets FROM delays")
    assert int(counted.split()[1]) > 0
