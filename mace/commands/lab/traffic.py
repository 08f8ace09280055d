"""`mace lab traffic`: sends a bounded amount of traffic between two members of a test network."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from typing import Any

from mace.commands.choices import REMOTE
from mace.commands.console import Console
from mace.commands.options import at_least, whole_at_least, with_lab


@dataclass(frozen=True, slots=True)
class Options:
    """Options and arguments of `mace lab traffic`."""

    kind: str
    lab: str
    sender: str
    to: str
    count: int
    size: int
    rate: float
    ipv6: bool


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mace lab traffic` to the parser."""
    parser.add_argument(
        "kind", choices=("ping", "udp", "tcp"), help="kind of traffic; tcp sends requests over one connection"
    )
    with_lab(parser, "the lab (default lab)", default="lab")
    parser.add_argument("--from", dest="sender", default="c1", metavar="MEMBER", help="the sender (default c1)")
    parser.add_argument("--to", default=REMOTE, metavar="MEMBER", help=f"the receiver (default {REMOTE})")
    parser.add_argument(
        "--count", type=whole_at_least(1), default=100, metavar="N", help="number of packets (default 100)"
    )
    parser.add_argument(
        "--size", type=whole_at_least(1), default=56, metavar="BYTES", help="payload of each packet (default 56)"
    )
    parser.add_argument(
        "--rate", type=at_least(0.1), default=100.0, metavar="N", help="packets per second (default 100)"
    )
    parser.add_argument("--ipv6", action="store_true", help="send over IPv6 instead of IPv4")


def run(options: Options, console: Console) -> int:
    """Send the traffic and print what both ends counted, as JSON."""
    from mace import lab

    place = lab.attach(options.lab)
    shape: dict[str, Any] = {"count": options.count, "size": options.size, "family": 6 if options.ipv6 else 4}
    result: Any
    if options.kind == "ping":
        result = place.ping(options.sender, options.to, interval_s=1 / options.rate, **shape)
    elif options.kind == "udp":
        result = place.udp(options.sender, options.to, rate_pps=options.rate, **shape)
    else:
        result = place.tcp_requests(options.sender, options.to, rate_pps=options.rate, **shape)
    console.json({key: value for key, value in asdict(result).items() if key != "rtts_ns"})
    return 0
