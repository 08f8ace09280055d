"""Writes expected.json: the events of the files of this folder according to `trace-cmd report`. Kept like make.py.

PYTHONPATH=. python tests/golden/tracecmd/expect.py
"""

import hashlib
import json
import re
import subprocess
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
LINE = re.compile(r"^(?:\w+:)? *.{16,}?-\d+ +\[(\d+)\] .*?(\d+)\.(\d{9}): (\w+): +(.*)$")
OURS = {
    *("net_dev_queue", "net_dev_start_xmit", "netif_rx", "netif_receive_skb", "napi_gro_receive_entry"),
    *("skb_copy_datagram_iovec", "consume_skb", "kfree_skb"),
}


def events(path: Path) -> list[tuple[int, int, str, str, int]]:
    """Return (time, CPU, event, device, buffer) of each network event, in order of time and CPU."""
    # Without --date, the times are those of the rings.
    text = subprocess.run(
        ["trace-cmd", "report", "-t", "--nodate", str(path)], capture_output=True, text=True, check=True
    ).stdout
    found = []
    for line in text.splitlines():
        match = LINE.match(line)
        if match and match[4] in OURS:
            fields = dict(re.findall(r"(\w+)=(\S+)", match[5]))
            ts_ns = int(match[2]) * 10**9 + int(match[3])
            found.append((ts_ns, int(match[1]), match[4], fields.get("dev", ""), int(fields["skbaddr"], 16)))
    return sorted(found, key=lambda one: one[:2])


def digest(rows: list[tuple[int, int, str, str, int]]) -> str:
    """Return a digest of all events; buffers are numbered in order of appearance, as MACE's source hides addresses."""
    order: dict[int, int] = {}
    told = [(*row[:4], order.setdefault(row[4], len(order))) for row in rows]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def main() -> None:
    expected = {}
    for path in sorted(HERE.glob("*.dat")):
        rows = events(path)
        expected[path.name] = {
            "events": dict(sorted(Counter(row[2] for row in rows).items())),
            "first_ns": rows[0][0],
            "last_ns": rows[-1][0],
            "digest": digest(rows),
        }
    (HERE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
