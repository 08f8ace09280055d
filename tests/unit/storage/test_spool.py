"""The spool: order, bounds, crashes and a full disk."""

import os
import struct
import subprocess

import pytest

from contracts.errors import StoreError, Unavailable
from storage.spool import Frame, Spool

MIB = 1 << 20


def spool(place, *, max_bytes=MIB, memory_bytes=MIB):
    made = Spool(place, max_bytes=max_bytes, memory_bytes=memory_bytes)
    made.open()
    return made


def frame(number, size=1000):
    return Frame(number.to_bytes(4, "big") + bytes(size - 4), rows=10, label=f"n{number}")


def number(taken):
    assert taken is not None
    found = taken.frame
    assert found.label == f"n{int.from_bytes(found.payload[:4], 'big')}"
    return int.from_bytes(found.payload[:4], "big")


def taken(some):
    """Take all frames in order; the spool is then empty."""
    numbers = []
    while (found := some.take()) is not None:
        numbers.append(number(found))
        some.acknowledge(found)
    return numbers


def left(place):
    """Return the frames that a killed process leaves for the next, read from a copy of the files."""
    copy = place.with_name("copy")
    subprocess.run(["rm", "-rf", copy], check=True)
    subprocess.run(["cp", "-r", place, copy], check=True)
    some = spool(copy)
    numbers = taken(some)
    some.close()
    return numbers


@pytest.mark.parametrize("memory_bytes", [MIB, 0], ids=["kept in memory too", "from the disk"])
def test_first_in_first_out(tmp_path, memory_bytes):
    some = spool(tmp_path, memory_bytes=memory_bytes)
    for n in range(50):
        some.append(frame(n))
    assert some.rows == 500
    first, second = some.take(), some.take()
    assert (number(first), number(second)) == (0, 1)
    some.acknowledge(second)
    assert some.rows == 500, "one that is behind another under way stays for a crash"
    some.acknowledge(first)
    assert some.rows == 480
    assert taken(some) == list(range(2, 50))
    assert (some.rows, some.frames, some.dropped_rows) == (0, 0, 0)
    some.close()


