"""Hooks as plain numbers, for comparisons with arrays and with the numbers that the compiled loop passes.

Comparing an array of 200 elements with a member of an enumeration takes 3 µs, with a plain number 0.6 µs.
"""

from __future__ import annotations

from typing import Final

from contracts.hooks import Hook

QUEUE: Final = int(Hook.NET_DEV_QUEUE)
XMIT: Final = int(Hook.NET_DEV_START_XMIT)
RX: Final = int(Hook.NETIF_RX)
RECEIVE_SKB: Final = int(Hook.NETIF_RECEIVE_SKB)
GRO: Final = int(Hook.NAPI_GRO_RECEIVE_ENTRY)
COPY: Final = int(Hook.SKB_COPY_DATAGRAM_IOVEC)
CONSUMED: Final = int(Hook.CONSUME_SKB)
DROP: Final = int(Hook.KFREE_SKB)
IP_RCV: Final = int(Hook.IP_RCV)
LOST: Final = int(Hook.LOST)
