"""Makes the real texts of this folder: tasks with any names that the kernel allows send themselves datagrams.

Kept as a record of a run as root on Linux 6.18 with perf 6.1; not run again.

PYTHONPATH=. python tests/golden/text/make.py
"""

import ctypes
import os
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from collector.ftrace import tracefs

HERE = Path(__file__).parent
EVENTS = ("net:net_dev_queue", "net:netif_rx")
NAMES = (
    b"GC Thread#0", b"[000]", b"12.345678:", b"a [001]", b"netif_rx: ", b"[0] 1.123456: ", b"x-1 [000] d..1.",
    b"\xff\xfe\xc3\x28", "naïve ✓".encode(), b"1 2 3", b"a\nb", b"# c", b"\n#x", b"net:netif_rx: a", b"(  99) [001]",
    b"CPU:0 [EVENTS]", b" [000] x", b"\t", b"[000] ", b"\x1b[31m", b"x-4711 [001] 1.",
)  # fmt: skip
NAMESPACE = "mace-names"


def send() -> None:
    """Start a thread for each name; the thread sends one datagram over loopback."""
    libc = ctypes.CDLL(None)

    def work(name: bytes) -> None:
        libc.prctl(15, name, 0, 0, 0)  # PR_SET_NAME
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind(("127.0.0.1", 0))
            sock.sendto(bytes(20), sock.getsockname())
            sock.recv(100)

    for name in NAMES:
        thread = threading.Thread(target=work, args=(name,))
        thread.start()
        thread.join()


def main() -> None:
    sender = ["nsenter", f"--net=/run/netns/{NAMESPACE}", sys.executable, __file__, "send"]
    subprocess.run(["ip", "netns", "add", NAMESPACE], check=True)
    try:
        subprocess.run(["ip", "-n", NAMESPACE, "link", "set", "lo", "up"], check=True)
        of_perf(sender)
        of_ftrace(sender)
    finally:
        subprocess.run(["ip", "netns", "del", NAMESPACE], check=True)


def of_perf(sender: list[str]) -> None:
    with tempfile.TemporaryDirectory() as work:
        data = f"{work}/perf.data"
        events = [word for event in EVENTS for word in ("-e", event)]
        subprocess.run(["perf", "record", "-q", "-k", "mono", "-a", "-o", data, *events, "--", *sender], check=True)
        with (HERE / "names-perf.txt").open("wb") as text:
            subprocess.run(["perf", "script", "-i", data], stdout=text, check=True)


def of_ftrace(sender: list[str]) -> None:
    instance = tracefs.Instance.create(tracefs.find())
    try:
        instance.set_clock("mono")
        for event in EVENTS:
            instance.enable(event)
        options = instance.path / "options"
        (options / "record-tgid").write_text("1")
        instance.record(on=True)
        subprocess.run(sender, check=True)
        instance.record(on=False)
        for name, on in (("", ()), ("-latency", ("latency-format",)), ("-no-irq-info", ("irq-info",))):
            for option in on:
                (options / option).write_text("01"[option == "latency-format"])
            (HERE / f"names-ftrace{name}.txt").write_bytes((instance.path / "trace").read_bytes())
            for option in on:
                (options / option).write_text("10"[option == "latency-format"])
    finally:
        instance.remove()


if __name__ == "__main__":
    os.environ["LC_ALL"] = "C"
    send() if sys.argv[1:] == ["send"] else main()
