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
    whole_at_least,
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
    jobs: int | None
    part_mib: float | None
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
        "--jobs",
        type=whole_at_least(1),
        metavar="N",
        help="number of processes that share the work (default: the cores that the command may use, fewer if memory is"
        " short; one for a short recording)",
    )
    parser.add_argument(
        "--cluster",
        metavar="ADDRESS",
        help="address of a Dask scheduler whose workers do the work, or local:N for N processes on this machine",
    )
    parser.add_argument(
        "--part-mib",
        type=_mebibytes,
        metavar="N",
        help=f"size of the parts that recordings are divided into, MiB (default {PART_MIB}; less if a short recording"
        " would not occupy all jobs)",
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
    """Replay the recordings and print the figures; in parts for a store, a cluster, a URL or several jobs."""
    from mace.commands import settings

    configured = settings.configured(options.config, cpus=options.cpus, store=options.store, sinks=options.sinks)
    session = settings.session(configured, options.format, console)
    settings.show(_replayed(options, session), options.format, console)
    return 0


def _replayed(options: Options, session: Session) -> Summary:
    from mace.commands import settings
    from mace.replaying import jobs as processes

    if options.jobs is not None and options.cluster is not None:
        raise UsageError("--jobs is for the processes of this machine, --cluster for workers; leave out one of the two")
    if session.has_servers:
        # No parts for servers: rows that a server has stored can be neither removed nor skipped on a resume.
        return session.replay(settings.recordings(options.recordings), store=_local_store(options))
    jobs = options.jobs or processes.usable()
    files = settings.recorded_files(options.recordings)
    part_bytes = None if options.part_mib is None else int(options.part_mib * 2**20)
    in_parts = options.store is not None or options.cluster is not None or options.has_urls
    if not in_parts and (jobs == 1 or (part_bytes is None and not processes.worthwhile(files, jobs))):
        return session.replay(settings.recordings(options.recordings))
    return session.replay_into(
        None if options.store is None else str(options.store),
        files,
        resume=options.resume,
        cluster=options.cluster,
        jobs=jobs,
        part_bytes=part_bytes,
    )


def _local_store(options: Options) -> Path | None:
    """Return the store of a replay without parts. Raises `UsageError` for options that need parts."""
    if options.resume or options.cluster is not None or options.jobs is not None or options.has_urls:
        raise UsageError(
            "--resume, --jobs, --cluster and URLs work only with the embedded store; leave out the other sinks"
        )
    return None if options.store is None else Path(options.store)
