"""When does a tool read the clock? The model of each tool's timestamps, and the uncertainty that remains.

A round trip time is the difference of two timestamps, neither of which is taken at a device:

    tool     ── S ──┐                                                        ┌── R (user clock) ── printed ──
    stack           └─ Q inner ─ ... ─ Q outer ─ X outer ~~ r outer ─ R outer ─ ... ─ r inner ─ R inner
                                                                                 └ R (kernel clock)

Q is `net_dev_queue`, X `net_dev_start_xmit`, r `netif_rx`, R `netif_receive_skb`.

**Sending (S).** All tools here read the user's clock right before the system call that sends. From S to Q inner the
system call, routing and the container's own netfilter rules take 2 to 20 µs, more with a cold cache, and for a first
packet as long as address resolution takes. A host process would spend about the same from S to Q outer. Nothing is
therefore subtracted for this time; the difference between the two is an error of the host RTT.

- *iputils ping* (`ping/ping.c`, `ping4_send_probe`; `ping/ping6_common.c`, `ping6_send_probe`): `gettimeofday` into the
  payload, then `sendto`. Whole microseconds, truncated.
- *inetutils ping* (`ping/ping.c`, `send_echo`): like iputils ping. *busybox ping* (`networking/ping.c`,
  `sendping_tail`): like iputils ping, with CLOCK_MONOTONIC.
- *fping* 5 (`src/fping.c`, `send_ping`): `clock_gettime(CLOCK_REALTIME)`, nanoseconds, then `sendto`.
- *dig* 9 (`bin/dig/dighost.c`, `send_udp`): with `-u` `TIME_NOW_HIRES`, CLOCK_REALTIME to the nanosecond, then
  `isc_nm_send`, which sends at once or, if it is busy, from its loop.
- *curl* (`lib/progress.c`, `Curl_pgrsTime`): a connection's time is `time_connect` - `time_namelookup`. The latter is
  read from CLOCK_MONOTONIC when the address is known; `socket`, its options, and `connect`, which sends, follow.
- *Any other tool* that reports its sending times is assumed to read the clock like this. A tool that reads the clock
  after the system call has returned (its packet may be at the outer device by then) does not fit this model, and its
  samples stay unpaired.

**Receiving (R).** Here tools differ, and by more than the effect that is measured.

- *iputils ping* without `-U` requests `SO_TIMESTAMP` (`ping/ping_common.c`, `setup`, `main_loop`), for raw and for ping
  sockets alike, and *fping* 5 `SO_TIMESTAMPNS` (`receive_packet`). The kernel takes the timestamp:
  `net_timestamp_check` in net/core/dev.c, in `netif_rx_internal` right before the tracepoint `netif_rx`, or in
  `netif_receive_skb_internal` for a device with NAPI; not when the reader is woken. The kernel clears a timestamp of
  the outer device where it forwards the packet (`skb_clear_tstamp` in net/ipv4/ip_forward.c and
  net/bridge/br_forward.c) and where the packet enters another namespace (`skb_scrub_packet`). R is therefore at r *of
  the inner device*, for a host process at r of the outer device, and r inner - r outer is subtracted.
  (`netif_receive_skb` inner - outer would also subtract the wait for the softirq at the inner device, which is behind
  the timestamp: 0.6 µs as a rule, but occasionally 80 µs in a flood, which gives a host RTT below zero.)
- *iputils ping -U*, *inetutils ping* (`ping/ping_echo.c`, `print_echo`), *busybox ping* (`unpack4`, `unpack6`) and
  tools that read the clock when their `recv` returns use the user's clock. The socket, the wake-up and the scheduler
  lie between R inner and the timestamp: 5 to 50 µs on an idle machine and any time on a busy one. A host process has
  the same wait, so that it stays in the host RTT; its scatter widens the interval.
- *dig* 9 (`recv_done`) and *curl* (`time_connect`, when `poll` reports that the socket can be written to) use the
  user's clock, too. No process reads a SYN-ACK; curl waits for the wake-up that it causes.
- Hardware timestamps are not modelled: MACE reads no tool that prints them.

**Printed values** are coarser than measured ones: ping prints microseconds below 1 ms and three digits above
(`gather_statistics`), fping three digits (`sprint_tm`), dig and curl microseconds. `Samples.resolution_ns` has the
resolution.

**The time of a line.** `ping -D` prints the time of *printing* (`print_timestamp`), after reception and before the next
system call: normally 20 to 100 µs after R, but the scheduler may intervene. `fping -D` prints R itself, with five
digits after the point. CSV has the time of sending.

Three errors remain in the host RTT: the difference between S to Q in the container's stack and in the host's; the cost
of tracing outside the two overheads; and work that both packets cause at different places. A host process's packet
passes the host's output and postrouting rules too; this part of the overhead is subtracted although a host process
would have it. Together they are a few µs where nothing waits. docs/correction.md has measured values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final


class LineTime(StrEnum):
    """Event to which the time of a sample (`Samples.stamp_utc_ns`) refers."""

    SENT = "sent"
    """The request's timestamp, S."""
    RECEIVED = "received"
    """The reply's timestamp, R."""
    PRINTED = "printed"
    """The printing of the line, some time after R."""


