"""Keys of an operator, for tests."""

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from storage.sealing.keys import seal_key


def write_key(path, key=None, encryption=None, mode=0o600):
    """Write a private key, a new Ed25519 key by default; returns the path."""
    key = key or Ed25519PrivateKey.generate()
    path.touch(mode=0o600)
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption()))
    path.chmod(mode)
    return path


def write_public(path, key):
    """Write the public half of a private key in PEM; returns the path."""
    path.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return path


def new_key(folder):
    """Return a new key, written to a file in the folder."""
    return seal_key(write_key(folder / "key.pem"))
