"""Writes results to InfluxDB, or a server with its write API, as compressed line protocol.

influxdb-client writes to 2.x, 3.x, 1.8 and VictoriaMetrics (`/api/v2/write`). A server without that path (1.x before
1.8) gets the same bytes at `/write`. The running sink has buffer, spool and retries; this module interprets the
answers. 400, 413 and 422 refuse rows: the frame is halved until the refused lines are isolated. After any other error
the frame is sent again later.

`contracts.metrics` has the names of measurements, tags and fields.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import ssl
import zlib
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import aiohttp
from influxdb_client.client.influxdb_client_async import InfluxDBClientAsync
from influxdb_client.rest import ApiException
from influxdb_client.service.write_service import WriteService

from contracts.config import Config, InfluxConfig, split_url
from contracts.errors import ConfigError
from contracts.figures import ranks
from contracts.interfaces import Status, StreamHeader
from contracts.results import Results
from contracts.schema import RoundTrips
from contracts.vitals import Vitals
from storage.internal import Internal
from storage.lines import Budget, Lines, StreamLines
from storage.running_sink import Delivered, Encoded, RunningSink, TryLaterError
from storage.shared import HostResults, SharedRunningSink
from storage.spool import Frame

NAME: Final = "influxdb"
TOKEN_VARIABLE: Final = "INFLUXDB_V2_TOKEN"  # noqa: S105 - the name, which influxdb-client uses too
_HALVINGS: Final = 400
"""Most requests to find the refused lines in one frame; one line in 20,000 takes 30. After that, all lines of the
remaining parts count as refused."""
_ABOUT_THE_ROWS: Final = (400, 413, 422)
_COUNTED: Final = re.compile(r"partial write: (?!unable to parse).*\bdropped=(\d+)")
"""Answer of 1.x and 2.x that have written the other lines and say how many they have dropped."""
_LISTED: Final = re.compile(r"unable to parse '")
"""1.x writes the lines that it can parse (`partial write`) and lists all others."""
_GZIP_LEVEL: Final = 1
"""Level 1 compresses 93 MB of lines to 9.4 MB in 0.4 s; level 9 takes 3 s for little more."""


class InfluxTarget:
    """Encodes rows for InfluxDB and delivers them (`storage.running_sink.Target`)."""

    def __init__(self, config: InfluxConfig, vitals: Vitals) -> None:
        self._config = config
        self._vitals = vitals
        self._budget = Budget(config.series_budget, self._over_budget)
        self._streams: dict[StreamHeader, _OpenStream] = {}
        self._internal = Internal(vitals)
        self._token = _token(config)
        self._v1 = config.api == "v1"
        self._client: InfluxDBClientAsync | None = None
        self._session: aiohttp.ClientSession | None = None

    # Encoding, in a thread.

    def rows(self, item: HostResults) -> int:
        """Return the number of rows and windows, or of round trips, in an item."""
        results = item.results
        if isinstance(results, Results):
            return len(results.rows.delays) + len(results.rows.windows)
        return len(results.rows) if results is not None else 0

    def encode(self, items: Sequence[HostResults], *, last: bool) -> Encoded:
        """Encode items as compressed frames of at most `batch_rows` lines each."""
        packed = _Packer(self._config.batch_rows)
        left_out = over_budget = 0
        for item in items:
            stream = self._streams.get(item.header)
            if stream is None:
                lines = StreamLines(item.header, self._budget, sample=self._config.sample)
                stream = self._streams[item.header] = _OpenStream(lines)
            for piece in self._pieces(stream, item):
                packed.add(piece)
            left_out += stream.lines.left_out
            over_budget += stream.lines.over_budget
            stream.lines.left_out = stream.lines.over_budget = 0
        for text in self._internal.own_lines(last=last):
            packed.add(_one(text))
        account = self._vitals.accounts.get(NAME)
        if account is not None:
            account.series = len(self._budget)
        return Encoded(packed.done(), left_out, over_budget)

    def _pieces(self, stream: _OpenStream, item: HostResults) -> Iterator[Lines]:
        results = item.results
        if isinstance(results, RoundTrips):
            yield from map(_one, stream.lines.round_trips(results))
        elif results is None:
            yield from map(_one, self._internal.stream_ended(item.header))
            del self._streams[item.header]
        else:
            rows, totals = results.rows, results.totals
            if rows.devices != stream.devices:
                stream.devices, stream.ranks = rows.devices, ranks(rows.devices)
            if len(rows.delays):
                yield from stream.lines.packets(rows.delays, rows.devices, self._config.batch_rows)
            yield from map(_one, stream.lines.windows(rows.windows, rows.devices, stream.ranks))
            if len(rows.stages):
                yield from map(_one, stream.lines.stages(rows, totals))
            yield from map(_one, stream.lines.containers(totals))
            yield from map(_one, self._internal.stream_lines(item.header, totals))

    def _over_budget(self, series: str) -> None:
        account = self._vitals.accounts.get(NAME)
        if account is not None:
            account.note(f"the series budget of {self._config.series_budget} is used up; first refused: {series[:120]}")

    # Delivery.

    async def open(self) -> None:
        """Make the clients. No request is sent, because the server may be unreachable."""
        timeout = aiohttp.ClientTimeout(total=self._config.timeout_s)
        trust = await asyncio.to_thread(_trusted, self._config.ca_file)
        self._client = InfluxDBClientAsync(
            self._config.url.rstrip("/"), self._token, org=self._config.org or "-", timeout=timeout, ssl_context=trust
        )
        self._session = aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(ssl=trust))

    async def aclose(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.close()  # type: ignore[no-untyped-call]
            self._client = None
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def deliver(self, frame: Frame) -> Delivered:
        """Write a frame; if the server refuses some lines, write all others. Raises `TryLaterError`."""
        answer = await self._post(frame.payload)
        if answer.ok:
            return Delivered()
        counted = _COUNTED.search(answer.text)
        if counted is not None:
            return Delivered(min(int(counted[1]), frame.rows), answer.told)
        if "partial write: unable to parse '" in answer.text:
            return Delivered(min(len(_LISTED.findall(answer.text)), frame.rows), answer.told)
        return await self._halved(zlib.decompress(frame.payload, wbits=31), answer)

    async def _halved(self, lines: bytes, answer: _Answer) -> Delivered:
        """Find the lines that the server refuses by sending smaller and smaller parts; all other lines are stored."""
        pending = [(lines, answer)]
        refused, reason, requests = 0, answer.told, 0
        while pending:
            part, said = pending.pop()
            count = part.count(b"\n")
            if count <= 1 or requests >= _HALVINGS:
                refused += count
                reason = said.told
                continue
            middle = part.rfind(b"\n", 0, len(part) // 2) + 1 or part.find(b"\n") + 1
            for half in (part[:middle], part[middle:]):
                if half:
                    answer = await self._post(zlib.compress(half, _GZIP_LEVEL, wbits=31))
                    requests += 1
                    if not answer.ok:
                        pending.append((half, answer))
        return Delivered(refused, reason)

    async def _post(self, body: bytes) -> _Answer:
        v1 = self._v1  # a concurrent request may change it
        try:
            answer = await (self._post_v1(body) if v1 else self._post_v2(body))
            if answer.no_such_path and self._config.api == "auto" and not v1:
                self._v1 = True
                answer = await self._post_v1(body)
        except TimeoutError as error:
            raise TryLaterError(f"{self._config.url}: no answer within {self._config.timeout_s:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise TryLaterError(f"{self._config.url}: {str(error) or type(error).__name__}") from error
        if answer.ok or answer.status in _ABOUT_THE_ROWS:
            return answer
        raise TryLaterError(f"{self._config.url}: {answer.told}{self._remedy(answer)}", answer.after_s)

    async def _post_v2(self, body: bytes) -> _Answer:
        assert self._client is not None
        service = WriteService(self._client.api_client)  # type: ignore[no-untyped-call]
        try:
            _, status, headers = await service.post_write_async(  # type: ignore[no-untyped-call]
                org=self._config.org or "-",
                bucket=self._config.bucket,
                body=body,
                precision="ns",
                content_encoding="gzip",
                content_type="text/plain; charset=utf-8",
                _return_http_data_only=False,
            )
        except ApiException as error:
            text = error.body.decode(errors="replace") if isinstance(error.body, bytes) else str(error.reason)
            return _Answer(int(error.status or 0), text, error.headers or {})
        return _Answer(status, "", headers)

    async def _post_v1(self, body: bytes) -> _Answer:
        assert self._session is not None
        database, _, policy = self._config.bucket.partition("/")
        query = {"db": database, "precision": "ns"} | ({"rp": policy} if policy else {})
        headers = {"Content-Encoding": "gzip", "Content-Type": "text/plain; charset=utf-8"}
        if self._token:  # USER:PASSWORD
            headers["Authorization"] = f"Basic {b64encode(self._token.encode()).decode()}"
        url = f"{self._config.url.rstrip('/')}/write"
        async with self._session.post(url, params=query, data=body, headers=headers) as response:
            return _Answer(response.status, await response.text(errors="replace"), response.headers)

    def _remedy(self, answer: _Answer) -> str:
        if answer.status in {401, 403}:
            return f"; check the token ([sinks.influxdb] token_file, {TOKEN_VARIABLE})"
        if answer.status == 404 and "database not found" in answer.text:
            return f'; create the database: CREATE DATABASE "{self._config.bucket.partition("/")[0]}"'
        return ""


@dataclass(slots=True)
class _OpenStream:
    lines: StreamLines
    devices: tuple[Any, ...] = ()
    ranks: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    text: str
    headers: Mapping[str, str]

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300

    @property
    def no_such_path(self) -> bool:
        """Whether the server lacks the path. A 404 about a bucket has a JSON body."""
        return self.status in {404, 405} and not self.text.lstrip().startswith("{")

    @property
    def told(self) -> str:
        """The server's message, shortened, without the quoted texts that differ from line to line."""
        try:
            said = json.loads(self.text)
            text = str(said.get("message") or said.get("error") or self.text)
        except (ValueError, AttributeError):
            text = self.text
        text = re.sub(r"'[^']*'|\"[^\"]{40,}\"", "'…'", " ".join(text.split()))
        return f"{self.status} {text[:160]}".strip()

    @property
    def after_s(self) -> float | None:
        """Retry-After in seconds; None without one, or if it is a date, which is not parsed."""
        value = self.headers.get("Retry-After", "")
        return float(value) if value.isdigit() else None


