"""Where the repository and its golden files are, for every test wherever it stands."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
GOLDEN = TESTS / "golden"
DOCS = ROOT / "docs"

GOLDEN_FILES = {
    "mace": (GOLDEN / "other-tools" / "live.mace",),
    "trace.dat": (GOLDEN / "other-tools" / "pages.dat",),
    "perfetto": (GOLDEN / "other-tools" / "pages.pftrace",),
    "text": (GOLDEN / "other-tools" / "trace.txt",),
    "pcap pair": (GOLDEN / "other-tools" / "inner.pcap", GOLDEN / "other-tools" / "outer.pcap"),
}
"""A recording of each format that is read, by its name in `collector.files`."""
