"""Names and defaults that help texts have of parts that take long to import.

Each stands in its part as well, and tests/contract/test_commands.py compares the two.
"""

from __future__ import annotations

from typing import Final

SOURCES: Final = ("auto", "kmod", "bpf", "ftrace")
"""Live sources that can be asked for: `contracts.config.SOURCES`."""
RUNTIMES: Final = ("netns", "docker")
"""What makes the containers of a test network: `mace.lab.Runtime`."""
REMOTE: Final = "remote"
"""The far end of a test network: `mace.lab.REMOTE`."""
FILE_FORMATS: Final = ("mace", "trace.dat", "perfetto", "text", "pcap")
"""Formats that replay: `collector.files.FORMATS`."""
PART_MIB: Final = 64
"""Parts that a replay is cut into: `mace.replaying.assembly.PART_BYTES`."""
QUERY_MEMORY_MIB: Final = 2048
"""What a query may take: `storage.sql.MEMORY_MIB`."""
TOOLS: Final = ("ping", "ping-U", "ping-inetutils", "ping-busybox", "fping", "csv", "dig", "curl")
"""Tools whose output is read: `mace.tools.output.READERS`."""
PACES: Final = ("flood", "10ms")
"""Paces of the experiment: `mace.trials.experiment.PACES`."""
COMPARED: Final = ("kmod", "bpf", "ftrace", "none")
"""What can be compared: `mace.trials.compare.KNOWN`."""
SCENARIOS: Final = (
    "plain",
    "nat",
    "equal_ids",
    "ipv6",
    "udp",
    "tcp_bulk",
    "gso_on",
    "gso_off",
    "fragments",
    "clones",
    "vxlan",
    "loss_1",
    "loss_20",
    "sampling_8",
    "churn",
)
"""What can be verified: `mace.trials.verify.scenarios.BY_NAME`."""
PACKETS: Final = 2000
"""Of a flow in a scenario: `mace.trials.verify.verdict.PACKETS`."""
FLOW_KEYS: Final = ("container", "direction", "proto", "port", "id", "len")
"""Of `mace export perfetto --flow`: `mace.replaying.export.FLOW_KEYS`."""
