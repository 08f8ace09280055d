"""`mace replay`: what is replayed. Files of any format that `collector.files` knows, in time order."""

from __future__ import annotations

import argparse
from pathlib import Path

from collector.files import BY_NAME, FileOptions, Recording, in_time_order


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `mace replay` but `--config` and `--json`."""
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help=f"of any of these: {', '.join(BY_NAME)}")
    parser.add_argument("--store", type=Path, metavar="DIR", help="keep rows and windows here")
    add_file_options(parser)


def add_file_options(parser: argparse.ArgumentParser) -> None:
    """What can be asked of the readers of files."""
    parser.add_argument("--salvage", action="store_true", help="skip damaged parts, counting what they held")
    group = parser.add_argument_group("files of other tools")
    group.add_argument(
        "--topology", type=Path, metavar="FILE", help="a capture file of the same host, which tells what devices are"
    )
    group.add_argument("--buffer", default="", metavar="NAME", help="which trace instance; the top one is `top`")
    group.add_argument("--clock", default="", metavar="NAME", help="the trace clock of a file that does not say it")


def recordings(args: argparse.Namespace) -> list[Recording]:
    """What the arguments name, in time order. Raises `Unavailable` or `CaptureError`."""
    return in_time_order(args.files, file_options(args))


def file_options(args: argparse.Namespace) -> FileOptions:
    """What `add_file_options` has asked."""
    return FileOptions(args.salvage, args.topology, args.buffer, args.clock)
