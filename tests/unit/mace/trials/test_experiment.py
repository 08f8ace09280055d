"""The experiment's plan, its results file and its figures, which need no kernel."""

import io
import json
import os
import resource
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import rich.console

from contracts.errors import StoreError, UsageError
from contracts.ledger import Ledger
from mace.tools.host_probes import MOST_A_SECOND, SAMPLES_A_PROBE
from mace.tools.host_rtt import FEWEST
from mace.trials.experiment import page
from mace.trials.experiment import plan as plans
from mace.trials.experiment.figures import Figures
from mace.trials.experiment.measuring import repetition
from mace.trials.experiment.plan import Cell, Plan
from mace.trials.experiment.results import Repetition, opened

MACHINE = {"cpu": "z80", "cores": 1, "kernel": "6.1", "virtual": False, "load": 0.5}
PLAN = Plan(("flood", "1s"), 2, 3, None, ("netns",), "ftrace", "namespace", "", "none", 1)
CELL = PLAN.cells()[0]
SETTINGS = PLAN.settings(MACHINE)
WANTS = {"throttled": None, "throttled_ns": None, "cpu_pressure_ns": 5, "io_pressure_ns": None}


def made(number=0, cell=CELL, **changed):
    """Return a repetition: 60 µs on the host, 4 µs more if traced, 90 in the container, corrected to 62."""
    return Repetition(
        **{
            "number": number,
            "cell": cell,
            "bare": {"untraced": [60_000] * 40, "traced": [64_000] * 20},
            "container": {"untraced": [90_000] * 20, "traced": [95_000] * 20},
            "corrected": [62_000] * 20,
            "median": [62_000.0, 58_000.0, 65_000.0],
            "plain": 45_000.0,
            "without_waiting": 61_000.0,
            "temporal_error": 1_000.0,
            "stretches": {"send": 9_000.0, "device": 2_000.0, "far_end": 6_000.0},
            "tracer_cost": None,
            "counts": {"sent": 21, "paired": 20, "unpaired": {"no_reply": 1}, "waits_known": 20, "probes": 40},
            "ledger": Ledger(records=10, matched=10).as_dict(),
            "wants": WANTS,
            **changed,
        }
    )


def test_every_combination_is_measured_once_per_repetition():
    order = list(PLAN.order())
    assert len(order) == len(set(order)) == 3 * 6
    assert {cell for _, cell in order} == {
        Cell("netns", "ftrace", "namespace", "none", pace, flood) for pace in ("flood", "1s") for flood in range(3)
    }
    # Repetitions are complete one after the other, each in an order of its own.
    assert [number for number, _ in order] == sorted([0, 1, 2] * 6)
    assert order == list(PLAN.order())
    assert [cell for _, cell in order[:6]] != PLAN.cells()


def test_all_paces_of_a_quick_run_fit_into_its_time():
    """Repetitions that do not fit are left out, so that this is no promise, but the plan is for all of them."""
    quick = replace(PLAN, paces=tuple(plans.PACES), flood=0, repetitions=plans.QUICK_REPETITIONS)
    assert sum(quick.seconds(cell) for _, cell in quick.order()) < 600


def test_every_pace_has_the_pings_that_probes_need():
    """Three of either side, of which a burst has three; see `mace.tools.host_probes`."""
    for cell in replace(PLAN, paces=tuple(plans.PACES), flood=0).cells():
        count = PLAN.count_of(cell, corrected=True)
        seconds = count * (cell.interval_s or plans._FLOOD_S)
        assert min(count // SAMPLES_A_PROBE, seconds * MOST_A_SECOND) >= 2 * FEWEST
        assert PLAN.count_of(cell) <= count
        assert replace(PLAN, count=12).count_of(cell, corrected=True) == 12


def test_results_are_kept_and_continued(tmp_path):
    path = tmp_path / "results"
    first, second = made(), made(1, replace(CELL, pace="1s", flood_containers=2))
    with opened(path, SETTINGS, MACHINE) as found:
        found.add(first)
    with opened(path, SETTINGS, {**MACHINE, "load": 3}) as found:
        assert found.machine == MACHINE
        assert found.finished == [first]
        assert found.has(0, CELL)
        assert not found.has(1, CELL)
        found.add(second)
    with opened(path, SETTINGS, MACHINE) as found:
        assert found.finished == [first, second]
        assert found.remarks == []


def test_the_end_of_a_line_that_a_killed_run_left_is_removed(tmp_path):
    path = tmp_path / "results"
    with opened(path, SETTINGS, MACHINE) as found:
        found.add(made())
        found.add(made(1))
    whole = path.read_bytes()
    for cut in (1, 40):
        path.write_bytes(whole[:-cut])
        with opened(path, SETTINGS, MACHINE) as found:
            assert found.finished == [made()]
            assert "cut short" in found.remarks[0]
            found.add(made(1))
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda text: text.replace('"count":null', '"count":20'), "made with count 20, this run has None"),
        (lambda text: text.replace('"kernel":"6.1"', '"kernel":"5.10"'), "made with kernel 5.10, this run has 6.1"),
        (lambda text: text.replace('"mace_experiment":1', '"mace_experiment":2'), "format 2, expected 1"),
        (lambda text: text.replace('"number":0', '"nomber":0'), "line 2: not a repetition"),
        (lambda text: text.replace('"pace":"flood"', '"pace":"fast"'), "line 2: not a repetition"),
        (lambda text: "mace\n" + text, "not the results of an experiment"),
        (lambda _: "something else", "not the results of an experiment"),
        (lambda _: "{}\n", "not the results of an experiment"),
    ],
)
def test_a_file_of_another_run_is_refused_and_kept(tmp_path, spoil, why):
    path = tmp_path / "results"
    with opened(path, SETTINGS, MACHINE) as found:
        found.add(made())
    before = spoil(path.read_text())
    path.write_text(before)
    with pytest.raises(UsageError, match=why), opened(path, SETTINGS, MACHINE):
        pass
    assert path.read_text() == before


