"""Real packets of a lab reach real servers: round trips InfluxDB, raw records an ingest over a broker."""

import re
import socket

import pytest

from mace.lab import Spec, running
from tests import servers
from tests.brokers import mosquitto
from tests.integration.test_mqtt import Served, content
from tests.measuring import mace, measured

pytestmark = [pytest.mark.needs("root", "tracefs", "netns"), pytest.mark.slow]

COUNT = 40
FIELDS = ("seq", "tool_rtt_ns", "host_rtt_lower_bound_ns", "nic_rtt_ns")
SHOWN = re.compile(r"icmp_seq=(\d+) ttl=\d+ time=([0-9.]+) ms · host≥([0-9.]+) nic=([0-9.]+) ")


@pytest.fixture(scope="module")
def lab():
    with running(Spec(name="remote", containers=2)) as place:
        place.ping("c1", count=3)
        yield place


def round_trips(server):
    """Return (seq, tool, host, NIC), ns, of each row of `rtt`."""
    found = server.query(f"SELECT {', '.join(FIELDS)} FROM rtt WHERE container = 'c1'")
    return [tuple(row[1:]) for series in found for row in series["values"]]


@pytest.mark.needs("influxd")
def test_the_database_has_the_printed_round_trips(lab, tmp_path):
    """A live run and a replay of its recording store exactly the printed round trips in InfluxDB 1.6.7."""
    config, capture, said = tmp_path / "mace.toml", tmp_path / "run.mace", tmp_path / "said"
    config.write_text(f'[sinks.influxdb]\nspool = "{tmp_path}/spool"\n')
    with servers.running(servers.Influx(tmp_path / "influx")) as server:
        to = ("--influxdb", server.url, "--config", config)
        options = ("--lab", lab.name, "--container", "c1", "--record", capture)
        done = mace("ping", *options, *to, "--no-probes", "-D", "-c", COUNT, "-i", "0.01", lab.address("remote"))
        live = round_trips(server)
        shown = [match.groups() for match in SHOWN.finditer(done.stdout)]
        assert [int(seq) for seq, *_ in shown] == list(range(1, COUNT + 1))
        # ping prints microseconds or three digits, MACE tenths of a microsecond.
        assert [(seq, tool / 1e6) for seq, tool, _, _ in live] == [(int(seq), float(ms)) for seq, ms, _, _ in shown]
        for (_, _, host, nic), (_, _, host_us, nic_us) in zip(live, shown, strict=True):
            assert (f"{host / 1e3:.1f}", f"{nic / 1e3:.1f}") == (host_us, nic_us)
        said.write_text(re.sub(r" · .*", "", done.stdout.split("\nc1: ", 1)[0]) + "\n")
        server.query('DROP MEASUREMENT "rtt"', post=True)
        mace("correct", said, capture, "--container", "c1", *to)
        assert round_trips(server) == live


@pytest.mark.needs("mosquitto", "openssl")
def test_the_ingest_stores_the_rows_of_the_run(lab, tmp_path):
    """The ingest and the run store the same rows bit for bit, over a real broker."""
    with mosquitto(tmp_path / "broker") as broker:
        served = Served(broker, tmp_path / "elsewhere").start()
        try:
            to = ("--publish", broker.url, "--spool", tmp_path / "spool")
            with measured(lab, tmp_path / "here", *to) as found:
                flood = lab.start_udp("c2", count=5_000, size=18)
                lab.ping("c1", count=50, interval_s=0.01)
                flood.wait()
            served.stop()
        finally:
            if served.process.poll() is None:
                served.kill()
    host = socket.gethostname()
    here, elsewhere = content(found.store, host), content(tmp_path / "elsewhere", host)
    assert len(here["delays"]) > 10_000
    assert elsewhere == here
    assert here["ledgers"][0][1]["records"] > 40_000
