import json

import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from contracts.names import bytes_of, text_of


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"eth0", "eth0"),
        ("größe".encode(), "größe"),
        ("größe".encode("latin-1"), r"gr\xf6\xdfe"),
        (b"\xff", r"\xff"),
        (b"\xed\xb2\x80", r"\xed\xb2\x80"),  # an encoded surrogate is not UTF-8
        (rb"a\b", r"a\b"),
        (rb"web\x2d1", r"web\x2d1"),
        (rb"\xff", r"\x5cxff"),
        (rb"\x5c", r"\x5cx5c"),
        (b"", ""),
    ],
)
def test_names_are_text(raw, text):
    assert text_of(raw) == text
    assert bytes_of(text) == raw


@given(st.binary(max_size=40) | st.text("\\x5cf0ÿ").map(str.encode))
@example(b"\\\xff")
@example(b"\\x\xff")
@example(b"\\\\xff")
def test_names_survive_and_are_storable(raw):
    text = text_of(raw)
    assert bytes_of(text) == raw
    assert json.loads(json.dumps(text, ensure_ascii=False).encode()) == text
    assert pa.array([text], pa.string()).to_pylist() == [text]
