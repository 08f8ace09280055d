"""A naive reference of the correlator: processes record by record, written after the essay in `correlator.identity`.

It has one dictionary of open lives and one Python loop. Each device name must have one candidate: examples test how
names are resolved.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from contracts.hooks import BY_HOOK, Hook, Way
from contracts.records import Flag
from contracts.topology import Role
from tests.traffic import IP, G, Q, R, X, c, k

BEHIND = (20, 28, 40, 48, 52, 60, 72)


@dataclass
class Life:
    first_ts: int
    length: int
    hops: list = field(default_factory=list)  # [device, [(ts, hook), ...]]
    rest: list = field(default_factory=list)  # copies to sockets and the end of the buffer
    last: tuple = ()
    key: int = 0  # the last known key
    keyed: int = 0
    other_content: bool = False
    no_buffer: bool = False  # the source has no buffer addresses: the key stands for the buffer
    placed: list = field(default_factory=list)  # (ts, hook, dev, key or 0 if it joins no buffers), on a device
    grade: str = ""
    repeats: int = 0  # records in no hop, which repeat the one before

    @property
    def size(self):
        return sum(len(records) for _, records in self.hops) + len(self.rest) + self.repeats


def alike(read, i):
    """Return whether several senders may send a packet with this key."""
    flags, proto = int(read.flags[i]), int(read.l4_proto[i])
    if not read.ip_version[i] or read.ip_id[i] or flags & (Flag.FRAGMENT | Flag.TUNNEL) or proto == 50:
        return False
    if proto in (17, 136) and read.l4_src[i] == read.l4_dst[i]:
        return True
    return not flags & Flag.FLOW


class Reference:
    def __init__(self, devices_by_code, timeout_ns, link_ns):
        self.devices, self.timeout_ns, self.link_ns = devices_by_code, timeout_ns, link_ns
        self.closed = []
        self.open, self.gaps, self.rows = {}, [], []
        self.ledger = dict.fromkeys(
            ("records", "matched", "unmatched", "ambiguous", "expired", "dropped", "in_flight", "lost"), 0
        )
        self.grades = dict.fromkeys(("ambiguous", "buffer", "content", "exact", "waited", "told_apart"), 0)

    def run(self, batch):
        for i in range(len(batch)):
            ts, skb, hook = int(batch.ts_ns[i]), int(batch.skb_id[i]), Hook(int(batch.hook[i]))
            if hook is Hook.LOST:
                self.gaps.append((ts, skb))
                self.ledger["lost"] += int(batch.l3_len[i])
                continue
            self.ledger["records"] += 1
            read = batch.content
            key, flags = (int(read.packet_key[i]), int(read.flags[i])) if read is not None else (0, 0)
            dev = int(batch.dev[i]) if BY_HOOK[hook].has_device else 0
            joins = bool(key) and not alike(read, i)
            record = (ts, hook, dev, int(batch.l3_len[i]), key, flags, int(batch.gso_segs[i]), joins)
            life = self.open.get(skb)
            if life is not None and not (self.follows(life.last, record) and self.same_packet(life, record)):
                self.close(self.open.pop(skb), next_ts=ts)
                life = None
            if life is None:
                life = self.open[skb] = Life(ts, record[3], no_buffer=key != 0 and key == skb)
            self.append(life, record)
            if BY_HOOK[hook].way is Way.END:
                self.close(self.open.pop(skb))
        self.end_ns = int(batch.ts_ns[-1]) if len(batch) else 0
        for skb in list(self.open):
            self.close(self.open.pop(skb), at_end=True)
        for life in self.linked(self.closed):
            self.count(life)
        return self

    def follows(self, before, now):
        (ts, hook, dev, length, *_), (ts2, hook2, dev2, length2, *_) = before, now
        if ts2 - ts > self.timeout_ns or any(a < ts2 and b > ts for a, b in self.gaps):
            return False
        way, way2 = BY_HOOK[hook].way, BY_HOOK[hook2].way
        if way2 is Way.END:
            return True
        if way2 is Way.DELIVERY:
            return hook in (R, IP) and length - length2 in BEHIND
        if way is Way.DELIVERY:
            return False
        order = [Hook.NETIF_RX, Hook.NAPI_GRO_RECEIVE_ENTRY, R, IP]
        if dev == dev2 and hook2 is X and hook in (Q, X):
            return True
        if dev == dev2 and hook in order and hook2 in order and order.index(hook) < order.index(hook2):
            return True
        a, b = self.devices[dev], self.devices[dev2]
        if hook is X and way2 is Way.RECEIVE:
            if "unknown" in (a.kind, b.kind):
                keys = {d.key for d in self.devices.values() if d.kind != "unknown"}
                known = [d for d in (a, b) if d.kind != "unknown"]
                return all(d.kind == "veth" and (d.peer_netns, d.peer_ifindex) not in keys for d in known)
            return a.kind == "veth" and (a.peer_netns, a.peer_ifindex) == b.key
        if "unknown" in (a.kind, b.kind):
            return False
        if hook is X and hook2 is Q:
            port = b.master_ifindex == a.ifindex
            return a != b and a.netns == b.netns and (port or a.kind == "vxlan")
        if hook in (R, IP) and hook2 is Q:
            return a.netns == b.netns and (a != b or a.kind == "bridge") and length == length2
        if hook in (R, IP) and hook2 is R:
            return a.netns == b.netns and a.master_ifindex == b.ifindex
        if hook in (R, IP) and hook2 is IP:
            return a != b and (a.netns == b.netns or (b.kind == "veth" and b.peer_netns == a.netns))
        return hook in (R, IP) and way2 is Way.RECEIVE and a.netns == b.netns and a != b and b.kind == "vxlan"

    def same_packet(self, life, now):
        if not life.key or not now[4] or life.key == now[4]:
            return True
        if self.explained(life.last, now):
            life.other_content = True
            return True
        self.grades["told_apart"] += 1
        return False

    def explained(self, before, now):
        (_, hook, dev, *_, flags, segs, _), (_, hook2, dev2, *_, flags2, segs2, _) = before, now
        if (hook, hook2) == (G, R) and segs2 > 1:
            return True
        if (hook, hook2) == (Q, X) and segs > 1 >= segs2:
            return True
        if hook is X and hook2 is Q:
            tunnel, outer, inner = self.devices[dev], flags2, flags
        elif hook in (R, IP) and BY_HOOK[hook2].way is Way.RECEIVE:
            tunnel, outer, inner = self.devices[dev2], flags, flags2
        else:
            return False
        return tunnel.kind == "vxlan" and not (outer & Flag.TUNNEL and not inner & Flag.TUNNEL)

    def append(self, life, record):
        ts, hook, dev, _, key, *_, joins = record
        life.key, life.keyed = key or life.key, life.keyed + bool(key)
        if BY_HOOK[hook].has_device:
            same = bool(life.hops) and life.last[2] == dev and not self.leaves(life.last, record)
            if not same:
                life.hops.append([self.devices[dev], []])
            repeats = same and hook is IP and life.last[1] is R
            life.repeats += repeats
            if not repeats:
                life.hops[-1][1].append((ts, hook))
            life.placed.append((ts, hook, dev, key if joins else 0))
        else:
            life.rest.append((ts, hook))
        life.last = record

    def leaves(self, before, now):
        """Return whether a move changes devices of one unknown name: X d -> r d leads between two of them."""
        return before[1] is X and BY_HOOK[now[1]].way is Way.RECEIVE

    def close(self, life, next_ts=None, at_end=False):
        ended = bool(life.rest) and life.rest[-1][1] in (c, k)
        if life.size == 1:
            late = next_ts is not None and next_ts - life.last[0] > self.timeout_ns
            idle = at_end and life.last[0] < self.end_ns - self.timeout_ns
            kind = "unmatched" if ended else "expired" if late or idle else "in_flight" if at_end else "unmatched"
            self.ledger[kind] += 1
            return
        exact = "content" if life.no_buffer else "exact"
        life.grade = exact if life.keyed > 1 and not life.other_content else "buffer"
        self.closed.append(life)

    def linked(self, lives):
        """Return the lives, with lives of one packet in two buffers joined."""
        ends = sorted(
            (end for end in map(self.inner_end, lives) if end), key=lambda end: (end[0], end[1], end[2])
        )  # (key, at, is a head, device, life)
        groups = []
        for end in ends:
            if groups and groups[-1][-1][0] == end[0] and end[1] - groups[-1][-1][1] <= self.link_ns:
                groups[-1].append(end)
            else:
                groups.append([end])
        gone = set()
        for group in groups:
            heads = [end[2] for end in group]
            if heads == [False, True]:
                (_, left, _, a, tail), (_, came, _, b, head) = group
                lost = any(start < came and end > left for start, end in self.gaps)
                if a.netns == b.netns and (a != b or a.kind == "bridge") and not lost:
                    gone |= {id(tail), id(head)}
                    self.ledger["matched"] += len(tail.rest)
                    both = Life(tail.first_ts, tail.length, tail.hops + head.hops, head.rest, grade="content")
                    both.repeats = tail.repeats + head.repeats
                    lives = [*lives, both]
            elif len(group) > 2 and True in heads:
                self.grades["ambiguous"] += heads.count(False)
        return [life for life in lives if id(life) not in gone]

    def inner_end(self, life):
        if not life.placed:
            return None
        (first_ts, first_hook, first_dev, first_key), (ts, hook, dev, key) = life.placed[0], life.placed[-1]
        first, last = self.devices[first_dev], self.devices[dev]
        on_host = (Role.HOST, Role.OUTER)
        if life.hops[0][1][0] == (life.first_ts, Q) and first_hook is Q and first.role in on_host:
            return (first_key, first_ts, True, first, life) if first_key else None
        if hook in (R, IP) and last.role in on_host and [each[1] for each in life.rest] in ([], [c]) and key:
            return key, ts, False, last, life
        return None

    def count(self, life):
        ended = bool(life.rest) and life.rest[-1][1] in (c, k)
        last_role = life.hops[-1][0].role if life.hops else None
        arrived = last_role in (Role.INNER, Role.REMOTE) and life.hops[-1][1][-1][1] in (R, IP)
        dropped = ended and life.rest[-1][1] is k and not arrived
        self.ledger["dropped" if dropped else "matched"] += life.size
        rows = self.measure(life)
        self.grades[life.grade] += bool(rows)
        self.rows += [(life.first_ts, *row, life.grade) for row in rows]

    def measure(self, life):
        hops = life.hops
        if not hops:
            return []
        owner = {d.netns: d.container for d in self.devices.values() if d.role is Role.INNER}

        def serves(d):
            return owner.get(d.netns if d.role is Role.INNER else d.peer_netns if d.kind == "veth" else 0, "")

        sent = [BY_HOOK[records[0][1]].way is Way.TRANSMIT for _, records in hops]
        inner = [d.role is Role.INNER for d, _ in hops]
        origin = serves(hops[0][0]) if sent[0] == inner[0] and hops[0][0].role in (Role.INNER, Role.HOST) else ""
        target = serves(hops[-1][0]) if sent[-1] != inner[-1] and hops[-1][0].role in (Role.INNER, Role.HOST) else ""
        if not origin and not target:
            return []
        outer = next((i for i, (d, _) in enumerate(hops) if d.role is Role.OUTER), None)
        turn = next((i for i in range(1, len(hops)) if sent[i]), len(hops)) if origin and target else 0
        rows = []
        for i, (d, records) in enumerate(hops):
            into = bool(target) and (not origin or i >= turn)
            begin = records[0][0]
            if target and not origin and i == outer and records[-1][1] in (R, IP):
                begin = records[-1][0]
            if i + 1 < len(hops):
                leave = hops[i + 1][1][0][0]
            elif len(records) > 1:
                leave = records[-1][0]
            else:
                continue
            outside = outer is not None and i < outer if into else outer is not None and i >= outer
            outside |= d.role in (Role.REMOTE, Role.OTHER, Role.LOOPBACK)
            rows.append(
                (
                    d.name,
                    target if into else origin,
                    "in" if into else "out",
                    "outside" if outside else "device",
                    begin,
                    leave - begin,
                )
            )
        first, last = hops[0], hops[-1]
        if outer is not None and origin and not target and inner[0] and first[1][0][1] is Q:
            gate = hops[outer][1][0]
            if gate[1] is Q:
                rows.append((first[0].name, origin, "out", "overhead", first[1][0][0], gate[0] - first[1][0][0]))
        if outer is not None and target and not origin and inner[-1] and last[1][-1][1] in (R, IP):
            gate = hops[outer][1][-1]
            if gate[1] in (R, IP):
                rows.append((last[0].name, target, "in", "overhead", gate[0], last[1][-1][0] - gate[0]))
        if (
            target
            and not origin
            and inner[-1]
            and last[1][-1][1] in (R, IP)
            and life.rest
            and life.rest[0][1] is Hook.SKB_COPY_DATAGRAM_IOVEC
        ):
            rows.append((last[0].name, target, "in", "delivery", last[1][-1][0], life.rest[0][0] - last[1][-1][0]))
        return rows
