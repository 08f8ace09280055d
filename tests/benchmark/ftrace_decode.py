"""Rate of decoding trace ring pages into columns of records, on one core.

    ftrace_decode           events/s, pages in memory -> batch, in pieces as large as the source decodes
    ftrace_decode_quiet     events/s, pages in memory -> batch, 16 pages at a time (a host with some 25,000 events/s)
    ftrace_take_read        events/s read from the kernel by read(2)
    ftrace_take_mmap        events/s read from the kernel's mapped memory; the peer is read(2)

The pages hold a flood in the lab (UDP and ping, one container on a bridge behind NAT); where there is no lab or no
tracefs, made-up pages of the same mix, and no figures for the kernel's part.
"""

import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from collector.ftrace import tracefs
from collector.ftrace.rings import MmapRing, PageBuffer, ReadRing
from collector.ftrace.source import FtraceSource
from collector.machine.kernel import online_cpus
from collector.memory import keep_freed_memory
from collector.pages.decoding import PageDecoder, Stretch, page_buffer
from collector.pages.formats import EventFormat, PageLayout, parse_format, parse_header_page
from contracts.arrays import Bytes
from contracts.errors import MaceError
from contracts.hooks import TRACEPOINTS
from mace.lab import Spec, running
from tests import ring_pages

ROUNDS = 15
CHUNK_PAGES, QUIET_PAGES = 512, 16
DATAGRAMS, PINGS = 25_000, 5_000
RING_KIB = 32 * 1024


def _flood() -> None:
    with running(Spec()) as lab:
        lab.udp(count=DATAGRAMS)
        lab.ping(count=PINGS, flood=True)


def _capture(kind: type[ReadRing] | type[MmapRing]) -> tuple[PageLayout, list[EventFormat], Bytes, float]:
    """Return pages of a flood, their layout, and the seconds per event that reading them from the kernel took."""
    instance = tracefs.Instance.create(tracefs.find())
    try:
        instance.set_clock("mono")
        instance.set_option("record-cmd", on=False)
        instance.set_ring_size(RING_KIB)
        layout = parse_header_page(instance.header_page())
        formats = [parse_format(h.tracepoint, instance.event_format(h.tracepoint)) for h in TRACEPOINTS]
        cpus = online_cpus()
        rings = [kind(instance.cpu(cpu) / "trace_pipe_raw", layout) for cpu in cpus]
        try:
            for hook in TRACEPOINTS:
                instance.enable(hook.tracepoint)
            instance.record(on=True)
            _flood()
            instance.record(on=False)
            buffer = PageBuffer(layout, CHUNK_PAGES)
            pieces, spent = [], 0.0
            for ring in rings:
                empty = False
                while not empty:
                    start = time.perf_counter()
                    taken = ring.take(buffer)
                    spent += time.perf_counter() - start
                    pieces.append(buffer.matrix[: taken.pages].copy())
                    empty = taken.empty
            events = sum(instance.stats(cpu).read for cpu in cpus)
        finally:
            for ring in rings:
                ring.close()
    finally:
        instance.remove()
    return layout, formats, np.concatenate(pieces), spent / events


def _synthetic() -> tuple[PageLayout, list[EventFormat], Bytes]:
    layout, formats = ring_pages.layout(), ring_pages.formats()
    rng = np.random.default_rng(1)
    pages = []
    for _ in range(2048):
        page = ring_pages.Page(layout, 10**12)
        while True:
            form = formats[rng.integers(len(formats))]
            name = (b"eth0", b"veth-c1", b"br0", b"out0")[rng.integers(4)] if "name" in form.fields else None
            values = {"skbaddr": 0xFFFF888000000000 + 256 * int(rng.integers(64))}
            if not page.event(ring_pages.payload(form, name=name, **values), int(rng.integers(200, 2000))):
                break
        pages.append(np.frombuffer(page.bytes(), np.uint8))
    return layout, formats, np.stack(pages)


def _decode_rates(
    layout: PageLayout, formats: Sequence[EventFormat], pages: Bytes, chunk: int
) -> tuple[list[float], int]:
    decoder = PageDecoder(layout, formats)
    buffer = page_buffer(layout, chunk)
    rates, events = [], 0
    for _ in range(ROUNDS + 1):
        spent, events = 0.0, 0
        for at in range(0, len(pages) - chunk + 1, chunk):
            buffer[: chunk * layout.page_size] = pages[at : at + chunk].ravel()
            start = time.perf_counter()
            events += len(decoder.decode(buffer, [Stretch(0, chunk)])[0].batch)
            spent += time.perf_counter() - start
        rates.append(events / spent)
    return rates[1:], events  # the first round touches memory and code for the first time


def _row(name: str, rates: Sequence[float], n: int, peer: str = "", peer_rates: Sequence[float] = ()) -> dict[str, Any]:
    value = statistics.median(rates)
    peer_value = statistics.median(peer_rates) if peer_rates else None
    return {
        "name": name,
        "value": round(value),
        "unit": "events/s",
        "peer": peer,
        "peer_value": peer_value and round(peer_value),
        "ratio": peer_value and round(value / peer_value, 3),
        "n": n,
        "spread": round((max(rates) - min(rates)) / value, 3),
    }


def _kernel_rates(kind: Callable[[], float]) -> list[float]:
    return [1 / kind() for _ in range(3)]


def run() -> list[dict[str, Any]]:
    """Return one row per figure: medians of rounds; `spread` is (max - min) / median."""
    before = os.sched_getaffinity(0)
    keep_freed_memory()  # like the source
    rows = []
    try:
        if FtraceSource.check().ok:
            layout, formats, pages, _ = _capture(ReadRing)
        else:
            layout, formats, pages = _synthetic()
        os.sched_setaffinity(0, {max(before)})
        rates, events = _decode_rates(layout, formats, pages, min(CHUNK_PAGES, len(pages)))
        rows.append(_row("ftrace_decode", rates, events))
        rates, events = _decode_rates(layout, formats, pages[:2048], QUIET_PAGES)
        rows.append(_row("ftrace_decode_quiet", rates, events))
        os.sched_setaffinity(0, before)
        if FtraceSource.check().ok:
            by_read = _kernel_rates(lambda: _capture(ReadRing)[3])
            rows.append(_row("ftrace_take_read", by_read, len(by_read)))
            try:
                by_mmap = _kernel_rates(lambda: _capture(MmapRing)[3])
            except MaceError:
                return rows  # Linux before 6.10 cannot map the ring
            rows.append(_row("ftrace_take_mmap", by_mmap, len(by_mmap), "read(2)", by_read))
    finally:
        os.sched_setaffinity(0, before)
    return rows


if __name__ == "__main__":
    for row in run():
        print(json.dumps(row))
