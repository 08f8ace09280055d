import os

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption

from contracts.errors import SealError
from storage.sealing.keys import public_key, seal_key
from tests.sealing import write_key, write_public


def test_a_signature_holds_for_exactly_its_bytes(tmp_path):
    key = seal_key(write_key(tmp_path / "k.pem"))
    signature = key.sign(b"statement")
    assert key.public.verifies(signature, b"statement")
    assert not key.public.verifies(signature, b"Statement")
    assert not key.public.verifies(signature[:-1], b"statement")
    assert not seal_key(write_key(tmp_path / "other.pem")).public.verifies(signature, b"statement")


def test_the_public_key_is_read_from_either_half(tmp_path):
    pair = Ed25519PrivateKey.generate()
    private, public = write_key(tmp_path / "k.pem", pair), write_public(tmp_path / "k.pub", pair)
    assert public_key(private) == public_key(public) == seal_key(private).public
    assert len(public_key(public).fingerprint) == len("SHA256:") + 64


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_a_key_that_others_may_use_is_refused(tmp_path, mode):
    path = write_key(tmp_path / "k.pem", mode=mode)
    for read in (seal_key, public_key):
        with pytest.raises(SealError, match=rf"mode {mode:04o}\): chmod 600 "):
            read(path)


def test_other_files_are_refused_in_one_clear_line(tmp_path):
    pair = Ed25519PrivateKey.generate()
    files = {
        "is encrypted": write_key(tmp_path / "encrypted.pem", pair, BestAvailableEncryption(b"secret")),
        "of type E(C|llipticCurve), expected an Ed25519": write_key(
            tmp_path / "p.pem", generate_private_key(SECP256R1())
        ),
        "of type RSA, expected an Ed25519": write_key(tmp_path / "rsa.pem", rsa.generate_private_key(65537, 1024)),
        "a public key verifies seals": write_public(tmp_path / "k.pub", pair),
        "No such file": tmp_path / "nosuch",
        "not a file with a key": tmp_path,
    }
    for name, content in (("empty", b""), ("text", b"hello"), ("cut", (tmp_path / "p.pem").read_bytes()[:60])):
        path = tmp_path / name
        path.write_bytes(content)
        path.chmod(0o600)
        files[f"{name}: not a private key in PEM"] = path
    os.mkfifo(tmp_path / "fifo")
    files["fifo: not a file with a key"] = tmp_path / "fifo"
    for told, path in files.items():
        with pytest.raises(SealError, match=told) as found:
            seal_key(path)
        assert "\n" not in str(found.value)


def test_what_is_no_public_key_is_refused(tmp_path):
    (tmp_path / "text").write_text("hello")
    with pytest.raises(SealError, match="openssl pkey -in KEY -pubout"):
        public_key(tmp_path / "text")
    with pytest.raises(SealError, match=r"of type E(C|llipticCurve)"):
        public_key(write_public(tmp_path / "p.pub", generate_private_key(SECP256R1())))
