"""When does a tool look at the clock? The model of each tool's time stamps, and what it leaves uncertain.

A round trip time is a difference of two stamps, and neither is taken at a device:

    tool     ── S ──┐                                                        ┌── R (user clock) ── printed ──
    stack           └─ Q inner ─ ... ─ Q outer ─ X outer ~~ r outer ─ R outer ─ ... ─ r inner ─ R inner
                                                                                 └ R (kernel clock)

Q is `net_dev_queue`, X `net_dev_start_xmit`, r `netif_rx`, R `netif_receive_skb`.

**Sending (S).** All tools here read the user's clock right before the system call that sends. From there to
Q inner it takes the system call, routing and the container's own netfilter rules: 2 to 20 µs, more when the cache is
cold, and as long as address resolution takes for a first packet. A host process would spend about the same from its
stamp to Q outer; so nothing is taken off for it, and what the two spend differently is an error of the host RTT.

- *iputils ping* (`ping/ping.c`, `ping4_send_probe`; `ping/ping6_common.c`, `ping6_send_probe`): `gettimeofday` into the
  payload, then `sendto`. Whole microseconds, cut off.
- *ping of inetutils* (`ping/ping.c`, `send_echo`): the same. *Of busybox* (`networking/ping.c`, `sendping_tail`): the
  same with CLOCK_MONOTONIC.
- *fping* 5 (`src/fping.c`, `send_ping`): `clock_gettime(CLOCK_REALTIME)`, nanoseconds, then `sendto`.
- *dig* 9 (`bin/dig/dighost.c`, `send_udp`): with `-u` `TIME_NOW_HIRES`, CLOCK_REALTIME to the nanosecond, then
  `isc_nm_send`, which sends at once or, if it is busy, from its loop.
- *curl* (`lib/progress.c`, `Curl_pgrsTime`): a connection's time is `time_connect` - `time_namelookup`. The latter is
  stamped by CLOCK_MONOTONIC when the address is known; then come `socket`, its options, and `connect`, which sends.
- *anything else* that says when it sent: taken to be stamped like this. A tool that stamps after the system call has
  returned (its packet may be at the outer device by then) does not fit this model, and its samples come out unpaired.

**Receiving (R).** Here tools differ, and by more than the effect that is measured.

- *iputils ping* without `-U` asks for `SO_TIMESTAMP` (`ping/ping_common.c`, `setup`, `main_loop`), for raw and for ping
  sockets alike, and *fping* 5 for `SO_TIMESTAMPNS` (`receive_packet`). The stamp is the kernel's: `net_timestamp_check`
  in net/core/dev.c, in `netif_rx_internal` right before the tracepoint `netif_rx`, or in `netif_receive_skb_internal`
  for a device with NAPI; not when the reader is woken. A stamp that the outer device gave is wiped where the packet is
  forwarded (`skb_clear_tstamp` in net/ipv4/ip_forward.c and net/bridge/br_forward.c) and where it enters another
  namespace (`skb_scrub_packet`). So R is at r *of the inner device*, of a host process at r of the outer one, and what
  is taken off is r inner - r outer. (`netif_receive_skb` inner - outer would take off the wait for the softirq at the
  inner device too, which is behind the stamp: 0.6 µs as a rule, but 80 µs now and then in a flood, and a host RTT below
  zero.)
- *iputils ping -U*, *ping of inetutils* (`ping/ping_echo.c`, `print_echo`), *of busybox* (`unpack4`, `unpack6`) and
  tools that read the clock when their `recv` returns: the user's clock. Between R inner and the
  stamp lie the socket, the wake-up and the scheduler, 5 to 50 µs on an idle machine and any time on a busy one. A host
  process has the same wait, so it stays in the host RTT; its scatter goes into the interval.
- *dig* 9 (`recv_done`) and *curl* (`time_connect`, when `poll` has said that the socket can be written to): the user's
  clock, too. A SYN-ACK is never read by anybody; what curl waits for is the wake-up from it.
- Hardware stamps are not modelled: no tool that prints them is read here.

**What is printed** is coarser than what was measured: ping prints microseconds below 1 ms and three digits above
(`gather_statistics`), fping three digits (`sprint_tm`), dig and curl microseconds. `Samples.resolution_ns` carries it.

**The time of a line.** `ping -D` prints the time of *printing* (`print_timestamp`), after reception and before the next
system call; normally 20 to 100 µs after R, but there may be a scheduler between. `fping -D` prints R itself, with five
digits after the point. CSV has the time of sending.

What the model leaves in the host RTT, then: stamp to Q (a container's stack against the host's), the cost of tracing
outside the two overheads, and the work that both do but at different places: a host process's packet passes the host's
output and postrouting rules too, and that part of the overhead is taken off although it would have been paid. All of it
together is a few µs where nothing waits. docs/correction.md has measured values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final


class LineTime(StrEnum):
    """What the time beside a sample (`Samples.stamp_utc_ns`) is the time of."""

    SENT = "sent"
    """The request's stamp, S."""
    RECEIVED = "received"
    """The reply's stamp, R."""
    PRINTED = "printed"
    """Some time after R."""


