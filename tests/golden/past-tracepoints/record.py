"""Records the capture of this folder in a virtual machine. Kept as a record; not run again.

./dev test-kernel --kernel 6.12 --results /tmp/made -- .venv/bin/python tests/golden/past-tracepoints/record.py
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

from tests.kernel.guest.pods import made, measured

RESULTS = Path(os.environ.get("MACE_GUEST_RESULTS", "."))
COUNT = 10

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, made(Path(folder)) as ways:
        _, capture = measured("kmod", ways, COUNT, Path(folder))
        shutil.copy(capture, RESULTS / "kmod.mace")
