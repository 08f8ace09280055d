"""Rate of parsing ftrace's text, on one core: network events alone, and mixed with as many scheduler events.

The text is the golden one of a real run, repeated, each time a minute later.
"""

import re
import time
from pathlib import Path
from typing import Any

from collector.reading.options import FileOptions
from collector.text.source import TextReader
from contracts.records import Batch
from tests.benchmark.figures import figure, folder, one_core, rounds
from tests.places import GOLDEN

TRACE = GOLDEN / "other-tools" / "trace.txt"
TIMES = 100
ROUNDS = 5
TIME = re.compile(rb"(?m)^(.{20,60}?) (\d+)(\.\d{6}: )")
OTHER = (
    b"            ping-10389   [001] d..2.  %d.900000: sched_switch: prev_comm=ping prev_pid=10389 prev_prio=120 "
    b"prev_state=S ==> next_comm=swapper/1 next_pid=0 next_prio=120\n"
)


def written(target: Path, *, others: bool) -> int:
    """Write the text, and return its number of lines."""
    text = TRACE.read_bytes()
    with target.open("wb") as file:
        for minute in range(TIMES):
            later = TIME.sub(lambda m, by=60 * minute: b"%b %d%b" % (m[1], int(m[2]) + by, m[3]), text)  # type: ignore[misc]
            last = int(TIME.findall(later)[-1][1])
            file.write(later + OTHER % last * (len(text.splitlines()) if others else 0))
    return target.read_bytes().count(b"\n")


def reading(path: Path, lines: int) -> float:
    """Return lines per second of one reading."""
    begin, found = time.perf_counter(), 0
    with TextReader(path, FileOptions(clock="mono")) as reader:
        for item in reader.items():
            found += len(item) if isinstance(item, Batch) else 0
    assert found == 397 * TIMES, found
    assert reader.discarded == 0
    return lines / (time.perf_counter() - begin)


def read() -> list[dict[str, Any]]:
    """lines/s."""
    made = []
    with folder() as place, one_core():
        for name, others in (("text_read", False), ("text_read_mixed", True)):
            path = place / f"{name}.txt"
            lines = written(path, others=others)
            made.append(figure(name, "lines/s", rounds(lambda path=path, lines=lines: reading(path, lines), ROUNDS)))
    return made