def test_two_runs_do_not_write_one_file(tmp_path):
    path = tmp_path / "results"
    with (
        opened(path, SETTINGS, MACHINE),
        pytest.raises(UsageError, match="another run is writing it"),
        opened(path, SETTINGS, MACHINE),
    ):
        pass


def test_a_file_that_cannot_be_written(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, why in ((tmp_path, "Is a directory"), (tmp_path / "pipe", "not a regular file")):
        with pytest.raises(UsageError, match=why), opened(path, SETTINGS, MACHINE):
            pass


def test_a_full_disk_ends_the_run_and_keeps_what_is_finished(tmp_path):
    path = tmp_path / "results"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with opened(path, SETTINGS, MACHINE) as found:
            found.add(made())
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 100, limits[1]))
            with pytest.raises(StoreError, match="--results"):
                found.add(made(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    with opened(path, SETTINGS, MACHINE) as found:
        assert found.finished == [made()]
        assert "cut short" in found.remarks[0]


def test_figures():
    found = Figures([made(n, median=[62_000.0, low, 65_000.0]) for n, low in enumerate((58e3, 59e3, 61e3))], MACHINE)
    truth, traced = found.rows()
    assert (truth["traced"], traced["traced"]) == (False, True)
    for row in (truth, traced):
        assert (row["pace"], row["flood_containers"], row["repetitions"]) == ("flood", 0, 3)
        assert row["corrected_p50_us"] == 62
        assert row["tracer_cost_us"] == pytest.approx(4, abs=0.1)
        assert (row["sent"], row["paired"], row["unpaired"], row["probes"]) == (63, 60, {"no_reply": 3}, 120)
        assert (row["cpu_pressure_ns"], row["throttled"], row["starved_p50_us"]) == (15, None, None)
        assert sum(row["host_path_us"].values()) == 17
    assert truth["bare_p50_us"] == pytest.approx(60, abs=0.1)
    assert traced["bare_p50_us"] == pytest.approx(64, abs=0.1)
    assert truth["container_p50_us"] == pytest.approx(90, abs=0.1)
    assert truth["diff_p50_us"] == pytest.approx(2, abs=0.1)
    assert traced["diff_p50_us"] == pytest.approx(-2, abs=0.1)
    assert truth["plain_diff_p50_us"] == pytest.approx(-15, abs=0.1)
    assert truth["without_waiting_diff_p50_us"] == pytest.approx(1, abs=0.1)
    assert truth["ci95_us"][0] <= truth["diff_p50_us"] <= truth["ci95_us"][1]
    # 60 µs lies in two of the three intervals, 64 µs in all.
    assert (truth["coverage"], traced["coverage"]) == (0.67, 1)
    assert found.ledger() == Ledger(records=30, matched=30)
    json.dumps(found.as_dict(), allow_nan=False)


def test_cells_are_shown_in_the_order_of_paces():
    cells = [replace(CELL, pace=pace, flood_containers=n) for pace in plans.PACES for n in (0, 1)]
    found = Figures([made(0, cell) for cell in reversed(cells)], MACHINE)
    assert list(found.cells()) == cells


def test_runtimes_side_by_side():
    """What a runtime adds is measured by ping in its container; on the host's network nothing is corrected."""
    cells = [replace(CELL, runtime=word, pace=pace) for pace in ("flood", "1s") for word in plans.RUNTIMES]
    assert list(Figures([made(0, cell) for cell in reversed(cells)], MACHINE).cells()) == cells
    row = Figures([made(n) for n in range(3)], MACHINE).rows()[0]
    assert row["added_p50_us"] == pytest.approx(30, abs=0.1)
    assert row["added_ci95_us"][0] <= row["added_p50_us"] <= row["added_ci95_us"][1]
    shared = repetition(0, CELL, {}, {"untraced": [60_000], "traced": [64_000]}, {"untraced": [61_000]}, WANTS)
    row = Figures([shared], MACHINE).rows()[0]
    assert (row["sent"], row["paired"], row["corrected_p50_us"], row["coverage"]) == (0, 0, None, None)
    assert row["added_p50_us"] == pytest.approx(1, abs=0.2)
    printed = rich.console.Console(width=200, file=io.StringIO())
    Figures([shared], MACHINE).tables(printed)
    assert "shares the host's network, so there is nothing to correct" in printed.file.getvalue()


@pytest.mark.parametrize("runtimes", [(), ("netns", "netns"), ("dokcer",)])
def test_impossible_runtimes_are_refused(runtimes):
    with pytest.raises(UsageError, match="--runtimes"):
        replace(PLAN, runtimes=runtimes)


def test_repetitions_without_figures():
    """Nothing was answered or paired: there is no figure, and none is made up."""
    empty = made(
        bare={"untraced": [], "traced": []},
        container={"untraced": [], "traced": []},
        corrected=[], median=None, plain=None, without_waiting=None, temporal_error=None, stretches=None,
    )  # fmt: skip
    row = Figures([empty], MACHINE).rows()[0]
    for name in ("bare_p50_us", "corrected_p50_us", "diff_p50_us", "ci95_us", "coverage", "host_path_us"):
        assert row[name] is None


MEDIAN = {"estimate": 40_000.0, "low": 38_000.0, "high": 42_000.0, "block": 1}


def told(*, samples=(), statistics=(), **more):
    """Return the JSON of `mace ping` for two samples, of which one is paired."""
    rows = [{"reason": "paired", "duplicate": False, "tool_rtt_ns": 70_000, **dict(samples)}]
    rows += [{"reason": "no_reply", "duplicate": False, "tool_rtt_ns": None}]
    return {
        "samples": rows,
        "statistics": {"temporal_error_ns": {"count": 1, "mean": {"estimate": 3_000.0}}, **dict(statistics)},
        "paired": 1,
        "unpaired": {"no_reply": 1},
        "ledger": Ledger().as_dict(),
        **more,
    }


def of(found):
    return repetition(0, CELL, found, {"untraced": [60_000]}, {"untraced": [90_000]}, WANTS)


def test_a_lower_bound_is_what_it_is():
    """Without probes `mace ping` knows no more, so that this is what it prints."""
    statistics = {
        "host_rtt_lower_bound_ns": {"median": MEDIAN},
        "host_rtt_lower_bound_without_waiting_ns": {"median": {**MEDIAN, "estimate": 37_000.0}},
    }
    one = of(told(samples={"host_rtt_lower_bound_ns": 40_000}, statistics=statistics, host_path=None))
    assert one.median == [40_000.0, 38_000.0, 42_000.0]
    assert (one.plain, one.without_waiting, one.stretches, one.corrected) == (40_000.0, 37_000.0, None, [40_000])
    assert one.container["traced"] == [70_000]
    assert (one.counts["waits_known"], one.counts["unpaired"]) == (1, {"no_reply": 1})


def test_a_host_rtt_with_the_host_path_term():
    higher = {"estimate": 55_000.0, "low": 50_000.0, "high": 60_000.0, "block": 1}
    statistics = {
        "host_rtt_ns": {"median": higher},
        "host_rtt_lower_bound_ns": {"median": MEDIAN},
        "host_rtt_without_waiting_ns": {"median": {**higher, "estimate": 52_000.0}},
    }
    term = {"send_ns": 9_000, "device_ns": 3_000, "far_end_ns": 7_000, "tracer_cost_ns": 4_000, "probes": [10, 9]}
    samples = {"host_rtt_ns": 55_000, "host_rtt_lower_bound_ns": 40_000}
    one = of(told(samples=samples, statistics=statistics, host_path=term))
    assert one.median == [55_000.0, 50_000.0, 60_000.0]
    assert (one.plain, one.without_waiting, one.corrected) == (40_000.0, 52_000.0, [55_000])
    assert one.stretches == {"send": 9_000, "device": 3_000, "far_end": 7_000}
    assert (one.tracer_cost, one.counts["probes"]) == (4_000, 19)


def test_too_few_samples_have_no_median():
    one = of(told(samples={"host_rtt_ns": 40_000}, statistics={"host_rtt_ns": {"median": None}}))
    assert (one.median, one.plain, one.without_waiting, one.corrected) == (None, None, None, [40_000])


def cells_of(text):
    """The cells of a Markdown page's first table."""
    return [line.strip("|\n").split(" | ") for line in text.splitlines() if line.startswith("|")]


def test_a_page_has_the_tables_and_the_picture(tmp_path):
    beside = replace(CELL, pace="1s", load="quota")
    found = Figures([made(n, cell) for cell in (CELL, beside) for n in range(3)], MACHINE)
    for name in ("page.md", "page.html"):
        page.write(found, tmp_path / name)
    told = (tmp_path / "page.md").read_text()
    assert "![" in told
    assert "](page.png)" in told
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
    (columns, _, flood, *_) = cells_of(told)
    assert dict(zip(map(str.strip, columns), map(str.strip, flood), strict=True)) == {
        "at": "flood, 0 flooding, ftrace",
        "repetitions": "3",
        "host": "60.0",
        "container": "90.0",
        "added": "+30.0",
        "95 %": "+2.0 … +2.0",
        "corrected": "62.0",
        "difference": "+2.0",
        "goal": "±1",
        "coverage": "100%",
        "paired": "60 of 63",
    }
    html = (tmp_path / "page.html").read_text()
    for grid in found.grids():
        assert grid.title in told
        assert grid.title.replace("'", "&#x27;") in html
        for cell in (cell for row in grid.rows for cell in row):
            assert cell in html
    assert len(found.grids()) == 3  # the last is of the load
    assert 'src="data:image/png;base64,' in html
    assert "http" not in html


def test_a_page_that_is_there_gets_the_main_table_between_its_marks(tmp_path):
    results, there = tmp_path / "results", tmp_path / "there.md"
    with opened(results, SETTINGS, MACHINE) as found:
        found.add(made())
    before = results.read_bytes()[:-1]
    results.write_bytes(before + b"\n{")  # as a killed run leaves it
    there.write_text(f"above\n{page.BEGIN}\nold\n{page.END}\nbelow\n")
    for _ in range(2):
        assert page.main([str(results), str(there)]) == 0
        told = there.read_text()
        assert told.startswith(f"above\n{page.BEGIN}\n")
        assert told.endswith(f"\n{page.END}\nbelow\n")
        assert "old" not in told
        assert cells_of(told)[2][0].strip() == "flood, 0 flooding, ftrace"
        assert "z80" in told
    assert results.read_bytes() == before + b"\n{"
    assert (tmp_path / "there.png").exists()


@pytest.mark.parametrize(
    ("results", "text", "why"),
    [
        ("{}\n", "", "not the results of an experiment"),
        ("", "", "not the results of an experiment"),
        (None, f"{page.BEGIN}\n", "has no lines"),
        (None, None, "cannot be read"),
    ],
)
def test_what_cannot_be_put_into_a_page_is_said_and_changes_nothing(tmp_path, capsys, results, text, why):
    source, there = tmp_path / "results", tmp_path / "there.md"
    with opened(source, SETTINGS, MACHINE) as found:
        found.add(made())
    if results is not None:
        source.write_text(results)
    if text is not None:
        there.write_text(text)
    assert page.main([str(source), str(there)]) == 1
    assert why in capsys.readouterr().err
    assert [each.name for each in sorted(tmp_path.iterdir())] == [
        "results",
        *(["there.md"] if text is not None else []),
    ]


def test_a_page_is_markdown_or_html():
    with pytest.raises(UsageError, match=r"has to end in \.html or \.md"):
        page.check(Path("page.pdf"))


def test_a_terminal_shows_where_the_figures_are_from():
    """Also where intervals are wide."""
    far = replace(CELL, pace="200ms", far_end="guest", runtime="apptainer-ptp", flood_containers=2)
    untraced = [{"untraced": [us * 1000] * 40, "traced": [64_000] * 20} for us in (100, 900, 400)]
    printed = rich.console.Console(file=io.StringIO(), width=120)
    Figures([made(n, far, bare=bare) for n, bare in enumerate(untraced)], MACHINE).tables(printed)
    text = " ".join(printed.file.getvalue().split())
    for word in ("200ms,", "apptainer-ptp,", "guest"):
        assert word in text
    assert "60 of" in text
