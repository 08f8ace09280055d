"""Publishes results to an MQTT broker: rows and windows as Arrow, for subscribers.

    mace/v1/HOST/delays, .../windows, .../ledger     one Arrow IPC stream a message: columns and types of docs/store.md

Each message is self-contained: it names host, run and devices, and any Arrow library reads it. Only the broker
acknowledges messages (the raw stream has more, see `storage.mqtt`): a message that the broker loses is lost, and after
an outage a message may arrive twice. The schema's metadata therefore has `run` and `number`, which increases by one.

With several brokers each has a buffer, a spool and an account of its own, so that one that is away holds up the rows of
its own hosts alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Final

import pyarrow as pa

from contracts.config import Config, MqttRowsConfig
from contracts.errors import ConfigError, WireError
from contracts.interfaces import Status, StreamHeader
from contracts.results import Results
from contracts.schema import RoundTrips
from contracts.topics import host_of_results, results_topic
from contracts.vitals import Vitals
from storage import tables
from storage.broker import Brokers, Connection, MqttError
from storage.running_sink import Delivered, Encoded, RunningSink, TryLaterError
from storage.shared import HostResults, HostSink, SharedRunningSink
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


class HostSinkByBroker:
    """A `Sink` for one stream, which writes to the running sink of its host's broker."""

    def __init__(self, brokers: Brokers, running: Mapping[str, RunningSink[HostResults]]) -> None:
        self._brokers, self._running = brokers, running
        self._chosen: HostSink | None = None

    async def open(self, header: StreamHeader) -> None:
        """Choose the broker by the stream's host."""
        self._chosen = HostSink(self._running[self._brokers.of(header.host).address])
        await self._chosen.open(header)

    async def write(self, results: Results | RoundTrips) -> None:
        """Pass results to the running sink; never waits for a broker."""
        assert self._chosen is not None
        await self._chosen.write(results)

    async def aclose(self) -> None:
        """Announce the stream's end."""
        if self._chosen is not None:
            await self._chosen.aclose()


class SinksByBroker:
    """A `SharedSink` with a running sink for each of several brokers.

    `left` are running sinks of spools that a run with other brokers has left. They get nothing new, and deliver their
    messages to the brokers that the hosts have now.
    """

    def __init__(
        self,
        brokers: Brokers,
        running: Mapping[str, RunningSink[HostResults]],
        left: Sequence[RunningSink[HostResults]] = (),
    ) -> None:
        """`running`: by the broker's address."""
        self._brokers, self._running = brokers, running
        self._all = (*running.values(), *left)

    async def open(self) -> None:
        """Open the running sinks (`RunningSink.open`); if one cannot be opened, those that are open are closed."""
        async with AsyncExitStack() as opened:
            for sink in self._all:
                await sink.open()
                opened.push_async_callback(sink.aclose)
            opened.pop_all()

    def stream(self) -> HostSinkByBroker:
        """Return a sink for one stream."""
        return HostSinkByBroker(self._brokers, self._running)

    async def aclose(self) -> None:
        """Close all running sinks at once, so that their waits for brokers do not add up. Raises the first error."""
        for end in await asyncio.gather(*(sink.aclose() for sink in self._all), return_exceptions=True):
            if isinstance(end, BaseException):
                raise end


def make(config: Config, vitals: Vitals) -> SharedRunningSink | SinksByBroker:
    """Return the configured sink. Raises `ConfigError`."""
    own, brokers = config.sinks.mqtt, Brokers(config.mqtt)

    def running(name: str) -> RunningSink[HostResults]:
        return RunningSink(name, RowsTarget(brokers, own), own, vitals.account(name), patient=not vitals.live)

    names = {each.address: f"{NAME}@{each.host}:{each.port}" for each in brokers.all}
    if len(names) == 1:
        names = dict.fromkeys(names, NAME)
    left = sorted({NAME, *_spools(own.spool)} - set(names.values())) if own.spool else []
    sinks = {address: running(name) for address, name in names.items()}
    others = [running(name) for name in left if (Path(own.spool) / name).is_dir()]
    if len(sinks) == 1 and not others:
        return SharedRunningSink(*sinks.values())
    return SinksByBroker(brokers, sinks, others)


def _spools(folder: str) -> Iterator[str]:
    """Yield the names of spools that sinks of several brokers have made."""
    for path in Path(folder).glob(f"{NAME}@*"):
        yield path.name
