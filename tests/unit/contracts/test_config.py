"""Every error of the configuration names the file, the key, the value found and the value expected."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts import config
from contracts.errors import ConfigError


def load(tmp_path, text):
    path = tmp_path / "mace.toml"
    path.write_text(text)
    return config.load(path)


def test_defaults_without_a_file_and_from_an_empty_one(tmp_path):
    assert config.load(None) == load(tmp_path, "") == config.Config()


def test_every_key(tmp_path):
    found = load(tmp_path, '[capture]\nouter = ["eth1"]\nring_mib = 64\n[store]\nflush_interval_s = 2\nsync = false\n')
    assert found.capture.outer == ("eth1",)
    assert found.capture.ring_mib == 64
    assert found.store.flush_interval_s == 2.0
    assert found.store.sync is False
    assert found.correlate == config.CorrelateConfig()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[capture", "not TOML"),
        ("[captur]\n", "no such table [captur] (did you mean 'capture'?)"),
        ("capture = 3\n", "capture is 3, expected a table [capture]"),
        ("[capture]\nring_mb = 3\n", "[capture] has no key 'ring_mb' (did you mean 'ring_mib'?)"),
        ("[capture]\nring_mib = '3'\n", "[capture] ring_mib = '3', expected a whole number"),
        ("[capture]\nring_mib = true\n", "[capture] ring_mib = True, expected a whole number"),
        ("[capture]\nring_mib = 0\n", "[capture] ring_mib = 0, expected 1 to 4096"),
        ("[capture]\nsource = 'ftrac'\n", "expected one of auto, kmod, bpf, ftrace (did you mean 'ftrace'?)"),
        ("[capture]\nouter = 'eth1'\n", "[capture] outer = 'eth1', expected a list of strings"),
        ("[store]\nflush_interval_s = nan\n", "[store] flush_interval_s = nan, expected 0.05 to 3600"),
        ("[store]\nmax_age_days = -1\n", "[store] max_age_days = -1.0, expected at least 0"),
        ("[store]\nmax_size_gib = inf\n", "[store] max_size_gib = inf, expected 0 to 9.0072e+15"),
        ("[store]\nmax_age_days = nan\n", "[store] max_age_days = nan, expected at least 0"),
        ("[store]\nflush_interval_s = '1'\n", "[store] flush_interval_s = '1', expected a number"),
        ("[capture]\nouter = ['eth1', 2]\n", "[capture] outer = ['eth1', 2], expected a list of strings"),
        ("[store]\npath = 3\n", "[store] path = 3, expected a string"),
        ("[sinks.influx]\n", "no such table [sinks.influx] (did you mean 'influxdb'?)"),
        ("[sinks.influxdb]\nbuckets = 'x'\n", "[sinks.influxdb] has no key 'buckets' (did you mean 'bucket'?)"),
        ("[store]\nsync = 1\n", "[store] sync = 1, expected true or false"),
    ],
)
def test_errors(tmp_path, text, said):
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text)
    assert said in str(error.value)
    assert str(tmp_path / "mace.toml") in str(error.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        config.load(tmp_path / "no.toml")


def test_bytes_that_are_not_utf_8(tmp_path):
    (tmp_path / "x.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not TOML"):
        config.load(tmp_path / "x.toml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = " + "[" * 20_000 + "]" * 20_000 + "\n", "lists or tables one inside the other, too deep to be read"),
        ("[capture]\nring_mib = " + "9" * 5000 + "\n", "Exceeds the limit (4300"),
        (
            "[capture]\nring_mib = 0x" + "f" * 5000 + "\n",
            "ring_mib = a number of thousands of digits, expected 1 to 4096",
        ),
        ("[store]\nflush_interval_s = " + "9" * 400 + "\n", "flush_interval_s = 1e+300, expected 0.05 to 3600"),
        ("[store]\nflush_interval_s = -" + "9" * 400 + "\n", "flush_interval_s = -1e+300, expected 0.05 to 3600"),
        ("[store]\nmax_age_days = 1" + "0" * 400 + "\n", "max_age_days = 1e+300, expected 0 to 9.0072e+15"),
        ("[sinks.influxdb]\nsample = 1" + "0" * 30 + "\n", "expected 0 to 9.0072e+15"),
        ('[store]\npath = "a\\u0000b"\n', "[store] path = 'a\\x00b', expected no NUL in it"),
        ('[capture]\nouter = ["eth0\\u0000"]\n', "[capture] outer = 'eth0\\x00', expected no NUL in it"),
    ],
)
def test_values_that_python_cannot_parse_are_reported(tmp_path, text, said):
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text)
    assert str(error.value).startswith(str(tmp_path))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


HOSTS = ["[::1", "é..x", "a..b", "a" * 64 + ".example", "x]"]


@pytest.mark.parametrize("host", HOSTS)
def test_invalid_hosts(host):
    from storage.broker import Broker
    from storage.influxdb import checked
    from storage.prometheus import address

    for told in (
        lambda: Broker(config.MqttConfig(broker=f"mqtt://{host}:80")),
        lambda: checked(config.InfluxConfig(url=f"http://{host}:80")),
        lambda: address(f"{host}:80") if "[" not in host and "]" not in host else address("é..x:80"),
    ):
        with pytest.raises(ConfigError) as error:
            told()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("listen", ["127.0.0.1:²", "127.0.0.1:" + "9" * 5000, "127.0.0.1:65536", "127.0.0.1:-1", ":80"])
def test_invalid_ports(listen):
    from storage.prometheus import address

    with pytest.raises(ConfigError, match="expected ADDRESS:PORT"):
        address(listen)


@pytest.mark.slow
@settings(max_examples=100)
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_file_is_a_configuration_or_an_error_of_one_line(tmp_path_factory, raw):
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(raw)
    try:
        config.load(path)
    except ConfigError as error:
        assert str(path) in str(error)  # noqa: PT017 (most files are none, some are)


def test_a_byte_order_mark_is_skipped(tmp_path):
    """A byte order mark, which some editors write, is not part of the text."""
    path = tmp_path / "mace.toml"
    path.write_bytes(b"\xef\xbb\xbf[run]\r\nhost = 'h1'\r\n")
    assert config.load(path).run.host == "h1"


@pytest.mark.parametrize(
    "text",
    [
        "{key} = 1",
        "[{key}]",
        "[[{key}]]",
        "run = {{{key} = 1}}",
        "run = [{{x = 1, {key} = 1}}]",
        "x = 'it' # it's ''' \"\"\"\n{key} = 1",
        'run = {{x = """a\nb\\"""""", {key} = 1}}',
        "run = {{x = '''a\nb''', {key} = 1}}",
    ],
)
@pytest.mark.parametrize("key", ["." * 50_000, "a" + ".a" * 32, "a" + ' . "b.c"' * 32, "a" + ".'b'" * 50_000])
def test_a_key_of_many_parts_is_refused_before_it_is_parsed(tmp_path, monkeypatch, text, key):
    """tomllib would take a minute to parse a key of many parts."""
    monkeypatch.setattr(config.tomllib, "loads", None)
    path = tmp_path / "mace.toml"
    path.write_text(text.format(key=key))
    with pytest.raises(ConfigError, match=r"mace\.toml: a key of [0-9,]+ parts .*, at most 32 are read"):
        config.load(path)


def test_a_large_file_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr(config.tomllib, "loads", None)
    path = tmp_path / "mace.toml"
    path.write_text("#" * ((1 << 18) + 1))
    with pytest.raises(ConfigError, match=r"mace\.toml: more than 262,144 bytes, the limit of a configuration"):
        config.load(path)


def test_dots_outside_keys_are_not_counted(tmp_path):
    path = tmp_path / "mace.toml"
    path.write_text("# " + "." * 500 + '\n#"""' + '\n[run]\nhost = "' + "a." * 100 + '" # ' + "." * 100 + "\n")
    assert config.load(path).run.host == "a." * 100


@pytest.mark.parametrize("text", ['"\\' * 100_000, "'" * 200_001, '"' * 200_001, "#'" * 100_000, '"""\\"' * 50_000])
def test_unclosed_quotes_take_linear_time(text):
    """Each character is read once; quadratic time would take minutes."""
    config._check_depth("c.toml", text)
