"""What the command line knows of MQTT: the options of `mace run --publish` and `mace ingest`, and what they make.

Imports nothing that needs the extra `mqtt` before it is asked for.
"""

from __future__ import annotations

import argparse
import socket
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mace import config, sinks, terminal
from mace.config import Config, MqttConfig
from mace.errors import ConfigError, MissingExtra, UsageError
from mace.interfaces import Status, StreamHeader, StreamItem, StreamSink
from mace.topics import Shard

if TYPE_CHECKING:
    from storage.mqtt import StreamPublisher

_CHECK_S: Final = 2.0
_FILES: Final = ("password_file", "ca_file", "cert_file", "key_file")


def add_connection_options(parser: argparse.ArgumentParser) -> None:
    """Who we are at the broker, and how it is known."""
    parser.add_argument("--username", metavar="NAME", help="at the broker")
    parser.add_argument(
        "--password-file", type=Path, metavar="FILE", help="its first line; else the variable MACE_MQTT_PASSWORD"
    )
    parser.add_argument("--ca-file", type=Path, metavar="FILE", help="certificates that the broker's must lead to, PEM")
    parser.add_argument("--cert-file", type=Path, metavar="FILE", help="our certificate, PEM")
    parser.add_argument("--key-file", type=Path, metavar="FILE", help="its private key, PEM")


def add_publish_options(parser: argparse.ArgumentParser) -> None:
    """Those of `mace run`."""
    parser.add_argument(
        "--publish",
        nargs="?",
        const="",
        metavar="URL",
        help="publish the raw stream to a MQTT broker (mqtt://HOST, mqtts://HOST), for `mace ingest`",
    )
    parser.add_argument(
        "--publish-as",
        choices=("records", "delays", "windows"),
        default="records",
        help="records: the raw stream, for mace ingest (default); the others: what came out of it, for subscribers",
    )
    parser.add_argument("--spool", type=Path, metavar="DIR", help="what has not arrived there yet waits here")
    add_connection_options(parser)


def add_ingest_options(parser: argparse.ArgumentParser) -> None:
    """Those of `mace ingest`."""
    parser.add_argument("--broker", metavar="URL", help="mqtt://HOST[:PORT] or mqtts://HOST[:PORT]")
    parser.add_argument("--store", type=Path, metavar="DIR", help="where rows and windows go; one for each process")
    parser.add_argument("--shard", metavar="I/N", default="1/1", help="the I-th of N parts of the hosts")
    parser.add_argument("--no-rows", action="store_true", help="keep windows only, no row per packet")
    sinks.add_options(parser, endpoint=True)
    add_connection_options(parser)


def configured(args: argparse.Namespace, settings: Config, broker: str | None) -> Config:
    """The configuration with what the options say; raises `UsageError` without a broker."""
    mqtt: MqttConfig = settings.mqtt
    if broker:
        mqtt = replace(mqtt, broker=broker)
    if args.username:
        mqtt = replace(mqtt, username=args.username)
    files = {name: str(getattr(args, name)) for name in _FILES if getattr(args, name)}
    mqtt = replace(mqtt, **files)
    if not mqtt.broker:
        raise UsageError("no broker: name one (mqtt://HOST), or set [mqtt] broker in the configuration")
    publish, rows = settings.publish, settings.sinks.mqtt
    if getattr(args, "spool", None):
        publish, rows = replace(publish, spool=str(args.spool)), replace(rows, spool=str(args.spool))
    if getattr(args, "publish_as", "records") != "records":
        rows = replace(rows, publish=args.publish_as)
    return replace(settings, mqtt=mqtt, publish=publish, sinks=replace(settings.sinks, mqtt=rows))


def publisher(settings: Config) -> StreamPublisher:
    """The publisher that the configuration asks for; raises `MissingExtra`, `ConfigError`."""
    from mace.broker import Broker  # noqa: PLC0415 (an extra)
    from storage.mqtt import StreamPublisher  # noqa: PLC0415

    kept = settings.publish
    return StreamPublisher(
        Broker(settings.mqtt),
        Path(kept.spool) / "publish",
        max_bytes=kept.spool_mib << 20,
        interval_s=kept.interval_s,
        drain_s=kept.drain_s,
    )


def check(settings: Config) -> Status:
    """Whether a broker that is configured can be reached from here."""
    if not settings.mqtt.broker:
        return Status(True, "not configured")
    try:
        from mace.broker import Broker  # noqa: PLC0415 (an extra)

        broker = Broker(settings.mqtt)
    except MissingExtra as error:
        return Status(False, error.why, error.remedy)
    except ConfigError as error:
        return Status(False, str(error), "see docs/mqtt.md")
    try:
        with socket.create_connection((broker.host, broker.port), _CHECK_S):
            return Status(True, f"{broker.address} answers")
    except OSError as error:
        return Status(False, f"{broker.address}: {error.strerror or error}", "start the broker, or see [mqtt] broker")


def line(sink: StreamPublisher) -> str:
    """What became of the records, for people."""
    counts = [
        f"{sink.records:,} records",
        f"{sink.arrived:,} arrived",
        f"{sink.waiting:,} wait in the spool",
        f"{sink.discarded:,} discarded",
    ]
    if sink.left_before:
        counts.insert(1, f"{sink.left_before:,} found in the spool")
    if sink.set_aside or sink.set_aside_frames:
        counts.append(f"{sink.set_aside:,} set aside ({sink.set_aside_frames:,} frames that nobody takes)")
    if sink.taken_over:
        counts.append(f"session taken over {sink.taken_over:,} times: another host has this one's name")
    trouble = sink.state().trouble
    return "published: " + ", ".join(counts) + (f"; {trouble}" if sink.waiting and trouble else "")


class Both:
    """A `StreamSink` into several, in order: a recording and a broker."""

    def __init__(self, sinks: list[StreamSink]) -> None:
        self._sinks = sinks
        self._opened: list[StreamSink] = []

    async def open(self, header: StreamHeader) -> None:
        """Open all of them; if one cannot, those before it are closed again."""
        try:
            for sink in self._sinks:
                self._opened.append(sink)
                await sink.open(header)
        except BaseException:
            await self.aclose()
            raise

    async def write(self, item: StreamItem) -> None:
        for sink in self._sinks:
            await sink.write(item)

    async def aclose(self) -> None:
        """Close all, the last first, also if one of them cannot."""
        error: BaseException | None = None
        while self._opened:
            try:
                await self._opened.pop().aclose()
            except Exception as e:  # noqa: BLE001 (told when the others are closed)
                error = error or e
        if error is not None:
            raise error


def run_ingest(args: argparse.Namespace) -> int:
    """`mace ingest`."""
    settings = config.load(args.config)
    settings = configured(args, settings, args.broker)
    if args.no_rows:
        settings = replace(settings, correlate=replace(settings.correlate, rows=False))
    settings = replace(settings, sinks=sinks.configured(args, settings.sinks))
    shard = Shard.parse(args.shard)
    from mace import ingest  # noqa: PLC0415 (an extra)
    from mace.broker import Broker  # noqa: PLC0415

    store = args.store or Path(settings.store.path)
    found = ingest.serve(Broker(settings.mqtt), store, settings, shard, args.duration)
    if args.json:
        terminal.json_line(found)
    else:
        told = {name: value for name, value in found.items() if name != "sinks"}
        terminal.line(" · ".join(f"{name.replace('_', ' ')} {value}" for name, value in told.items()))
    return 0
