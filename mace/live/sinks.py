"""What the command line says of remote sinks: options that change `[sinks.NAME]`."""

from __future__ import annotations

import argparse
from dataclasses import replace

from contracts.config import SinksConfig


def add_options(parser: argparse.ArgumentParser, *, endpoint: bool) -> None:
    """`--influxdb`, `--bucket`, and with `endpoint` `--prometheus`; `configured` takes them over."""
    parser.add_argument("--influxdb", metavar="URL", help="write to this InfluxDB as well")
    parser.add_argument("--bucket", metavar="NAME", help="bucket, or database of a 1.x server (default mace)")
    if endpoint:
        parser.add_argument("--prometheus", metavar="HOST:PORT", help="serve /metrics, /healthz and /readyz here")


def configured(args: argparse.Namespace, sinks: SinksConfig) -> SinksConfig:
    """The configuration with what the options say."""
    influxdb, prometheus = sinks.influxdb, sinks.prometheus
    if getattr(args, "influxdb", None):
        influxdb = replace(influxdb, url=args.influxdb)
    if getattr(args, "bucket", None):
        influxdb = replace(influxdb, bucket=args.bucket)
    if getattr(args, "prometheus", None):
        prometheus = replace(prometheus, listen=args.prometheus)
    return replace(sinks, influxdb=influxdb, prometheus=prometheus)
