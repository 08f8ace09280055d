"""Configuration: TOML -> frozen dataclasses, each key with its meaning and its bounds.

    [capture]
    outer = ["eth1"]

    [store]
    path = "/var/lib/mace"

    [sinks.influxdb]
    url = "http://db.example:8086"

Every error names the file, the key, what was found and what was expected, and the nearest known key. The same
dataclasses are what the command line's options change.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Final, TypeVar, get_type_hints
from urllib.parse import SplitResult, urlsplit

from contracts.errors import ConfigError, nearest

T = TypeVar("T")


SOURCES: Final = ("auto", "kmod", "bpf", "ftrace")
"""Live sources that can be asked for."""


def _key(
    default: T, meaning: str, *, low: float | None = None, high: float | None = None, choices: tuple[str, ...] = ()
) -> T:
    metadata = {"meaning": meaning, "low": low, "high": high, "choices": choices}
    made: T = field(default=default, metadata=metadata)
    return made


@dataclass(frozen=True, slots=True)
class CaptureConfig:
    """`[capture]`: where records come from."""

    source: str = _key("auto", "Source of live records; `auto` takes the best that can run.", choices=SOURCES)
    ring_mib: int = _key(8, "Memory of the kernel's ring, MiB per CPU.", low=1, high=4096)
    poll_ms: int = _key(
        50, "A ring of ftrace that fills is read this often, any other in any case, ms.", low=1, high=1000
    )
    gather_ms: int = _key(
        500, "How long records stay in ftrace's ring if it does not fill and no device changes, ms.", low=1, high=1000
    )
    hold_back_ms: int = _key(
        50, "How long records are held, ms, so that news of a device can still come before them.", low=0, high=1000
    )
    host_netns: str = _key(
        "", "Network namespace that counts as the host: a name in /run/netns or a path; empty: of process 1."
    )
    outer: tuple[str, ...] = _key((), "The host's devices towards the network; empty: those of its default routes.")
    remote_netns: tuple[str, ...] = _key((), "Namespaces that are the far end of a test network, not containers.")
    container_sockets: tuple[str, ...] = _key((), "More Docker or Podman API sockets to ask for container names.")
    sample_shift: int = _key(
        0,
        "Of all packets one in 2 to the power of this, the same ones at every hook; not `ftrace`.",
        low=0,
        high=31,
    )
    netns: tuple[str, ...] = _key(
        (), "Only what happens in these namespaces (names in /run/netns or paths, at most 16); not `ftrace`."
    )
    devices: tuple[str, ...] = _key(
        (), "Only what happens at these devices of the own namespace (at most 16); not `ftrace`."
    )
    protocols: tuple[str, ...] = _key((), "Only these IP protocols, by name or number (`udp`, `17`); not `ftrace`.")


@dataclass(frozen=True, slots=True)
class RunConfig:
    """`[run]`: what a live measurement is called."""

    host: str = _key(
        "", "Name of this host in rows, metrics and topics, unlike any other host's; empty: that of the machine."
    )


@dataclass(frozen=True, slots=True)
class CorrelateConfig:
    """`[correlate]`: how records become delays."""

    timeout_ms: int = _key(
        500, "A packet's next record comes within this, ms, or its life is over.", low=1, high=60_000
    )
    rows: bool = _key(True, "Whether to keep a row per packet and segment, not only windows.")
    open_records: int = _key(
        4_194_304, "Records of unfinished packets that are kept at most.", low=1000, high=1_000_000_000
    )


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """`[store]`: the embedded store."""

    path: str = _key("mace-store", "Directory of the store.")
    flush_interval_s: float = _key(
        1.0, "Rows are in the store at most this long after they came, s.", low=0.05, high=3600
    )
    sync: bool = _key(True, "Whether each segment is brought to the disk (fsync) before it counts as stored.")
    max_age_days: float = _key(0.0, "Remove what is older, days; 0: keep for ever.", low=0)
    max_size_gib: float = _key(0.0, "Remove the oldest when the store is larger, GiB; 0: no limit.", low=0)


@dataclass(frozen=True, slots=True)
class RunningConfig:
    """What every sink with a server has: how it buffers, sends, tries again and spools (`storage.running_sink`)."""

    flush_interval_s: float = _key(
        1.0, "Rows are on their way at most this long after they came, s.", low=0.05, high=3600
    )
    batch_rows: int = _key(20_000, "Rows in a request, at most.", low=1, high=1_000_000)
    buffer_rows: int = _key(
        2_000_000, "Rows that may wait in memory to be encoded; beyond it the newest are dropped.", low=1000
    )
    timeout_s: float = _key(30.0, "A request that takes longer has failed, s.", low=0.1, high=3600)
    retry_max_s: float = _key(
        30.0, "Failed requests are made again after 0.5 s, 1 s, ... at most this.", low=0.1, high=3600
    )
    close_s: float = _key(
        5.0, "At the end the server has this long to answer; what is left stays in the spool, s.", low=0, high=3600
    )
    spool: str = _key(
        "mace-spool", "Directory in which the sink keeps what is not delivered, in a folder of its name; empty: none."
    )
    spool_mib: int = _key(1024, "Size of the spool; when it is full the oldest is dropped, MiB.", low=1)
    spool_sync: bool = _key(False, "Whether what is spooled is brought to the disk at once (fsync).")
    memory_mib: int = _key(64, "Memory for encoded rows where the spool takes none, MiB.", low=1)


@dataclass(frozen=True, slots=True)
class InfluxConfig(RunningConfig):
    """`[sinks.influxdb]`: InfluxDB, or what speaks its write API."""

    url: str = _key("", "Address of the server, `http://HOST:8086`; empty: no such sink.")
    bucket: str = _key("mace", "Bucket; a 1.x server's database, or DATABASE/POLICY.")
    org: str = _key("", "Organization; not for 1.x.")
    token: str = _key("", "Token; for 1.x USER:PASSWORD.")
    token_file: str = _key("", "File with the token; without either the environment variable INFLUXDB_V2_TOKEN.")
    ca_file: str = _key("", "Certificates to trust, PEM; empty: the system's.")
    api: str = _key(
        "auto", "Which API to write to; `auto` takes `v1` if the server has no `v2`.", choices=("auto", "v2", "v1")
    )
    senders: int = _key(2, "Requests that are under way at once.", low=1, high=64)
    sample: int = _key(1, "Of all packets one in this many gets rows of its own; 0: none, windows only.", low=0)
    series_budget: int = _key(10_000, "Series that may be begun; rows beyond are refused and counted.", low=1)


@dataclass(frozen=True, slots=True)
class PrometheusConfig:
    """`[sinks.prometheus]`: an endpoint for Prometheus and for orchestrators."""

    listen: str = _key("", "ADDRESS:PORT for `/metrics`, `/healthz` and `/readyz`; empty: no such sink.")
    stalled_s: float = _key(
        15.0,
        "Without results for so long it is no longer ready, and without a turn of its loop no longer alive, s.",
        low=1,
    )
    gone_s: float = _key(
        120.0, "Series of a container or device that is gone are shown so long after, s; then they are dropped.", low=1
    )


@dataclass(frozen=True, slots=True)
class MqttRowsConfig(RunningConfig):
    """`[sinks.mqtt]`: results to the broker of `[mqtt]`, for whoever subscribes."""

    publish: str = _key(
        "", "What to publish: `windows`, or `delays` for those and a row per packet.", choices=("", "windows", "delays")
    )


@dataclass(frozen=True, slots=True)
class SinksConfig:
    """`[sinks.NAME]`: sinks besides the embedded store. Each key is the name of one in `storage.SINKS`."""

    influxdb: InfluxConfig = InfluxConfig()
    prometheus: PrometheusConfig = PrometheusConfig()
    mqtt: MqttRowsConfig = MqttRowsConfig()


@dataclass(frozen=True, slots=True)
class MqttConfig:
    """`[mqtt]`: the broker, for publishing and for the ingest alike."""

    broker: str = _key("", "`mqtt://HOST[:PORT]`, or `mqtts://HOST[:PORT]` for TLS.")
    username: str = _key("", "User name at the broker; empty: the certificate's, or none.")
    password_file: str = _key(
        "", "File whose first line is the password; empty: the environment's `MACE_MQTT_PASSWORD`, if set."
    )
    ca_file: str = _key("", "Certificates that the broker's must lead to (PEM); empty: the system's.")
    cert_file: str = _key("", "Our own certificate (PEM), where the broker asks for one.")
    key_file: str = _key("", "Its private key (PEM).")


@dataclass(frozen=True, slots=True)
class PublishConfig:
    """`[publish]`: the raw stream to a broker."""

    interval_s: float = _key(1.0, "Records travel at most this long after they came, s.", low=0.05, high=60)
    spool: str = _key("mace-spool", "Directory in which what has not arrived yet is kept, in a folder `publish`.")
    spool_mib: int = _key(1024, "Size of it, MiB; beyond, the oldest records are discarded and counted.", low=1)
    drain_s: float = _key(5.0, "At the end of a run, how long to wait until all has arrived, s.", low=0, high=3600)


@dataclass(frozen=True, slots=True)
class IngestConfig:
    """`[ingest]`: many hosts' streams from a broker into one store."""

    open_records: int = _key(
        262_144, "Records of unfinished packets that are kept at most, per host.", low=1000, high=1_000_000_000
    )
    queue_messages: int = _key(
        10_000,
        "Messages that wait to be worked on at most, an eighth of them of one host; others are asked for again.",
        low=100,
    )
    hosts: int = _key(10_000, "Hosts at most; messages of further ones are refused.", low=1, high=1_000_000)
    runs: int = _key(
        10_000, "Runs of a host in the store at most; further ones are refused. Each `mace run` is one.", low=1
    )


