"""`mace replay`: what is replayed. Files of any format that `collector.files` knows, in time order."""

from __future__ import annotations

import argparse
from pathlib import Path

from collector.files import FORMATS, PCAP_PAIR, FileOptions, Recording, ordered, recording, recording_of
from mace.errors import UsageError


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `mace replay` but `--config` and `--json`."""
    parser.add_argument(
        "files",
        nargs="*",
        type=Path,
        metavar="FILE",
        help=f"of any of these: {', '.join(form.name for form in FORMATS)}",
    )
    parser.add_argument("--store", type=Path, metavar="DIR", help="keep rows and windows here")
    add_file_options(parser)


def add_file_options(parser: argparse.ArgumentParser) -> None:
    """What can be asked of the readers of files."""
    parser.add_argument("--salvage", action="store_true", help="skip damaged parts, counting what they held")
    group = parser.add_argument_group("files of other tools")
    group.add_argument(
        "--topology", type=Path, metavar="FILE", help="a capture file of the same host, which tells what devices are"
    )
    group.add_argument("--inner", type=Path, metavar="FILE", help="a packet capture made at the container's device")
    group.add_argument("--outer", type=Path, metavar="FILE", help="and one made at the host's, of the same time")
    group.add_argument("--buffer", default="", metavar="NAME", help="which trace instance; the top one is `top`")
    group.add_argument("--clock", default="", metavar="NAME", help="the trace clock of a file that does not say it")


def recordings(args: argparse.Namespace) -> list[Recording]:
    """What the arguments name, in time order. Raises `Unavailable` or `CaptureError`."""
    options = FileOptions(args.salvage, args.topology, args.buffer, args.clock)
    found = [recording(path, options) for path in args.files]
    if (args.inner is None) != (args.outer is None):
        raise UsageError("--inner and --outer go together: two packet captures of one host")
    if args.inner is not None:
        found.append(recording_of(PCAP_PAIR, (args.inner, args.outer), options))
    if not found:
        raise UsageError("nothing to replay: name files, or two packet captures with --inner and --outer")
    return ordered(found)
