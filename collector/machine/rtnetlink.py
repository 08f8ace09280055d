"""Queries the links of any network namespace by rtnetlink, from one namespace.

The kernel lists another namespace's links (`IFLA_TARGET_NETNSID`), and delivers another namespace's events
(`NETLINK_LISTEN_ALL_NSID`), to a socket whose own namespace has a *number* for the other one. Such a number does not
keep a namespace alive: when the other namespace dies, the kernel removes the number with an `RTM_DELNSID` event
(net/core/net_namespace.c, `unhash_nsids`). Two sockets in one otherwise unused namespace thereby see every link of the
machine, and no container lives longer because it is watched. docs/design/005-devices.md has the reasons and the
alternatives.

This module reads messages with `struct` and not with pyroute2. pyroute2 supports neither `IFLA_TARGET_NETNSID` nor the
control message with the namespace of an event, and takes 450 µs for a link of which five attributes are needed (here
25 µs, the kernel's share included). The tests compare the two.

Numbers are from include/uapi/linux/{netlink,rtnetlink,if_link,net_namespace}.h; they are ABI.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from struct import Struct, error
from typing import Final, Self

from contracts.names import text_of

_NLMSG_ERROR: Final = 2
_NLMSG_DONE: Final = 3
_NLM_F_REQUEST: Final = 0x1
_NLM_F_MULTI: Final = 0x2
_NLM_F_ACK: Final = 0x4
_NLM_F_DUMP: Final = 0x300
_NLM_F_DUMP_INTR: Final = 0x10
_SOL_NETLINK: Final = 270
_NETLINK_ADD_MEMBERSHIP: Final = 1
_NETLINK_LISTEN_ALL_NSID: Final = 8
_NETLINK_GET_STRICT_CHK: Final = 12
_SO_RCVBUFFORCE: Final = 33

RTM_NEWLINK: Final = 16
RTM_DELLINK: Final = 17
_RTM_GETLINK: Final = 18
RTM_NEWROUTE: Final = 24
RTM_DELROUTE: Final = 25
_RTM_GETROUTE: Final = 26
RTM_NEWNSID: Final = 88
RTM_DELNSID: Final = 89
_RTM_GETNSID: Final = 90
_GROUPS: Final = {"LINK": 1, "IPV4_ROUTE": 7, "IPV6_ROUTE": 11, "NSID": 28}

_IFLA_IFNAME: Final = 3
_IFLA_LINK: Final = 5
_IFLA_MASTER: Final = 10
_IFLA_LINKINFO: Final = 18
_IFLA_EXT_MASK: Final = 29
_IFLA_LINK_NETNSID: Final = 37
_IFLA_TARGET_NETNSID: Final = 46
_IFLA_INFO_KIND: Final = 1
_IFLA_INFO_DATA: Final = 2
_IFLA_VXLAN_LINK: Final = 3
_RTEXT_FILTER_SKIP_STATS: Final = 1 << 3
_ARPHRD_LOOPBACK: Final = 772

_NETNSA_NSID: Final = 1
_NETNSA_FD: Final = 3

_RTA_OIF: Final = 4
_RTA_MULTIPATH: Final = 9
_RTA_TABLE: Final = 15
_RT_TABLE_MAIN: Final = 254
_RTN_UNICAST: Final = 1
_RTM_F_CLONED: Final = 0x200

_NLMSGHDR: Final = Struct("=IHHII")
_RTATTR: Final = Struct("=HH")
_IFINFOMSG: Final = Struct("=BxHiII")
_RTMSG: Final = Struct("=8BI")
_RTNEXTHOP: Final = Struct("=HBBi")
_U32: Final = Struct("=I")
_I32: Final = Struct("=i")

_NESTED: Final = 0x3FFF
"""`NLA_TYPE_MASK`: the two upper bits of an attribute's type are flags."""

_DUMP_TRIES: Final = 10
_RECEIVE_BYTES: Final = 1 << 17
"""Size of a receive buffer. A dump arrives in pieces of at most 32 KiB (`netlink_dump`); one message with many IFLA
attributes can exceed that."""
_EVENT_BUFFER_BYTES: Final = 8 << 20
"""Socket buffer for events. A link event takes about 4 KiB of it (1.5 KiB and the kernel's overhead): room for some
2000 events between two readings."""


