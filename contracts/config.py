"""Configuration: a TOML file becomes frozen dataclasses; each key has a meaning and bounds.

    [capture]
    outer = ["eth1"]

    [store]
    path = "/var/lib/mace"

    [sinks.influxdb]
    url = "http://db.example:8086"

Every error names the file, the key, the value found, the value expected, and the nearest known key. Options of the
command line change the same dataclasses.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Final, TypeVar, get_type_hints
from urllib.parse import SplitResult, urlsplit

from contracts.errors import ConfigError, nearest
from contracts.sources import LIVE

T = TypeVar("T")


SOURCES: Final = ("auto", *LIVE)
"""Values of `capture.source`: the live sources, and `auto`."""


def _key(
    default: T, meaning: str, *, low: float | None = None, high: float | None = None, choices: tuple[str, ...] = ()
) -> T:
    metadata = {"meaning": meaning, "low": low, "high": high, "choices": choices}
    made: T = field(default=default, metadata=metadata)
    return made


@dataclass(frozen=True, slots=True)
class CaptureConfig:
    """`[capture]`: where records come from."""

    source: str = _key("auto", "Source of live records; `auto` chooses the best that can run here.", choices=SOURCES)
    ring_mib: int = _key(8, "Memory of the kernel's ring, MiB per CPU.", low=1, high=4096)
    poll_ms: int = _key(50, "Interval at which a ring that fills is read, ms.", low=1, high=1000)
    gather_ms: int = _key(
        500,
        "Longest stay of records in a ring that neither fills nor sees a device change, ms.",
        low=1,
        high=1000,
    )
    hold_back_ms: int = _key(
        50, "How long records are held back so that a device's notification can arrive first, ms.", low=0, high=1000
    )
    host_netns: str = _key(
        "", "Network namespace that counts as the host: a name in /run/netns or a path; empty: that of process 1."
    )
    outer: tuple[str, ...] = _key((), "The host's devices towards the network; empty: those of its default routes.")
    remote_netns: tuple[str, ...] = _key((), "Namespaces that are the far end of a test network, not containers.")
    container_sockets: tuple[str, ...] = _key((), "Further Docker or Podman API sockets to query for container names.")
    pod_logs: str = _key(
        "/var/log/pods",
        "The kubelet's folder of logs, whose entries name Kubernetes pods; empty: pods are called by their UIDs.",
    )
    cri_sockets: tuple[str, ...] = _key(
        (),
        "Further CRI sockets to query for the names of pods that `pod_logs` does not have; needs the extra `cri`.",
    )
    sample_shift: int = _key(
        0,
        "Record one packet in 2 to the power of this, the same packets at every hook; not `ftrace`.",
        low=0,
        high=31,
    )
    containers: tuple[str, ...] = _key(
        (),
        "Record only packets of these containers (names or ids), which may start later: at their devices, and unless"
        " `devices` names devices, at the host's bridges and outer devices on the way. `ftrace` records everything and"
        " leaves out other containers' delays.",
    )
    netns: tuple[str, ...] = _key(
        (), "Record only packets in these namespaces (names in /run/netns or paths, at most 16); not `ftrace`."
    )
    devices: tuple[str, ...] = _key(
        (),
        "Record only packets at these devices of the host's namespace (at most 16). With `containers` or `netns`: at"
        " these devices too.",
    )
    protocols: tuple[str, ...] = _key(
        (), "Record only these IP protocols, by name or number (`udp`, `17`); not `ftrace`."
    )


@dataclass(frozen=True, slots=True)
class RunConfig:
    """`[run]`: the name under which a live measurement appears."""

    host: str = _key(
        "", "Name of this host in rows, metrics and topics, unique among hosts; empty: the machine's host name."
    )


@dataclass(frozen=True, slots=True)
class CorrelateConfig:
    """`[correlate]`: how records become delays."""

    timeout_ms: int = _key(
        500, "A packet's life ends when its next record does not follow within this time, ms.", low=1, high=60_000
    )
    rows: bool = _key(True, "Whether to keep a row per packet and segment, not only windows.")
    cpus: bool = _key(False, "Whether to store which CPU worked on packets, for `mace report --cpus`.")
    softirqs: bool = _key(
        False, "With `cpus`: whether a live run also stores how long receive softirqs wait, by ftrace; needs root."
    )
    waiting: bool = _key(
        False,
        "Whether a live run also follows the tasks of containers, by ftrace, and counts how long the reader of a packet"
        " waited for a CPU; needs root.",
    )
    open_records: int = _key(
        4_194_304, "Largest number of records of unfinished packets kept in memory.", low=1000, high=1_000_000_000
    )


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """`[store]`: the embedded store."""

    path: str = _key("mace-store", "Directory of the store.")
    flush_interval_s: float = _key(
        1.0, "Longest time from a row's arrival until it is in the store, s.", low=0.05, high=3600
    )
    sync: bool = _key(True, "Whether each segment is written through to the disk (fsync) before it counts as stored.")
    max_age_days: float = _key(0.0, "Remove rows older than this, days; 0: keep all.", low=0)
    max_size_gib: float = _key(0.0, "Remove the oldest rows when the store is larger, GiB; 0: no limit.", low=0)

    @property
    def max_age_s(self) -> float | None:
        """`max_age_days` in seconds; None: keep for ever."""
        return self.max_age_days * 86_400 or None

    @property
    def max_bytes(self) -> int | None:
        """`max_size_gib` in bytes; None: no limit."""
        return int(self.max_size_gib * 2**30) or None


@dataclass(frozen=True, slots=True)
class RunningConfig:
    """Keys that every sink with a server has: buffering, sending, retrying and spooling (`storage.running_sink`)."""

    flush_interval_s: float = _key(1.0, "Longest time from a row's arrival until it is sent, s.", low=0.05, high=3600)
    batch_rows: int = _key(20_000, "Largest number of rows in a request.", low=1, high=1_000_000)
    buffer_rows: int = _key(
        2_000_000, "Rows that may wait in memory to be encoded; the newest beyond this are dropped.", low=1000
    )
    timeout_s: float = _key(30.0, "A request fails when it takes longer than this, s.", low=0.1, high=3600)
    retry_max_s: float = _key(
        30.0, "A failed request is repeated after 0.5 s, 1 s, 2 s, ..., at most after this, s.", low=0.1, high=3600
    )
    close_s: float = _key(
        5.0, "How long the server may take at the end; undelivered rows stay in the spool, s.", low=0, high=3600
    )
    spool: str = _key(
        "mace-spool", "Directory for undelivered rows; the sink uses a folder of its own name in it; empty: no spool."
    )
    spool_mib: int = _key(1024, "Size of the spool, MiB; when it is full, the oldest rows are dropped.", low=1)
    spool_sync: bool = _key(False, "Whether spooled rows are written through to the disk at once (fsync).")
    memory_mib: int = _key(64, "Memory for encoded rows while the spool accepts none, MiB.", low=1)


@dataclass(frozen=True, slots=True)
class InfluxConfig(RunningConfig):
    """`[sinks.influxdb]`: InfluxDB, or another server with its write API."""

    url: str = _key("", "Address of the server, `http://HOST:8086`; empty: no such sink.")
    bucket: str = _key("mace", "Bucket; for InfluxDB 1.x the database, or DATABASE/POLICY.")
    org: str = _key("", "Organization; unused by InfluxDB 1.x.")
    token: str = _key("", "Token; for InfluxDB 1.x USER:PASSWORD.")
    token_file: str = _key(
        "", "File with the token; without `token` and `token_file`, the environment variable INFLUXDB_V2_TOKEN."
    )
    ca_file: str = _key("", "Certificates to trust, PEM; empty: the system's.")
    api: str = _key(
        "auto", "Write API to use; `auto` uses `v1` if the server has no `v2`.", choices=("auto", "v2", "v1")
    )
    senders: int = _key(2, "Requests that may be under way at once.", low=1, high=64)
    sample: int = _key(1, "Write rows of one packet in this many; 0: windows only.", low=0)
    series_budget: int = _key(
        10_000, "Series that the sink may begin; rows of further series are refused and counted.", low=1
    )


@dataclass(frozen=True, slots=True)
class PrometheusConfig:
    """`[sinks.prometheus]`: an endpoint for Prometheus and for orchestrators."""

    listen: str = _key("", "ADDRESS:PORT for `/metrics`, `/healthz` and `/readyz`; empty: no such sink.")
    stalled_s: float = _key(
        15.0,
        "`/readyz` fails after this long without results, `/healthz` after this long without a turn of the event"
        " loop, s.",
        low=1,
    )
    gone_s: float = _key(120.0, "How long `/metrics` keeps the series of a container or device that is gone, s.", low=1)


@dataclass(frozen=True, slots=True)
class MqttRowsConfig(RunningConfig):
    """`[sinks.mqtt]`: publishes results to the broker of `[mqtt]` for any subscriber."""

    publish: str = _key(
        "",
        "What to publish: `windows`, or `delays` for windows and a row per packet; empty: nothing.",
        choices=("", "windows", "delays"),
    )


@dataclass(frozen=True, slots=True)
class SinksConfig:
    """`[sinks.NAME]`: sinks besides the embedded store. Each key is the name of a sink in `storage.SINKS`."""

    influxdb: InfluxConfig = InfluxConfig()
    prometheus: PrometheusConfig = PrometheusConfig()
    mqtt: MqttRowsConfig = MqttRowsConfig()


@dataclass(frozen=True, slots=True)
class MqttConfig:
    """`[mqtt]`: the broker that hosts publish to and the ingest subscribes at, or several brokers."""

    broker: str = _key(
        "",
        "`mqtt://HOST[:PORT]`, or `mqtts://HOST[:PORT]` for TLS. Of several, separated by commas, a host's name chooses"
        " one; hosts and ingests need the same list.",
    )
    username: str = _key("", "User name at the broker; empty: the certificate's, or none.")
    password_file: str = _key(
        "", "File whose first line is the password; empty: the environment variable `MACE_MQTT_PASSWORD`, if set."
    )
    ca_file: str = _key("", "Authorities that may sign the broker's certificate (PEM); empty: the system's.")
    cert_file: str = _key("", "MACE's own certificate (PEM), if the broker requires client certificates.")
    key_file: str = _key("", "Private key of the certificate in `cert_file` (PEM).")


@dataclass(frozen=True, slots=True)
class PublishConfig:
    """`[publish]`: publishing the raw stream to a broker."""

    interval_s: float = _key(1.0, "Longest time from a record's capture until it is published, s.", low=0.05, high=60)
    spool: str = _key(
        "mace-spool", "Directory for records that have not arrived at the ingest yet; they are in its folder `publish`."
    )
    spool_mib: int = _key(
        1024, "Size of the spool, MiB; when it is full, the oldest records are discarded and counted.", low=1
    )
    drain_s: float = _key(
        5.0, "How long to wait at the end of a run until all records have arrived, s.", low=0, high=3600
    )


@dataclass(frozen=True, slots=True)
class IngestConfig:
    """`[ingest]`: reading many hosts' streams from a broker into one store."""

    open_records: int = _key(
        262_144,
        "Largest number of records of unfinished packets kept in memory, per host.",
        low=1000,
        high=1_000_000_000,
    )
    queue_messages: int = _key(
        10_000,
        "Messages that may wait to be read, at most an eighth of them from one host; further ones are requested again.",
        low=100,
    )
    hosts: int = _key(10_000, "Largest number of hosts; messages of further hosts are refused.", low=1, high=1_000_000)
    runs: int = _key(
        10_000, "Largest number of runs per host in the store; further runs are refused. Each `mace run` is one.", low=1
    )


