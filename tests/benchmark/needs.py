"""Programs and headers that each group of benchmarks needs, checked before the first benchmark starts.

The table of `./dev` lists the packages that provide them; this file only lists the needs.
"""

import re
import shutil
from pathlib import Path

from tests.places import PROGRAM_PATH, ROOT

DEV = ROOT / "dev"
_ROW = re.compile(r"^(?:run|test|bench|kernel)\|([^|]+)\|([^|]+)\|", re.MULTILINE)

LAB = ("ip", "nft", "sysctl", "ping")
QEMU = ("qemu-system-x86_64", "/usr/lib/qemu/virtiofsd", "busybox", "debootstrap", "depmod", "gcc", "make")
LIBTRACECMD = (
    *("gcc", "pkg-config", "/usr/include/trace-cmd/trace-cmd.h"),
    *("/usr/include/tracefs/tracefs.h", "/usr/include/traceevent/event-parse.h"),
)

NEEDS: dict[str, tuple[str, ...]] = {
    "cli_start": (),
    "top_cost": (),
    "wire": (),
    "seal_cost": (),
    "ftrace_decode": LAB,
    "ring_drain": (),
    "capture_to_windows": LAB,
    "capture_to_rows": LAB,
    "store": (),
    "report_cpus": (),
    "spark_read": ("java",),
    "vs_netdev_times": (*LAB, "perf"),
    "vs_bpftrace_text": (*LAB, "bpftrace"),
    "live_flood": LAB,
    "live_dead_database": (*LAB, "influxd"),
    "windows_memory": LAB,
    "visibility": (*LAB, "influxd"),
    "live_soak": LAB,
    "host_rtt_bias": LAB,
    "kmod_vs_ftrace": QEMU,
    "kmod_kinds": QEMU,
    "bpf": LAB,
    "perfetto_read": (),
    "perfetto_write": (),
    "sizing": ("influxd",),
    "encode": (),
    "influx_write": ("influxd",),
    "victoria_write": (),
    "mqtt_ingest": ("mosquitto",),
    "fleet": ("mosquitto",),
    "graded_correlation": (),
    "matching": (*LAB, "bpftrace", "unshare"),
    "tracedat_read": (*LAB, "trace-cmd", *LIBTRACECMD),
    "text_read": (),
    "pcap_pairs": ("tcpdump",),
    "replay_10gb": (),
    "replay_jobs": (),
    "dask_scaling": (),
    "serve": ("chromium",),
    "serve_month": ("chromium",),
    "serve_cost": LAB,
    "pods_1000": (),
}
"""Group -> programs and headers. Python libraries are in the lock; VictoriaMetrics and PySpark are fetched
into the cache."""


def packages() -> dict[str, str]:
    """Return program or header -> packages that provide it, from the table of `./dev`; the first that exists counts."""
    return dict(_ROW.findall(DEV.read_text(encoding="utf-8")))


def is_there(need: str) -> bool:
    """Return whether the machine has a file (a path) or a program (a name)."""
    return Path(need).exists() if need.startswith("/") else shutil.which(need, path=PROGRAM_PATH) is not None


def missing(group: str) -> str:
    """Return what a group lacks, and the packages that provide it; empty if the group can run."""
    lacking = [need for need in NEEDS[group] if not is_there(need)]
    if not lacking:
        return ""
    from_packages = packages()
    names = dict.fromkeys(from_packages[need].split()[0] for need in lacking)
    return f"it needs {', '.join(lacking)}: apt-get install {' '.join(names)}"
