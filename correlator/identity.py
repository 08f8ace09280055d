"""Is this the same packet? And which device is this?

A packet on its way through a host is carried by a *kernel buffer* (`struct sk_buff`). From the container's
device through veth, bridge, routing and NAT to the outer device it stays in one buffer, whose address the
kernel's tracepoints tell (`skb_id` here, never the address itself). Two things make this less simple than it
sounds, and this file is about both.

**Buffers are reused at once.** Under load the allocator hands out the same address again within 20 µs, mostly
to the reply of the very packet that had it. So a buffer has many *lives*, and a life must end where the packet
does. Most ends are seen (`consume_skb`, `kfree_skb`), but not all: TCP frees what it has read, and pure
acknowledgements, without a tracepoint (`__kfree_skb`). So every two successive records of one buffer are asked
whether a packet can have gone *from there to here*. It can

    Q d → X d            on the same device: from the queueing discipline to the driver
    X d → X d            the driver was busy and is asked again
    X d → r,G,R peer(d)  through a veth, or round the loopback
    X d → Q d'           from a bridge to its port, from a macvlan, VLAN or tunnel to the device below
    r,G d → R d          on the same device: from the backlog or NAPI to the stack
    R d → R d'           from a bridge's port to the bridge (a macvlan's or VLAN's second look is not traced)
    R d → r,G d'         out of a tunnel
    R d → Q d'           routed or bridged within one namespace, its length unchanged; not back out of the
                         device it came from, except a bridge (hairpin)
    R d → D              copied to a reader, from behind the packet's headers to its end
    any → end            freed

and everything else is the start of a new life. A move also ends a life if it takes longer than the engine's
timeout, or if the ring lost records meanwhile, on whatever CPU: the missing one may be the very end that we
wait for. A wrong pair is worse than a missing one.

What this cannot see: a buffer that is freed untraced and comes back *on a path the old packet could have
taken*, with the same length (a proxy on the host whose acknowledgement leaves by another device just after it
received one). Only content can tell those apart.

**The content key parts what the moves would join.** A source that reads packets gives each record a key: a hash of
what NAT, routing and bridging leave alone (not addresses, ports, TTL or checksums; kmod/mace_packet.c has the list).
Within a life the key does not change, because nothing between two hooks changes what it is made of. So a record whose
key is another than the last one known in its life begins a new life, whatever the moves say, and `told_apart` counts
it. The end of a buffer is no exception: a drop with another key is the drop of another packet, which was never seen.
A record without a key (what is not IP, where it is freed) says nothing and is passed over.

There are three places where the kernel makes another packet in the same buffer and goes on with it. There the key may
change, the life goes on, and the buffer alone vouches for it:

    G d → R d, R of several segments     receive offload (GRO) has put other packets behind this one
    Q d → X d, Q of several, X of one    a list of segments is taken apart (skb_segment_list): one keeps the buffer
    into or out of a tunnel              the outer packet is another one. Not so where the source read the inner packet
                                         (flag TUNNEL: VXLAN, Geneve, GRE, IP in IP): the outer packet has the inner
                                         one's key, so the key has to stay the same

And there are those where a packet ends although something goes on in its buffer; its life ends there too:

- *Fragments.* A reassembled packet lives on in the buffer of the fragment that came last. It is another packet: what
  the fragments crossed before is theirs, what it crosses afterwards, and its end, are its own. Cut again, it leaves in
  the fragments' own buffers, but the first fragment in the last one's.
- *Software segmentation* (GSO) puts each segment into a new buffer. The large one ends where it is cut, by when its
  overhead is known; the segments' lives begin at the driver. Large buffers that stay whole are one packet.
- *Rewriting.* NAT helpers (FTP, SIP) change payload and, behind it, TCP sequence numbers; tc or BPF may change what
  they like. The packet's life is cut in two, each half of which is right; what it needed between them is not measured.
  Nothing distinguishes it from a reused buffer, and a wrong pair is worse than a missing one.
- *Clones* have a buffer of their own and the key of their original, and pass no device of its path: what a capture
  socket or a raw socket's reader does with one is unmatched, or matched among itself.

**The content key also joins what buffers part** (`correlator.links`). A life that ends inside the host, received from
a device of it, and one that begins there, queued for a device, are one packet's if they have one key: so a fragment
that was reassembled and cut again, or a packet that was copied, has its whole path. Both must be the only ones: if
within `link_ns` another life ends or begins there with that key (a bridge that floods, two containers' packets of equal
content, repeated acknowledgements), nothing is joined, and each life that ended counts as *ambiguous*. Nor is anything
joined across lost records, which may have been another candidate's, or between devices that no packet passes between.
Where the source gives no keys, nothing is joined at all.

Two packets with one key in one buffer, one right after the other on a path that one could have taken, are not told
apart: repeated acknowledgements without payload (IPv6, or IPv4 with identification 0) can be such.

**Grades.** `EXACT`: at least two records of the life have a key, and all that have one agree. `BUFFER`: the buffer
alone holds, because there are no keys or because the key changed where it may. `CONTENT`: lives of two buffers, joined
by their key. `AMBIGUOUS`: given up, as above and below.

**Names are not devices.** The kernel's tracepoints name devices by name, and `eth0` is in every container. A
sighting can therefore be several devices, the *candidates*, and the same table of moves decides: of all pairs of
candidates only those are left between which the move exists (an `X eth0 → r veth7` is the peer of veth7 and no
other eth0). Also `X → consumed` is not a veth (that would have handed the buffer on), and a life that starts
with a reception is not on one. What is left with one candidate is resolved; two or more are *ambiguous*, and
are counted, not guessed. A device that the topology does not list at all becomes an unknown device of that
name: its crossings are known, where it belongs is not.

Records that name namespace and ifindex have one candidate from the start; all else is the same for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from contracts.hooks import ALONG, HOOKS, Hook, Way
from contracts.topology import Device, Role, Sighting, Topology
from correlator.memo import Memo

WAY: Final = np.zeros(256, np.uint8)
"""`Way` of each hook number."""
HAS_DEVICE: Final = np.zeros(256, np.bool_)
"""Whether a record of each hook number names a device that the packet is at."""
for _info in HOOKS:
    WAY[_info.hook] = _info.way
    HAS_DEVICE[_info.hook] = _info.has_device

TUNNELS: Final = frozenset(
    {"vxlan", "geneve", "gre", "gretap", "ip6gre", "ip6gretap", "ipip", "sit", "ip6tnl", "wireguard"}
)

NEVER_NS: Final = np.iinfo(np.int64).max
UNKNOWN: Final = "unknown"
"""Kind of a device that the topology does not list."""
ROLES: Final = tuple(Role)
"""Roles by the number that arrays hold."""

JOIN: Final = 1
"""Flag of a verdict: the two records are of one life."""
CROSS: Final = 2
"""Flag of a verdict: the second record is on another device than the first."""
SAME_LENGTH: Final = 4
"""Flag of a verdict: joined only if both records have the same length."""
WHOLE_COPY: Final = 8
"""Flag of a verdict: joined only if the bytes copied are all of the packet's but for headers."""
OTHER_CONTENT: Final = 16
"""Flag of a verdict: the move leads into a tunnel or out of one, so that the content may be another."""
COPIED_BEHIND: Final = (20, 28, 40, 48, 52, 60, 72)
"""Headers that a reader is not given, bytes: IPv4 or IPv6 (20, 40) alone for ping sockets, with UDP (8), or with TCP
without options or with timestamps (20, 32). Sockets of all kinds copy through this hook, so a copy of any other length
is as likely one of a local message in the same, freed buffer, and is taken for that."""

