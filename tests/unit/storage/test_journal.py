"""The journal: synced entries are read back in order, and incomplete ones are not."""

import pytest

from contracts.errors import StoreError
from storage import journal
from storage.journal import FIRST_SLICE_NS, Commit, EntryKind, Journal


def written(path, *entries):
    kept = Journal(path, fsync=False)
    kept.open()
    positions = [kept.append(*entry) for entry in entries]
    kept.sync(kept.taken())
    kept.close()
    return positions


def read(path):
    """Read the journal as the next process does."""
    kept = Journal(path, fsync=False)
    kept.open()
    found = list(kept.read())
    kept.close()
    return found


def test_entries_come_back_in_order_over_several_files(tmp_path):
    first = written(tmp_path, (EntryKind.FRAME, "a", b"1"), (EntryKind.SNAPSHOT, "naïve", b""))
    second = written(tmp_path, (EntryKind.FRAME, "a", b"2"))
    found = read(tmp_path)
    assert [(e.kind, e.host, e.payload) for e in found] == [
        (EntryKind.FRAME, "a", b"1"),
        (EntryKind.SNAPSHOT, "naïve", b""),
        (EntryKind.FRAME, "a", b"2"),
    ]
    assert [e.position for e in found] == [*first, *second]
    assert first + second == sorted(first + second)


def test_a_commit_says_flush_and_place(tmp_path):
    kept = Journal(tmp_path, fsync=False)
    kept.open()
    kept.commit(Commit(7, (3, 1 << 40), 5))
    kept.sync(kept.taken())
    kept.close()
    (entry,) = read(tmp_path)
    assert Commit.parse(entry.payload) == Commit(7, (3, 1 << 40), 5)
    # A commit of version 1, which has no slice length.
    assert Commit.parse(entry.payload[:24]) == Commit(7, (3, 1 << 40), FIRST_SLICE_NS)


@pytest.mark.parametrize("cut", range(1, 18))
def test_an_incomplete_entry_is_ignored(tmp_path, cut):
    written(tmp_path, (EntryKind.FRAME, "a", b"whole"), (EntryKind.FRAME, "b", b"half!"))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-cut])
    assert [e.host for e in read(tmp_path)] == ["a"]


def test_entries_after_a_damaged_one_are_ignored(tmp_path):
    positions = written(tmp_path, *((EntryKind.FRAME, name, b"payload") for name in "abc"))
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    data[positions[2][1] - 1] ^= 1
    path.write_bytes(data)
    assert [e.host for e in read(tmp_path)] == ["a"]


def test_unsynced_entries_are_lost_at_a_kill(tmp_path):
    kept = Journal(tmp_path, fsync=False)
    kept.open()
    kept.append(EntryKind.FRAME, "a", b"1")
    kept.close()
    assert read(tmp_path) == []


def test_files_are_removed_when_they_are_no_longer_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "FILE_BYTES", 50)
    kept = Journal(tmp_path, fsync=False)
    kept.open()
    for n in range(6):
        kept.append(EntryKind.FRAME, "a", b"%d" % n * 30)
        kept.sync(kept.taken())
        if kept.is_full:
            kept.rotate()
    newest = kept.position[0]
    kept.forget_before(newest - 1)
    kept.close()
    assert [int(path.stem) for path in sorted(tmp_path.iterdir())] == [newest - 1, newest]


def test_an_impossible_journal_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write the journal"):
        Journal(tmp_path / "file" / "ingest").open()


def test_damage_is_reported_with_its_loss(tmp_path, caplog):
    positions = written(
        tmp_path, (EntryKind.FRAME, "a", b"one"), (EntryKind.FRAME, "a", b"two"), (EntryKind.FRAME, "a", b"three")
    )
    (path,) = tmp_path.iterdir()
    raw = bytearray(path.read_bytes())
    raw[positions[2][1] - 1] ^= 1
    path.write_bytes(raw)
    assert [e.payload for e in read(tmp_path)] == [b"one"]
    left = len(raw) - positions[1][1]
    assert f"damaged at byte {positions[1][1]}: its last {left} bytes are not read" in caplog.text


def test_an_entry_of_unknown_kind_does_not_hide_later_ones(tmp_path):
    written(tmp_path, (9, "a", b"later"), (EntryKind.FRAME, "b", b"1"))
    assert [(e.kind, e.host, e.payload) for e in read(tmp_path)] == [(9, "a", b"later"), (EntryKind.FRAME, "b", b"1")]


def test_a_commit_of_another_version_is_an_error(tmp_path):
    with pytest.raises(StoreError, match="commit of 40 bytes, of another version"):
        Commit.parse(bytes(40))


def test_entries_that_are_set_aside_are_kept_in_the_same_form_once(tmp_path):
    written(tmp_path, (EntryKind.FRAME, "a", b"1"), (EntryKind.FRAME, "a", b"2"), (EntryKind.FRAME, "b", b"3"))
    for _ in range(2):
        kept = Journal(tmp_path, fsync=False)
        kept.open()
        first, _, third = kept.read()
        paths = {kept.set_aside(entry) for entry in (first, third)}
        kept.close()
        (path,) = paths
        assert path == tmp_path / "0000000001.aside"
        found = journal._entries(1, path)
        assert [(e.kind, e.host, e.payload) for e in found] == [
            (EntryKind.FRAME, "a", b"1"),
            (EntryKind.FRAME, "b", b"3"),
        ]
