"""Groups of options that several commands share, and their conversion to dataclasses.

An option's name means the same in every command:

    --container, --netns, --pid     the container, its network namespace by name or path, a process in it
    --device, --protocol, --sample  the packets to record
    --lab                           the test network to measure, instead of the machine
    --seal                          the private key that seals what is written
    --store                         the directory of the store, to read or to write
    -o, --output · --record         the file to write · a capture file to write as well
    --format, --json                how results are printed; --json is short for --format json
    --config                        the configuration file
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar, get_type_hints

from mace.commands.choices import FAR_ENDS, FILE_FORMATS, FLOW_KEYS, RUNTIMES, SOURCES

T = TypeVar("T")

JSON: Final = "json"
TABLE: Final = "table"
CSV: Final = "csv"


def typed(kind: type[T], args: argparse.Namespace) -> T:
    """Return a `kind` whose fields are the parsed arguments; a field that is a dataclass is filled in the same way."""
    values = {}
    for name, of in get_type_hints(kind).items():
        value = typed(of, args) if isinstance(of, type) and is_dataclass(of) else getattr(args, name)
        values[name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


# Values of options ----------------------------------------------------------------------------------------


def at_least(low: float) -> Callable[[str], float]:
    """Return a parser of finite numbers that are at least `low`."""

    def parse(text: str) -> float:
        value = float(text)
        # Written so that nan, which compares false, is refused.
        if not low <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text}: expected at least {low:g}")
        return value

    parse.__name__ = "float"
    return parse


def whole_at_least(low: int) -> Callable[[str], int]:
    """Return a parser of whole numbers that are at least `low`."""

    def parse(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"{text}: expected at least {low}")
        return value

    parse.__name__ = "int"
    return parse


def location(text: str) -> Path | str:
    """Return a URL unchanged (`collector.reading.opening.is_url`), anything else as a path."""
    return text if "://" in text else Path(text)


class _Renamed(argparse.Action):
    """The former name of an option: using it is an error that names the new one."""

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
    """Add `config`, the configuration file."""
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="configuration file (TOML); docs/configuration.md lists the keys"
    )


def with_format(
    parser: argparse.ArgumentParser, *others: str, short: str = "one JSON object on stdout, no progress on stderr"
) -> argparse._MutuallyExclusiveGroup:
    """Add `format`: `TABLE`, `JSON` or one of `others`. Returns the group of mutually exclusive options."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--format", choices=(TABLE, JSON, *others), default=TABLE, help="how results are printed (default table)"
    )
    group.add_argument("--json", action="store_const", const=JSON, dest="format", help=f"--format json: {short}")
    return group


@dataclass(frozen=True, slots=True)
class CaptureOptions:
    """Options of a live capture."""

    source: str | None
    ring_mib: int | None


def with_probes(parser: argparse.ArgumentParser) -> None:
    """Add the option that leaves the probes out."""
    parser.add_argument(
        "--no-probes",
        action="store_true",
        help="send no probes beside the tool; of the host RTT only a lower bound is known then",
    )


def with_capture(parser: argparse.ArgumentParser) -> None:
    """Add the fields of `CaptureOptions`."""
    with_source(parser)
    parser.add_argument(
        "--ring-mib", type=whole_at_least(1), metavar="N", help="size of the kernel's ring, MiB per CPU"
    )


def with_source(parser: argparse.ArgumentParser) -> None:
    """Add `source`, the name of a live source."""
    parser.add_argument("--source", choices=SOURCES, help="the live source of records")


@dataclass(frozen=True, slots=True)
class FilterOptions:
    """Options that choose the packets to record."""

    containers: tuple[str, ...]
    devices: tuple[str, ...]
    protocols: tuple[str, ...]
    sample_shift: int | None


def with_filter(parser: argparse.ArgumentParser) -> None:
    """Add the fields of `FilterOptions`."""
    group = parser.add_argument_group(
        "which packets to record",
        "The sources kmod and bpf choose in the kernel. Without --container and --device they record at every device."
        " --container records the whole path of its packets, and with it other packets at the host's bridges and outer"
        " devices; beside --device it records at the container's own devices and at those that --device names.",
    )
    _with_names(
        group,
        "--container",
        "containers",
        "NAME",
        "packets of these containers (name or id), which may start later",
    )
    _with_names(group, "--device", "devices", "NAME", "packets at these devices of the host")
    _with_names(group, "--protocol", "protocols", "NAME", "packets of these IP protocols (tcp, udp, icmp, or a number)")
    group.add_argument(
        "--sample",
        type=_one_in,
        default=None,
        dest="sample_shift",
        metavar="1/N",
        help="one packet in N, a power of two; the same packets at every device",
    )


def _with_names(group: argparse._ArgumentGroup, option: str, field: str, metavar: str, meaning: str) -> None:
    group.add_argument(option, dest=field, nargs="+", action="extend", default=[], metavar=metavar, help=meaning)


