"""Round trips with known contents, and a store that has them."""

import asyncio
from dataclasses import replace

import numpy as np

from contracts.config import Config
from contracts.ledger import Ledger
from contracts.results import Totals
from contracts.schema import NOT_TOLD, Grades, RoundTripRows, RoundTrips
from mace.live import runs
from tests.made_results import START_NS, header

COUNT = 400
LEDGER = Ledger(records=4_000, matched=3_993, unmatched=7, lost=3)
TOTALS = Totals(START_NS + 10**10, LEDGER, packets=2 * COUNT, grades=Grades(exact=2 * COUNT))


def made_trips(count=COUNT, *, probes=True, **changes):
    """Return round trips of a ping: the last two have no reply, and the very last no time either."""
    rng = np.random.default_rng(5)
    tool, egress, ingress = rng.integers(80_000, 120_000, count), rng.integers(1, 20_000, count), np.full(count, 9_000)
    reason = np.zeros(count, "u1")
    reason[-2:] = 1
    utc_ns = START_NS + np.arange(count) * 10**7
    utc_ns[-1] = NOT_TOLD
    tool[-2:] = NOT_TOLD
    bound = tool - egress - ingress
    rows = RoundTripRows(
        utc_ns=utc_ns,
        seq=np.arange(1, count + 1),
        tool_rtt_ns=tool,
        host_rtt_ns=bound + 4_000 if probes else np.full(count, NOT_TOLD),
        nic_rtt_ns=bound - 20_000,
        egress_ns=egress,
        ingress_ns=ingress,
        grade=np.full(count, 3, "u1"),
        reason=reason,
        temporal_error_ns=np.full(count, NOT_TOLD),
        host_rtt_lower_bound_ns=bound,
        tracer_cost_ns=np.full(count, 2_000 if probes else NOT_TOLD),
        tracer_cost_error_ns=np.full(count, 700 if probes else NOT_TOLD),
    )
    return replace(RoundTrips("ping", "c1", "c1", ("paired", "no_reply"), rows, "id-1", "203.0.113.2"), **changes)


def kept(path, trips, run="ping-1", **changes):
    asyncio.run(runs.keep(Config(), header(run, **changes), trips, TOTALS, path))
