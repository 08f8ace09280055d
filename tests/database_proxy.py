"""A reverse proxy in front of a real InfluxDB 1.x: it speaks the v2 write API, and misbehaves on demand.

    influxdb-client ──/api/v2/write──► proxy ──/write──► influxd 1.6.7

`plan`, a function of the request's number from 0, decides the fate of each write:

    None        forwarded
    429, 500, 503, ...   answered with that status; nothing is forwarded
    "hang"      nothing is answered until `release` (or the client gives up)
    "cut"       the connection is closed while the body is still coming
    "lost"      forwarded, and the answer is lost: the connection is closed instead

Lines that contain one of `spoiled` (bytes) are corrupted each time they pass, so that 1.x refuses them and stores the
others; at the v2 API no line of such a body is stored, as in 2.x.
"""

import gzip
import http.client
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from urllib.parse import parse_qs, urlencode, urlsplit

NO_API = "404 page not found\n"
"""Answer of InfluxDB 1.6.7 to `/api/v2/write`."""


class Proxy(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, upstream, plan=lambda number: None, *, v2=True, token=""):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream, self.plan, self.v2, self.token = upstream, plan, v2, token
        self.spoiled = ()
        self.release = threading.Event()
        self.numbers = count()
        self.writes = 0
        self.met = []
        """Fate of each write, in order."""
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        """Ignore errors: clients that close their connections are part of the tests."""


@contextmanager
def proxied(upstream, plan=lambda number: None, **options):
    proxy = Proxy(upstream, plan, **options)
    thread = threading.Thread(target=proxy.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield proxy
    finally:
        proxy.release.set()
        proxy.shutdown()
        thread.join()
        proxy.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server
        parts = urlsplit(self.path)
        what = server.plan(next(server.numbers))
        server.met.append(what)
        length = int(self.headers["Content-Length"])
        if what == "cut":
            self.rfile.read(length // 2)
            self._close()
            return
        body = self.rfile.read(length)
        if what == "hang":
            server.release.wait()
            self._close()
        elif isinstance(what, int):
            self._answer(what, b'{"code":"too many requests","message":"made up"}', {"Retry-After": "1"})
        elif parts.path == "/api/v2/write" and not server.v2:
            self._answer(404, NO_API.encode())
        elif server.token and self.headers["Authorization"] != f"Token {server.token}":
            self._answer(401, b'{"code":"unauthorized","message":"unauthorized access"}')
        else:
            self._forward(parts, body, lose_answer=what == "lost")

    def _forward(self, parts, body, *, lose_answer):
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        if parts.path == "/api/v2/write":
            query = {"db": query["bucket"], "precision": query["precision"]}
        if self.server.spoiled:
            lines = gzip.decompress(body).split(b"\n")
            bad = [any(mark in line for mark in self.server.spoiled) for line in lines]
            if any(bad) and parts.path == "/api/v2/write":
                self._answer(400, b'{"code":"invalid","message":"unable to parse \'bad\': missing fields"}')
                return
            body = gzip.compress(b"\n".join(b"bad" if b else line for b, line in zip(bad, lines, strict=True)), 1)
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream.port, timeout=60)
        try:
            headers = {name: self.headers[name] for name in ("Content-Encoding", "Authorization") if self.headers[name]}
            upstream.request("POST", f"/write?{urlencode(query)}", body, headers)
            response = upstream.getresponse()
            text = response.read()
        except OSError:
            self._close()  # the server is dead: a client without proxy sees a closed connection, not 502
            return
        finally:
            upstream.close()
        self.server.writes += 1
        if lose_answer:
            self._close()
        else:
            self._answer(response.status, text)

    def _answer(self, status, body, headers=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if status != 204:
            self.wfile.write(body)

    def _close(self):
        """Close the connection with a reset, like a server that dies."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.close_connection = True
        self.connection.close()

    def log_message(self, *args):
        pass
