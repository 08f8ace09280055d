"""`mace serve`: shows a store or a recording in the browser."""

from __future__ import annotations

import argparse
import signal
from dataclasses import dataclass
from pathlib import Path

from mace.commands.choices import SERVE_AT
from mace.commands.console import Console
from mace.commands.options import (
    ReaderOptions,
    RecordingOptions,
    with_config,
    with_readers,
    with_recordings,
    with_store,
)

_LOOK_S = 1.0
"""Time between two looks at whether the server still serves."""


@dataclass(frozen=True, slots=True)
class Options:
    """Options and arguments of `mace serve`."""

    recordings: RecordingOptions
    store: Path | None
    listen: str
    readers: ReaderOptions
    perfetto: str | None
    skip_damaged: bool
    config: Path | None


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mace serve` to the parser."""
    with_recordings(parser, "recordings to show instead of a store, as for `mace replay`")
    with_store(parser, "the store to show; a run or an ingest may be writing it")
    parser.add_argument(
        "--listen", default=SERVE_AT, metavar="ADDRESS", help="HOST:PORT, or a port of 127.0.0.1 (default %(default)s)"
    )
    with_readers(parser)
    parser.add_argument(
        "--perfetto",
        metavar="URL",
        help="the Perfetto UI that the page hands traces to (default https://ui.perfetto.dev)",
    )
    parser.add_argument("--skip-damaged", action="store_true", help="leave out damaged segments, and say how many")
    with_config(parser)


def run(options: Options, console: Console) -> int:
    """Serve the page until Ctrl-C or SIGTERM."""
    from contracts import config
    from mace.commands import settings
    from mace.serving import access, server

    settings.replaying(options.recordings, options.store)
    where = access.address(options.listen)
    readers = access.access(where[0], options.readers.token_file, options.readers.allow_host)
    perfetto = access.perfetto_ui(options.perfetto or access.PERFETTO_UI)
    configured = config.load(options.config)
    with settings.store_to_read(options.recordings, options.store, configured) as path:
        ends = {signal.SIGINT, signal.SIGTERM}
        # Before the server's thread begins, which inherits the mask: both signals wait for sigtimedwait.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ends)
        try:
            with server.serving(path, where, readers, perfetto=perfetto, skip_damaged=options.skip_damaged) as page:
                console.line(f"{page.url} shows {path}{access.warning(where[0])}; Ctrl-C ends", flush=True)
                while signal.sigtimedwait(ends, _LOOK_S) is None:
                    page.check()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return 0
