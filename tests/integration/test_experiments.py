"""Small runs of `mace experiment` and `mace compare` on the real kernel: figures add up and have the right signs."""

import json

import pytest

from tests.measuring import balanced, mace

pytestmark = [pytest.mark.needs("root", "tracefs", "netns"), pytest.mark.slow]

ROUNDS = 3
FLOOD_COUNT = 300
PNG = b"\x89PNG\r\n"


@pytest.mark.timeout(200)
def test_an_experiment(tmp_path):
    picture = tmp_path / "experiment.png"
    argv = ("experiment", "--flood", "1", "--rounds", ROUNDS, "--count", "15", "--flood-count", FLOOD_COUNT)
    found = json.loads(mace(*argv, "--json", "--png", picture, "--keep", tmp_path / "kept", timeout=150).stdout)
    assert json.loads(mace("experiment", "--again", tmp_path / "kept", "--json").stdout) == found
    balanced(found)
    assert picture.read_bytes().startswith(PNG)
    rows = {(row["pace"], row["flood_containers"]): row for row in found["rows"]}
    assert rows.keys() == {("10ms", 0), ("10ms", 1), ("flood", 0), ("flood", 1)}
    for (pace, _), row in rows.items():
        count = ROUNDS * (FLOOD_COUNT if pace == "flood" else 15)
        assert (row["rounds"], row["sent"]) == (ROUNDS, count)
        assert row["paired"] + sum(row["unpaired"].values()) == row["sent"]
        assert row["paired"] > 0.8 * count
        assert row["probes"] > 1.6 * count  # of host and container together
        assert row["ci95_us"][0] <= row["diff_p50_us"] <= row["ci95_us"][1]
        term = sum(row["host_path_us"].values())
        # Each is rounded to 0.01 µs.
        assert abs(row["corrected_p50_us"] - row["plain_p50_us"] - term) < 0.05
        assert abs(row["corrected_p50_us"] - row["bare_p50_us"] - row["diff_p50_us"]) < 0.03
        assert abs(row["diff_p50_us"] - row["host_path_us"]["answer"] - row["without_answer_diff_us"]) < 0.03
        for who, whole in (("host", "bare_p50_us"), ("container", "plain_p50_us")):
            assert abs(sum(row[f"{who}_ping_us"].values()) - row[whole]) < 0.05
            assert all(us > 0 for name, us in row[f"{who}_ping_us"].items() if name != "send")
    calm = rows["flood", 0]
    added_us = calm["container_p50_us"] - calm["bare_p50_us"]
    assert added_us > 0
    assert abs(calm["diff_p50_us"]) < added_us / 2


def test_a_comparison(tmp_path):
    picture = tmp_path / "compare.png"
    argv = ("compare", "--sources", "ftrace,none", "--rounds", ROUNDS, "--count", "200", "--json", "--png", picture)
    found = json.loads(mace(*argv).stdout)
    assert picture.read_bytes().startswith(PNG)
    none, ftrace = found["sources"]["none"], found["sources"]["ftrace"]
    assert none["trips"] == ftrace["trips"] == ROUNDS * 200
    assert (none["perturbation_us"], none["perturbation_ci95_us"]) == (0, [0, 0])
    assert ftrace["perturbation_us"] == pytest.approx(ftrace["rtt_p50_us"] - none["rtt_p50_us"], abs=0.03)
    balanced(ftrace)
    assert ftrace["lost"] == 0
    assert ftrace["cpu_us_per_trip"] > 0
    egress = {row["device"]: row["ftrace"]["count"] for row in found["devices"] if row["direction"] == "egress"}
    outer = next(name for name in egress if name.startswith("out"))
    assert egress[outer] == ROUNDS * 200
    assert egress["eth0"] >= ROUNDS * 200  # and perhaps an ARP request
    # The devices' medians are parts of the whole path's.
    for direction in ("egress", "ingress"):
        parts = [row["ftrace"]["p50_us"] for row in found["devices"]
                 if (row["direction"], row["segment"]) == (direction, "device")]  # fmt: skip
        assert 0 < sum(parts) < 2 * ftrace[f"overhead_{direction}"]["p50_us"]
