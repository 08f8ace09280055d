"""MACE against perf's netdev-times.py, and against bpftrace with a script that parses its text, on the same packets.

Each peer watches the flood that MACE records, in the same run. The benchmark compares the time per event from each
recording to per-packet delays: `perf script` with the script (or parsing the text) for the peer, `.mace` to rows for
MACE. bpftrace makes no recording, and formatting the kernel's events as text is part of its cost: it is also compared
by CPU time from the kernel's ring on. The flood is short, because the peers are slow.
"""

import json
import re
import statistics
import subprocess
import time
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from collector.capture.source import Capture
from contracts.errors import Unavailable
from contracts.records import Batch
from correlator.configured import REPLAY_SLICE_NS
from correlator.engine import Engine, EngineConfig
from mace.lab import Spec, running
from mace.lab.plan import outer_device
from tests.benchmark.bpftrace_script import analyse
from tests.benchmark.figures import MACE, cpu_s, figure, folder, one_core
from tests.places import ROOT

DATAGRAMS, RATE_PPS = 40_000, 10_000
BPFTRACE_DATAGRAMS, BPFTRACE_RATE_PPS = 160_000, 20_000
"""Rate that takes bpftrace two thirds of a core. Events that it reports as lost are in the figures (`peer_lost`)."""
ROUNDS = 3
WARM_UP = 1 / 8
"""Packets before the flood, as a share of it: both sides see them, but they are not counted."""
SETTLE_S = 5
"""Time until both have begun to record, on an idle machine."""
EVENTS = (
    "net:net_dev_queue",
    "net:net_dev_xmit",
    "net:netif_receive_skb",
    "net:netif_rx",
    "net:napi_gro_receive_entry",
)
IRQ = ("irq:irq_handler_entry", "irq:irq_handler_exit", "irq:softirq_entry", "irq:softirq_exit", "irq:softirq_raise")
ENDS = ("skb:consume_skb", "skb:kfree_skb")
COPY = "skb:skb_copy_datagram_iovec"
"""Delivery. netdev-times.py also handles the ends of buffers, but that handler breaks on fields of newer kernels."""


def _ours(capture: Path, *, rows: bool = True) -> tuple[float, int]:
    """Return (seconds of CPU time, records) from capture to windows, and to rows; the best of three."""
    best, records = 1e9, 0
    for _ in range(3):
        begin, records = time.process_time(), 0
        with Capture(capture) as source:
            engine = Engine(source.header.clock.offset_ns, EngineConfig(slice_ns=REPLAY_SLICE_NS, rows=rows))
            for item in source:
                records += len(item) if isinstance(item, Batch) else 0
                engine.feed(item)
            engine.finish()
        best = min(best, time.process_time() - begin)
    return best, records


def _side_by_side(
    ours: list[str],
    peer: list[str],
    *,
    source: str,
    says: Path | None = None,
    datagrams: int = DATAGRAMS,
    rate_pps: int = RATE_PPS,
) -> tuple[float, float, dict[str, Any]]:
    """Make one flood that both see; return the CPU seconds of MACE and of the peer, and MACE's output.

    The times exclude starting and stopping, and the first packets (`WARM_UP`), with which memory and code are touched
    for the first time. A peer that writes while it records has begun when `says` is not empty.
    """
    with running(Spec(name="versus")) as lab:
        lab.ping("c1", count=2)
        argv = [*MACE, *ours, "--source", source, "--lab", "versus", "--ring-mib", "64", "--json", "--duration", "60"]
        mine = subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=ROOT)
        other = subprocess.Popen(peer, stderr=subprocess.PIPE)
        try:
            deadline = time.monotonic() + 60
            while source == "bpf" and not _has_attached(mine.pid):
                if time.monotonic() > deadline:
                    raise Unavailable("bpf", "it has not attached its programs within a minute")
                time.sleep(0.1)
            time.sleep(SETTLE_S)
            while says is not None and not (says.exists() and says.stat().st_size):
                if time.monotonic() > deadline:
                    raise Unavailable(peer[0], "it has not begun to write within a minute")
                lab.ping("c1", count=200, interval_s=0.002)
            lab.udp("c1", count=round(datagrams * WARM_UP), size=18, rate_pps=rate_pps)
            time.sleep(1)
            before = cpu_s(mine.pid), cpu_s(other.pid)
            lab.udp("c1", count=datagrams, size=18, rate_pps=rate_pps)
            time.sleep(1)
            mine_s, other_s = cpu_s(mine.pid) - before[0], cpu_s(other.pid) - before[1]
        finally:
            other.terminate()
            other.communicate()
            mine.terminate()
            said, _ = mine.communicate()
    return mine_s, other_s, json.loads(said)


