"""Publishes results to an MQTT broker: rows and windows as Arrow, for subscribers.

    mace/v1/HOST/delays, .../windows, .../ledger     one Arrow IPC stream a message: columns and types of docs/store.md

Each message is self-contained: it names host, run and devices, and any Arrow library reads it. Only the broker
acknowledges messages (the raw stream has more, see `storage.mqtt`): a message that the broker loses is lost, and after
an outage a message may arrive twice. The schema's metadata therefore has `run` and `number`, which increases by one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from typing import Final

import pyarrow as pa

from contracts.config import Config, MqttRowsConfig
from contracts.errors import ConfigError, WireError
from contracts.interfaces import Status, StreamHeader
from contracts.results import Results
from contracts.topics import host_of_results, results_topic
from contracts.vitals import Vitals
from storage import tables
from storage.broker import Brokers, Connection, MqttError
from storage.running_sink import Delivered, Encoded, RunningSink, TryLaterError
from storage.shared import HostResults, SharedRunningSink
from storage.spool import Frame

NAME: Final = "mqtt"
_OPTIONS: Final = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=1), use_threads=False)


class RowsTarget:
    """Encodes results as messages and publishes them (`storage.running_sink.Target`)."""

    def __init__(self, brokers: Brokers, config: MqttRowsConfig) -> None:
        self._brokers = brokers
        self._rows = config.publish == "delays"
        self._batch_rows, self._timeout_s = config.batch_rows, config.timeout_s
        self._numbers: dict[StreamHeader, int] = {}
        self._flushes = 0
        self._clients: dict[str, Connection] = {}
        """Connections by address."""
        self._connected = AsyncExitStack()

    def rows(self, item: HostResults) -> int:
        """Return the number of rows and windows in an item."""
        if not isinstance(item.results, Results):
            return 0
        return len(item.results.rows.delays) + len(item.results.rows.windows)

    def encode(self, items: Sequence[HostResults], *, last: bool) -> Encoded:
        """Encode items as one message per table and `batch_rows` rows; round trips are left out."""
        del last
        frames: list[Frame] = []
        left_out = 0
        for header, results in ((item.header, item.results) for item in items):
            if results is None:
                self._numbers.pop(header, None)
            elif isinstance(results, Results):
                frames += self._frames(header, results)
                left_out += 0 if self._rows else len(results.rows.delays)
            else:
                left_out += len(results.rows)
        return Encoded(frames, left_out)

    def _frames(self, header: StreamHeader, results: Results) -> list[Frame]:
        made = []
        rows, totals = results.rows, results.totals
        if len(rows.windows):
            made.append(self._frame(header, "windows", tables.windows_table(header, rows.windows, rows.devices)))
        for start in range(0, len(rows.delays) if self._rows else 0, self._batch_rows):
            part = rows.delays[start : start + self._batch_rows]
            made.append(self._frame(header, "delays", tables.delays_table(header, part, rows.devices)))
        if made:
            self._flushes += 1
            row = tables.LedgerRow.of(header, totals)
            made.append(self._frame(header, "ledger", tables.ledger_table([row], self._flushes)))
        return made

    def _frame(self, header: StreamHeader, table: str, rows: pa.Table) -> Frame:
        number = self._numbers[header] = self._numbers.get(header, 0) + 1
        told = rows.replace_schema_metadata({"run": header.run, "number": str(number)})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, told.schema, options=_OPTIONS) as writer:
            writer.write_table(told)
        return Frame(sink.getvalue().to_pybytes(), len(rows), results_topic(header.host, table))

    async def open(self) -> None:
        """Do nothing yet, because the broker may be unreachable."""

    async def deliver(self, frame: Frame) -> Delivered:
        """Publish a message to its host's broker, and wait for the acknowledgement. Raises `TryLaterError`."""
        broker = self._brokers.of(host_of_results(frame.label))
        try:
            async with asyncio.timeout(self._timeout_s):
                client = self._clients.get(broker.address)
                if client is None:
                    client = await self._connected.enter_async_context(broker.connection())
                    self._clients[broker.address] = client
                refused = client.refused
                await client.publish(frame.label, frame.payload, qos=1)
        except MqttError as error:
            await self.aclose()
            raise TryLaterError(f"{broker.address}: {error}") from error
        except (TimeoutError, asyncio.CancelledError):
            await self.aclose()
            raise
        if client.refused != refused:
            return Delivered(frame.rows, f"{broker.address}: not authorized to publish {frame.label}")
        return Delivered()

    async def aclose(self) -> None:
        """Close the connections."""
        self._clients.clear()
        connected, self._connected = self._connected, AsyncExitStack()
        with suppress(MqttError):
            await connected.aclose()


def check(config: Config) -> Status:
    """Return whether the configuration is valid; the part `broker` reports whether the broker can be reached."""
    try:
        Brokers(config.mqtt)
    except (ConfigError, WireError) as error:
        return Status(False, str(error), "see docs/mqtt.md")
    return Status(True, f"publishes {config.sinks.mqtt.publish} to {config.mqtt.broker}")


def make(config: Config, vitals: Vitals) -> SharedRunningSink:
    """Return the configured sink. Raises `ConfigError`."""
    own = config.sinks.mqtt
    target = RowsTarget(Brokers(config.mqtt), own)
    return SharedRunningSink(RunningSink[HostResults](NAME, target, own, vitals.account(NAME), patient=not vitals.live))
