"""Real databases for tests and benchmarks, on loopback with ports of their own: started, killed, started again.

InfluxDB 1.6.7 is Debian's package influxdb. VictoriaMetrics is that of Debian 13 or, for some tests, of Debian 12
(1.79.5, which drops bad lines silently), unpacked into the cache of tests/kernel/kernels.py without being installed.
"""

import json
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import contextmanager

from tests.kernel import kernels
from tests.places import PROGRAM_PATH

READY_S = 60
INFLUX_CONFIG = """
reporting-disabled = true
bind-address = "127.0.0.1:{rpc}"
[meta]
  dir = "{place}/meta"
  logging-enabled = false
[data]
  dir = "{place}/data"
  wal-dir = "{place}/wal"
  wal-fsync-delay = "{fsync_delay}"
  query-log-enabled = false
  cache-max-memory-size = 0
[monitor]
  store-enabled = false
[http]
  bind-address = "127.0.0.1:{port}"
  log-enabled = false
  max-body-size = 0
  auth-enabled = {auth}
"""


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def get(url, timeout=30, **query):
    """Request a URL, and return status and text."""
    if query:
        url += "?" + urllib.parse.urlencode(query)
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


class Server:
    """A server program that runs in the foreground, with a check that it answers."""

    def __init__(self, argv, place, port, ready):
        self.argv, self.place, self.port, self._ready = argv, place, port, ready
        self.url = f"http://127.0.0.1:{port}"
        self.process = None

    def start(self):
        with (self.place / "log").open("ab") as log:
            self.process = subprocess.Popen(self.argv, stdout=log, stderr=log, cwd=self.place)
        until = time.monotonic() + READY_S
        while True:
            try:
                if get(self.url + self._ready, timeout=5)[0] < 300:
                    return self
            except OSError:
                pass
            if self.process.poll() is not None or time.monotonic() > until:
                raise AssertionError(f"{self.argv[0]} did not come up: {(self.place / 'log').read_text()[-2000:]}")
            time.sleep(0.05)

    def kill(self):
        """Kill the server with SIGKILL, so that it writes nothing more."""
        self.process.kill()
        self.process.wait()

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()


class Influx(Server):
    """InfluxDB 1.6.7, with a database `mace`."""

    def __init__(self, place, *, auth=False, fsync_delay="0s"):
        port = free_port()
        place.mkdir(parents=True, exist_ok=True)
        config = place / "influxdb.conf"
        values = {"rpc": free_port(), "port": port, "place": place, "auth": str(auth).lower()}
        config.write_text(INFLUX_CONFIG.format(**values, fsync_delay=fsync_delay))
        super().__init__([influxd(), "-config", config], place, port, "/ping")
        self.credentials = None

    def start(self, database="mace"):
        super().start()
        if database:
            self.query(f'CREATE DATABASE "{database}"', post=True)
        return self

    def query(self, text, *, database="mace", post=False):
        """Run a query, and return its series: a list of dicts with name, tags, columns, values."""
        login = dict(zip("up", self.credentials, strict=True)) if self.credentials else {}
        query = urllib.parse.urlencode({"q": text, "db": database, "epoch": "ns"} | login)
        request = urllib.request.Request(f"{self.url}/query?{query}", method="POST" if post else "GET")
        with urllib.request.urlopen(request, timeout=60) as response:
            result = json.load(response)["results"][0]
        assert "error" not in result, result
        return result.get("series", [])

    def rows(self):
        """Return the number of rows of each measurement, counted by its first field or, in `mace_internal`, by part."""
        firsts = {"device_delay": "delay_ns", "overhead": "overhead_ns", "device_window": "count", "rtt": "seq"}
        counts = {name: self.count(name, field) for name, field in firsts.items()}
        internal = ("records", "calls", "queue_peak", "cpu_ns", "taken")
        counts["mace_internal"] = sum(self.count("mace_internal", field) for field in internal)
        return counts

    def count(self, measurement, field):
        found = self.query(f'SELECT count("{field}") FROM "{measurement}"')
        return found[0]["values"][0][1] if found else 0


class Victoria(Server):
    """VictoriaMetrics; its new rows can be made visible at once."""

    suite = "trixie"
    """Debian suite of the package."""

    def __init__(self, place):
        port = free_port()
        place.mkdir(parents=True, exist_ok=True)
        argv = [
            victoria_program(self.suite), f"-storageDataPath={place}/data", f"-httpListenAddr=127.0.0.1:{port}",
            "-retentionPeriod=100y", "-search.latencyOffset=0s",
        ]  # fmt: skip
        super().__init__(argv, place, port, "/health")

    def flush(self):
        get(f"{self.url}/internal/force_flush")

    def samples(self, metric):
        """Return all samples of a metric, over all series."""
        return sum(len(each["values"]) for each in self._exported(metric))

    def series(self, metric):
        """Return the labels of each series of a metric."""
        return [each["metric"] for each in self._exported(metric)]

    def _exported(self, metric):
        self.flush()
        _, text = get(f"{self.url}/api/v1/export", timeout=120, **{"match[]": f'{{__name__="{metric}"}}'})
        # Not splitlines: a label may hold characters that Python treats as the end of a line.
        return [json.loads(each) for each in text.split("\n") if each]


class OldVictoria(Victoria):
    """VictoriaMetrics of Debian 12."""

    suite = "bookworm"


def influxd():
    """Return the path of influxd; None if it is not installed."""
    return shutil.which("influxd", path=PROGRAM_PATH)


def victoria_program(suite):
    """Return the path of a Debian suite's VictoriaMetrics in the cache, fetched once.

    Raises `kernels.KernelUnavailable`.
    """
    return kernels.unpacked("victoria-metrics", (suite,)) / "usr/bin/victoria-metrics"


def missing_victoria():
    try:
        for suite in (Victoria.suite, OldVictoria.suite):
            victoria_program(suite)
    except kernels.KernelUnavailable as error:
        return str(error)
    return None


@contextmanager
def running(server, **options):
    server.start(**options)
    try:
        yield server
    finally:
        server.stop()
