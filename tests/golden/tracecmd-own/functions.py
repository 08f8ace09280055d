"""Makes `v6-functions.dat` and `v7-functions.dat` in a guest. Kept as a record; not run again.

    ./dev test-kernel --kernel 6.12 --results /tmp/made -- .venv/bin/python tests/golden/tracecmd-own/functions.py

The files have some functions of the loopback path by the tracers function (version 6) and function_graph (version 7),
and a mark. `shortened` of make.py removed the kernel's symbols.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

from collector.ftrace import tracefs

RESULTS = Path(os.environ.get("MACE_GUEST_RESULTS", "."))
TRACERS = {"v6-functions": ("6", "function"), "v7-functions": ("7", "function_graph")}


def main() -> None:
    root = tracefs.find()
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    for name, (version, tracer) in TRACERS.items():
        filtered = [word for function in ("loopback_xmit", "icmp_rcv", "icmp_send") for word in ("-l", function)]
        argv = ["trace-cmd", "record", "-C", "mono", "--file-version", version, "-p", tracer, *filtered]
        argv += ["-o", str(RESULTS / f"{name}.dat")]
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        while (root / "current_tracer").read_text().strip() != tracer or (root / "tracing_on").read_text() != "1\n":
            time.sleep(0.2)
        time.sleep(1)
        (root / "trace_marker").write_text("mark 1\n")
        subprocess.run(["ping", "-c", "3", "-i", "0.1", "127.0.0.1"], check=True)
        process.send_signal(2)
        print(process.communicate(timeout=60)[0])


if __name__ == "__main__":
    main()