@dataclass(frozen=True, slots=True)
class Config:
    """The whole configuration, one field per table."""

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
"""Largest configuration file. A file with every key and its meaning takes a tenth of this."""
_MOST_PARTS: Final = 32
"""Largest number of parts in a dotted key; MACE's keys have three."""
_STRING_OR_COMMENT: Final = re.compile(
    r"""#[^\n]*"""
    r"""|"{3}(?:[^"\\]|\\[\s\S]|"(?!""))*+"{0,3}|"(?:[^"\\\n]|\\.)*+"?"""
    r"""|'{3}(?:[^']|'(?!''))*+'{0,3}|'[^'\n]*+'?"""
)
"""A comment or a string. An unterminated string matches to where it would have to end, so that the scan visits each
character once."""
_BETWEEN_KEYS: Final = re.compile(r"[=,{}\[\]\n]")
"""Characters that can precede or follow a key or a bare value."""


def load(path: Path | str | None) -> Config:
    """Return the configuration in a file, or the defaults for None; raises `ConfigError`."""
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
    """Raise `ConfigError` for a key of many parts: tomllib's time for a key grows with the square of its parts."""
    bare = _STRING_OR_COMMENT.sub(lambda found: "" if found[0].startswith("#") else "_", text)
    for piece in _BETWEEN_KEYS.split(bare):
        if (parts := piece.count(".") + 1) > _MOST_PARTS:
            start = piece.strip()[:20]
            raise ConfigError(f"{path}: a key of {parts:,} parts ({start}...), at most {_MOST_PARTS} are read")


