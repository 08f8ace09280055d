import asyncio
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from contracts.errors import SealError, StoreError
from contracts.schema import Delays
from mace import cli
from storage import embedded, segments, tables, wide
from storage.embedded import EmbeddedStore
from storage.query import StoreReader
from storage.sealing import segments as sealed_segments
from storage.sealing.check import check
from storage.sealing.places import seal_path
from storage.segments import HOUR_NS
from tests.made_results import START_NS, header, make_delays, make_results
from tests.places import ROOT
from tests.sealing import new_key
from tests.unit.storage.stored import fill, write_run

EXAMPLE = str(ROOT / "docs/example.mace")


@pytest.fixture
def key(tmp_path):
    return new_key(tmp_path)


@pytest.fixture
def soon(monkeypatch):
    """Merge a few segments already."""
    monkeypatch.setattr(segments, "FAN_IN", 4)


@pytest.fixture
def root(tmp_path, key):
    fill(tmp_path / "store", [make_results(make_delays(50))], seal=key)
    return tmp_path / "store"


def many(root, flushes, key, *, run="run-1", hour=0, closed=True, **changes):
    """Write one small segment of each table in each flush."""

    async def write():
        sink = EmbeddedStore(root, fsync=False, flush_interval_s=60.0, seal=key, **changes)
        await sink.open(header(run))
        for n in range(flushes):
            await sink.write(make_results(make_delays(4, seed=n, start_ns=START_NS + hour * HOUR_NS + n * 10**9)))
            await sink._submit()
            await sink._encoding
        sink._retain()
        if closed:
            await sink.aclose()
        else:
            sink._ticker.cancel()
            sink._release()
        return sink

    return asyncio.run(write())


def files(root, table):
    return [each.path for each in segments.listing(root, table)]


def told(found):
    return [(each.kind, each.what.split(",")[0]) for each in found.findings]


def test_a_sealed_store_reads_like_another_and_verifies(root, key):
    assert StoreReader(root).summary().packets == 50
    found = check(root, key=key.public)
    assert (found.state, found.known_key, found.findings, found.notes) == ("intact", True, [], [])
    assert found.verified == sum(len(files(root, table)) for table in segments.TABLES) == 3
    assert len(found.clocks) == 2


