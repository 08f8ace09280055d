"""Lines of `mace_internal`: the state of the measurement itself.

Each stream has one row per second of its own time, and one when it ends, with the totals of the run. The process has
one row per second of this machine's time.
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
class _Reported:
    time_ns: int
    """Time of the last row."""
    latest: Totals


class Internal:
    """Makes the lines of `mace_internal` when they are due. Their series are few and do not count for the budget."""

    def __init__(self, vitals: Vitals) -> None:
        self._vitals = vitals
        self._told: dict[StreamHeader, _Reported] = {}
        self._own_second = 0

    def stream_lines(self, header: StreamHeader, totals: Totals) -> Iterator[str]:
        """Yield the lines of a stream's ledger and cost, if a second of its time has passed since the last."""
        told = self._told.setdefault(header, _Reported(-_S, totals))
        told.latest = totals
        if totals.upto_utc_ns // _S > told.time_ns // _S:
            told.time_ns = totals.upto_utc_ns
            yield from _of_stream(header, totals, told.time_ns)

    def stream_ended(self, header: StreamHeader) -> Iterator[str]:
        """Yield the last lines of a stream's ledger and cost."""
        told = self._told.pop(header, None)
        if told is not None:
            # A new time: a row with the time of the last one would replace it.
            yield from _of_stream(header, told.latest, max(told.latest.upto_utc_ns, told.time_ns + 1))

    def own_lines(self, *, last: bool) -> Iterator[str]:
        """Yield lines of the sinks' accounts, the channels and the process, once a second; none in a replay."""
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
