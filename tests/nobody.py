"""Runs commands as user nobody with CAP_BPF and CAP_PERFMON, which is what the source bpf needs."""

import subprocess
import sys
from typing import Final

NOBODY: Final = 65534
AS_NOBODY: Final = (
    *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--no-new-privs"),
    *("--bounding-set=-all,+bpf,+perfmon", "--inh-caps=-all,+bpf,+perfmon", "--ambient-caps=+bpf,+perfmon"),
)
"""Words that precede a command."""


def missing() -> str | None:
    """Return None if user nobody can run MACE from this checkout, else why not."""
    command = [*AS_NOBODY, sys.executable, "-c", "import collector, numpy"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return None if done.returncode == 0 else f"user nobody cannot run MACE here: {done.stderr.strip()[-200:]}"
