"""Decisions of the command before any other module is imported; each test runs in a process of its own."""

import os
import subprocess
import sys

import pytest

VARIABLE = "ARROW_DEFAULT_MEMORY_POOL"
TOLD = """
import os, sys
from mace import __main__
sys.argv = ["mace", "hooks"]
assert __main__.main() == 0
import pyarrow
print(pyarrow.default_memory_pool().backend_name, os.environ.get("ARROW_DEFAULT_MEMORY_POOL"))
"""


def told(**environment):
    environment = {k: v for k, v in os.environ.items() if k != VARIABLE} | environment
    done = subprocess.run([sys.executable, "-c", TOLD], env=environment, check=True, capture_output=True, text=True)
    assert not done.stderr
    return done.stdout.splitlines()[-1].split()


def test_arrow_takes_the_allocator_that_holds_least():
    """And the tools that the command starts are told nothing of it."""
    assert told() == ["jemalloc", "None"]


@pytest.mark.parametrize("chosen", ["system", "mimalloc"])
def test_who_has_chosen_an_allocator_keeps_it(chosen):
    assert told(**{VARIABLE: chosen}) == [chosen, chosen]
