"""What live sources share whose rings hold the module's records of 64 bytes: the merge, names of places, the filter."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator

from collector.live.filter import SessionFilter
from collector.live.places import NETNS_MASK, PlaceFinder, Places
from collector.live.record_merge import RingMerger, SeenPlaces
from collector.live.ring_source import FollowsDevices, RingSource
from contracts.records import Batch
from contracts.topology import Device


class RecordSource(RingSource):
    """A `RingSource` whose records name a device by namespace and ifindex.

    A tick follows the one before after `gather_interval_s`, or earlier when the rings' own mark wakes the source; after
    `poll_interval_s` if a ring fills so fast that it would be half full before. Few large ticks cost less than many.
    """

    def __init__(
        self,
        name: str,
        make_merger: Callable[[int, SeenPlaces], RingMerger],
        *,
        host: str,
        hold_back_ms: float,
        poll_interval_s: float,
        gather_interval_s: float,
        follower: FollowsDevices | None,
        filling: float,
    ) -> None:
        """`make_merger` makes the merge of the rings from the hold-back in ns and the places that records name."""
        self._names: dict[tuple[int, int], str] = {}
        self._inodes: dict[int, int] = {}
        self._places = SeenPlaces(lambda netns, ifindex: self._names.get((netns, ifindex), ""))
        self._merger = make_merger(int(hold_back_ms * 1e6), self._places)
        self._finder: PlaceFinder | None = None
        self._chosen: Places | None = None
        """Where the session records; None: everywhere."""
        self._poll_interval_s, self._gather_interval_s = poll_interval_s, gather_interval_s
        self._ticked_ns = time.monotonic_ns()
        self._swelling = False
        """Whether the last tick found a ring that would be half full after the gather interval."""
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

    def _find_places(self, wanted: SessionFilter, *, by_cookie: bool) -> Places | None:
        """Return the places at which the filter records, None for everywhere; from then on devices update them.

        Raises `Unavailable` or `ConfigError` for a place that cannot be found.
        """
        if wanted.by_place:
            self._finder = PlaceFinder(
                self._name, wanted, self._devices, host_netns=self._host_netns, by_cookie=by_cookie
            )
            self._chosen = self._finder.find(self._devices, self._sharers)
        return self._chosen

    @abstractmethod
    def _record_at(self, places: Places) -> None:
        """Record at these places, in place of the places before."""

    def _learned(self, devices: tuple[Device, ...]) -> None:
        """Index the devices by the cookie or inode with which records identify namespaces, and update the places."""
        by_cookie = self._places.inode_of is not None
        self._names = {(d.netns_cookie & NETNS_MASK if by_cookie else d.netns, d.ifindex): d.name for d in devices}
        self._inodes = {device.netns_cookie & NETNS_MASK: device.netns for device in devices}
        if self._finder is not None and self._follower is not None:
            places = self._finder.find(devices, self._follower.on_host_network)
            if places != self._chosen:
                self._chosen = places
                self._record_at(places)

    def _found(self, filled: float, fresh: float) -> None:
        """Note that a tick, which begins now, found a ring filled to `filled`, and one with `fresh` new; 0 to 1."""
        self._urgency.felt(filled)
        now_ns = time.monotonic_ns()
        since_ns, self._ticked_ns = now_ns - self._ticked_ns, now_ns
        self._swelling = fresh * self._gather_interval_s * 1e9 > since_ns / 2

    def _rest_s(self, *, soon: bool = False) -> float:
        """Return how long to pause until the next tick, s; with `soon` as if a ring filled fast.

        The interval runs from the start of one tick to the start of the next: the time for merging, and for the
        consumer's work meanwhile, must not add to the latency.
        """
        interval_s = self._poll_interval_s if self._swelling or soon else self._gather_interval_s
        return max(interval_s - (time.monotonic_ns() - self._ticked_ns) / 1e9, 0)

    def _taken(self, until_ns: int | None) -> Iterator[Batch]:
        return self._merger.flush() if until_ns is None else self._merger.take(until_ns)
