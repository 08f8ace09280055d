"""The table of `./dev` has everything that benchmarks need; `./dev bench` reports missing needs before it starts."""

import ast
import json
import subprocess

import pytest

from tests.benchmark import __main__ as bench
from tests.benchmark import needs
from tests.places import ROOT

PROGRAMS = {need for group in needs.NEEDS.values() for need in group}


def test_every_group_says_what_it_needs():
    assert list(needs.NEEDS) == list(bench.GROUPS)


def test_dev_installs_all_of_it():
    assert set(needs.packages()) >= PROGRAMS
    # `./dev bench` installs all rows but those of another command.
    body = (ROOT / "dev").read_text().partition("\n    bench)")[2].partition(";;")[0]
    assert [line.split()[1] for line in body.splitlines() if "ensure_commands" in line] == ["test", "bench", "kernel"]


def started_by(module):
    """Return the programs that a module of benchmarks starts: the first words of its argument lists."""
    tree = ast.parse((ROOT / "tests" / "benchmark" / f"{module}.py").read_text())
    lists = [node.elts[0] for node in ast.walk(tree) if isinstance(node, ast.List) and node.elts]
    return {one.value for one in lists if isinstance(one, ast.Constant)} & set(needs.packages())


@pytest.mark.parametrize("group", bench.GROUPS)
def test_programs_that_a_module_starts_are_among_its_needs(group):
    module = bench.GROUPS[group].__module__.rpartition(".")[2]
    groups = [name for name, run in bench.GROUPS.items() if run.__module__ == bench.GROUPS[group].__module__]
    assert started_by(module) <= {need for name in groups for need in needs.NEEDS[name]}


def test_started_programs_are_found():
    assert started_by("tracedat") == {"trace-cmd", "pkg-config", "gcc"}


@pytest.mark.parametrize("lacking", sorted(PROGRAMS))
def test_a_machine_without_one(lacking, monkeypatch, capsys):
    """Groups that need a missing program are reported with its package before the other groups run."""
    ran = []
    monkeypatch.setattr(needs, "is_there", lambda need: need != lacking)
    monkeypatch.setattr(bench, "GROUPS", {name: lambda name=name: ran.append(name) or [] for name in bench.GROUPS})
    assert bench.main([]) == 1
    without = {name for name, group in needs.NEEDS.items() if lacking in group}
    assert set(ran) == set(needs.NEEDS) - without
    told = capsys.readouterr()
    errors = {one["name"]: one["error"] for one in map(json.loads, told.out.splitlines()) if "error" in one}
    assert set(errors) == without
    package = needs.packages()[lacking].split()[0]
    assert all(why == f"it needs {lacking}: apt-get install {package}" for why in errors.values())
    lines = told.err.splitlines()
    assert all("is left out" in line for line in lines[: len(without)])
    assert not any("is left out" in line for line in lines[len(without) :])


def test_dev_looks_for_files_too(tmp_path):
    """`./dev` looks for headers, too, which are no commands; the test calls its shell function."""
    text = (ROOT / "dev").read_text()
    have = "have() {" + text.partition("\nhave() {")[2].partition("\n}\n")[0] + "\n}\n"
    (tmp_path / "header.h").touch()

    def asked(name):
        return subprocess.run(["sh", "-c", f'{have}have "$1"', "sh", name], check=False).returncode

    assert asked(str(tmp_path / "header.h")) == 0
    assert asked(str(tmp_path / "other.h")) != 0
    assert asked("sh") == 0
    assert asked("no-such-program") != 0
