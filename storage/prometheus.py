"""HTTP endpoint for Prometheus and for orchestrators: `/metrics`, `/healthz`, `/readyz`.

    mace_device_delay_seconds   histogram by host, container, netns, device, kind, direction, segment, source
    mace_stages_total, mace_stage_seconds_total   with --cpus: stages and their time by host, container, netns, device,
                                kind, direction, measure, cpu, moved, source
    mace_container_info         1 by host, container, container_id, netns: a container's present name; of a pod also by
                                namespace, pod, workload, pod_containers
    mace_records_total          the ledger's records by host, source and category
    mace_packets_total          packets by host, source and grade
    mace_packets_ambiguous_total   packets that were given up, by host, source and cause
    mace_probe_calls_total, mace_probe_timed_calls_total, mace_probe_seconds_total   own cost by host, source and hook
    mace_sink_rows_total        rows by sink and fate; mace_sink_rows_waiting and others beside it
    mace_publish_records_total  records by their fate at the ingest; mace_publish_records_waiting and others
    mace_queue_peak             the most items that ever waited in a channel

The histograms are sums of bins of `contracts.histogram` and are exact, because their buckets end where bins end. They
add up windows of one second, so a delay is counted once, a second or two after it happened. The buckets are classic
ones, because the text formats have no native histograms.

Series of a container or a device that is gone are dropped `gone_s` later. The size and the cost of a scrape therefore
depend on what runs now, not on all that has run.

`/healthz` is 200 while the event loop turns; otherwise the process should be restarted. `/readyz` is 200 while results
arrive, and if records are published, once the broker has answered. A database or broker that is unreachable later
changes neither, because the spool covers that. Both answer with JSON that has details.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

import numpy as np
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import CollectorRegistry
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from contracts.arrays import Ints
from contracts.config import Config, PrometheusConfig, check_host
from contracts.errors import ConfigError, Unavailable
from contracts.histogram import BINS, lower_bounds
from contracts.hooks import BY_HOOK
from contracts.interfaces import Status, StreamHeader
from contracts.results import Results, Totals
from contracts.schema import RoundTrips
from contracts.topology import ContainerInfo, Device, containers_of
from contracts.vitals import Vitals, process_figures
from storage.http_server import HttpServer, in_pieces
from storage.shared import StreamOfSink
from storage.stage_sums import StageKey, StageSum, add_stages

_LOG: Final = logging.getLogger(__name__)

NAME: Final = "prometheus"
_WIDTH_S: Final = 1
"""Width of the windows that are added up; wider windows have the same delays again."""
_OCTAVES: Final = range(8, 35)
"""Buckets end at 2**8 ns = 256 ns, then at every power of two up to 17 s."""
_EDGE_BINS: Final = np.searchsorted(lower_bounds(np.arange(BINS)), [1 << octave for octave in _OCTAVES])
"""The first bin after each bucket."""
_EDGES_S: Final = [f"{((1 << octave) - 1) / 1e9:.9g}" for octave in _OCTAVES]
"""Delays are whole nanoseconds, so "less than 2**n" is "at most 2**n - 1"."""
_BEAT_S: Final = 0.5
_LABELS: Final = ("host", "container", "netns", "device", "kind", "direction", "segment", "source")
_STAGE_LABELS: Final = ("host", *StageKey._fields, "source")
_INFO_LABELS: Final = ("host", *ContainerInfo._fields)
_CONTAINER: Final = _LABELS.index("container")
_CATEGORIES: Final = ("matched", "unmatched", "ambiguous", "expired", "dropped", "lost", "discarded")
"""Categories of the ledger that only grow; `in_flight` is a gauge."""
_FATES: Final = ("stored", "refused", "over_budget", "dropped_buffer", "dropped_spool", "left_out")

_MOST_SERIES: Final = 10_000
"""Most histograms; each is some thirty series for Prometheus."""
_FRESH_S: Final = 1.0
"""Time for which a text is reused for further requests: only windows of a second change it."""

Labels = tuple[str, ...]
HostSource = tuple[str, str]
"""Host and source. When the host's next run begins, its counters restart from 0, as after any restart."""


