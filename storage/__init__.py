"""Delays and windows -> somewhere. Imports the shared part of `mace` only.

`SINKS` are those that the configuration asks for by `[sinks.NAME]`, besides the embedded store. Their libraries are
extras, so each is imported when it is wanted. A run of one stream takes `wanted_sinks`; who stores the streams of many
hosts makes each `SharedSink` once and gives every stream a `stream()` of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final

from contracts.config import Config
from contracts.errors import MissingExtra
from contracts.interfaces import Sink, Status
from contracts.vitals import Vitals
from storage.shared import Alone, SharedSink


@dataclass(frozen=True, slots=True)
class SinkKind:
    """How to ask for a sink, and how to get it. Its module has `check(config)` and `make(config, vitals)`.

    `make` returns a `storage.shared.SharedSink`.
    """

    module: str
    extra: str
    """The optional extra that its libraries come with."""
    wanted: Callable[[Config], bool]
    """Whether the configuration asks for it."""

    def check(self, config: Config) -> Status:
        """Whether it can work as configured; may ask its server."""
        if not self.wanted(config):
            return Status(True, "not configured")
        try:
            status: Status = self._loaded().check(config)
        except MissingExtra as error:
            return Status(False, error.why, error.remedy)
        return status

    def make(self, config: Config, vitals: Vitals) -> SharedSink:
        """The sink, not open yet. Raises `MissingExtra`, and `ConfigError` for what makes no sense together."""
        made: SharedSink = self._loaded().make(config, vitals)
        return made

    def _loaded(self) -> Any:
        try:
            return import_module(self.module)
        except ModuleNotFoundError as error:
            raise MissingExtra(self.extra, error.name or self.module) from error


SINKS: Final[dict[str, SinkKind]] = {
    "influxdb": SinkKind("storage.influxdb", "influxdb", lambda config: bool(config.sinks.influxdb.url)),
    "prometheus": SinkKind("storage.prometheus", "prometheus", lambda config: bool(config.sinks.prometheus.listen)),
    "mqtt": SinkKind("storage.mqtt_rows", "mqtt", lambda config: bool(config.sinks.mqtt.publish)),
}
"""Sinks by name, which is also that of their table in the configuration."""


def wanted_sinks(config: Config, vitals: Vitals) -> list[Sink]:
    """All sinks that the configuration asks for, not open yet, for one stream that has them for itself."""
    return [Alone(kind.make(config, vitals)) for kind in SINKS.values() if kind.wanted(config)]
