"""Bounded traffic between members of a lab: ping, UDP and TCP.

Every method comes twice: `udp(...)` sends, waits and returns the result; `start_udp(...)` returns a `Flow` that runs on
by itself, to be waited for or stopped. The server's process is in the other member before the client's is started.
All processes end with a time limit of their own, and at once when this process ends in any way.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from contracts.errors import LabError, UsageError
from mace.lab.plan import REMOTE, Family

_GENERATOR: Final = Path(__file__).with_name("generator.py")
MAX_COUNT: Final = 1_000_000_000
MAX_LIMIT_S: Final = 24 * 3600.0
_SLOWEST_PPS: Final = 5_000
"""What even a busy machine sends, for the time limit of a run."""
_MARGIN_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class PingResult:
    """What ping said."""

    sent: int
    received: int
    duration_s: float
    rtts_ns: tuple[int, ...] = field(repr=False)
    """As ping prints them, in steps of 1 us; empty for a flood, of which ping prints only the summary."""
    mean_rtt_ns: float
    """NaN if nothing was received."""


@dataclass(frozen=True, slots=True)
class UdpResult:
    """What both ends counted."""

    sent: int
    """Datagrams that the sender's socket took."""
    received: int
    """Datagrams that arrived at the other member; with `echo`, that came back."""
    errors: int
    """Refusals that the sender was told of by ICMP, and failed sends."""
    duration_s: float
    rtts_ns: tuple[int, ...] = field(repr=False)
    """With `echo`: one of each reply, of the first million."""


@dataclass(frozen=True, slots=True)
class TcpResult:
    """What both ends counted."""

    sent: int
    """Bytes; for request/response: requests."""
    received: int
    """Bytes; for request/response: responses."""
    duration_s: float
    """From connect until the peer has read all."""
    rtts_ns: tuple[int, ...] = field(repr=False)
    """Request/response: one of each response, of the first million. Else empty."""


R = TypeVar("R")
ChildProcess = subprocess.Popen[str]


