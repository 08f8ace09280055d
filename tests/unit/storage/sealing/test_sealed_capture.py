import asyncio
import base64
import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap

import pytest

from contracts import wire
from contracts.clock import KernelClock
from contracts.errors import SealError, StoreError
from storage.capture import CaptureSink
from storage.sealing.check import check
from storage.sealing.places import seal_path
from tests.made_capture import HEADER, TOPOLOGY, batches, capture_bytes, traffic
from tests.places import ROOT
from tests.sealing import new_key, write_key

ITEMS = [TOPOLOGY, *batches(traffic(2_000), 200)]
FRAMES = len(ITEMS) + 2
FIRST_BATCH = 2


def record(path, key, items=ITEMS, header=HEADER, **how):
    async def run():
        sink = CaptureSink(path, seal=key, **how)
        await sink.open(header)
        try:
            for item in items:
                await sink.write(item)
        finally:
            await sink.aclose()
        return sink

    return asyncio.run(run())


def cut(data):
    """Return a capture's signature and frames."""
    at, found = len(wire.FILE_HEAD), [data[: len(wire.FILE_HEAD)]]
    while at < len(data):
        size = wire.HEAD_SIZE + wire.parse_head(data[at : at + wire.HEAD_SIZE]).stored
        found.append(data[at : at + size])
        at += size
    return found


def utc(batch, at):
    return int(batch.ts_ns[at]) + HEADER.clock.offset_ns


@pytest.fixture
def key(tmp_path):
    return new_key(tmp_path)


@pytest.fixture
def path(tmp_path, key):
    record(tmp_path / "a.mace", key)
    return tmp_path / "a.mace"


def kinds(found):
    return [each.kind for each in found.findings]


def test_a_sealed_recording_is_the_stream_and_verifies(path, key):
    assert path.read_bytes() == capture_bytes(ITEMS)
    found = check(path, key=key.public)
    assert (found.state, found.known_key, found.findings, found.notes) == ("intact", True, [], [])
    assert (found.verified, found.statements, found.unsealed) == (FRAMES, FRAMES + 2, 0)
    assert found.bytes == path.stat().st_size - len(wire.FILE_HEAD)
    assert found.clocks[0][1].uncertainty_ns == HEADER.clock.uncertainty_ns
    assert len(found.clocks) == 2


def test_the_seal_of_another_key(path, tmp_path):
    other = new_key(tmp_path)
    found = check(path, key=other.public)
    assert (found.state, found.known_key) == ("other key", False)
    assert check(path).known_key is None


@pytest.mark.parametrize("frame", [0, 1, FIRST_BATCH, FRAMES - 1])
@pytest.mark.parametrize("part", ["head", "payload", "whole, with right checksums"])
def test_an_edited_frame_is_named_with_its_times(path, frame, part):
    pieces = cut(path.read_bytes())
    old = bytearray(pieces[1 + frame])
    if part == "head":
        old[8] ^= 1
    else:
        old[-1] ^= 1
    if part.startswith("whole"):
        head = wire.parse_head(old)
        fields = (wire.SYNC, head.version, head.message, head.compressed, 0)
        sums = (head.stream, head.stored, head.sequence, head.raw)
        bare = wire.HEAD.pack(*fields, *sums, wire.crc32(old[wire.HEAD_SIZE :]), 0)[:-4]
        old[: wire.HEAD_SIZE] = bare + wire.crc32(bare).to_bytes(4, "little")
        wire.whole_head(bytes(old))
    pieces[1 + frame] = bytes(old)
    path.write_bytes(b"".join(pieces))
    found = check(path)
    [only] = found.findings
    assert (found.state, only.kind) == ("broken", "altered")
    assert only.what.startswith(f"frame {frame}, ")
    if frame == FIRST_BATCH:
        assert (only.from_utc_ns, only.to_utc_ns) == (utc(ITEMS[1], 0), utc(ITEMS[1], -1))
    assert found.verified == FRAMES - 1


def test_a_gap_names_the_frames_and_the_time(path):
    pieces = cut(path.read_bytes())
    path.write_bytes(b"".join(pieces[:4] + pieces[6:]))
    [only] = check(path).findings
    assert (only.kind, only.what) == ("missing", "frames 3 to 4")
    assert (only.from_utc_ns, only.to_utc_ns) == (utc(ITEMS[2], 0), utc(ITEMS[3], -1))