class _Packer:
    """Packs pieces of lines into compressed frames."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._pieces: list[Lines] = []
        self._rows = 0
        self._frames: list[Frame] = []

    def add(self, piece: Lines) -> None:
        if self._rows and self._rows + piece.rows > self._most:
            self._pack()
        self._pieces.append(piece)
        self._rows += piece.rows

    def done(self) -> list[Frame]:
        if self._pieces:
            self._pack()
        return self._frames

    def _pack(self) -> None:
        packing = zlib.compressobj(_GZIP_LEVEL, wbits=31)
        packed = b"".join([*(packing.compress(piece.data) for piece in self._pieces), packing.flush()])
        self._frames.append(Frame(packed, self._rows))
        self._pieces, self._rows = [], 0


def _one(text: str) -> Lines:
    return Lines(text.encode(), 1)


def _token(config: InfluxConfig) -> str:
    """Return the token from the configuration, its file or the environment. Raises `ConfigError`."""
    if config.token and config.token_file:
        raise ConfigError("[sinks.influxdb] has both token and token_file; remove one of them")
    if config.token_file:
        try:
            return Path(config.token_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"[sinks.influxdb] token_file: {config.token_file} cannot be read: {error}") from error
    return config.token or os.environ.get(TOKEN_VARIABLE, "")


def _trusted(ca_file: str) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file or None)
    except OSError as error:
        raise ConfigError(f"[sinks.influxdb] ca_file: {ca_file}: {error}") from error


def checked(config: InfluxConfig) -> None:
    """Raise `ConfigError` for an invalid address."""
    parts = split_url("[sinks.influxdb] url", config.url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ConfigError(f"[sinks.influxdb] url = {config.url!r}, expected http://HOST:PORT or https://HOST:PORT")


def check(config: Config) -> Status:
    """Return whether the server accepts rows now. A run can start if it does not, because the spool keeps the rows."""
    influx = config.sinks.influxdb

    async def ask() -> None:
        target = InfluxTarget(influx, Vitals())
        await target.open()
        try:
            # A comment line: the server stores nothing, but verifies address, bucket and token.
            await asyncio.wait_for(target.deliver(Frame(zlib.compress(b"# mace check\n", wbits=31), 0)), 5)
        finally:
            await target.aclose()

    remedy = (
        "a run can start, and its rows wait in the spool"
        if influx.spool
        else "set [sinks.influxdb] spool, or rows are lost"
    )
    try:
        checked(influx)
        asyncio.run(ask())
    except ConfigError as error:
        return Status(False, str(error), "see docs/configuration.md")
    except TryLaterError as error:
        return Status(False, error.why, remedy)
    except TimeoutError:
        return Status(False, f"{influx.url} does not answer", remedy)
    return Status(True, f"{influx.url} accepts rows for {influx.bucket}")


def make(config: Config, vitals: Vitals) -> SharedRunningSink:
    """Return the configured sink. Raises `ConfigError`."""
    influx = config.sinks.influxdb
    checked(influx)
    target = InfluxTarget(influx, vitals)
    account = vitals.account(NAME)
    running = RunningSink[HostResults](NAME, target, influx, account, patient=not vitals.live, senders=influx.senders)
    return SharedRunningSink(running)
