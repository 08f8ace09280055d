"""A real mosquitto on loopback, with TLS, passwords and an access list if a test needs them."""

import re
import shutil
import signal
import socket
import subprocess
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.places import DOCS, PROGRAM_PATH

PAGE = DOCS / "mqtt.md"


def documented_acl():
    """Return the access list that docs/mqtt.md recommends."""
    (block,) = re.findall(r"^```\n(# every host.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return block


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Mosquitto:
    """One broker; a test may call `start`, `kill` and `stop` repeatedly, always on the same port."""

    def __init__(self, directory, *lines, tls=None):
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.url = f"{'mqtts' if tls else 'mqtt'}://{'localhost' if tls else '127.0.0.1'}:{self.port}"
        self.log = self.directory / "mosquitto.log"
        listener = [f"listener {self.port} 127.0.0.1"]
        if tls:
            listener += [
                f"cafile {tls.ca}",
                f"certfile {tls.file('localhost.crt')}",
                f"keyfile {tls.file('localhost.key')}",
            ]
        self.conf = self.directory / "mosquitto.conf"
        self.conf.write_text("\n".join(["user root", *listener, *lines, ""]))
        self.process = None

    def start(self):
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [shutil.which("mosquitto", path=PROGRAM_PATH), "-c", str(self.conf)], stdout=log, stderr=log
            )
        deadline = time.monotonic() + 20
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return self
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"mosquitto does not start: {self.log.read_text()[-2000:]}")
            time.sleep(0.02)

    def kill(self):
        self._end(signal.SIGKILL)

    def stop(self):
        self._end(signal.SIGTERM)

    def _end(self, number):
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(20)
            self.process = None


@contextmanager
def mosquitto(directory, *lines, tls=None):
    broker = Mosquitto(directory, *(lines or ("allow_anonymous true",)), tls=tls)
    try:
        yield broker.start()
    finally:
        broker.stop()


class Authority:
    """Certificates made by openssl: one authority, and the certificates that it signs."""

    def __init__(self, directory):
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.ca = self.file("ca.crt")
        key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        _openssl(
            "req", "-x509", *key, "-keyout", self.file("ca.key"), "-out", self.ca, "-days", "2", "-subj", "/CN=test CA"
        )

    def file(self, name):
        return self.directory / name

    def sign(self, name):
        """Write NAME.crt and NAME.key, for a server or a client of that name."""
        request, extra = self.file(f"{name}.csr"), self.file(f"{name}.ext")
        extra.write_text(f"subjectAltName=DNS:{name}\n")
        key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        _openssl("req", *key, "-keyout", self.file(f"{name}.key"), "-out", request, "-subj", f"/CN={name}")
        signer = ["-CA", self.ca, "-CAkey", self.file("ca.key"), "-CAcreateserial"]
        _openssl(
            "x509", "-req", "-in", request, *signer, "-days", "2", "-extfile", extra, "-out", self.file(f"{name}.crt")
        )
        return self.file(f"{name}.crt"), self.file(f"{name}.key")


def _openssl(*args):
    subprocess.run(["openssl", *map(str, args)], check=True, capture_output=True, timeout=60)


def passwords(path, users):
    """Write a password file for mosquitto."""
    path.write_text("".join(f"{name}:{word}\n" for name, word in users.items()))
    subprocess.run(
        [shutil.which("mosquitto_passwd", path=PROGRAM_PATH), "-U", str(path)], check=True, capture_output=True
    )
    return path