class NamespaceGone(Exception):
    """The namespace with this number has died, or refuses access."""


@dataclass(frozen=True, slots=True)
class Link:
    """The attributes of an RTM_NEWLINK message that MACE uses."""

    ifindex: int
    name: str
    kind: str
    """rtnetlink's kind, `loopback`, or `""` for hardware."""
    link: int
    """ifindex of the veth peer or of the lower device, 0 if there is none."""
    link_nsid: int | None
    """Number of the namespace of `link`; None if `link` is in this link's own namespace."""
    master: int


@dataclass(frozen=True, slots=True)
class Event:
    """A change of a link, of a default route, or of the numbering of namespaces."""

    type: int
    nsid: int
    ifindex: int = 0


def _attr(kind: int, payload: bytes) -> bytes:
    return _RTATTR.pack(4 + len(payload), kind) + payload + bytes(-len(payload) % 4)


def _attributes(data: bytes | memoryview, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield (type, start, end) of each attribute's payload in `data[start:end]`."""
    while start + 4 <= end:
        length, kind = _RTATTR.unpack_from(data, start)
        if length < 4 or start + length > end:
            return
        yield kind & _NESTED, start + 4, start + length
        start += (length + 3) & ~3


def _text(data: bytes, start: int, end: int) -> str:
    # A device name may contain any bytes but '/', ':' and white space (dev_valid_name).
    return text_of(data[start:end].rstrip(b"\0"))


def _messages(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Yield (type, flags, start, end) of each message's body."""
    offset = 0
    while offset + 16 <= len(data):
        length, kind, flags, _seq, _pid = _NLMSGHDR.unpack_from(data, offset)
        if length < 16 or offset + length > len(data):
            return
        yield kind, flags, offset + 16, offset + length
        offset += (length + 3) & ~3


def parse_link(data: bytes, start: int, end: int) -> Link:
    """Return the link of the RTM_NEWLINK body at `data[start:end]`."""
    _family, arp_type, ifindex, _flags, _change = _IFINFOMSG.unpack_from(data, start)
    name, kind, link, link_nsid, master = "", "", 0, None, 0
    for attribute, a, b in _attributes(data, start + 16, end):
        if attribute == _IFLA_IFNAME:
            name = _text(data, a, b)
        elif attribute == _IFLA_LINK:
            link = _U32.unpack_from(data, a)[0]
        elif attribute == _IFLA_MASTER:
            master = _U32.unpack_from(data, a)[0]
        elif attribute == _IFLA_LINK_NETNSID:
            link_nsid = _I32.unpack_from(data, a)[0]
        elif attribute == _IFLA_LINKINFO:
            for inner, c, d in _attributes(data, a, b):
                if inner == _IFLA_INFO_KIND:
                    kind = _text(data, c, d)
                elif inner == _IFLA_INFO_DATA and kind == "vxlan":
                    # In older kernels vxlan has no ndo_get_iflink: its lower device is only in this attribute.
                    for option, e, _ in _attributes(data, c, d):
                        if option == _IFLA_VXLAN_LINK:
                            link = _U32.unpack_from(data, e)[0]
    if arp_type == _ARPHRD_LOOPBACK:
        kind = "loopback"
    if link == ifindex and link_nsid is None:
        link = 0
    return Link(ifindex, name, kind, link, link_nsid, master)


def parse_default_route(data: bytes, start: int, end: int) -> frozenset[int]:
    """Return the ifindexes of the devices that the RTM_NEWROUTE body's route uses; none for other than default routes.

    Only routes of the main table count.
    """
    _family, dst_len, _src_len, _tos, table, _protocol, _scope, kind, flags = _RTMSG.unpack_from(data, start)
    if dst_len or kind != _RTN_UNICAST or flags & _RTM_F_CLONED:
        return frozenset()
    through = set()
    for attribute, a, b in _attributes(data, start + 12, end):
        if attribute == _RTA_OIF:
            through.add(_U32.unpack_from(data, a)[0])
        elif attribute == _RTA_TABLE:
            table = _U32.unpack_from(data, a)[0]
        elif attribute == _RTA_MULTIPATH:
            while a + 8 <= b:
                length, _nh_flags, _hops, ifindex = _RTNEXTHOP.unpack_from(data, a)
                through.add(ifindex)
                a += max((length + 3) & ~3, 8)
    return frozenset(through) if table == _RT_TABLE_MAIN else frozenset()


class _Socket:
    """A NETLINK_ROUTE socket in the network namespace of the thread that makes it."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    def _ask(self, kind: int, body: bytes, flags: int = 0) -> list[tuple[bytes, int, int]]:
        """Send a request and return the bodies of the answers as (data, start, end); raises `OSError`.

        A dump during which something changed is repeated, as netlink(7) demands.
        """
        request = _NLMSGHDR.pack(16 + len(body), kind, _NLM_F_REQUEST | flags, 1, 0) + body
        answers: list[tuple[bytes, int, int]] = []
        for _ in range(_DUMP_TRIES):
            self._socket.send(request)
            answers, consistent = self._answers()
            if consistent:
                break
        return answers

    def _answers(self) -> tuple[list[tuple[bytes, int, int]], bool]:
        answers: list[tuple[bytes, int, int]] = []
        consistent = True
        while True:
            data = self._socket.recv(_RECEIVE_BYTES)
            for kind, flags, start, end in _messages(data):
                consistent &= not flags & _NLM_F_DUMP_INTR
                if kind in (_NLMSG_ERROR, _NLMSG_DONE):
                    code = _I32.unpack_from(data, start)[0] if end - start >= 4 else 0
                    if code:
                        raise OSError(-code, os.strerror(-code))
                    return answers, consistent
                answers.append((data, start, end))
                if not flags & _NLM_F_MULTI:
                    return answers, consistent


class LinkQueries(_Socket):
    """Queries about the namespaces for which this socket's namespace has numbers."""

    def number(self, netns_fd: int) -> int:
        """Return the nsid of the namespace behind an open nsfs file; assigns one if it has none.

        Raises `OSError`, or `NamespaceGone` if the namespace has died.
        """
        try:
            self._ask(RTM_NEWNSID, _by_fd(netns_fd) + _attr(_NETNSA_NSID, _I32.pack(-1)), _NLM_F_ACK)
        except FileExistsError:
            pass  # the namespace has a number: the kernel numbers a veth peer's namespace when it lists the veth
        nsid = self.number_if_any(netns_fd)
        if nsid is None:
            raise NamespaceGone
        return nsid

    def number_if_any(self, netns_fd: int) -> int | None:
        """Return the nsid of the namespace behind an open nsfs file, None if it has none."""
        for data, start, end in self._ask(_RTM_GETNSID, _by_fd(netns_fd)):
            for attribute, a, _ in _attributes(data, start + 4, end):
                if attribute == _NETNSA_NSID:
                    nsid: int = _I32.unpack_from(data, a)[0]
                    return nsid if nsid >= 0 else None
        return None

    def numbers(self) -> set[int]:
        """Return all nsids in use."""
        return {
            _I32.unpack_from(data, a)[0]
            for data, start, end in self._ask(_RTM_GETNSID, bytes(4), _NLM_F_DUMP)
            for attribute, a, _ in _attributes(data, start + 4, end)
            if attribute == _NETNSA_NSID
        }

    def links(self, nsid: int) -> dict[int, Link]:
        """Return all links of a namespace by ifindex; raises `NamespaceGone`."""
        try:
            answers = self._ask(_RTM_GETLINK, _link_request(nsid, 0), _NLM_F_DUMP)
        except OSError as failure:
            raise NamespaceGone from failure
        links = [parse_link(*answer) for answer in answers]
        return {link.ifindex: link for link in links}

    def link(self, nsid: int, ifindex: int) -> Link | None:
        """Return one link, None if it does not exist; raises `NamespaceGone`."""
        try:
            answers = self._ask(_RTM_GETLINK, _link_request(nsid, ifindex))
        except OSError as failure:
            if failure.errno == errno.ENODEV:
                return None
            raise NamespaceGone from failure
        return parse_link(*answers[0])


def _by_fd(netns_fd: int) -> bytes:
    return bytes(4) + _attr(_NETNSA_FD, _U32.pack(netns_fd))


def _link_request(nsid: int, ifindex: int) -> bytes:
    return (
        _IFINFOMSG.pack(socket.AF_UNSPEC, 0, ifindex, 0, 0)
        + _attr(_IFLA_TARGET_NETNSID, _I32.pack(nsid))
        + _attr(_IFLA_EXT_MASK, _U32.pack(_RTEXT_FILTER_SKIP_STATS))
    )


class RouteQueries(_Socket):
    """Queries routes of the namespace in which the socket was made: RTM_GETROUTE has no target namespace."""

    def default_routes(self) -> frozenset[int]:
        """Return the ifindexes of the devices that the main tables' default routes, IPv4 and IPv6, use."""
        # With strict checking the kernel filters by table, and does not copy a large table of another kind.
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_GET_STRICT_CHK, 1)
        through: set[int] = set()
        for family in (socket.AF_INET, socket.AF_INET6):
            try:
                answers = self._ask(
                    _RTM_GETROUTE, _RTMSG.pack(family, 0, 0, 0, _RT_TABLE_MAIN, 0, 0, 0, 0), _NLM_F_DUMP
                )
            except OSError:
                continue  # ENOENT: the table is empty; EOPNOTSUPP: no IPv6
            for data, start, end in answers:
                if data[start] == family and data[start + 1] == 0:
                    through |= parse_default_route(data, start, end)
        return frozenset(through)


class LinkEvents(_Socket):
    """Receives the events of every namespace for which this socket's namespace has a number."""

    def __init__(self) -> None:
        super().__init__()
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _EVENT_BUFFER_BYTES)
            # Bind first: binding without groups leaves all groups joined before (netlink_bind).
            self._socket.bind((0, 0))
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_LISTEN_ALL_NSID, 1)
            for group in _GROUPS.values():
                self._socket.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, group)
            self._socket.setblocking(False)
        except BaseException:
            self.close()
            raise

    def read(self) -> tuple[list[Event], bool]:
        """Return the events since the last call, in order, and whether events were lost (then query everything)."""
        events: list[Event] = []
        lost = False
        while True:
            try:
                data, ancillary, _flags, _sender = self._socket.recvmsg(_RECEIVE_BYTES, 64)
            except BlockingIOError:
                return events, lost
            except OSError as failure:
                if failure.errno != errno.ENOBUFS:
                    raise
                lost = True
                continue
            # Events of the socket's own namespace have no nsid: the numbering, and its lo, which does not matter.
            nsid = next((_I32.unpack(value)[0] for level, _, value in ancillary if level == _SOL_NETLINK), None)
            for kind, _, start, end in _messages(data):
                try:
                    event = _parse_event(data, kind, start, end, nsid)
                except error:
                    continue
                if event is not None:
                    events.append(event)


def _parse_event(data: bytes, kind: int, start: int, end: int, nsid: int | None) -> Event | None:
    if kind in (RTM_NEWLINK, RTM_DELLINK):
        # Any address family counts: a bridge reports its ports with AF_BRIDGE.
        return None if nsid is None else Event(kind, nsid, _IFINFOMSG.unpack_from(data, start)[2])
    if kind in (RTM_NEWROUTE, RTM_DELROUTE):
        default = data[start + 1] == 0  # rtm_dst_len
        return Event(kind, nsid) if default and nsid is not None else None
    if kind in (RTM_NEWNSID, RTM_DELNSID) and nsid is None:
        # Events with an nsid concern the numbering inside another namespace.
        for attribute, a, _ in _attributes(data, start + 4, end):
            if attribute == _NETNSA_NSID:
                return Event(kind, _I32.unpack_from(data, a)[0])
    return None
