"""Summarises replays of Perfetto traces, for comparison with the expected results beside the golden traces."""

import hashlib
import json
from collections import Counter

from collector.files import FileOptions, recording
from contracts.hooks import Hook
from contracts.records import Batch
from contracts.schema import Delays
from correlator.engine import Engine, EngineConfig


def replayed(path, topology=None, salvage=False):
    """Replay a file and return (header, batches, last results, all delays)."""
    with recording(path, FileOptions(salvage=salvage, topology=topology)).reader() as reader:
        engine = Engine(reader.header.clock.offset_ns, EngineConfig())
        batches, results = [], []
        for item in reader.items():
            if isinstance(item, Batch):
                batches.append(item)
            results += engine.feed(item)
        results.append(engine.finish())
    delays = Delays.concatenate([one.rows.delays for one in results])
    return reader.header, Batch.concatenate(batches), results[-1], delays, reader


def rows(delays, devices):
    """Return a tuple for each delay, without identifiers that differ between replays."""
    return [
        [
            int(delays.utc_ns[i]),
            devices[delays.device[i]].name,
            int(delays.direction[i]),
            int(delays.segment[i]),
            int(delays.position[i]),
            int(delays.delay_ns[i]),
            int(delays.l3_len[i]),
            int(delays.grade[i]),
            int(delays.outcome[i]),
        ]
        for i in range(len(delays))
    ]


def summary(trace, topology):
    """Return header, records by hook, ledger and delays of a trace, for comparison."""
    header, batch, last, delays, source = replayed(trace, topology)
    told = rows(delays, last.rows.devices)
    return {
        "kernel": header.kernel,
        "run": header.run,
        "hooks": list(header.hooks),
        "records": {Hook(hook).name.lower(): count for hook, count in sorted(Counter(batch.hook.tolist()).items())},
        "unresolved": source.decoder.unresolved,
        "ledger": last.totals.ledger.as_dict(),
        "packets": last.totals.packets,
        "delays": len(told),
        "delays_sha256": hashlib.sha256(json.dumps(told).encode()).hexdigest(),
    }