@pytest.mark.parametrize("whole", [True, False])
def test_a_truncated_capture_names_what_is_missing(path, whole):
    pieces = cut(path.read_bytes())
    path.write_bytes(b"".join(pieces[:8]) + (b"" if whole else pieces[8][:50]))
    found = check(path)
    told = [(each.kind, each.what) for each in found.findings]
    if whole:
        assert told == [("missing", f"frames 7 to {FRAMES - 1}")]
    else:
        assert told[0][0] == "altered"
        assert told[0][1].startswith("frame 7, ")
        assert told[1:] == [("missing", f"frames 8 to {FRAMES - 1}")]
    assert found.verified == 7


def test_frames_out_of_order_repeated_and_inserted(path):
    pieces = cut(path.read_bytes())
    path.write_bytes(b"".join([*pieces[:3], pieces[4], pieces[3], *pieces[5:]]))
    [only] = check(path).findings
    assert only.kind == "moved"
    assert only.what.startswith("frame 2 at byte")
    path.write_bytes(b"".join([*pieces[:4], pieces[3], *pieces[4:]]))
    assert kinds(check(path)) == ["repeated"]
    path.write_bytes(b"".join([*pieces[:4], b"x" * 100, *pieces[4:]]))
    assert kinds(check(path)) == ["inserted"]
    foreign = cut(capture_bytes([TOPOLOGY, *batches(traffic(600, seed=9), 200)]))
    path.write_bytes(b"".join([*pieces[:4], foreign[4], *pieces[4:]]))
    [only] = check(path).findings
    assert (only.kind, only.what.split(",")[0]) == ("inserted", "a frame with the number 3")
    path.write_bytes(b"MACE\r\n\x1a\n\x01\0\0\0" + b"".join(pieces[1:]))
    assert kinds(check(path)) == ["altered"]
    path.write_bytes(b"")
    assert "missing" in kinds(check(path))


def test_the_seal_of_another_recording(path, tmp_path, key):
    record(tmp_path / "b.mace", key, header=dataclasses.replace(HEADER, run="another"))
    seal_path(tmp_path / "b.mace").rename(seal_path(path))
    [only] = check(path).findings
    assert only.kind == "foreign"
    assert "run another of host measured.example" in only.what


def lines(path):
    return seal_path(path).read_bytes().splitlines(keepends=True)


def test_edits_of_the_seal_are_found(path, tmp_path, key):
    whole = lines(path)
    seal = seal_path(path)
    seal.write_bytes(b"".join(whole[:5] + whole[6:]))
    found = check(path)
    assert kinds(found) == ["seal", "seal", "inserted"]
    assert "statement 5 before statement 6 missing" in found.findings[0].what
    seal.write_bytes(b"".join([*whole[:3], whole[4], whole[3], *whole[5:]]))
    assert "missing" in check(path).findings[0].what
    edited = whole[4].replace(b'"size":', b'"size":1')
    seal.write_bytes(b"".join([*whole[:4], edited, *whole[5:]]))
    assert "line 5: not signed by the seal's key" in check(path).findings[0].what
    # A statement by the same key from another seal, in the right place.
    record(tmp_path / "b.mace", key, header=dataclasses.replace(HEADER, run="another"))
    seal.write_bytes(b"".join([*whole[:4], lines(tmp_path / "b.mace")[4], *whole[5:]]))
    assert "follows another line" in check(path).findings[0].what


def test_a_seal_made_anew_with_another_key_is_of_another_key(path, tmp_path, key):
    """Whoever edits the recording can seal it again, but not with the operator's key."""
    (tmp_path / "mallory").mkdir()
    record(path, new_key(tmp_path / "mallory"), overwrite=True)
    assert check(path).state == "intact"
    assert check(path, key=key.public).state == "other key"


def test_a_cut_of_seal_and_recording_at_one_place_is_no_intact_seal(path):
    """It looks as if the writer had been killed there, and `--head` shows that it was not."""
    head = check(path).head
    pieces = cut(path.read_bytes())
    path.write_bytes(b"".join(pieces[:6]))
    seal_path(path).write_bytes(b"".join(lines(path)[:6]))
    found = check(path)
    assert (found.state, found.findings, found.verified) == ("open", [], 5)
    assert head not in found.heads


