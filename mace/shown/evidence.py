"""What a report says of its data's standing: their seals, and how well the clocks were known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from contracts.errors import MissingExtra, SealError
from contracts.wire import clock_fields
from storage.query import Run
from storage.sealing.places import has_seal, seal_path

VERIFIED_BYTES: Final = 256 << 20
"""Largest store, with its seal, that a report verifies: below a second of hashing. A recording is read whole anyway."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """Lines for a person, and the same as JSON."""

    lines: tuple[str, ...] = ()
    fields: tuple[tuple[str, Any], ...] = ()


NO_EVIDENCE: Final = Evidence()


def evidence(paths: Sequence[Path], runs: Sequence[Run]) -> Evidence:
    """Return the state of the seals of the stores and recordings that have one, and of the runs' clocks.

    JSON has the list `clocks`, and `seals` if there is a seal: objects of `Checked.as_dict`, or `path` and `state` of a
    seal that was not verified.
    """
    seals = [_seal(path) for path in paths if has_seal(path)]
    clocks = [{"host": run.host, "run": run.run, **clock_fields(run.clock)} for run in runs]
    fields: list[tuple[str, Any]] = [("clocks", clocks)]
    if seals:
        fields.append(("seals", [told for _, told in seals]))
    lines = [line for of, _ in seals for line in of]
    return Evidence((*lines, *_clocks(runs)), tuple(fields))


def _seal(path: Path) -> tuple[list[str], dict[str, Any]]:
    size = _size(path)
    try:
        from storage.sealing import check  # noqa: PLC0415 (needs an extra)

        if path.is_dir() and size > VERIFIED_BYTES:
            told = f"not verified here ({size / 2**20:,.0f} MiB): mace verify-seal {path}"
            return [f"{path}: seal {told}"], {"path": str(path), "state": told}
        found = check.check(path)
    except (SealError, MissingExtra) as error:
        return [f"{path}: sealed, but the seal cannot be verified: {error}"], {"path": str(path), "state": str(error)}
    lines = [f"{path}: {found.line()}", *map(str, found.findings[:5])]
    if (more := len(found.findings) + found.more_findings - 5) > 0:
        lines.append(f"and {more:,} more: mace verify-seal {path}")
    return lines, found.as_dict()


def _size(path: Path) -> int:
    if not path.is_dir():
        return path.stat().st_size
    return seal_path(path).stat().st_size + sum(each.stat().st_size for each in path.rglob("*.parquet"))


def _clocks(runs: Sequence[Run]) -> list[str]:
    if not runs:
        return []
    if len(runs) == 1:
        return [f"clocks: {runs[0].clock}"]
    states = Counter(run.clock.kernel.state if run.clock.kernel else "not recorded" for run in runs)
    bounded = [
        run.clock.kernel.max_error_ns for run in runs if run.clock.kernel and run.clock.kernel.state == "synchronised"
    ]
    worst = f"; where synchronised, off by at most {max(bounded) / 1e6:,.3f} ms" if bounded else ""
    pairing = max(run.clock.uncertainty_ns for run in runs)
    told = ", ".join(f"{state} {n}" for state, n in states.items())
    return [
        f"clocks of {len(runs)} runs: UTC - CLOCK_MONOTONIC known to ± {pairing:,} ns; the kernels' UTC: {told}{worst}"
    ]
