"""An HTTP server for a few pages, in a thread and event loop of its own, with bounded resources for any clients.

uvicorn serves. This module bounds what uvicorn does not: the number of connections, the time from a request's first
byte to the last byte of its answer, and how much of an answer waits for a client that does not read. A thousand clients
that send nothing, or do not read their answers, therefore cost neither files nor memory. When there are too many
connections, the one that has been idle longest is closed, so that a working client is still served.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import AsyncIterator
from typing import Final

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

_LOG: Final = logging.getLogger(__name__)

MOST_CONNECTIONS: Final = 32
"""Most connections. Prometheus, an orchestrator's probes and people have one or two each."""
REQUEST_S: Final = 10.0
"""Time limit from a request's first byte, or from connecting, to its answer's end; Prometheus's default timeout."""
_IDLE_S: Final = 75
"""Time limit between two requests on a connection: more than a minute, the usual interval of scrapes."""
_BACKLOG: Final = 64
"""Connections that asyncio accepts at once, before any of them can be closed."""
_HEAD_BYTES: Final = 16 << 10
_PIECE_BYTES: Final = 1 << 16
"""Size of the pieces in which an answer is sent, because a client may not read it."""


class _ClientConnection(H11Protocol):
    """One client's connection."""

    most_connections = MOST_CONNECTIONS
    request_s = REQUEST_S
    _since_s = 0.0
    _deadline: asyncio.TimerHandle | None = None
    _between_requests = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        others = [c for c in self.connections if isinstance(c, _ClientConnection) and not c.transport.is_closing()]
        if len(others) >= self.most_connections:
            min(others, key=lambda other: (other._is_busy(), other._since_s)).transport.abort()
        super().connection_made(transport)
        self._begin()

    def data_received(self, data: bytes) -> None:
        if self._between_requests:
            self._begin()
        super().data_received(data)

    def on_response_complete(self) -> None:
        if not self.transport.is_closing() and not self.transport.get_write_buffer_size():
            self._end()
        self._between_requests = True
        super().on_response_complete()
        if self._between_requests and self.conn.trailing_data[0]:
            self._begin()  # the next request has begun: its first bytes arrived with the last request

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()  # close() would wait for the client to read
        else:
            super().timeout_keep_alive_handler()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()
        super().connection_lost(exc)

    def _begin(self) -> None:
        self._end()
        self._between_requests = False
        self._since_s = self.loop.time()
        self._deadline = self.loop.call_later(self.request_s, self.transport.abort)

    def _end(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _is_busy(self) -> bool:
        cycle: RequestResponseCycle | None = self.cycle  # None before the first request, unlike uvicorn's annotation
        return cycle is not None and not cycle.response_complete


async def in_pieces(text: bytes) -> AsyncIterator[bytes]:
    """Yield a text in pieces for a `StreamingResponse`, each when the client has read those before it."""
    for at in range(0, len(text), _PIECE_BYTES):
        yield text[at : at + _PIECE_BYTES]
        await asyncio.sleep(0)  # lets the server notice that the client has disconnected


class HttpServer:
    """Serves an application from its construction until `close`. Raises `OSError` if it cannot listen.

    A connection beyond `most_connections` ends an idle one, and one whose request takes longer than `request_s` ends.
    """

    def __init__(
        self,
        where: tuple[str, int],
        application: ASGIApp,
        *,
        most_connections: int = MOST_CONNECTIONS,
        request_s: float = REQUEST_S,
    ) -> None:
        listening = socket.create_server(
            where, family=socket.AF_INET6 if ":" in where[0] else socket.AF_INET, backlog=_BACKLOG
        )
        self.port: Final = int(listening.getsockname()[1])
        self.failure: BaseException | None = None
        """The error that has ended the server; None while it serves."""
        limits = {"most_connections": most_connections, "request_s": request_s}
        config = uvicorn.Config(
            application,
            http=type("_LimitedConnection", (_ClientConnection,), limits),
            loop="asyncio",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",  # a malformed request is the client's problem, not a warning to our user
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=_BACKLOG,
            timeout_keep_alive=_IDLE_S,
            h11_max_incomplete_event_size=_HEAD_BYTES,
        )
        self._server = uvicorn.Server(config)
        self._listening = listening
        self._thread = threading.Thread(target=self._run, name="mace-http", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the server and wait for its thread, some 0.1 s."""
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()

    def _run(self) -> None:
        try:
            asyncio.run(self._server.serve(sockets=[self._listening]))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the sink's next write raises it
            self.failure = error
            _LOG.exception("the HTTP endpoint has stopped")
        finally:
            self._listening.close()