def split_url(where: str, url: str) -> SplitResult:
    """Split a URL; raises `ConfigError` for a malformed URL or a host name that `check_host` refuses.

    `where` names the key or option in the error.
    """
    try:
        parts = urlsplit(url)
        check_host(where, parts.hostname or "")
        _ = parts.port
    except ValueError as error:
        raise ConfigError(f"{where} {url!r}: {error}") from None
    return parts


def check_host(where: str, host: str) -> None:
    """Raise `ConfigError` for a host name that no resolver accepts: one of its labels is empty or too long."""
    try:
        host.encode("idna")
    except UnicodeError as error:
        raise ConfigError(f"{where}: {host!r} is no host name: {error.__cause__ or error}") from error


def tables(kind: type[Any] = Config, within: str = "") -> dict[str, type[Any]]:
    """Return full name (`capture`, `sinks.influxdb`) -> dataclass of every table with keys, in declaration order."""
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
        # Floats end near 10**308. Every bound here is far below 10**300, so that clipping changes no verdict.
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
    """Return the value, or raise `ConfigError` if it contains NUL: the kernel accepts no path or name with NUL."""
    if "\0" in value:
        raise ConfigError(f"{where} = {_shown(value)}, expected no NUL in it")
    return value


_LARGEST: Final = 1 << 53
"""Upper bound of a number whose key declares none; up to here a float holds every integer exactly."""
_NAMES: Final = {"str": "a string", "int": "a whole number", "float": "a number", "bool": "true or false"}


def _range(low: float | None, high: float | None) -> str:
    return f"at least {low:g}" if high is None else f"{low:g} to {high:g}"


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python prints no integer of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 40 else text[:37] + "..."
