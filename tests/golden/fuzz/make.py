"""Makes the corpus: `PYTHONPATH=. python tests/golden/fuzz/make.py` writes the files and the result of reading each.

Existing files stay for ever with their results; new files go into `CASES`. Mutations have fixed seeds.
"""

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import zstandard

from contracts.wire import FILE_HEAD, FrameKind
from tests import perfetto_traces as traces
from tests.made_capture import TOPOLOGY, batches, capture_bytes, encode, forge, stream_tag, traffic
from tests.made_pcap import PcapFrame, block, pcap, pcapng, through_nat, udp_frames, written
from tests.made_tracedat import MadeTraceDat
from tests.made_tracedat import traffic as pages
from tests.unit.collector.perfetto.test_source import NAMES, records
from tests.unit.collector.text.test_source import FTRACE, PERF

HERE = Path(__file__).parent
GOLDEN = HERE.parent
MIB = 1 << 20


def flipped(raw: bytes, seed: int, bits: int = 3) -> bytes:
    """Flip some bits."""
    out = bytearray(raw)
    rng = np.random.default_rng((seed, len(raw)))
    for at, bit in zip(rng.integers(16, len(raw), bits).tolist(), rng.integers(0, 8, bits).tolist(), strict=True):
        out[at] ^= 1 << bit
    return bytes(out)