class _Buckets:
    __slots__ = ("counts", "device", "gone_s", "sum_ns")

    def __init__(self, device: tuple[int, int]) -> None:
        self.device = device
        """`Device.key` of the newest device with these labels."""
        self.gone_s: float | None = None
        """Time at which its device or container was first missing; None while both are present."""
        self.sum_ns = 0
        self.counts: Ints = np.zeros(len(_OCTAVES) + 1, np.int64)
        """Counts per bucket, not cumulative; the last bucket has no upper end."""


class Endpoint:
    """A `SharedSink` that keeps sums and serves them. `open` raises `Unavailable` if it cannot listen."""

    def __init__(self, config: PrometheusConfig, vitals: Vitals, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._config, self._vitals, self._clock_s = config, vitals, clock_s
        self._address = address(config.listen)
        self._lock = threading.Lock()
        """Guards the data that the streams write and the requests' thread reads."""
        self._delays: dict[HostSource, dict[Labels, _Buckets]] = {}
        self._series = 0
        """Number of histograms of all streams."""
        self._dropped = 0
        """Number of series dropped because their container or device is gone."""
        self._stages: dict[HostSource, dict[StageKey, StageSum]] = {}
        self._stages_not_shown = 0
        """Number of stages and packets of sums beyond `_MOST_SERIES` of a host."""
        self._not_shown = 0
        """Number of delays of series beyond `_MOST_SERIES`."""
        self._containers: dict[HostSource, dict[ContainerInfo, float | None]] = {}
        """Containers by name, id and namespace, with the time since when that name is no longer in use."""
        self._latest: dict[HostSource, Totals] = {}
        self._ended_s: dict[HostSource, float] = {}
        """End of each stream that has ended and has not begun again."""
        self._swept_s = 0.0
        self._text: dict[str, tuple[float, bytes]] = {}
        """By content type, the time at which the text was made, and the text."""
        self._server: HttpServer | None = None
        self._heart: asyncio.Task[None] | None = None
        self._beat_s = time.monotonic()
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    @property
    def port(self) -> int:
        """The port of the server; a free one if the configured port is 0."""
        assert self._server is not None
        return self._server.port

    async def open(self) -> None:
        """Start to listen and to answer requests."""
        try:
            self._server = HttpServer(self._address, self._application())
        except OSError as error:
            raise Unavailable(
                "sink prometheus", f"{self._config.listen}: {error.strerror}", "set [sinks.prometheus] listen"
            ) from error
        self._heart = asyncio.create_task(self._beats(), name="prometheus-heart")

    def stream(self) -> StreamOfSink:
        """Return a sink for one stream."""
        return _EndpointStream(self)

    async def aclose(self) -> None:
        """Stop the server."""
        if self._heart is not None:
            self._heart.cancel()
            await asyncio.gather(self._heart, return_exceptions=True)
            self._heart = None
        if self._server is not None:
            await asyncio.to_thread(self._server.close)
            self._server = None

    async def _beats(self) -> None:
        while True:
            self._beat_s = time.monotonic()
            await asyncio.sleep(_BEAT_S)

    def begin(self, header: StreamHeader) -> None:
        """Begin a stream; series of the host's previous stream continue."""
        self._ended_s.pop((header.host, header.source), None)

    def end(self, header: StreamHeader) -> None:
        """Note the end of a stream."""
        with self._lock:
            self._ended_s[header.host, header.source] = self._clock_s()

    def add(self, header: StreamHeader, results: Results) -> None:
        """Add a stream's results. Raises the error that has ended the server, if one has."""
        if self._server is not None and self._server.failure is not None:
            raise self._server.failure
        of = header.host, header.source
        rows, totals = results.rows, results.totals
        now_s = self._clock_s()
        with self._lock:
            mine = self._delays.setdefault(of, {})
            before = self._latest.get(of)
            series = self._series
            self._latest[of] = totals
            for w in rows.windows:
                if w.width_s != _WIDTH_S:
                    continue
                device = rows.devices[w.device]
                labels = _labels(header, device, w.direction.name, w.segment.name)
                found = mine.get(labels)
                if found is None:
                    if self._series >= _MOST_SERIES:
                        self._not_shown += w.count
                        continue
                    found = mine[labels] = _Buckets(device.key)
                    self._series += 1
                found.device = device.key
                found.sum_ns += w.sum_ns
                found.counts += _bucketed(w.bins, w.counts)
            stages = self._stages.setdefault(of, {}) if len(rows.stages) else self._stages.get(of, {})
            kinds = len(stages)
            if len(rows.stages):
                self._stages_not_shown += add_stages(stages, rows, _MOST_SERIES)[1]
            changed = before is None or before.present is not totals.present or self._series != series
            if (changed or len(stages) != kinds) and totals.present is not None:
                _mark({(of[0], *stage): each for stage, each in stages.items()}, totals.present, now_s)
                _mark(mine, totals.present, now_s)
                here = containers_of(totals.present, totals.on_host_network)
                self._containers[of] = _called(self._containers.get(of, {}), here, now_s)
            self._sweep(now_s)

    def _sweep(self, now_s: float) -> None:
        """Drop series and names that have been gone for `gone_s`; at most once a second."""
        if now_s - self._swept_s < 1:
            return
        self._swept_s = now_s
        over_s = now_s - self._config.gone_s
        for of in [of for of, ended_s in self._ended_s.items() if ended_s < over_s]:
            del self._ended_s[of]
            self._latest.pop(of, None)
            for each in self._delays.get(of, {}).values():
                each.gone_s = over_s - 1
            self._containers.pop(of, None)
            self._dropped += len(self._stages.pop(of, {}))
        for of, named in self._containers.items():
            self._containers[of] = {labels: at for labels, at in named.items() if at is None or at >= over_s}
        for stages in self._stages.values():
            for stage in [stage for stage, d in stages.items() if d.gone_s is not None and d.gone_s < over_s]:
                del stages[stage]
                self._dropped += 1
        for of, mine in list(self._delays.items()):
            for labels in [labels for labels, d in mine.items() if d.gone_s is not None and d.gone_s < over_s]:
                del mine[labels]
                self._series -= 1
                self._dropped += 1
            if not mine and of not in self._latest:
                del self._delays[of]

    # Answers to requests.

    def _application(self) -> Starlette:
        """Return the application with the three pages, for GET and HEAD."""

        async def metrics(request: Request) -> Response:
            text, content_type = self.metrics(request.headers.get("Accept", ""))
            headers = {"Content-Length": str(len(text)), "Content-Type": content_type}
            return StreamingResponse(in_pieces(text), headers=headers)

        async def health(_: Request) -> Response:
            return _answer(*self.health())

        async def readiness(_: Request) -> Response:
            return _answer(*self.readiness())

        async def no_such_page(_: Request, __: Exception) -> Response:
            return PlainTextResponse("there are /metrics, /healthz and /readyz\n", 404)

        pages = [Route("/metrics", metrics), Route("/healthz", health), Route("/readyz", readiness)]
        return Starlette(routes=pages, exception_handlers={404: no_such_page})

    def metrics(self, accept: str) -> tuple[bytes, str]:
        """Return the metrics in the format that the header `accept` prefers, and their content type."""
        encoder, content_type = choose_encoder(accept)
        now_s = self._clock_s()
        made_s, text = self._text.get(content_type, (-_FRESH_S, b""))
        if not text or now_s - made_s >= _FRESH_S:
            text = encoder(self._registry)
            self._text[content_type] = now_s, text
        return text, content_type

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics as families of prometheus_client, whose registry calls this."""
        with self._lock:
            self._sweep(self._clock_s())
            delays = [
                (labels, d.sum_ns, d.counts.copy()) for mine in self._delays.values() for labels, d in mine.items()
            ]
            stages = [
                ((host, *stage, source), each.count, each.sum_ns)
                for (host, source), mine in self._stages.items()
                for stage, each in mine.items()
            ]
            stages_not_shown = self._stages_not_shown
            latest = list(self._latest.items())
            containers = {(host, *labels) for (host, _), named in self._containers.items() for labels in named}
            not_shown, dropped = self._not_shown, self._dropped
        yield _histogram(delays)
        yield from _stage_sums(stages)
        about = f"Stages that are in no counter, because a host has {_MOST_SERIES} already."
        yield CounterMetricFamily("mace_stages_not_shown", about, value=stages_not_shown)
        about = "What a container is called; its id stays when it is renamed."
        info = InfoMetricFamily("mace_container", about, labels=_INFO_LABELS)
        for labels in sorted(containers):
            info.add_metric(labels, {})
        yield info
        about = f"Delays that are in no histogram, because there are {_MOST_SERIES} already."
        yield CounterMetricFamily("mace_delays_not_shown", about, value=not_shown)
        about = "Series that were dropped because their container or device is gone."
        yield CounterMetricFamily("mace_series_dropped", about, value=dropped)
        yield from _ledgers(latest)
        yield from _costs(latest)
        yield from self._sinks()
        yield from self._publishing()
        yield from self._process()

    def _sinks(self) -> Iterator[Metric]:
        rows = CounterMetricFamily("mace_sink_rows", "Rows by what became of them.", labels=("sink", "fate"))
        waiting = GaugeMetricFamily("mace_sink_rows_waiting", "Rows in buffer, spool or under way.", labels=("sink",))
        retries = CounterMetricFamily("mace_sink_retries", "Requests that failed.", labels=("sink",))
        spool = GaugeMetricFamily("mace_sink_spool_bytes", "Bytes that the spool takes on the disk.", labels=("sink",))
        connected = GaugeMetricFamily("mace_sink_connected", "Whether the last request succeeded.", labels=("sink",))
        for name, account in list(self._vitals.accounts.items()):
            for fate in _FATES:
                rows.add_metric((name, fate), getattr(account, fate))
            waiting.add_metric((name,), account.waiting)
            retries.add_metric((name,), account.retries)
            spool.add_metric((name,), account.spool_bytes)
            connected.add_metric((name,), account.connected)
        yield from (rows, waiting, retries, spool, connected)

    def _publishing(self) -> Iterator[Metric]:
        if self._vitals.publishing is None:
            return
        state = self._vitals.publishing()
        records = CounterMetricFamily(
            "mace_publish_records", "Published records by what became of them.", labels=("fate",)
        )
        for fate in ("arrived", "discarded", "set_aside"):
            records.add_metric((fate,), getattr(state, fate))
        yield records
        yield GaugeMetricFamily("mace_publish_records_waiting", "Records that have not arrived.", value=state.waiting)
        about = "Whether there is a session at the broker."
        yield GaugeMetricFamily("mace_publish_connected", about, value=int(state.connected))
        about = "Times that another client of this host's name took the session over."
        yield CounterMetricFamily("mace_publish_taken_over", about, value=state.taken_over)

    def _process(self) -> Iterator[Metric]:
        peaks = GaugeMetricFamily("mace_queue_peak", "The most items that ever waited.", labels=("queue",))
        for name, peak in list(self._vitals.queues.items()):
            peaks.add_metric((name,), peak)
        yield peaks
        figures = process_figures()
        yield CounterMetricFamily("process_cpu_seconds", "Processor time.", value=figures["cpu_ns"] / 1e9)
        yield GaugeMetricFamily("process_resident_memory_bytes", "Memory.", value=figures["resident_bytes"])
        yield GaugeMetricFamily("process_open_fds", "File descriptors.", value=figures["open_files"])

    def health(self) -> tuple[bool, dict[str, Any]]:
        """Return whether the event loop turns, and details."""
        silent_s = time.monotonic() - self._beat_s
        return silent_s < self._config.stalled_s, {"event_loop_silent_s": round(silent_s, 1)}

    def readiness(self) -> tuple[bool, dict[str, Any]]:
        """Return whether results arrive, and details with the state of the sinks."""
        vitals = self._vitals
        since_s = time.monotonic() - vitals.last_results_s if vitals.last_results_s else None
        on_time = vitals.running and since_s is not None and since_s < self._config.stalled_s
        told_of = ("connected", "waiting", "not_stored", "trouble")
        sinks = {name: {k: getattr(a, k) for k in told_of} for name, a in list(vitals.accounts.items())}
        publishing = vitals.publishing() if vitals.publishing is not None else None
        why = vitals.waits_for
        if not why and not on_time:
            why = "no results" if vitals.running else "not measuring yet, or no longer"
        if not why and publishing is not None and not publishing.answered:
            why = f"the broker has not answered yet: {publishing.trouble}"
        told = {"why": why, "since_results_s": since_s and round(since_s, 1), "sinks": sinks}
        if publishing is not None:
            told["publishing"] = asdict(publishing)
        return not why and self.health()[0], told


class _EndpointStream:
    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._header: StreamHeader | None = None

    async def open(self, header: StreamHeader) -> None:
        self._header = header
        self._endpoint.begin(header)

    async def write(self, results: Results | RoundTrips) -> None:
        assert self._header is not None
        if isinstance(results, Results):
            self._endpoint.add(self._header, results)

    async def aclose(self) -> None:
        if self._header is not None:
            self._endpoint.end(self._header)
            self._header = None


def _answer(ok: bool, told: dict[str, Any]) -> Response:
    return JSONResponse({"ok": ok} | told, 200 if ok else 503)


def _mark(series: Mapping[Labels, _Buckets | StageSum], present: Sequence[Device], now_s: float) -> None:
    """Set `gone_s` of each series whose device, or the container whose packets crossed it, is gone."""
    keys, containers = {d.key for d in present}, {"", *(d.container for d in present)}
    for labels, each in series.items():
        if each.device in keys and labels[_CONTAINER] in containers:
            each.gone_s = None
        elif each.gone_s is None:
            each.gone_s = now_s


def _called(
    before: dict[ContainerInfo, float | None], here: frozenset[ContainerInfo], now_s: float
) -> dict[ContainerInfo, float | None]:
    """Return the present names of containers, and earlier names that no other container has.

    Series under an earlier name are shown for a while, and belong to the container. A name must not belong to two
    containers, because a join by it (`group_left`) would fail.
    """
    taken = {name for name, *_ in here}
    gone = {
        labels: now_s if since_s is None else since_s
        for labels, since_s in before.items()
        if labels not in here and labels[0] not in taken
    }
    return gone | dict.fromkeys(here)


def address(listen: str) -> tuple[str, int]:
    """Parse `HOST:PORT` or `[HOST]:PORT` into host and port. Raises `ConfigError`."""
    host, _, port = listen.rpartition(":")
    if not host or not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
        raise ConfigError(f"[sinks.prometheus] listen = {listen!r}, expected ADDRESS:PORT such as 127.0.0.1:9464")
    check_host("[sinks.prometheus] listen", host)
    return host.strip("[]"), int(port)


def _labels(header: StreamHeader, device: Device, direction: str, segment: str) -> Labels:
    place = (header.host, device.container, device.netns_name, device.name, device.kind)
    return (*place, direction.lower(), segment.lower(), header.source)


def _bucketed(bins: Ints, counts: Ints) -> Ints:
    """Return the counts per bucket of a sparse histogram."""
    bucket = np.searchsorted(_EDGE_BINS, bins, side="right")
    return np.bincount(bucket, weights=counts, minlength=len(_OCTAVES) + 1).astype(np.int64)


def _histogram(delays: Sequence[tuple[Labels, int, Ints]]) -> Metric:
    family = HistogramMetricFamily(
        "mace_device_delay_seconds", "How long packets took to cross a device.", labels=_LABELS
    )
    for labels, sum_ns, counts in delays:
        upto = np.cumsum(counts).tolist()
        buckets = [*zip(_EDGES_S, upto, strict=False), ("+Inf", upto[-1])]
        family.add_metric(labels, buckets, sum_value=sum_ns / 1e9)
    return family


def _stage_sums(stages: Sequence[tuple[Labels, int, int]]) -> Iterator[Metric]:
    count = CounterMetricFamily("mace_stages", "Stages by the CPU that worked.", labels=_STAGE_LABELS)
    spent = CounterMetricFamily("mace_stage_seconds", "Time that CPUs worked, or packets waited.", labels=_STAGE_LABELS)
    for labels, number, sum_ns in stages:
        count.add_metric(labels, number)
        spent.add_metric(labels, sum_ns / 1e9)
    yield from (count, spent)


def _ledgers(latest: Sequence[tuple[HostSource, Totals]]) -> Iterator[Metric]:
    records = CounterMetricFamily(
        "mace_records", "Records by category of the ledger.", labels=("host", "source", "category")
    )
    in_flight = GaugeMetricFamily(
        "mace_records_in_flight", "Records of packets whose life has not ended.", labels=("host", "source")
    )
    packets = CounterMetricFamily(
        "mace_packets", "Packets by what holds their records together.", labels=("host", "source", "grade")
    )
    ambiguous = CounterMetricFamily(
        "mace_packets_ambiguous", "Packets that were given up, by what fits them.", labels=("host", "source", "cause")
    )
    for of, totals in latest:
        for category in _CATEGORIES:
            records.add_metric((*of, category), getattr(totals.ledger, category))
        in_flight.add_metric(of, totals.ledger.in_flight)
        for grade in ("ambiguous", "buffer", "content", "exact"):
            packets.add_metric((*of, grade), getattr(totals.grades, grade))
        for cause, count in totals.ambiguous_by_cause().items():
            ambiguous.add_metric((*of, cause), count)
    yield from (records, in_flight, packets, ambiguous)


def _costs(latest: Sequence[tuple[HostSource, Totals]]) -> Iterator[Metric]:
    names = ("host", "source", "hook")
    calls = CounterMetricFamily("mace_probe_calls", "Calls of a hook's probe.", labels=names)
    timed = CounterMetricFamily("mace_probe_timed_calls", "Those of them that were timed.", labels=names)
    spent = CounterMetricFamily("mace_probe_seconds", "Time spent in the timed calls.", labels=names)
    for stream, totals in latest:
        for cost in totals.cost:
            of = (*stream, BY_HOOK[cost.hook].name)
            calls.add_metric(of, cost.calls)
            timed.add_metric(of, cost.timed)
            spent.add_metric(of, cost.timed_ns / 1e9)
    yield from (calls, timed, spent)


def check(config: Config) -> Status:
    """Return whether the configured address can be listened on."""
    listen = config.sinks.prometheus.listen
    try:
        where = address(listen)
        with socket.create_server(where, family=socket.AF_INET6 if ":" in where[0] else socket.AF_INET):
            return Status(True, f"would serve http://{listen}/metrics")
    except ConfigError as error:
        return Status(False, str(error), "see docs/configuration.md")
    except OSError as error:
        return Status(False, f"{listen}: {error.strerror}", "name another with [sinks.prometheus] listen")


def make(config: Config, vitals: Vitals) -> Endpoint:
    """Return the configured endpoint. Raises `ConfigError`."""
    return Endpoint(config.sinks.prometheus, vitals)
