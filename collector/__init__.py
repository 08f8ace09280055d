"""Sources: they read records from the kernel, files or the network, in batches. Imports only `contracts`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from collector.bpf import source as bpf_source
from collector.bpf.devices import BpfDeviceFollower
from collector.ftrace import source as ftrace_source
from collector.kmod import source as kmod_source
from collector.live.filter import Choice, in_kernel
from collector.live.ring_source import FollowsDevices
from collector.machine.devices import DeviceFollower
from contracts.config import CaptureConfig
from contracts.interfaces import Source, Status


@dataclass(frozen=True, slots=True)
class LiveSource:
    """A live source of this machine's records."""

    check: Callable[[], Status]
    """Returns whether the source can run here."""
    make: Callable[[CaptureConfig, FollowsDevices, str], Source]
    """Makes the source from the configuration, a follower of devices, and the host's name (empty: the machine's own).

    Raises as `choice`.
    """
    choice: Callable[[CaptureConfig], Choice]
    """Returns which packets the source chooses where, by the configuration.

    Raises `Unavailable` if the source cannot choose them, `ConfigError` for an unknown protocol.
    """
    follow: Callable[..., FollowsDevices] = DeviceFollower
    """Makes the follower of devices that needs no more rights than the source; arguments as of `DeviceFollower`."""


SOURCES: Final[dict[str, LiveSource]] = {
    "kmod": LiveSource(kmod_source.KmodSource.check, kmod_source.configured, in_kernel),
    "bpf": LiveSource(bpf_source.BpfSource.check, bpf_source.configured, in_kernel, BpfDeviceFollower),
    "ftrace": LiveSource(ftrace_source.FtraceSource.check, ftrace_source.configured, ftrace_source.choice),
}
"""Live sources by name, in the order of `contracts.sources.LIVE`."""
