"""Targets of the fuzzer: each makes an input from a number, and reads it as MACE would.

An attempt may succeed or raise an error of MACE's own (`MaceError`). Anything else is a finding: another exception, a
figure that changed silently, too much time, memory or too many files (the limits are in `__main__`).
"""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import json
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from collector.files import PCAP_PAIR, FileOptions, recording_of
from contracts import config
from contracts.errors import MaceError
from contracts.wire import FILE_HEAD
from mace import api
from mace.tools.output import READERS
from mace.tools.output import read as read_tool_output
from storage.capture import CaptureSink
from storage.journal import Journal
from storage.query import StoreReader
from storage.sealing.check import check
from storage.sealing.keys import SealKey
from storage.spool import Frame, Spool
from tests.fuzz.mutation import frames_of, mutated, resealed
from tests.hostile import EVIL, FRAMES, HONEST, RECORDS, Driven, evil_header, of_stream
from tests.made_capture import HEADER, TOPOLOGY, stream_tag
from tests.made_results import make_delays, make_results, make_windows
from tests.places import GOLDEN, ROOT
from tests.sealing import new_key
from tests.unit.storage.stored import fill


@dataclass(frozen=True, slots=True)
class FuzzTarget:
    """One kind of input: a function that makes it from a number, and a function that reads it."""

    make: Callable[[random.Random], bytes]
    read: Callable[[bytes, Path], None]
    """Reads an input; gets an empty directory of its own."""


def attempt(target: FuzzTarget, data: bytes) -> None:
    """Read one input; any exception raised is a finding."""
    with tempfile.TemporaryDirectory(prefix="mace-fuzz-") as place:
        try:
            target.read(data, Path(place))
        except MaceError as error:
            # The command line prints the message, which must be one line of text.
            str(error).encode("utf-8", "surrogateescape")


def _corpus(*patterns: str) -> list[bytes]:
    found = [path.read_bytes() for pattern in patterns for path in sorted(GOLDEN.glob(pattern))]
    assert found, patterns
    return found


def _mutations(*patterns: str) -> Callable[[random.Random], bytes]:
    @functools.cache
    def corpus() -> list[bytes]:
        return _corpus(*patterns)

    return lambda drawn: mutated(drawn.choice(corpus()), drawn, corpus())


# Recordings ---------------------------------------------------------------------------------------------------------


@functools.cache
def _captures() -> list[bytes]:
    return _corpus("wire-2/capture.mace", "other-tools/live.mace")


def _capture(drawn: random.Random) -> bytes:
    whole = drawn.choice(_captures())
    return resealed(whole, drawn) if drawn.random() < 0.8 else mutated(whole, drawn, _captures())


def _replay(path: Path, place: Path, *, salvage: bool = False) -> None:
    recording = api.open(path, salvage=salvage)
    recording.store(place / "store").summary()


def _recording(name: str) -> Callable[[bytes, Path], None]:
    def read(data: bytes, place: Path) -> None:
        path = place / name
        path.write_bytes(data)
        try:
            _replay(path, place)
        except MaceError:
            if name.endswith(".mace"):
                (place / "again").mkdir()
                _replay(path, place / "again", salvage=True)
            raise

    return read


def _pcap(data: bytes, place: Path) -> None:
    path = place / "inner.pcap"
    path.write_bytes(data)
    pair = recording_of(PCAP_PAIR, (path, GOLDEN / "other-tools" / "outer.pcap"), FileOptions())
    with pair.reader() as reader:
        for _ in reader.items():
            pass


# Files that MACE stores ---------------------------------------------------------------------------------------------


@functools.cache
def _stored() -> tuple[dict[str, bytes], str]:
    """Return the files of a store, and its figures."""
    with tempfile.TemporaryDirectory() as made:
        path = Path(made) / "store"
        delays = make_delays(200, containers=2)
        fill(path, [make_results(delays, containers=2, windows=make_windows(delays))])
        files = {str(each.relative_to(path)): each.read_bytes() for each in path.rglob("*") if each.is_file()}
        return files, str(StoreReader(path).summary().as_dict())