def test_unacknowledged_frames_survive_a_crash(tmp_path):
    place = tmp_path / "spool"
    some = spool(place)
    for n in range(20):
        some.append(frame(n))
        if n % 4 == 3:
            under_way = some.take()
            assert number(under_way) == n // 4
            some.acknowledge(under_way)
        assert left(place) == list(range((n + 1) // 4, n + 1))
    some.close()
    again = spool(place)
    again.append(frame(20))
    assert taken(again) == list(range(5, 21))
    again.close()
    assert left(place) == []


def test_delivered_frames_free_their_room(tmp_path):
    some = spool(tmp_path, max_bytes=64 * MIB)
    for n in range(40):
        some.append(frame(n, 300_000))
        assert taken(some) == [n]
    assert some.bytes < 5 * MIB
    assert sum(p.stat().st_size for p in tmp_path.glob("*.frames")) == some.bytes
    some.close()


def test_a_full_spool_drops_the_oldest_and_counts_them(tmp_path):
    some = spool(tmp_path, max_bytes=200_000)
    for n in range(500):
        some.append(frame(n))
        assert sum(p.stat().st_size for p in tmp_path.glob("*.frames")) <= 200_000
    kept = some.frames
    assert 150 < kept < 200
    assert some.dropped_rows == 10 * (500 - kept)
    assert taken(some) == list(range(500 - kept, 500))
    some.close()


def test_a_frame_in_delivery_is_not_dropped(tmp_path):
    """A frame in delivery may be stored already; its file stays, with the other frames in it."""
    some = spool(tmp_path, max_bytes=100_000)
    some.append(frame(0))
    under_way = some.take()
    assert number(under_way) == 0
    for n in range(1, 300):
        some.append(frame(n))
    some.acknowledge(under_way)
    kept = some.frames
    numbers = taken(some)
    beside = [n for n in numbers if n < 10]
    assert 0 < len(beside) < 7
    assert numbers == [*range(1, 1 + len(beside)), *range(300 - kept + len(beside), 300)]
    assert some.dropped_rows == 10 * (299 - kept)
    some.close()


@pytest.mark.parametrize("cut", [1, 500, 1000, 1030])
def test_an_incomplete_frame_at_the_end_is_removed(tmp_path, cut):
    some = spool(tmp_path)
    for n in range(3):
        some.append(frame(n))
    some.close()
    (path,) = tmp_path.glob("*.frames")
    os.truncate(path, path.stat().st_size - cut)
    again = spool(tmp_path)
    again.append(frame(7))
    assert taken(again) == [0, 1, 7] if cut < 1026 else [0, 7]
    again.close()


def test_a_damaged_frame_is_skipped_and_counted(tmp_path):
    some = spool(tmp_path)
    for n in range(3):
        some.append(frame(n))
    some.close()
    (path,) = tmp_path.glob("*.frames")
    data = bytearray(path.read_bytes())
    data[1500] ^= 1  # in the second frame's payload
    path.write_bytes(data)
    again = spool(tmp_path)
    assert taken(again) == [0, 2]
    assert again.damaged_rows == 10
    again.close()


def test_a_lost_acknowledgement_delivers_again(tmp_path):
    some = spool(tmp_path)
    for n in range(3):
        some.append(frame(n))
    some.acknowledge(some.take())
    some.close()
    (tmp_path / "acknowledged").write_bytes(struct.pack("<QQI", 1, 2, 3))
    again = spool(tmp_path)
    assert taken(again) == [0, 1, 2]
    again.close()


def test_one_process_at_a_time(tmp_path):
    some = spool(tmp_path)
    with pytest.raises(Unavailable, match=rf"process {os.getpid()} is using it; .*\[sinks.NAME\] spool"):
        spool(tmp_path)
    some.close()
    spool(tmp_path).close()


def test_a_path_that_cannot_be_created(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="the spool cannot be used: Not a directory"):
        spool(tmp_path / "file" / "spool")


def test_in_memory_only():
    some = spool(None, memory_bytes=10_000)
    for n in range(25):
        some.append(frame(n))
    under_way = some.take()
    assert number(under_way) == 15
    for n in range(25, 30):
        some.append(frame(n))
    # Frame 15 is in delivery, so that 16 to 20 were dropped.
    some.acknowledge(under_way)
    assert some.dropped_rows == 200
    assert number(some.take()) == 21
    assert some.close() == 90


def test_frames_in_memory_are_written_at_the_end(tmp_path):
    """Frames in memory are written at the end, also to a full spool: the newest stay, dropped ones are counted."""
    some = spool(tmp_path / "spool", max_bytes=20_000)
    for n in range(40):
        some.append(frame(n))
        # The disk is full now and then, so that every third frame is in memory only.
        entry = some._entries[-1]
        entry.segment = 0 if n % 3 == 0 else entry.segment
    before = some.rows + some.dropped_rows
    assert before == 400
    assert some.close() == 0
    assert some.rows + some.dropped_rows == 400
    again = spool(tmp_path / "spool")
    assert again.rows >= some.rows
    again.close()


def test_closing_drops_frames_that_cannot_be_written(tmp_path):
    some = spool(tmp_path / "spool")
    for n in range(5):
        some.append(frame(n))
    (tmp_path / "spool").rename(tmp_path / "away")  # the disk is gone: no file can be created
    some._end_segment()
    for n in range(5, 8):
        some.append(frame(n))
    assert (some.rows, some.frames) == (80, 8)
    assert some.close() == 30
    assert (some.rows, some.frames) == (50, 5)


def test_frames_behind_damage_are_found(tmp_path):
    some = spool(tmp_path / "spool")
    for n in range(6):
        some.append(frame(n))
    some.close()
    (path,) = (tmp_path / "spool").glob("*.frames")
    raw = bytearray(path.read_bytes())
    size = len(raw) // 6
    raw[2 * size + 5] ^= 0x40  # the length in the third frame's header
    path.write_bytes(bytes(raw[: 4 * size]) + b"MSP1, but no frame" + bytes(raw[4 * size :]))
    again = spool(tmp_path / "spool")
    assert taken(again) == [0, 1, 3, 4, 5]
    again.close()


def test_foreign_files_are_kept(tmp_path):
    (tmp_path / "spool").mkdir()
    for name in ("notes.frames", "-1.frames", "99999999999999999999.frames", "1.frames"):
        (tmp_path / "spool" / name).write_bytes(b"whatever")
    some = spool(tmp_path / "spool")
    some.append(frame(1))
    some.close()
    assert (tmp_path / "spool" / "notes.frames").read_bytes() == b"whatever"
    assert left(tmp_path / "spool") == [1]


@pytest.mark.needs("root")
def test_a_full_disk(tmp_path):
    """Rows wait in memory, within bounds, and go to the disk again when there is room."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", tmp_path], check=True)
    try:
        (tmp_path / "somebody's").write_bytes(bytes(100_000))
        place = tmp_path / "spool"
        some = spool(place, max_bytes=MIB, memory_bytes=50_000)
        for n in range(300):
            some.append(frame(n))
        assert "No space left on device" in some.trouble
        on_disk = left_count(place)
        assert 100 < on_disk < 170
        assert some.frames == on_disk + 50
        assert some.dropped_rows == 10 * (300 - some.frames)
        (tmp_path / "somebody's").unlink()
        some.append(frame(300))
        assert not some.trouble
        numbers = taken(some)
        assert numbers == [*range(on_disk), *range(300 - (len(numbers) - on_disk - 1), 301)]
        some.close()
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def left_count(place):
    """Count the whole frames in the files; each has 24 + 4 bytes of head and label around 1000 bytes."""
    return sum(p.stat().st_size // 1025 for p in place.glob("*.frames"))
