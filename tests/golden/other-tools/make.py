"""Records the files of this folder: one run in the lab, recorded by all tools at once. Kept as a record; not run again.

PYTHONPATH=. python tests/golden/other-tools/make.py      (root)
"""

import json
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np

from collector.files import PCAP_PAIR, FileOptions, recording, recording_of
from contracts.schema import Direction
from tests.integration.test_other_tools_traces import overheads, record, replayed
from tests.perfetto_from_pages import perfetto_from_pages

HERE = Path(__file__).parent
KEPT = ("live.mace", "pages.dat", "trace.txt", "inner.pcap", "outer.pcap")


def main() -> None:
    with tempfile.TemporaryDirectory() as work:
        record(Path(work), 5, 12)
        for name in KEPT:
            shutil.copy(Path(work) / name, HERE / name)
    as_perfetto(HERE)
    shorten(HERE / "trace.txt")
    (HERE / "expected.json").write_text(json.dumps(told(HERE), indent=1) + "\n")


def as_perfetto(place: Path) -> None:
    """Write the records of pages.dat as traced would have written them."""
    offset_ns = recording(place / "live.mace").header.clock.offset_ns
    (place / "pages.pftrace").write_bytes(perfetto_from_pages(place / "pages.dat", offset_ns))


def shorten(path: Path) -> None:
    """Remove the lines of buffers that were never at a device of the lab: the machine's own traffic."""
    lines = path.read_text().splitlines(keepends=True)
    buffers = [re.search(r"skbaddr=(\w+)", line) for line in lines]
    ours = {b[1] for b, line in zip(buffers, lines, strict=True) if b and re.search(r"dev=(?!lo\b)", line)}
    path.write_text("".join(x for b, x in zip(buffers, lines, strict=True) if not b or b[1] in ours))


def told(place: Path) -> dict[str, object]:
    """Return the expected results of each file: delays of packets by direction, and the ledger's records."""
    topology = place / "live.mace"
    found: dict[str, object] = {}
    for name, one in (
        ("live.mace", recording(topology)),
        ("pages.dat", recording(place / "pages.dat", FileOptions(topology=topology))),
        ("pages.pftrace", recording(place / "pages.pftrace", FileOptions(topology=topology))),
        ("trace.txt", recording(place / "trace.txt", FileOptions(topology=topology, clock="mono"))),
        ("pcap", recording_of(PCAP_PAIR, (place / "inner.pcap", place / "outer.pcap"))),
    ):
        _, rows, results = replayed(one)
        found[name] = {
            "records": results[-1].totals.ledger.records,
            "lost": results[-1].totals.ledger.lost,
            **{
                way.name.lower(): np.asarray(overheads(rows, way)[1]).tolist()
                for way in (Direction.EGRESS, Direction.INGRESS)
            },
        }
    return found


if __name__ == "__main__":
    main()