def _segment(drawn: random.Random) -> bytes:
    files, _ = _stored()
    name = drawn.choice(sorted(files))
    return name.encode() + b"\0" + mutated(files[name], drawn, list(files.values()))


def _read_store(data: bytes, place: Path) -> None:
    files, right = _stored()
    name, _, content = data.partition(b"\0")
    for each, whole in files.items():
        path = place / each
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if each == name.decode() else whole)
    for skip_damaged in (False, True):
        found = str(StoreReader(place, skip_damaged=skip_damaged).summary().as_dict())
        assert skip_damaged or found == right, "figures of a damaged store differ without a word"


@functools.cache
def _sealed() -> tuple[dict[str, bytes], dict[str, bytes], SealKey]:
    """Return the files of a sealed recording and of a sealed store, and the key."""
    with tempfile.TemporaryDirectory() as made:
        place, key = Path(made), new_key(Path(made))

        async def record() -> None:
            sink = CaptureSink(place / "a" / "sealed.mace", seal=key)
            await sink.open(HEADER)
            await sink.write(TOPOLOGY)
            await sink.aclose()

        (place / "a").mkdir()
        asyncio.run(record())
        fill(place / "b", [make_results(make_delays(20))], seal=key)
        recording, store = (
            {
                str(each.relative_to(place / name)): each.read_bytes()
                for each in (place / name).rglob("*")
                if each.is_file()
            }
            for name in ("a", "b")
        )
        return recording, store, key


def _seal(drawn: random.Random) -> bytes:
    """Return a damaged seal; mostly with statements that its own key has signed after the damage."""
    recording, store, key = _sealed()
    which = drawn.randrange(2)
    whole = (recording["sealed.mace.seal"], store["seal"])[which]
    if drawn.random() < 0.3:
        return bytes([which]) + mutated(whole, drawn)
    lines, head = [], ""
    for number, line in enumerate(whole.splitlines()):
        statement = json.loads(line.partition(b" ")[2]) | {"prev": head, "n": number}
        told = json.dumps(statement).encode()
        if number and drawn.random() < 0.3:
            told = mutated(told, drawn).replace(b"\n", b" ")
        lines.append(base64.b64encode(key.sign(told)) + b" " + told)
        head = hashlib.sha256(lines[-1]).hexdigest()
    return bytes([which]) + b"\n".join([*lines, b""])


def _read_seal(data: bytes, place: Path) -> None:
    recording, store, _ = _sealed()
    files, name = (store, "seal") if data[:1] == b"\1" else (recording, "sealed.mace.seal")
    for each, whole in files.items():
        path = place / each
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data[1:] if each == name else whole)
    found = check(place if name == "seal" else place / "sealed.mace")
    json.dumps(found.as_dict()), found.line(), list(map(str, found.findings))


@functools.cache
def _spooled() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as made:
        spool = Spool(Path(made), max_bytes=1 << 20, memory_bytes=0)
        spool.open()
        for number in range(20):
            spool.append(Frame(bytes([number]) * 100 * number, rows=number))
        spool.close()
        return {each.name: each.read_bytes() for each in Path(made).iterdir()}


def _spool(drawn: random.Random) -> bytes:
    name = drawn.choice([name for name in _spooled() if name != "lock"])
    return name.encode() + b"\0" + mutated(_spooled()[name], drawn, list(_spooled().values()))


def _read_spool(data: bytes, place: Path) -> None:
    name, _, content = data.partition(b"\0")
    for each, whole in _spooled().items():
        (place / each).write_bytes(content if each == name.decode() else whole)
    spool = Spool(place, max_bytes=1 << 20, memory_bytes=0)
    spool.open()
    while (taken := spool.take()) is not None:
        spool.acknowledge(taken)
    spool.append(Frame(b"new", rows=1))
    spool.close()


@functools.cache
def _journalled() -> bytes:
    from storage.journal import Commit, EntryKind

    with tempfile.TemporaryDirectory() as made:
        journal = Journal(Path(made), fsync=False)
        journal.open()
        for number in range(20):
            journal.append(EntryKind.FRAME, f"host-{number % 3}", bytes([number]) * 50)
        journal.commit(Commit(7, journal.position, 100_000_000))
        journal.sync(journal.taken())
        journal.close()
        [path] = Path(made).glob("*.journal")
        return path.read_bytes()


