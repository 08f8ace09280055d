"""Makes stores with given results."""

import asyncio
from itertools import pairwise

import numpy as np

from contracts.ledger import Ledger
from correlator.windows import Windows
from storage.embedded import EmbeddedStore
from storage.segments import HOUR_NS
from tests.made_results import START_NS, header, make_delays, make_results, with_rows


def fill(path, results, run="run-1", *, head=None, **changes):
    """Write all results as one run; returns the closed sink."""

    async def write():
        sink = EmbeddedStore(path, **({"fsync": False, "flush_interval_s": 60.0} | changes))
        await sink.open(head or header(run))
        for each in results:
            await sink.write(each)
        await sink.aclose()
        return sink

    return asyncio.run(write())


_NS = 1_000_000_000
_EVERY_S = 20
BEGIN_NS = START_NS // (24 * HOUR_NS) * 24 * HOUR_NS + 21 * HOUR_NS
"""21:00, so that a run of six hours crosses a midnight."""


async def flushed(sink):
    await sink._submit()
    if sink._encoding is not None:
        await sink._encoding


async def write_run(path, name, *, rows, seed=0, minutes=45, ends="closed", hours=6, begin_ns=BEGIN_NS, seal=None):
    """Write a run of two containers with a flush every `minutes`, merging as it goes.

    A packet comes every 20 s. The run is closed, or left as a killed one.
    """
    delays = make_delays(
        hours * 3600 // _EVERY_S, containers=2, seed=seed, start_ns=begin_ns, gap_ns=_EVERY_S * _NS * 4 // 5
    )
    windows, sink = Windows(), EmbeddedStore(path, rows=rows, flush_interval_s=3600, fsync=False, seal=seal)
    await sink.open(header(name))
    edges = np.arange(begin_ns, begin_ns + hours * HOUR_NS + 1, minutes * 60 * _NS)
    total = 0
    for number, (begin, end) in enumerate(pairwise(edges)):
        here = delays[(delays.utc_ns >= begin) & (delays.utc_ns < end)]
        total += len(here)
        windows.add(here.utc_ns, here.device, here.direction, here.segment, here.delay_ns)
        last = ends == "closed" and number == len(edges) - 2
        # Windows come some seconds after their end, as in a live run.
        found = windows.close(None if last else int(end) - 7 * _NS)
        results = make_results(
            here,
            containers=2,
            ledger=Ledger(records=total, matched=total),
            packets=total,
            upto_utc_ns=int(end),
        )
        await sink.write(with_rows(results, windows=found))
        await flushed(sink)
        sink.merge()
    if ends == "closed":
        await sink.aclose()
    else:
        sink._closing.set()
        sink._ticker.cancel()
        sink._release()
