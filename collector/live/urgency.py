"""Whoever empties a ring goes first once the ring threatens to overflow, and only then.

Under a flood a CPU's time is shared by the senders, the kernel's own work for them, and us. Beside two senders on two
CPUs a reader that needed less than half of one was seen to get a third; nice does not change that, as the scheduler
weighs sessions before processes (sched(7), autogroup). So the thread is scheduled in real time, at the lowest
such priority, from a tick that found a ring filling to one that found all of them emptied again. As long as
nothing is in danger the reader takes its turn like others, and disturbs what is measured no more than they do.
"""

from __future__ import annotations

import logging
import os

_log = logging.getLogger(__name__)


class Urgency:
    """Of the thread that calls `felt`. Others, and those it starts, are left as they are.

    `begins`: the part of a ring, 0 to 1, that fills no ring in time that is read in its turn.
    """

    def __init__(self, *, begins: float) -> None:
        self._begins = begins
        self._urgent = False
        # Whoever scheduled us otherwise (chrt) had reasons.
        self._allowed = os.sched_getscheduler(0) == os.SCHED_OTHER

    def felt(self, filled: float) -> None:
        """Go first, or no longer. `filled`: of the fullest ring the part that waited to be read, 0 to 1."""
        if self._urgent:
            if filled < self._begins / 2:
                self.end()
        elif filled >= self._begins and self._allowed:
            try:
                # On fork: threads and processes that we start are not to go first, too.
                os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
                self._urgent = True
            except OSError as error:
                self._allowed = False
                _log.info("a ring fills, and this process may not be scheduled in real time: %s", error)

    def end(self) -> None:
        """Take turns like others again."""
        if self._urgent:
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
            self._urgent = False
