"""No file is written through a link, nor into a directory whose owner could place a link there."""

import os

import pytest

from contracts.errors import StoreError
from storage.capture import CaptureSink
from storage.ownership import refuse_foreign
from storage.perfetto.file import PerfettoTrace
from storage.places import LocalPlace
from storage.segments import write_bytes, write_whole
from storage.spool import Spool
from tests.made_results import make_delays, make_results
from tests.unit.storage.stored import fill

NOBODY = 65534


@pytest.fixture
def precious(tmp_path):
    """Make a file that must not change."""
    path = tmp_path / "precious"
    path.write_text("as it was")
    yield path
    assert path.read_text() == "as it was"


def open_spool(path):
    spool = Spool(path, max_bytes=1 << 20, memory_bytes=1 << 20)
    try:
        spool.open()
    finally:
        spool.close()


def test_the_lock_of_a_store(tmp_path, precious):
    store = tmp_path / "store"
    store.mkdir()
    (store / "lock").symlink_to(precious)
    with pytest.raises(StoreError, match="cannot open the store"):
        fill(store, [make_results(make_delays(1))])


@pytest.mark.parametrize("name", ["lock", "acknowledged"])
def test_the_files_of_a_spool(tmp_path, precious, name):
    spool = tmp_path / "spool" / "publish"
    spool.mkdir(parents=True)
    (spool / name).symlink_to(precious)
    with pytest.raises(StoreError, match="the spool cannot be used"):
        open_spool(spool)


def test_temporary_files(tmp_path, precious):
    (tmp_path / "whole.tmp").symlink_to(precious)
    with pytest.raises(OSError, match="symbolic links"):
        write_whole(tmp_path / "whole", write_bytes(memoryview(b"other")), fsync=False)
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / "part").symlink_to(precious)
    with pytest.raises(OSError, match="symbolic links"), LocalPlace(tmp_path / "place").sink("part"):
        pass
    (tmp_path / "trace.part").symlink_to(precious)
    with pytest.raises(StoreError, match="cannot be created"):
        PerfettoTrace(tmp_path / "trace")


def test_a_recording(tmp_path, precious):
    link = tmp_path / "recording"
    link.symlink_to(precious)
    with pytest.raises(StoreError, match="exists already"):
        CaptureSink(link)._open(None)  # type: ignore[arg-type]


@pytest.mark.needs("root")
def test_a_store_of_another_user(tmp_path):
    store = tmp_path / "store"
    fill(store, [make_results(make_delays(1))])
    os.chown(store, NOBODY, NOBODY)
    before = sorted(p.name for p in store.rglob("*"))
    with pytest.raises(StoreError, match=f"{store}: it belongs to user {NOBODY}, this process to user 0"):
        fill(store, [make_results(make_delays(1))], run="run-2")
    assert sorted(p.name for p in store.rglob("*")) == before


@pytest.mark.needs("root")
@pytest.mark.parametrize("whose", ["spool", "spool/publish"])
def test_a_spool_of_another_user(tmp_path, whose):
    spool = tmp_path / "spool" / "publish"
    spool.mkdir(parents=True)
    os.chown(tmp_path / whose, NOBODY, NOBODY)
    with pytest.raises(StoreError, match=f"{tmp_path / whose}: it belongs to user {NOBODY}"):
        open_spool(spool)
    assert list(spool.iterdir()) == []


@pytest.mark.needs("root")
def test_a_link_of_another_user(tmp_path):
    ours = tmp_path / "ours"
    ours.mkdir()
    link = tmp_path / "link"
    link.symlink_to(ours)
    refuse_foreign(link)
    os.lchown(link, NOBODY, NOBODY)
    with pytest.raises(StoreError, match="the link belongs to user"):
        refuse_foreign(link)


def test_an_own_directory_is_accepted(tmp_path):
    refuse_foreign(tmp_path)
