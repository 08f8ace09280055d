"""The filter of live sources that select packets in the kernel, and its making from `[capture]`."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from collector.machine.netns import path_of
from contracts import abi
from contracts.config import CaptureConfig
from contracts.errors import ConfigError, nearest
from contracts.hooks import Hook
from contracts.protocols import PROTOCOLS


@dataclass(frozen=True, slots=True)
class DeviceInNetns:
    """A device whose packets pass the filter."""

    ifindex: int
    netns: str | int | None = None
    """The device's namespace: a path, an open file descriptor, or None for the opener's."""


@dataclass(frozen=True, slots=True)
class SessionFilter:
    """Which packets to record. Every condition must hold; an empty condition always holds. Raises `ValueError`.

    A filter by namespace or device drops the records of all other devices. The overhead of a path needs the records of
    all its devices.
    """

    netns: tuple[str | int | None, ...] = ()
    """Network namespaces: paths, open file descriptors, or None for the opener's. At most 16."""
    devices: tuple[DeviceInNetns, ...] = ()
    """Devices, at most 16."""
    l4_protocols: tuple[int, ...] = ()
    """IP protocol numbers, 0 to 255; 0 also passes packets that are not IP."""
    sample_shift: int = 0
    """Record one packet in 2**n, the same packets at every hook; 0 to 31."""
    hooks: tuple[Hook, ...] = ()

    def __post_init__(self) -> None:
        for name, ok, expected in (
            ("netns", len(self.netns) <= abi.MAX_NETNS, f"at most {abi.MAX_NETNS}"),
            ("devices", len(self.devices) <= abi.MAX_DEVICES, f"at most {abi.MAX_DEVICES}"),
            ("devices", all(0 < d.ifindex < 2**32 for d in self.devices), "indexes from 1 on"),
            ("l4_protocols", all(0 <= p <= 255 for p in self.l4_protocols), "numbers from 0 to 255"),
            ("sample_shift", 0 <= self.sample_shift <= abi.MAX_SAMPLE_SHIFT, f"0 to {abi.MAX_SAMPLE_SHIFT}"),
            ("hooks", all(0 < hook < abi.HOOK_SLOTS for hook in self.hooks), "observation points"),
        ):
            if not ok:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected {expected}")


def wanted(config: CaptureConfig) -> SessionFilter:
    """Make the filter that `[capture]` describes; raises `ConfigError` for an unknown device or protocol.

    Namespaces are given by name or path, devices of this network namespace by name.
    """
    try:
        return SessionFilter(
            netns=tuple(map(path_of, config.netns)),
            devices=tuple(DeviceInNetns(_index(name)) for name in config.devices),
            l4_protocols=tuple(map(_protocol, config.protocols)),
            sample_shift=config.sample_shift,
        )
    except ValueError as error:
        raise ConfigError(f"[capture] {error}") from error


def _index(name: str) -> int:
    try:
        return socket.if_nametoindex(name)
    except OSError as error:
        known = [known for _, known in socket.if_nameindex()]
        raise ConfigError(
            f"[capture] devices: no device {name!r} in this network namespace{nearest(name, known)}"
        ) from error


def _protocol(name: str) -> int:
    if name.isdecimal():
        return int(name)
    if name.lower() not in PROTOCOLS:
        raise ConfigError(
            f"[capture] protocols: {name!r}, expected a number or one of {', '.join(PROTOCOLS)}"
            f"{nearest(name.lower(), PROTOCOLS)}"
        )
    return PROTOCOLS[name.lower()]
