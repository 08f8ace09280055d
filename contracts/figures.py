"""Summary figures of a run: delays per device and per container, and the ledger, for live and stored results.

`run`, `demo` and `replay` feed the summary with the correlator's windows, `report` with the rows of the store. Both
add up the same histogram bins, so that live and stored figures are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from sys import getsizeof
from typing import Any, Final, Self

import numpy as np

from contracts.arrays import Ints
from contracts.histogram import QUANTILES, merge, quantiles
from contracts.hooks import BY_HOOK, Hook
from contracts.ledger import Ledger
from contracts.pods import NO_POD, pod_name
from contracts.results import Results, Totals
from contracts.schema import Direction, Grades, HookCost, Segment
from contracts.topology import Device, Role, Sharer, newest_names
from contracts.vitals import Account
from contracts.windowtable import WindowTable

_RANK_OF_ROLE: Final = {Role.INNER: 0, Role.HOST: 3, Role.OUTER: 4, Role.REMOTE: 5}
_RANK_ELSE: Final = 6
INGRESS_UNSEEN: Final = ("macvlan", "macvtap", "ipvlan", "ipvtap")
"""Kinds of devices that receive packets past all tracepoints: the lower device's receive handler assigns the packet to
them and repeats the receive path (`another_round` in __netif_receive_skb_core), which starts after the tracepoint
`netif_receive_skb`. The hook `ip_rcv` sees these packets."""
_IP_RCV: Final = BY_HOOK[Hook.IP_RCV].tracepoint
_REMEDY: Final = "The kernel module measures it, and BPF does unless `mace check` says `without ip_rcv`."
_MANY_SENT: Final = 100
"""Packets sent per packet received, ARP included, from which on a device's ingress is reported as unseen."""
COUNTS_AS: Final = {
    Segment.DEVICE: "overhead",
    Segment.OUTSIDE: "outside",
    Segment.DELIVERY: "delivery",
    Segment.OVERHEAD: "whole",
    Segment.WAITING: "in delivery",
}
"""Name under which tables show each segment."""
_PENDING_BYTES: Final = 1 << 15
"""Bytes of bins and counts that may wait to be merged, per histogram: bounds memory and keeps merges rare."""


def ranks(devices: Sequence[Device]) -> list[int]:
    """Return each device's position on the way out of a container, which sorts a path without a packet's own order.

    0 inner device, 1 the host's end of its veth, 2 the bridge of which that end is a port, 3 other devices of the host,
    4 outer device, 5 devices beyond it, 6 any other device.
    """
    ends = {(d.peer_netns, d.peer_ifindex) for d in devices if d.role is Role.INNER}
    masters = {(d.netns, d.master_ifindex) for d in devices if d.key in ends and d.master_ifindex}

    def rank(d: Device) -> int:
        if d.role is Role.HOST and d.key in ends:
            return 1
        if d.role is Role.HOST and d.key in masters:
            return 2
        return _RANK_OF_ROLE.get(d.role, _RANK_ELSE)

    return [rank(d) for d in devices]


@dataclass(frozen=True, slots=True, order=True)
class DevicePlace:
    """A device as tables and stored rows name it. Two places are the same device only if all fields are equal."""

    rank: int
    container: str
    netns: str
    netns_id: int
    device: str
    ifindex: int
    kind: str
    role: str
    host: str = ""
    container_id: str = ""
    """As in `Device`. One container id may have had several names, and several ids may have had one name."""

    @classmethod
    def of(cls, device: Device, rank: int, host: str = "") -> DevicePlace:
        """Return the place of a device of the topology; `rank` is the device's value from `ranks`."""
        return cls(
            rank,
            device.container,
            device.netns_name,
            device.netns,
            device.name,
            device.ifindex,
            device.kind,
            device.role.value,
            host,
            device.container_id,
        )


