"""`./dev fuzz [MINUTES]`: feeds hostile and damaged input to all targets in turn.

Attempts run in child processes with bounds on time, memory and files, so that a crash or a hang is a finding like any
other. An input depends on its number alone: `--again TARGET NUMBER` repeats one in this process.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import resource
import signal
import struct
import sys
import time
import traceback
from pathlib import Path
from typing import Final

from tests.fuzz.targets import TARGETS, FuzzTarget, attempt

_ATTEMPTS: Final = 50
"""Attempts of one child process, whose start costs 10 ms."""
_SECONDS: Final = 60
"""CPU time that one attempt may take: a hundred times that of the largest input."""
_MEMORY: Final = 2 << 30
"""Address space that a child may take beyond its size at the start."""
_FILES: Final = 256
_KEPT: Final = Path("fuzz-found")


def main() -> int:
    """Run the fuzzer, and return its exit status: 1 if there was a finding."""
    parser = argparse.ArgumentParser(prog="./dev fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "minutes", nargs="?", type=float, default=5.0, metavar="MINUTES", help="all targets together; 5"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=list(TARGETS),
        choices=TARGETS,
        metavar="TARGET",
        help=f"some of {', '.join(TARGETS)}",
    )
    parser.add_argument("--seed", type=int, default=None, metavar="N", help="number of the first input")
    parser.add_argument("--again", nargs=2, metavar=("TARGET", "NUMBER"), help="run one input in this process")
    args = parser.parse_args()
    if args.again:
        name, number = args.again
        attempt(TARGETS[name], _input(TARGETS[name], int(number)))
        return 0
    first = args.seed if args.seed is not None else int(time.time()) << 20
    return _fuzz(args.only, args.minutes * 60, first)


def _input(target: FuzzTarget, number: int) -> bytes:
    return target.make(random.Random(number))


def _fuzz(names: list[str], seconds: float, first: int) -> int:
    until = time.monotonic() + seconds
    tried, found = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    while time.monotonic() < until:
        for name in names:
            number = first + tried[name]
            done, why = _batch(TARGETS[name], number)
            tried[name] += done
            if why:
                found[name] += 1
                _keep(name, number + done - 1, why)
            if time.monotonic() >= until:
                break
    for name in names:
        print(json.dumps({"target": name, "inputs": tried[name], "findings": found[name]}), flush=True)
    return 1 if any(found.values()) else 0


def _keep(name: str, number: int, why: str) -> None:
    _KEPT.mkdir(exist_ok=True)
    path = _KEPT / f"{name}-{number}.bin"
    path.write_bytes(_input(TARGETS[name], number))
    print(f"{path}: {why.strip().splitlines()[-1]}", flush=True)
    path.with_suffix(".txt").write_text(why)


def _batch(target: FuzzTarget, first: int) -> tuple[int, str]:
    """Return the number of inputs tried, and the finding at the last one; empty if there is none."""
    shared = mmap.mmap(-1, 4096)
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(read_end)
            status = _child(target, first, shared, write_end)
        finally:
            os._exit(status)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        told = pipe.read().decode("utf-8", "replace")
    _, status = os.waitpid(child, 0)
    (done,) = struct.unpack_from("<Q", shared)
    shared.close()
    code = os.waitstatus_to_exitcode(status)
    if code == 0:
        return done, ""
    return done, told or f"ended by {signal.Signals(-code).name if code < 0 else f'status {code}'}"


def _child(target: FuzzTarget, first: int, shared: mmap.mmap, told: int) -> int:
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (size + _MEMORY, size + _MEMORY))
    resource.setrlimit(resource.RLIMIT_NOFILE, (_FILES, _FILES))
    for index in range(_ATTEMPTS):
        struct.pack_into("<Q", shared, 0, index + 1)
        # The limit is per attempt. Python does not catch SIGPROF here, so that the signal ends the child.
        signal.setitimer(signal.ITIMER_PROF, _SECONDS)
        try:
            attempt(target, _input(target, first + index))
        except BaseException:  # noqa: BLE001 - whatever it is, it is a finding
            os.write(told, traceback.format_exc().encode("utf-8", "backslashreplace")[-60_000:])
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
