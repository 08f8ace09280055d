"""Makes the golden capture of wire version 1. Kept as a record; not run again.

PYTHONPATH=. python tests/golden/wire-1/make.py
"""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from contracts.hooks import Hook
from contracts.interfaces import StreamHeader, StreamItem
from contracts.records import Batch
from contracts.topology import Sighting, Topology
from tests.made_capture import HEADER, TOPOLOGY, batches, capture_bytes, digest, traffic

HERE = Path(__file__).parent


def stream() -> tuple[StreamHeader, list[StreamItem]]:
    """Return a stream with every message, column encoding and width, both forms of topology, and a gap."""
    first, last = traffic(2_000)[:1_500], traffic(2_000)[1_500:]
    end_ns = int(last.ts_ns[-1])
    later = replace(
        TOPOLOGY,
        from_ns=int(first.ts_ns[-1]) + 1,
        devices=TOPOLOGY.devices[:-1],
        sightings=(*TOPOLOGY.sightings, Sighting("eth0", 4026532003, 2)),
    )
    many = replace(later, from_ns=end_ns + 1, sightings=(*later.sightings, *(Sighting(f"v{n}") for n in range(4_100))))
    more = replace(many, sightings=(*many.sightings, Sighting("last0")))
    lost = Batch.of(1, ts_ns=[end_ns + 5], skb_id=[end_ns + 900], l3_len=[77], cpu=[1], hook=[Hook.LOST])
    hooks = [hook for hook in Hook if hook not in (Hook.INVALID, Hook.LOST)]
    wide = Batch.of(
        8,
        ts_ns=end_ns + np.cumsum([1_000, 0, 1, 2**8, 2**16, 2**33, 2**44, 2**60]),
        skb_id=np.array([0, 1, 2**16, 2**32, 2**63, 2**64 - 1, 5, 5], "u8"),
        dev=[0, 4_000, 0, 4_110, 1, 1, 1, 1],
        l3_len=[0, 2**32 - 1, 1, 2, 3, 4, 5, 6],
        cpu=[0, 1, 1, 0, 65_535, 0, 256, 0],
        drop_reason=[0, 0, 0, 0, 0, 0, 0, 300],
        gso_segs=[45] * 8,
        hook=hooks,
    )
    return HEADER, [TOPOLOGY, *batches(first, 700), Batch.empty(), later, last, many, more, lost, wide]


if __name__ == "__main__":
    header, items = stream()
    content = capture_bytes(items, header)
    (HERE / "capture.mace").write_bytes(content)
    expected = {
        "bytes": len(content),
        "items": [f"Batch {len(item)}" if isinstance(item, Batch) else "Topology" for item in items],
        "records": sum(len(item) for item in items if isinstance(item, Batch)),
        "lost": sum(item.lost for item in items if isinstance(item, Batch)),
        "columns_sha256": digest(items),
        "header": asdict(header),
        "topologies": [asdict(item) for item in items if isinstance(item, Topology) and len(item.sightings) < 100],
        "sightings": [len(item.sightings) for item in items if isinstance(item, Topology)],
        "last_sighting": "last0",
        "last_batch": {name: column.tolist() for name, column in items[-1].columns()},
    }
    (HERE / "expected.json").write_text(json.dumps(expected, indent=2) + "\n")