class ReceiveClock(StrEnum):
    """Who reads the clock for R."""

    KERNEL = "kernel"
    """At the first reception at the inner device."""
    USER = "user"
    """When the receiving system call has returned: after `netif_receive_skb` at the inner device."""


@dataclass(frozen=True, slots=True)
class StampModel:
    """How a tool stamps time, with the longest waits that still count as a fit.

    Each wait has an *ordinary* bound, and all have a long one: a process can be interrupted anywhere, for some time
    slices of the scheduler. What the long one leaves certain is certain; where it leaves neighbours ambiguous, the
    ordinary ones decide.
    """

    name: str
    line_time: LineTime
    receive_clock: ReceiveClock
    line_resolution_ns: int = 1_000
    """The line's time is known to ± this: digits that are not printed."""
    send_wait_ns: int = 1_000_000
    """From S to Q inner. Measured: 2 to 60 µs, 87 µs at most in 12,000 on a busy machine, and once 3.2 ms."""
    wake_wait_ns: int = 5_000_000
    """From R inner to R, for a user's clock."""
    print_wait_ns: int = 5_000_000
    """From R to the line's time, for a line that is stamped when printed. Measured: 4 to 50 µs, 4.2 ms at most."""
    longest_wait_ns: int = 1_000_000_000
    """Of any of them. Measured: 188 ms, with six busy processes on two cores."""
    clock_slack_ns: int = 5_000
    """Records' and the kernel's stamps are of one clock, read one after the other, maybe with an interrupt between."""
    longest_slack_ns: int = 100_000
    """For several interrupts, or a virtual machine that is halted there. Measured: 4 µs twice in 20,000, and 75 µs."""

    def patient(self) -> StampModel:
        """The same with the longest wait, and the longest slack, for each."""
        longest = self.longest_wait_ns
        slack = self.longest_slack_ns
        return replace(self, send_wait_ns=longest, wake_wait_ns=longest, print_wait_ns=longest, clock_slack_ns=slack)


PING: Final = StampModel("ping", LineTime.PRINTED, ReceiveClock.KERNEL)
"""iputils ping. With `-D` for the time of the lines."""
PING_USER: Final = StampModel("ping -U", LineTime.PRINTED, ReceiveClock.USER)
"""iputils ping -U."""
PING_INETUTILS: Final = StampModel("ping of inetutils", LineTime.PRINTED, ReceiveClock.USER)
PING_BUSYBOX: Final = StampModel("ping of busybox", LineTime.PRINTED, ReceiveClock.USER)
"""Neither gives its lines a time."""
FPING: Final = StampModel("fping", LineTime.RECEIVED, ReceiveClock.KERNEL, line_resolution_ns=5_000)
"""fping 5.0 and later, where it was built with SO_TIMESTAMPNS (on Linux)."""
REQUEST_RESPONSE: Final = StampModel("request and response", LineTime.SENT, ReceiveClock.USER, line_resolution_ns=0)
"""Any tool that tells when it sent and how long the answer took, both by the user's clock."""
DIG: Final = StampModel("dig", LineTime.PRINTED, ReceiveClock.USER)
"""dig 9 over UDP. It prints the time in whole seconds, of which no use is made: order decides, and content."""
CURL: Final = StampModel("curl connect", LineTime.PRINTED, ReceiveClock.USER)
"""curl's connect time. It prints no time of day."""

MODELS: Final = {
    model.name: model for model in (PING, PING_USER, PING_INETUTILS, PING_BUSYBOX, FPING, REQUEST_RESPONSE, DIG, CURL)
}
