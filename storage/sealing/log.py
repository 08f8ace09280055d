"""The seal's file: one signed statement a line, each with the hash of the line before it.

    SIGNATURE STATEMENT LF

STATEMENT is a JSON object in UTF-8, SIGNATURE the Ed25519 signature of exactly its bytes, in base64. Every statement
has

    mace-seal   format, 1
    n           its number, from 0
    prev        SHA-256 of the whole line before it, without LF, in hexadecimal; "" in the first
    kind        what it states; the first is `begin`, or in a store `state`
    utc_ns      CLOCK_REALTIME when it was signed

and the fields of its kind (`storage.sealing.capture`, `storage.sealing.segments`). A killed writer leaves an incomplete
last line, which says nothing. docs/seal.md shows how to verify a line with openssl alone.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from contracts.errors import SealError
from contracts.names import printable
from storage.ownership import NO_LINK
from storage.sealing.keys import PublicKey, SealKey

FORMAT: Final = 1
_SIGNATURE_CHARACTERS: Final = 88
"""Base64 of 64 bytes."""
_MOST_LINE: Final = 64 << 20
"""Longest line that is read. A `state` of 100,000 segments has 16 MiB."""
_MOST_FAULTS: Final = 1000
"""Faults of a log that are kept one by one; a hostile file has millions."""


@dataclass(frozen=True, slots=True)
class Statement:
    """A statement whose signature and place in the chain are verified."""

    number: int
    kind: str
    utc_ns: int
    fields: dict[str, Any]
    head: str
    """SHA-256 of its line, in hexadecimal: vouches for all statements up to this one."""

    def text(self, name: str) -> str:
        """Return a field that is a string. Raises `SealError` for another."""
        value: str = self._field(name, str)
        return value

    def whole(self, name: str) -> int:
        """Return a field that is an integer of 63 bits. Raises `SealError` for another."""
        value: int = self._field(name, int)
        if not 0 <= value < 1 << 63:
            raise SealError(f"statement {self.number}: {name} is {value}")
        return value

    def many(self, name: str) -> list[Any]:
        """Return a field that is a list; empty if it is missing. Raises `SealError` for another."""
        found: list[Any] = self._field(name, list) if name in self.fields else []
        return found

    def _field(self, name: str, kind: type) -> Any:
        value = self.fields.get(name)
        if type(value) is not kind:
            raise SealError(f"statement {self.number} ({self.kind}): {name} is {value!r:.40}, not a {kind.__name__}")
        return value


@dataclass(slots=True)
class SealLog:
    """A log as it was read; `statements` yields what its key has signed."""

    path: Path
    key: PublicKey
    """The key that the log names itself. Whether it is the operator's, only the operator's own copy can say."""
    faults: list[str] = field(default_factory=list)
    """What is wrong with the log's own lines; complete when all statements were read."""
    head: str = ""
    """Hash of the last verified line."""
    number: int = -1
    """Number of the last verified statement."""
    whole_bytes: int = 0
    """Size of the file without an incomplete last line."""
    cut_bytes: int = 0
    """Size of an incomplete last line."""

    def fault(self, told: str) -> None:
        """Note a fault."""
        if len(self.faults) < _MOST_FAULTS:
            self.faults.append(told)

    def statements(self) -> Iterator[Statement]:
        """Yield the statements whose signature is the key's, in the file's order. Raises `SealError` for others.

        A line that the key has not signed is a fault, and left out; so is a missing one, which the next line shows.
        """
        for at, line in enumerate(_lines(self.path)):
            if not line.endswith(b"\n"):
                self.cut_bytes = len(line)
                return
            self.whole_bytes += len(line)
            found = self._verified(at + 1, line[:-1])
            if found is None:
                continue
            prev = found.fields.get("prev")
            if self.number < 0:
                if found.kind == "begin" and (found.number or prev != ""):
                    self.fault(f"line {at + 1}: a first statement with the number {found.number}")
                elif found.kind not in ("begin", "state"):
                    self.fault(f"line {at + 1}: statement {found.number} is the first: those before it are missing")
            elif found.number <= self.number:
                self.fault(
                    f"line {at + 1}: statement {found.number} after statement {self.number}: repeated or out of order"
                )
                continue
            elif found.number > self.number + 1:
                gap = range(self.number + 1, found.number)
                self.fault(f"line {at + 1}: {numbers('statement', gap)} before statement {found.number} missing")
            elif prev != self.head:
                self.fault(f"line {at + 1}: statement {found.number} follows another line than the one before it")
            self.number, self.head = found.number, found.head
            yield found

    def _verified(self, at: int, line: bytes) -> Statement | None:
        signature, _, told = line.partition(b" ")
        try:
            raw = base64.b64decode(signature, validate=True) if len(signature) == _SIGNATURE_CHARACTERS else b""
        except binascii.Error:
            raw = b""
        if not self.key.verifies(raw, told):
            self.fault(f"line {at}: not signed by the seal's key: edited, or of another seal")
            return None
        try:
            fields = json.loads(told)
            number, kind, utc_ns = fields["n"], fields["kind"], fields["utc_ns"]
            if fields["mace-seal"] != FORMAT or type(number) is not int or type(kind) is not str:
                raise ValueError(f"format {fields['mace-seal']!r:.20}")
            if type(utc_ns) is not int:
                raise ValueError("no time")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise SealError(
                f"{self.path}: line {at}: signed, but no statement of format {FORMAT}: {error!s:.80};"
                " use the MACE that wrote it, or a newer one"
            ) from None
        return Statement(number, kind, utc_ns, fields, hashlib.sha256(line).hexdigest())


