"""`mace replay`: what is replayed. Files of any format that `collector.files` knows, in time order."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from collector.files import FORMATS, PCAP_PAIR, FileOptions, Recording, ordered, recording, recording_of
from contracts.errors import UsageError
from mace.replaying import into_store
from mace.replaying.assembly import PART_BYTES
from mace.replaying.into_store import location
from mace.replaying.part import RecordedFile


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `mace replay` but `--config` and `--json`."""
    formats = ", ".join(form.name for form in FORMATS)
    parser.add_argument(
        "files", nargs="*", type=location, metavar="FILE", help=f"path or URL, of any of these: {formats}"
    )
    parser.add_argument("--store", type=location, metavar="DIR", help="keep rows and windows here; path or URL")
    parser.add_argument("--resume", action="store_true", help="go on with a replay into this store that was stopped")
    parser.add_argument(
        "--cluster", metavar="ADDRESS", help="work on a Dask scheduler's workers, or local:N for N processes here"
    )
    parser.add_argument(
        "--part-mib",
        type=_mebibytes,
        default=PART_BYTES / 2**20,
        metavar="N",
        help="size of the parts that captures are cut into (default %(default)g)",
    )
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
    for side in ("inner", "outer"):
        group.add_argument(
            f"--{side}-device",
            default="",
            metavar="NAME",
            help=f"of an {side} capture of several devices (`tcpdump -i any`): which one, by index or interface name",
        )
    group.add_argument("--buffer", default="", metavar="NAME", help="which trace instance; the top one is `top`")
    group.add_argument("--clock", default="", metavar="NAME", help="the trace clock of a file that does not say it")


def _mebibytes(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: expected more than 0")
    return value


def recordings(args: argparse.Namespace) -> list[Recording]:
    """What the arguments name, in time order; no URLs. Raises `Unavailable` or `CaptureError`."""
    options = _options(args)
    found = [recording(path, options) for path in args.files if isinstance(path, Path)]
    if (args.inner is None) != (args.outer is None):
        raise UsageError("--inner and --outer go together: two packet captures of one host")
    if args.inner is not None:
        found.append(recording_of(PCAP_PAIR, (args.inner, args.outer), options))
    if not found and not args.files:
        raise UsageError("nothing to replay: name files, or two packet captures with --inner and --outer")
    return ordered(found)


def recorded_files(args: argparse.Namespace) -> list[RecordedFile]:
    """The same for a replay in parts, URLs as well."""
    found = [into_store.recorded(each) for each in recordings(args)]
    found += [into_store.recorded_at(each, _options(args)) for each in args.files if isinstance(each, str)]
    return into_store.in_time_order(found)


def in_parts(args: argparse.Namespace) -> bool:
    """Whether it is a replay in parts: into a store, on a cluster, or from elsewhere."""
    return args.store is not None or args.cluster is not None or any(isinstance(each, str) for each in args.files)


def local_store(args: argparse.Namespace) -> Path | None:
    """The store of a replay in one go. Raises `UsageError` for what only a replay in parts can."""
    if args.resume or args.cluster is not None or any(isinstance(each, str) for each in (args.store, *args.files)):
        raise UsageError("--resume, --cluster and URLs go with the embedded store alone, not with other sinks")
    store: Path | None = args.store
    return store


def how(args: argparse.Namespace) -> into_store.How:
    """The options of that."""
    return {"resume": args.resume, "cluster": args.cluster, "part_bytes": int(args.part_mib * 2**20)}


def _options(args: argparse.Namespace) -> FileOptions:
    return FileOptions(args.salvage, args.topology, args.buffer, args.clock, args.inner_device, args.outer_device)
