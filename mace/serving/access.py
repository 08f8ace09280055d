"""Who may read the page: the address, the Host header, and the token.

On a loopback address anybody on this machine may read. On any other address every request needs the token, as
`Authorization: Bearer TOKEN` or in the cookie that the form of `/token` sets.

A page of another site cannot read ours: no answer has a CORS header, and `Cross-Origin-Resource-Policy` keeps scripts
and pictures apart. It cannot pose as ours either (DNS rebinding): the Host header must be an IP address, `localhost`,
this machine's name, or a name that the user has allowed. A name that an attacker's DNS server points to this machine is
none of these.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from contracts.config import check_host
from contracts.errors import ConfigError, UsageError
from contracts.names import name_of_this_machine

VARIABLE: Final = "MACE_SERVE_TOKEN"
COOKIE: Final = "mace_token"
PERFETTO_UI: Final = "https://ui.perfetto.dev"
"""The Perfetto UI that the page hands traces to, inside the browser."""
LEAST_TOKEN: Final = 16
"""Least length of a token in characters: nobody guesses 16 random ones over a network."""


@dataclass(frozen=True, slots=True)
class Access:
    """The conditions under which a request is answered."""

    names: frozenset[str]
    """Host names in lower case, besides IP addresses."""
    token: str = ""
    """"" if everybody who reaches the address may read."""

    def host_is_ours(self, header: str) -> bool:
        """Return whether a Host header names this server."""
        host = header.lower()
        host = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        if host.rstrip(".") in self.names:
            return True
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return False
        return True

    def admits(self, headers: Mapping[str, str]) -> bool:
        """Return whether a request may be answered, by its headers (names in lower case)."""
        if not self.token:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self.is_token(given):
            return True
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            return False
        return cookie is not None and hmac.compare_digest(cookie.value.encode(), self.cookie().encode())

    def is_token(self, given: str) -> bool:
        """Return whether a text is the token, in a time that does not depend on how much of it is right."""
        return hmac.compare_digest(given.strip().encode(), self.token.encode())

    def cookie(self) -> str:
        """Return the cookie's value: made from the token, which it does not reveal."""
        return hmac.new(self.token.encode(), b"mace serve", hashlib.sha256).hexdigest()


def address(listen: str) -> tuple[str, int]:
    """Return host and port of `HOST:PORT`, `[IPv6]:PORT` or `PORT` (on 127.0.0.1). Raises `UsageError`."""
    host, colon, port = listen.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if ":" in bare and bare == host:
        raise UsageError(f"address {listen!r}: an IPv6 address stands in brackets, as in [::1]:8300")
    host = bare or ("" if colon else "127.0.0.1")
    if not port.isascii() or not port.isdigit() or len(port) > 5 or int(port) > 65_535:
        raise UsageError(f"address {listen!r}: expected HOST:PORT or PORT, as in 127.0.0.1:8300")
    try:
        check_host(f"address {listen!r}", host)
    except ConfigError as error:
        raise UsageError(str(error)) from error
    return host or "0.0.0.0", int(port)  # noqa: S104 (the user has written an address without a host)


def perfetto_ui(address: str) -> str:
    """Return the address of a Perfetto UI, if it is one that a browser opens. Raises `UsageError`."""
    try:
        parts = urlsplit(address)
        good = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise UsageError(f"Perfetto UI {address!r}: expected an address like {PERFETTO_UI} or http://HOST:PORT/")
    return address


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def warning(host: str) -> str:
    """Return what a reader of the address should know, to stand behind it; "" on loopback."""
    if is_loopback(host):
        return ""
    return ", for whoever has the token; it travels unencrypted unless a TLS proxy stands before this address"


def access(host: str, token_file: Path | None, allowed: tuple[str, ...]) -> Access:
    """Return who may read a page that listens on `host`.

    The token is the first line of `token_file`, or the variable `MACE_SERVE_TOKEN`. Raises `UsageError` if an address
    that other machines reach has none, or one that is too short.
    """
    token = _token(token_file)
    if not token and not is_loopback(host):
        raise UsageError(
            f"other machines reach {host}: give a token with --token-file FILE or {VARIABLE}, or listen on 127.0.0.1"
        )
    if token and len(token) < LEAST_TOKEN:
        raise UsageError(
            f"the token has {len(token)} characters: expected at least {LEAST_TOKEN}, from a random source"
        )
    own = {"localhost", name_of_this_machine().lower()}
    return Access(frozenset(own | {name.lower().rstrip(".") for name in allowed}), token)


def _token(file: Path | None) -> str:
    if file is None:
        return os.environ.get(VARIABLE, "").strip()
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UsageError(f"{file}: cannot read the token: {why}") from error
    token = lines[0].strip() if lines else ""
    if not token:
        raise UsageError(f"{file}: the first line is empty; expected the token")
    return token
