"""Paths of the repository, its golden files and the machine's programs, independent of a test's own folder."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
GOLDEN = TESTS / "golden"
DOCS = ROOT / "docs"

PROGRAM_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin"
"""Where programs are searched: servers are in folders that a user's PATH often lacks."""

GOLDEN_FILES = {
    "mace": (GOLDEN / "other-tools" / "live.mace",),
    "trace.dat": (GOLDEN / "other-tools" / "pages.dat",),
    "perfetto": (GOLDEN / "other-tools" / "pages.pftrace",),
    "text": (GOLDEN / "other-tools" / "trace.txt",),
    "pcap pair": (GOLDEN / "other-tools" / "inner.pcap", GOLDEN / "other-tools" / "outer.pcap"),
}
"""Name of each format in `collector.files` -> a golden recording."""
