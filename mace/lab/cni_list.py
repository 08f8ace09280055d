"""CNI network configuration lists: parsed, checked, and made into one request for each plugin of the list.

The format is section 1 of the Container Network Interface specification 1.0.0; 0.3.0 to 1.1.0 have the same one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from contracts.errors import UsageError

VERSIONS: Final = ("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
"""Versions in which plugins are chained. Whether a plugin has a version, the plugin says itself."""
_BRIDGE: Final = "cni0"
"""Name that the plugin bridge gives a bridge without one."""
_NAME: Final = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*")
"""Names of networks, and of plugins, which are files of a directory (specification 1.0.0, section 1)."""


@dataclass(frozen=True, slots=True)
class NetworkList:
    """A network configuration list."""

    name: str
    version: str
    plugins: tuple[dict[str, Any], ...]

    @property
    def types(self) -> tuple[str, ...]:
        """Names of the plugins, in the order of the list."""
        return tuple(plugin["type"] for plugin in self.plugins)

    @property
    def programs(self) -> tuple[str, ...]:
        """Names of the executables: the plugins and the plugins that they call for addresses."""
        addresses = [plugin["ipam"]["type"] for plugin in self.plugins if plugin.get("ipam")]
        return tuple(dict.fromkeys([*self.types, *addresses]))

    @property
    def bridges(self) -> tuple[str, ...]:
        """Names of the bridges that plugins make in the host's namespace: these do not depend on the lab."""
        found = [plugin.get("bridge", _BRIDGE) for plugin in self.plugins if plugin["type"] == "bridge"]
        return tuple(name for name in dict.fromkeys(found) if isinstance(name, str))

    def request(self, position: int, previous: Mapping[str, Any] | None, directory: Path) -> dict[str, Any]:
        """Return what the plugin at `position` gets on its standard input.

        `previous` is the result of the plugin before it, or for DEL the result of the whole ADD. Plugins that keep
        files (host-local, tuning) keep them in `directory`.
        """
        asked = {key: value for key, value in self.plugins[position].items() if key != "capabilities"}
        asked |= {"cniVersion": self.version, "name": self.name}
        if asked["type"] == "tuning":
            asked["dataDir"] = str(directory / "tuning")
        if asked.get("ipam") and asked["ipam"]["type"] == "host-local":
            asked["ipam"] = {**asked["ipam"], "dataDir": str(directory / "networks")}
        if previous is not None:
            asked["prevResult"] = previous
        return asked

    def whole(self, directory: Path) -> str:
        """Return the list as a text for a runtime that calls the plugins itself; `directory` as in `request`."""
        plugins = [self.request(position, None, directory) for position in range(len(self.plugins))]
        return json.dumps({"cniVersion": self.version, "name": self.name, "plugins": plugins}, indent=1)


def parse(text: str) -> NetworkList:
    """Return the network configuration list in `text`. Raises `UsageError` for anything else."""
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"CNI configuration: no JSON ({error})") from None
    if not isinstance(raw, dict):
        raise UsageError(f"CNI configuration: expected an object, found {_shown(raw)}")
    if "plugins" not in raw and "type" in raw:
        raise UsageError('CNI configuration: one plugin; put it into the list "plugins" of a .conflist')
    name, version, plugins = raw.get("name"), raw.get("cniVersion"), raw.get("plugins")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UsageError(f"CNI configuration: name {_shown(name)}, expected letters, digits, '_', '.' and '-'")
    if version not in VERSIONS:
        raise UsageError(f"CNI configuration {name}: cniVersion {_shown(version)}, expected {', '.join(VERSIONS)}")
    if not isinstance(plugins, list) or not plugins:
        raise UsageError(f"CNI configuration {name}: plugins {_shown(plugins)}, expected a list of one or more")
    for number, plugin in enumerate(plugins, 1):
        if not isinstance(plugin, dict):
            raise UsageError(f"CNI configuration {name}: plugin {number} is {_shown(plugin)}, expected an object")
        _check_type(name, f"plugin {number}", plugin.get("type"))
        addresses = plugin.get("ipam")
        if not addresses:
            continue
        if not isinstance(addresses, dict):
            raise UsageError(f"CNI configuration {name}: ipam is {_shown(addresses)}, expected an object")
        _check_type(name, f"ipam of plugin {number}", addresses.get("type"))
        if addresses["type"] == "dhcp":
            raise UsageError(f"CNI configuration {name}: ipam dhcp needs a daemon, which the lab does not run")
    return NetworkList(name, version, tuple(plugins))


def _check_type(name: str, what: str, found: object) -> None:
    if not isinstance(found, str) or not _NAME.fullmatch(found):
        raise UsageError(f"CNI configuration {name}: {what} has type {_shown(found)}, expected the name of a program")


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
