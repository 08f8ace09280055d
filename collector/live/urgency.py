"""Real-time scheduling of a ring's reader, only while a ring threatens to overflow.

Under a flood the senders, the kernel's work for them, and the reader share the CPUs. Beside two senders on two CPUs, a
reader that needed less than half of a CPU was observed to get a third. nice does not help, because the scheduler
weighs sessions before processes (sched(7), autogroup). The thread is therefore scheduled in real time, at the lowest
such priority, from a tick that finds a ring filling until a tick that finds all rings emptied. Without such danger the
reader is scheduled like other processes and disturbs the measured traffic no more than they do.
"""

from __future__ import annotations

import logging
import os

_LOG = logging.getLogger(__name__)


class Urgency:
    """Scheduling class of the thread that calls `felt`; other threads, and those that it starts, keep theirs.

    `begins`: fill of a ring, 0 to 1, at which real-time scheduling begins; a ring read in time stays below it.
    """

    def __init__(self, *, begins: float) -> None:
        self._begins = begins
        self._urgent = False
        # Keep the policy of a user who has chosen another one (chrt).
        self._allowed = os.sched_getscheduler(0) == os.SCHED_OTHER

    def felt(self, filled: float) -> None:
        """Begin or end real-time scheduling. `filled`: unread share of the fullest ring, 0 to 1."""
        if self._urgent:
            if filled < self._begins / 2:
                self.end()
        elif filled >= self._begins and self._allowed:
            try:
                # SCHED_RESET_ON_FORK: threads and processes started from here do not inherit the priority.
                os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
                self._urgent = True
            except OSError as error:
                self._allowed = False
                _LOG.info("a ring fills, and this process may not be scheduled in real time: %s", error)

    def end(self) -> None:
        """End real-time scheduling."""
        if self._urgent:
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
            self._urgent = False
