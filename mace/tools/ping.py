"""`mace ping`: runs ping in a container, and corrects each round trip for the time in the container's devices.

    capture on ──► ping in the container's network namespace ──► its lines ──┐
        │                                                                    ├──► pairs ──► lines, statistics
        └────────► records ──► correlator ──► crossings ─────────────────────┘

A corrected line is printed when no later record can change it: 100 to 600 ms after ping has printed the line. From the
first line on whose packets are ambiguous by then, as in a flood, all lines are printed at the end. At the end all
samples are paired again together; if a printed line differs from that result, a message says so.

Probes run beside ping (`mace.tools.host_probes`). A line has the host RTT by the probes that were known when it was
printed, `host=`, and before the first few probes its lower bound, `host≥`; the figures at the end use all probes.
"""

from __future__ import annotations

import asyncio
import fcntl
import getopt
import os
import re
import signal
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import PurePath
from typing import Final

import numpy as np

from contracts.errors import MaceError, UsageError
from contracts.results import Results
from correlator.correction import Corrections, Reason, correct, settled
from correlator.waiting import Waited
from mace.live.session import Session
from mace.shown import lines as shown_lines
from mace.tools.beside import Beside
from mace.tools.corrected import Corrected, Observed, line
from mace.tools.following import Following
from mace.tools.host_probes import payload_beside
from mace.tools.ping_output import PingOutput
from storage.capture import CaptureSink

_OPTIONS: Final = "h?4bRT:6F:N:aABc:CdDe:fHi:I:l:Lm:M:nOp:qQ:rs:S:t:UvVw:W:"
"""The options of iputils ping: `getopt` in ping/ping.c, main."""
_TIMED_BYTES: Final = 16
"""Smallest payload with a time stamp: ping's stamp has 16 bytes."""
_DESTINATION: Final = re.compile(
    r"PING \S.*?\((?P<address>[0-9A-Fa-f.:]+)\)\)?.*? (?P<payload>\d{1,6})(?:\(\d+\))? (?:data )?bytes"
)
"""First line: the last name in parentheses is the address. A link-local address has a device's name, and no probes."""
_STAMP: Final = re.compile(r"^\[\d+\.\d+\] ")
_PIPE_BYTES: Final = 1 << 20
"""Largest unprivileged pipe: some 12,000 lines. With a full pipe ping would wait for us, and measure the wait."""
_F_SETPIPE_SZ: Final = 1031
_LAST_WORDS_S: Final = 3.0
"""Time for an interrupted ping to print its summary."""
_KEPT_NS: Final = 10_000_000_000
"""Packets this much older than a line, plus the longest round trip, are not searched for the line's pair."""


def arguments(given: Sequence[str]) -> tuple[list[str], bool, bool]:
    """Return ping's arguments with -D, whether ping uses the user's clock (-U), and whether the user has given -D.

    Raises `UsageError` for options that ping does not know, and for options with which there is nothing to correct.
    """
    argv = list(given)
    if argv[:1] == ["--"]:
        argv = argv[1:]
    try:
        options, hosts = getopt.gnu_getopt(argv, _OPTIONS)
    except getopt.GetoptError as error:
        raise UsageError(f"ping: {error.msg}") from None
    told = dict(options)
    flags = told.keys()
    if not hosts:
        raise UsageError("ping: no destination")
    if "-f" in flags:
        raise UsageError("ping -f prints no line for a reply; `-i 0` is as fast and prints them")
    if "-q" in flags:
        raise UsageError("ping -q prints no line for a reply, so there is nothing to correct")
    if told.get("-s", "56").isdigit() and int(told.get("-s", "56")) < _TIMED_BYTES:
        raise UsageError(
            f"ping -s {told['-s']} measures no time, so there is nothing to correct: use at least {_TIMED_BYTES}"
        )
    if "-D" not in flags:
        argv = ["-D", *argv]
    return argv, "-U" in flags, "-D" in flags


