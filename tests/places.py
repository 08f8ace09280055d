"""Paths of the repository and its golden files, independent of a test's own folder."""

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
"""Name of each format in `collector.files` -> a golden recording."""
