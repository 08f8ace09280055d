"""The hook table: the numbered places at which a packet is observed.

Numbers are part of the ABI and of every capture file: append, never renumber.
`LOST` is not a hook but a marker in the stream: the ring lost records here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum
from typing import Final


class Hook(IntEnum):
    """Identifier of an observation point (u8 in records)."""

    INVALID = 0
    NET_DEV_QUEUE = 1
    NET_DEV_START_XMIT = 2
    NETIF_RX = 3
    NETIF_RECEIVE_SKB = 4
    NAPI_GRO_RECEIVE_ENTRY = 5
    SKB_COPY_DATAGRAM_IOVEC = 6
    CONSUME_SKB = 7
    KFREE_SKB = 8
    IP_RCV = 9
    LOST = 255


class Way(IntEnum):
    """Direction of a packet at a hook."""

    TRANSMIT = 1
    """From the stack into a device; the kernel's length includes the link-layer header."""
    RECEIVE = 2
    """From a device to the stack; the kernel's length does not include the link-layer header."""
    DELIVERY = 3
    """Copy to a socket's reader, without a device."""
    END = 4
    """Freeing of the kernel buffer, without a device."""


@dataclass(frozen=True, slots=True)
class HookInfo:
    """One row of the hook table."""

    hook: Hook
    letter: str
    """The hook's letter in short forms of paths, as in `QX eth0 · rR vethc0`."""
    tracepoint: str
    """`subsystem:name` of the kernel's tracepoint, or `function:name` where the kernel has no tracepoint."""
    way: Way
    meaning: str

    @property
    def name(self) -> str:
        """User name: that of the tracepoint or function."""
        return self.tracepoint.partition(":")[2]

    @property
    def is_tracepoint(self) -> bool:
        """Whether the kernel has a tracepoint there, which ftrace and other tools record."""
        return not self.tracepoint.startswith("function:")

    @property
    def has_device(self) -> bool:
        """Whether the record names a device."""
        return self.way in (Way.TRANSMIT, Way.RECEIVE)


HOOKS: Final[tuple[HookInfo, ...]] = (
    HookInfo(
        Hook.NET_DEV_QUEUE,
        "Q",
        "net:net_dev_queue",
        Way.TRANSMIT,
        "The stack hands the packet to the device's queueing discipline.",
    ),
    HookInfo(
        Hook.NET_DEV_START_XMIT,
        "X",
        "net:net_dev_start_xmit",
        Way.TRANSMIT,
        "The device's driver is called to send the packet.",
    ),
    HookInfo(
        Hook.NETIF_RX,
        "r",
        "net:netif_rx",
        Way.RECEIVE,
        "The packet is put on a CPU's backlog; on a veth this is inside the peer's transmit.",
    ),
    HookInfo(
        Hook.NETIF_RECEIVE_SKB,
        "R",
        "net:netif_receive_skb",
        Way.RECEIVE,
        "The stack takes the packet from the device.",
    ),
    HookInfo(
        Hook.NAPI_GRO_RECEIVE_ENTRY,
        "G",
        "net:napi_gro_receive_entry",
        Way.RECEIVE,
        "The driver's NAPI poll offers the packet to receive offload, before the stack.",
    ),
    HookInfo(
        Hook.SKB_COPY_DATAGRAM_IOVEC,
        "D",
        "skb:skb_copy_datagram_iovec",
        Way.DELIVERY,
        "A reader copies the packet's data out of a socket.",
    ),
    HookInfo(
        Hook.CONSUME_SKB,
        "c",
        "skb:consume_skb",
        Way.END,
        "The kernel buffer is freed in the normal course of things.",
    ),
    HookInfo(
        Hook.KFREE_SKB,
        "k",
        "skb:kfree_skb",
        Way.END,
        "The kernel buffer is freed because the packet is dropped; the record has the reason.",
    ),
    HookInfo(
        Hook.IP_RCV,
        "i",
        "function:ip_rcv",
        Way.RECEIVE,
        "IPv4 or IPv6 takes the packet from a device whose `netif_receive_skb` it did not pass.",
    ),
)

ALONG: Final[dict[Way, tuple[Hook, ...]]] = {
    Way.TRANSMIT: (Hook.NET_DEV_QUEUE, Hook.NET_DEV_START_XMIT),
    Way.RECEIVE: (Hook.NETIF_RX, Hook.NAPI_GRO_RECEIVE_ENTRY, Hook.NETIF_RECEIVE_SKB, Hook.IP_RCV),
}
"""The hooks at a device, in the order in which a packet passes them there."""

LEAVING: Final[frozenset[Hook]] = frozenset({Hook.NET_DEV_START_XMIT, Hook.NETIF_RECEIVE_SKB, Hook.IP_RCV})
"""The hooks behind which a packet can leave the device, to another device or up. `IP_RCV` stands in for
`NETIF_RECEIVE_SKB` where a packet changed devices behind that tracepoint."""

BY_HOOK: Final[dict[Hook, HookInfo]] = {info.hook: info for info in HOOKS}
TRACEPOINTS: Final[tuple[HookInfo, ...]] = tuple(info for info in HOOKS if info.is_tracepoint)
"""The hooks that are tracepoints of the kernel."""
BY_TRACEPOINT: Final[dict[str, HookInfo]] = {info.tracepoint: info for info in HOOKS}


def silent_on(release: str) -> str:
    """Return a sentence on packets' events that a kernel of this release (`uname -r`) shows at no hook, or "".

    Linux 6.18 frees a UDP datagram that was read by skb_attempt_defer_free(), which passes no tracepoint.
    """
    version = re.match(r"(\d+)\.(\d+)", release)
    if version is None or (int(version[1]), int(version[2])) < (6, 18):
        return ""
    return "Linux 6.18 and later show neither delivery nor end of a linear UDP datagram"