@dataclass(frozen=True, slots=True)
class Config:
    """All of it."""

    capture: CaptureConfig = CaptureConfig()
    run: RunConfig = RunConfig()
    correlate: CorrelateConfig = CorrelateConfig()
    store: StoreConfig = StoreConfig()
    sinks: SinksConfig = SinksConfig()
    mqtt: MqttConfig = MqttConfig()
    publish: PublishConfig = PublishConfig()
    ingest: IngestConfig = IngestConfig()


_TYPES: Final = {"str": str, "int": int, "float": float, "bool": bool}


_MOST_BYTES: Final = 1 << 18
"""Of a configuration file. One with every key that there is and what it is for has a tenth of that."""
_MOST_PARTS: Final = 32
"""Of a dotted key; ours have three."""
_STRING_OR_COMMENT: Final = re.compile(
    r"""#[^\n]*"""
    r"""|"{3}(?:[^"\\]|\\[\s\S]|"(?!""))*+"{0,3}|"(?:[^"\\\n]|\\.)*+"?"""
    r"""|'{3}(?:[^']|'(?!''))*+'{0,3}|'[^'\n]*+'?"""
)
"""To its end, or where it has none to where it would have to be: each character is looked at once."""
_BETWEEN_KEYS: Final = re.compile(r"[=,{}\[\]\n]")
"""What stands before or behind a key or a bare value."""


