"""From options to what the parts take: the configuration, a session, a lab, recordings."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from contracts import config
from contracts.config import Config, SinksConfig
from contracts.errors import UsageError
from mace import lab
from mace.commands.console import Console
from mace.commands.options import (
    JSON,
    BrokerOptions,
    CaptureOptions,
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


def configured(
    file: Path | None,
    *,
    capture: CaptureOptions | None = None,
    store: Path | str | None = None,
    no_rows: bool = False,
    sinks: SinkOptions | None = None,
    prometheus: str | None = None,
    place: lab.Lab | None = None,
) -> Config:
    """The configuration file, then what options say, then what a lab needs. Raises `ConfigError`."""
    settings = config.load(file)
    taken = settings.capture
    if capture is not None and capture.source:
        taken = replace(taken, source=capture.source)
    if capture is not None and capture.ring_mib:
        taken = replace(taken, ring_mib=capture.ring_mib)
    if place is not None:
        taken = lab.capture_of(taken, place)
    settings = replace(settings, capture=taken, sinks=_sinks(settings.sinks, sinks, prometheus))
    if no_rows:
        settings = replace(settings, correlate=replace(settings.correlate, rows=False))
    if store:
        settings = replace(settings, store=replace(settings.store, path=str(store)))
    return settings


def _sinks(configured: SinksConfig, options: SinkOptions | None, prometheus: str | None) -> SinksConfig:
    influxdb, endpoint = configured.influxdb, configured.prometheus
    if options is not None and options.influxdb:
        influxdb = replace(influxdb, url=options.influxdb)
    if options is not None and options.bucket:
        influxdb = replace(influxdb, bucket=options.bucket)
    if prometheus:
        endpoint = replace(endpoint, listen=prometheus)
    return replace(configured, influxdb=influxdb, prometheus=endpoint)


def with_broker(settings: Config, address: str | None, options: BrokerOptions) -> Config:
    """The configuration with the MQTT broker that options name. Raises `UsageError` without any."""
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
    """A session that shows its progress on standard error, or nothing where the result is JSON."""
    return Session(settings, console.err(), quiet=form == JSON)


def lab_of(name: str | None) -> lab.Lab | None:
    """The lab of that name, which is up. Raises `LabError`."""
    return lab.attach(name) if name else None


def spec(shape: LabShape, name: str) -> lab.Spec:
    """What a lab of that name is to look like."""
    return lab.Spec(
        name=name,
        containers=shape.containers,
        bridges=shape.bridges,
        same_addresses=shape.same_addresses,
        runtime=lab.Runtime(shape.runtime),
    )


@contextmanager
def namespace(where: Where, settings: Config) -> Iterator[int]:
    """A file descriptor on the network namespace that options name, for the length of the block."""
    from mace.tools.namespaces import open_namespace

    found = open_namespace(
        settings.capture, container=where.container, netns=where.netns, pid=where.pid, lab_name=where.lab
    )
    try:
        yield found
    finally:
        os.close(found)


def recordings(options: RecordingOptions) -> list[LocalRecording]:
    """The recordings that options name, in time order; no URLs. Raises `Unavailable`, `CaptureError`, `UsageError`."""
    from mace.replaying import replay

    return replay.recordings(options.files, (options.inner, options.outer), _file_options(options))


def recorded_files(options: RecordingOptions) -> list[RecordedFile]:
    """The recordings that options name, URLs as well, for a replay in parts."""
    from mace.replaying import replay

    return replay.recorded_files(options.files, (options.inner, options.outer), _file_options(options))


def _file_options(options: RecordingOptions) -> FileOptions:
    from collector.files import FileOptions

    return FileOptions(
        options.salvage, options.topology, options.buffer, options.clock, options.inner_device, options.outer_device
    )


def tee(path: Path | None) -> CaptureSink | None:
    """The capture file of `--record`."""
    return CaptureSink(path) if path else None


def lasting(duration_s: float | None) -> Until:
    """A measurement of so many seconds; None: until it is interrupted."""
    return lambda: asyncio.sleep(duration_s) if duration_s else asyncio.Event().wait()


def show(summary: Summary, form: str, console: Console) -> None:
    """Print what a measurement or a replay came to."""
    if form == JSON:
        console.json(summary.as_dict())
    else:
        tables.show(summary, console.out())
