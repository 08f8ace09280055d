"""Every error that MACE raises on purpose.

    MaceError                     one line for the user; the CLI exits 1
    ├── UsageError                wrong arguments (the CLI exits 2)
    ├── ConfigError               a TOML file or a key in it
    ├── Unavailable               a source, sink or the lab cannot run here; says why and what to do
    │   └── MissingExtra          an optional dependency is not installed
    ├── SourceError               a source that was running can go on no longer
    ├── WireError                 bytes that are not a MACE message
    │   ├── CaptureError          the same, in a file: path and offset are part of the message
    │   └── NotNowError           a message that may be taken at another time, or by another process
    │       └── AheadError        a message with times that are ahead of this machine's clock
    ├── Stopped                   a replay was asked to stop; it can be gone on with
    ├── StoreError                the embedded store: locked, full, damaged, wrong schema
    ├── LabError                  the test network could not be made or removed
    └── OutputError               standard output is closed or full

A message says what, where, what was found and what was expected, and what to do about it.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Self


class MaceError(Exception):
    """Base of all errors that are meant for the user."""


class UsageError(MaceError):
    """Arguments that make no sense together."""


class ConfigError(MaceError):
    """A configuration file that cannot be used; names the file and the key."""


class Unavailable(MaceError):
    """A part that cannot run on this machine."""

    def __init__(self, what: str, why: str, remedy: str = "") -> None:
        self.what, self.why, self.remedy = what, why, remedy
        super().__init__(f"{what}: {why}" + (f"; {remedy}" if remedy else ""))

    def __reduce__(self) -> tuple[type[Self], tuple[object, ...]]:
        # Exceptions travel between processes by their arguments, which here are not the message.
        return type(self), (self.what, self.why, self.remedy)


class MissingExtra(Unavailable):
    """An optional dependency is not installed."""

    def __init__(self, extra: str, module: str) -> None:
        self.extra, self.module = extra, module
        super().__init__(extra, f"the Python module {module} is not installed", f"pip install 'mace[{extra}]'")

    def __reduce__(self) -> tuple[type[Self], tuple[object, ...]]:
        return type(self), (self.extra, self.module)


class SourceError(MaceError):
    """A source that was running can go on no longer."""


class WireError(MaceError):
    """Bytes that are not a MACE message, or not one this version reads."""


class CaptureError(WireError):
    """A damaged or foreign capture file. `offset` is the byte at which reading stopped."""

    def __init__(self, path: object, offset: int, why: str) -> None:
        self.path, self.offset, self.why = path, offset, why
        super().__init__(f"{path}: at byte {offset}: {why}")

    def __reduce__(self) -> tuple[type[Self], tuple[object, ...]]:
        return type(self), (self.path, self.offset, self.why)


class NotNowError(WireError):
    """A message that this process refuses for a reason that is not in the message."""


class AheadError(NotNowError):
    """A message with times that are ahead of this machine's clock: one of two clocks is wrong."""


class StoreError(MaceError):
    """The embedded store cannot be opened, written or read."""


class Stopped(MaceError):
    """A replay was asked to stop before its end; says how far it came."""


class LabError(MaceError):
    """The test network could not be made, used or removed."""


class OutputError(MaceError):
    """Standard output is closed or full."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the closest of `known`, or an empty string."""
    close = get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
