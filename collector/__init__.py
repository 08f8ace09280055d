"""Kernel, file or network -> batches of records. Imports only what the stages share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from collector.bpf import source as bpf_source
from collector.ftrace import source as ftrace_source
from collector.kmod import source as kmod_source
from collector.live.ring_source import Follower
from contracts.config import CaptureConfig
from contracts.interfaces import Source, Status


@dataclass(frozen=True, slots=True)
class LiveSource:
    """How to ask for a source of this machine's records, and how to get it."""

    check: Callable[[], Status]
    make: Callable[[CaptureConfig, Follower, str], Source]
    """From the configuration, the devices, and a name for the host (empty: the machine's own).

    Raises `Unavailable` where the configuration asks for what this source cannot do.
    """


SOURCES: Final[dict[str, LiveSource]] = {
    "kmod": LiveSource(kmod_source.KmodSource.check, kmod_source.configured),
    "bpf": LiveSource(bpf_source.BpfSource.check, bpf_source.configured),
    "ftrace": LiveSource(ftrace_source.FtraceSource.check, ftrace_source.configured),
}
"""Live sources by name, the best first: `auto` takes the first that can run."""