def test_a_killed_writer_leaves_a_verifiable_prefix(tmp_path):
    key = write_key(tmp_path / "k.pem")
    script = f"""
        import asyncio, os, signal
        from pathlib import Path
        from storage.capture import CaptureSink
        from storage.sealing.keys import seal_key
        from tests.made_capture import HEADER, TOPOLOGY, batches, traffic
        async def run():
            sink = CaptureSink({str(tmp_path / "a.mace")!r}, seal=seal_key(Path({str(key)!r})))
            await sink.open(HEADER)
            await sink.write(TOPOLOGY)
            for batch in batches(traffic(1_000), 200):
                await sink.write(batch)
            os.kill(os.getpid(), signal.SIGKILL)
        asyncio.run(run())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    found = check(tmp_path / "a.mace")
    assert (found.state, found.findings, found.verified, found.unsealed) == ("open", [], 7, 0)
    # Killed between a frame and its statement, and within one.
    seal = seal_path(tmp_path / "a.mace")
    whole = seal.read_bytes().splitlines(keepends=True)
    seal.write_bytes(b"".join(whole[:-1]) + whole[-1][:40])
    found = check(tmp_path / "a.mace")
    assert (found.state, found.findings, found.verified, found.unsealed) == ("open", [], 6, 1)
    assert "ends within a line (40 bytes)" in found.notes[0]
    with (tmp_path / "a.mace").open("ab") as file:
        file.write(wire.SYNC + b"half a frame")
    assert check(tmp_path / "a.mace").findings == []


def test_an_existing_seal_is_not_overwritten_unless_asked(path, key):
    path.unlink()
    with pytest.raises(StoreError, match=r"a\.mace\.seal: a seal exists already"):
        record(path, key)
    assert not path.exists()
    record(path, key, overwrite=True)
    assert check(path).state == "intact"


def test_what_is_no_file_cannot_be_sealed(tmp_path, key):
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    try:
        with pytest.raises(StoreError, match="not a regular file, so it cannot be sealed"):
            record(tmp_path / "fifo", key, overwrite=True)
    finally:
        os.close(reader)


def test_a_seal_that_cannot_be_written_ends_the_recording(tmp_path, key):
    """The seal of small frames is larger than they are, so that it meets the limit first."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, before[1]))
    try:
        with pytest.raises(StoreError, match="seal cannot be written: File too large"):
            record(tmp_path / "a.mace", key, [TOPOLOGY, *batches(traffic(200), 4)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    found = check(tmp_path / "a.mace")
    assert (found.state, found.findings) == ("open", [])
    assert found.verified > 2


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "not a seal of MACE"),
        (b"hello\n", "not a seal of MACE"),
        (b"A" * 88 + b' {"key": 3}\n', "not a seal of MACE"),
        (b"A" * 88 + b" " + b"[" * 100_000 + b"\n", "not a seal of MACE"),
    ],
)
def test_what_is_no_seal_is_one_clear_line(path, content, told):
    seal_path(path).write_bytes(content)
    with pytest.raises(SealError, match=told):
        check(path)
    seal_path(path).unlink()
    with pytest.raises(SealError, match=r"not sealed \(there is no"):
        check(path)


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "frame", "frame": "3", "at": 0, "size": 0, "sha256": ""},
        {"kind": "frame", "frame": -3, "at": 0, "size": 0, "sha256": ""},
        {"kind": "frame", "frame": 1 << 70, "at": 0, "size": 0, "sha256": ""},
        {"kind": "end", "frames": None},
        {"kind": "new in 2030"},
        {"kind": "end", "clock": {"monotonic_ns": "x"}},
        {"kind": 3},
        {"mace-seal": 2},
        {"utc_ns": "now"},
    ],
)
def test_signed_statements_of_a_hostile_or_newer_writer_are_errors(path, key, fields):
    """The key in a seal is the seal's own, so that anyone can sign anything."""
    [begin, *_] = lines(path)
    told = {"mace-seal": 1, "n": 1, "prev": "", "kind": "end", "utc_ns": 0, **fields}
    statement = json.dumps(told).encode()
    line = base64.b64encode(key.sign(statement)) + b" " + statement + b"\n"
    seal_path(path).write_bytes(begin + line)
    with pytest.raises(SealError) as found:
        check(path)
    assert "\n" not in str(found.value)


@pytest.mark.needs("openssl")
def test_openssl_alone_verifies_a_line(tmp_path, path, key):
    """As docs/seal.md shows."""
    signature, _, statement = lines(path)[3].rstrip(b"\n").partition(b" ")
    (tmp_path / "signature").write_bytes(base64.b64decode(signature))
    (tmp_path / "statement").write_bytes(statement)
    call = ["openssl", "pkeyutl", "-verify", "-rawin", "-inkey", "key.pem"]
    call += ["-in", "statement", "-sigfile", "signature"]
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "Verified Successfully" in done.stdout


def test_the_kernels_clock_travels_in_header_and_seal(tmp_path, key):
    kernel = KernelClock("synchronised", 2_345_000, 12_000)
    header = dataclasses.replace(HEADER, clock=dataclasses.replace(HEADER.clock, kernel=kernel))
    record(tmp_path / "a.mace", key, header=header)
    assert check(tmp_path / "a.mace").clocks[0][1] == header.clock
