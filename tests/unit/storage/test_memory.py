"""Which allocator a process of ours has Arrow use; each in a process of its own, since it is the whole process's."""

import os
import subprocess
import sys

import pytest

TOLD = "import pyarrow; print(pyarrow.default_memory_pool().backend_name)"
SESSION = "from rich.console import Console; from mace.session import Session; from mace.config import Config"


def backend(code, **environment):
    environment = {k: v for k, v in os.environ.items() if k != "ARROW_DEFAULT_MEMORY_POOL"} | environment
    return subprocess.run(
        [sys.executable, "-c", f"{code}; {TOLD}"], env=environment, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.mark.parametrize(
    "code", ["from storage.memory import hold_little; hold_little()", f"{SESSION}; Session(Config(), Console())"]
)
def test_a_run_takes_the_allocator_that_holds_least(code):
    assert backend("pass") != "jemalloc"
    assert backend(code) == "jemalloc"


def test_who_has_chosen_an_allocator_keeps_it():
    code = "from storage.memory import hold_little; hold_little()"
    assert backend(code, ARROW_DEFAULT_MEMORY_POOL="system") == "system"


def test_without_it_arrow_keeps_its_own():
    code = "import pyarrow; pyarrow.supported_memory_backends = lambda: ['system']"
    assert backend(f"{code}; from storage.memory import hold_little; hold_little()") == backend("pass")