def _heeds(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal (proc(5), SigCgt); False too if it is no more."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return False
    caught = next((line for line in status.splitlines() if line.startswith("SigCgt:")), "SigCgt: 0")
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


class Flow(Generic[R]):
    """Traffic that is running. `wait` or `stop` it once; leaving its `with` block stops it."""

    def __init__(
        self,
        what: str,
        client: ChildProcess,
        server: ChildProcess | None,
        limit_s: float,
        result: Callable[[str, dict[str, Any] | None], R],
    ) -> None:
        self._what, self._client, self._server = what, client, server
        self._deadline = time.monotonic() + limit_s + 5.0
        self._result = result
        self._said: list[str] = []
        # Read from the start: a client that prints each reply would otherwise block on a full pipe.
        self._reader = threading.Thread(target=self._read, name="flow", daemon=True)
        self._reader.start()

    @property
    def running(self) -> bool:
        return self._client.poll() is None

    @property
    def pid(self) -> int:
        """Process that sends."""
        return self._client.pid

    def wait(self, timeout_s: float | None = None) -> R:
        """Wait for the end, return the result. Raises `LabError` on failure, `TimeoutError` if it is still running."""
        allowed = max(0.0, self._deadline - time.monotonic())
        try:
            self._client.wait(allowed if timeout_s is None else min(allowed, timeout_s))
        except subprocess.TimeoutExpired:
            if timeout_s is not None and timeout_s < allowed:
                raise TimeoutError(f"{self._what}: still running after {timeout_s} s") from None
            self.close()
            raise LabError(f"{self._what}: did not end within its time limit") from None
        try:
            self._reader.join(5.0)
            text = "".join(self._said)
            if self._client.returncode not in (0, 1):  # ping: 1 is "fewer replies than requests"
                error = self._client.stderr.read() if self._client.stderr else ""
                raise LabError(f"{self._what}: {(error or text).strip() or f'exit {self._client.returncode}'}")
            return self._result(text, self._finish_server(text))
        finally:
            self.close()

    def stop(self) -> R:
        """End it now and return the result up to here."""
        # ping takes SIGINT as the wish for its summary; our own generators ignore it and know SIGTERM.
        wish = signal.SIGTERM if self._server else signal.SIGINT
        while self.running and not _heeds(self._client.pid, wish) and time.monotonic() < self._deadline:
            time.sleep(0.01)  # it has just been started: the signal would be its death
        if self.running:
            self._client.send_signal(wish)
        return self.wait()

    def close(self) -> None:
        """End it now, whatever the result."""
        for process in (self._client, self._server):
            if process is None:
                continue
            if process.poll() is None:
                process.kill()
                process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    with suppress(BrokenPipeError):  # an order left in the buffer, for one that has ended
                        pipe.close()

    def __enter__(self) -> Flow[R]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> None:
        assert self._client.stdout is not None
        try:
            for line in self._client.stdout:
                self._said.append(line)
        except ValueError:  # closed under us
            pass

    def _finish_server(self, text: str) -> dict[str, Any] | None:
        if self._server is None:
            return None
        answer = _parse(self._what, text)
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        if "error" in answer:
            raise LabError(f"{self._what}: {answer['error']}")
        try:
            self._server.stdin.write(f"finish {answer['sent']}\n")
            self._server.stdin.flush()
        except BrokenPipeError:  # it has counted enough already
            pass
        return _parse(self._what, self._server.stdout.readline())


class Traffic(ABC):
    """The traffic methods of a lab. `sender` and `to` are names of members; the sender is `c1` unless told."""

    @abstractmethod
    def popen(self, member: str, argv: list[str], **options: Any) -> ChildProcess:
        """Start a process in a member's network namespace, in a session of its own, with text pipes."""

    @abstractmethod
    def address(self, member: str, family: Family = 4) -> str:
        """A member's address. Raises `UsageError` for one that does not exist."""

    def ping(
        self,
        sender: str = "c1",
        to: str = REMOTE,
        *,
        count: int = 10,
        interval_s: float = 0.01,
        size: int = 56,
        family: Family = 4,
        flood: bool = False,
    ) -> PingResult:
        """`count` echo requests with `size` bytes of payload. `flood`: the next as soon as the reply is there."""
        return self.start_ping(
            sender, to, count=count, interval_s=interval_s, size=size, family=family, flood=flood
        ).wait()

    def start_ping(
        self,
        sender: str = "c1",
        to: str = REMOTE,
        *,
        count: int = 10,
        interval_s: float = 0.01,
        size: int = 56,
        family: Family = 4,
        flood: bool = False,
    ) -> Flow[PingResult]:
        _check("ping", count=count, size=size, largest=65_400)
        # A lost reply of a flood costs 10 ms.
        limit_s = min(MAX_LIMIT_S, count * (0.02 if flood else interval_s + 0.02) + _MARGIN_S)
        argv = ["ping", f"-{family}", "-n", "-c", str(count), "-s", str(size), "-W", "1", "-w", f"{limit_s:.0f}"]
        argv += ["-f", "-q"] if flood else ["-i", f"{interval_s:.6f}"]
        client = self.popen(sender, [*argv, self._target(to, family)])
        return Flow(f"ping {sender} to {to}", client, None, limit_s, _ping_result)

    def udp(
        self,
        sender: str = "c1",
        to: str = REMOTE,
        *,
        count: int = 1000,
        size: int = 64,
        rate_pps: float = 0.0,
        duration_s: float = 0.0,
        family: Family = 4,
        echo: bool = False,
    ) -> UdpResult:
        """Exactly `count` datagrams with `size` bytes of payload, or fewer if `duration_s` (0: no end) is over first.

        At `rate_pps`; 0: as fast as it goes. `echo`: the other side sends each back, and the next one waits for it (at
        most a second).
        """
        return self.start_udp(
            sender, to, count=count, size=size, rate_pps=rate_pps, duration_s=duration_s, family=family, echo=echo
        ).wait()

    def start_udp(
        self,
        sender: str = "c1",
        to: str = REMOTE,
        *,
        count: int = 1000,
        size: int = 64,
        rate_pps: float = 0.0,
        duration_s: float = 0.0,
        family: Family = 4,
        echo: bool = False,
    ) -> Flow[UdpResult]:
        _check("udp", count=count, size=size, largest=65_000)
        limit_s = _limit_s(count, rate_pps, duration_s)

        def result(text: str, server: dict[str, Any] | None) -> UdpResult:
            client = _parse("udp", text)
            assert server is not None
            return UdpResult(
                sent=client["sent"],
                received=client["received"] if echo else server["received"],
                errors=client["errors"],
                duration_s=client["duration_ns"] / 1e9,
                rtts_ns=tuple(client["rtts_ns"]),
            )

        return self._start(
            "udp",
            sender,
            to,
            family,
            limit_s,
            server={"echo": int(echo)},
            client={
                "count": count,
                "size": size,
                "interval_ns": _interval_ns(rate_pps),
                "duration_ns": int(duration_s * 1e9),
                "echo": int(echo),
            },
            result=result,
        )

    def tcp(
        self,
        sender: str = "c1",
        to: str = REMOTE,
        *,
        size: int = 10_000_000,
        reverse: bool = False,
        family: Family = 4,
    ) -> TcpResult:
        """`size` bytes over one connection that `sender` opens; `reverse`: from `to` back to it."""
        return self.start_tcp(sender, to, size=size, reverse=reverse, family=family).wait()

    def start_tcp(
        self,
        sender: str = "c1",
        to: str = REMOTE,
        *,
        size: int = 10_000_000,
        reverse: bool = False,
        family: Family = 4,
    ) -> Flow[TcpResult]:
        _check("tcp", count=1, size=size, largest=1 << 50)

        def result(text: str, server: dict[str, Any] | None) -> TcpResult:
            client = _parse("tcp", text)
            assert server is not None
            there, back = client["bytes"], server["bytes"]
            sent, received = (back, there) if reverse else (there, back)
            return TcpResult(sent, received, client["duration_ns"] / 1e9, ())

        mode = "source" if reverse else "sink"
        limit_s = min(MAX_LIMIT_S, size / 10e6 + _MARGIN_S)
        client = {"count": 0, "size": size, "interval_ns": 0, "duration_ns": 0, "mode": mode}
        server = {"count": 0, "size": size, "mode": mode}
        return self._start("tcp", sender, to, family, limit_s, server=server, client=client, result=result)

    def tcp_requests(
        self,
        sender: str = "c1",
        to: str = REMOTE,
        *,
        count: int = 100,
        size: int = 64,
        rate_pps: float = 0.0,
        duration_s: float = 0.0,
        family: Family = 4,
    ) -> TcpResult:
        """`count` requests of `size` bytes over one connection, each answered with as many bytes before the next."""
        return self.start_tcp_requests(
            sender, to, count=count, size=size, rate_pps=rate_pps, duration_s=duration_s, family=family
        ).wait()

    def start_tcp_requests(
        self,
        sender: str = "c1",
        to: str = REMOTE,
        *,
        count: int = 100,
        size: int = 64,
        rate_pps: float = 0.0,
        duration_s: float = 0.0,
        family: Family = 4,
    ) -> Flow[TcpResult]:
        _check("tcp", count=count, size=max(size, 1), largest=1 << 20)

        def result(text: str, _server: dict[str, Any] | None) -> TcpResult:
            client = _parse("tcp", text)
            return TcpResult(client["sent"], client["received"], client["duration_ns"] / 1e9, tuple(client["rtts_ns"]))

        limit_s = _limit_s(count, rate_pps, duration_s)
        client = {
            "count": count,
            "size": max(size, 1),
            "interval_ns": _interval_ns(rate_pps),
            "duration_ns": int(duration_s * 1e9),
            "mode": "echo",
        }
        server = {"count": count, "size": max(size, 1), "mode": "echo"}
        return self._start("tcp", sender, to, family, limit_s, server=server, client=client, result=result)

    def _start(
        self,
        kind: str,
        sender: str,
        to: str,
        family: Family,
        limit_s: float,
        *,
        server: dict[str, Any],
        client: dict[str, Any],
        result: Callable[[str, dict[str, Any] | None], R],
    ) -> Flow[R]:
        what = f"{kind} {sender} to {to}"
        host = self._target(to, family)
        listening = self.popen(to, _command(f"{kind}-server", limit_s, family=family, **server))
        try:
            assert listening.stdout is not None
            port = _parse(what, listening.stdout.readline())["port"]
            argv = _command(f"{kind}-client", limit_s, family=family, host=host, port=port, **client)
            sending = self.popen(sender, argv)
        except BaseException:
            listening.kill()
            listening.communicate()
            raise
        return Flow(what, sending, listening, limit_s, result)

    def _target(self, to: str, family: Family) -> str:
        address = self.address(to, family)
        assert ip_address(address).version == family
        return address


def _command(role: str, limit_s: float, **settings: object) -> list[str]:
    words = [f"{key}={value}" for key, value in {"limit_s": limit_s, **settings}.items()]
    return [sys.executable, "-I", "-S", str(_GENERATOR), role, *words]


def _check(what: str, *, count: int, size: int, largest: int) -> None:
    if not 1 <= count <= MAX_COUNT:
        raise UsageError(f"{what}: count {count}, expected 1 to {MAX_COUNT}")
    if not 0 <= size <= largest:
        raise UsageError(f"{what}: size {size}, expected 0 to {largest} bytes")


def _limit_s(count: int, rate_pps: float, duration_s: float) -> float:
    if rate_pps < 0 or duration_s < 0:
        raise UsageError("rate and duration cannot be negative")
    expected_s = count / min(rate_pps or _SLOWEST_PPS, _SLOWEST_PPS)
    return min(MAX_LIMIT_S, (min(duration_s, expected_s) if duration_s else expected_s) + _MARGIN_S)


def _interval_ns(rate_pps: float) -> int:
    return round(1e9 / rate_pps) if rate_pps else 0


def _parse(what: str, text: str) -> dict[str, Any]:
    try:
        answer = json.loads(text)
    except ValueError:
        raise LabError(f"{what}: expected a result, found {text[-200:]!r}") from None
    if not isinstance(answer, dict):
        raise LabError(f"{what}: expected a result, found {text[-200:]!r}")
    return answer


_PING_REPLY: Final = re.compile(r" time[=<]([0-9.]+) ms")
_PING_COUNTS: Final = re.compile(r"(\d+) packets transmitted, (\d+) received.*time (\d+)ms")
_PING_SUMMARY: Final = re.compile(r"= [0-9.]+/([0-9.]+)/[0-9.]+/[0-9.]+ ms")


def _ping_result(text: str, _server: dict[str, Any] | None) -> PingResult:
    counts = _PING_COUNTS.search(text)
    if counts is None:
        raise LabError(f"ping: expected a summary, found {text[-200:]!r}")
    rtts = tuple(round(float(ms) * 1e6) for ms in _PING_REPLY.findall(text))
    mean = _PING_SUMMARY.search(text)
    return PingResult(
        sent=int(counts[1]),
        received=int(counts[2]),
        duration_s=int(counts[3]) / 1e3,
        rtts_ns=rtts,
        mean_rtt_ns=sum(rtts) / len(rtts) if rtts else float(mean[1]) * 1e6 if mean else float("nan"),
    )
