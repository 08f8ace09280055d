"""Traffic of `mace demo`: every container sends ping, UDP and TCP to the far end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mace.lab.lifecycle import Lab
from mace.lab.traffic import Flow

PING_INTERVAL_S = 0.01
UDP_PPS = 500.0
TCP_RPS = 400.0


async def traffic(lab: Lab, duration_s: float, say: Callable[[str], None]) -> None:
    """Send a bounded amount of traffic from every container to the far end, for about `duration_s`.

    The kinds are ping over IPv4 and IPv6, UDP and TCP. The rates are low enough that packets do not queue: the
    demonstration is of devices, not of queues.
    """
    pings = max(1, round(duration_s / PING_INTERVAL_S))
    flows: list[Flow[Any]] = []
    for container in lab.containers:
        flows += [
            lab.start_ping(container, count=pings, interval_s=PING_INTERVAL_S, family=4),
            lab.start_ping(container, count=pings, interval_s=PING_INTERVAL_S, family=6),
            lab.start_udp(container, count=max(1, round(duration_s * UDP_PPS)), rate_pps=UDP_PPS, echo=True),
            lab.start_tcp_requests(container, count=max(1, round(duration_s * TCP_RPS)), rate_pps=TCP_RPS),
        ]
    say(f"{len(flows)} flows from {len(lab.containers)} containers for about {duration_s:g} s")
    # A thread pool for the flows alone: asyncio's shared pool is small, and the capture file's writer needs a thread.
    threads = ThreadPoolExecutor(len(flows), "flow")
    try:
        loop = asyncio.get_running_loop()
        await asyncio.gather(*(loop.run_in_executor(threads, flow.wait) for flow in flows))
    finally:
        for flow in flows:
            flow.close()
        threads.shutdown()
