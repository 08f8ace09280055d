"""A flipped bit in a stored segment is an error that names the segment, never a wrong figure."""

import asyncio
import json
import random
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contracts.errors import StoreError
from mace import cli
from storage import checksum, segments, sql, tables
from storage.check import check
from storage.embedded import EmbeddedStore
from storage.query import StoreReader
from tests.made_results import header, make_delays, make_results, make_windows
from tests.unit.storage.stored import fill


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Provide a store with several segments of `delays` and one or more of each other table."""
    path = tmp_path_factory.mktemp("whole") / "store"
    delays = [make_delays(40, first_packet=40 * n) for n in range(3)]
    fill(path, [make_results(each, windows=make_windows(each)) for each in delays], flush_rows=1)
    return path


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def figures(path, source="rows"):
    return json.dumps(StoreReader(path).summary(source=source).as_dict())


@pytest.mark.slow
@pytest.mark.parametrize("table", ["delays", "windows", "ledger", "runs"])
def test_no_flipped_bit_changes_a_figure(whole, tmp_path, table):
    source = "windows" if table == "windows" else "rows"
    right = figures(whole, source)
    path = tmp_path / "store"
    shutil.copytree(whole, path)
    victim = segments.listing(path, table)[0].path
    good = victim.read_bytes()
    drawn = random.Random(table)
    caught = unchanged = 0
    for _ in range(15):
        flip(victim, drawn.randrange(8 * len(good)))
        try:
            found = figures(path, source)
        except StoreError as error:
            caught += f"{victim}: damaged" in str(error)
        else:
            assert found == right
            unchanged += 1
        victim.write_bytes(good)
    # The checksum covers all but the 14 bytes of its own name in the footer.
    assert caught + unchanged == 15
    assert caught >= 10


def test_the_checksum_covers_every_bit_but_its_name(tmp_path):
    path = tmp_path / "segment.parquet"
    rows = pa.table({"n": pa.array(range(100), pa.int64())})
    with path.open("wb") as sink, checksum.SegmentWriter(sink, rows.schema, compression="zstd") as writer:
        writer.write(rows, 64)
    good = path.read_bytes()
    data = bytearray(good)
    missed = []
    for bit in range(8 * len(good)):
        data[bit // 8] ^= 1 << bit % 8
        if not checksum.mismatch_of(data):
            missed.append(bit // 8)
        data[bit // 8] ^= 1 << bit % 8
    name = good.rindex(checksum.KEY)
    assert set(missed) <= set(range(name - 2, name + len(checksum.KEY) + 2))
    assert checksum.mismatch_of(good) == ""
    assert pq.read_table(path, page_checksum_verification=True) == rows


def test_pages_have_checksums_that_other_readers_verify(whole):
    """The damaged file gets a correct checksum, so that only pyarrow's page checksums can find the damage."""
    good = segments.listing(whole, "delays")[0].path.read_bytes()
    refused = 0
    for at in range(200, 1200, 50):
        data = bytearray(good)
        data[at] ^= 1
        try:
            pq.read_table(pa.BufferReader(bytes(data)), page_checksum_verification=True)
        except OSError as error:
            refused += "CRC checksum verification failed" in str(error)
    assert refused > 0


@pytest.mark.parametrize(
    "how",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data + b"\0",
        lambda data: bytes(len(data)),
        lambda data: data[:-8] + bytes(4) + data[-4:],
    ],
)
def test_damage_of_other_kinds_is_named(whole, tmp_path, how):
    path = tmp_path / "store"
    shutil.copytree(whole, path)
    victim = segments.listing(path, "delays")[1].path
    victim.write_bytes(how(victim.read_bytes()))
    with pytest.raises(StoreError, match=f"{victim.name}: damaged"):
        StoreReader(path).summary()


