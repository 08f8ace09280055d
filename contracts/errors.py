"""Every error that MACE raises on purpose.

    MaceError                     one line for the user; the CLI exits 1
    ├── UsageError                wrong arguments (the CLI exits 2)
    ├── ConfigError               a TOML file or a key in it
    ├── Unavailable               a source, sink or the lab cannot run here; says why and what to do
    │   └── MissingExtra          an optional dependency is not installed
    ├── SourceError               a source failed while it was running
    ├── WireError                 bytes that are not a MACE message
    │   ├── CaptureError          a damaged or foreign capture file; the message names path and offset
    │   └── NotNowError           a message refused now that another process, or a later attempt, may accept
    │       └── AheadError        a message with times ahead of this machine's clock
    ├── Stopped                   a replay was stopped on request; it can be resumed
    ├── StoreError                the embedded store: locked, full, damaged, wrong schema
    ├── SealError                 a key cannot be used, or a seal cannot be written or read
    ├── LabError                  the test network could not be made or removed
    └── OutputError               standard output is closed or full

A message names the thing and the place, what was found and what was expected, and the remedy.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Self


class MaceError(Exception):
    """Base of all errors that are meant for the user."""


class UsageError(MaceError):
    """Arguments of a command are wrong or contradict each other."""


class ConfigError(MaceError):
    """A configuration file cannot be used; the message names the file and the key."""


class Unavailable(MaceError):
    """A part (a source, a sink, the lab) cannot run on this machine.

    `what` names the part, `why` the obstacle, `remedy` what the user can do.
    """

    def __init__(self, what: str, why: str, remedy: str = "") -> None:
        self.what, self.why, self.remedy = what, why, remedy
        super().__init__(f"{what}: {why}" + (f"; {remedy}" if remedy else ""))

    def __reduce__(self) -> tuple[type[Self], tuple[object, ...]]:
        # pickle passes exceptions between processes by their `args`, which hold only the message.
        return type(self), (self.what, self.why, self.remedy)


class MissingExtra(Unavailable):
    """An optional dependency is not installed."""

    def __init__(self, extra: str, module: str) -> None:
        self.extra, self.module = extra, module
        super().__init__(extra, f"the Python module {module} is not installed", f"pip install 'mace[{extra}]'")

    def __reduce__(self) -> tuple[type[Self], tuple[object, ...]]:
        return type(self), (self.extra, self.module)


class SourceError(MaceError):
    """A source failed while it was running."""


class WireError(MaceError):
    """Bytes are not a MACE message, or are one that this version cannot read."""


class CaptureError(WireError):
    """A damaged or foreign capture file. `offset` is the byte at which reading stopped."""

    def __init__(self, path: object, offset: int, why: str) -> None:
        self.path, self.offset, self.why = path, offset, why
        super().__init__(f"{path}: at byte {offset}: {why}")

    def __reduce__(self) -> tuple[type[Self], tuple[object, ...]]:
        return type(self), (self.path, self.offset, self.why)


class NotNowError(WireError):
    """This process refuses a message for a reason outside the message."""


class AheadError(NotNowError):
    """A message has times ahead of this machine's clock: the sender's clock or this machine's is wrong."""


class StoreError(MaceError):
    """The embedded store cannot be opened, written or read."""


class SealError(MaceError):
    """A key cannot be used for seals, or a seal cannot be written or read."""


class Stopped(MaceError):
    """A replay was stopped on request before its end; the message says how far it read."""


class LabError(MaceError):
    """The test network could not be made, used or removed."""


class OutputError(MaceError):
    """Standard output is closed or full."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `" (did you mean 'x'?)"` for the name in `known` closest to `name`, or `""` if none is close."""
    close = get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
