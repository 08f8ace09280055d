"""Is this the same packet? And which device is this?

A *kernel buffer* (`struct sk_buff`) carries a packet through a host. From the container's device through veth, bridge,
routing and NAT to the outer device the packet stays in one buffer, whose address the kernel's tracepoints report
(`skb_id` here, never the address itself). Two facts complicate this, and this file deals with both.

**Buffers are reused at once.** Under load the allocator hands out the same address again within 20 µs, mostly
to the reply of the very packet that had it. A buffer thus has many *lives*, and a life must end where its packet
ends. Most ends are seen (`consume_skb`, `kfree_skb`), but not all: TCP frees data that was read, and pure
acknowledgements, without a tracepoint (`__kfree_skb`). The correlator therefore tests, for every two successive
records of one buffer, whether a packet can have moved *from the first to the second*. The possible moves are

    Q d → X d            on the same device: from the queueing discipline to the driver
    X d → X d            the driver was busy and is called again
    X d → r,G,R peer(d)  through a veth, or round the loopback
    X d → Q d'           from a bridge to its port, from a macvlan, VLAN or tunnel to the device below
    X ifb → R,Q d'       back from an ifb, to which tc redirected the packet, its length unchanged
    r,G d → R d          on the same device: from the backlog or NAPI to the stack
    R d → i d            on the same device: a record that repeats R, where the source could not tell (adds nothing)
    R d → R d'           from a bridge's port to the bridge
    R d → i d'           up to a macvlan, ipvlan, VLAN or bond, or past all tracepoints into a container
                         (bpf_redirect_peer); i is recorded only where R was not recorded at the same device
    R d → r,G d'         out of a tunnel
    R,i d → Q d'         routed or bridged within one namespace, its length unchanged; not back out of the
                         device that received it, except a bridge (hairpin)
    R,i d → D            copied to a reader, from behind the packet's headers to its end
    any → end            freed

and any other record begins a new life. A life also ends if a move takes longer than the engine's timeout, or if
the ring lost records meanwhile, on whatever CPU: the missing record may be the end of the life. A wrong pair is
worse than a missing one.

One reuse remains undetected: a buffer that is freed untraced and is used again *on a path the old packet could have
taken*, with the same length (a proxy on the host whose acknowledgement leaves by another device just after it
received one). Only content can distinguish these.

**The content key divides lives that the moves would join.** A source that reads packets gives each record a key: a
hash of the fields that NAT, routing and bridging do not rewrite (not addresses, ports, TTL or checksums;
kmod/mace_packet.c has the list). Within a life the key does not change, because nothing between two hooks changes these
fields. A record whose key differs from the last one known in its life therefore begins a new life, whatever the moves
allow, and is counted in `told_apart`. The end of a buffer is no exception: a drop with another key is the drop of
another packet, which was never seen before. A record without a key (not IP, or a free without content) is ignored.

In three places the kernel makes another packet in the same buffer and continues with it. There the key may change, the
life goes on, and the buffer alone is the evidence:

    G d → R d, R of several segments     receive offload (GRO) has put other packets behind this one
    Q d → X d, Q of several, X of one    a list of segments is divided (skb_segment_list): one segment keeps the buffer
    into or out of a tunnel              the outer packet is another packet. If the source reads the inner packet, too
                                         (flag TUNNEL: VXLAN, Geneve, GRE, IP in IP), the outer packet has the inner
                                         packet's key, and the key must not change

In other places a packet ends although its buffer continues; its life ends there too:

- *Fragments.* A reassembled packet lives on in the buffer of the fragment that arrived last. It is a packet of its
  own: the fragments crossed the devices before, the reassembled packet crosses those afterwards, and the end of the
  buffer is its end. If it is fragmented again, the fragments leave in their own buffers, except that the first
  fragment leaves in the buffer of the last one.
- *Software segmentation* (GSO) puts each segment into a new buffer. The large packet ends where it is segmented, by
  when its overhead is known; the segments' lives begin at the driver. A large buffer that stays whole is one packet.
- *Rewriting.* NAT helpers (FTP, SIP) change payload and, in later packets, TCP sequence numbers; tc or BPF may change
  anything. The packet's life is cut in two. Each half is measured correctly; the time between them is not measured.
  Nothing distinguishes a rewritten packet from a reused buffer, and a wrong pair is worse than a missing one.
- *Clones* have buffers of their own and the key of their original, and cross no device of its path: the records of a
  clone for a capture socket or a raw socket's reader are unmatched, or matched with one another.

**The content key also joins lives of different buffers** (`correlator.links`). A life that ends inside the host,
received from one of its devices, and a life that begins there, queued for a device, are of one packet if they have the
same key. A fragment that was reassembled and cut again, or a packet that was copied, thereby keeps its whole path. Both
lives must be the only candidates: if within `link_ns` another life with that key ends or begins there (a bridge that
floods, packets of two containers with equal content, repeated acknowledgements), nothing is joined, and each life that
ended counts as *ambiguous*. Nor are lives joined across lost records, which may have been of another candidate, or
between devices between which no packet passes. Nor are packets without a number of their own, such as a report of
multicast groups, which every sender sends alike (`correlator.content.traits`): the other candidate may be hidden, by a
filter in the kernel for example. If the source has no keys, no lives are joined.

Two packets with the same key in one buffer, in immediate succession on a path that one packet could have taken, are not
distinguished. Repeated acknowledgements without payload (IPv6, or IPv4 with identification 0) can be such packets.

**Grades.** `EXACT`: at least two records of the life have a key, and all keys agree. `BUFFER`: the buffer is the only
evidence, because there are no keys or because the key changed where it may. `CONTENT`: lives of two buffers, joined by
their key. `AMBIGUOUS`: several candidates, as above and below.

**Names are not devices.** The kernel's tracepoints give a device's name only, and every container has an `eth0`. A
sighting can therefore be several devices, its *candidates*. The table of moves decides between them: of all pairs of
candidates only those remain between which the move exists (in `X eth0 → r veth7`, eth0 is the peer of veth7 and no
other eth0). In addition, `X → consumed` is not at a veth (a veth would have handed the buffer on), and a life that
starts with a reception does not start at a veth. A sighting with one remaining candidate is resolved; sightings with
two or more are *ambiguous*, and counted, not guessed. A device that the topology does not list becomes an unknown
device of that name: its crossings are measured, but its place in the path is unknown.

A record that names namespace and ifindex has one candidate from the start; the rest applies to it as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from contracts.hooks import ALONG, HOOKS, LEAVING, Hook, Way
from contracts.topology import PAIRS, Device, Role, Sighting, Topology

WAY: Final = np.zeros(256, np.uint8)
"""`Way` of each hook number."""
HAS_DEVICE: Final = np.zeros(256, np.bool_)
"""Whether a record of each hook number names a device that the packet is at."""
for _info in HOOKS:
    WAY[_info.hook] = _info.way
    HAS_DEVICE[_info.hook] = _info.has_device
WAYS: Final[list[int]] = WAY.tolist()
"""`WAY` for single hooks."""

TUNNELS: Final = frozenset(
    {"vxlan", "geneve", "gre", "gretap", "ip6gre", "ip6gretap", "ipip", "sit", "ip6tnl", "wireguard"}
)

IFB: Final = "ifb"
"""Kind of the devices to which tc redirects packets so that a queueing discipline can shape what a device receives; the
CNI plugin bandwidth makes one for each pod."""

NEVER_NS: Final = np.iinfo(np.int64).max
UNKNOWN: Final = "unknown"
"""Kind of a device that the topology does not list."""
ROLES: Final = tuple(Role)
"""Roles, indexed by their numbers in arrays."""

JOIN: Final = 1
"""Flag of a verdict: the two records are of one life."""
CROSS: Final = 2
"""Flag of a verdict: the second record is on another device than the first."""
SAME_LENGTH: Final = 4
"""Flag of a verdict: joined only if both records have the same length."""
WHOLE_COPY: Final = 8
"""Flag of a verdict: joined only if the copied bytes are the whole packet without its headers."""
OTHER_CONTENT: Final = 16
"""Flag of a verdict: the move leads into a tunnel or out of one, so that the content may change."""
COPIED_BEHIND: Final = (20, 28, 40, 48, 52, 60, 72)
"""Bytes of headers that a copy to a reader omits: IPv4 or IPv6 (20, 40) alone for ping sockets, with UDP (8), or with
TCP without options or with timestamps (20, 32). Sockets of all kinds copy through this hook: a copy of any other length
is as likely that of a local message in the same, freed buffer, and is treated as such."""

CODE_BITS: Final = 20
CODES: Final = 1 << CODE_BITS
"""Largest number of sightings in a stream: a million, far more than one boot of a host sees."""

_MOST_TRIED: Final = 1 << 22
"""Largest number of pairs of candidates that are tried for one topology. It is exceeded only if thousands of devices of
one namespace have the same name, which no kernel allows; further moves between them are ambiguous."""

_RANK: Final = {hook: rank for hooks in ALONG.values() for rank, hook in enumerate(hooks)}
"""Of each hook at a device among those of its way."""


def place(hook: npt.NDArray[np.uint8], dev: npt.NDArray[np.uint32]) -> npt.NDArray[np.int64]:
    """Return hook and sighting of each record packed into one number, for `Resolver.judge`; int64, same shape."""
    places: npt.NDArray[np.int64] = (hook.astype(np.int64) << CODE_BITS) | dev
    return places


class Candidates:
    """The devices, by number, that a sighting can be, indexed by their relations to other devices."""

    __slots__ = ("_by_relation", "_devices", "numbers")

    def __init__(self, numbers: tuple[int, ...], devices: Sequence[Device]) -> None:
        self.numbers = numbers
        self._devices = devices
        self._by_relation: dict[tuple[int, ...], list[int]] | None = None

    def related(self, other: Device) -> Iterable[int]:
        """Return the candidates that could exchange a packet with `other`.

        The selection avoids trying all of them: a thousand containers have an eth0. A move stays in one namespace,
        leads to a peer, leads between a tunnel and the namespace that it sends from, or leads between two devices with
        the same peer (moves to `ip_rcv` excepted, whose records
        have one candidate). If there is one candidate, or `other` is unknown, all candidates are returned.
        """
        if len(self.numbers) == 1 or other.kind == UNKNOWN:
            return self.numbers
        if self._by_relation is None:
            self._by_relation = {}
            for number in self.numbers:
                device = self._devices[number]
                for relation in {(device.netns,), (_sends_from(device),), device.key, (*_peer(device), 0)}:
                    self._by_relation.setdefault(relation, []).append(number)
        wanted = ((other.netns,), (_sends_from(other),), _peer(other), (*other.key, 0), (*_peer(other), 0))
        return dict.fromkeys(n for relation in wanted for n in self._by_relation.get(relation, ()))


def _peer(device: Device) -> tuple[int, int]:
    return device.peer_netns, device.peer_ifindex


def _sends_from(device: Device) -> int:
    """Return the namespace in which a tunnel's outer packets are; any other device's own.

    A tunnel that was moved to another namespace, as that of a Docker overlay network, still sends from the namespace in
    which it was made (`vxlan->net`, `tunnel->net`).
    """
    return device.peer_netns if device.kind in TUNNELS and device.peer_netns else device.netns


@dataclass(frozen=True, slots=True)
class ResolverState:
    """State of a resolver, with devices numbered from 0; devices to which no record can refer are omitted."""

    devices: tuple[Device, ...]
    """Devices by number."""
    serves: tuple[int, ...]
    """`Resolver.serves` of each device."""
    live: frozenset[int]
    gone: tuple[tuple[int, int], ...]
    """(number, time since which it is gone, ns) of devices that are gone."""
    sightings: tuple[Sighting, ...]

    def canonical(self) -> tuple[tuple[object, ...], npt.NDArray[np.int64]]:
        """Return the state in a form independent of device numbers, and each device's rank in that form.

        Numbers only decide which of several devices with the same key is the newest, so that only their order matters.
        """
        order = sorted(range(len(self.devices)), key=lambda n: (self.devices[n].key, n))
        rank = np.zeros(len(order), np.int64)
        rank[order] = np.arange(len(order))
        gone = dict(self.gone)
        told = tuple(
            (
                self.devices[n],
                n in self.live,
                gone.get(n),
                int(rank[self.serves[n]]) if self.serves[n] >= 0 else -1,
            )
            for n in order
        )
        return (told, self.sightings), rank


class Resolver:
    """Numbers the devices of one stream, and decides which moves between sightings are possible.

    A device keeps its number for ever. A device that is gone stays a candidate for `keep_ns`: its last packets are
    still under way, and its end may be dated a little too early.
    """

    def __init__(self, keep_ns: int) -> None:
        self._keep_ns = keep_ns
        self.devices: list[Device] = []
        self._number: dict[Device, int] = {}
        self._gone: dict[int, int] = {}
        self._live: frozenset[int] = frozenset()
        self._sightings: tuple[Sighting, ...] = ()
        # Sighting 0 is no device, even before the first topology.
        self._candidates = [Candidates((), self.devices)]
        self._tried = 0
        """Pairs of candidates tried for the current topology."""
        self._by_key: dict[tuple[int, int], list[int]] = {}
        self.only = np.full(1, -1, np.int64)
        """Device number of each sighting; -1 for no device or several candidates."""
        self.serves = np.full(1, -1, np.int64)
        """By device number: number of the inner device of the container whose packets the device carries, or -1. The
        array has one entry if there is no device."""
        self.role = np.full(1, ROLES.index(Role.OTHER), np.uint8)
        """By device number: index into `ROLES`. The array has one entry if there is no device."""
        self.looked_up = 0
        """Number of times that anything known of moves and devices has changed."""

    def state(self, upto_ns: int, also: npt.NDArray[np.int64]) -> tuple[ResolverState, npt.NDArray[np.int64]]:
        """Return the state for records from `upto_ns` on, and an array: number here -> number in the state, or -1.

        The state includes the devices numbered `also` in any case.
        """
        gone = {number: since for number, since in self._gone.items() if since + self._keep_ns > upto_ns}
        kept = self._live | gone.keys() | {int(number) for number in also if number >= 0}
        kept |= {int(self.serves[number]) for number in kept} - {-1}
        numbers = sorted(kept)
        new = np.full(len(self.devices), -1, np.int64)
        new[numbers] = np.arange(len(numbers))
        state = ResolverState(
            devices=tuple(self.devices[n] for n in numbers),
            serves=tuple(int(new[self.serves[n]]) if self.serves[n] >= 0 else -1 for n in numbers),
            live=frozenset(int(new[n]) for n in self._live),
            gone=tuple(sorted((int(new[n]), since) for n, since in gone.items())),
            sightings=self._sightings,
        )
        return state, new

    def restore(self, state: ResolverState) -> None:
        """Replace everything known by the state of another resolver; device numbers are those of `state`."""
        self.devices = list(state.devices)
        self._number = {device: number for number, device in enumerate(self.devices)}
        self._live, self._gone, self._sightings = state.live, dict(state.gone), state.sightings
        self.serves = np.array(state.serves, np.int64)
        self._look_up()

    def beside(self, number: int) -> tuple[int, ...]:
        """Return the numbers of a pair's other end (one per description of it); none for other devices."""
        device = self.devices[number]
        if device.kind not in PAIRS:
            return ()
        return tuple(self._by_key.get((device.peer_netns, device.peer_ifindex), ()))

    def update(self, topology: Topology) -> None:
        """Use `topology` from now on."""
        live = frozenset(self._number_of(device) for device in topology.devices)
        for number in self._live - live:
            self._gone[number] = topology.from_ns
        for number in live:
            self._gone.pop(number, None)
        self._live = live
        self._sightings = topology.sightings
        self._look_up()

    @property
    def changes_at_ns(self) -> int:
        """Time at which the next device that is gone must be forgotten; call `forget` before records from then on."""
        return min(self._gone.values(), default=NEVER_NS - self._keep_ns) + self._keep_ns

    def forget(self, at_ns: int) -> None:
        """Forget the devices that are gone for `keep_ns` at `at_ns`."""
        self._gone = {number: since for number, since in self._gone.items() if since + self._keep_ns > at_ns}
        self._look_up()

    def _look_up(self) -> None:
        present = sorted(self._live | self._gone.keys())
        self._by_key = {}
        by_name: dict[str, list[int]] = {}
        by_cookie: dict[tuple[int, int], list[int]] = {}
        for number in present:
            device = self.devices[number]
            self._by_key.setdefault(device.key, []).append(number)
            by_name.setdefault(device.name, []).append(number)
            by_cookie.setdefault((device.netns_cookie, device.ifindex), []).append(number)
        self._candidates = [Candidates((), self.devices)]
        of_name: dict[str, Candidates] = {}
        for sighting in self._sightings[1:]:
            if not sighting.ifindex and sighting.name in of_name:
                self._candidates.append(of_name[sighting.name])
                continue
            # The rule of Sighting.is_of(), by lookup instead of comparing all devices.
            if sighting.netns_cookie:
                found = by_cookie.get((sighting.netns_cookie, sighting.ifindex), ())
            elif sighting.ifindex:
                found = self._by_key.get((sighting.netns, sighting.ifindex), ())
            else:
                found = by_name.get(sighting.name, ())
            numbers = self._newest(found) or (self._number_of(_unknown(sighting)),)
            self._candidates.append(Candidates(numbers, self.devices))
            if not sighting.ifindex and found:
                of_name[sighting.name] = self._candidates[-1]
        only = [c.numbers[0] if len(c.numbers) == 1 else -1 for c in self._candidates]
        self.only = np.array(only, np.int64)
        self._tried = 0
        self._describe()
        self.looked_up += 1

    def _newest(self, numbers: Iterable[int]) -> tuple[int, ...]:
        """Return `numbers` without old descriptions of devices that are still present under a new one."""
        live_keys = {self.devices[n].key for n in numbers if n in self._live}
        return tuple(n for n in numbers if n in self._live or self.devices[n].key not in live_keys)

    def _number_of(self, device: Device) -> int:
        number = self._number.setdefault(device, len(self.devices))
        if number == len(self.devices):
            self.devices.append(device)
        return number

    def _describe(self) -> None:
        numbers = max(len(self.devices), 1)
        self.role = np.full(numbers, ROLES.index(Role.OTHER), np.uint8)
        self.role[: len(self.devices)] = [ROLES.index(d.role) for d in self.devices]
        serves = np.full(numbers, -1, np.int64)
        serves[: len(self.serves)] = self.serves  # keep the entry of a device whose peer is gone
        for number, device in enumerate(self.devices):
            if device.role is Role.INNER:
                serves[number] = number
            elif device.role is Role.HOST and device.kind in PAIRS:
                inner = [
                    n
                    for n in self._by_key.get((device.peer_netns, device.peer_ifindex), ())
                    if self.devices[n].role is Role.INNER
                ]
                if inner:
                    serves[number] = inner[-1]
        self.serves = serves

    def judge(self, source: int, target: int) -> tuple[int, int, int]:
        """Return the verdict on the move from one `place` to another.

        The verdict is flags (JOIN, CROSS, ...), and the device numbers of the first and the second record if the move
        alone determines them, else -1.
        """
        hook_p, code_p = divmod(source, CODES)
        hook_n, code_n = divmod(target, CODES)
        if not WAYS[hook_p] or not WAYS[hook_n]:
            return 0, -1, -1  # an unknown hook
        return self._judge(Hook(hook_p), code_p, Hook(hook_n), code_n)

    def start(self, dev: int) -> int:
        """Return the device number of a sighting at which a life starts with a reception, or -1; not one of a pair."""
        return _sole(n for n in self._candidates[dev].numbers if self.devices[n].kind not in PAIRS)

    def _judge(self, hook_p: Hook, code_p: int, hook_n: Hook, code_n: int) -> tuple[int, int, int]:
        way_p, way_n = int(WAY[hook_p]), int(WAY[hook_n])
        if way_p == Way.END:
            return 0, -1, -1
        if way_n == Way.END:
            sent = hook_p is Hook.NET_DEV_START_XMIT and hook_n is Hook.CONSUME_SKB
            return JOIN, self.start(code_p) if sent else -1, -1
        if way_n == Way.DELIVERY:
            return JOIN | WHOLE_COPY if way_p == Way.RECEIVE and hook_p in LEAVING else 0, -1, -1
        if way_p == Way.DELIVERY:
            return 0, -1, -1
        if code_p == code_n and self._stays(hook_p, hook_n):
            return JOIN, -1, -1
        pairs = self._crossings(hook_p, self._candidates[code_p], hook_n, self._candidates[code_n])
        if pairs is None:
            return JOIN | CROSS, -1, -1  # too many pairs to try: ambiguous
        if not pairs:
            return 0, -1, -1
        across = 0 if all(a == b for a, b in pairs) else CROSS
        routed = SAME_LENGTH if way_p == Way.RECEIVE and way_n == Way.TRANSMIT else 0
        if way_p == Way.TRANSMIT and any(self.devices[a].kind == IFB for a, _ in pairs):
            routed = SAME_LENGTH
        if any(self._is_through_tunnel(way_p, a, way_n, b) for a, b in pairs):
            across |= OTHER_CONTENT
        return JOIN | across | routed, _sole(a for a, _ in pairs), _sole(b for _, b in pairs)

    def _is_through_tunnel(self, way_p: int, a: int, way_n: int, b: int) -> bool:
        """Return whether the move encapsulates or decapsulates the packet; routing to a tunnel's device is neither."""
        return way_p == way_n and self.devices[a if way_p == Way.TRANSMIT else b].kind in TUNNELS

    @staticmethod
    def _stays(hook_p: Hook, hook_n: Hook) -> bool:
        """Return whether the second hook can follow the first one on the same device, whatever the device."""
        if WAY[hook_p] != WAY[hook_n]:
            return False
        # A driver that was busy is called again with the same packet.
        return _RANK[hook_p] < _RANK[hook_n] or hook_p is hook_n is Hook.NET_DEV_START_XMIT

    def _crossings(
        self, hook_p: Hook, sources: Candidates, hook_n: Hook, targets: Candidates
    ) -> set[tuple[int, int]] | None:
        """Return the pairs of candidates between which a packet can go from `hook_p` to `hook_n`; None if too many."""
        way_p, way_n = int(WAY[hook_p]), int(WAY[hook_n])
        found: set[tuple[int, int]] = set()
        if hook_p not in LEAVING:
            return found
        if way_n == Way.TRANSMIT and hook_n is not ALONG[Way.TRANSMIT][0]:
            return found
        forward = len(sources.numbers) <= len(targets.numbers)
        few, many = (sources, targets) if forward else (targets, sources)
        for one in few.numbers:
            for other in many.related(self.devices[one]):
                self._tried += 1
                if self._tried > _MOST_TRIED:
                    return None
                a, b = (one, other) if forward else (other, one)
                if self._can_cross(way_p, self.devices[a], hook_n, self.devices[b]):
                    found.add((a, b))
        return found

    def _can_cross(self, way_p: int, a: Device, hook_n: Hook, b: Device) -> bool:
        if UNKNOWN in (a.kind, b.kind):
            # Only pairs pass a packet from driver to receiver, and the peer of the known end must not be a known
            # device.
            ends = [d for d in (a, b) if d.kind != UNKNOWN]
            free = all(d.kind in PAIRS and (d.peer_netns, d.peer_ifindex) not in self._by_key for d in ends)
            return way_p == Way.TRANSMIT and WAY[hook_n] == Way.RECEIVE and free
        return _can_cross(way_p, a, hook_n, b)


