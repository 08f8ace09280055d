"""What `mace.__main__` does before other imports; each test runs a new process."""

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
    """Arrow uses jemalloc, and child processes do not inherit the variable."""
    assert told() == ["jemalloc", "None"]


@pytest.mark.parametrize("chosen", ["system", "mimalloc"])
def test_an_allocator_that_the_user_chose_is_kept(chosen):
    assert told(**{VARIABLE: chosen}) == [chosen, chosen]


def test_arrow_does_without_pandas_which_others_can_still_import():
    pytest.importorskip("pandas")
    told = """
import sys
from mace import __main__
sys.argv = ["mace", "hooks"]
assert __main__.main() == 0
import numpy as np
import pyarrow as pa
assert pa.array(np.arange(3)).to_pylist() == [0, 1, 2]
assert "pandas" not in sys.modules
import pandas
print(len(pandas.Series([1])))
"""
    done = subprocess.run([sys.executable, "-c", told], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "1"
