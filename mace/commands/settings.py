"""Makes a configuration, a session, a lab or recordings from the options of a command."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from contracts import config
from contracts.config import CaptureConfig, Config, SinksConfig
from contracts.errors import UsageError
from mace import lab
from mace.commands.console import Console
from mace.commands.options import (
    JSON,
    BrokerOptions,
    CaptureOptions,
    FarEndOptions,
    FilterOptions,
    LabShape,
    RecordingOptions,
    SinkOptions,
    Where,
)
from mace.live.runs import Until
from mace.live.session import Session
from mace.shown import tables
from storage.capture import CaptureSink

if TYPE_CHECKING:
    from collector.files import FileOptions, LocalRecording
    from contracts.figures import Summary
    from mace.replaying.part import RecordedFile
    from storage.sealing.keys import SealKey


def configured(
    file: Path | None,
    *,
    capture: CaptureOptions | None = None,
    chosen: FilterOptions | None = None,
    store: Path | str | None = None,
    no_rows: bool = False,
    cpus: bool = False,
    softirqs: bool = False,
    waiting: bool = False,
    sinks: SinkOptions | None = None,
    prometheus: str | None = None,
    place: lab.Lab | None = None,
) -> Config:
    """Return the file's configuration, overridden by the options and then by what a lab needs. Raises `ConfigError`."""
    settings = config.load(file)
    taken = settings.capture
    if capture is not None and capture.source:
        taken = replace(taken, source=capture.source)
    if capture is not None and capture.ring_mib:
        taken = replace(taken, ring_mib=capture.ring_mib)
    if chosen is not None:
        taken = _filtered(taken, chosen)
    if place is not None:
        taken = lab.capture_of(taken, place)
    settings = replace(settings, capture=taken, sinks=_sinks(settings.sinks, sinks, prometheus))
    if no_rows:
        settings = replace(settings, correlate=replace(settings.correlate, rows=False))
    if cpus:
        correlate = replace(settings.correlate, cpus=True, softirqs=softirqs or settings.correlate.softirqs)
        settings = replace(settings, correlate=correlate)
    if waiting:
        settings = replace(settings, correlate=replace(settings.correlate, waiting=True))
    if store:
        settings = replace(settings, store=replace(settings.store, path=str(store)))
    return settings


def _filtered(configured: CaptureConfig, options: FilterOptions) -> CaptureConfig:
    """Return the configuration with the options' filter.

    Each option replaces its key. `--container` and `--device` replace all keys that name places, so that the command
    line alone says where packets are recorded.
    """
    if options.containers or options.devices:
        configured = replace(configured, containers=options.containers, devices=options.devices, netns=())
    if options.protocols:
        configured = replace(configured, protocols=options.protocols)
    if options.sample_shift is not None:
        configured = replace(configured, sample_shift=options.sample_shift)
    return configured


def _sinks(configured: SinksConfig, options: SinkOptions | None, prometheus: str | None) -> SinksConfig:
    influxdb, endpoint = configured.influxdb, configured.prometheus
    if options is not None and options.influxdb:
        influxdb = replace(influxdb, url=options.influxdb)
    if options is not None and options.bucket:
        influxdb = replace(influxdb, bucket=options.bucket)
    if prometheus:
        endpoint = replace(endpoint, listen=prometheus)
    return replace(configured, influxdb=influxdb, prometheus=endpoint)


def refuse_unwritable(store: Path | None, who: str) -> None:
    """Raise `StoreError` if `store` is named and cannot be written: before a measurement whose results belong there."""
    if store is not None:
        from storage.embedded import refuse_unwritable as refuse

        refuse(store, who)


def with_broker(settings: Config, address: str | None, options: BrokerOptions) -> Config:
    """Return the configuration with the options' MQTT broker. Raises `UsageError` if neither names a broker."""
    mqtt = settings.mqtt
    if address:
        mqtt = replace(mqtt, broker=address)
    if options.username:
        mqtt = replace(mqtt, username=options.username)
    files = {
        "password_file": options.password_file,
        "ca_file": options.ca_file,
        "cert_file": options.cert_file,
        "key_file": options.key_file,
    }
    mqtt = replace(mqtt, **{name: str(path) for name, path in files.items() if path})
    if not mqtt.broker:
        raise UsageError("no broker: name one (mqtt://HOST), or set [mqtt] broker in the configuration")
    return replace(settings, mqtt=mqtt)