def user_clock(command: Sequence[str]) -> bool:
    """Return whether a command line runs ping with -U, which ping's output does not show.

    The command may run ping by another program, as in `taskset -c 0 ping -U HOST`.
    """
    for at, word in enumerate(command):
        if PurePath(word).name == "ping":
            with suppress(getopt.GetoptError):
                options, _ = getopt.gnu_getopt(list(command[at + 1 :]), _OPTIONS)
                return "-U" in dict(options)
    return False


class Ping:
    """One run of ping in the namespace of `netns_fd`, which the caller closes, as `following`, which is open.

    `quiet`: nothing is printed. `stamps_shown`: printed lines keep the times that `-D` adds.
    """

    def __init__(
        self,
        argv: Sequence[str],
        netns_fd: int,
        following: Following,
        beside: Beside,
        *,
        user_clock: bool,
        stamps_shown: bool,
        quiet: bool,
    ) -> None:
        self._following = following
        self._beside = beside
        self._argv = list(argv)
        self._netns_fd = netns_fd
        self._netns = os.fstat(netns_fd).st_ino
        self._reader = PingOutput(user_clock=user_clock)
        self._stamps_shown = stamps_shown
        self._quiet = quiet
        self._observed = Observed()
        self._lines: deque[tuple[str, int | None]] = deque()
        """Lines of ping that are not printed yet, each with the row of its sample."""
        self._shown: list[Corrections] = []
        self._done = 0
        """Number of samples that are printed."""
        self._held = False
        """Whether the remaining lines wait for the end."""
        self.status = 0
        """ping's exit status."""
        self._ran_ns: tuple[int, int] | None = None
        """When ping ran, CLOCK_MONOTONIC; None before its end."""
        self._trouble: MaceError | None = None
        self._destination = ""
        """Address by ping's first line."""

    def measure(self, session: Session, tee: CaptureSink | None) -> Corrected:
        """Run ping under a capture, print its corrected lines as they are settled, and return all corrections."""
        session.observe(
            self._run, lambda results: self._take(results, session.utc_offset_ns), tee=self._beside.tee(tee)
        )
        if self._trouble is not None:
            raise self._trouble
        samples = self._reader.finish()
        if not len(samples):
            raise UsageError(f"ping ended with status {self.status} and its output has no request")
        offset_ns = session.utc_offset_ns
        ran_utc_ns = (self._ran_ns[0] + offset_ns, self._ran_ns[1] + offset_ns) if self._ran_ns else None
        found = Corrected.of(samples, self._observed, self._reader, self._netns, ran_utc_ns)
        found = replace(found, destination=self._destination)
        found = self._beside.finished(found.followed_by(self._following, self._reader.stamps, offset_ns))
        changed = self._changed(found.corrections)
        self._show(
            found.corrections[self._done :], found.waited[self._done :], found.host.added_ns if found.host else None
        )
        if changed:
            session.say(f"{changed} of the lines above differ from the final pairing, which the figures below use")
        return found

    async def _run(self) -> None:
        async with self._beside.probes.running():
            await self._run_ping()

    async def _run_ping(self) -> None:
        """Run ping and read its lines. When cancelled, interrupt ping and read its summary."""
        reading, writing = os.pipe()
        with suppress(OSError):  # over the user's limit, the pipe keeps the default of 64 KiB
            fcntl.fcntl(writing, _F_SETPIPE_SZ, _PIPE_BYTES)
        lines = asyncio.StreamReader(limit=_PIPE_BYTES)
        began_ns = time.monotonic_ns()
        try:
            transport, _ = await asyncio.get_running_loop().connect_read_pipe(
                lambda: asyncio.StreamReaderProtocol(lines), os.fdopen(reading, "rb")
            )
            process = await asyncio.create_subprocess_exec(
                "nsenter", f"--net=/proc/self/fd/{self._netns_fd}", "--", "ping", *self._argv,
                stdin=asyncio.subprocess.DEVNULL, stdout=writing, pass_fds=(self._netns_fd,), start_new_session=True,
                env={**os.environ, "LC_ALL": "C"},
            )  # fmt: skip
        finally:
            os.close(writing)
        self._following.started(process.pid)
        try:
            await self._read(lines)
            self.status = await process.wait()
        except asyncio.CancelledError:
            with suppress(TimeoutError, ProcessLookupError):
                # Not process.send_signal: it polls the process, and asyncio would then miss the exit status.
                os.kill(process.pid, signal.SIGINT)
                await asyncio.wait_for(self._read(lines), _LAST_WORDS_S)
                self.status = await asyncio.wait_for(process.wait(), _LAST_WORDS_S)
            raise
        finally:
            transport.close()
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    process.kill()
                self.status = await process.wait()
            self._ran_ns = began_ns, time.monotonic_ns()

    async def _read(self, lines: asyncio.StreamReader) -> None:
        async for raw in lines:
            text = raw.decode(errors="replace").rstrip("\n")
            try:
                row = self._reader.line(text)
            except MaceError as error:
                self._trouble = error
                return
            await self._probe(text, row)
            self._lines.append((text, row))
            self._print_lines(None)

    async def _probe(self, text: str, row: int | None) -> None:
        """Let the probes run beside ping, whose first line has the destination."""
        probes = self._beside.probes
        if row is not None:
            probes.requested([time.monotonic_ns()])
        elif begins := _DESTINATION.match(text):
            self._destination = begins["address"]
            await probes.start(begins["address"], payload_beside(int(begins["payload"])))

    def _take(self, results: Results, utc_offset_ns: int) -> None:
        observed, stamps = self._observed, self._reader.stamps
        observed.add(results)
        self._following.read()
        self._beside.probes.harvest(observed.settled_utc_ns - utc_offset_ns)
        if self._held:
            return
        pending = self._reader.samples(self._done)
        ready = settled(pending, stamps, observed.settled_utc_ns) if len(pending) else 0
        if ready:
            longest = int(pending.rtt_ns.max())
            since = int(pending.stamp_utc_ns.min()) - longest - _KEPT_NS
            found = correct(pending[:ready], observed.crossings(self._netns, since), stamps, observed.gaps_utc_ns)
            if (found.reason == Reason.AMBIGUOUS).any():
                # Pairing all samples together at the end may resolve these; here the printed ones are not included.
                self._held = True
                return
            self._shown.append(found)
            added_ns = self._beside.added_ns(pending[:ready], found, observed.summary.cost)
            self._show(found, self._following.so_far(pending[:ready], found, stamps, utc_offset_ns), added_ns)

    def _show(self, corrections: Corrections, waited: Waited, added_ns: float | None) -> None:
        """Print the lines of these samples, which follow the printed ones, and ping's other lines between them."""
        self._print_lines(corrections, waited, added_ns)
        self._done += len(corrections)

    def _print_lines(
        self, corrections: Corrections | None, waited: Waited | None = None, added_ns: float | None = None
    ) -> None:
        while self._lines:
            text, row = self._lines[0]
            at = -1 if row is None else row - self._done
            if row is not None and (corrections is None or at >= len(corrections)):
                return
            self._lines.popleft()
            if not self._quiet:
                shown = text if self._stamps_shown else _STAMP.sub("", text)
                more = (
                    f" · {line(corrections, at, waited, added_ns)}"
                    if corrections is not None and row is not None
                    else ""
                )
                shown_lines.line(shown + more, flush=True)

    def _changed(self, final: Corrections) -> int:
        shown = Corrections.concatenate(self._shown)
        same = np.ones(len(shown), np.bool_)
        for name in ("reason", "request", "response"):
            same &= getattr(shown, name) == getattr(final, name)[: len(shown)]
        return int((~same).sum())
