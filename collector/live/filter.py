"""The filter of a live source, and its making from `[capture]`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from collector.machine.netns import path_of
from contracts import abi
from contracts.config import CaptureConfig
from contracts.errors import ConfigError, nearest
from contracts.hooks import Hook
from contracts.protocols import PROTOCOLS


@dataclass(frozen=True, slots=True)
class SessionFilter:
    """Which packets to record. Raises `ValueError` for a value out of range.

    `containers`, `netns` and `devices` are places: a packet's record passes at any of them, or everywhere if none is
    given. Protocols, sample and hooks are conditions: all of them must hold as well, and an empty one always holds.
    """

    containers: tuple[str, ...] = ()
    """Containers, by name or id, whether or not they run yet. `collector.live.places` finds their devices."""
    netns: tuple[str | int | None, ...] = ()
    """Network namespaces: paths, open file descriptors, or None for the opener's. At most 16."""
    devices: tuple[str, ...] = ()
    """Names of devices in the host's network namespace, at most 16."""
    path: bool = False
    """Whether the places of `containers` include the bridges and the outer devices on their packets' path, where the
    host's other packets are recorded too."""
    l4_protocols: tuple[int, ...] = ()
    """IP protocol numbers, 0 to 255; 0 also passes packets that are not IP."""
    sample_shift: int = 0
    """Record one packet in 2**n, the same packets at every hook; 0 to 31."""
    hooks: tuple[Hook, ...] = ()

    def __post_init__(self) -> None:
        for name, ok, expected in (
            ("containers", all(self.containers), "names or ids"),
            ("netns", len(self.netns) <= abi.MAX_NETNS, f"at most {abi.MAX_NETNS}"),
            ("devices", len(self.devices) <= abi.MAX_DEVICES, f"at most {abi.MAX_DEVICES}"),
            ("l4_protocols", all(0 <= p <= 255 for p in self.l4_protocols), "numbers from 0 to 255"),
            ("sample_shift", 0 <= self.sample_shift <= abi.MAX_SAMPLE_SHIFT, f"0 to {abi.MAX_SAMPLE_SHIFT}"),
            ("hooks", all(0 < hook < abi.HOOK_SLOTS for hook in self.hooks), "observation points"),
        ):
            if not ok:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected {expected}")

    @property
    def by_place(self) -> bool:
        """Whether only packets at certain places are recorded."""
        return bool(self.containers or self.netns or self.devices)


def wanted(config: CaptureConfig) -> SessionFilter:
    """Make the filter that `[capture]` describes; raises `ConfigError` for an unknown protocol or a value out of range.

    Namespaces are given by name or path. The whole path of the containers is recorded, unless devices are named.
    """
    try:
        return SessionFilter(
            containers=config.containers,
            netns=tuple(map(path_of, config.netns)),
            devices=config.devices,
            path=_with_path(config),
            l4_protocols=tuple(map(_protocol, config.protocols)),
            sample_shift=config.sample_shift,
        )
    except ValueError as error:
        raise ConfigError(f"[capture] {error}") from error


@dataclass(frozen=True, slots=True)
class Choice:
    """What a source does with the filter of `[capture]`."""

    told: str = ""
    """Which packets are chosen, and where, for people; empty without a filter."""
    after_reading: bool = False
    """Whether the source yields the records of all packets, so that results have to be chosen."""


def in_kernel(config: CaptureConfig) -> Choice:
    """Return the choice of a source that selects in the kernel all that `[capture]` names. Raises as `wanted`."""
    wanted(config)
    said = told(config)
    path = " and the bridges and outer devices on the way" if _with_path(config) else ""
    return Choice(f"{said}{path}, chosen in the kernel" if said else "")


def unfiltered(config: CaptureConfig) -> CaptureConfig:
    """Return the configuration without its filter."""
    return replace(config, containers=(), netns=(), devices=(), protocols=(), sample_shift=0)


def told(config: CaptureConfig) -> str:
    """Return which packets pass the filter, for people; "" if all packets pass."""
    places = [
        *(f"container {name}" for name in config.containers),
        *(f"namespace {name}" for name in config.netns),
        *(f"device {name}" for name in config.devices),
    ]
    conditions = [
        "of protocol " + ", ".join(config.protocols) if config.protocols else "",
        "at " + ", ".join(places) if places else "",
    ]
    packets = f"one packet in {1 << config.sample_shift}" if config.sample_shift else "packets"
    said = " ".join(filter(None, ["only", packets, *conditions]))
    return said if said != "only packets" else ""


def _with_path(config: CaptureConfig) -> bool:
    return bool(config.containers) and not config.devices


def _protocol(name: str) -> int:
    if name.isdecimal():
        return int(name)
    if name.lower() not in PROTOCOLS:
        raise ConfigError(
            f"[capture] protocols: {name!r}, expected a number or one of {', '.join(PROTOCOLS)}"
            f"{nearest(name.lower(), PROTOCOLS)}"
        )
    return PROTOCOLS[name.lower()]
