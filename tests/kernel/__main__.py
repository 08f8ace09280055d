"""`./dev test-kernel`: runs a command, by default the guest's tests, on every kernel."""

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import as_completed
from pathlib import Path

from tests.kernel import vm
from tests.kernel.build import build
from tests.kernel.kernels import KERNELS, KernelUnavailable, fetch
from tests.kernel.matrix import JOBS, PYTEST, TIMEOUT_S, Matrix, Task


def say(text: str) -> None:
    print(text, flush=True)


def parse(args: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./dev test-kernel", description=__doc__)
    parser.add_argument("--kernel", action="append", choices=KERNELS, help="only this one; may be repeated")
    parser.add_argument("--jobs", type=int, default=JOBS, help="machines at a time (%(default)s)")
    parser.add_argument("--fetch", action="store_true", help="fetch the newest of each kernel and stop")
    parser.add_argument("--build", action="store_true", help="build the module for each kernel, say where, and stop")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="more variables for --build")
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S, metavar="S", help="for a machine (%(default)s)")
    parser.add_argument("--results", type=Path, metavar="DIR", help="keep output, serial log and results there")
    parser.add_argument("--show", action="store_true", help="the output also of what succeeded")
    parser.add_argument("command", nargs="*", help=f"after --; MACE_KO is the module ({' '.join(PYTEST[1:])})")
    return parser.parse_args(args)


def main(args: Sequence[str]) -> int:
    asked = parse(args)
    reason = vm.missing()
    if reason is not None:
        print(f"test-kernel: {reason}", file=sys.stderr)
        return 1
    names = asked.kernel or list(KERNELS)
    if asked.fetch or asked.build:
        return prepare(names, newest=asked.fetch, building=asked.build, extra=asked.set)
    task = Task(asked.command or PYTEST, asked.timeout, asked.results)
    failed = []
    with Matrix(names, task, asked.jobs) as matrix:
        of_future = {future: name for name, future in matrix.futures.items()}
        for future in as_completed(of_future):
            name = of_future[future]
            try:
                result = future.result()
            except (KernelUnavailable, vm.MachineFailed) as error:
                say(f"{name}: FAILED: {error}")
                failed.append(name)
                continue
            if not result.good:
                failed.append(name)
            if asked.show or not result.good:
                say(result.report())
            last = (result.output.strip().splitlines() or ["no output"])[-1].strip("= ")
            took = f"booted in {result.boot_s:.1f} s, off after {result.seconds:.1f} s"
            say(f"{name}: {'good' if result.good else 'FAILED'}: {last} ({result.release}; {took})")
    if failed:
        say(f"test-kernel: FAILED on {', '.join(failed)}")
    return 1 if failed else 0


def prepare(names: Sequence[str], *, newest: bool, building: bool, extra: Sequence[str]) -> int:
    status = 0
    for name in names:
        try:
            kernel = fetch(name, newest=newest)
            say(f"{name}: {kernel.release}: {kernel.root}")
            if building:
                built = build(kernel, extra=dict(word.partition("=")[::2] for word in extra))
                say(f"{name}: {built.module}")
        except KernelUnavailable as error:
            say(f"{name}: FAILED: {error}")
            status = 1
    return status


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
