"""Serves a store's page until the block ends."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from contracts.errors import MaceError, MissingExtra, Unavailable
from mace.serving.access import PERFETTO_UI, Access
from mace.serving.reading import Reading

try:
    from mace.serving.application import MOST_CONNECTIONS, REQUEST_S, application
    from storage.http_server import HttpServer
except ModuleNotFoundError as error:
    raise MissingExtra("serve", error.name or "starlette") from error


@dataclass(frozen=True, slots=True)
class Page:
    """A page that is being served."""

    url: str
    port: int
    """The port; a free one if 0 was asked for."""
    server: HttpServer

    def check(self) -> None:
        """Raise `MaceError` if the server has failed."""
        if self.server.failure is not None:
            raise MaceError(f"the page at {self.url} has failed: {self.server.failure}")


@contextmanager
def serving(
    store: Path,
    where: tuple[str, int],
    access: Access,
    *,
    perfetto: str = PERFETTO_UI,
    skip_damaged: bool = False,
    made_later: bool = False,
) -> Iterator[Page]:
    """Serve the page of a store for the block; `perfetto` is the address of the Perfetto UI that the page opens.

    With `made_later` the store may appear while the page is served. Raises `StoreError` if there is none otherwise, and
    `Unavailable` if nothing can listen at the address.
    """
    reading = Reading(store, skip_damaged=skip_damaged, made_later=made_later)
    host, port = where
    try:
        app = application(reading, access, perfetto)
        server = HttpServer(where, app, most_connections=MOST_CONNECTIONS, request_s=REQUEST_S)
    except OSError as error:
        # Python adds the address to its text, in its own notation.
        why = os.strerror(error.errno) if error.errno else str(error)
        raise Unavailable(f"the page at {_told(host, port)}", why, "choose another address or port") from error
    if not made_later:
        threading.Thread(target=reading.warm, name="mace-warm", daemon=True).start()
    try:
        yield Page(f"http://{_told(host, server.port)}/", server.port, server)
    finally:
        server.close()
        reading.close()


_ANY: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 (compared, not listened at)


def _told(host: str, port: int) -> str:
    shown = _ANY.get(host, host)
    return f"[{shown}]:{port}" if ":" in shown else f"{shown}:{port}"
