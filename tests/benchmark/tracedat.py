"""Rate of reading trace.dat into records in time order, against common alternatives. Rounds take turns on one core.

    tracedat_read            events/s of `collector.tracecmd.source`; the peer is a C program on libtracecmd that fills
                             the same columns (tracedat_peer.c)
    tracedat_read_none       events/s of a file that is not compressed, with the same peer
    tracedat_read_vs_report  the peer is `trace-cmd report` and a Python program that parses its text

The file is a flood in the lab, recorded into a trace instance and written by `trace-cmd extract`. The measured time
includes opening the file and, for the peers, starting their program.
"""

import re
import shlex
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

from collector.ftrace import tracefs
from collector.tracecmd.source import TraceCmdReader
from contracts.errors import Unavailable
from contracts.hooks import TRACEPOINTS
from contracts.records import Batch
from mace.lab import Spec, running
from tests.benchmark.figures import figure, flood, folder, one_core

ROUNDS = 7
REPORT_ROUNDS = 2
SECONDS = 2.0
RING_KIB = 64 * 1024
PEER = Path(__file__).with_name("tracedat_peer.c")
LINE = re.compile(r"\s*(.{16,}?)-(\d+) +\[(\d+)\] .*?(\d+)\.(\d+): (\w+): +(.*)")
"""Regular expression of a line of the report, as in many scripts."""
FIELD = re.compile(r"(\w+)=(\S+)")


def recorded(target: Path, *, compression: str, seconds: float = SECONDS) -> None:
    """Record a trace.dat of a flood; raises `Unavailable`."""
    instance = tracefs.Instance.create(tracefs.find())
    try:
        instance.set_clock("mono")
        instance.set_ring_size(RING_KIB)
        for info in TRACEPOINTS:
            instance.enable(info.tracepoint)
        instance.record(on=True)
        with running(Spec(name="tdat", containers=2)) as lab:
            flood(lab, seconds)
        instance.record(on=False)
        extract(instance, target, compression=compression)
    finally:
        instance.remove()


def extract(instance: tracefs.Instance, target: Path, *, compression: str = "zstd") -> None:
    """Write the content of the instance's rings as a trace.dat; raises `Unavailable`."""
    argv = ["trace-cmd", "extract", "-B", instance.path.name, "--compression", compression, "-o", str(target)]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
    except OSError as error:
        raise Unavailable("tracedat", f"trace-cmd: {error.strerror}", "apt install trace-cmd") from error
    if done.returncode or not target.exists():
        raise Unavailable("tracedat", f"{shlex.join(argv)}: {done.stderr.strip()[-300:]}")


def compiled(place: Path) -> Path:
    """Compile the C program; raises `Unavailable` without libtracecmd."""
    flags = subprocess.run(
        ["pkg-config", "--cflags", "--libs", "libtracecmd"], capture_output=True, text=True, check=False
    )
    if flags.returncode:
        raise Unavailable("tracedat", flags.stderr.strip(), "apt install libtracecmd-dev pkgconf gcc")
    program = place / "peer"
    subprocess.run(["gcc", "-O2", "-o", str(program), str(PEER), *flags.stdout.split()], check=True)
    return program


def ours(path: Path) -> tuple[int, float]:
    """Return (events, seconds) of one reading."""
    begin, events = time.perf_counter(), 0
    with TraceCmdReader(path) as reader:
        for item in reader.items():
            if isinstance(item, Batch):
                events += len(item) - int((item.hook == 255).sum())
    return events, time.perf_counter() - begin


def theirs(program: Path, path: Path) -> tuple[int, float]:
    begin = time.perf_counter()
    done = subprocess.run([str(program), str(path)], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[0]), time.perf_counter() - begin


def reported(path: Path) -> tuple[int, float]:
    """Run `trace-cmd report`, and parse its text to tuples."""
    begin, events = time.perf_counter(), []
    with subprocess.Popen(["trace-cmd", "report", "-t", str(path)], stdout=subprocess.PIPE, text=True) as report:
        assert report.stdout is not None
        for line in report.stdout:
            if match := LINE.match(line):
                fields = dict(FIELD.findall(match[7]))
                ts_ns = int(match[4]) * 10**9 + int(match[5])
                skb, length = int(fields.get("skbaddr", "0"), 16), int(fields.get("len", "0"))
                events.append((ts_ns, int(match[3]), match[6], skb, length, fields.get("dev", "")))
    return len(events), time.perf_counter() - begin


def read() -> list[dict[str, Any]]:
    """events/s; targets: 5 million, twice libtracecmd, 15 times the report."""
    rows = []
    with folder() as place:
        program = compiled(place)
        for compression, name in (("zstd", "tracedat_read"), ("none", "tracedat_read_none")):
            path = place / f"{compression}.dat"
            recorded(path, compression=compression)
            with one_core():
                count, _ = ours(path)
                if theirs(program, path)[0] != count:
                    raise Unavailable(name, f"libtracecmd counts {theirs(program, path)[0]} events, we {count}")
                mine, other = [], []
                for _ in range(ROUNDS):
                    mine.append(count / ours(path)[1])
                    other.append(count / theirs(program, path)[1])
                rows.append(figure(name, "events/s", mine, "C on libtracecmd", statistics.median(other)))
                if compression == "zstd":
                    texts = [reported(path) for _ in range(REPORT_ROUNDS)]
                    if any(events != count for events, _ in texts):
                        raise Unavailable(name, f"the report has {texts[0][0]} events, we {count}")
                    text = statistics.median(count / seconds for _, seconds in texts)
                    rows.append(figure(f"{name}_vs_report", "events/s", mine, "trace-cmd report + parsing", text))
    return rows