def holed(raw: bytes, seed: int, size: int = 64) -> bytes:
    """Replace some bytes by zeros, as a disk may after a crash."""
    at = int(np.random.default_rng((seed, 1)).integers(len(raw) // 3, len(raw) * 4 // 5))
    return raw[:at] + bytes(size) + raw[at + size :]


def without(raw: bytes, seed: int, size: int = 37) -> bytes:
    """Remove some bytes, so that all later bytes move."""
    at = int(np.random.default_rng((seed, 2)).integers(len(raw) // 3, len(raw) - size))
    return raw[:at] + raw[at + size :]


def flipped_in(raw: bytes, mark: bytes, which: int) -> bytes:
    """Flip a bit behind one of the occurrences of a mark."""
    starts = [at for at in range(len(raw)) if raw.startswith(mark, at)]
    return patched(raw, starts[which] + 2, "<B", raw[starts[which] + 2] ^ 4)


def patched(raw: bytes, at: int, code: str, value: int) -> bytes:
    """Replace a number."""
    out = bytearray(raw)
    struct.pack_into(code, out, at, value)
    return bytes(out)


def zeros(mib: int) -> bytes:
    """Return zeros, compressed by zstd to few bytes."""
    return zstandard.ZstdCompressor(write_content_size=False).compress(bytes(mib * MIB))


def common(raw: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield (name, damaged file) for damage of files of any format."""
    yield "cut-in-its-head", raw[:21]
    yield "cut-in-the-middle", raw[: len(raw) // 2]
    yield "cut-before-the-end", raw[:-3]
    yield "flipped-anywhere", flipped(raw, 1, 6)
    yield "flipped-later", raw[: len(raw) // 2] + flipped(raw[len(raw) // 2 :], 2, 1)
    yield "zeros-inside", holed(raw, 3)
    yield "bytes-missing", without(raw, 4)
    yield "followed-by-noise", raw + np.random.default_rng(5).bytes(100)


def mace() -> Iterator[tuple[str, bytes]]:
    items = [TOPOLOGY, *batches(traffic(300), 50)]
    frames, raw = encode(items), capture_bytes(items)
    tag = stream_tag(frames[0])

    def with_frame(number: int, frame: bytes) -> bytes:
        return FILE_HEAD + b"".join([*frames[:number], frame, *frames[number + 1 :]])

    yield from common(raw)
    yield "cut-of-version-1", (GOLDEN / "wire-1" / "capture.mace").read_bytes()[:4000]
    for name, size in (("small", 4096), ("largest", 0), ("4-gib", 2**32 - 1)):
        bomb = forge(FrameKind.BATCH, b"", stored=zeros(72), raw_size=size or 48 * MIB, stream=tag, sequence=3)
        yield f"bomb-that-says-{name}", with_frame(3, bomb)
    yield (
        "size-beyond-the-file",
        with_frame(4, forge(FrameKind.BATCH, bytes(90), stored_size=2**31, stream=tag, sequence=4)),
    )
    yield "frame-again-and-again", FILE_HEAD + b"".join([*frames[:3], *[frames[2]] * 5, *frames[3:]])
    ring = [
        replace(one, peer_netns=other.netns, peer_ifindex=other.ifindex)
        for one, other in pairwise([*TOPOLOGY.devices, TOPOLOGY.devices[0]])
    ]
    yield "devices-plugged-in-a-ring", capture_bytes([replace(TOPOLOGY, devices=tuple(ring)), *items[1:]])


def tracedat() -> Iterator[tuple[str, bytes]]:
    size = 1024
    of_cpu = {0: pages(0, 2, page_size=size), 1: pages(1, 1, page_size=size)}
    plain = MadeTraceDat({"": of_cpu}, page_size=size)
    packed = replace(plain, algorithm="zlib")
    raw = plain.content()
    yield from common(packed.content())
    yield "version-6-cut", replace(plain, version=6).content()[: -size * 5 // 4]
    yield "pieces-flipped", flipped_in(replace(plain, algorithm="zstd").content(), b"\x28\xb5\x2f\xfd", -2)
    at = raw.find(of_cpu[0][1])
    yield "event-of-no-length", patched(raw, at + 16, "<Q", 2 << 32)
    yield "page-that-is-fuller-than-pages-are", patched(raw, at + 8, "<Q", 0x3FFFFFFF)
    (first,) = struct.unpack_from("<Q", raw, raw.find(b"none\x001\0") + 7)
    (length,) = struct.unpack_from("<Q", raw, first + 8)
    yield "options-in-a-circle", patched(raw, first + 16 + length - 8, "<Q", first)
    yield "size-of-options-beyond-the-file", patched(raw, first + 8, "<Q", 2**63)
    for told in (1024, 64 * MIB, 2**32 - 4096):
        bomb = MadeTraceDat({"": {0: of_cpu[0][:1]}}, algorithm="zstd", page_size=size)
        body = zeros(72)
        bomb.packed = lambda page, body=body, bomb=bomb: body if len(page) == 1024 else MadeTraceDat.packed(bomb, page)  # type: ignore[method-assign]
        made = bomb.content()
        yield f"bomb-that-says-{told}", patched(made, made.rfind(struct.pack("<II", len(body), size)) + 4, "<I", told)


def text() -> Iterator[tuple[str, bytes]]:
    golden = (GOLDEN / "other-tools" / "trace.txt").read_bytes()
    raw = golden[: golden.find(b"\n", 2200) + 1]
    yield from common(raw)
    yield "perf-script-flipped", flipped(PERF.encode() * 4, 7, 12)
    yield "no-line-ends", FTRACE.encode() + raw.replace(b"\n", b" ") * 2
    for name, one in (("times", b"[0] 1.000000: "), ("losses", b"CPU:0 [LOST "), ("commands", b"-1 [001] ")):
        yield f"endless-{name}", FTRACE.encode() + one * 150 + b"\n" + PERF.encode()
    yield "losses-beyond-counting", FTRACE.replace("LOST 7 ", f"LOST {10**30} ").encode()
    yield "times-beyond-counting", FTRACE.replace(" 1234.5", f" {10**25}.5").encode()


def perfetto() -> Iterator[tuple[str, bytes]]:
    given = records(40)
    raw = traces.make(given, NAMES, per_bundle=8, lost=(2,), stats=((0, 3), (1, 4)))
    small = traces.make(given, NAMES, form="described", numbers=True, xmit_done=True, compress="deflate", per_bundle=8)

    def packet(field: int, payload: bytes) -> bytes:
        return traces._field(1, traces._field(field, payload))

    yield from common(raw)
    yield "compressed-and-flipped", flipped(small, 8)
    yield "compressed-and-cut", small[:-30]
    yield "packet-of-4-gib", raw + b"\x0a\xff\xff\xff\xff\x0f" + bytes(100)
    yield "number-without-end", raw + b"\x0a" + b"\xff" * 11 + bytes(30)
    yield "bomb-of-zstd", raw + packet(133, zeros(72))
    yield "bomb-of-deflate", small + packet(50, zlib.compress(bytes(4 * MIB), 9))
    yield "many-bombs", small + packet(133, zstandard.compress(traces._field(1, traces._field(900, bytes(MIB))))) * 9
    inside = raw
    for _ in range(20):
        inside = packet(50, zlib.compress(inside))
    yield "compressed-in-compressed", small + inside
    nested = b""
    for _ in range(500):
        nested = traces._field(8, nested)
    yield "event-inside-event", small + packet(1, traces._field(1, 0) + traces._field(2, traces._field(327, nested)))


SENT, TIMES = udp_frames(20)
OUTER = written(through_nat(SENT), TIMES + 9_000)
"""Capture at the outer device: the undamaged half of each pair."""


def packets() -> Iterator[tuple[str, bytes]]:
    rows = [PcapFrame(int(time), frame.tobytes()) for frame, time in zip(SENT, TIMES, strict=True)]
    raw, ng = pcap(rows), pcapng(rows, interfaces=2)
    yield from common(raw)
    yield from ((f"ng-{name}", content) for name, content in common(ng) if "head" not in name)
    at = 24 + 10 * (16 + len(rows[0].data))
    yield "packet-of-2-gib", patched(raw, at + 8, "<I", 2**31)
    yield "packet-of-no-bytes-for-ever", raw + bytes(16) * 60
    yield "time-beyond-counting", patched(raw, at, "<Q", 2**64 - 1)
    yield "ng-block-that-leads-to-itself", ng + struct.pack("<III", 6, 0, 0)
    yield "ng-block-of-4-gib", ng + struct.pack("<III", 6, 2**32 - 4, 0) + bytes(40)
    yield "ng-block-of-two-sizes", ng + block(5, bytes(12), "<")[:-4] + struct.pack("<I", 4096)
    yield "ng-options-without-end", ng + block(1, struct.pack("<HHI", 1, 0, 0) + b"\x09\0\xff\xff", "<") * 20
    yield "ng-interface-that-is-not", ng + block(6, struct.pack("<IIIII", 77, 0, 0, 4, 4) + bytes(4), "<")


CASES = {"mace": mace, "tracedat": tracedat, "text": text, "perfetto": perfetto, "pcap": packets}


def main() -> None:
    from tests.unit.collector.test_fuzz_corpus import told

    expected: dict[str, object] = {}
    (HERE / "outer.pcap").write_bytes(OUTER)
    for form, cases in CASES.items():
        (HERE / form).mkdir(exist_ok=True)
        for name, content in cases():
            path = HERE / form / f"{name}.bin"
            path.write_bytes(content)
            expected[f"{form}/{name}"] = {kind: told(path, salvage=kind == "salvaged") for kind in ("read", "salvaged")}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(one)}" for name, one in expected.items())
    (HERE / "expected.json").write_text("{\n" + lines + "\n}\n")


if __name__ == "__main__":
    main()
