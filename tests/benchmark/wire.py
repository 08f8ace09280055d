"""Rate and size of the wire format, against Arrow IPC and Parquet with the same compressor on the same batches.

    wire_encode, wire_decode     records/s, batches <-> frames in memory, one thread
    wire_bytes_per_record        bytes of all frames of the stream per record
    wire_content_...             these figures for batches with content, without a peer
    capture_read                 records/s, a file in the page cache -> batches
    wire_small_encode, ..._decode  frames/s, batches of 20 records (a quiet host that is flushed often)

The peer is Arrow IPC with zstd for encoding and decoding (the faster of the two), and Parquet with zstd level 1 for the
size (the smaller). Neither verifies its input as thoroughly as the wire format.
"""

import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from collector.capture.source import read
from contracts import wire
from contracts.records import Batch
from tests.benchmark.figures import figure
from tests.made_capture import HEADER, TOPOLOGY, batches, capture_bytes, traffic

RECORDS = 1_000_000
BATCH = 50_000
SMALL = 20
ROUNDS = 9


def _rates(work: Callable[[], object], count: int) -> list[float]:
    work()  # first touch of memory and code
    rates = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work()
        rates.append(count / (time.perf_counter() - start))
    return rates


def _row(name: str, unit: str, ours: Sequence[float], peer: str, theirs: Sequence[float], n: int) -> dict[str, Any]:
    value, peer_value = statistics.median(ours), statistics.median(theirs)
    return {
        "name": name,
        "value": round(value, 3),
        "unit": unit,
        "peer": peer,
        "peer_value": round(peer_value, 3),
        "ratio": round(value / peer_value, 3),
        "n": n,
        "spread": round((max(ours) - min(ours)) / value, 3),
    }


def _tables(stream: Sequence[Batch]) -> list[pa.RecordBatch]:
    return [pa.RecordBatch.from_pydict(dict(batch.columns())) for batch in stream]


def _arrow_write(tables: Sequence[pa.RecordBatch]) -> bytes:
    sink = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=1), use_threads=False)
    with pa.ipc.new_stream(sink, tables[0].schema, options=options) as writer:
        for table in tables:
            writer.write_batch(table)
    return sink.getvalue()


def _arrow_read(content: bytes) -> list[dict[str, Any]]:
    options = pa.ipc.IpcReadOptions(use_threads=False)
    with pa.ipc.open_stream(content, options=options) as reader:
        return [{name: table[name].to_numpy() for name in table.schema.names} for table in reader]


def _parquet_write(tables: Sequence[pa.RecordBatch]) -> bytes:
    sink = io.BytesIO()
    with pq.ParquetWriter(
        sink,
        tables[0].schema,
        compression="zstd",
        compression_level=1,
        use_dictionary=[name for name in tables[0].schema.names if name != "ts_ns"],
        column_encoding={"ts_ns": "DELTA_BINARY_PACKED"},
    ) as writer:
        for table in tables:
            writer.write_batch(table)
    return sink.getvalue()


def _encode(stream: Sequence[Batch]) -> list[bytes]:
    encoder = wire.Encoder()
    return [encoder.header(HEADER), encoder.topology(TOPOLOGY), *map(encoder.batch, stream), encoder.end()]


def _decode(frames: Sequence[bytes]) -> list[wire.WireItem]:
    decoder = wire.Decoder()
    return [decoder.frame(frame) for frame in frames]


def run() -> list[dict[str, Any]]:
    """Return one row per figure: medians of rounds; `spread` is (max - min) / median, or both if there is no peer."""
    whole = traffic(RECORDS)
    stream = batches(whole, BATCH)
    frames, tables = _encode(stream), _tables(stream)
    arrow, parquet = _arrow_write(tables), _parquet_write(tables)
    rows = [
        _row(
            "wire_encode",
            "records/s",
            _rates(lambda: _encode(stream), RECORDS),
            "arrow ipc zstd-1",
            _rates(lambda: _arrow_write(_tables(stream)), RECORDS),
            RECORDS,
        ),
        _row(
            "wire_decode",
            "records/s",
            _rates(lambda: _decode(frames), RECORDS),
            "arrow ipc zstd-1",
            _rates(lambda: _arrow_read(arrow), RECORDS),
            RECORDS,
        ),
        _row(
            "wire_bytes_per_record",
            "bytes",
            [sum(map(len, frames)) / RECORDS],
            "parquet zstd-1",
            [len(parquet) / RECORDS],
            RECORDS,
        ),
        _row(
            "wire_bytes_per_record",
            "bytes",
            [sum(map(len, frames)) / RECORDS],
            "arrow ipc zstd-1",
            [len(arrow) / RECORDS],
            RECORDS,
        ),
    ]
    read_too = batches(traffic(RECORDS, content=True), BATCH)
    read_frames = _encode(read_too)
    rows += [
        figure("wire_content_encode", "records/s", _rates(lambda: _encode(read_too), RECORDS)),
        figure("wire_content_decode", "records/s", _rates(lambda: _decode(read_frames), RECORDS)),
        figure("wire_content_bytes_per_record", "bytes", [sum(map(len, read_frames)) / RECORDS]),
    ]
    with tempfile.TemporaryDirectory() as directory:
        ours, theirs = Path(directory) / "a.mace", Path(directory) / "a.parquet"
        ours.write_bytes(capture_bytes([TOPOLOGY, *stream]))
        theirs.write_bytes(parquet)
        rows.append(
            _row(
                "capture_read",
                "records/s",
                _rates(lambda: list(read(ours)), RECORDS),
                "parquet zstd-1",
                _rates(lambda: pq.read_table(theirs, use_threads=False), RECORDS),
                RECORDS,
            )
        )
    few = batches(whole[: SMALL * 2_000], SMALL)
    few_frames, few_tables = _encode(few), _tables(few)
    few_arrow = _arrow_write(few_tables)
    rows += [
        _row(
            "wire_small_encode",
            "frames/s",
            _rates(lambda: _encode(few), len(few)),
            "arrow ipc zstd-1",
            _rates(lambda: _arrow_write(_tables(few)), len(few)),
            len(few),
        ),
        _row(
            "wire_small_decode",
            "frames/s",
            _rates(lambda: _decode(few_frames), len(few)),
            "arrow ipc zstd-1",
            _rates(lambda: _arrow_read(few_arrow), len(few)),
            len(few),
        ),
        _row(
            "wire_small_bytes_per_record",
            "bytes",
            [sum(map(len, few_frames)) / len(few) / SMALL],
            "arrow ipc zstd-1",
            [len(few_arrow) / len(few) / SMALL],
            len(few),
        ),
    ]
    return rows


if __name__ == "__main__":
    for row in run():
        print(json.dumps(row))
