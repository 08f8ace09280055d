"""Live ftrace that records only the datagrams of a test, so that every one of them can be counted."""

import asyncio
import os
import subprocess
import sys
import textwrap

from collector.ftrace import tracefs
from collector.ftrace.source import FtraceSource

SENDER = """
    import os, socket, subprocess, sys
    name, cpu = sys.argv[1], int(sys.argv[2])
    def ip(*words):
        subprocess.run(["ip", *words], check=True)
    # One end is enough: nothing has to arrive at an address, and nothing answers.
    ip("link", "add", name + "a", "type", "veth", "peer", "name", name + "b")
    for end in "ab":
        with open(f"/proc/sys/net/ipv6/conf/{name}{end}/disable_ipv6", "w") as file:
            file.write("1")
        ip("link", "set", name + end, "up")
    ip("addr", "add", "198.51.100.1/24", "dev", name + "a")
    ip("neigh", "add", "198.51.100.2", "lladdr", "02:00:00:00:00:02", "dev", name + "a", "nud", "permanent")
    os.sched_setaffinity(0, {cpu})
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    body = bytes(1400)
    print("ready", flush=True)
    for line in sys.stdin:
        for n in range(int(line)):
            sock.sendto(body[: n % 1400], ("198.51.100.2", 9))
        print("sent", flush=True)
"""


class Sender:
    """Sends numbered datagrams through a veth in a namespace of its own, from one CPU."""

    def __init__(self, name, count, cpu=0):
        self.name, self.count = name, count
        self.process = subprocess.Popen(
            ["unshare", "--net", sys.executable, "-c", textwrap.dedent(SENDER), name, str(cpu)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._expect("ready")

    def _expect(self, word):
        line = self.process.stdout.readline().strip()
        assert line == word, f"sender says {line!r}"

    async def send(self):
        """Send all datagrams; each further call sends as many again."""
        self.process.stdin.write(f"{self.count}\n")
        self.process.stdin.flush()
        await asyncio.to_thread(self._expect, "sent")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()


class FilteredSource(FtraceSource):
    """An ftrace source that records only the devices of one sender, from the first event on."""

    def __init__(self, config, device, follower=None):
        super().__init__(config, follower)
        self._device = device

    def _prepare(self, instance):
        present = super()._prepare(instance)
        only(instance, self.config.tracepoints, self._device)
        return present


def only(instance, tracepoints, device):
    for tracepoint in tracepoints:
        tracefs.write(instance.path / "events" / tracepoint.replace(":", "/") / "filter", f'name ~ "{device}*"')


def cpu_choice():
    """Return a CPU to send from, preferably not the one on which everything else runs."""
    return max(os.sched_getaffinity(0))
