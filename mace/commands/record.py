"""`mace record`: writes live records to a capture file, for replay later or elsewhere."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from mace.commands.console import Console
from mace.commands.options import (
    JSON,
    CaptureOptions,
    FilterOptions,
    with_capture,
    with_config,
    with_duration,
    with_filter,
    with_format,
    with_lab,
    with_output,
    with_seal,
)


@dataclass(frozen=True, slots=True)
class Options:
    """Options and arguments of `mace record`."""

    output: Path
    force: bool
    seal: Path | None
    lab: str | None
    duration: float | None
    capture: CaptureOptions
    filter: FilterOptions
    config: Path | None
    format: str


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mace record` to the parser."""
    with_output(parser)
    with_seal(parser, "the recording")
    with_lab(parser)
    with_duration(parser)
    with_capture(parser)
    with_filter(parser)
    with_config(parser)
    with_format(parser)


def run(options: Options, console: Console) -> int:
    """Record until the duration is over or Ctrl-C, then print the numbers of records and bytes."""
    from mace.commands import settings
    from storage.capture import CaptureSink

    sink = CaptureSink(options.output, overwrite=options.force, seal=settings.seal_key(options.seal))
    place = settings.lab_of(options.lab)
    configured = settings.configured(options.config, capture=options.capture, chosen=options.filter, place=place)
    session = settings.session(configured, options.format, console)
    lost = session.record(settings.lasting(options.duration), sink)
    if options.format == JSON:
        told = {"file": str(options.output), "records": sink.records, "lost": lost, "bytes": sink.bytes_written}
        console.json(told | ({"seal_head": sink.seal_head} if options.seal else {}))
    else:
        console.line(
            f"{options.output}: {sink.records:,} records, {lost:,} lost in the ring, {sink.bytes_written:,} bytes"
        )
        if options.seal:
            console.line(f"sealed; the last statement is {sink.seal_head}")
    return 0
