"""Makes the files of this folder: events of ftrace itself, recorded on the host in a trace instance of its own.

Kept as a record of a run as root on Linux 6.18 with trace-cmd 3.1.6; not run again.

PYTHONPATH=. python tests/golden/tracecmd-own/make.py
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path

from collector.ftrace import tracefs
from collector.tracecmd.file import TraceFile
from collector.tracecmd.pages import layout_of, pieces
from tests.benchmark.tracedat import extract
from tests.made_tracedat import MadeTraceDat

HERE = Path(__file__).parent
MARKS = (b"mark 1\n", "a longer mark, naïve ✓\n".encode(), b"no line feed", b"x" * 200, b"\xff\xfe not UTF-8\n")
RAW = (7, b"\0\x01\0\x02\0\x03")
KEPT = ("sched:sched_process_exec",)
"""Subsystems whose formats stay in the file; the formats of all subsystems take 2 MB."""
LINE = re.compile(r"\[(\d+)\] +(\d+)\.(\d{9}): (\w+): +(.*)$")


def recorded(target: Path) -> None:
    """Record marks, raw marks, and the stacks at the start of a few programs, by trace-cmd."""
    instance = tracefs.Instance.create(tracefs.find())
    try:
        instance.set_clock("mono")
        (instance.path / "options" / "stacktrace").write_text("1")
        instance.enable(KEPT[0])
        instance.record(on=True)
        for text in MARKS:
            (instance.path / "trace_marker").write_bytes(text)
        (instance.path / "trace_marker_raw").write_bytes(RAW[0].to_bytes(4, "little") + RAW[1])
        for _ in range(3):
            subprocess.run(["true"], check=True)
        instance.record(on=False)
        extract(instance, target)
    finally:
        instance.remove()


def reported(path: Path) -> dict[str, list[list[object]]]:
    """Return event → (time, CPU, text, following lines) according to `trace-cmd report`."""
    argv = ["trace-cmd", "report", "-t", "-N", str(path)]
    text = subprocess.run(argv, capture_output=True, check=True).stdout.decode("utf-8", "surrogateescape")
    found: dict[str, list[list[object]]] = {}
    for line in text.splitlines():
        if match := LINE.search(line):
            row: list[object] = [int(match[2]) * 10**9 + int(match[3]), int(match[1]), match[5]]
            found.setdefault(match[4], []).append(row)
        elif line.startswith("\t=> "):
            found["kernel_stack"][-1].append(line.removeprefix("\t=> "))
    return found


def shortened(path: Path, version: int) -> bytes:
    """Return the file with its pages, and only the formats of the events in them."""
    with TraceFile(path) as file:
        texts = file.frame.formats
        (info,) = (one for one in file.frame.buffers if one.cpus)
        size = layout_of(file, info).page_size
        pages = {
            cpu.cpu: [
                piece.buffer[at * size : (at + 1) * size].tobytes()
                for piece in pieces(file, info, cpu, 1)
                for at in range(piece.pages)
            ]
            for cpu in info.cpus
        }
    return MadeTraceDat(
        {"": pages},
        version=version,
        algorithm="none" if version == 6 else "zstd",
        texts={name: texts[name] for name in KEPT if name in texts},
        own=[text for name, text in texts.items() if name.startswith("ftrace:")],
    ).content()


def main() -> None:
    with tempfile.TemporaryDirectory() as work:
        whole = Path(work) / "trace.dat"
        recorded(whole)
        for version in (6, 7):
            (HERE / f"v{version}.dat").write_bytes(shortened(whole, version))
    (HERE / "expected.json").write_text(json.dumps(reported(HERE / "v7.dat")) + "\n")


if __name__ == "__main__":
    main()