class ReceiveClock(StrEnum):
    """Reader of the clock for R."""

    KERNEL = "kernel"
    """At the first reception at the inner device."""
    USER = "user"
    """When the receiving system call has returned: after `netif_receive_skb` at the inner device."""


@dataclass(frozen=True, slots=True)
class StampModel:
    """A tool's way of taking timestamps, with the longest waits that still count as a fit.

    Each wait has an *ordinary* bound, and all share a long one, because a process can be interrupted anywhere for some
    time slices of the scheduler. A pair that is certain with the long bound is certain; if the long bound leaves
    neighbours ambiguous, the ordinary bounds decide.
    """

    name: str
    line_time: LineTime
    receive_clock: ReceiveClock
    line_resolution_ns: int = 1_000
    """The line's time is known to ± this, by the digits that are not printed."""
    send_wait_ns: int = 1_000_000
    """Ordinary bound from S to Q inner. Measured: 2 to 60 µs, 87 µs at most in 12,000 on a busy
    machine, and 3.2 ms once."""
    wake_wait_ns: int = 5_000_000
    """Ordinary bound from R inner to R, for a user's clock."""
    print_wait_ns: int = 5_000_000
    """Ordinary bound from R to the line's time, for a line with the time of printing. Measured: 4 to 50 µs, 4.2 ms at
    most."""
    longest_wait_ns: int = 1_000_000_000
    """Long bound of each wait. Measured: 188 ms, with six busy processes on two cores."""
    clock_slack_ns: int = 5_000
    """Ordinary bound between the kernel's timestamp and a record's: one clock read twice, possibly with an interrupt in
    between."""
    longest_slack_ns: int = 100_000
    """Long bound of that slack, for several interrupts or a halted virtual machine. Measured: 4 µs twice in 20,000, and
    75 µs."""

    def patient(self) -> StampModel:
        """Return the model with the long bound for each wait and for the slack."""
        longest = self.longest_wait_ns
        slack = self.longest_slack_ns
        return replace(self, send_wait_ns=longest, wake_wait_ns=longest, print_wait_ns=longest, clock_slack_ns=slack)


PING: Final = StampModel("ping", LineTime.PRINTED, ReceiveClock.KERNEL)
"""iputils ping; its lines have a time with `-D`."""
PING_USER: Final = StampModel("ping -U", LineTime.PRINTED, ReceiveClock.USER)
"""iputils ping -U."""
PING_INETUTILS: Final = StampModel("ping of inetutils", LineTime.PRINTED, ReceiveClock.USER)
PING_BUSYBOX: Final = StampModel("ping of busybox", LineTime.PRINTED, ReceiveClock.USER)
"""inetutils ping and busybox ping print no time of day."""
FPING: Final = StampModel("fping", LineTime.RECEIVED, ReceiveClock.KERNEL, line_resolution_ns=5_000)
"""fping 5.0 and later, built with SO_TIMESTAMPNS (on Linux)."""
REQUEST_RESPONSE: Final = StampModel("request and response", LineTime.SENT, ReceiveClock.USER, line_resolution_ns=0)
"""Any tool that reports sending times and round trip times, both by the user's clock."""
DIG: Final = StampModel("dig", LineTime.PRINTED, ReceiveClock.USER)
"""dig 9 over UDP. dig prints times in whole seconds, which are not used: order and content decide."""
CURL: Final = StampModel("curl connect", LineTime.PRINTED, ReceiveClock.USER)
"""curl's connect time. It prints no time of day."""

MODELS: Final = {
    model.name: model for model in (PING, PING_USER, PING_INETUTILS, PING_BUSYBOX, FPING, REQUEST_RESPONSE, DIG, CURL)
}