def session(settings: Config, form: str, console: Console) -> Session:
    """Return a session that shows its progress on standard error, or none if the result is JSON."""
    return Session(settings, console.err(), quiet=form == JSON)


def lab_of(name: str | None) -> lab.Lab | None:
    """Return the running lab of that name; None without a name. Raises `LabError` if it is not up."""
    return lab.attach(name) if name else None


def spec(
    shape: LabShape,
    name: str,
    far_end: FarEndOptions | None = None,
    cni: Path | None = None,
    layout: str = lab.Layout.BRIDGE,
    rps: Sequence[str] = (),
) -> lab.Spec:
    """Return the specification of a lab with that name, shape, far end, network, and CPUs of its receive softirqs.

    Raises `UsageError` if the file of the network cannot be read.
    """
    return lab.Spec(
        name=name,
        containers=shape.containers,
        bridges=shape.bridges,
        same_addresses=shape.same_addresses,
        runtime=lab.Runtime(shape.runtime),
        far_end=lab.FarEnd(far_end.far_end) if far_end else lab.FarEnd.NAMESPACE,
        guest_kernel=str(far_end.guest_kernel.absolute()) if far_end and far_end.guest_kernel else "",
        cni=network_text(cni) if cni else "",
        layout=lab.Layout(layout),
        rps=tuple(rps),
    )


def network_text(file: Path) -> str:
    """Return the text of a CNI network configuration list. Raises `UsageError` if the file cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: {error.strerror if isinstance(error, OSError) else error}") from None


@contextmanager
def namespace(where: Where, settings: Config) -> Iterator[int]:
    """Yield a file descriptor of the selected network namespace, and close it after the block."""
    from mace.tools.namespaces import open_namespace

    found = open_namespace(
        settings.capture, container=where.container, netns=where.netns, pid=where.pid, lab_name=where.lab
    )
    try:
        yield found
    finally:
        os.close(found)


def recordings(options: RecordingOptions) -> list[LocalRecording]:
    """Open the named recordings, in time order; no URLs. Raises `Unavailable`, `CaptureError`, `UsageError`."""
    from mace.replaying import replay

    return replay.recordings(options.files, (options.inner, options.outer), _file_options(options))


def recorded_files(options: RecordingOptions) -> list[RecordedFile]:
    """Return the named recordings, paths and URLs, for a replay in parts."""
    from mace.replaying import replay

    return replay.recorded_files(options.files, (options.inner, options.outer), _file_options(options))


def replaying(recordings: RecordingOptions, store: Path | None) -> bool:
    """Return whether recordings are named, and not a store; raises `UsageError` if both are."""
    named = bool(recordings.files or recordings.inner or recordings.outer)
    if named and store:
        raise UsageError("expected a store or recordings, found both; leave out --store or the files")
    return named


@contextmanager
def store_to_read(
    recordings: RecordingOptions, store: Path | None, configured: Config, *, quiet: bool = False, stages: bool = False
) -> Iterator[Path]:
    """Yield the store to read: of the recordings if they are named (`replayed`), else the named or configured one."""
    if not replaying(recordings, store):
        yield store or Path(configured.store.path)
        return
    from mace.replaying.into_store import replayed

    with replayed(recorded_files(recordings), configured, quiet=quiet, stages=stages) as made:
        yield made


def _file_options(options: RecordingOptions) -> FileOptions:
    from collector.files import FileOptions

    return FileOptions(
        options.salvage, options.topology, options.buffer, options.clock, options.inner_device, options.outer_device
    )


def tee(path: Path | None, seal: SealKey | None = None) -> CaptureSink | None:
    """Return the sink for the capture file of `--record`, which `seal` seals; None without that option."""
    return CaptureSink(path, seal=seal) if path else None


def seal_key(path: Path | None) -> SealKey | None:
    """Return the key of `--seal`; None without that option. Raises `SealError`, and `MissingExtra`."""
    if path is None:
        return None
    from storage.sealing import keys

    return keys.seal_key(path)


def lasting(duration_s: float | None) -> Until:
    """Return the end of a measurement: after `duration_s` seconds, or with None when it is interrupted."""
    return lambda: asyncio.sleep(duration_s) if duration_s else asyncio.Event().wait()


def show(summary: Summary, form: str, console: Console) -> None:
    """Print the figures of a measurement or a replay, as a table or as JSON."""
    if form == JSON:
        console.json(summary.as_dict())
    else:
        tables.show(summary, console.out())