def _one_in(text: str) -> int:
    """Return n for `1/2**n`."""
    given = re.fullmatch(r"1/([0-9]{1,10})", text)
    number = int(given[1]) if given else 0
    if number not in (1 << shift for shift in range(32)):
        raise argparse.ArgumentTypeError(f"{text}: expected 1/N, N a power of two up to {1 << 31}: 1/8, for example")
    return number.bit_length() - 1


def with_lab(
    parser: argparse.ArgumentParser,
    meaning: str = "measure this lab instead of the machine",
    default: str | None = None,
) -> None:
    """Add `lab`, the name of a running test network."""
    parser.add_argument("--lab", default=default, metavar="NAME", help=meaning)


def with_duration(parser: argparse.ArgumentParser) -> None:
    """Add `duration`, in seconds."""
    parser.add_argument("--duration", type=at_least(0.1), metavar="S", help="stop after S seconds (default: on Ctrl-C)")


def with_store(parser: argparse.ArgumentParser, meaning: str, kind: Callable[[str], Any] = Path) -> None:
    """Add `store`, the directory of a store."""
    parser.add_argument("--store", type=kind, metavar="DIR", help=meaning)


def with_record(parser: argparse.ArgumentParser) -> None:
    """Add `record`, a capture file to write in addition to the results."""
    parser.add_argument("--record", type=Path, metavar="FILE", help="also write the raw stream to a capture file")


def with_seal(parser: argparse.ArgumentParser, what: str) -> None:
    """Add `seal`, the key that signs statements of what is written."""
    parser.add_argument(
        "--seal",
        type=Path,
        metavar="KEY",
        help=f"seal {what} with this Ed25519 private key (PEM), for `mace verify-seal`",
    )


def with_output(parser: argparse.ArgumentParser) -> None:
    """Add `output`, the file that the command writes, and `force`, which permits overwriting it."""
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the file to write")
    parser.add_argument("--force", action="store_true", help="overwrite the file if it exists")


def with_no_rows(parser: argparse.ArgumentParser) -> None:
    """Add `no_rows`, which keeps windows and no rows."""
    parser.add_argument("--no-rows", action="store_true", help="keep windows only, no row per packet")


def with_cpus(parser: argparse.ArgumentParser) -> None:
    """Add `cpus`, which stores which CPU worked on packets."""
    parser.add_argument(
        "--cpus", action="store_true", help="also store which CPU worked on packets, for `mace report --cpus`"
    )


@dataclass(frozen=True, slots=True)
class LabShape:
    """Options that describe a test network."""

    containers: int
    bridges: int
    same_addresses: bool
    runtime: str


def with_lab_shape(parser: argparse.ArgumentParser, containers: int) -> None:
    """Add the fields of `LabShape`; `containers` is the default number of containers."""
    parser.add_argument(
        "--containers",
        type=whole_at_least(1),
        default=containers,
        metavar="N",
        help="number of containers (default %(default)s)",
    )
    parser.add_argument(
        "--bridges",
        type=whole_at_least(1),
        default=1,
        metavar="N",
        help="number of bridges, to which containers are attached in turn (default 1)",
    )
    parser.add_argument(
        "--same-addresses",
        action="store_true",
        help="give all bridges the same subnet, so that containers' addresses repeat",
    )
    with_runtime(parser)


def with_runtime(parser: argparse.ArgumentParser) -> None:
    """Add `runtime`, which makes the containers of a test network."""
    parser.add_argument(
        "--runtime", choices=RUNTIMES, default=RUNTIMES[0], help="container runtime of the lab (default %(default)s)"
    )


@dataclass(frozen=True, slots=True)
class FarEndOptions:
    """Options of the far end of a test network."""

    far_end: str
    guest_kernel: Path | None


def with_far_end(parser: argparse.ArgumentParser) -> None:
    """Add the fields of `FarEndOptions`."""
    parser.add_argument(
        "--far-end",
        choices=FAR_ENDS,
        default=FAR_ENDS[0],
        help="the far end: a network namespace, or a virtual machine behind a tap device (default %(default)s)",
    )
    parser.add_argument(
        "--guest-kernel",
        type=Path,
        metavar="FILE",
        help="kernel for --far-end guest (default: the newest in /boot, or one fetched by ./dev test-kernel)",
    )


@dataclass(frozen=True, slots=True)
class Where:
    """Options that select a container's network namespace: one of `container`, `netns` and `pid` is set."""

    container: str | None
    netns: str | None
    pid: int | None
    lab: str | None


def with_where(parser: argparse.ArgumentParser) -> None:
    """Add the fields of `Where`."""
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--container", metavar="NAME", help="run the tool in this container's network namespace")
    where.add_argument(
        "--netns", metavar="NAME", help="run the tool in this network namespace: a name in /run/netns, or a path"
    )
    where.add_argument("--pid", type=int, metavar="N", help="run the tool in this process's network namespace")
    with_lab(parser, "the lab that the container belongs to")


@dataclass(frozen=True, slots=True)
class SinkOptions:
    """Options of a database that also receives the results."""

    influxdb: str | None
    bucket: str | None


