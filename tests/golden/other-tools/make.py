"""How the files here were made: one run in the lab, by all means at once. Ran once; it is here to be read.

PYTHONPATH=. python tests/golden/other-tools/make.py      (root)
"""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np

from collector.files import PCAP_PAIR, FileOptions, recording, recording_of
from mace.schema import Direction
from tests.integration.test_other_tools_traces import overheads, record, replayed

HERE = Path(__file__).parent
KEPT = ("live.mace", "pages.dat", "trace.txt", "inner.pcap", "outer.pcap")


def main() -> None:
    with tempfile.TemporaryDirectory() as work:
        record(Path(work), 5, 12)
        for name in KEPT:
            shutil.copy(Path(work) / name, HERE / name)
    (HERE / "expected.json").write_text(json.dumps(told(HERE), indent=1) + "\n")


def told(place: Path) -> dict[str, object]:
    """What must come out of each: packets by direction with their delays, and the ledger's records."""
    topology = place / "live.mace"
    found: dict[str, object] = {}
    for name, one in (
        ("live.mace", recording(topology)),
        ("pages.dat", recording(place / "pages.dat", FileOptions(topology=topology))),
        ("trace.txt", recording(place / "trace.txt", FileOptions(topology=topology, clock="mono"))),
        ("pcap", recording_of(PCAP_PAIR, (place / "inner.pcap", place / "outer.pcap"))),
    ):
        _, rows, results = replayed(one)
        found[name] = {
            "records": results[-1].ledger.records,
            "lost": results[-1].ledger.lost,
            **{
                way.name.lower(): np.asarray(overheads(rows, way)[1]).tolist()
                for way in (Direction.EGRESS, Direction.INGRESS)
            },
        }
    return found


if __name__ == "__main__":
    main()
