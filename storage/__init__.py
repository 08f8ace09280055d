"""Stores and publishes delays and windows: the embedded store and the other sinks.

`SINKS` lists the sinks that `[sinks.NAME]` configures, besides the embedded store. Their libraries are extras, so a
sink's module is imported only if the sink is configured. A run with one stream uses `wanted_sinks`; the ingest, with
the streams of many hosts, makes each `SharedSink` once and calls its `stream()` for every stream.
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
    """A kind of sink. Its module has `check(config)`, and `make(config, vitals)`, which returns a `SharedSink`."""

    module: str
    extra: str
    """The extra that installs the sink's libraries."""
    wanted: Callable[[Config], bool]
    """Returns whether the sink is configured."""

    def check(self, config: Config) -> Status:
        """Return whether the sink can work as configured; may send a request to its server."""
        if not self.wanted(config):
            return Status(True, "not configured")
        try:
            status: Status = self._loaded().check(config)
        except MissingExtra as error:
            return Status(False, error.why, error.remedy)
        return status

    def make(self, config: Config, vitals: Vitals) -> SharedSink:
        """Return the sink, not open yet. Raises `MissingExtra`, and `ConfigError` for contradictory settings."""
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
"""Sinks by name, which is also the name of their table in the configuration."""


def wanted_sinks(config: Config, vitals: Vitals) -> list[Sink]:
    """Return all configured sinks, not open yet, for a run with one stream."""
    return [Alone(kind.make(config, vitals)) for kind in SINKS.values() if kind.wanted(config)]