CODE_BITS: Final = 20
CODES: Final = 1 << CODE_BITS
"""Sightings that a stream can have: a million names is far beyond what one boot of a host sees."""

_MOST_TRIED: Final = 1 << 22
"""Pairs of candidates that are tried for one topology. Where thousands of devices of one namespace have one name, which
no kernel has, nothing more is tried: what passes between them is ambiguous."""

_RANK: Final = {hook: rank for hooks in ALONG.values() for rank, hook in enumerate(hooks)}
"""Of each hook at a device among those of its way."""


def place(hook: npt.NDArray[np.uint8], dev: npt.NDArray[np.uint32]) -> npt.NDArray[np.int64]:
    """Hook and sighting of each record as one number, as `Resolver.moves` wants them. Same shape, int64."""
    places: npt.NDArray[np.int64] = (hook.astype(np.int64) << CODE_BITS) | dev
    return places


def from_device(moves: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Device number of each move's first record where the move alone tells it, else -1."""
    return (moves >> 32) - 1


def to_device(moves: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Device number of each move's second record where the move alone tells it, else -1."""
    return ((moves >> 8) & 0xFFFFFF) - 1


class Candidates:
    """The devices, by number, that a sighting can be; found by what relates one device to another."""

    __slots__ = ("_by_relation", "_devices", "numbers")

    def __init__(self, numbers: tuple[int, ...], devices: Sequence[Device]) -> None:
        self.numbers = numbers
        self._devices = devices
        self._by_relation: dict[tuple[int, ...], list[int]] | None = None

    def related(self, other: Device) -> Iterable[int]:
        """Those between which and `other` a packet could go, and not all of them: a thousand containers have an eth0.

        A move stays in one namespace, or leads to a peer or between two devices on one peer; only where there is one
        candidate, or nothing is known of `other`, the rules themselves decide.
        """
        if len(self.numbers) == 1 or other.kind == UNKNOWN:
            return self.numbers
        if self._by_relation is None:
            self._by_relation = {}
            for number in self.numbers:
                device = self._devices[number]
                for relation in {(device.netns,), device.key, (*_peer(device), 0)}:
                    self._by_relation.setdefault(relation, []).append(number)
        wanted = ((other.netns,), _peer(other), (*other.key, 0), (*_peer(other), 0))
        return dict.fromkeys(n for relation in wanted for n in self._by_relation.get(relation, ()))


def _peer(device: Device) -> tuple[int, int]:
    return device.peer_netns, device.peer_ifindex


@dataclass(frozen=True, slots=True)
class ResolverState:
    """What a resolver knows, by numbers from 0; nothing of devices that no record can mean any more."""

    devices: tuple[Device, ...]
    """By number."""
    serves: tuple[int, ...]
    """By number: as `Resolver.serves`."""
    live: frozenset[int]
    gone: tuple[tuple[int, int], ...]
    """Numbers of those that are gone, and since when, ns."""
    sightings: tuple[Sighting, ...]

    def canonical(self) -> tuple[tuple[object, ...], npt.NDArray[np.int64]]:
        """The same told without numbers, and each device's rank in it.

        What numbers decide is which of several devices in one place is the newest; so their order counts there alone.
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
    """Knows the devices of one stream by number, and answers what moves between sightings can be.

    Numbers are given once and for all. A device that is gone stays a candidate for `keep_ns`: its last packets are
    still under way, and the news of its end may be dated a little too early.
    """

    def __init__(self, keep_ns: int) -> None:
        self._keep_ns = keep_ns
        self.devices: list[Device] = []
        self._number: dict[Device, int] = {}
        self._gone: dict[int, int] = {}
        self._live: frozenset[int] = frozenset()
        self._sightings: tuple[Sighting, ...] = ()
        # Sighting 0 is no device, also before the first topology.
        self._candidates = [Candidates((), self.devices)]
        self._tried = 0
        """Pairs of candidates that were tried for the topology of now."""
        self._by_key: dict[tuple[int, int], list[int]] = {}
        self.only = np.full(1, -1, np.int64)
        """Device number of each sighting; -1 where it is none or may be several."""
        self.serves = np.full(1, -1, np.int64)
        """By device number (with one entry where there is no device): number of the inner device of the container whose
        packets it carries, or -1."""
        self.role = np.full(1, ROLES.index(Role.OTHER), np.uint8)
        """As `serves`: index into `ROLES`."""
        self._moves = Memo(self._judged)

    def state(self, upto_ns: int, also: npt.NDArray[np.int64]) -> tuple[ResolverState, npt.NDArray[np.int64]]:
        """What it knows for records from `upto_ns` on, with the devices numbered `also` in any case; and the number
        there of each one here, or -1.
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
        """Know what another one knew, and nothing else; numbers are those of `state`."""
        self.devices = list(state.devices)
        self._number = {device: number for number, device in enumerate(self.devices)}
        self._live, self._gone, self._sightings = state.live, dict(state.gone), state.sightings
        self.serves = np.array(state.serves, np.int64)
        self._look_up()

    def beside(self, number: int) -> tuple[int, ...]:
        """Numbers of the devices at the other end of this one's cable, where the topology lists any."""
        device = self.devices[number]
        if device.kind != "veth":
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
        """When the next device that is gone is to be forgotten; records from then on need `forget`."""
        return min(self._gone.values(), default=NEVER_NS - self._keep_ns) + self._keep_ns

    def forget(self, at_ns: int) -> None:
        """No longer count with devices that were gone `keep_ns` before."""
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
            # As Sighting.is_of(), for all of them at once.
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
        self._moves.forget()

    def _newest(self, numbers: Iterable[int]) -> tuple[int, ...]:
        """Without what is gone, where the same device is still there under another description."""
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
        serves[: len(self.serves)] = self.serves  # also of one whose peer is gone
        for number, device in enumerate(self.devices):
            if device.role is Role.INNER:
                serves[number] = number
            elif device.role is Role.HOST and device.kind == "veth":
                inner = [
                    n
                    for n in self._by_key.get((device.peer_netns, device.peer_ifindex), ())
                    if self.devices[n].role is Role.INNER
                ]
                if inner:
                    serves[number] = inner[-1]
        self.serves = serves

    def moves(
        self, source: npt.NDArray[np.int64], target: npt.NDArray[np.int64], asked: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.int64]:
        """What each move from one `place` to another is: flags (JOIN, CROSS, ...) in the lowest bits; `from_device`
        and `to_device` read the rest. 0 where not `asked`. Arrays of one length, int64.
        """
        # Places of 0 are a move that no record makes.
        return self._moves(((source << (CODE_BITS + 4)) | target) * asked)

    def _judged(self, key: int) -> int:
        source, target = divmod(key, 1 << (CODE_BITS + 4))
        if not WAY[source >> CODE_BITS] or not WAY[target >> CODE_BITS]:
            return 0  # no hook that is known
        flags, first, second = self._judge(
            Hook(source >> CODE_BITS), source & (CODES - 1), Hook(target >> CODE_BITS), target & (CODES - 1)
        )
        return ((first + 1) << 32) | ((second + 1) << 8) | flags

    def start(self, dev: int) -> int:
        """Device number of a sighting at which a life starts with a reception, or -1: not a veth."""
        return _sole(n for n in self._candidates[dev].numbers if self.devices[n].kind != "veth")

    def _judge(self, hook_p: Hook, code_p: int, hook_n: Hook, code_n: int) -> tuple[int, int, int]:
        way_p, way_n = int(WAY[hook_p]), int(WAY[hook_n])
        if way_p == Way.END:
            return 0, -1, -1
        if way_n == Way.END:
            sent = hook_p is Hook.NET_DEV_START_XMIT and hook_n is Hook.CONSUME_SKB
            return JOIN, self.start(code_p) if sent else -1, -1
        if way_n == Way.DELIVERY:
            return JOIN | WHOLE_COPY if hook_p is Hook.NETIF_RECEIVE_SKB else 0, -1, -1
        if way_p == Way.DELIVERY:
            return 0, -1, -1
        if code_p == code_n and self._stays(hook_p, hook_n):
            return JOIN, -1, -1
        pairs = self._crossings(hook_p, self._candidates[code_p], hook_n, self._candidates[code_n])
        if pairs is None:
            return JOIN | CROSS, -1, -1  # several, as far as anybody knows
        if not pairs:
            return 0, -1, -1
        across = 0 if all(a == b for a, b in pairs) else CROSS
        routed = SAME_LENGTH if way_p == Way.RECEIVE and way_n == Way.TRANSMIT else 0
        if any(self._is_through_tunnel(way_p, a, way_n, b) for a, b in pairs):
            across |= OTHER_CONTENT
        return JOIN | across | routed, _sole(a for a, _ in pairs), _sole(b for _, b in pairs)

    def _is_through_tunnel(self, way_p: int, a: int, way_n: int, b: int) -> bool:
        """Whether the move wraps the packet or unwraps it; being routed into a tunnel's device does not yet."""
        return way_p == way_n and self.devices[a if way_p == Way.TRANSMIT else b].kind in TUNNELS

    @staticmethod
    def _stays(hook_p: Hook, hook_n: Hook) -> bool:
        """Whether the second hook comes after the first one on the same device, whichever device that is."""
        if WAY[hook_p] != WAY[hook_n]:
            return False
        # A driver that was busy is called again with the same packet.
        return _RANK[hook_p] < _RANK[hook_n] or hook_p is hook_n is Hook.NET_DEV_START_XMIT

    def _crossings(
        self, hook_p: Hook, sources: Candidates, hook_n: Hook, targets: Candidates
    ) -> set[tuple[int, int]] | None:
        """The pairs of candidates between which a packet can go from `hook_p` to `hook_n`; None for too many to try."""
        way_p, way_n = int(WAY[hook_p]), int(WAY[hook_n])
        found: set[tuple[int, int]] = set()
        if hook_p is not ALONG[Way(way_p)][-1]:
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
            # Only veths hand over from driver to receiver; and neither end's peer may be a device that is known.
            ends = [d for d in (a, b) if d.kind != UNKNOWN]
            free = all(d.kind == "veth" and (d.peer_netns, d.peer_ifindex) not in self._by_key for d in ends)
            return way_p == Way.TRANSMIT and WAY[hook_n] == Way.RECEIVE and free
        return _can_cross(way_p, a, hook_n, b)


def _sole(numbers: Iterable[int]) -> int:
    distinct = set(numbers)
    return distinct.pop() if len(distinct) == 1 else -1


def _unknown(sighting: Sighting) -> Device:
    cookie = sighting.netns_cookie
    return Device(sighting.netns, sighting.ifindex, sighting.name, UNKNOWN, netns_cookie=cookie)


def _can_cross(way_p: int, a: Device, hook_n: Hook, b: Device) -> bool:
    """Whether a packet can go from `a`, sent (X) or received (R) there, to `hook_n` on `b`."""
    way_n = int(WAY[hook_n])
    same_netns = a.netns == b.netns
    over = (b.peer_netns, b.peer_ifindex) == a.key and b.kind != "veth"
    under = (a.peer_netns, a.peer_ifindex) == b.key and a.kind != "veth"
    if way_p == Way.TRANSMIT:
        if way_n == Way.RECEIVE:
            if a.kind == "veth":
                return (a.peer_netns, a.peer_ifindex) == b.key
            siblings = (
                a.kind == b.kind
                and bool(a.peer_ifindex)
                and (a.peer_netns, a.peer_ifindex) == (b.peer_netns, b.peer_ifindex)
            )
            return (a.kind == "loopback" and a == b) or siblings
        return a != b and (
            (same_netns and b.master_ifindex == a.ifindex) or under or (a.kind in TUNNELS and same_netns)
        )
    if way_n == Way.TRANSMIT:
        return same_netns and (a != b or a.kind == "bridge")
    if hook_n is Hook.NETIF_RECEIVE_SKB:
        return a != b and ((same_netns and a.master_ifindex == b.ifindex) or over)
    return a != b and same_netns and b.kind in TUNNELS
