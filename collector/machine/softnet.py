"""Reads the CPUs' counters of packet work from /proc/net/softnet_stat.

The kernel has one line per online CPU, of hexadecimal numbers of 32 bits (`softnet_seq_show` in net/core). The counters
are of the machine, in whichever network namespace the file is read.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from collector.machine.kernel import online_cpus
from contracts.cpus import CpuCounters

_PATH: Final = Path("/proc/net/softnet_stat")
_CPU_AT: Final = 12
"""Column with the CPU's number, since Linux 5.10 (commit 7d58e6555870)."""


def counters() -> list[CpuCounters]:
    """Return the counters of the online CPUs at this moment; none on a machine without the file."""
    try:
        text = _PATH.read_text(encoding="ascii")
    except OSError:
        return []
    return parsed(text, time.time_ns(), online_cpus())


def parsed(text: str, utc_ns: int, online: Sequence[int]) -> list[CpuCounters]:
    """Return the counters in the file's text. `online` are the CPUs of the lines, for kernels that do not number them.

    Lines without numbers are left out.
    """
    found = []
    for line, cpu in zip(text.splitlines(), online, strict=False):
        try:
            numbers = [int(word, 16) for word in line.split()]
            processed, dropped, squeezed = numbers[:3]
        except ValueError:
            continue
        found.append(
            CpuCounters(utc_ns, numbers[_CPU_AT] if len(numbers) > _CPU_AT else cpu, processed, dropped, squeezed)
        )
    return found