def test_sql_names_the_damaged_segment_and_goes_on_without_it(whole, tmp_path):
    path = tmp_path / "store"
    shutil.copytree(whole, path)
    victim = segments.listing(path, "delays")[1]
    flip(victim.path, 8 * 900)
    with pytest.raises(StoreError, match=rf"{victim.path.name}: damaged.*--skip-damaged \({victim.rows} rows\)"):
        sql.table(StoreReader(path), "SELECT count(*) FROM delays")
    store = StoreReader(path, skip_damaged=True)
    rest = sql.table(store, "SELECT count(*) AS n FROM delays")["n"][0].as_py()
    assert rest == sum(each.rows for each in segments.listing(path, "delays")) - victim.rows
    assert store.rows_damaged() == victim.rows


def test_damage_after_a_first_check_is_found(whole, tmp_path):
    path = tmp_path / "store"
    shutil.copytree(whole, path)
    store = StoreReader(path)
    store.summary()
    victim = segments.listing(path, "delays")[1].path
    flip(victim, 8 * 900)
    with pytest.raises(StoreError, match=victim.name):
        store.summary()


def merged(path, damage):
    """Return the segments of a store of 40 flushes, after `damage` to its segments of `delays` and merging."""

    async def run():
        sink = EmbeddedStore(path, fsync=False, flush_interval_s=60, flush_rows=1)
        await sink.open(header())
        for n in range(40):
            await sink.write(make_results(make_delays(3, first_packet=3 * n)))
            await sink._submit()
        await sink._submit()
        damage([each.path for each in segments.listing(path, "delays")])
        sink.merge()
        await sink.aclose()

    asyncio.run(run())
    return [each for table in segments.TABLES for each in segments.listing(path, table)]


@pytest.mark.slow
def test_merging_does_not_give_damaged_rows_a_new_checksum(tmp_path, caplog):
    victims = []

    def damage(paths):
        victims.append(paths[20])
        flip(paths[20], 8 * 900)

    merged(tmp_path, damage)
    assert victims[0].exists()
    assert f"{victims[0]}: damaged" in caplog.text
    assert [path for one in check(tmp_path) for path in one.damaged] == victims


@pytest.mark.slow
def test_merged_segments_have_checksums(tmp_path):
    found = merged(tmp_path, lambda paths: None)
    assert any(each.first != each.last for each in found)
    assert all(checksum.bears_sum(each.path) for each in found)
    assert not any(one.damaged for one in check(tmp_path))


@pytest.mark.slow
def test_segments_without_checksum_are_read(whole, tmp_path):
    path = tmp_path / "store"
    shutil.copytree(whole, path)
    for each in segments.listing(path, "delays"):
        pq.write_table(pq.read_table(each.path, partitioning=None), each.path)
    assert figures(path) == figures(whole)
    checked = {one.table: one for one in check(path)}
    assert checked["delays"].without_checksum == checked["delays"].segments > 1
    assert checked["windows"].without_checksum == 0
    assert not any(one.damaged for one in checked.values())


def test_store_check_counts_and_names(whole, tmp_path, capsys):
    path = tmp_path / "store"
    shutil.copytree(whole, path)
    assert cli.main(["store", "check", "--store", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["damaged"] == {}
    assert {one["table"] for one in found["tables"]} == set(tables.COLUMNS)
    assert {one["table"]: one["rows"] for one in found["tables"]}["delays"] == 3 * len(make_delays(40))

    flipped, short = (each.path for each in segments.listing(path, "delays")[:2])
    flip(flipped, 8 * 900)
    fewer = short.with_name(short.name.replace(".", ".9", 1))
    short.rename(fewer)
    assert cli.main(["store", "check", "--store", str(path)]) == 1
    out = capsys.readouterr().out.replace("\n", "")
    assert f"{flipped}: damaged: its checksum is" in out
    assert f"{fewer}: damaged: it has" in out


def test_store_check_refuses_other_directories(tmp_path, capsys):
    assert cli.main(["store", "check", "--store", str(tmp_path)]) == 1
    assert "not a MACE store" in capsys.readouterr().err
