"""Names and defaults that help texts have of parts that take long to import.

Each stands in its part as well, but for the names of live sources; tests/contract/test_commands.py compares the two.
"""

from __future__ import annotations

from typing import Final

from contracts.sources import LIVE

SOURCES: Final = ("auto", *LIVE)
"""Names of the live sources: `contracts.config.SOURCES`."""
RUNTIMES: Final = ("netns", "docker", "podman", "containerd", "apptainer")
"""Runtimes for the containers of a test network: `mace.lab.Runtime`."""
EXPERIMENT_RUNTIMES: Final = (*RUNTIMES, "apptainer-ptp")
"""Runtimes that the experiment compares: `mace.trials.experiment.plan.RUNTIMES`."""
LAYOUTS: Final = ("bridge", "overlay", "flannel", "calico", "ptp", "ipip", "cilium", "netkit_l2", "netkit_l3")
"""Layouts of a test network: `mace.lab.Layout`."""
OVERLAY: Final = "overlay"
"""The layout with two hosts: `mace.lab.Layout.OVERLAY`."""
FAR_ENDS: Final = ("namespace", "guest")
"""Where the far end of a test network is: `mace.lab.FarEnd`."""
REMOTE: Final = "remote"
"""The far end of a test network: `mace.lab.REMOTE`."""
FILE_FORMATS: Final = ("mace", "trace.dat", "perfetto", "text", "pcap")
"""Formats of recordings: `collector.files.FORMATS`."""
PART_MIB: Final = 64
"""Size of the parts that a replay divides recordings into, MiB: `mace.replaying.assembly.PART_BYTES`."""
QUERY_MEMORY_MIB: Final = 2048
"""Memory limit of a query, MiB: `storage.sql.MEMORY_MIB`."""
TOOLS: Final = ("ping", "ping-U", "ping-inetutils", "ping-busybox", "fping", "csv", "dig", "curl")
"""Tools whose output can be parsed: `mace.tools.output.READERS`."""
PACES: Final = ("flood", "10ms", "50ms", "200ms", "1s")
"""Paces of the experiment: `mace.trials.experiment.plan.PACES`."""
LOADS: Final = ("none", "cpu", "io", "quota")
"""Loads of the experiment: `mace.trials.experiment.load.LOADS`."""
COMPARED: Final = (*LIVE, "none")
"""Sources of `mace compare`: `mace.trials.compare.KNOWN`."""
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
    "overlay",
    "flannel",
    "calico",
    "ptp",
    "ipip",
    "cilium",
    "netkit_l2",
    "netkit_l3",
    "loss_1",
    "loss_20",
    "sampling_8",
    "churn",
)
"""Scenarios of `mace verify`: `mace.trials.verify.scenarios.BY_NAME`."""
PACKETS: Final = 2000
"""Packets of each flow in a scenario: `mace.trials.verify.verdict.PACKETS`."""
FLOW_KEYS: Final = ("container", "direction", "proto", "port", "id", "len")
"""Keys of `mace export perfetto --flow`: `mace.replaying.export.FLOW_KEYS`."""
SERVE_AT: Final = "127.0.0.1:8300"
"""Address of the page that `mace serve` serves."""
