"""Connections to an MQTT broker with the configured address, TLS and credentials.

This is the only module that imports aiomqtt. The protocol is always MQTT 5, because in older versions a broker cannot
report that it has refused a publish.
"""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from contracts.config import MqttConfig, split_url
from contracts.errors import ConfigError, MissingExtra
from contracts.topics import broker_of

try:
    import aiomqtt
    from paho.mqtt.packettypes import PacketTypes
    from paho.mqtt.properties import Properties
except ModuleNotFoundError as error:
    raise MissingExtra("mqtt", str(error.name)) from error

_LOG: Final = logging.getLogger(__name__)

MqttError = aiomqtt.MqttError
MqttMessage = aiomqtt.Message
PASSWORD_VARIABLE: Final = "MACE_MQTT_PASSWORD"  # noqa: S105 (the name of a variable, not a password)
KEEPALIVE_S: Final = 15
"""MQTT keep-alive interval. After one and a half of it a lost connection is noticed, and the last will published."""
IN_FLIGHT: Final = 20
"""Most publishes without the broker's acknowledgement; mosquitto's default for a receiver."""
READ_AHEAD: Final = 8
"""With so many messages in the queue, reading pauses until the next turn of the event loop."""
QUEUE_BYTES: Final = 256 << 20
"""Most bytes of waiting messages; some 90 M records."""
_CLIENTS_LOG: Final = logging.getLogger(f"{__name__}.client")
# Each failure also raises an MqttError, which is logged once. Messages that the queue drops are counted and requested
# again.
_CLIENTS_LOG.setLevel(logging.CRITICAL)
_PORTS: Final = {"mqtt": 1883, "mqtts": 8883}
_RECONNECT_MAX_S: Final = 5.0
CANCEL_AGAIN_S: Final = 1.0
"""A task that has not ended this long after its cancellation is cancelled again."""
_SESSION_TAKEN_OVER: Final = 0x8E
"""Reason code of a DISCONNECT (MQTT 5.0, section 3.14.2.1)."""


@dataclass(frozen=True, slots=True)
class Will:
    """The last will: a message that the broker publishes, retained and with QoS 1, when the connection is lost."""

    topic: str
    payload: bytes


class _Queue(asyncio.Queue[MqttMessage]):
    """Queue of incoming messages, also bounded in bytes; aiomqtt drops a message that does not fit."""

    def __init__(self, maxsize: int = 0) -> None:
        super().__init__(maxsize)
        self._bytes = 0

    def put_nowait(self, item: MqttMessage) -> None:
        size = len(payload_of(item))
        if self._bytes + size > QUEUE_BYTES and not self.empty():
            raise asyncio.QueueFull
        super().put_nowait(item)
        self._bytes += size

    def get_nowait(self) -> MqttMessage:
        item = super().get_nowait()
        self._bytes -= len(payload_of(item))
        return item


