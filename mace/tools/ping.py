"""`mace ping`: ping in a container, each line also without the time that it spent in the container's devices.

    capture on ──► ping in the container's network namespace ──► its lines ──┐
        │                                                                    ├──► pairs ──► lines, statistics
        └────────► records ──► correlator ──► crossings ─────────────────────┘

A line comes out when nothing that could still come would change it: some 200 ms after ping has printed it. From the
first on that cannot be told apart so early, as in a flood, they come at the end. Then everything is paired once more,
all at once; should a line that was shown come out otherwise, this is said.
"""

from __future__ import annotations

import asyncio
import fcntl
import getopt
import os
import re
import signal
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import numpy as np

from contracts.errors import MaceError, UsageError
from contracts.results import Results
from correlator.correction import Corrections, Reason, correct, settled
from mace.live.session import Session
from mace.shown import lines as shown_lines
from mace.tools.corrected import Corrected, Observed, line
from mace.tools.host_probes import Probing
from mace.tools.ping_output import PingOutput
from storage.capture import CaptureSink

_OPTIONS: Final = "h?4bRT:6F:N:aABc:CdDe:fHi:I:l:Lm:M:nOp:qQ:rs:S:t:UvVw:W:"
"""Of iputils ping: `getopt` in ping/ping.c, main."""
_TIMED_BYTES: Final = 16
"""Of payload: as many hold ping's stamp."""
_STAMP: Final = re.compile(r"^\[\d+\.\d+\] ")
_PIPE_BYTES: Final = 1 << 20
"""As much as an unprivileged pipe may hold: some 12,000 lines. A ping that waits for its reader would measure that."""
_F_SETPIPE_SZ: Final = 1031
_LAST_WORDS_S: Final = 3.0
"""ping has this long to print its summary when it is interrupted."""
_KEPT_NS: Final = 10_000_000_000
"""Older packets (and older than the longest round trip) are no longer looked at for a line that is shown at once."""


def probing(count: int, argv: Sequence[str], netns_fd: int, host_netns: str) -> Probing:
    """What `--host-path` asks for: `count` probes to ping's destination, at ping's pace. Raises `UsageError`."""
    options, hosts = getopt.gnu_getopt(list(argv), _OPTIONS)
    told = dict(options)
    if "-A" in told or "-l" in told:
        raise UsageError("--host-path: ping -A and -l have no pace of their own; -i gives one")
    try:
        interval_s = float(told.get("-i", "1").replace(",", "."))
    except ValueError:
        raise UsageError(f"ping: -i {told['-i']}: no number of seconds") from None
    return Probing(hosts[-1], count, interval_s, netns_fd, host_netns)


def arguments(given: Sequence[str]) -> tuple[list[str], bool, bool]:
    """ping's arguments as it gets them, whether it uses the user's clock (-U), and whether the user asked for -D.

    Raises `UsageError` for what ping does not know, and for what leaves nothing to correct.
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
            f"ping -s {told['-s']} measures no time, so there is nothing to correct: {_TIMED_BYTES} at least"
        )
    if "-D" not in flags:
        argv = ["-D", *argv]
    return argv, "-U" in flags, "-D" in flags


class Ping:
    """One run of ping in the namespace of `netns_fd`, which stays the caller's to close.

    `quiet`: nothing is printed. `stamps_shown`: lines keep the times that `-D` gives them.
    """

    def __init__(
        self, argv: Sequence[str], netns_fd: int, *, user_clock: bool, stamps_shown: bool, quiet: bool
    ) -> None:
        self._argv = list(argv)
        self._netns_fd = netns_fd
        self._netns = os.fstat(netns_fd).st_ino
        self._reader = PingOutput(user_clock=user_clock)
        self._stamps_shown = stamps_shown
        self._quiet = quiet
        self._observed = Observed()
        self._lines: deque[tuple[str, int | None]] = deque()
        """Not shown yet: what ping printed, and the sample that it is."""
        self._shown: list[Corrections] = []
        self._done = 0
        """Samples that have been shown."""
        self._held = False
        """No more lines before the end."""
        self.status = 0
        """ping's exit status."""
        self._trouble: MaceError | None = None

    def measure(self, session: Session, tee: CaptureSink | None) -> Corrected:
        """Capture, run ping, pair; lines are printed as they are settled."""
        session.observe(self._run, self._take, tee=tee)
        if self._trouble is not None:
            raise self._trouble
        samples = self._reader.finish()
        if not len(samples):
            raise UsageError(f"ping ended with status {self.status} and told of no request")
        found = Corrected.of(samples, self._observed, self._reader, self._netns)
        changed = self._changed(found.corrections)
        self._show(found.corrections[self._done :])
        if changed:
            session.say(f"{changed} of the lines above would come out otherwise now; the figures are the last word")
        return found

    async def _run(self) -> None:
        """ping, from its first to its last line. Interrupted, it gets to say its summary."""
        reading, writing = os.pipe()
        with suppress(OSError):  # a limit of the user's; then it is the usual 64 KiB
            fcntl.fcntl(writing, _F_SETPIPE_SZ, _PIPE_BYTES)
        lines = asyncio.StreamReader(limit=_PIPE_BYTES)
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
        try:
            await self._read(lines)
            self.status = await process.wait()
        except asyncio.CancelledError:
            with suppress(TimeoutError, ProcessLookupError):
                # Not process.send_signal, which looks whether it has ended, so that asyncio does not hear how.
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

    async def _read(self, lines: asyncio.StreamReader) -> None:
        async for raw in lines:
            text = raw.decode(errors="replace").rstrip("\n")
            try:
                row = self._reader.line(text)
            except MaceError as error:
                self._trouble = error
                return
            self._lines.append((text, row))
            self._print_lines(None)

    def _take(self, results: Results) -> None:
        observed, stamps = self._observed, self._reader.stamps
        observed.add(results)
        if self._held:
            return
        pending = self._reader.samples(self._done)
        ready = settled(pending, stamps, observed.settled_utc_ns) if len(pending) else 0
        if ready:
            longest = int(pending.rtt_ns.max())
            since = int(pending.stamp_utc_ns.min()) - longest - _KEPT_NS
            found = correct(pending[:ready], observed.crossings(self._netns, since), stamps, observed.gaps_utc_ns)
            if (found.reason == Reason.AMBIGUOUS).any():
                # With the others around them they may be told apart, but those that were shown are not among them.
                self._held = True
                return
            self._shown.append(found)
            self._show(found)

    def _show(self, corrections: Corrections) -> None:
        """Print the lines of these samples, which follow those shown before, and what ping printed between them."""
        self._print_lines(corrections)
        self._done += len(corrections)

    def _print_lines(self, corrections: Corrections | None) -> None:
        while self._lines:
            text, row = self._lines[0]
            at = -1 if row is None else row - self._done
            if row is not None and (corrections is None or at >= len(corrections)):
                return
            self._lines.popleft()
            if not self._quiet:
                shown = text if self._stamps_shown else _STAMP.sub("", text)
                more = f" · {line(corrections, at)}" if corrections is not None and row is not None else ""
                shown_lines.line(shown + more, flush=True)

    def _changed(self, final: Corrections) -> int:
        shown = Corrections.concatenate(self._shown)
        same = np.ones(len(shown), np.bool_)
        for name in ("reason", "request", "response"):
            same &= getattr(shown, name) == getattr(final, name)[: len(shown)]
        return int((~same).sum())
