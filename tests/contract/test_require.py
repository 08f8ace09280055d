"""Tests of tests/conftest.py: a need that is not met skips a test, or fails it under MACE_REQUIRE."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.places import ROOT

# The needs are replaced, so that the outcome does not depend on the machine.
TESTS = """
import pytest
from tests import conftest

conftest.NEEDS = {"present": lambda: None, "absent": lambda: "it is not there", "other": lambda: "nor is this"}

@pytest.mark.needs("present")
def test_present():
    pass

@pytest.mark.needs("present", "absent")
def test_absent():
    pass

def test_by_fixture(needs):
    needs("present")
    needs("absent")

@pytest.fixture
def toucher():
    raise RuntimeError("a fixture ran before the needs were checked")

@pytest.mark.needs("absent")
def test_fixture_order(toucher):
    pass
"""


def run_inner(folder: Path, tests: str, require: str | None) -> subprocess.CompletedProcess[str]:
    """Run pytest on `tests` in a process of its own, with tests/conftest.py as a plugin."""
    # The replaced needs must be in place before MACE_REQUIRE is read.
    (folder / "stand_ins.py").write_text(tests.split("@pytest", 1)[0])
    (folder / "test_inner.py").write_text(tests)
    (folder / "pytest.ini").write_text("[pytest]\n")
    environment = {name: value for name, value in os.environ.items() if name not in {"MACE_REQUIRE", "PYTEST_ADDOPTS"}}
    environment["PYTHONPATH"] = f"{ROOT}:{folder}"
    if require is not None:
        environment["MACE_REQUIRE"] = require
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "stand_ins",
        "-p",
        "tests.conftest",
        "-p",
        "no:cacheprovider",
        "-ra",
    ]
    return subprocess.run(
        [*command, "--strict-markers", str(folder)],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_unmet_needs_skip_and_say_why(tmp_path: Path) -> None:
    done = run_inner(tmp_path, TESTS, require=None)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed, 3 skipped" in done.stdout
    assert "needs absent: it is not there" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("require", ["all", pytest.param("other, absent", marks=pytest.mark.slow)])
def test_required_needs_fail_and_say_why(tmp_path: Path, require: str) -> None:
    done = run_inner(tmp_path, TESTS, require)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 1 passed, 2 errors" in done.stdout  # pytest calls a failure before the test's body an error
    assert "skipped" not in done.stdout
    assert "needs absent: it is not there" in done.stdout


@pytest.mark.slow
def test_other_requirements_change_nothing(tmp_path: Path) -> None:
    done = run_inner(tmp_path, TESTS, require="present,other")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed, 3 skipped" in done.stdout


@pytest.mark.slow
def test_misspelt_requirement_is_refused(tmp_path: Path) -> None:
    done = run_inner(tmp_path, TESTS, require="absnt")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "MACE_REQUIRE: unknown need absnt; there are present, absent, other" in done.stderr


@pytest.mark.slow
def test_misspelt_mark_is_refused(tmp_path: Path) -> None:
    tests = TESTS + '\n@pytest.mark.needs("presnt")\ndef test_misspelt():\n    pass\n'
    done = run_inner(tmp_path, tests, require=None)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "unknown need presnt" in done.stderr
