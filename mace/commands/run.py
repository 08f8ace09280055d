"""`mace run`: measures live, prints a table, and writes rows and windows to the store."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from contracts.errors import UsageError
from mace.commands.choices import SERVE_AT
from mace.commands.console import Console
from mace.commands.options import (
    BrokerOptions,
    CaptureOptions,
    FilterOptions,
    ReaderOptions,
    SinkOptions,
    with_broker,
    with_capture,
    with_config,
    with_cpus,
    with_duration,
    with_filter,
    with_format,
    with_lab,
    with_no_rows,
    with_prometheus,
    with_readers,
    with_record,
    with_seal,
    with_sinks,
    with_store,
)

if TYPE_CHECKING:
    from contracts.config import Config


@dataclass(frozen=True, slots=True)
class Options:
    """Options and arguments of `mace run`."""

    store: Path | None
    no_store: bool
    sinks: SinkOptions
    prometheus: str | None
    serve: str | None
    """Address of the page; None for no page."""
    readers: ReaderOptions
    publish: str | None
    """Address of the broker; "" for the configured one."""
    publish_as: str
    spool: Path | None
    broker: BrokerOptions
    lab: str | None
    duration: float | None
    capture: CaptureOptions
    filter: FilterOptions
    record: Path | None
    seal: Path | None
    no_rows: bool
    cpus: bool
    softirqs: bool
    waiting: bool
    config: Path | None
    format: str


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mace run` to the parser."""
    with_store(parser, "write rows and windows to this store")
    parser.add_argument("--no-store", action="store_true", help="only print the figures; write no store")
    with_sinks(parser)
    with_prometheus(parser)
    parser.add_argument(
        "--serve",
        nargs="?",
        const=SERVE_AT,
        metavar="ADDRESS",
        help=f"serve the page of `mace serve` beside the measurement, at HOST:PORT (default {SERVE_AT})",
    )
    with_readers(parser)
    parser.add_argument(
        "--publish",
        nargs="?",
        const="",
        metavar="URL[,URL]",
        help="publish to an MQTT broker (mqtt://HOST or mqtts://HOST), or to one of several by this host's name"
        " (default: the configured ones)",
    )
    parser.add_argument(
        "--publish-as",
        choices=("records", "delays", "windows"),
        default="records",
        help="publish the raw records, for `mace ingest` (default), or the computed delays or windows",
    )
    parser.add_argument(
        "--spool", type=Path, metavar="DIR", help="keep messages here until the broker has acknowledged them"
    )
    with_broker(parser)
    with_lab(parser)
    with_duration(parser)
    with_capture(parser)
    with_filter(parser)
    with_record(parser)
    with_seal(parser, "the store, and the capture file of --record,")
    with_no_rows(parser)
    with_cpus(parser)
    parser.add_argument(
        "--softirqs",
        action="store_true",
        help="--cpus, and how long receive softirqs wait and whether ksoftirqd runs them (by ftrace; needs root)",
    )
    parser.add_argument(
        "--waiting",
        action="store_true",
        help="also measure how much of each delivery the reader waited for a CPU (by ftrace; needs root)",
    )
    with_config(parser)
    with_format(parser)


def run(options: Options, console: Console) -> int:
    """Measure until the duration is over or Ctrl-C, then print the figures."""
    from mace.commands import settings
    from mace.live import publish

    if options.no_store and (options.cpus or options.softirqs):
        raise UsageError("--cpus and --softirqs write to the store: leave out --no-store")
    if options.seal and options.no_store and not options.record:
        raise UsageError("--seal seals the store and the capture file of --record: leave out --no-store, or --seal")
    configured = _configured(options)
    seal = settings.seal_key(options.seal)
    tee = settings.tee(options.record, seal)
    publisher = None
    if options.publish is not None and options.publish_as == "records":
        publisher = publish.publisher(configured)
    session = settings.session(configured, options.format, console)
    with _page(options, Path(configured.store.path), console):
        summary = session.measure(
            settings.lasting(options.duration),
            store=None if options.no_store else Path(configured.store.path),
            tee=publish.both(tee, publisher),
            publishing=publisher.state if publisher is not None else None,
            seal=seal,
        )
    settings.show(summary, options.format, console)
    if publisher is not None:
        console.complain(publish.line(publisher))
    return 0


@contextmanager
def _page(options: Options, store: Path, console: Console) -> Iterator[None]:
    """Serve the page of the run's store for the block, if the options ask for it."""
    if options.serve is None:
        yield
        return
    if options.no_store:
        raise UsageError("--serve shows the store: leave out --no-store")
    from mace.serving import access, server

    where = access.address(options.serve)
    readers = access.access(where[0], options.readers.token_file, options.readers.allow_host)
    with server.serving(store, where, readers, made_later=True) as page:
        console.complain(f"the page is at {page.url}{access.warning(where[0])}")
        yield


def _configured(options: Options) -> Config:
    from mace.commands import settings

    made = settings.configured(
        options.config,
        capture=options.capture,
        chosen=options.filter,
        store=options.store,
        no_rows=options.no_rows,
        cpus=options.cpus or options.softirqs,
        softirqs=options.softirqs,
        waiting=options.waiting,
        sinks=options.sinks,
        prometheus=options.prometheus,
        place=settings.lab_of(options.lab),
    )
    if options.publish is None:
        return made
    made = settings.with_broker(made, options.publish, options.broker)
    publish, rows = made.publish, made.sinks.mqtt
    if options.spool:
        publish, rows = replace(publish, spool=str(options.spool)), replace(rows, spool=str(options.spool))
    if options.publish_as != "records":
        rows = replace(rows, publish=options.publish_as)
    return replace(made, publish=publish, sinks=replace(made.sinks, mqtt=rows))
