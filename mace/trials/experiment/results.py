"""The results file of an experiment: a line of JSON for its settings, and one for each finished repetition.

A line is written whole and synchronised when its repetition is finished. A run with the same settings reads the file
and continues. A last line without its end is what a killed run leaves; it is removed, and its repetition measured
again.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any, Final

from contracts.errors import StoreError, UsageError
from mace.trials.experiment.plan import Cell, as_values, cell_of

_FORMAT: Final = 1
_MAX_BYTES: Final = 1 << 30
"""Largest results file that is read: a night has some 30 MB."""


@dataclass(frozen=True, slots=True)
class Repetition:
    """One repetition of a cell. Times are ns; a list has one element per ping with a reply."""

    number: int
    cell: Cell
    bare: dict[str, list[int]]
    """Round trips of ping on the host: `untraced`, `traced`, and beside a load `starved`."""
    container: dict[str, list[int]]
    """Round trips of ping in the container: `untraced`, and of the pings that were corrected, `traced`."""
    corrected: list[int]
    """Host RTT of the paired samples; the lower bound where `mace ping` knows no more."""
    median: list[float] | None
    """Host RTT that `mace ping` prints: its median, and the ends of the 95 % interval; None if it prints none."""
    plain: float | None
    """Median of the tool RTT less the time spent in the container's devices."""
    without_waiting: float | None
    """`median` with the waiting for a CPU taken out of each sample; None if it is unknown."""
    temporal_error: float | None
    """Mean time that a sample waited for a CPU."""
    stretches: dict[str, float] | None
    """The host path term by stretch; None if `mace ping` prints none."""
    tracer_cost: float | None
    """What `mace ping` has taken out for its own tracing; None if it prints none."""
    counts: dict[str, Any]
    """`sent`, `paired`, `unpaired` (by reason), `waits_known` (of the paired ones), `probes`."""
    ledger: dict[str, int]
    wants: dict[str, int | None]
    """During `mace ping`: `throttled` (periods), `throttled_ns`, `cpu_pressure_ns`, `io_pressure_ns`; None: unknown."""


@dataclass(slots=True)
class Results:
    """Finished repetitions, in a file or, without one, in memory."""

    machine: dict[str, Any]
    finished: list[Repetition] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    _file: FileIO | None = None

    def add(self, found: Repetition) -> None:
        """Add a finished repetition, and write its line. Raises `StoreError` (disk full, ...)."""
        self.finished.append(found)
        if self._file is not None:
            self._write({**asdict(found), "cell": as_values(found.cell)})

    def has(self, number: int, cell: Cell) -> bool:
        """Return whether the repetition of that number is finished."""
        return any(each.number == number and each.cell == cell for each in self.finished)

    def _write(self, value: Mapping[str, Any]) -> None:
        """Write one line; what a failed write leaves of it is removed as the end of a killed run would be."""
        assert self._file is not None
        try:
            line = json.dumps(value, separators=(",", ":")).encode() + b"\n"
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        except OSError as error:
            raise StoreError(f"--results {self._file.name}: {error.strerror}") from error


@contextmanager
def opened(path: Path | None, settings: Mapping[str, Any], machine: dict[str, Any]) -> Iterator[Results]:
    """Yield the results in the file at `path`, which is made if it does not exist; None: in memory.

    Raises `UsageError` if the file cannot be used: another run writes it, its settings differ, or it is no such file.
    """
    if path is None:
        yield Results(machine)
        return
    try:
        file = path.open("a+b", buffering=0)
    except OSError as error:
        raise UsageError(f"--results {path}: {error.strerror}") from error
    with file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise UsageError(f"--results {path}: not a regular file")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"--results {path}: another run is writing it") from None
        found = Results(machine, _file=file)
        _load(found, file, path, settings)
        yield found


def read(path: Path) -> Results:
    """Return the results in a file of any machine, which stays as it is. Raises `UsageError` if it is no such file."""
    found = Results({})
    try:
        with path.open("rb", buffering=0) as file:
            _load(found, file, path, {})
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    if not found.finished:
        raise UsageError(f"{path}: has no finished repetition")
    return found


def _load(results: Results, file: FileIO, path: Path, settings: Mapping[str, Any]) -> None:
    if os.fstat(file.fileno()).st_size > _MAX_BYTES:
        raise UsageError(f"--results {path}: larger than {_MAX_BYTES:,} bytes, not the results of an experiment")
    file.seek(0)
    lines = file.read().split(b"\n")
    whole, torn = lines[:-1], lines[-1]
    if not whole:
        if torn or not file.writable():
            raise UsageError(f"--results {path}: not the results of an experiment")
        results._write({"mace_experiment": _FORMAT, "settings": dict(settings), "machine": results.machine})
        return
    results.machine = _checked_header(whole[0], path, settings)
    for at, line in enumerate(whole[1:], 2):
        try:
            values = json.loads(line)
            results.finished.append(Repetition(**{**values, "cell": cell_of(values["cell"])}))
        except (ValueError, TypeError, KeyError) as error:
            raise UsageError(f"--results {path}, line {at}: not a repetition of an experiment ({error})") from None
    if torn and file.writable():
        file.truncate(sum(len(line) + 1 for line in whole))
        results.remarks.append(f"{path}: the last line was cut short; its repetition is measured again")


def _checked_header(line: bytes, path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the machine of the first line. Raises `UsageError` if the settings differ."""
    try:
        header = json.loads(line)
        version, theirs, machine = header["mace_experiment"], dict(header["settings"]), dict(header["machine"])
    except (ValueError, TypeError, KeyError):
        raise UsageError(f"--results {path}: not the results of an experiment") from None
    if version != _FORMAT:
        raise UsageError(f"--results {path}: format {version}, expected {_FORMAT}; use the MACE that made it")
    for name, value in settings.items():
        if theirs.get(name) != value:
            raise UsageError(
                f"--results {path}: made with {name} {theirs.get(name)}, this run has {value}; "
                "continue with the same settings on the same machine, or name another file"
            )
    return machine
