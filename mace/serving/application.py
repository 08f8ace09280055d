"""The ASGI application: the page, the views of a store as JSON, CSV and Parquet, traces of packets, and changes.

    GET  /                      the page
    GET  /static/NAME           its parts
    GET  /api/                  the views, with their meanings
    GET  /api/VIEW              a view; parameters are the fields of `mace.shown.views.Asked`, and `format`
    GET  /api/trace             a Perfetto trace of a packet and its neighbours
    GET  /api/events            server-sent events: one when the store has changed
    POST /token                 sets the cookie of the token

No GET changes anything. Every answer forbids the browser to load anything from elsewhere.
"""

from __future__ import annotations

import asyncio
import io
import logging
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs

import pyarrow.parquet as pq
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import (
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from contracts import strict_json
from contracts.errors import MaceError, StoreError, UsageError
from mace.serving.access import COOKIE, Access
from mace.serving.reading import Busy, Reading
from mace.shown import packet_trace, rows, views
from mace.shown.page import assets
from mace.shown.views import Asked, View
from storage.http_server import in_pieces

_LOG: Final = logging.getLogger(__name__)

POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self';"
    " form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS: Final = {
    "content-security-policy": POLICY,
    "cross-origin-resource-policy": "same-origin",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
REQUEST_S: Final = 60.0
"""Time limit of a request, a query of the whole store included."""
MOST_CONNECTIONS: Final = 128
"""Ten viewers have at most six connections each."""
_EVENTS_S: Final = 45.0
"""A stream of events ends after this time, and the browser opens the next. One that is not read costs nothing longer
than `REQUEST_S`, and holds back at most these events."""
_BEAT_S: Final = 0.5
_QUIET_BEATS: Final = 20
_FORM_BYTES: Final = 4096
_FORMATS: Final = ("json", "csv", "parquet")


def application(reading: Reading, access: Access, perfetto: str) -> ASGIApp:
    """Return the application over a store; `perfetto` is the address of the Perfetto UI."""
    pages = _Pages(reading, access, perfetto)
    routes = [
        Route("/", pages.page),
        Route("/static/{name}", pages.static),
        Route("/token", pages.token, methods=["POST"]),
        Route("/api/", pages.listed),
        Route("/api/events", pages.events),
        Route("/api/trace", pages.trace),
        Route("/api/{name}", pages.view),
    ]
    return _Guard(Starlette(routes=routes), access)


class _Guard:
    """Refuses requests by Host header and token, and adds the headers that every answer has."""

    def __init__(self, inner: ASGIApp, access: Access) -> None:
        self._inner, self._access = inner, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refusal = self._refusal(scope)
        await (refusal or self._inner)(scope, receive, guarded)

    def _refusal(self, scope: Scope) -> Response | None:
        headers, path = Headers(scope=scope), scope["path"]
        host = headers.get("host", "")
        if not self._access.host_is_ours(host):
            return PlainTextResponse(
                f"MACE is not {host!r}: open the page by an IP address, or allow the name with --allow-host.\n", 421
            )
        if path in {"/token", "/static/page.css"} or self._access.admits(headers):
            return None
        if path.startswith("/api/"):
            return _refused(401, "a token is needed: Authorization: Bearer TOKEN")
        return HTMLResponse(assets.token_page(), 401)


class _Pages:
    """The routes' endpoints."""

    def __init__(self, reading: Reading, access: Access, perfetto: str) -> None:
        self._reading, self._access, self._perfetto = reading, access, perfetto

    async def page(self, _: Request) -> Response:
        return HTMLResponse(assets.page(self._reading.path.name, self._perfetto))

    async def static(self, request: Request) -> Response:
        found = assets.ASSETS.get(request.path_params["name"])
        if found is None:
            return PlainTextResponse("no such file\n", 404)
        return Response(found.read(), media_type=found.media_type)

    async def token(self, request: Request) -> Response:
        body = b""
        async for piece in request.stream():
            body += piece
            if len(body) > _FORM_BYTES:
                return PlainTextResponse("the form is too long\n", 413)
        given = parse_qs(body.decode("utf-8", "replace")).get("token", [""])[0]
        if not self._access.token or not self._access.is_token(given):
            return HTMLResponse(assets.token_page(wrong=True), 401)
        answer = RedirectResponse("/", 303)
        answer.set_cookie(COOKIE, self._access.cookie(), httponly=True, samesite="strict")
        return answer

    async def listed(self, _: Request) -> Response:
        return JSONResponse({name: kind.meaning for name, kind in views.VIEWS.items()})

    async def view(self, request: Request) -> Response:
        """Answer with a view as JSON, CSV or Parquet."""
        name = request.path_params["name"]
        try:
            asked, form = _asked(request)
            number, body = await run_in_threadpool(self._body, name, asked, form)
        except MaceError as error:
            return _error(error)
        headers = {"mace-state": str(number)}
        headers |= {} if form == "json" else {"content-disposition": f'attachment; filename="mace-{name}.{form}"'}
        media = {"json": "application/json", "csv": "text/csv; charset=utf-8"}
        return StreamingResponse(
            in_pieces(body), headers=headers, media_type=media.get(form, "application/vnd.apache.parquet")
        )

    def _body(self, name: str, asked: Asked, form: str) -> tuple[int, bytes]:
        """Return the number of the store's state before the view was read, and the view."""
        number = self._reading.changes.state().number
        found = self._reading.view(name, asked)
        return number, strict_json.dumps(found.as_dict()).encode() if form == "json" else as_file(found, form)

    async def trace(self, request: Request) -> Response:
        """Answer with a Perfetto trace of the packet `packet` of `host` and `run`, and of its neighbours."""
        try:
            asked, _ = _asked(request)
            body = await run_in_threadpool(self._trace, asked)
        except MaceError as error:
            return _error(error)
        name = f"mace-packet-{asked.packet}.pftrace"
        return StreamingResponse(
            in_pieces(body),
            headers={"content-disposition": f'attachment; filename="{name}"'},
            media_type="application/octet-stream",
        )

    def _trace(self, asked: Asked) -> bytes:
        with self._reading.reader() as reader, tempfile.TemporaryDirectory(prefix="mace-trace-") as folder:
            where = asked.filter(0)
            paths = reader.packet(asked.packet, where, asked.near_ns or None)
            if not paths:
                raise UsageError(f"the store has no rows of a packet {asked.packet}")
            file = Path(folder) / "packet.pftrace"
            packet_trace.write(reader, paths[0], file)
            return file.read_bytes()

    async def events(self, _: Request) -> Response:
        return StreamingResponse(self._changes(), media_type="text/event-stream")

    async def _changes(self) -> AsyncIterator[bytes]:
        """Yield an event per change of the store; a slow reader misses changes, and then gets the newest."""
        loop = asyncio.get_running_loop()
        end_s, seen, quiet = loop.time() + _EVENTS_S, -1, 0
        yield b"retry: 1000\n\n"
        while loop.time() < end_s:
            try:
                state = await run_in_threadpool(self._reading.changes.state)
            except MaceError as error:
                yield f"event: failure\ndata: {strict_json.dumps(str(error))}\n\n".encode()
                return
            quiet += 1
            if state.number != seen:
                seen, quiet = state.number, 0
                yield f"data: {strict_json.dumps({'number': state.number, 'flush': state.flush})}\n\n".encode()
            elif quiet >= _QUIET_BEATS:
                quiet = 0
                yield b": nothing new\n\n"
            await asyncio.sleep(_BEAT_S)


def as_file(found: View, form: str) -> bytes:
    """Return a view's table as CSV or Parquet."""
    file = io.BytesIO()
    table = found.table()
    if form == "csv":
        rows.write_csv(table.to_reader(), file)
    else:
        pq.write_table(table, file, compression="zstd")
    return file.getvalue()


def _asked(request: Request) -> tuple[Asked, str]:
    given: dict[str, Any] = dict(request.query_params)
    form = given.pop("format", "json")
    if form not in _FORMATS:
        raise UsageError(f"format {form!r}: expected {', '.join(_FORMATS)}")
    return Asked.of(given), form


def _error(error: MaceError) -> Response:
    if isinstance(error, UsageError):
        return _refused(400, str(error))
    if isinstance(error, Busy):
        return _refused(503, str(error), {"retry-after": "2"})
    if not isinstance(error, StoreError):
        _LOG.error("%s", error)
    return _refused(500, str(error))


def _refused(status: int, why: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": why}, status, headers)
