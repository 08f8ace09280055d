"""Reading processes from /proc, whatever their names."""

import os
import subprocess
import sys
from pathlib import Path

from collector.machine.processes import start_ticks, stat_fields

NOBODY = 4194305
"""A number above the largest possible process id."""


def test_a_name_may_hold_blanks_and_parentheses():
    code = "open('/proc/self/comm', 'wb').write(b') S 1 (\\xff'); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as odd:
        odd.stdout.readline()
        assert b") S 1 (" in Path(f"/proc/{odd.pid}/stat").read_bytes()
        assert stat_fields(odd.pid)[1] == str(os.getpid())
        assert 0 < start_ticks(os.getpid()) <= start_ticks(odd.pid)
        odd.communicate(b"\n")


def test_a_missing_process_and_a_zombie():
    assert stat_fields(NOBODY) == []
    assert start_ticks(NOBODY) == -1
    with subprocess.Popen(["true"]) as ended:
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
        assert stat_fields(ended.pid)[0] == "Z"
        assert start_ticks(ended.pid) == -1