def _has_attached(pid: int) -> bool:
    """Return whether the process holds a BPF link; loading the programs takes seconds."""
    for path in Path(f"/proc/{pid}/fdinfo").iterdir():
        with suppress(FileNotFoundError):  # closed since
            if "link_type" in path.read_text():
                return True
    return False


def netdev_times() -> list[dict[str, Any]]:
    """ns/event, ours from ftrace's and from BPF's records, and perf script with netdev-times.py.

    Target: 20 times faster.
    """
    return [
        _netdev_times("vs_netdev_times", "ftrace"),
        _netdev_times("vs_netdev_times_bpf", "bpf"),
    ]


def _netdev_times(name: str, source: str) -> dict[str, Any]:
    found = sorted(Path("/usr").glob("l*/**/netdev-times.py")) or sorted(Path("/usr").glob("share/**/netdev-times.py"))
    if not found:
        raise Unavailable(name, "perf's netdev-times.py is not installed", "apt-get install linux-perf")
    with folder() as place:
        data = place / "perf.data"
        argv = ["perf", "record", "-q", "-k", "mono", "-m", "8M", "-a", "-o", str(data)]
        argv += [word for event in (*EVENTS, *IRQ, COPY) for word in ("-e", event)]
        capture = place / "ours.mace"
        _side_by_side(["record", "-o", str(capture)], argv, source=source)
        with one_core():
            begin = time.perf_counter()
            done = subprocess.run(
                ["perf", "script", "-i", str(data), "-s", str(found[0])], capture_output=True, check=False
            )
            theirs_s = time.perf_counter() - begin
            if done.returncode:
                raise Unavailable(name, done.stderr.decode(errors="replace").strip()[-300:])
            count = subprocess.run(["perf", "script", "-i", str(data), "-F", "event"], capture_output=True, check=True)
            events = count.stdout.count(b"\n")
            ours_s, records = _ours(capture)
    ours, theirs = ours_s / records * 1e9, theirs_s / events * 1e9
    made = figure(name, "ns/event", [ours], "perf script + netdev-times.py", theirs)
    return made | {"ratio": float(f"{theirs / ours:.3g}"), "n": records, "peer_events": events}


def bpftrace_text() -> list[dict[str, Any]]:
    """CPU time, ns/event, from the kernel's ring to windows of delays: MACE, and bpftrace with a Python script.

    Target: 20 times faster, with ftrace and with BPF. Each round is a new flood, seen by both sides. There are two
    scripts: one with MACE's results (`bpftrace_script`), and the shortest that computes any delay (`..._bare`).
    Neither stores anything, and MACE stores nothing either; in `..._kept` MACE writes a capture file, and rows and
    windows into the store. `..._parsed` excludes the recording: MACE's capture file to windows, the peer's text to
    windows.
    """
    suffixes = {"ftrace": "", "bpf": "_bpf"}
    rounds = {source: _BpftraceRounds() for source in suffixes}
    for _ in range(ROUNDS):
        for source, done in rounds.items():
            for kept in (False, True):
                _bpftrace_round(done, source, kept=kept)
    return [made for source, done in rounds.items() for made in _bpftrace_figures(done, suffixes[source])]


@dataclass(frozen=True, slots=True)
class _BpftraceRounds:
    """What the rounds with one source measured.

    Attributes:
        ours: part of MACE's work -> ns/event of each round.
        theirs: part of the peer's work -> ns/event of each round.
        seen: count of events, of both sides and all rounds.
    """

    ours: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    theirs: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    seen: Counter[str] = field(default_factory=Counter)


