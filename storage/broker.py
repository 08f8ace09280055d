"""One connection to a MQTT broker, as configured: address, TLS, who we are.

The only module that knows aiomqtt. MQTT 5 throughout: only there does a broker say that it refused a publish.
"""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from contracts.config import MqttConfig, split_url
from contracts.errors import ConfigError, MissingExtra

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
"""A broker that has vanished is noticed, and the last will given out, after one and a half of these."""
IN_FLIGHT: Final = 20
"""Publishes without the broker's acknowledgement at once; mosquitto's own default for a receiver."""
READ_AHEAD: Final = 8
"""Messages in the queue beyond which no more are read at once."""
QUEUE_BYTES: Final = 256 << 20
"""Of messages that wait to be worked on; some 90 M records."""
_CLIENTS_LOG: Final = logging.getLogger(f"{__name__}.client")
# Each failure is an MqttError as well, which we tell of, once; what a queue lets fall is asked for again, and counted.
_CLIENTS_LOG.setLevel(logging.CRITICAL)
_PORTS: Final = {"mqtt": 1883, "mqtts": 8883}
_RECONNECT_MAX_S: Final = 5.0
CANCEL_AGAIN_S: Final = 1.0
"""A task that has not ended this long after it was cancelled is cancelled again."""
_SESSION_TAKEN_OVER: Final = 0x8E
"""Reason of a DISCONNECT: MQTT 5.0, section 3.14.2.1."""


@dataclass(frozen=True, slots=True)
class Will:
    """What the broker says for us when we are gone without a word; retained, QoS 1."""

    topic: str
    payload: bytes


class _Queue(asyncio.Queue[MqttMessage]):
    """Incoming messages, bounded in bytes too: what does not fit is let fall, as aiomqtt does with too many."""

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
    """One session at the broker. An async context manager; `refused` counts publishes that the broker denied.

    `taken_over`: the broker has ended the session because another client of the same identifier came.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.refused = 0
        self.taken_over = False
        self.pending_calls_threshold = 2 * IN_FLIGHT

    def at_hand(self, most: int) -> Iterator[MqttMessage]:
        """Messages that wait already, without the two tasks that aiomqtt makes to wait for each."""
        for _ in range(most):
            if self._queue.empty():
                return
            yield self._queue.get_nowait()

    def _on_socket_open(self, client: Any, userdata: Any, sock: Any) -> None:
        super()._on_socket_open(client, userdata, sock)
        # Behind aiomqtt's own reader, which is asked for in the same way, and in its place.
        self._loop.call_soon_threadsafe(self._loop.add_reader, sock.fileno(), self._read, client)

    def _read(self, client: Any) -> None:
        """Take what has come off the socket, one packet at least; aiomqtt takes one at each turn of the event loop.

        What there is no use for yet stays in the socket, and the broker waits with more: in the queue it would be let
        fall at last.
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
        # aiomqtt takes every PUBACK for a success; in MQTT 5 it can say "not authorized".
        if reason_code.is_failure:
            self.refused += 1
            if self.refused == 1:
                _LOG.error("the broker refuses what we publish: %s; its access list does not let us", reason_code)
        super()._on_publish(client, userdata, mid, reason_code, properties)

    def _on_disconnect(
        self, client: Any, userdata: Any, flags: Any, reason_code: Any, properties: Any | None = None
    ) -> None:
        self.taken_over |= reason_code.value == _SESSION_TAKEN_OVER
        # A connection that was given up before the broker answered: aiomqtt 2.5 would ask a cancelled future.
        if not self._connected.cancelled():
            super()._on_disconnect(client, userdata, flags, reason_code, properties)
        if self._disconnected.done() and not self._disconnected.cancelled():
            # Told by whatever is tried next; where nothing is, asyncio would complain that nobody has asked.
            self._disconnected.exception()


class Broker:
    """Where the broker is and who we are there. Reads files and environment once; raises `ConfigError`."""

    def __init__(self, config: MqttConfig) -> None:
        url = split_url("broker", config.broker)
        if url.scheme not in _PORTS or not url.hostname or url.path not in ("", "/") or url.query or url.fragment:
            raise ConfigError(f"broker {config.broker!r}: expected mqtt://HOST[:PORT], or mqtts://HOST[:PORT] for TLS")
        if url.username is not None or url.password is not None:
            raise ConfigError(
                "broker: a name or password in the address is seen by every user of this machine;"
                f" set [mqtt] username, and password_file or {PASSWORD_VARIABLE}"
            )
        try:
            url.hostname.encode("idna")
        except UnicodeError as error:
            raise ConfigError(f"broker {config.broker!r}: no host can be called so: {error}") from None
        self.host: Final = url.hostname
        self.port: Final = url.port or _PORTS[url.scheme]
        self.address: Final = f"{url.scheme}://{self.host}:{self.port}"
        self._tls = _tls(config) if url.scheme == "mqtts" else None
        if self._tls is None and (config.ca_file or config.cert_file or config.key_file):
            raise ConfigError(f"broker {config.broker!r}: certificates are for mqtts://, this is not encrypted")
        self._username = config.username or None
        self._password = _password(config)
        if self._password is not None and self._username is None:
            raise ConfigError("[mqtt]: a password without username")

    def connection(self, identifier: str | None = None, will: Will | None = None, queue: int = 1000) -> Connection:
        """A new session, not yet connected. `queue` is how many incoming messages may wait; more are let fall."""
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


def retry_after_s(attempt: int, chance: float) -> float:
    """How long to wait before connecting again: doubling from 0.1 s, and by `chance` (0 to 1) up to half of it less, so
    that a fleet does not come back at one moment.
    """
    return min(0.1 * 2.0 ** min(attempt, 10), _RECONNECT_MAX_S) * (1 - chance / 2)


async def cancelled(*tasks: asyncio.Task[Any]) -> list[BaseException | Any]:
    """Cancel tasks that use a connection until they have ended; what each came to.

    Once is not enough: a connection that breaks while it is closed raises an error of its own in place of the
    cancellation, and `asyncio.wait_for`, with which aiomqtt waits, before Python 3.12 forgets one that comes with the
    result.
    """
    while pending := [task for task in tasks if not task.done()]:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=CANCEL_AGAIN_S)
    return await asyncio.gather(*tasks, return_exceptions=True)


def properties(**given: str) -> Properties:
    """User properties of a publish."""
    made = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    made.UserProperty = list(given.items())
    return made


def is_failure(answer: Any) -> bool:
    """Whether a broker's answer to a subscription is a refusal."""
    return bool(getattr(answer, "is_failure", False))


def payload_of(message: MqttMessage) -> bytes:
    """A message's payload; aiomqtt's types allow for others than what a broker can send."""
    payload: Any = message.payload
    return payload if isinstance(payload, bytes) else b""


def user_property(message: MqttMessage, name: str) -> str:
    """A message's user property, empty if it has none of that name."""
    given: list[tuple[str, str]] = getattr(message.properties, "UserProperty", [])
    return next((value for key, value in given if key == name), "")


def _tls(config: MqttConfig) -> ssl.SSLContext:
    if bool(config.cert_file) != bool(config.key_file):
        raise ConfigError("[mqtt]: cert_file and key_file belong together")
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
