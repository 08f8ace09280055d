"""What options have in common: groups of them that several commands take, and how they become dataclasses.

A name means the same in every command:

    --container, --netns, --pid     the container, its network namespace by name or path, a process in it
    --lab                           the test network to measure, instead of the machine
    --store                         the directory of the store, to read or to write
    -o, --output · --record         the file to write · a capture file to write as well
    --format, --json                how results are printed; --json is short for --format json
    --config                        the configuration file
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar, get_type_hints

from mace.commands.choices import FILE_FORMATS, RUNTIMES, SOURCES

T = TypeVar("T")

JSON: Final = "json"
TABLE: Final = "table"
CSV: Final = "csv"


def typed(kind: type[T], args: argparse.Namespace) -> T:
    """The dataclass with the fields that the parser has filled; fields that are dataclasses themselves likewise."""
    values = {}
    for name, of in get_type_hints(kind).items():
        value = typed(of, args) if isinstance(of, type) and is_dataclass(of) else getattr(args, name)
        values[name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


# What an option's value may be ----------------------------------------------------------------------------


def at_least(low: float) -> Callable[[str], float]:
    """Parse a finite number that is no less."""

    def parse(text: str) -> float:
        value = float(text)
        # Written so that nan, which compares false, is refused.
        if not low <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text}: expected at least {low:g}")
        return value

    parse.__name__ = "float"
    return parse


def whole_at_least(low: int) -> Callable[[str], int]:
    """Parse a whole number that is no less."""

    def parse(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"{text}: expected at least {low}")
        return value

    parse.__name__ = "int"
    return parse


def location(text: str) -> Path | str:
    """A path, or a URL as it is (`collector.reading.opening.is_url`)."""
    return text if "://" in text else Path(text)


class _Renamed(argparse.Action):
    """An option that was called otherwise: an error that names the new one."""

    def __init__(self, option_strings: Sequence[str], dest: str, new: str) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        self._new = new

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> NoReturn:
        del namespace, values
        parser.error(f"{option_string} is now {self._new}")


def renamed(parser: argparse._ActionsContainer, old: str, new: str) -> None:
    """Refuse the option `old`, which was removed; the message names `new`."""
    parser.add_argument(old, action=_Renamed, new=new)


# Groups ---------------------------------------------------------------------------------------------------


def with_config(parser: argparse.ArgumentParser) -> None:
    """`config`: the configuration file."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML; docs/configuration.md has the keys")


def with_format(
    parser: argparse.ArgumentParser, *others: str, short: str = "one JSON object on stdout, nothing shown meanwhile"
) -> argparse._MutuallyExclusiveGroup:
    """`format`: `TABLE`, `JSON` or one of `others`. Returns the group of options that exclude each other."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--format", choices=(TABLE, JSON, *others), default=TABLE, help="how results are printed (default table)"
    )
    group.add_argument("--json", action="store_const", const=JSON, dest="format", help=f"--format json: {short}")
    return group


@dataclass(frozen=True, slots=True)
class CaptureOptions:
    """How live records are taken."""

    source: str | None
    ring_mib: int | None


def with_capture(parser: argparse.ArgumentParser) -> None:
    """The fields of `CaptureOptions`."""
    with_source(parser)
    parser.add_argument("--ring-mib", type=whole_at_least(1), metavar="N", help="the kernel's ring, MiB per CPU")


def with_source(parser: argparse.ArgumentParser) -> None:
    """`source`: a live source by name."""
    parser.add_argument("--source", choices=SOURCES, help="where live records come from")


def with_lab(
    parser: argparse.ArgumentParser,
    meaning: str = "measure this lab instead of the machine",
    default: str | None = None,
) -> None:
    """`lab`: a test network that is up."""
    parser.add_argument("--lab", default=default, metavar="NAME", help=meaning)


def with_duration(parser: argparse.ArgumentParser) -> None:
    """`duration`, seconds."""
    parser.add_argument("--duration", type=at_least(0.1), metavar="S", help="seconds; without it until Ctrl-C")


def with_store(parser: argparse.ArgumentParser, meaning: str, kind: Callable[[str], Any] = Path) -> None:
    """`store`: the directory of a store."""
    parser.add_argument("--store", type=kind, metavar="DIR", help=meaning)


def with_record(parser: argparse.ArgumentParser) -> None:
    """`record`: a capture file beside what else is done."""
    parser.add_argument("--record", type=Path, metavar="FILE", help="write the raw stream to a capture file as well")


def with_output(parser: argparse.ArgumentParser) -> None:
    """`output` and `force`: the file that the command is there to write."""
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the file to write")
    parser.add_argument("--force", action="store_true", help="overwrite the file")


def with_no_rows(parser: argparse.ArgumentParser) -> None:
    """`no_rows`: windows only."""
    parser.add_argument("--no-rows", action="store_true", help="keep windows only, no row per packet")


@dataclass(frozen=True, slots=True)
class LabShape:
    """What a test network is made of."""

    containers: int
    bridges: int
    same_addresses: bool
    runtime: str


def with_lab_shape(parser: argparse.ArgumentParser, containers: int) -> None:
    """The fields of `LabShape`; `containers` of them unless told."""
    parser.add_argument("--containers", type=whole_at_least(1), default=containers, metavar="N", help="how many")
    parser.add_argument(
        "--bridges", type=whole_at_least(1), default=1, metavar="N", help="containers take turns on them"
    )
    parser.add_argument("--same-addresses", action="store_true", help="the same subnet on each of the bridges")
    with_runtime(parser)


def with_runtime(parser: argparse.ArgumentParser) -> None:
    """`runtime`: what makes the containers of a test network."""
    parser.add_argument("--runtime", choices=RUNTIMES, default=RUNTIMES[0], help="what makes containers")


@dataclass(frozen=True, slots=True)
class Where:
    """A container's network namespace: one of `container`, `netns` and `pid`."""

    container: str | None
    netns: str | None
    pid: int | None
    lab: str | None