class Distribution:
    """Delays of one device, direction and segment: count, sum, extremes and histogram. It can only grow."""

    __slots__ = ("_bins", "_counts", "_pending", "count", "max_ns", "min_ns", "sum_ns")

    def __init__(self) -> None:
        self.count = 0
        self.sum_ns = 0
        self.min_ns = 0
        self.max_ns = 0
        self._bins: list[Ints] = []
        self._counts: list[Ints] = []
        self._pending = 0

    def add(self, count: int, sum_ns: int, min_ns: int, max_ns: int, bins: Ints, counts: Ints) -> None:
        """Add `count` delays; `bins` (distinct) and `counts` (adding up to `count`) are int64 of equal length."""
        if not count:
            return
        self.min_ns = min(self.min_ns, min_ns) if self.count else min_ns
        self.max_ns = max(self.max_ns, max_ns) if self.count else max_ns
        self.count += count
        self.sum_ns += sum_ns
        # Copies: the arguments are views into arrays of many windows, which a reference would keep in memory.
        self._bins.append(np.array(bins, np.int64))
        self._counts.append(np.array(counts, np.int64))
        self._pending += 2 * getsizeof(self._bins[-1])
        if self._pending > _PENDING_BYTES:
            self.histogram()

    def __add__(self, other: Distribution) -> Distribution:
        both = Distribution()
        both += self
        both += other
        return both

    def __iadd__(self, other: Distribution) -> Self:
        self.add(other.count, other.sum_ns, other.min_ns, other.max_ns, *other.histogram())
        return self

    def histogram(self) -> tuple[Ints, Ints]:
        """Return the ascending distinct bins of `contracts.histogram` and their counts; int64."""
        if len(self._bins) != 1:
            empty = np.zeros(0, np.int64)
            bins, counts = merge(np.concatenate([*self._bins, empty]), np.concatenate([*self._counts, empty]))
            self._bins, self._counts, self._pending = [bins], [counts], 0
        return self._bins[0], self._counts[0]

    def quantiles(self, q: tuple[float, ...] = QUANTILES) -> list[int]:
        """Return the delays, ns, at the given quantiles."""
        # The middle of a bin may lie outside the range of delays that were observed.
        return [min(max(v, self.min_ns), self.max_ns) for v in quantiles(*self.histogram(), q).tolist()]

    @property
    def mean_ns(self) -> float:
        """Arithmetic mean of the delays, ns; 0 without delays."""
        return self.sum_ns / self.count if self.count else 0.0

    def as_dict(self) -> dict[str, float]:
        """Return count, min_ns, mean_ns, p50_ns, p90_ns, p99_ns, p999_ns and max_ns by name."""
        p50, p90, p99, p999 = self.quantiles()
        return {
            "count": self.count,
            "min_ns": self.min_ns,
            "mean_ns": round(self.mean_ns, 1),
            "p50_ns": p50,
            "p90_ns": p90,
            "p99_ns": p99,
            "p999_ns": p999,
            "max_ns": self.max_ns,
        }


FigureKey = tuple[DevicePlace, Direction, Segment]


def path_order(key: FigureKey) -> tuple[Any, ...]:
    """Return the sort key of a row: egress before ingress, each in the order in which packets cross the devices."""
    place, direction, segment = key
    inwards = direction is Direction.INGRESS
    return (
        direction is Direction.UNKNOWN,
        direction,
        segment in (Segment.DELIVERY, Segment.WAITING),
        -place.rank if inwards else place.rank,
        place,
        segment,
    )


def imitated(devices: Sequence[Device]) -> tuple[str, ...]:
    """Return the names that devices of the host share with devices of other namespaces, sorted; `lo` is excluded."""
    of_host = {d.name for d in devices if d.role in (Role.HOST, Role.OUTER)}
    of_others = {d.name for d in devices if d.role not in (Role.HOST, Role.OUTER)}
    return tuple(sorted((of_host & of_others) - {"lo"}))