def numbers(what: str, which: range) -> str:
    """Return `frame 3` or `frames 3 to 5`."""
    return f"{what} {which[0]}" if len(which) == 1 else f"{what}s {which[0]} to {which[-1]}"


def has_statement(path: Path) -> bool:
    """Return whether a seal's file has a whole line. Raises `SealError` if it is unreadable."""
    return next(_lines(path), b"").endswith(b"\n")


def read_log(path: Path) -> SealLog:
    """Open a seal's file by the key that its first line names. Raises `SealError` if it is none, or unreadable."""
    first = next(_lines(path), b"")
    try:
        fields = json.loads(first.partition(b" ")[2])
        key = bytes.fromhex(fields["key"])
        if len(key) != 32 or "mace-seal" not in fields:
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise SealError(f"{path}: not a seal of MACE, or its first line is damaged: no key to verify it with") from None
    return SealLog(path, PublicKey(key))


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while line := file.readline(_MOST_LINE):
                if len(line) == _MOST_LINE:
                    raise SealError(f"{path}: a line of more than {_MOST_LINE} bytes: not a seal of MACE")
                yield line
    except OSError as error:
        raise SealError(f"{path}: cannot be read: {error.strerror}") from error


class SealWriter:
    """Appends statements to a seal's file; not thread-safe.

    Each statement is one write. With `sync` it is also synchronised to the disk. OSErrors pass.
    """

    def __init__(self, path: Path, key: SealKey, fd: int, *, sync: bool, number: int = -1, head: str = "") -> None:
        self.path: Final = path
        self._key, self._fd, self._sync = key, fd, sync
        self.number = number
        """Number of the last statement."""
        self.head = head
        """SHA-256 of the last line."""

    @classmethod
    def create(cls, path: Path, key: SealKey, *, overwrite: bool, sync: bool) -> SealWriter:
        """Make the file. Raises `SealError` if it exists and `overwrite` is false, or cannot be made."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | NO_LINK | (os.O_TRUNC if overwrite else os.O_EXCL)
        try:
            return cls(path, key, os.open(path, flags, 0o644), sync=sync)
        except FileExistsError:
            raise SealError(
                f"{path}: a seal exists already; choose another name, or overwrite it with --force"
            ) from None
        except OSError as error:
            raise SealError(f"{path}: cannot be created: {error.strerror}") from error

    @classmethod
    def resume(cls, log: SealLog, key: SealKey, *, sync: bool) -> SealWriter:
        """Continue a log whose statements were all read. An incomplete last line is removed. OSErrors pass.

        Raises `SealError` for a log with faults and for one of another key.
        """
        if log.key != key.public:
            raise SealError(f"{log.path}: sealed by the key {log.key.fingerprint}, yours is {key.public.fingerprint}")
        if log.faults:
            raise SealError(
                f"{printable(str(log.path))}: the seal is broken ({log.faults[0]}); keep it as it is, and name another"
                " directory"
            )
        fd = os.open(log.path, os.O_WRONLY | os.O_APPEND | NO_LINK)
        try:
            os.ftruncate(fd, log.whole_bytes)
        except BaseException:
            os.close(fd)
            raise
        return cls(log.path, key, fd, sync=sync, number=log.number, head=log.head)

    def append(self, kind: str, **fields: Any) -> None:
        """Sign a statement and append it. The first one also names the public key."""
        line, head = self.signed(kind, **fields)
        whole = os.fstat(self._fd).st_size
        left = memoryview(line)
        try:
            while left:
                left = left[os.write(self._fd, left) :]
        except OSError:
            # Back to whole lines: on a full disk a write is short first, and a later statement must begin a line.
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, whole)
            raise
        if self._sync:
            os.fsync(self._fd)
        self.number, self.head = self.number + 1, head

    def signed(self, kind: str, **fields: Any) -> tuple[bytes, str]:
        """Return the line of the next statement, and its hash."""
        told = {"mace-seal": FORMAT, "n": self.number + 1, "prev": self.head, "kind": kind, "utc_ns": time.time_ns()}
        if kind in ("begin", "state"):
            told["key"] = self._key.public.raw.hex()
        statement = json.dumps(told | fields, separators=(",", ":")).encode()
        line = base64.b64encode(self._key.sign(statement)) + b" " + statement
        return line + b"\n", hashlib.sha256(line).hexdigest()

    def reopen(self, number: int, head: str) -> None:
        """Continue after the file was replaced by one whose last line has this number and hash. OSErrors pass."""
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | NO_LINK)
        os.close(self._fd)
        self._fd, self.number, self.head = fd, number, head

    def sync(self) -> None:
        """Synchronise the file to the disk."""
        os.fsync(self._fd)

    def close(self) -> None:
        """Close the file. May be called again."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)
