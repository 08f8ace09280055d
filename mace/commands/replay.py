"""`mace replay`: recordings of any format to the same answers as live."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from contracts.errors import UsageError
from mace.commands.choices import PART_MIB
from mace.commands.console import Console
from mace.commands.options import (
    RecordingOptions,
    SinkOptions,
    location,
    with_config,
    with_format,
    with_recordings,
    with_sinks,
    with_store,
)

if TYPE_CHECKING:
    from contracts.figures import Summary
    from mace.live.session import Session


@dataclass(frozen=True, slots=True)
class Options:
    """What can be asked of it."""

    recordings: RecordingOptions
    store: Path | str | None
    resume: bool
    cluster: str | None
    part_mib: float
    sinks: SinkOptions
    config: Path | None
    format: str

    @property
    def has_urls(self) -> bool:
        """Whether anything is elsewhere."""
        return any(isinstance(each, str) for each in (self.store, *self.recordings.files))


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    with_recordings(parser, "path or URL")
    with_store(parser, "keep rows and windows here; path or URL", location)
    parser.add_argument("--resume", action="store_true", help="go on with a replay into this store that was stopped")
    parser.add_argument(
        "--cluster", metavar="ADDRESS", help="work on a Dask scheduler's workers, or local:N for N processes here"
    )
    parser.add_argument(
        "--part-mib",
        type=_mebibytes,
        default=float(PART_MIB),
        metavar="N",
        help="size of the parts that captures are cut into (default %(default)g)",
    )
    with_sinks(parser)
    with_config(parser)
    with_format(parser)


def _mebibytes(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: expected more than 0")
    return value


def run(options: Options, console: Console) -> int:
    """Replay, in parts where a store, a cluster or a URL is named, and print what came of it."""
    from mace.commands import settings

    configured = settings.configured(options.config, store=options.store, sinks=options.sinks)
    session = settings.session(configured, options.format, console)
    settings.show(_replayed(options, session), options.format, console)
    return 0


def _replayed(options: Options, session: Session) -> Summary:
    from mace.commands import settings

    if session.has_servers:
        # Servers are written to in one go: what they have taken cannot be taken back, or be skipped.
        return session.replay(settings.recordings(options.recordings), store=_local_store(options))
    if options.store is None and options.cluster is None and not options.has_urls:
        return session.replay(settings.recordings(options.recordings))
    return session.replay_into(
        None if options.store is None else str(options.store),
        settings.recorded_files(options.recordings),
        resume=options.resume,
        cluster=options.cluster,
        part_bytes=int(options.part_mib * 2**20),
    )


def _local_store(options: Options) -> Path | None:
    """The store of a replay in one go. Raises `UsageError` for what only a replay in parts can."""
    if options.resume or options.cluster is not None or options.has_urls:
        raise UsageError("--resume, --cluster and URLs go with the embedded store alone, not with other sinks")
    return None if options.store is None else Path(options.store)