class Names:
    """The newest name of each container, by container id."""

    def __init__(self) -> None:
        self._newest: dict[str, tuple[int, str]] = {}
        self._shown: dict[DevicePlace, DevicePlace] = {}

    def note(self, container_id: str, name: str, utc_ns: int) -> None:
        """Note a container's name at a time. For equal times the later call wins."""
        before = self._newest.get(container_id)
        if container_id and (before is None or utc_ns >= before[0]):
            self._newest[container_id] = utc_ns, name
            if before is None or before[1] != name:
                self._shown.clear()

    def take(self, other: Names) -> None:
        """Note all names that `other` has noted."""
        for container_id, (utc_ns, name) in other._newest.items():
            self.note(container_id, name, utc_ns)

    def shown(self, place: DevicePlace) -> DevicePlace:
        """Return the place with the container's newest name and without the container's id."""
        if not place.container_id:
            return place
        if place not in self._shown:
            _, name = self._newest.get(place.container_id, (0, place.container))
            self._shown[place] = replace(place, container=name, container_id="")
        return self._shown[place]

    def as_list(self) -> list[list[Any]]:
        """Return a list [container id, UTC in ns, name] for each container, of plain values for JSON."""
        return [[container_id, *told] for container_id, told in self._newest.items()]


@dataclass(slots=True)
class Summary:
    """The figures of a run: fed with `add` (live) or by key (stored), read as a dict or through `mace.shown.tables`."""

    ledger: Ledger = field(default_factory=Ledger)
    packets: int = 0
    grades: Grades = field(default_factory=Grades)
    """Packets by grade (on what ground a packet's records belong together); counts of whole runs, like the ledger."""
    rows_not_stored: int = 0
    """Rows that the store could not write; 0 where nothing is stored."""
    cost: tuple[HookCost, ...] = ()
    """Cost of observing, per hook; empty if the source cannot measure it."""
    note: str = ""
    """Sentence for the reader on where the figures come from."""
    several_devices: int | None = 0
    """Ambiguous packets that several devices fit; None in a summary of a store, which does not keep this count."""
    imitated: tuple[str, ...] = ()
    """Names that devices of the host and of other namespaces share; filled if packets fitted several devices."""
    sharers: tuple[Sharer, ...] = ()
    """Containers that share the host's network namespace, and so have no devices of their own."""
    sinks: dict[str, Account] = field(default_factory=dict)
    """Account of each sink with a server: where the rows given to the sink went."""
    names: Names = field(default_factory=Names)
    pods: dict[str, str] = field(default_factory=dict)
    """UID of a Kubernetes pod → its containers, as in `Device.pod_containers`."""
    sees_past_tracepoints: bool | None = None
    """Whether the sources of all runs recorded the hook `ip_rcv`; None as long as no run's hooks are known."""
    _by_width: dict[int, dict[FigureKey, Distribution]] = field(default_factory=dict)
    _devices: tuple[Device, ...] = ()
    _present: tuple[Device, ...] | None = None
    _places: list[DevicePlace] = field(default_factory=list)

    def add(self, results: Results) -> None:
        """Add the correlator's next results."""
        self.count(results.rows.windows, results.rows.devices)
        self.update(results.totals)

    def observed(self, hooks: Iterable[str]) -> None:
        """Note the hooks of a run (`StreamHeader.hooks`), which decide what `unseen` returns."""
        self._observed(_IP_RCV in hooks)

    def _observed(self, seen: bool | None) -> None:
        if seen is not None:
            self.sees_past_tracepoints = seen and self.sees_past_tracepoints is not False

    def count(self, windows: WindowTable, devices: tuple[Device, ...]) -> None:
        """Add the delays of windows, whose `device` points to `devices`.

        Windows of several widths count each delay once per width.
        """
        if devices != self._devices:
            self._devices = devices
            self._places = [DevicePlace.of(d, r) for d, r in zip(devices, ranks(devices), strict=True)]
        for w in windows:
            place = self._places[w.device]
            self.names.note(place.container_id, place.container, w.start_utc_ns)
            d = self.distribution(place, w.direction, w.segment, w.width_s)
            d.add(w.count, w.sum_ns, w.min_ns, w.max_ns, w.bins, w.counts)

    def update(self, totals: Totals) -> None:
        """Replace the totals by newer ones of the same run."""
        self.ledger, self.packets, self.cost = totals.ledger, totals.packets, totals.cost
        self.grades, self.several_devices = totals.grades, totals.several_devices
        if totals.several_devices and totals.present is not None:
            self.imitated = imitated(totals.present)
        self.sharers = newest_names((*self.sharers, *totals.on_host_network))
        for device in self._new(totals.present):
            self.names.note(device.container_id, device.container, totals.upto_utc_ns)
            if device.pod_containers:
                self.pods[device.container_id] = device.pod_containers

    def _new(self, present: tuple[Device, ...] | None) -> tuple[Device, ...]:
        """Return the devices of `present` if that list is new, else none."""
        if present is self._present or present is None:
            return ()
        self._present = present
        return present

    def distribution(
        self, place: DevicePlace, direction: Direction, segment: Segment, width_s: int = 0
    ) -> Distribution:
        """Return the distribution of a place, direction, segment and window width, empty if it is new; add to it."""
        of_width = self._by_width.setdefault(width_s, {})
        key = (place, direction, segment)
        found = of_width.get(key)
        if found is None:
            found = of_width[key] = Distribution()
        return found

    def distributions(self) -> Iterator[tuple[int, FigureKey, Distribution]]:
        """Yield (window width in s, key, distribution) of every distribution."""
        for width_s, of_width in self._by_width.items():
            for key, distribution in of_width.items():
                yield width_s, key, distribution

    def merge(self, other: Summary) -> None:
        """Add the figures of another run."""
        self.ledger += other.ledger
        self.packets += other.packets
        self.grades += other.grades
        known = self.several_devices is not None and other.several_devices is not None
        self.several_devices = (self.several_devices or 0) + (other.several_devices or 0) if known else None
        self.imitated = tuple(sorted({*self.imitated, *other.imitated}))
        self.rows_not_stored += other.rows_not_stored
        self._observed(other.sees_past_tracepoints)
        self.cost = added(self.cost, other.cost)
        self.sharers = newest_names((*self.sharers, *other.sharers))
        self.names.take(other.names)
        self.pods |= other.pods
        self.note = " ".join(dict.fromkeys(note for note in (self.note, other.note) if note))
        for name, account in other.sinks.items():
            self.sinks[name] = self.sinks[name] + account if name in self.sinks else account
        for width_s, key, distribution in other.distributions():
            mine = self.distribution(*key, width_s)
            mine += distribution

    def rows(self, *segments: Segment) -> list[tuple[FigureKey, Distribution]]:
        """Return (key, distribution) of the segments named (of all if none is named), in the order of `path_order`.

        Among several window widths the rows are those of the width with the most delays, then of the narrowest: wide
        windows become final later.
        """
        if not self._by_width:
            return []
        width = min(self._by_width, key=lambda w: (-sum(d.count for d in self._by_width[w].values()), w))
        chosen = self._by_width[width].items()
        return sorted(
            self._of_newest_names((k, d) for k, d in chosen if d.count and (not segments or k[2] in segments)),
            key=lambda r: path_order(r[0]),
        )

    def _of_newest_names(self, rows: Iterable[tuple[FigureKey, Distribution]]) -> list[tuple[FigureKey, Distribution]]:
        """Return the rows under the containers' newest names; the rows of a renamed container are merged."""
        merged: dict[FigureKey, Distribution] = {}
        ids: dict[DevicePlace, str] = {}
        for (place, direction, segment), distribution in rows:
            shown = self.names.shown(place)
            # Rows from before the runtime answered may have no id: the name identifies the container then.
            ids[shown] = place.container_id or ids.get(shown, "")
            key = shown, direction, segment
            before = merged.get(key)
            merged[key] = distribution if before is None else before + distribution
        return [((replace(p, container_id=ids[p]) if ids[p] else p, d, s), of) for (p, d, s), of in merged.items()]

    def overhead(self) -> list[tuple[FigureKey, Distribution]]:
        """Return one (key, distribution) per container and direction.

        If a container has several inner devices, the place names the first of them.
        """
        merged: dict[tuple[str, str, str, int, Direction], tuple[FigureKey, Distribution]] = {}
        for key, distribution in self.rows(Segment.OVERHEAD):
            place, direction, _ = key
            group = (place.host, place.container, place.netns, place.netns_id, direction)
            if group not in merged:
                merged[group] = (key, Distribution())
            whole = merged[group][1]
            whole += distribution
        return [merged[g] for g in sorted(merged)]

    @property
    def on_host_network(self) -> list[str]:
        """Names of the containers that share the host's network, sorted."""
        return sorted({sharer.container for sharer in self.sharers})

    def as_dict(self) -> dict[str, Any]:
        """Return the summary as values for one JSON object.

        `ledger`: the categories of `contracts.ledger`. `packets`. `grades`: ambiguous, buffer, content, exact, waited
        (packets) and told_apart (see `contracts.schema.Grades`). `devices`: a list in the order of the path of objects
        with container, netns, netns_id, device, ifindex, kind, role, direction, segment (`device` or `outside`), count,
        min_ns, mean_ns, p50_ns, p90_ns, p99_ns, p999_ns, max_ns. `overhead`: container, netns, netns_id,
        direction and the same figures. `delivery`: like `devices`. Each entry has `host` if several hosts are known,
        and `container_id` if the container has an id; a renamed container has one entry, under its newest name. Of a
        Kubernetes pod it has `namespace`, `pod`, `workload`, and `pod_containers` (a list) if they are known.
        Present only if not empty: `waiting` (like `delivery`: the part of deliveries in which a followed reader waited
        for a CPU), `rows_not_stored`, `unseen` (sentences), `ambiguous` (ambiguous packets by cause:
        `several_devices` or `several_packets` fit, and `imitated`, the device names that the host shares with other
        namespaces; a store does not keep them), `on_host_network` (names of containers), `note`, `cost` (per hook:
        hook, calls, timed, timed_ns, ns_per_call) and `sinks` (by name, the counts of `contracts.vitals.Account`).
        """
        several = self.several_hosts()
        found: dict[str, Any] = {
            "ledger": self.ledger.as_dict(),
            "packets": self.packets,
            "grades": self.grades.as_dict(),
            "devices": [self._entry(r, several) for r in self.rows(Segment.DEVICE, Segment.OUTSIDE)],
            "overhead": [self._entry(r, several, whole=True) for r in self.overhead()],
            "delivery": [self._entry(r, several) for r in self.rows(Segment.DELIVERY)],
        }
        if waiting := self.rows(Segment.WAITING):
            found["waiting"] = [self._entry(r, several) for r in waiting]
        if self.rows_not_stored:
            found["rows_not_stored"] = self.rows_not_stored
        if unseen := self.unseen():
            found["unseen"] = unseen
        if self.grades.ambiguous and self.several_devices is not None:
            found["ambiguous"] = {
                "several_devices": self.several_devices,
                "several_packets": self.grades.ambiguous - self.several_devices,
                "imitated": list(self.imitated),
            }
        if self.on_host_network:
            found["on_host_network"] = self.on_host_network
        if self.cost:
            found["cost"] = [cost.as_dict() for cost in self.cost]
        if self.note:
            found["note"] = self.note
        if self.sinks:
            found["sinks"] = {name: account.as_dict() for name, account in self.sinks.items()}
        return found

    def _entry(self, row: tuple[FigureKey, Distribution], with_host: bool, *, whole: bool = False) -> dict[str, Any]:
        (place, direction, segment), distribution = row
        found: dict[str, Any] = {"host": place.host} if with_host else {}
        found |= {"container": place.container}
        if place.container_id:
            found["container_id"] = place.container_id
        if (named := pod_name(place.container)) is not NO_POD:
            found |= named._asdict()
        if containers := self.pods.get(place.container_id):
            found["pod_containers"] = containers.split(",")
        found |= {"netns": place.netns, "netns_id": place.netns_id}
        if not whole:
            found |= {"device": place.device, "ifindex": place.ifindex, "kind": place.kind, "role": place.role}
        found["direction"] = direction.name.lower()
        if not whole:
            found["segment"] = segment.name.lower()
        return found | distribution.as_dict()

    def losses(self) -> list[str]:
        """Return a sentence for each loss that the figures do not cover; no sentence if there is none."""
        told = []
        if self.ledger.lost:
            told.append(f"{self.ledger.lost:,} records were lost in the kernel's ring: the figures are without them.")
        if self.ledger.discarded:
            told.append(f"{self.ledger.discarded:,} records were discarded by a full buffer of our own.")
        if self.rows_not_stored:
            told.append(f"{self.rows_not_stored:,} rows could not be written to the store.")
        told += self.unseen()
        for name, account in self.sinks.items():
            if account.not_stored:
                told.append(f"{account.not_stored:,} rows are not in {name} and will not be: {account.why()}.")
        if self.ledger.imbalance:
            told.append(f"{self.ledger.imbalance:,} records are in no category of the ledger: a defect, please report.")
        return told

    def unseen(self) -> list[str]:
        """Return a sentence for each inner device whose ingress the source does not show; none if it shows `ip_rcv`."""
        if self.sees_past_tracepoints:
            return []
        places = {place for (place, _, _), _ in self.rows(Segment.DEVICE) if place.role == Role.INNER}
        seen: dict[tuple[DevicePlace, Direction], int] = {}
        for (place, direction, _), distribution in self.rows(Segment.DEVICE, Segment.DELIVERY):
            seen[place, direction] = seen.get((place, direction), 0) + distribution.count
        told, owner = [], self.owners()
        for place in sorted(places):
            sent = seen.get((place, Direction.EGRESS), 0)
            if place.kind in INGRESS_UNSEEN:
                told.append(
                    f"{place.device} of {owner(place)} is a {place.kind}: what it receives passes no tracepoint"
                    f" there, so its ingress is not measured. {_REMEDY}"
                )
            elif sent >= _MANY_SENT * (1 + (received := seen.get((place, Direction.INGRESS), 0))):
                told.append(
                    f"{place.device} of {owner(place)} sent {sent:,} packets and was seen to receive"
                    f" {received:,}: either no more came, or what it receives is put on it past its tracepoints"
                    " (bpf_redirect_peer, as Cilium's host routing does), and its ingress is not measured."
                    f" {_REMEDY}"
                )
        return told

    def several_hosts(self) -> bool:
        """Return whether the figures cover more than one host."""
        return len({place.host for of_width in self._by_width.values() for place, _, _ in of_width}) > 1

    def owners(self) -> Callable[[DevicePlace], str]:
        """Return a function that names the owner (container or namespace) of a place.

        The function adds the host's name if the figures cover several hosts, which needs all rows to decide.
        """
        several = self.several_hosts()

        def owner(place: DevicePlace) -> str:
            name = place.container or place.netns
            return f"{place.host}/{name}" if several else name

        return owner


def added(first: Iterable[HookCost], second: Iterable[HookCost]) -> tuple[HookCost, ...]:
    """Return the sum of the costs of two runs, hook by hook, in the order of the hooks."""
    sums: dict[Hook, HookCost] = {}
    for c in (*first, *second):
        s = sums.get(c.hook, HookCost(c.hook, 0, 0, 0))
        sums[c.hook] = HookCost(c.hook, s.calls + c.calls, s.timed + c.timed, s.timed_ns + c.timed_ns)
    return tuple(sums[hook] for hook in sorted(sums))


def labels_of(places: Iterable[DevicePlace]) -> dict[DevicePlace, str]:
    """Return a label for each place: the device's name, plus the namespace's inode and the ifindex if names collide."""
    distinct = sorted(set(places))
    named: dict[tuple[str, ...], int] = {}
    for p in distinct:
        named[_shown(p)] = named.get(_shown(p), 0) + 1
    return {p: p.device if named[_shown(p)] == 1 else f"{p.device} ({p.netns_id}:{p.ifindex})" for p in distinct}


def _shown(place: DevicePlace) -> tuple[str, ...]:
    return place.host, place.container, place.netns, place.device