def load(path: Path | str | None) -> Config:
    """The configuration in a file; the defaults for None. Raises `ConfigError`."""
    if path is None:
        return Config()
    try:
        with Path(path).open("rb") as file:
            raw = file.read(_MOST_BYTES + 1)
        if len(raw) > _MOST_BYTES:
            raise ConfigError(f"{path}: more than {_MOST_BYTES:,} bytes, the limit of a configuration")
        text = raw.decode().removeprefix("\ufeff")
        _check_depth(path, text)
        return _tables(str(path), "", Config, tomllib.loads(text))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not TOML: byte {error.start} is not UTF-8") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: lists or tables one inside the other, too deep to be read") from error
    except ValueError as error:
        # Python reads no number of more than 4,300 digits (sys.set_int_max_str_digits), and has no year 0.
        raise ConfigError(f"{path}: {str(error).partition(';')[0]}") from error


def _check_depth(path: Path | str, text: str) -> None:
    """Raise `ConfigError` for a key of many parts: the time that tomllib takes for it grows with their square."""
    bare = _STRING_OR_COMMENT.sub(lambda found: "" if found[0].startswith("#") else "_", text)
    for piece in _BETWEEN_KEYS.split(bare):
        if (parts := piece.count(".") + 1) > _MOST_PARTS:
            start = piece.strip()[:20]
            raise ConfigError(f"{path}: a key of {parts:,} parts ({start}...), at most {_MOST_PARTS} are read")


