"""A server for a few pages, in a thread and an event loop of its own, that no client can make larger.

uvicorn serves; what it leaves open is bounded here: how many connections there are, how long a request may take from
its first byte to the last of its answer, and how much of an answer waits for a client that does not read. So a
thousand clients that connect and say nothing, or ask and do not listen, cost neither files nor memory, and one that
asks properly is still served: where there are too many connections, the one that has been idle longest goes.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import AsyncIterator
from typing import Final

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

_LOG: Final = logging.getLogger(__name__)

MOST_CONNECTIONS: Final = 32
"""Prometheus, an orchestrator's probes, and people: each has one or two."""
REQUEST_S: Final = 10.0
"""From a request's first byte, or from connecting, to the end of its answer: as long as Prometheus waits by default."""
_IDLE_S: Final = 75
"""Between two requests on one connection: more than the usual pause between two scrapes, a minute."""
_BACKLOG: Final = 64
"""Connections that asyncio takes at once, before any of them can be turned away."""
_HEAD_BYTES: Final = 16 << 10
_PIECE_BYTES: Final = 1 << 16
"""Of an answer that is given out at once, to a client that may not read it."""


class _ClientConnection(H11Protocol):
    """One client's connection."""

    _since_s = 0.0
    _deadline: asyncio.TimerHandle | None = None
    _between_requests = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        others = [c for c in self.connections if isinstance(c, _ClientConnection) and not c.transport.is_closing()]
        if len(others) >= MOST_CONNECTIONS:
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
            self._begin()  # the beginning of the next request came with the last one

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()  # close() would wait until the client reads
        else:
            super().timeout_keep_alive_handler()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()
        super().connection_lost(exc)

    def _begin(self) -> None:
        self._end()
        self._between_requests = False
        self._since_s = self.loop.time()
        self._deadline = self.loop.call_later(REQUEST_S, self.transport.abort)

    def _end(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _is_busy(self) -> bool:
        cycle: RequestResponseCycle | None = self.cycle  # uvicorn's type leaves out that there may be none yet
        return cycle is not None and not cycle.response_complete


async def in_pieces(text: bytes) -> AsyncIterator[bytes]:
    """A text for a `StreamingResponse`: bit by bit, each when the client has taken those before."""
    for at in range(0, len(text), _PIECE_BYTES):
        yield text[at : at + _PIECE_BYTES]
        await asyncio.sleep(0)  # hear that the client has gone


class HttpServer:
    """Serves an application from construction to `close`. Raises `OSError` if it cannot listen."""

    def __init__(self, where: tuple[str, int], application: Starlette) -> None:
        listening = socket.create_server(
            where, family=socket.AF_INET6 if ":" in where[0] else socket.AF_INET, backlog=_BACKLOG
        )
        self.port: Final = int(listening.getsockname()[1])
        self.failure: BaseException | None = None
        """Why it has ended by itself."""
        config = uvicorn.Config(
            application,
            http=_ClientConnection,
            loop="asyncio",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",  # what a client sends is no warning of ours
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
        """Answer no more. Takes some 0.1 s."""
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()

    def _run(self) -> None:
        try:
            asyncio.run(self._server.serve(sockets=[self._listening]))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - told to whoever writes next
            self.failure = error
            _LOG.exception("the endpoint has ended")
        finally:
            self._listening.close()
