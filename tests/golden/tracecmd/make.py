"""Makes the trace.dat files of this folder. Kept as a record, and for further files to look at.

    ./dev test-kernel --kernel 6.12 --show --results /tmp/made -- .venv/bin/python tests/golden/tracecmd/make.py OLD

The guest has a lab of one container. For each way of recording, the same few packets are sent while MACE captures from
ftrace. OLD is trace-cmd 2.9.1 (the program of Debian 11's package), which writes version 6 and knows no other.
/proc/kallsyms is empty here; otherwise each file would have 8 MB of symbols.
"""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

from collector.ftrace.source import FtraceConfig, FtraceSource
from collector.machine.devices import DeviceFollower
from contracts.hooks import TRACEPOINTS
from contracts.interfaces import Progress
from mace.lab import HOST, Lab, Spec, running
from storage.capture import CaptureSink

RESULTS = Path(os.environ.get("MACE_GUEST_RESULTS", "."))
EVENTS = [word for info in TRACEPOINTS for word in ("-e", info.tracepoint)]
NEW = "trace-cmd"


def recordings(old: str) -> dict[str, list[str]]:
    """Return file name -> command without `-o`; they differ in events, buffers, clocks and versions."""
    some = ["-e", "net:net_dev_queue", "-e", "sched:sched_switch", "-e", "net:netif_receive_skb"]
    return {
        "v6-old": [old, "record", "-C", "mono", *EVENTS],
        "v6": [NEW, "record", "-C", "mono", "--file-version", "6", *EVENTS],
        "v7-zstd": [NEW, "record", "-C", "mono", "--compression", "zstd", *EVENTS],
        "v7-zlib": [NEW, "record", "-C", "mono", "--compression", "zlib", *EVENTS],
        "v7-none": [NEW, "record", "-C", "mono", "--compression", "none", *EVENTS],
        "v7-date": [NEW, "record", "-C", "mono", "--date", *EVENTS],
        "v7-local": [NEW, "record", "-C", "local", *EVENTS],
        "v7-some": [NEW, "record", "-C", "mono", *some],
        "v7-buffers": [
            *(NEW, "record", "-B", "packets", "-C", "mono", *EVENTS),
            *("-B", "tasks", "-C", "mono", "-e", "sched:sched_switch"),
        ],
        "v7-lost": [NEW, "record", "-C", "mono", "-b", "4", "-s", "4000000", *EVENTS],
    }


def traffic(lab: Lab, name: str) -> None:
    if name.endswith("lost"):
        lab.udp("c1", count=400, size=18)
        return
    lab.ping("c1", count=4)
    lab.udp("c1", count=10, size=100)


def started(command: list[str], work: str) -> subprocess.Popen[str]:
    """Start a recording, and return its process when it has begun."""
    process = subprocess.Popen(command, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    time.sleep(4)
    return process


async def record(lab: Lab, name: str, command: list[str], own: bool) -> None:
    """Record one file, and beside it a capture of the same packets by MACE's own source."""
    followed = DeviceFollower(
        host_netns=str(lab.netns_path(HOST)), outer=(lab.outer_device,), remote_netns=(lab.netns_path("remote").name,)
    )
    source = FtraceSource(FtraceConfig(hold_back_ms=2000), followed)
    with tempfile.TemporaryDirectory() as work:
        process = await asyncio.to_thread(started, [*command, "-o", str(RESULTS / f"{name}.dat")], work)
        if own:
            sink = CaptureSink(RESULTS / f"{name}.mace")
            await sink.open(await source.open())

            async def read() -> None:
                async for item in source.items():
                    if not isinstance(item, Progress):
                        await sink.write(item)

            reading = asyncio.create_task(read())
            await asyncio.sleep(1)
        await asyncio.to_thread(traffic, lab, name)
        await asyncio.sleep(1)
        if own:
            source.request_stop()
            await reading
            await sink.aclose()
            await source.aclose()
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=120)
        print(name, process.returncode, said[-300:])


def main(old: str, chosen: list[str]) -> None:
    subprocess.run(["mount", "--bind", "/dev/null", "/proc/kallsyms"], check=True)
    with running(Spec(name="vm", containers=1)) as lab:
        lab.ping("c1", count=2)
        for name, command in recordings(old).items():
            if not chosen or name in chosen:
                asyncio.run(record(lab, name, command, own=not name.endswith("lost")))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
