"""The configuration of a broker: clear errors, and no secrets where other users can see them."""

import asyncio
import socket

import aiomqtt
import pytest

from contracts.config import Config, MqttConfig
from contracts.errors import ConfigError
from mace.cli import main
from mace.live import publish
from storage import broker
from storage.broker import Broker, Brokers, retry_after_s


def test_the_address_has_a_port_of_its_own_or_the_usual_one():
    assert Broker(MqttConfig(broker="mqtt://b.example")).address == "mqtt://b.example:1883"
    assert Broker(MqttConfig(broker="mqtts://b.example")).address == "mqtts://b.example:8883"
    assert Broker(MqttConfig(broker="mqtt://[2001:db8::1]:77")).port == 77


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"broker": "b.example"}, "expected mqtt://HOST"),
        ({"broker": "http://b.example"}, "expected mqtt://HOST"),
        ({"broker": "mqtt://b.example/topic"}, "expected mqtt://HOST"),
        ({"broker": "mqtt://b.example:99999"}, "Port out of range"),
        ({"broker": "mqtt://me:secret@b.example"}, "every user of this machine can see"),
        ({"broker": "mqtt://b.example", "ca_file": "/ca.pem"}, "this address has no TLS"),
        ({"broker": "mqtts://b.example", "cert_file": "/c.pem"}, "or neither"),
        ({"broker": "mqtts://b.example", "ca_file": "/nowhere/ca.pem"}, "/nowhere/ca.pem"),
        ({"broker": "mqtt://b.example", "username": "a", "password_file": "/nowhere"}, "password_file /nowhere"),
    ],
)
def test_invalid_configurations_have_a_reason(config, message):
    with pytest.raises(ConfigError, match=message) as raised:
        Broker(MqttConfig(**config))
    assert "secret" not in str(raised.value)


def test_several_brokers_are_told_apart_by_their_addresses():
    brokers = Brokers(MqttConfig(broker="mqtt://a.example, mqtt://b.example:77"))
    assert [each.address for each in brokers.all] == ["mqtt://a.example:1883", "mqtt://b.example:77"]
    for listed in ("mqtt://a.example,mqtt://A.example:1883", "mqtt://a.example,"):
        with pytest.raises(ConfigError, match=r"named twice|expected mqtt://HOST"):
            Brokers(MqttConfig(broker=listed))


def test_a_password_needs_a_user_name(monkeypatch):
    monkeypatch.setenv("MACE_MQTT_PASSWORD", "word")
    with pytest.raises(ConfigError, match="without a user name"):
        Broker(MqttConfig(broker="mqtt://b.example"))


def test_retries_wait_longer_each_time_and_not_all_at_once():
    waits = [retry_after_s(attempt, 0.0) for attempt in range(1, 12)]
    assert waits == sorted(waits)
    assert waits[-1] == 5.0
    assert retry_after_s(3, 1.0) == retry_after_s(3, 0.0) / 2


def test_the_queue_is_bounded_in_bytes_and_number(monkeypatch):
    monkeypatch.setattr(broker, "QUEUE_BYTES", 100)

    async def fill(count, size):
        queue = broker._Queue(10)
        for n in range(count):
            queue.put_nowait(aiomqtt.Message("t", bytes(size), 1, False, n, None))
        got = [await queue.get() for _ in range(count)]
        queue.put_nowait(got[0])
        return [message.mid for message in got]

    assert asyncio.run(fill(2, 50)) == [0, 1]
    assert asyncio.run(fill(1, 500)) == [0], "one that is larger than all is worked on, too"
    for count, size in ((3, 50), (11, 1)):
        with pytest.raises(asyncio.QueueFull):
            asyncio.run(fill(count, size))


def test_check_says_whether_the_broker_answers():
    assert publish.check(Config()).detail == "not configured"
    with socket.create_server(("127.0.0.1", 0)) as server:
        there = f"mqtt://127.0.0.1:{server.getsockname()[1]}"
        assert publish.check(Config(mqtt=MqttConfig(broker=there))).ok
    found = publish.check(Config(mqtt=MqttConfig(broker=there)))
    assert (found.ok, found.remedy) == (False, "start the broker, or see [mqtt] broker")
    assert not publish.check(Config(mqtt=MqttConfig(broker="b.example"))).ok


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["ingest"], 2, "no broker"),
        (["ingest", "--broker", "mqtt://b.example", "--shard", "3/2"], 2, "shard '3/2'"),
        (["ingest", "--broker", "b.example"], 1, "expected mqtt://HOST"),
        (["run", "--publish", "--no-store", "--duration", "1"], 2, "no broker"),
    ],
)
def test_the_command_line_names_missing_settings(argv, status, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == status
    assert message in capsys.readouterr().err
