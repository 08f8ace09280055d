"""trace-cmd and MACE read the same events in made trace.dat files, also in those of a big-endian machine."""

import re
import subprocess

import pytest

from collector.tracecmd.reader import TraceDat
from tests.made_tracedat import FORMS, MadeTraceDat, to_big, traffic
from tests.ring_pages import layout

pytestmark = pytest.mark.needs("trace-cmd")

PAGES = {0: traffic(0, 5), 1: traffic(1, 3)}
BIG = {cpu: [to_big(page, layout(), list(FORMS.values())) for page in pages] for cpu, pages in PAGES.items()}
LINE = re.compile(r"\[(\d+)\] +(\d+)\.(\d{9}): (\w+): +(.*)$")


def reported(path):
    argv = ["trace-cmd", "report", "-t", "-R", str(path)]
    text = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    found = []
    for line in text.splitlines():
        if match := LINE.search(line):
            fields = dict(re.findall(r"(\w+)=(\S+)", match[5]))
            ts_ns = int(match[2]) * 10**9 + int(match[3])
            skb, length = int(fields["skbaddr"], 16), int(fields.get("len", "0"))
            found.append((ts_ns, int(match[1]), match[4], skb, length, fields.get("name", "")))
    return sorted(found)


def ours(path):
    found = []
    with TraceDat(path) as trace:
        for event in trace.events:
            columns = trace.read(event)
            count = len(columns["ts_ns"])
            lengths = columns.get("len", [0] * count)
            names = columns.get("name", [b""] * count)
            for row in zip(columns["ts_ns"], columns["cpu"], columns["skbaddr"], lengths, names, strict=True):
                ts_ns, cpu, skb, length, name = row
                found.append((int(ts_ns), int(cpu), event.partition(":")[2], int(skb), int(length), name.decode()))
    return sorted(found)


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("big", [False, True])
def test_trace_cmd_reads_the_same_events(tmp_path, version, big):
    path = tmp_path / "trace.dat"
    path.write_bytes(MadeTraceDat({"": BIG if big else PAGES}, version=version, big=big).content())
    told = ours(path)
    assert len(told) > 300
    assert reported(path) == told