def _bpftrace_figures(rounds: _BpftraceRounds, suffix: str) -> list[dict[str, Any]]:
    found = []
    for name, mine, peer in (
        ("vs_bpftrace_text", "run", ("print", "script")),
        ("vs_bpftrace_text_bare", "run", ("print", "bare")),
        ("vs_bpftrace_text_kept", "kept", ("print_beside_kept", "script")),
        ("vs_bpftrace_text_parsed", "windows", ("script",)),
    ):
        ours = rounds.ours[mine]
        peer_ns = [sum(each) for each in zip(*(rounds.theirs[part] for part in peer), strict=True)]
        ratios = sorted(b / a for a, b in zip(ours, peer_ns, strict=True))
        made = figure(name + suffix, "ns/event", ours, "bpftrace's text + Python", statistics.median(peer_ns))
        told = [float(f"{value:.3g}") for value in (statistics.median(ratios), ratios[0], ratios[-1])]
        parts = {part: round(statistics.median(rounds.theirs[part])) for part in peer}
        found.append(made | {"ratio": told[0], "ratio_spread": told[1:], "peer_parts_ns": parts} | rounds.seen)
    return found


def _bpftrace_round(rounds: _BpftraceRounds, source: str, *, kept: bool) -> None:
    """Make one flood, and add what both sides measured to `rounds`."""
    with folder() as place:
        text, capture = place / "bpftrace.txt", place / "ours.mace"
        with_device = ("net_dev_queue", "net_dev_start_xmit", "netif_rx", "netif_receive_skb")
        say = r'{ printf("%%llu %s %%p %%s %%d\n", nsecs, args->skbaddr, str(args->name), args->len); }'
        end = r'{ printf("%%llu %s %%p\n", nsecs, args->skbaddr); }'
        program = "\n".join(f"tracepoint:net:{event} {say % event}" for event in with_device)
        program += "\n" + "\n".join(f"tracepoint:{event} {end % event}" for event in ENDS)
        peer = ["env", "BPFTRACE_PERF_RB_PAGES=4096", "bpftrace", "-B", "full", "-o", str(text), "-e", program]
        how = ["--store", str(place / "store"), "--record", str(capture)] if kept else ["--no-store", "--no-rows"]
        run_s, print_s, said = _side_by_side(
            ["run", *how], peer, source=source, says=text, datagrams=BPFTRACE_DATAGRAMS, rate_pps=BPFTRACE_RATE_PPS
        )
        with one_core():
            begin = time.process_time()
            full = analyse(text, "eth0", outer_device("versus"))
            script_s = time.process_time() - begin
            begin = time.process_time()
            events, _ = _parse(text)
            bare_s = time.process_time() - begin
            windows_s, records = _ours(capture, rows=False) if kept else (0.0, 0)
    ledger, counted = said["ledger"], 1 / (1 + WARM_UP)
    rounds.seen["records"] += ledger["records"]
    rounds.seen["lost"] += ledger["lost"] + ledger["discarded"]
    rounds.seen["peer_events"] += events
    rounds.seen["peer_lost"] += full.ledger["lost"]
    rounds.seen["peer_packets"] += sum(map(len, full.overhead.values()))
    rounds.ours["kept" if kept else "run"].append(run_s / (ledger["records"] * counted) * 1e9)
    rounds.theirs["print_beside_kept" if kept else "print"].append(print_s / max(events * counted, 1) * 1e9)
    if kept:
        rounds.ours["windows"].append(windows_s / records * 1e9)
    else:
        rounds.theirs["script"].append(script_s / max(events, 1) * 1e9)
        rounds.theirs["bare"].append(bare_s / max(events, 1) * 1e9)


def _parse(text: Path) -> tuple[int, int]:
    """Parse with the least possible script: a dictionary by buffer address, a delay at each next device."""
    pattern = re.compile(r"(\d+) (\S+) (0x[0-9a-f]+)(?: (\S+) (\d+))?")
    seen: dict[str, tuple[int, str]] = {}
    delays: dict[tuple[str, str], list[int]] = {}
    events = 0
    with text.open() as lines:
        for line in lines:
            match = pattern.match(line)
            if match is None:
                continue
            events += 1
            ts, _, skb, name, _ = match.groups()
            if name is None:
                seen.pop(skb, None)
                continue
            before = seen.get(skb)
            if before is not None and before[1] != name:
                delays.setdefault((before[1], name), []).append(int(ts) - before[0])
            if before is None or before[1] != name:
                seen[skb] = (int(ts), name)
    return events, sum(map(len, delays.values()))
