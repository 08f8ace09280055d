import pytest

from contracts.errors import UsageError
from contracts.names import name_of_this_machine
from mace.serving import access
from mace.serving.access import Access

TOKEN = "0123456789abcdef"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("8300", ("127.0.0.1", 8300)),
        ("0.0.0.0:80", ("0.0.0.0", 80)),
        (":80", ("0.0.0.0", 80)),
        ("[::1]:0", ("::1", 0)),
        ("localhost:8300", ("localhost", 8300)),
    ],
)
def test_an_address(given, expected):
    assert access.address(given) == expected


@pytest.mark.parametrize(
    "given", ["", "x", "127.0.0.1", "127.0.0.1:65536", "a..b:1", "::1", "h:٣", "h:-1", "h:100000000"]
)
def test_no_address(given):
    with pytest.raises(UsageError, match="address"):
        access.address(given)


@pytest.mark.parametrize(
    ("header", "ours"),
    [
        ("127.0.0.1:8300", True),
        ("localhost", True),
        ("LOCALHOST:1", True),
        ("[::1]:8300", True),
        ("192.0.2.7", True),
        (name_of_this_machine(), True),
        ("probe.example:8300", True),
        ("probe.example.", True),
        ("evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("localhost.evil.example:8300", False),
        ("", False),
        ("[evil]", False),
    ],
)
def test_only_our_own_names_are_answered(header, ours):
    found = access.access("127.0.0.1", None, ("Probe.Example",))
    assert found.host_is_ours(header) is ours


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.8.8"])
def test_loopback_needs_no_token(host, monkeypatch):
    monkeypatch.delenv(access.VARIABLE, raising=False)
    assert access.access(host, None, ()).token == ""
    assert access.warning(host) == ""


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "probe.example"])
def test_other_addresses_need_one(host, monkeypatch, tmp_path):
    monkeypatch.delenv(access.VARIABLE, raising=False)
    with pytest.raises(UsageError, match=r"give a token with --token-file FILE or MACE_SERVE_TOKEN"):
        access.access(host, None, ())
    monkeypatch.setenv(access.VARIABLE, "short")
    with pytest.raises(UsageError, match="5 characters: expected at least 16"):
        access.access(host, None, ())
    (tmp_path / "token").write_text(f"{TOKEN}\nrest\n")
    assert access.access(host, tmp_path / "token", ()).token == TOKEN
    assert "unencrypted" in access.warning(host)


@pytest.mark.parametrize(
    ("content", "said"), [(None, "No such file"), (b"\n", "first line is empty"), (b"\xff", "UTF-8")]
)
def test_a_token_file_that_holds_none(content, said, tmp_path):
    if content is not None:
        (tmp_path / "token").write_bytes(content)
    with pytest.raises(UsageError, match=said):
        access.access("127.0.0.1", tmp_path / "token", ())


def test_who_is_admitted():
    found = Access(frozenset(), TOKEN)
    assert found.admits({"authorization": f"Bearer {TOKEN}"})
    assert found.admits({"authorization": f"bearer {TOKEN} "})
    assert found.admits({"cookie": f"other=1; mace_token={found.cookie()}"})
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": f"Basic {TOKEN}"},
        {"cookie": f"mace_token={TOKEN}"},
        {"cookie": "mace_token=é"},
        {"cookie": "\x00;;=;"},
    ):
        assert not found.admits(headers)
    assert TOKEN not in found.cookie()
    assert Access(frozenset()).admits({})


@pytest.mark.parametrize(
    "given", ["https://ui.perfetto.dev", "http://127.0.0.1:10000/", "https://tools.example/perfetto/"]
)
def test_an_address_of_a_perfetto_ui(given):
    assert access.perfetto_ui(given) == given


@pytest.mark.parametrize(
    "given", ["", "ui.perfetto.dev", "javascript:alert(1)", "file:///x", "https://", "http://h:99999"]
)
def test_no_address_of_a_perfetto_ui(given):
    with pytest.raises(UsageError, match="Perfetto UI"):
        access.perfetto_ui(given)
