"""`mace replay`: computes delays from recordings of any format, with the same results as the live measurement."""

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
    with_cpus,
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
    """Options and arguments of `mace replay`."""

    recordings: RecordingOptions
    store: Path | str | None
    resume: bool
    cluster: str | None
    part_mib: float
    cpus: bool
    sinks: SinkOptions
    config: Path | None
    format: str

    @property
    def has_urls(self) -> bool:
        """Whether the store or a recording is named by a URL."""
        return any(isinstance(each, str) for each in (self.store, *self.recordings.files))


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mace replay` to the parser."""
    with_recordings(parser, "path or URL of a recording")
    with_store(parser, "write rows and windows to this store; path or URL", location)
    parser.add_argument("--resume", action="store_true", help="continue a replay into this store that was stopped")
    parser.add_argument(
        "--cluster",
        metavar="ADDRESS",
        help="address of a Dask scheduler whose workers do the work, or local:N for N processes on this machine",
    )
    parser.add_argument(
        "--part-mib",
        type=_mebibytes,
        default=float(PART_MIB),
        metavar="N",
        help="size of the parts that recordings are divided into, MiB (default %(default)g)",
    )
    with_cpus(parser)
    with_sinks(parser)
    with_config(parser)
    with_format(parser)


def _mebibytes(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: expected more than 0")
    return value


def run(options: Options, console: Console) -> int:
    """Replay the recordings and print the figures; in parts where a store, a cluster or a URL is named."""
    from mace.commands import settings

    configured = settings.configured(options.config, cpus=options.cpus, store=options.store, sinks=options.sinks)
    session = settings.session(configured, options.format, console)
    settings.show(_replayed(options, session), options.format, console)
    return 0


def _replayed(options: Options, session: Session) -> Summary:
    from mace.commands import settings

    if session.has_servers:
        # No parts for servers: rows that a server has stored can be neither removed nor skipped on a resume.
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
    """Return the store of a replay without parts. Raises `UsageError` for options that need parts."""
    if options.resume or options.cluster is not None or options.has_urls:
        raise UsageError("--resume, --cluster and URLs work only with the embedded store; leave out the other sinks")
    return None if options.store is None else Path(options.store)
