"""Runs `mace` many times, each run a fork of one process that has imported it: an import takes most of a second.

    python -m tests.forked_commands < CASES > RESULTS      JSON: a list of `CommandCase`, a list of `Done`

A fork starts like a process of its own, with the streams of its case, some of which may be closed. It ends with
Python's flush at exit, without the rest of the interpreter's shutdown, which takes as long as many commands.
"""

import codecs
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass, field

from tests.places import ROOT

NOBODY = 65534
PARTS = (
    *("mace.lab.demo", "mace.live.parts", "mace.live.publish", "mace.live.session", "mace.module"),
    *("mace.live.watching", "mace.shown.top.running", "mace.shown.top.stored"),
    *("mace.replaying.export", "mace.replaying.replay", "mace.shown.report", "mace.shown.rows", "rich.logging"),
    *("mace.tools.correct", "mace.tools.namespaces", "mace.tools.ping", "mace.tools.wrap", "storage.check"),
    *("mace.trials.compare", "mace.trials.verify.verdict", "mace.commands.settings"),
    *("mace.trials.experiment.figures", "mace.trials.experiment.measuring", "mace.trials.experiment.results"),
)
"""Modules that commands import when they run; imports take most of a command's time. Extras are not among them."""


def import_all():
    """Import every module that commands import: for forks, and for processes that will lose access to the tree."""
    from mace.commands import registry

    for command in registry.COMMANDS:
        importlib.import_module(registry.module(command.name))
    for name in PARTS:
        importlib.import_module(name)


@dataclass
class CommandCase:
    """A command and its unusual surroundings. A stream is a path, or None for a closed one."""

    argv: list[str]
    stdin: str | None = os.devnull
    stdout: str | None = "kept"
    stderr: str | None = "kept"
    encoding: str = "utf-8"
    environment: dict = field(default_factory=dict)
    unprivileged: bool = False
    """Whether the command runs without privileges, because it would change the machine."""


@dataclass
class Done:
    status: int
    out: bytes = b""
    err: bytes = b""


def run(cases, cwd):
    """Run all cases and return a `Done` for each, in order."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.forked_commands"],
        input=json.dumps([asdict(case) for case in cases]), capture_output=True, text=True, check=False, timeout=280,
        cwd=cwd, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return [Done(status, out.encode("latin-1"), err.encode("latin-1")) for status, out, err in json.loads(done.stdout)]


def _given(fd, path, kept, flags):
    if path is not None:
        opened = kept.fileno() if kept is not None and path == "kept" else os.open(path, flags)
        os.dup2(opened, fd)


def _begin(case, out, err):
    """Bring this fork into the state of a new process."""
    _given(0, case.stdin, None, os.O_RDONLY)
    _given(1, case.stdout, out, os.O_WRONLY)
    _given(2, case.stderr, err, os.O_WRONLY)
    for fd, path in enumerate((case.stdin, case.stdout, case.stderr)):
        if path is None:
            os.close(fd)
    os.environ.update(case.environment)
    time.tzset()
    if case.unprivileged and os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    sys.stdin = sys.__stdin__ = None if case.stdin is None else open(0, encoding=case.encoding, closefd=False)  # noqa: SIM115
    for fd, name, errors in ((1, "stdout", "strict"), (2, "stderr", "backslashreplace")):
        closed = (case.stdout, case.stderr)[fd - 1] is None
        made = None if closed else open(fd, "w", encoding=case.encoding, errors=errors, closefd=False)  # noqa: SIM115
        setattr(sys, name, made)
        setattr(sys, f"__{name}__", made)
    sys.argv = ["mace", *case.argv]


def _serve():
    cases = [CommandCase(**each) for each in json.load(sys.stdin)]
    results = []
    for case in cases:
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            child = os.fork()
            if not child:
                _begin(case, out, err)
                os._exit(_end())
            _, status = os.waitpid(child, 0)
            found = []
            for file in (out, err):
                file.seek(0)
                found.append(file.read().decode("latin-1"))
            results.append((os.waitstatus_to_exitcode(status), *found))
    return results


def _end():
    """Return the exit status: the command's, or Python's 120 if output cannot be flushed (`flush_std_files`)."""
    try:
        status = __main__.main()
    except SystemExit as asked:
        status = asked.code or 0
    except BaseException:  # noqa: BLE001 (Python shows it and ends)
        traceback.print_exc()
        status = 1
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception as error:  # noqa: BLE001 (so does Python)
            os.write(2, f"Exception ignored: {error!r}\n".encode())
            status = 120
    return status


if __name__ == "__main__":
    from mace import __main__, cli  # noqa: F401 (each fork begins with it)

    import_all()
    for name in ("ascii", "latin-1"):
        codecs.lookup(name)  # read now: the user nobody may have no access to Python's files
    gc.freeze()  # so that forks share unchanged memory
    json.dump(_serve(), sys.stdout)
