"""Corrects the round trip times that a tool has printed, with a capture recorded while it ran."""

from __future__ import annotations

import codecs
import io
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from collector.files import LocalRecording, recording
from contracts.config import Config, load
from contracts.errors import Unavailable, UsageError, nearest
from correlator.correction import Corrections, correct
from correlator.samples import Samples
from correlator.stamps import REQUEST_RESPONSE, StampModel
from mace.live.session import Session
from mace.shown import lines, terminal
from mace.tools.calibration import kept_for
from mace.tools.corrected import Corrected, Observed, line
from mace.tools.output import READERS, read
from mace.tools.samples import Reader

STDIN: Final = Path("-")


def printed(output: Path, reader_name: str | None) -> tuple[Samples, Reader]:
    """Read a tool's output from a file (`STDIN`: standard input); returns the samples and the reader.

    `reader_name` is the tool's name in `READERS`; None recognises the tool by its output. Raises `UsageError`,
    `Unavailable`.
    """
    return read(_lines(output), READERS[reader_name]() if reader_name else None)


def corrected(
    samples: Samples, reader: Reader, captured: LocalRecording, session: Session, container: str | None = None
) -> Corrected:
    """Correct samples by the packets in a recording; `container` is needed if the recording has several.

    Raises `UsageError`, `Unavailable` and `CaptureError`.
    """
    observed = Observed()
    session.observed(captured, observed.add)
    found = Corrected.of(samples, observed, reader, _netns(observed, container))
    return found if session.header is None else found.calibrated_by(*kept_for(session.header))


def arrays(
    capture: Path | str,
    rtt_ns: npt.ArrayLike,
    *,
    container: str | None = None,
    stamps: StampModel = REQUEST_RESPONSE,
    config: Config | None = None,
    **columns: npt.ArrayLike,
) -> Corrections:
    """Correct round trip times in arrays by the packets in a capture file; returns one row per sample, in their order.

    `rtt_ns` is int64, `NOT_TOLD` (-1) for a request without a reply, in the order in which the replies arrived.
    `columns` are further columns of `correlator.samples.Samples`: arrays of the same length, or one value for all.
    `stamps` says when the tool reads the clock (`correlator.stamps.MODELS`); with the default, `stamp_utc_ns` is the
    time of sending. `container` is needed if the capture has several.

    Raises `UsageError`, `Unavailable` and `CaptureError`, and for `columns` the errors of `Samples.of`.
    """
    rtt = np.asarray(rtt_ns, np.int64)
    samples = Samples.of(len(rtt), rtt_ns=rtt, **columns)
    observed = Observed()
    Session(config or load(None), terminal.PlainConsole(stderr=True), quiet=True).observed(
        recording(capture), observed.add
    )
    crossings = observed.crossings(_netns(observed, container))
    return correct(samples, crossings, stamps, observed.gaps_utc_ns)


def print_samples(found: Corrected) -> None:
    """Print one line per sample, in the order of the tool's output."""
    for row in range(len(found.samples)):
        rtt_ns = int(found.samples.rtt_ns[row])
        tool = f"tool={rtt_ns / 1000:,.1f} " if rtt_ns >= 0 else ""
        lines.line(f"seq={int(found.samples.seq[row])} {tool}{line(found.corrections, row)}")


def _lines(path: Path) -> Iterable[str]:
    try:
        if path != STDIN:
            return _text(path.read_bytes()).splitlines()
        return (
            _text(sys.stdin.buffer.read()).splitlines() if isinstance(sys.stdin, io.TextIOWrapper) else list(sys.stdin)
        )
    except OSError as error:
        what = "standard input" if path == STDIN else str(path)
        raise Unavailable(what, error.strerror or str(error), "name a file with the tool's output") from error


def _text(raw: bytes) -> str:
    """Decode a tool's output by its byte order mark: PowerShell redirects as UTF-16, Excel marks a CSV as UTF-8."""
    return raw.decode("utf-16" if raw[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig", "replace")


def _netns(observed: Observed, container: str | None) -> int:
    """Return the inode of the container's network namespace; the only one without a name. Raises `UsageError`."""
    found = observed.containers()
    names = {name: netns for netns, (name, _) in found.items()}
    known = ", ".join(f"{name} ({count:,} packets)" for name, count in sorted(found.values()))
    if not found:
        raise UsageError("the capture has no packet with records over the whole path of a container")
    if container is None and len(found) > 1:
        raise UsageError(
            f"the capture has several containers: {known}; --container selects the one that the tool ran in"
        )
    if container is not None and container not in names:
        raise UsageError(f"the capture has no container {container!r}{nearest(container, names)}; it has {known}")
    return next(iter(found)) if container is None else names[container]