class Connection(aiomqtt.Client):
    """One session at the broker, an async context manager.

    `refused` counts publishes that the broker has refused. `taken_over` is true after the broker has ended the session
    because another client with the same identifier connected.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.refused = 0
        self.taken_over = False
        self.pending_calls_threshold = 2 * IN_FLIGHT

    def at_hand(self, most: int) -> Iterator[MqttMessage]:
        """Yield up to `most` messages that are in the queue, without the two tasks that aiomqtt makes per message."""
        for _ in range(most):
            if self._queue.empty():
                return
            yield self._queue.get_nowait()

    def _on_socket_open(self, client: Any, userdata: Any, sock: Any) -> None:
        super()._on_socket_open(client, userdata, sock)
        # aiomqtt schedules its own reader in the same way just before; this one replaces it.
        self._loop.call_soon_threadsafe(self._loop.add_reader, sock.fileno(), self._read, client)

    def _read(self, client: Any) -> None:
        """Read packets from the socket, at least one; aiomqtt reads one per turn of the event loop.

        With `READ_AHEAD` messages in the queue the rest stays in the socket, so that the broker stops sending; a full
        queue would drop messages.
        """
        try:
            while True:
                waiting = self._queue.qsize()
                client.loop_read()
                socket = client.socket()
                decrypted = socket.pending() if isinstance(socket, ssl.SSLSocket) else 0
                if not decrypted and not waiting < self._queue.qsize() < READ_AHEAD:
                    return
        except Exception as error:  # noqa: BLE001 (as aiomqtt does: whatever it is, the connection has broken)
            if not self._disconnected.done():
                self._disconnected.set_exception(error)

    def _on_publish(self, client: Any, userdata: Any, mid: int, reason_code: Any, properties: Any) -> None:
        # aiomqtt treats every PUBACK as a success; in MQTT 5 a PUBACK can say "not authorized".
        if reason_code.is_failure:
            self.refused += 1
            if self.refused == 1:
                _LOG.error("the broker refuses our publishes: %s; check the broker's access list", reason_code)
        super()._on_publish(client, userdata, mid, reason_code, properties)

    def _on_disconnect(
        self, client: Any, userdata: Any, flags: Any, reason_code: Any, properties: Any | None = None
    ) -> None:
        self.taken_over |= reason_code.value == _SESSION_TAKEN_OVER
        # If the connection was given up before the broker answered, aiomqtt 2.5 would query a cancelled future.
        if not self._connected.cancelled():
            super()._on_disconnect(client, userdata, flags, reason_code, properties)
        if self._disconnected.done() and not self._disconnected.cancelled():
            # The next use raises this error; reading it here prevents asyncio's warning if there is no next use.
            self._disconnected.exception()


class Broker:
    """One broker: address, TLS and credentials. Reads files and environment once; raises `ConfigError`."""

    def __init__(self, config: MqttConfig) -> None:
        url = split_url("broker", config.broker)
        if url.scheme not in _PORTS or not url.hostname or url.path not in ("", "/") or url.query or url.fragment:
            raise ConfigError(f"broker {config.broker!r}: expected mqtt://HOST[:PORT], or mqtts://HOST[:PORT] for TLS")
        if url.username is not None or url.password is not None:
            raise ConfigError(
                "broker: every user of this machine can see a user name or password in the address;"
                f" set [mqtt] username, and password_file or {PASSWORD_VARIABLE}"
            )
        try:
            url.hostname.encode("idna")
        except UnicodeError as error:
            raise ConfigError(f"broker {config.broker!r}: not a valid host name: {error}") from None
        self.host: Final = url.hostname
        self.port: Final = url.port or _PORTS[url.scheme]
        self.address: Final = f"{url.scheme}://{self.host}:{self.port}"
        self._tls = _tls(config) if url.scheme == "mqtts" else None
        if self._tls is None and (config.ca_file or config.cert_file or config.key_file):
            raise ConfigError(f"broker {config.broker!r}: certificates need mqtts://, and this address has no TLS")
        self._username = config.username or None
        self._password = _password(config)
        if self._password is not None and self._username is None:
            raise ConfigError("[mqtt]: a password is set without a user name; set [mqtt] username")

    def connection(self, identifier: str | None = None, will: Will | None = None, queue: int = 1000) -> Connection:
        """Return a new session, not yet connected. `queue` is how many incoming messages may wait; more are dropped."""
        return Connection(
            self.host,
            self.port,
            username=self._username,
            password=self._password,
            identifier=identifier,
            protocol=aiomqtt.ProtocolVersion.V5,
            clean_start=True,
            keepalive=KEEPALIVE_S,
            will=aiomqtt.Will(will.topic, will.payload, 1, retain=True) if will is not None else None,
            tls_context=self._tls,
            max_queued_incoming_messages=queue,
            queue_type=_Queue,
            logger=_CLIENTS_LOG,
            max_inflight_messages=IN_FLIGHT,
        )


class Brokers:
    """The configured brokers, one or several, among which hosts are distributed by their names.

    Raises `ConfigError` like `Broker`, and for an address that is named twice.
    """

    def __init__(self, config: MqttConfig) -> None:
        given = [each.strip() for each in config.broker.split(",")]
        self.all: Final = tuple(Broker(replace(config, broker=each)) for each in given)
        self._by_address = {each.address: each for each in self.all}
        if len(self._by_address) < len(self.all):
            raise ConfigError(f"broker {config.broker!r}: an address is named twice")

    def of(self, host: str) -> Broker:
        """Return the broker that a host publishes to."""
        return self.all[0] if len(self.all) == 1 else self._by_address[broker_of(host, self._by_address)]


def retry_after_s(attempt: int, chance: float) -> float:
    """Return the wait before the next attempt to connect, seconds.

    It doubles from 0.1 s with each attempt, and `chance` (0 to 1) subtracts up to half of it, so that the hosts of a
    fleet do not reconnect at the same moment.
    """
    return min(0.1 * 2.0 ** min(attempt, 10), _RECONNECT_MAX_S) * (1 - chance / 2)


async def cancelled(*tasks: asyncio.Task[Any]) -> list[BaseException | Any]:
    """Cancel tasks that use a connection until they have ended; returns their results and exceptions.

    One cancellation is not enough: a connection that breaks while it is closed raises its own error instead of the
    cancellation, and before Python 3.12 `asyncio.wait_for`, which aiomqtt uses, loses a cancellation that coincides
    with the result.
    """
    while pending := [task for task in tasks if not task.done()]:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=CANCEL_AGAIN_S)
    return await asyncio.gather(*tasks, return_exceptions=True)


def properties(**given: str) -> Properties:
    """Return the MQTT properties of a publish with these user properties."""
    made = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    made.UserProperty = list(given.items())
    return made


def is_failure(answer: Any) -> bool:
    """Return whether a broker's answer to a subscription is a refusal."""
    return bool(getattr(answer, "is_failure", False))


def payload_of(message: MqttMessage) -> bytes:
    """Return a message's payload as bytes, the only type that a broker sends; aiomqtt's annotation has others."""
    payload: Any = message.payload
    return payload if isinstance(payload, bytes) else b""


def user_property(message: MqttMessage, name: str) -> str:
    """Return a message's user property; "" if it has none of that name."""
    given: list[tuple[str, str]] = getattr(message.properties, "UserProperty", [])
    return next((value for key, value in given if key == name), "")


def _tls(config: MqttConfig) -> ssl.SSLContext:
    if bool(config.cert_file) != bool(config.key_file):
        raise ConfigError("[mqtt]: set both cert_file and key_file, or neither")
    try:
        context = ssl.create_default_context(cafile=config.ca_file or None)
        if config.cert_file:
            context.load_cert_chain(config.cert_file, config.key_file)
    except OSError as error:  # SSLError is one
        files = ", ".join(filter(None, (config.ca_file, config.cert_file, config.key_file)))
        raise ConfigError(f"[mqtt]: {files}: {error.strerror or error}") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _password(config: MqttConfig) -> str | None:
    if not config.password_file:
        return os.environ.get(PASSWORD_VARIABLE)
    try:
        text = Path(config.password_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"[mqtt] password_file {config.password_file}: {why}") from error
    return text.split("\n", 1)[0].rstrip("\r")
