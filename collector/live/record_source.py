"""What live sources share whose rings hold the module's records of 64 bytes: the merge, and the names of places."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from collector.live.record_merge import RingMerger, SeenPlaces
from collector.live.ring_source import FollowsDevices, RingSource
from contracts.records import Batch
from contracts.topology import Device

_NETNS_MASK = (1 << 32) - 1
"""A record has 32 bits for a namespace: its inode, or the lower half of its cookie."""


class RecordSource(RingSource):
    """A `RingSource` whose records name a device by namespace and ifindex."""

    def __init__(
        self,
        name: str,
        make_merger: Callable[[int, SeenPlaces], RingMerger],
        *,
        host: str,
        hold_back_ms: float,
        follower: FollowsDevices | None,
        filling: float,
    ) -> None:
        """`make_merger` makes the merge of the rings from the hold-back in ns and the places that records name."""
        self._names: dict[tuple[int, int], str] = {}
        self._inodes: dict[int, int] = {}
        self._places = SeenPlaces(lambda netns, ifindex: self._names.get((netns, ifindex), ""))
        self._merger = make_merger(int(hold_back_ms * 1e6), self._places)
        super().__init__(
            name,
            host=host,
            hold_back_ms=hold_back_ms,
            follower=follower,
            watermark=self._merger,
            seen=self._places,
            filling=filling,
        )

    def _identify_by_cookie(self) -> bool:
        """Let records identify namespaces by cookie if the cookies of all devices are known; return whether they are.

        Otherwise records identify namespaces by inode, which can be looked up without a follower of devices.
        """
        known = bool(self._devices) and all(device.netns_cookie for device in self._devices)
        if known:
            self._places.inode_of = lambda cookie: self._inodes.get(cookie, 0)
        return known

    def _learned(self, devices: tuple[Device, ...]) -> None:
        """Index the devices by the cookie or inode with which records identify namespaces."""
        by_cookie = self._places.inode_of is not None
        self._names = {(d.netns_cookie & _NETNS_MASK if by_cookie else d.netns, d.ifindex): d.name for d in devices}
        self._inodes = {device.netns_cookie & _NETNS_MASK: device.netns for device in devices}

    def _taken(self, until_ns: int | None) -> Iterator[Batch]:
        return self._merger.flush() if until_ns is None else self._merger.take(until_ns)
