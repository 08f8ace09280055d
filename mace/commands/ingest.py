"""`mace ingest`: receives the streams of many hosts from an MQTT broker and writes their delays to one store."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from mace.commands.console import Console
from mace.commands.options import (
    JSON,
    BrokerOptions,
    SinkOptions,
    with_broker,
    with_config,
    with_cpus,
    with_duration,
    with_format,
    with_no_rows,
    with_prometheus,
    with_sinks,
    with_store,
)


@dataclass(frozen=True, slots=True)
class Options:
    """Options and arguments of `mace ingest`."""

    address: str | None
    store: Path | None
    shard: str
    no_rows: bool
    cpus: bool
    sinks: SinkOptions
    prometheus: str | None
    broker: BrokerOptions
    duration: float | None
    config: Path | None
    format: str


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mace ingest` to the parser."""
    parser.add_argument(
        "--broker",
        dest="address",
        metavar="URL[,URL]",
        help="the MQTT broker, mqtt://HOST[:PORT] or mqtts://HOST[:PORT], or several, separated by commas",
    )
    with_store(parser, "write rows and windows to this store; each ingesting process needs its own")
    parser.add_argument(
        "--shard", metavar="I/N", default="1/1", help="serve only the I-th of N parts of the hosts (default 1/1: all)"
    )
    with_no_rows(parser)
    with_cpus(parser)
    with_sinks(parser)
    with_prometheus(parser)
    with_broker(parser)
    with_duration(parser)
    with_config(parser)
    with_format(parser)


def run(options: Options, console: Console) -> int:
    """Serve the hosts until the duration is over or Ctrl-C, then print the counters."""
    from contracts.topics import Shard
    from mace.commands import settings

    made = settings.configured(
        options.config,
        store=options.store,
        no_rows=options.no_rows,
        cpus=options.cpus,
        sinks=options.sinks,
        prometheus=options.prometheus,
    )
    made = settings.with_broker(made, options.address, options.broker)
    shard = Shard.parse(options.shard)
    from mace.live import ingest
    from storage.broker import Brokers

    found = ingest.serve(Brokers(made.mqtt), Path(made.store.path), made, shard, options.duration)
    if options.format == JSON:
        console.json(found)
    else:
        told = {name: value for name, value in found.items() if name != "sinks"}
        console.line(" · ".join(f"{name.replace('_', ' ')} {value}" for name, value in told.items()))
    return 0
