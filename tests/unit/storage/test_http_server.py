"""The bounded server with slow, silent and rude clients beside a proper one."""

import contextlib
import http.client
import logging
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from storage import http_server
from storage.http_server import MOST_CONNECTIONS, HttpServer, in_pieces

LARGE = 64 << 20
"""A size that exceeds the sockets' buffers."""


def application():
    async def page(_):
        return PlainTextResponse("here")

    async def large(_):
        return StreamingResponse(in_pieces(bytes(LARGE)))

    return Starlette(routes=[Route("/page", page), Route("/large", large)])


@contextlib.contextmanager
def serving(**limits):
    server = HttpServer(("127.0.0.1", 0), application(), **limits)
    try:
        yield server
    finally:
        server.close()


def get(server, path="/page", method="GET"):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def is_ended(client):
    """Wait for the server's end of the connection."""
    client.settimeout(30)
    try:
        while client.recv(1 << 20):
            pass
    except ConnectionResetError:
        pass
    return True


MANY = """
import socket, sys, time
clients = []
for _ in range(1000):
    try:
        clients.append(socket.create_connection(("127.0.0.1", int(sys.argv[1])), 5))
        clients[-1].setblocking(False)
    except OSError:
        pass
print("connected", flush=True)
while True:
    for client in clients:
        try:
            client.send(b"G")
        except OSError:
            pass
    time.sleep(0.2)
"""


@pytest.mark.slow
def test_a_thousand_slow_clients_cost_no_files_and_leave_room_for_others():
    with serving() as server:
        before = open_files()
        with subprocess.Popen([sys.executable, "-c", MANY, str(server.port)], stdout=subprocess.PIPE) as clients:
            try:
                clients.stdout.readline()
                most = open_files()
                for _ in range(20):
                    assert get(server)[2] == b"here"
                    most = max(most, open_files())
            finally:
                clients.kill()
    # Bound of open files: the clients being served, those that asyncio accepts in one step of its loop (some wait for
    # their first step, some are accepted, some are turned away and closed in the next step), and the client of this
    # test.
    assert most - before <= MOST_CONNECTIONS + 3 * http_server._BACKLOG + 8


@pytest.mark.slow
def test_a_request_that_does_not_end_is_ended():
    with serving(request_s=0.3) as server:
        for sent in (b"", b"GET /page HTTP/1.1\r\nHost: x\r\n", b"GET /page HTTP/1.1\r\nHost: x\r\n\r\nGET /p"):
            with socket.create_connection(("127.0.0.1", server.port)) as client:
                client.sendall(sent)
                assert is_ended(client)


@pytest.mark.slow
def test_an_answer_that_nobody_reads_is_ended():
    with serving(request_s=0.5) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
            assert client.recv(10) == b"HTTP/1.1 2"  # the server is answering the request
            while server._server.server_state.connections:
                time.sleep(0.05)
        assert get(server)[2] == b"here"


@pytest.mark.slow
def test_a_connection_outlives_the_time_limit_of_one_request():
    with serving(request_s=0.4) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        connection.connect()
        own = connection.sock
        for _ in range(8):
            connection.request("GET", "/page")
            assert connection.getresponse().read() == b"here"
            time.sleep(0.1)
        assert connection.sock is own
        connection.close()


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /page HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01 no HTTP at all\r\n\r\n",
        b"GET /page HTTP/1.1\r\n" + b"a: " + b"b" * 100_000,
        b"GET /page HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    ],
)
def test_clients_that_go_away_leave_no_traceback(caplog, capfd, sent):
    with serving() as server, caplog.at_level(logging.WARNING):
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", server.port)) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset at close
                with contextlib.suppress(OSError):
                    client.sendall(sent)
                    client.recv(10)
        assert get(server)[2] == b"here"
    assert not caplog.records
    assert "Traceback" not in "".join(capfd.readouterr())


def test_head_has_the_headers_of_get():
    with serving() as server:
        status, headers, body = get(server, method="HEAD")
        assert (status, headers["Content-Length"], body) == (200, "4", b"")
        assert get(server, method="POST")[0] == 405


def test_closing_leaves_nothing():
    before = open_files()
    with serving() as server:
        clients = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(3)]
    for client in clients:
        assert is_ended(client)
        client.close()
    assert open_files() == before