def with_where(parser: argparse.ArgumentParser) -> None:
    """The fields of `Where`."""
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--container", metavar="NAME", help="run it in this container's network namespace")
    where.add_argument("--netns", metavar="NAME", help="or in this one, by name in /run/netns or by path")
    where.add_argument("--pid", type=int, metavar="N", help="or in that of a process")
    with_lab(parser, "the container is one of this lab's")


@dataclass(frozen=True, slots=True)
class SinkOptions:
    """The database that results go to as well."""

    influxdb: str | None
    bucket: str | None


def with_sinks(parser: argparse.ArgumentParser) -> None:
    """The fields of `SinkOptions`."""
    parser.add_argument("--influxdb", metavar="URL", help="write to this InfluxDB as well")
    parser.add_argument("--bucket", metavar="NAME", help="bucket, or database of a 1.x server (default mace)")


def with_prometheus(parser: argparse.ArgumentParser) -> None:
    """`prometheus`: the address of an endpoint."""
    parser.add_argument("--prometheus", metavar="HOST:PORT", help="serve /metrics, /healthz and /readyz here")


@dataclass(frozen=True, slots=True)
class BrokerOptions:
    """Who we are at the MQTT broker, and how it is known."""

    username: str | None
    password_file: Path | None
    ca_file: Path | None
    cert_file: Path | None
    key_file: Path | None


def with_broker(parser: argparse.ArgumentParser) -> None:
    """The fields of `BrokerOptions`."""
    parser.add_argument("--username", metavar="NAME", help="at the broker")
    parser.add_argument(
        "--password-file", type=Path, metavar="FILE", help="its first line; else the variable MACE_MQTT_PASSWORD"
    )
    parser.add_argument("--ca-file", type=Path, metavar="FILE", help="certificates that the broker's must lead to, PEM")
    parser.add_argument("--cert-file", type=Path, metavar="FILE", help="our certificate, PEM")
    parser.add_argument("--key-file", type=Path, metavar="FILE", help="its private key, PEM")


@dataclass(frozen=True, slots=True)
class RecordingOptions:
    """Recordings of any format, and what their readers are told."""

    files: tuple[Path | str, ...]
    salvage: bool
    topology: Path | None
    inner: Path | None
    outer: Path | None
    inner_device: str
    outer_device: str
    buffer: str
    clock: str


def with_recordings(parser: argparse.ArgumentParser, meaning: str, kind: Callable[[str], Any] = location) -> None:
    """The fields of `RecordingOptions`; `meaning` is followed by the formats."""
    parser.add_argument(
        "files", nargs="*", type=kind, metavar="FILE", help=f"{meaning}, of any of these: {', '.join(FILE_FORMATS)}"
    )
    parser.add_argument("--salvage", action="store_true", help="skip damaged parts, counting what they held")
    group = parser.add_argument_group("files of other tools")
    with_topology(group)
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


def with_topology(parser: argparse._ActionsContainer) -> None:
    """`topology`: a capture file for a trace that does not know devices."""
    parser.add_argument(
        "--topology", type=Path, metavar="FILE", help="a capture file of the same host, which tells what devices are"
    )
