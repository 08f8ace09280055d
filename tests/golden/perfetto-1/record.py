"""Records the golden Perfetto traces by traced, in the lab, while `mace record` captures the same packets. Needs root
and Debian's package `perfetto`. Kept as a record; not run again.

PYTHONPATH=. python tests/golden/perfetto-1/record.py
"""

import json
import os
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from collector.capture.source import Capture
from mace import lab
from tests.golden_perfetto import summary
from tests.made_capture import capture_bytes
from tests.measuring import MACE, ROOT, wait_for

HERE = Path(__file__).parent
INSTANCE = Path("/sys/kernel/tracing/instances/mace-golden")
EVENTS = (
    *("net/net_dev_queue", "net/net_dev_start_xmit", "net/net_dev_xmit", "net/netif_rx", "net/netif_receive_skb"),
    *("net/napi_gro_receive_entry", "skb/consume_skb", "skb/kfree_skb", "skb/skb_copy_datagram_iovec"),
)
KINDS = {"generic": "", "described": "denser_generic_event_encoding: true"}


def config(kind):
    events = "\n".join(f'ftrace_events: "{event}"' for event in (*EVENTS, "sched/sched_switch"))
    return f"""
    buffers {{ size_kb: 8192 }}
    compression_type: COMPRESSION_TYPE_DEFLATE
    duration_ms: 1500
    data_sources {{ config {{ name: "linux.ftrace" ftrace_config {{
      instance_name: "{INSTANCE.name}"
      {events}
      compact_sched {{ enabled: true }}
      drain_period_ms: 100
      {KINDS[kind]}
    }} }} }}
    """


def record(place, kind, scratch):
    """Record a trace and a capture of the same pings."""
    trace, capture = scratch / f"{kind}.pftrace", scratch / f"{kind}.mace"
    mace = subprocess.Popen(
        [*MACE, "record", "--lab", place.name, "--source", "ftrace", "--duration", "2.5", "-o", capture], cwd=ROOT
    )
    wait_for(lambda: capture.exists() and capture.stat().st_size > 0)
    perfetto = subprocess.Popen(
        ["perfetto", "-c", "-", "--txt", "-o", trace], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    perfetto.stdin.write(config(kind))
    perfetto.stdin.close()
    time.sleep(1)
    place.ping("c1", lab.REMOTE, count=10, size=56, family=4, interval_s=0.01)
    assert perfetto.wait() == mace.wait() == 0
    with Capture(capture) as found:
        header = replace(found.header, host="measured.example", command=("mace", "record"), boot_id="")
        items = list(found)
    (HERE / f"{kind}.pftrace").write_bytes(trace.read_bytes())
    (HERE / f"{kind}.mace").write_bytes(capture_bytes(items, header))


def main():
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        os.environ["PERFETTO_PRODUCER_SOCK_NAME"] = str(scratch / "producer")
        os.environ["PERFETTO_CONSUMER_SOCK_NAME"] = str(scratch / "consumer")
        INSTANCE.mkdir()
        service = subprocess.Popen(["traced"], stderr=subprocess.DEVNULL)
        time.sleep(0.5)
        probes = subprocess.Popen(["traced_probes"], stderr=subprocess.DEVNULL)
        time.sleep(0.5)
        try:
            with lab.running(lab.Spec(name="golden", containers=1)) as place:
                for kind in KINDS:
                    record(place, kind, scratch)
        finally:
            probes.terminate()
            probes.wait()
            service.terminate()
            service.wait()
            INSTANCE.rmdir()
    found = {kind: summary(HERE / f"{kind}.pftrace", HERE / f"{kind}.mace") for kind in KINDS}
    (HERE / "expected.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
