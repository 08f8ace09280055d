"""Finds the places that a filter names: containers, namespaces and devices become numbers that the kernel knows.

    container web ──► its network namespace, and the host's end of each of its veth pairs;
                      if the filter has `path`, the bridges of these ends and the outer devices too
    namespace blue ──► itself
    device eth1 ──► (the host's namespace, ifindex)

A container may start, end, and be renamed while the stream runs, so its places are found anew whenever devices change.
A container that matched once is known by its id from then on, under any name. Namespaces are those that the paths led
to at the start. Both are given by cookie where the kernel has cookies: the kernel never reuses a cookie.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from collector.live.filter import SessionFilter
from collector.machine.containers import SHORT_ID
from collector.machine.netns import open_nsfs
from contracts import abi
from contracts.errors import ConfigError, Unavailable, nearest
from contracts.topology import Device, Role, Sharer

_log = logging.getLogger(__name__)

NETNS_MASK: Final = (1 << 32) - 1
"""A record has 32 bits for a namespace: its inode, or the lower half of its cookie."""
_PAIRED: Final = frozenset({"veth", "netkit"})
"""Kinds of devices whose peer carries this device's packets and no others. Macvlan, ipvlan and VLAN devices share their
lower device."""


@dataclass(frozen=True, slots=True)
class Places:
    """The places at which a session records, in the order in which they were found."""

    netns: tuple[int, ...] = ()
    """Network namespaces: cookies, or inodes if the session identifies namespaces by inode. At most 16."""
    devices: tuple[tuple[int, int], ...] = ()
    """Devices, each with the number of its namespace and its ifindex. At most 16."""


class PlaceFinder:
    """Finds the places of one filter on this machine, each time that `find` is called with the current devices."""

    def __init__(
        self, source: str, wanted: SessionFilter, devices: Iterable[Device], *, host_netns: int, by_cookie: bool
    ) -> None:
        """`by_cookie`: whether the session identifies namespaces by cookie, which `devices` then have.

        Raises `Unavailable` for a namespace that cannot be opened, `ConfigError` for a device that does not exist.
        """
        self._wanted, self._host_netns, self._by_cookie = wanted, host_netns, by_cookie
        here = tuple(devices)
        numbers = {device.netns: self._number(device) for device in here}
        self._netns = tuple(_numbered(source, path, numbers, by_cookie=by_cookie) for path in wanted.netns)
        self._ids: dict[str, set[str]] = {name: set() for name in wanted.containers}
        """For each container that the filter names: the ids of the containers that have matched."""
        self._there: dict[str, bool | None] = dict.fromkeys(wanted.containers)
        """Whether a container of that name is recorded; None before the first call of `find`."""
        self._left_out: frozenset[str] = frozenset()
        known = {device.name for device in here if device.netns == host_netns}
        for name in wanted.devices:
            if name not in known:
                raise ConfigError(
                    f"no device {name!r} in the host's network namespace, which --device or [capture] devices names"
                    f"{nearest(name, known)}"
                )

    def find(self, devices: Sequence[Device], on_host_network: Iterable[Sharer] = ()) -> Places:
        """Return the places among the current devices.

        A log record reports a container that is waited for, that has come or has ended, and one that has no place: on
        the host's network, or beyond the 16 namespaces and devices that the kernel's filter holds.
        """
        found = {name: self._of_container(name, devices) for name in self._wanted.containers}
        self._report(found, devices, on_host_network)
        netns, ends = list(self._netns), list[tuple[int, int]]()
        for device in devices:
            if device.netns == self._host_netns and device.name in self._wanted.devices:
                ends.append((self._number(device), device.ifindex))
        if self._wanted.path and any(found.values()):
            # Before the containers' ends: without an outer device no container has an overhead.
            ends += [(self._number(device), device.ifindex) for device in devices if device.role is Role.OUTER]
        left_out = []
        for device in (device for of_name in found.values() for device in of_name):
            if (number := self._number(device)) not in netns:
                netns.append(number)
            ends += [end for end in self._on_host(device, devices) if end not in ends]
            if len(netns) > abi.MAX_NETNS or len(ends) > abi.MAX_DEVICES:
                left_out.append(device.container)
        self._warn_of(frozenset(left_out))
        return Places(tuple(netns[: abi.MAX_NETNS]), tuple(dict.fromkeys(ends))[: abi.MAX_DEVICES])

    def _of_container(self, name: str, devices: Iterable[Device]) -> list[Device]:
        ids = self._ids[name]
        # As elsewhere, a container is one whose device leads to this host: another lab's may have the same name.
        chosen = [d for d in devices if d.role is Role.INNER and (is_called(name, d) or d.container_id in ids)]
        ids.update(device.container_id for device in chosen if device.container_id)
        return chosen

    def _on_host(self, device: Device, devices: Sequence[Device]) -> list[tuple[int, int]]:
        """Return the places on the host of a container's device: its peer, and with `path` the peer's bridge."""
        if device.kind not in _PAIRED or device.peer_netns != self._host_netns or not device.peer_ifindex:
            return []
        peer = next((d for d in devices if d.key == (device.peer_netns, device.peer_ifindex)), None)
        bridge = peer.master_ifindex if peer is not None and self._wanted.path else 0
        host = self._number_of(self._host_netns, devices)
        return [(host, ifindex) for ifindex in (device.peer_ifindex, bridge) if ifindex]

    def _number(self, device: Device) -> int:
        return device.netns_cookie if self._by_cookie else device.netns

    def _number_of(self, netns: int, devices: Iterable[Device]) -> int:
        return next((self._number(device) for device in devices if device.netns == netns), 0)

    # --- messages -------------------------------------------------------------------------------

    def _report(
        self, found: dict[str, list[Device]], devices: Iterable[Device], on_host_network: Iterable[Sharer]
    ) -> None:
        for name, of_name in found.items():
            before, self._there[name] = self._there[name], bool(of_name)
            if self._there[name] == before:
                continue
            if of_name:
                _log.info("container %s: recorded", name)
            elif before:
                _log.warning("container %s has ended; waiting for a container of that name", name)
            elif any(name in (sharer.container, sharer.container_id) for sharer in on_host_network):
                _log.warning("container %s is on the host's network and has no device to record at", name)
            else:
                known = {device.container for device in devices if device.role is Role.INNER and device.container}
                _log.warning("no container %s yet%s; waiting for it", name, nearest(name, known))

    def _warn_of(self, left_out: frozenset[str]) -> None:
        if left_out - self._left_out:
            _log.warning(
                "the kernel's filter holds %d namespaces and %d devices; not or not wholly recorded: container %s",
                abi.MAX_NETNS,
                abi.MAX_DEVICES,
                ", ".join(sorted(left_out)),
            )
        self._left_out = left_out


def is_called(name: str, device: Device) -> bool:
    """Return whether `name` is the name or the id, whole or from its first 12 digits on, of a device's container."""
    return name == device.container or (len(name) >= SHORT_ID and device.container_id.startswith(name))


def _numbered(source: str, netns: str | int | None, numbers: dict[int, int], *, by_cookie: bool) -> int:
    """Return the cookie or inode of a namespace; `numbers` has the cookie of each namespace, by inode."""
    try:
        if isinstance(netns, int):
            inode = os.fstat(netns).st_ino
        else:
            fd = open_nsfs(netns or "/proc/self/ns/net")
            try:
                inode = os.fstat(fd).st_ino
            finally:
                os.close(fd)
    except OSError as error:
        raise Unavailable(
            source,
            f"network namespace {netns}: {error.strerror}",
            "a name in /run/netns, or a path like /run/netns/NAME or /proc/PID/ns/net",
        ) from error
    if not by_cookie:
        return inode
    if inode not in numbers:
        raise Unavailable(source, f"network namespace {netns}: its cookie is not known", "start again in a second")
    return numbers[inode]
