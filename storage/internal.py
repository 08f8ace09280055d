"""`mace_internal`: how the measurement itself is doing, as lines. Of streams by their own time, of the process by ours.

A row a second each, and one more when a stream ends: the last says what the whole run came to.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from contracts.hooks import BY_HOOK
from contracts.interfaces import StreamHeader
from contracts.results import Totals
from contracts.vitals import Vitals, process_figures
from storage.lines import key, line

_S: Final = 1_000_000_000


@dataclass(slots=True)
class _Told:
    time_ns: int
    """Of the last row."""
    latest: Totals


class Internal:
    """What there is to say, when it is time to say it. Its series are few and known, and outside any budget."""

    def __init__(self, vitals: Vitals) -> None:
        self._vitals = vitals
        self._told: dict[StreamHeader, _Told] = {}
        self._own_second = 0

    def stream_lines(self, header: StreamHeader, totals: Totals) -> Iterator[str]:
        """Ledger and cost of a stream, when a second of its time has passed."""
        told = self._told.setdefault(header, _Told(-_S, totals))
        told.latest = totals
        if totals.upto_utc_ns // _S > told.time_ns // _S:
            told.time_ns = totals.upto_utc_ns
            yield from _of_stream(header, totals, told.time_ns)

    def stream_ended(self, header: StreamHeader) -> Iterator[str]:
        """The same once more, final."""
        told = self._told.pop(header, None)
        if told is not None:
            # Not the time of a row that there is: it would replace that one.
            yield from _of_stream(header, told.latest, max(told.latest.upto_utc_ns, told.time_ns + 1))

    def own_lines(self, *, last: bool) -> Iterator[str]:
        """Accounts of the sinks, channels and process, once a second; nothing of a replay."""
        now_ns = time.time_ns()
        if not self._vitals.live or (now_ns // _S == self._own_second and not last):
            return
        self._own_second = now_ns // _S
        host = platform.node()
        yield _own(host, {"part": "process"}, process_figures(), now_ns)
        for name, peak in self._vitals.queues.items():
            yield _own(host, {"part": "queue", "queue": name}, {"queue_peak": peak}, now_ns)
        for name, account in self._vitals.accounts.items():
            yield _own(host, {"part": "sink", "sink": name}, account.as_dict(), now_ns)


def _own(host: str, tags: dict[str, str], fields: dict[str, int], now_ns: int) -> str:
    return line(key("mace_internal", {"host": host} | tags), dict(fields), now_ns)


def _of_stream(header: StreamHeader, totals: Totals, time_ns: int) -> Iterator[str]:
    common = {"host": header.host, "source": header.source}
    grades = {n if n == "told_apart" else f"packets_{n}": v for n, v in totals.grades.as_dict().items()}
    causes = {f"packets_{cause}": count for cause, count in totals.ambiguous_by_cause().items()}
    ledger = totals.ledger.as_dict() | {"packets": totals.packets} | grades | causes
    yield line(key("mace_internal", common | {"part": "ledger"}), dict(ledger), time_ns)
    for cost in totals.cost:
        fields = {"calls": cost.calls, "timed": cost.timed, "timed_ns": cost.timed_ns}
        series = key("mace_internal", common | {"part": "cost", "hook": BY_HOOK[cost.hook].name})
        yield line(series, dict(fields), time_ns)