def test_an_edited_a_deleted_and_an_added_segment_are_named(root):
    [delays], [ledger], [runs] = (files(root, table) for table in ("delays", "ledger", "runs"))
    hour = START_NS // HOUR_NS * HOUR_NS
    content = bytearray(delays.read_bytes())
    content[len(content) // 2] ^= 1
    delays.write_bytes(content)
    ledger.unlink()
    added = runs.with_name("000000000077-000000000077.1.parquet")
    added.write_bytes(runs.read_bytes())
    found = check(root)
    assert sorted(told(found)) == [
        ("altered", f"segment {delays.relative_to(root)}"),
        ("inserted", f"segment {added.relative_to(root)}"),
        ("missing", f"segment {ledger.relative_to(root)}"),
    ]
    times = {each.kind: (each.from_utc_ns, each.to_utc_ns) for each in found.findings}
    assert times["altered"] == times["missing"] == (hour, hour + HOUR_NS - 1)
    assert times["inserted"] == (None, None)


def test_a_segment_of_another_time_in_the_place_of_one(root, tmp_path, key):
    fill(tmp_path / "other", [make_results(make_delays(50, seed=2))], seal=key)
    [mine], [other] = files(root, "delays"), files(tmp_path / "other", "delays")
    mine.write_bytes(other.read_bytes())
    assert [kind for kind, _ in told(check(root))] == ["altered"]
    seal_path(root).write_bytes(seal_path(tmp_path / "other").read_bytes())
    assert check(root).state == "broken"


def test_merging_is_stated_and_what_was_edited_is_not_merged(tmp_path, key, soon):
    root = tmp_path / "store"

    async def write():
        sink = EmbeddedStore(root, fsync=False, flush_interval_s=60.0, seal=key)
        await sink.open(header())
        for n in range(15):
            await sink.write(make_results(make_delays(4, seed=n, start_ns=START_NS + n * 10**9)))
            await sink._submit()
            await sink._encoding
        edited = files(root, "ledger")[5]
        content = bytearray(edited.read_bytes())
        content[-20] ^= 1
        edited.write_bytes(content)
        assert sink.merge() > 10
        await sink.aclose()
        return edited

    edited = asyncio.run(write())
    found = check(root)
    assert told(found) == [("altered", f"segment {edited.relative_to(root)}")]
    assert any("segments were merged into others" in note for note in found.notes)
    assert len(files(root, "delays")) < 4


def test_retention_is_stated(tmp_path, key):
    root = tmp_path / "store"
    many(root, 2, key, hour=-5)
    many(root, 2, key, run="run-2", max_bytes=1, clock=lambda: START_NS / 1e9)
    found = check(root)
    assert (found.state, found.findings) == ("intact", [])
    assert any("retention removed 5 segments" in note and "limit of size" in note for note in found.notes)


def test_a_store_without_seal_can_be_sealed_from_now_on(tmp_path, key):
    root = tmp_path / "store"
    fill(root, [make_results(make_delays(10))])
    fill(root, [make_results(make_delays(10))], run="run-2", seal=key)
    found = check(root)
    assert (found.state, found.findings) == ("intact", [])
    assert "segments were there before sealing began" in found.notes[0]
    files(root, "delays")[0].unlink()
    assert [kind for kind, _ in told(check(root))] == ["missing"]


def test_writers_that_do_not_seal_are_refused(root, tmp_path, capsys):
    with pytest.raises(StoreError, match="the store is sealed, and what another writer adds would not be"):
        fill(root, [make_results(Delays.empty())], run="run-2")
    assert cli.main(["replay", EXAMPLE, "--store", str(root)]) == 1
    assert "the store is sealed" in capsys.readouterr().err
    assert check(root).state == "intact"


def test_a_writer_with_another_key_and_a_broken_seal_are_refused(root, tmp_path, key):
    (tmp_path / "other").mkdir()
    with pytest.raises(SealError, match=r"sealed by the key SHA256:\w+, yours is SHA256:"):
        fill(root, [], run="run-2", seal=new_key(tmp_path / "other"))
    lines = seal_path(root).read_bytes().splitlines(keepends=True)
    seal_path(root).write_bytes(b"".join(lines[:2] + lines[3:]))
    with pytest.raises(SealError, match=r"the seal is broken \(line 3: statement 2 before statement 3 missing\)"):
        fill(root, [], run="run-2", seal=key)
    seal_path(root).write_bytes(b"".join(lines))
    fill(root, [make_results(make_delays(3))], run="run-2", seal=key)
    assert check(root).state == "intact"


def test_what_appears_while_the_store_is_closed_is_never_adopted_in_silence(root, key):
    [delays] = files(root, "delays")
    added = delays.with_name("000000000500-000000000500.3.parquet")
    added.write_bytes(delays.read_bytes())
    fill(root, [], run="run-2", seal=key)
    [only] = check(root).findings
    assert (only.kind, only.what) == (
        "inserted",
        f"segment {added.relative_to(root)}, which appeared while the store was closed",
    )


class Killed(BaseException):
    """What a writer does after it does not happen, as if it had been killed."""


@pytest.mark.parametrize("step", ["put", "merged before", "merged after", "removed"])
def test_a_writer_killed_between_a_file_and_its_statement(tmp_path, key, monkeypatch, soon, step):
    """Whatever is left verifies, and the next writer goes on from there."""
    root = tmp_path / "store"
    name, _, when = step.partition(" ")
    old = getattr(sealed_segments.StoreSeal, name)

    def dies(self, *given):
        if when != "before" and name != "put":
            old(self, *given)
        raise Killed

    many(root, 2, key, hour=-5)

    async def run():
        sink = EmbeddedStore(root, fsync=False, flush_interval_s=60.0, seal=key, clock=lambda: START_NS / 1e9)
        await sink.open(header("killed"))
        for n in range(6):
            await sink.write(make_results(make_delays(4, seed=n, start_ns=START_NS + n * 10**9)))
            await sink._submit()
            await sink._encoding
        monkeypatch.setattr(sealed_segments.StoreSeal, name, dies)
        sink._max_bytes = 1
        do = {"put": lambda: sink._put("runs", segments.NO_HOUR, tables.runs_table(header("put")))}
        with pytest.raises(Killed):
            (do | {"merged": sink.merge, "removed": sink._retain})[name]()
        sink._ticker.cancel()
        sink._release()

    asyncio.run(run())
    monkeypatch.setattr(sealed_segments.StoreSeal, name, old)
    found = check(root)
    assert (found.state, found.findings) == ("open", [])
    assert found.unsealed == (1 if step in ("put", "merged before") else 0)
    assert any("though its removal is stated" in note for note in found.notes) == (step == "removed")
    packets = StoreReader(root).summary().packets
    fill(root, [], run="next", seal=key)
    found = check(root)
    assert (found.state, found.findings, found.unsealed) == ("intact", [], 0)
    assert not any("though its removal is stated" in note for note in found.notes)
    if step != "removed":
        assert StoreReader(root).summary().packets == packets


def test_one_statement_takes_the_place_of_many(tmp_path, key, monkeypatch, soon):
    monkeypatch.setattr(sealed_segments, "_KEPT_LINES", 20)
    root = tmp_path / "store"
    many(root, 2, key, hour=-5)
    head = check(root).head
    many(root, 30, key, run="run-2", max_bytes=1, clock=lambda: START_NS / 1e9)
    size = seal_path(root).stat().st_size

    async def merge():
        sink = EmbeddedStore(root, fsync=False, flush_interval_s=60.0, seal=key)
        await sink.open(header("run-3"))
        sink.merge()
        sink._retain()
        assert seal_path(root).stat().st_size < size / 3
        await sink.write(make_results(make_delays(4)))
        await sink.aclose()

    asyncio.run(merge())
    found = check(root)
    assert (found.state, found.findings) == ("intact", [])
    assert any("retention removed 5 segments" in note for note in found.notes)
    assert head in found.heads
    first = seal_path(root).read_bytes().splitlines(keepends=True)
    # A shortened seal is a chain like any other.
    seal_path(root).write_bytes(b"".join(first[:1] + first[2:]))
    assert check(root).state == "broken"
    seal_path(root).write_bytes(b"".join(first[1:]))
    with pytest.raises(SealError, match="not a seal of MACE"):
        check(root)


def test_a_store_that_is_written_meanwhile_is_open_and_not_broken(tmp_path, key, soon):
    """The verifier may read statements of segments that merging then removes."""
    root = tmp_path / "store"
    many(root, 6, key, closed=False)
    live = files(root, "delays")
    original = sealed_segments.StoreState.take

    async def resumed():
        sink = EmbeddedStore(root, fsync=False, flush_interval_s=60.0, seal=key)
        await sink.open(header("run-2"))
        merged = False

        def take(self, statement):
            nonlocal merged
            original(self, statement)
            if statement.kind == "run" and not merged and statement.fields.get("run") == "run-2" and self is not mine:
                merged = True
                sink.merge()

        mine = sink._seal._state
        sealed_segments.StoreState.take = take
        try:
            found = check(root)
        finally:
            sealed_segments.StoreState.take = original
        assert merged
        assert not live[0].exists()
        await sink.aclose()
        return found

    found = asyncio.run(resumed())
    assert (found.state, found.findings) == ("open", [])
    assert check(root).state == "intact"


def test_a_full_disk_loses_no_statement_in_silence(tmp_path, key, monkeypatch):
    """A statement that cannot be written makes its segment count as not stored, and the seal stays whole lines."""
    root = tmp_path / "store"
    write, broken = os.write, []

    def short(fd, data):
        if broken and Path(f"/proc/self/fd/{fd}").readlink() == seal_path(root):
            if len(broken) == 1:
                broken.append(fd)
                return write(fd, bytes(data)[:30])
            raise OSError(28, "No space left on device")
        return write(fd, data)

    monkeypatch.setattr(os, "write", short)

    async def run():
        sink = EmbeddedStore(root, fsync=False, flush_interval_s=60.0, seal=key)
        await sink.open(header())
        await sink.write(make_results(make_delays(4)))
        broken.append(True)
        with pytest.raises(StoreError, match="cannot write"):
            await sink.aclose()

    asyncio.run(run())
    broken.clear()
    found = check(root)
    assert (found.state, found.findings) == ("open", [])
    assert found.unsealed >= 1
    assert not found.notes[0].startswith("the seal ends within a line")
    fill(root, [], run="run-2", seal=key)
    assert check(root).state == "intact"


def test_wide_windows_are_sealed_too(tmp_path, key):
    root = tmp_path / "store"
    asyncio.run(write_run(root, "a", rows=False, seal=key))
    found = check(root)
    assert (found.state, found.findings) == ("intact", [])
    pieces = files(root, wide.STANDING)
    assert pieces
    data = bytearray(pieces[0].read_bytes())
    data[len(data) // 2] ^= 1
    pieces[0].write_bytes(data)
    assert told(check(root)) == [("altered", f"segment {pieces[0].relative_to(root)}")]


def test_edited_windows_are_not_folded(tmp_path, key, monkeypatch):
    """Wide windows of an edited segment would be sealed as if it were whole."""
    root = tmp_path / "store"
    with monkeypatch.context() as patch:
        patch.setattr(embedded, "fold_windows", lambda *_, **__: 0)
        asyncio.run(write_run(root, "a", rows=False, seal=key))
    edited = files(root, "windows")[0]
    table = pq.read_table(edited).slice(1)
    edited.write_bytes(tables.encode(tables.grown(table, "windows"), "windows"))
    hours = {each.hour for each in segments.listing(root, "windows")}
    asyncio.run(write_run(root, "b", rows=False, seal=key, hours=1, begin_ns=(max(hours) + 1) * HOUR_NS))
    about = [wide.About.of(each) for each in files(root, wide.STANDING)]
    assert about
    assert min(hours) not in set().union(*(each.hours for each in about))