def _read_journal(data: bytes, place: Path) -> None:
    (place / "0000000001.journal").write_bytes(data)
    journal = Journal(place, fsync=False)
    journal.open()
    try:
        for _ in journal.read():
            pass
    finally:
        journal.close()


# Over a broker ------------------------------------------------------------------------------------------------------


@functools.cache
def _evil_stream() -> bytes:
    return FILE_HEAD + b"".join([evil_header(), *map(of_stream, FRAMES[1:])])


def _read_messages(data: bytes, place: Path) -> None:
    """Send the frames to an ingest among those of an honest host, all of whose rows must be stored."""
    frames, driven = frames_of(data), Driven(place / "store")
    for index, honest in enumerate(FRAMES):
        for each in frames[index :: len(FRAMES)]:
            driven.send(EVIL, each)
        driven.send(HONEST, honest)
        assert driven.next_of(HONEST, stream_tag(honest)) in (index + 1, 0), "the honest host is not heard"
        if index == len(FRAMES) // 2:
            driven.sync()
            driven.kill()
            driven.start()
    assert driven.ingest.counts.given_up == 0, "a fault inside the border of a host"
    driven.end()
    assert driven.stored(HONEST).ledger.records == RECORDS


# Text from users and tools ------------------------------------------------------------------------------------------


@functools.cache
def _configurations() -> list[bytes]:
    return [path.read_bytes() for path in sorted(ROOT.glob("deploy/**/*.toml"))]


def _read_configuration(data: bytes, place: Path) -> None:
    path = place / "mace.toml"
    path.write_bytes(data)
    config.load(path)


@functools.cache
def _outputs() -> list[bytes]:
    forms = json.loads((GOLDEN / "tool-output" / "forms.json").read_text())
    printed = ["\n".join(form["printed"]).encode() for form in forms]
    return printed + _corpus("both-sources/ping.txt", "tool-output/*.txt", "tool-output/lab/*.txt")


def _output(drawn: random.Random) -> bytes:
    return mutated(drawn.choice(_outputs()), drawn, _outputs())


def _read_output(data: bytes, _: Path) -> None:
    """Read the output like the command, with and without the name of the tool."""
    lines = data.decode("utf-8", "replace").splitlines()
    for reader in (None, *READERS.values()):
        try:
            read_tool_output(lines, reader and reader())
        except MaceError as error:
            told = str(error)
        else:
            told = ""
        assert len(told) < 1000, "a message longer than anybody reads"


TARGETS: Final = {
    "capture": FuzzTarget(_capture, _recording("fuzzed.mace")),
    "tracedat": FuzzTarget(
        _mutations("fuzz/tracedat/*.bin", "tracecmd/v7-none.dat", "tracecmd/v6.dat"), _recording("f.dat")
    ),
    "perfetto": FuzzTarget(_mutations("fuzz/perfetto/*.bin", "perfetto-1/generic.pftrace"), _recording("f.pftrace")),
    "text": FuzzTarget(_mutations("fuzz/text/*.bin", "other-tools/trace.txt"), _recording("f.txt")),
    "pcap": FuzzTarget(_mutations("fuzz/pcap/*.bin", "other-tools/inner.pcap", "captures/*.pcap*"), _pcap),
    "store": FuzzTarget(_segment, _read_store),
    "seal": FuzzTarget(_seal, _read_seal),
    "ingest": FuzzTarget(lambda drawn: resealed(_evil_stream(), drawn), _read_messages),
    "spool": FuzzTarget(_spool, _read_spool),
    "journal": FuzzTarget(lambda drawn: mutated(_journalled(), drawn), _read_journal),
    "configuration": FuzzTarget(lambda drawn: mutated(drawn.choice(_configurations()), drawn), _read_configuration),
    "output": FuzzTarget(_output, _read_output),
}
"""Targets by their names for `./dev fuzz`."""