def with_sinks(parser: argparse.ArgumentParser) -> None:
    """Add the fields of `SinkOptions`."""
    parser.add_argument("--influxdb", metavar="URL", help="also write results to this InfluxDB")
    parser.add_argument("--bucket", metavar="NAME", help="InfluxDB bucket, or database of a 1.x server (default mace)")


def with_prometheus(parser: argparse.ArgumentParser) -> None:
    """Add `prometheus`, the address of a metrics endpoint."""
    parser.add_argument(
        "--prometheus", metavar="HOST:PORT", help="serve /metrics, /healthz and /readyz at this address"
    )


@dataclass(frozen=True, slots=True)
class ReaderOptions:
    """Options that say who may read a page."""

    token_file: Path | None
    allow_host: tuple[str, ...]


def with_readers(parser: argparse.ArgumentParser) -> None:
    """Add the fields of `ReaderOptions`."""
    parser.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="file whose first line is the token that readers of the page need (default: the variable"
        " MACE_SERVE_TOKEN); required on an address that other machines reach",
    )
    parser.add_argument(
        "--allow-host",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="names, besides this machine's and IP addresses, under which the page is opened",
    )


@dataclass(frozen=True, slots=True)
class BrokerOptions:
    """Credentials for the MQTT broker, and the certificates that verify it."""

    username: str | None
    password_file: Path | None
    ca_file: Path | None
    cert_file: Path | None
    key_file: Path | None


def with_broker(parser: argparse.ArgumentParser) -> None:
    """Add the fields of `BrokerOptions`."""
    parser.add_argument("--username", metavar="NAME", help="user name at the broker")
    parser.add_argument(
        "--password-file",
        type=Path,
        metavar="FILE",
        help="file whose first line is the password (default: the variable MACE_MQTT_PASSWORD)",
    )
    parser.add_argument(
        "--ca-file", type=Path, metavar="FILE", help="CA certificates that verify the broker's certificate (PEM)"
    )
    parser.add_argument("--cert-file", type=Path, metavar="FILE", help="client certificate (PEM)")
    parser.add_argument("--key-file", type=Path, metavar="FILE", help="private key of the client certificate (PEM)")


@dataclass(frozen=True, slots=True)
class PacketOptions:
    """Options that choose the packets of recordings to export."""

    packet: tuple[int, ...] | None
    worst: int | None
    flow: str | None
    between: str | None


def with_packets(parser: argparse.ArgumentParser) -> None:
    """Add the fields of `PacketOptions`."""
    parser.add_argument(
        "--packet",
        action="append",
        type=_packet_id,
        metavar="ID",
        help="export this packet and its reply; may be repeated",
    )
    parser.add_argument(
        "--worst", type=int, metavar="N", help="export the N packets with the largest overhead, and their replies"
    )
    parser.add_argument(
        "--flow", metavar="KEY=VALUE,...", help=f"export packets that match all pairs; keys: {', '.join(FLOW_KEYS)}"
    )
    parser.add_argument(
        "--between",
        metavar="START,END",
        help="export packets that begin in this time: 2025-06-15T15:04:05.25 (UTC), or +1.5s after the first record",
    )


def _packet_id(text: str) -> int:
    """Parse a packet's number: decimal as `mace report` prints it, or hexadecimal as in an export."""
    value = int(text, 0)
    if not 0 < value < 1 << 64:
        raise argparse.ArgumentTypeError(f"{text}: expected a packet's number, as `mace report` prints it")
    return value


@dataclass(frozen=True, slots=True)
class RecordingOptions:
    """Recordings of any format, and the options of their readers."""

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
    """Add the fields of `RecordingOptions`; the help of `files` is `meaning`, followed by the formats."""
    parser.add_argument(
        "files", nargs="*", type=kind, metavar="FILE", help=f"{meaning}; formats: {', '.join(FILE_FORMATS)}"
    )
    parser.add_argument("--salvage", action="store_true", help="skip damaged parts and count the records they held")
    group = parser.add_argument_group("files of other tools")
    with_topology(group)
    group.add_argument("--inner", type=Path, metavar="FILE", help="a packet capture from the container's device")
    group.add_argument(
        "--outer", type=Path, metavar="FILE", help="a packet capture from the host's device, of the same time"
    )
    for side in ("inner", "outer"):
        group.add_argument(
            f"--{side}-device",
            default="",
            metavar="NAME",
            help=f"which device to read of an {side} capture with several (`tcpdump -i any`): interface index or name",
        )
    group.add_argument(
        "--buffer", default="", metavar="NAME", help="the trace instance to read; `top` is the top-level one"
    )
    group.add_argument(
        "--clock", default="", metavar="NAME", help="the trace clock, for a file that does not record it"
    )


def with_topology(parser: argparse._ActionsContainer) -> None:
    """Add `topology`, a capture file that describes the devices of a trace without such a description."""
    parser.add_argument(
        "--topology",
        type=Path,
        metavar="FILE",
        help="a capture file of the same host, which describes the devices of a trace that does not",
    )
