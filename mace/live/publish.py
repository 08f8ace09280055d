"""Publishes the raw stream to an MQTT broker (`mace run --publish`), and checks whether the broker can be reached.

Modules that need the extra `mqtt` are imported only when a function here needs them.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TYPE_CHECKING, Final

from contracts.config import Config
from contracts.errors import ConfigError, MissingExtra
from contracts.interfaces import Status, StreamHeader, StreamItem, StreamSink

if TYPE_CHECKING:
    from storage.broker import Broker
    from storage.mqtt import StreamPublisher

_CHECK_S: Final = 2.0


def publisher(settings: Config) -> StreamPublisher:
    """Return the publisher that the configuration describes. Raises `MissingExtra`, `ConfigError`."""
    from storage.broker import Brokers  # noqa: PLC0415 (an extra)
    from storage.mqtt import StreamPublisher  # noqa: PLC0415

    kept = settings.publish
    return StreamPublisher(
        Brokers(settings.mqtt),
        Path(kept.spool) / "publish",
        max_bytes=kept.spool_mib << 20,
        interval_s=kept.interval_s,
        drain_s=kept.drain_s,
    )


def check(settings: Config) -> Status:
    """Return whether the configured brokers can be reached from this machine."""
    if not settings.mqtt.broker:
        return Status(True, "not configured")
    try:
        from storage.broker import Brokers  # noqa: PLC0415 (an extra)

        brokers = Brokers(settings.mqtt)
    except MissingExtra as error:
        return Status(False, error.why, error.remedy)
    except ConfigError as error:
        return Status(False, str(error), "see docs/mqtt.md")
    host = settings.run.host or socket.gethostname()
    trouble = {each.address: why for each in brokers.all if (why := _unreachable(each))}
    if trouble:
        told = "; ".join(f"{address}: {why}" for address, why in trouble.items())
        return Status(False, told, "start the broker, or see [mqtt] broker")
    addresses = ", ".join(each.address for each in brokers.all)
    if len(brokers.all) == 1:
        return Status(True, f"{addresses} accepts connections")
    return Status(True, f"{addresses} accept connections; host {host} publishes to {brokers.of(host).address}")


def _unreachable(broker: Broker) -> str:
    """Return why a broker cannot be reached; "" if it can."""
    try:
        with socket.create_connection((broker.host, broker.port), _CHECK_S):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def line(sink: StreamPublisher) -> str:
    """Return one line that says how many records were published, acknowledged, spooled and discarded."""
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
        counts.append(f"session taken over {sink.taken_over:,} times: another host uses the name of this host")
    trouble = sink.state().trouble
    return "published: " + ", ".join(counts) + (f"; {trouble}" if sink.waiting and trouble else "")


def both(tee: StreamSink | None, publisher: StreamSink | None) -> StreamSink | None:
    """Return one sink for the raw stream that feeds the recording and the broker; None if there is neither."""
    sinks = [sink for sink in (tee, publisher) if sink is not None]
    return Both(sinks) if len(sinks) == 2 else sinks[0] if sinks else None


class Both:
    """A `StreamSink` that writes to several sinks in order: a recording and a broker."""

    def __init__(self, sinks: list[StreamSink]) -> None:
        self._sinks = sinks
        self._opened: list[StreamSink] = []

    async def open(self, header: StreamHeader) -> None:
        """Open all sinks. If one fails, close all that were opened."""
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
        """Close all sinks, the last one first, even if one fails; then raise the first error."""
        error: BaseException | None = None
        while self._opened:
            try:
                await self._opened.pop().aclose()
            except Exception as e:  # noqa: BLE001 (raised when the others are closed)
                error = error or e
        if error is not None:
            raise error