def split_url(where: str, url: str) -> SplitResult:
    """The parts of an address. Raises `ConfigError` for what is none, or has a host as in `check_host`."""
    try:
        parts = urlsplit(url)
        check_host(where, parts.hostname or "")
        _ = parts.port
    except ValueError as error:
        raise ConfigError(f"{where} {url!r}: {error}") from None
    return parts


def check_host(where: str, host: str) -> None:
    """Raise `ConfigError` for a host name that no resolver can be asked for: a label that is empty or too long."""
    try:
        host.encode("idna")
    except UnicodeError as error:
        raise ConfigError(f"{where}: {host!r} is no host name: {error.__cause__ or error}") from error


def tables(kind: type[Any] = Config, within: str = "") -> dict[str, type[Any]]:
    """Every table that holds keys by its full name (`capture`, `sinks.influxdb`), in the order of the dataclasses."""
    found: dict[str, type[Any]] = {}
    for name, of in get_type_hints(kind).items():
        found |= tables(of, f"{within}{name}.") if _holds_tables(of) else {within + name: of}
    return found


def _holds_tables(kind: type[Any]) -> bool:
    return all(is_dataclass(of) for of in get_type_hints(kind).values())


def _tables(path: str, within: str, kind: type[T], given: dict[str, Any]) -> T:
    known = get_type_hints(kind)
    parts = {}
    for name, value in given.items():
        full = within + name
        if name not in known:
            names = ", ".join(within + other for other in known)
            raise ConfigError(f"{path}: no such table [{full}]{nearest(name, known)}; known: {names}")
        if not isinstance(value, dict):
            raise ConfigError(f"{path}: {full} is {_shown(value)}, expected a table [{full}]")
        if _holds_tables(known[name]):
            parts[name] = _tables(path, f"{full}.", known[name], value)
        else:
            parts[name] = _table(path, full, known[name], value)
    return kind(**parts)


def _table(path: str, table: str, kind: type[T], given: dict[str, Any]) -> T:
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    values = {}
    for name, value in given.items():
        if name not in known:
            hint = nearest(name, known)
            raise ConfigError(f"{path}: [{table}] has no key {name!r}{hint}; known: {', '.join(known)}")
        values[name] = _value(f"{path}: [{table}] {name}", str(known[name].type), value, known[name].metadata)
    return kind(**values)


def _value(where: str, kind: str, value: Any, bounds: Any) -> Any:
    if kind == "tuple[str, ...]":
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise ConfigError(f"{where} = {_shown(value)}, expected a list of strings")
        return tuple(_without_nul(where, v) for v in value)
    expected = _TYPES[kind]
    if expected is float and type(value) is int:
        # A float ends at 10**308: what is beyond is beyond any bound of ours as well.
        value = float(max(min(value, 10**300), -(10**300)))
    if type(value) is not expected:
        raise ConfigError(f"{where} = {_shown(value)}, expected {_NAMES[kind]}")
    if isinstance(value, str):
        _without_nul(where, value)
    if bounds["choices"] and value not in bounds["choices"]:
        hint = nearest(str(value), bounds["choices"])
        raise ConfigError(f"{where} = {value!r}, expected one of {', '.join(bounds['choices'])}{hint}")
    low, high = bounds["low"], bounds["high"]
    if high is None and isinstance(value, int | float) and value > _LARGEST:
        high = _LARGEST
    # Written so that nan, which compares false, is refused.
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        raise ConfigError(f"{where} = {_shown(value)}, expected {_range(low, high)}")
    return value


def _without_nul(where: str, value: str) -> str:
    """The value: a path, name or address, none of which the kernel takes with a NUL in it."""
    if "\0" in value:
        raise ConfigError(f"{where} = {_shown(value)}, expected no NUL in it")
    return value


_LARGEST: Final = 1 << 53
"""What a number without a bound of its own may be: as a float it is still exact."""
_NAMES: Final = {"str": "a string", "int": "a whole number", "float": "a number", "bool": "true or false"}


def _range(low: float | None, high: float | None) -> str:
    return f"at least {low:g}" if high is None else f"{low:g} to {high:g}"


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # more digits than Python writes
        return "a number of thousands of digits"
    return text if len(text) <= 40 else text[:37] + "..."
