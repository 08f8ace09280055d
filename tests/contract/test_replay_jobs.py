"""Any number of jobs gives the same rows, windows, ledger, grades, figures and errors, wherever recordings are cut."""

import json
import os
import signal
from pathlib import Path

import pytest

from contracts.config import Config, StoreConfig
from contracts.errors import CaptureError, Stopped
from correlator import configured
from correlator.engine import EngineConfig
from mace.replaying import jobs as processes
from mace.replaying.into_store import files_at, into_store
from tests.made_replay import ENGINE, count_rows, differences, write_capture
from tests.measuring import mace, start, wait_for
from tests.places import GOLDEN, GOLDEN_FILES

pytestmark = pytest.mark.slow
CONFIG = StoreConfig(sync=False)
GOLDENS = (
    *(GOLDEN / name for name in ("both-sources/kmod.mace", "tool-output/tools.mace", "wire-2/capture.mace")),
    *(GOLDEN_FILES[form][0] for form in ("mace", "trace.dat", "text")),
)
"""Recordings of different runs and formats; files of other formats than `mace` are one part each."""


def stored(files, store, jobs, engine, part_bytes, **how):
    return into_store(files, str(store), engine, CONFIG, jobs=jobs, part_bytes=part_bytes, **how)


def test_goldens_cut_at_odd_places(tmp_path):
    """The cuts are at multiples of 37 ms and change with the number of jobs; packets cross them."""
    files = files_at(GOLDENS)
    engine = EngineConfig(timeout_ns=50_000_000, slice_ns=37_000_000, stages=True)
    found = {jobs: stored(files, tmp_path / f"{jobs}", jobs, engine, 2_499 + 1_001 * jobs) for jobs in (1, 3)}
    assert count_rows(tmp_path / "1", "ledger") > 2 * len(files), "hardly cut"
    assert differences(tmp_path / "1", tmp_path / "3") == {}
    found[2] = into_store(files, None, engine, CONFIG, jobs=2, part_bytes=9_300)
    for jobs in (2, 3):
        assert found[jobs][0].as_dict() == found[1][0].as_dict()
        assert sorted(found[jobs][1]) == sorted(found[1][1])


@pytest.fixture(scope="module")
def capture(tmp_path_factory):
    return write_capture(tmp_path_factory.mktemp("capture") / "hard.mace", count=30_000, slower=40)


PART = 7_000
"""Bytes of a part of `capture`: a dozen parts."""


@pytest.fixture(scope="module")
def reference(capture, tmp_path_factory):
    """Return (store, summary) of a replay by one job."""
    store = tmp_path_factory.mktemp("reference") / "store"
    return store, stored(files_at([capture]), store, 1, ENGINE, PART)[0]


def test_stopped_and_resumed_with_other_jobs(capture, reference, tmp_path):
    """Packets wait over many cuts, so that parts suppose a wrong state and are done again."""
    files, store = files_at([capture]), tmp_path / "store"
    done = []
    for jobs in (3, 2):
        done.append(0)
        with pytest.raises(Stopped, match=r"^stopped after \d+ of \d+ parts; .* --resume continues$"):
            stored(
                *(files, store, jobs, ENGINE, PART),
                resume=True,
                told=lambda now, _total: done.__setitem__(-1, now),
                stop=lambda: done[-1] > max(done[:-1], default=0) + PART,
            )
        assert not (store / "replay" / "staged").exists()
    summary, _ = stored(files, store, 2, ENGINE, PART, resume=True)
    assert differences(reference[0], store) == {}
    assert summary.as_dict() == reference[1].as_dict()


def test_an_error_comes_after_the_parts_before_it(capture, tmp_path):
    """Also if a part behind the damage, or the damaged part itself, is read first."""
    data = bytearray(capture.read_bytes())
    data[len(data) * 2 // 3] ^= 0xFF
    (tmp_path / "bad.mace").write_bytes(data)
    told = []
    for jobs in (1, 3):
        with pytest.raises(CaptureError, match="at byte") as error:
            stored(files_at([tmp_path / "bad.mace"]), tmp_path / f"{jobs}", jobs, ENGINE, PART)
        told.append(str(error.value))
    assert told[0] == told[1]
    assert count_rows(tmp_path / "1", "delays") == count_rows(tmp_path / "3", "delays") > 0
    assert count_rows(tmp_path / "1", "ledger") == count_rows(tmp_path / "3", "ledger") > 2


def workers_of(pid):
    """Return the worker processes of a process."""
    tasks = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(each) for each in tasks.split() if b"mace.replaying.worker" in commandline(each)]


def commandline(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return b""


def test_the_command_line_interrupted_and_killed(capture, tmp_path):
    """A killed worker and Ctrl-C end the command with one line, and a killed command leaves no worker."""
    long = write_capture(tmp_path / "long.mace", count=40_000, slower=150)
    store = tmp_path / "store"
    argv = ("replay", long, "--store", store, "--part-mib", "0.005", "--json")

    def killed_worker(process):
        os.kill(workers_of(process.pid)[0], signal.SIGKILL)

    def interrupted(process):
        os.killpg(process.pid, signal.SIGINT)

    def killed(process):
        process.kill()

    for how, status, line in (
        (killed_worker, 1, "was killed by SIGKILL"),
        (interrupted, 1, "mace: stopped after"),
        (killed, -signal.SIGKILL, ""),
    ):
        process = start(*argv, "--resume", "--jobs", "2", start_new_session=True)
        note = store / "replay" / "00000.json"
        before = note.read_bytes() if note.exists() else b""
        wait_for(lambda: process.poll() is not None or (note.exists() and note.read_bytes() != before), 120)  # noqa: B023
        workers = workers_of(process.pid)
        assert len(workers) == 2, process.communicate()
        how(process)
        _, told = process.communicate(timeout=60)
        assert (process.returncode, len(told.splitlines())) == (status, bool(line)), told
        assert line in told
        assert not line or "the same command with --resume continues" in told
        wait_for(lambda: not any(map(commandline, workers)), 60)  # noqa: B023
    done = mace(*argv, "--resume", "--jobs", "3")
    alone, _ = into_store(files_at([long]), None, configured.replayed(Config().correlate), CONFIG)
    assert json.loads(done.stdout) == json.loads(json.dumps(alone.as_dict()))
    assert done.stderr == ""
    assert not (store / "replay").exists()


def test_short_recordings_stay_in_one_process(capture):
    files = files_at([capture])
    assert not processes.worthwhile(files, 8)
    assert files[0].bytes_total < processes.SMALLEST_PART == processes.part_bytes(files, 8)
    assert 1 <= processes.usable() <= len(os.sched_getaffinity(0))


def test_jobs_and_cluster_exclude_each_other(capture):
    done = mace("replay", capture, "--jobs", "2", "--cluster", "local:2", check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("mace: --jobs is for the processes of this machine")
