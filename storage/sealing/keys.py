"""Ed25519 keys in PEM files: the operator's private key, which seals, and the public key, which verifies.

`cryptography` is an extra: importing this module without it raises `MissingExtra`.
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from contracts.errors import MissingExtra, SealError

try:
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
except ModuleNotFoundError as error:
    raise MissingExtra("seal", "cryptography") from error

_MAKE: Final = "make one with: openssl genpkey -algorithm ed25519 -out KEY"
_MOST_BYTES: Final = 1 << 16
"""Largest key file that is read; a PEM file of an Ed25519 key has 119 bytes."""


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A key that verifies signatures."""

    raw: bytes
    """The 32 bytes of the key (RFC 8032)."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the 32 bytes: `SHA256:` and 64 hexadecimal digits."""
        return "SHA256:" + hashlib.sha256(self.raw).hexdigest()

    def verifies(self, signature: bytes, statement: bytes) -> bool:
        """Return whether the owner of the private key has signed exactly these bytes."""
        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, statement)
        except (InvalidSignature, ValueError):
            return False
        return True


class SealKey:
    """The operator's private key. Not picklable, and no part of a message."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public: Final = PublicKey(key.public_key().public_bytes_raw())

    def sign(self, statement: bytes) -> bytes:
        """Return the signature of the bytes (64 bytes)."""
        return self._key.sign(statement)


def seal_key(path: Path) -> SealKey:
    """Read an operator's private key. Raises `SealError` for any file but an unencrypted Ed25519 key in PEM.

    A file that its group or others may read or write is refused: whoever has the key can make seals.
    """
    text = _text(path)
    if b"PUBLIC KEY" in text and b"PRIVATE" not in text:
        raise SealError(f"{path}: a public key verifies seals; sealing needs the private key")
    if b"ENCRYPTED" in text:
        raise SealError(
            f"{path}: the key is encrypted, and MACE asks for no password; decrypt it into a file in memory:"
            " openssl pkey -in KEY -out /dev/shm/KEY"
        )
    try:
        key = load_pem_private_key(text, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise SealError(f"{path}: not a private key in PEM (PKCS #8); {_MAKE}") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise SealError(f"{path}: {_kind(key)}, expected an Ed25519 key; {_MAKE}")
    return SealKey(key)


def public_key(path: Path) -> PublicKey:
    """Read a public key, or the public half of a private one. Raises `SealError` for other files."""
    text = _text(path)
    if b"PRIVATE KEY" in text:
        return seal_key(path).public
    try:
        key = load_pem_public_key(text)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise SealError(
            f"{path}: not a public key in PEM; write one with: openssl pkey -in KEY -pubout -out KEY.pub"
        ) from None
    if not isinstance(key, Ed25519PublicKey):
        raise SealError(f"{path}: {_kind(key)}, expected an Ed25519 key")
    return PublicKey(key.public_bytes_raw())


def _kind(key: object) -> str:
    """Return the name of a key's type, from its class: `RSAPrivateKey` is `a key of type RSA`."""
    name = type(key).__name__.lstrip("_").replace("PrivateKey", "").replace("PublicKey", "")
    return f"a key of type {name}"


def _text(path: Path) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise SealError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise SealError(f"{path}: not a file with a key in PEM; {_MAKE}")
        text = os.read(fd, _MOST_BYTES)
    finally:
        os.close(fd)
    if b"PRIVATE KEY" in text and (mode := stat.S_IMODE(status.st_mode)) & 0o077:
        raise SealError(f"{path}: other users may use this private key (mode {mode:04o}): chmod 600 {path}")
    return text
