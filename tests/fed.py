"""Feeds made-up results into a configured sink at a given pace, as a live run would."""

import asyncio
import time

from contracts.config import Config, InfluxConfig, SinksConfig
from contracts.vitals import Vitals
from storage import wanted_sinks
from tests.durations import S
from tests.made_results import HEADER, START_NS, make_delays, make_results, make_windows, topology

STEP_S = 0.05
CONTAINERS = 2


def influx(url, spool, **changes):
    """Return a configuration of InfluxDB that fails fast and flushes often."""
    chosen = {"flush_interval_s": 0.1, "retry_max_s": 0.3, "close_s": 30.0} | changes
    return Config(sinks=SinksConfig(influxdb=InfluxConfig(url=url, spool=str(spool), **chosen)))


def batches(rows, steps, *, start_ns=START_NS):
    """Return `steps` successive results of about `rows / steps` rows each, with a window for each second."""
    packets = rows * 2 // 13 // steps
    second = 0
    for step in range(steps):
        begin = start_ns + int(step * STEP_S * S)
        delays = make_delays(
            packets, containers=CONTAINERS, seed=step, start_ns=begin, first_packet=step * packets, gap_ns=200
        )
        windows = ()
        if begin // S > second:
            second = begin // S
            windows = make_windows(delays[:50])
        yield make_results(delays, containers=CONTAINERS, windows=windows, packets=packets)


def feed(config, results, *, pace=True, live=True, during=None, header=HEADER):
    """Run the sinks of `config` on the results and return their accounts by name.

    `pace`: write a batch every `STEP_S`, whatever the sinks do. `during`: a coroutine function that runs meanwhile.
    """
    vitals = Vitals(live=live)

    async def work():
        sinks = wanted_sinks(config, vitals)
        for sink in sinks:
            await sink.open(header)
        vitals.running = True
        other = asyncio.create_task(during()) if during else None
        begin = time.monotonic()
        for number, each in enumerate(results):
            vitals.got_on(items=1, results=1)
            for sink in sinks:
                await sink.write(each)
            if pace:
                await asyncio.sleep(max(begin + number * STEP_S - time.monotonic(), 0))
        if other:
            await other
        for sink in reversed(sinks):
            await sink.aclose()

    asyncio.run(work())
    return vitals.accounts


DEVICES = topology(CONTAINERS)
