"""Rate of pairing two packet captures, on one core; target: 1 million packets per second of both files together.

    pcap_pairs          packets/s, files in the page cache -> records of pairs in time order
    pcap_pairs_windows  packets/s, files in the page cache -> the correlator's windows

The peer is `tcpdump -r`, which prints the same two files to /dev/null: the cost of reading and printing in C, without
any matching. All times are CPU times, because no part waits.
"""

import resource
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np

from collector.memory import keep_freed_memory
from collector.pcap.source import PcapPairReader
from contracts.errors import MaceError
from correlator.configured import REPLAY_SLICE_NS
from correlator.engine import Engine, EngineConfig
from tests.benchmark.figures import figure, folder, one_core
from tests.made_pcap import through_nat, udp_frames, written

PACKETS = 400_000
ROUNDS = 5


def made(place: Path) -> tuple[Path, Path]:
    """Write captures of a UDP flood at both devices: each packet 5 to 60 µs later at the outer one, some reordered."""
    frames, utc_ns = udp_frames(PACKETS)
    later = utc_ns + np.random.default_rng(5).integers(5_000, 60_000, PACKETS)
    order = np.argsort(later, kind="stable")
    inner, outer = place / "inner.pcap", place / "outer.pcap"
    inner.write_bytes(written(frames, utc_ns))
    outer.write_bytes(written(through_nat(frames)[order], later[order]))
    return inner, outer


def once(inner: Path, outer: Path, *, windows: bool) -> float:
    """Return packets of both files per second."""
    begin = time.process_time()
    with PcapPairReader(inner, outer) as reader:
        engine = Engine(reader.header.clock.offset_ns, EngineConfig(rows=False, slice_ns=REPLAY_SLICE_NS))
        for item in reader.items():
            if windows:
                engine.feed(item)
        if windows:
            engine.finish()
    if reader.pairs != PACKETS:
        raise MaceError(f"{reader.pairs} pairs of {PACKETS}")
    return reader.packets / (time.process_time() - begin)


def printed(inner: Path, outer: Path) -> float:
    begin = _of_children_s()
    for path in (inner, outer):
        subprocess.run(
            ["tcpdump", "-n", "-r", str(path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True
        )
    return 2 * PACKETS / (_of_children_s() - begin)


def _of_children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def read() -> list[dict[str, Any]]:
    with folder() as place, one_core():
        keep_freed_memory()
        inner, outer = made(place)
        once(inner, outer, windows=True)
        pairs, windows, peer = [], [], []
        for _ in range(ROUNDS):
            pairs.append(once(inner, outer, windows=False))
            windows.append(once(inner, outer, windows=True))
            peer.append(printed(inner, outer))
    other = statistics.median(peer)
    return [
        figure("pcap_pairs", "packets/s", pairs, "tcpdump -r", other),
        figure("pcap_pairs_windows", "packets/s", windows),
    ]