def _sole(numbers: Iterable[int]) -> int:
    distinct = set(numbers)
    return distinct.pop() if len(distinct) == 1 else -1


def _unknown(sighting: Sighting) -> Device:
    cookie = sighting.netns_cookie
    return Device(sighting.netns, sighting.ifindex, sighting.name, UNKNOWN, netns_cookie=cookie)


def _can_cross(way_p: int, a: Device, hook_n: Hook, b: Device) -> bool:
    """Return whether a packet sent (X) or received (R) at `a` can go to `hook_n` on `b`."""
    way_n = int(WAY[hook_n])
    same_netns = a.netns == b.netns
    over = (b.peer_netns, b.peer_ifindex) == a.key and b.kind not in PAIRS
    under = (a.peer_netns, a.peer_ifindex) == b.key and a.kind not in PAIRS
    if way_p == Way.TRANSMIT:
        if a.kind == IFB:
            # ifb_ri_tasklet() gives the packet back to the device that it was redirected from: to its queue, or to the
            # stack. Which device that was, no record tells.
            return a != b and same_netns and hook_n in (Hook.NET_DEV_QUEUE, Hook.NETIF_RECEIVE_SKB)
        if way_n == Way.RECEIVE:
            if a.kind in PAIRS:
                return (a.peer_netns, a.peer_ifindex) == b.key
            siblings = (
                a.kind == b.kind
                and bool(a.peer_ifindex)
                and (a.peer_netns, a.peer_ifindex) == (b.peer_netns, b.peer_ifindex)
            )
            return (a.kind == "loopback" and a == b) or siblings
        return a != b and (
            (same_netns and b.master_ifindex == a.ifindex)
            or under
            or (a.kind in TUNNELS and b.netns in (a.netns, _sends_from(a)))
        )
    if way_n == Way.TRANSMIT:
        return same_netns and (a != b or a.kind == "bridge")
    if hook_n is Hook.NETIF_RECEIVE_SKB:
        return a != b and ((same_netns and a.master_ifindex == b.ifindex) or over)
    if hook_n is Hook.IP_RCV:
        # tc can put a packet on the inner end of any pair whose outer end is in the packet's namespace.
        return a != b and (same_netns or over or (b.kind in PAIRS and b.peer_netns == a.netns))
    return a != b and b.kind in TUNNELS and a.netns in (b.netns, _sends_from(b))
