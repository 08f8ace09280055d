"""`./dev bench [NAME...]`: runs benchmarks and prints one JSON object per line; NAME is a figure or a group of figures.

Each figure has name, value, unit, peer, peer_value, ratio, n, spread. The first line describes the machine. A figure
that cannot be measured here is a line with an `error`, and the exit status is 1.
"""

import json
import os
import platform
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from contracts.errors import MaceError, nearest
from tests.benchmark import (
    bpf,
    cpus,
    ftrace_decode,
    graded,
    host_rtt,
    kmod,
    kmod_kinds,
    live,
    matching,
    month,
    mqtt,
    needs,
    offline,
    page,
    page_cost,
    pcap_pairs,
    perfetto,
    pods,
    replaying,
    ring_drain,
    rows,
    sealing,
    sinks,
    sizing,
    spark,
    starting,
    text,
    top,
    tracedat,
    versus,
    wire,
)

GROUPS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "cli_start": starting.run,
    "top_cost": top.run,
    "wire": wire.run,
    "seal_cost": sealing.run,
    "ftrace_decode": ftrace_decode.run,
    "ring_drain": ring_drain.run,
    "capture_to_windows": offline.capture_to_windows,
    "capture_to_rows": offline.capture_to_rows,
    "store": rows.run,
    "report_cpus": cpus.run,
    "spark_read": spark.run,
    "vs_netdev_times": versus.netdev_times,
    "vs_bpftrace_text": versus.bpftrace_text,
    "live_flood": live.under_flood,
    "live_dead_database": live.dead_database,
    "windows_memory": live.windows_memory,
    "visibility": live.visibility,
    "live_soak": live.soak,
    "host_rtt_bias": host_rtt.run,
    "kmod_vs_ftrace": kmod.versus_ftrace,
    "kmod_kinds": kmod_kinds.by_kind,
    "bpf": bpf.run,
    "perfetto_read": perfetto.read,
    "perfetto_write": perfetto.write,
    "sizing": sizing.run,
    "encode": sinks.encode,
    "influx_write": sinks.influx_write,
    "victoria_write": sinks.victoria_write,
    "mqtt_ingest": mqtt.through,
    "fleet": mqtt.fleet,
    "graded_correlation": graded.run,
    "matching": matching.run,
    "tracedat_read": tracedat.read,
    "text_read": text.read,
    "pcap_pairs": pcap_pairs.read,
    "replay_10gb": replaying.replay_10gb,
    "replay_jobs": replaying.replay_jobs,
    "dask_scaling": replaying.dask_scaling,
    "serve": page.run,
    "serve_month": month.run,
    "serve_cost": page_cost.run,
    "pods_1000": pods.run,
}


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
    return {
        "name": "machine",
        "cpu": model,
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "load": round(os.getloadavg()[0], 2),
    }


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in GROUPS]
    if unknown:
        print(f"bench: no {unknown[0]!r}{nearest(unknown[0], GROUPS)}; there are {', '.join(GROUPS)}", file=sys.stderr)
        return 2
    print(json.dumps(machine()), flush=True)
    status = 0
    # Before the first benchmark: after an hour of others the message would come late.
    lacking = {name: why for name in names or GROUPS if (why := needs.missing(name))}
    for name, why in lacking.items():
        print(f"bench: {name} is left out: {why}", file=sys.stderr)
        print(json.dumps({"name": name, "error": why}), flush=True)
        status = 1
    for name in names or GROUPS:
        if name in lacking:
            continue
        print(f"bench: {name}", file=sys.stderr)
        try:
            for figure in GROUPS[name]():
                print(json.dumps(figure), flush=True)
        except MaceError as error:
            print(json.dumps({"name": name, "error": str(error)}), flush=True)
            status = 1
        except Exception as error:  # noqa: BLE001 - the other figures are still wanted
            traceback.print_exc()
            print(json.dumps({"name": name, "error": repr(error)}), flush=True)
            status = 1
    return status


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
