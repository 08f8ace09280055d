"""Events of any subsystem in a trace.dat are read with the kernel's own columns, including ftrace's own events."""

import json
import subprocess

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from collector.reading.options import FileOptions
from collector.tracecmd.reader import TraceDat
from collector.tracecmd.source import TraceCmdReader
from contracts.errors import CaptureError
from tests.made_own_events import EventWriter, texts
from tests.made_tracedat import MadeTraceDat
from tests.places import GOLDEN

IP = 0x8123_4567
MACHINES = {
    (version, order, long): EventWriter(order == "big", long)
    for version in (6, 7)
    for order in ("little", "big")
    for long in (8, 4)
}


def own_file(events, *, version=7, machine=None, algorithm="none", cpus=None):
    """Return a file of (event's name, its values), a microsecond apart; `cpus` assigns them to CPUs."""
    machine = machine or EventWriter()
    told = texts(machine.long)
    pages = {}
    for cpu in sorted(set(cpus or [0])):
        mine = [e for n, e in enumerate(events) if not cpus or cpus[n] == cpu]
        pages[cpu] = machine.pages([(1000, machine.event(name, **values)) for name, values in mine], 10**12)
    made = MadeTraceDat(
        {"": pages},
        version=version,
        big=machine.big,
        algorithm=algorithm,
        texts={name: text for name, text in told.items() if not name.startswith("ftrace:")},
        own=[text for name, text in told.items() if name.startswith("ftrace:")],
        pages_like=machine.layout,
    )
    return made.content()


def written(path, events, **form):
    path.write_bytes(own_file(events, **form))
    return path


EVENTS = [
    ("ftrace:print", {"ip": IP, "buf": b"mark 1\n\0"}),
    ("ftrace:print", {"ip": IP, "buf": b"na\xc3\xafve \xff, longer\n\0"}),
    ("ftrace:bprint", {"ip": IP, "fmt": IP + 8, "buf": b"\1\0\0\0\0\0\0\0"}),
    ("ftrace:bprint", {"ip": IP, "fmt": IP + 8, "buf": b""}),
    ("ftrace:bputs", {"ip": IP, "str": IP + 16}),
    ("ftrace:function", {"ip": IP, "parent_ip": IP + 1, "args": b""}),
    ("ftrace:function", {"ip": IP, "parent_ip": IP + 1, "args": b"\0" * 7 + b"\7"}),
    ("ftrace:funcgraph_entry", {"func": IP, "depth": 3}),
    ("ftrace:kernel_stack", {"caller": [IP, IP + 1, IP + 2]}),
    ("ftrace:kernel_stack", {"caller": [IP + n for n in range(12)]}),
    ("ftrace:raw_data", {"id": 9, "buf": b"\0\1\0\2"}),
    (
        "some:kinds",
        {"addr": b"\2\0\0\7\0\1", "name": b"eth0", "text": b"far\0", "near": b"by\0\0", "raw": b"\0\1\0\0",
         "below": -2, "yes": True, "far": -(2**40)},
    ),
]  # fmt: skip


@pytest.mark.parametrize("kind", MACHINES, ids=lambda kind: "-".join(map(str, kind)))
def test_written_events_are_read(tmp_path, kind):
    version, order, long = kind
    path = written(tmp_path / "trace.dat", EVENTS, version=version, machine=MACHINES[kind])
    with TraceDat(path) as trace:
        assert trace.byte_order == order
        assert {name for name, _ in EVENTS} <= set(trace.events)
        marks = trace.read("ftrace:print")
        assert marks["ts_ns"].tolist() == [10**12 + 1000, 10**12 + 2000]
        assert marks["cpu"].tolist() == [0, 0]
        assert marks["common_pid"].tolist() == [7, 7]
        assert marks["ip"].tolist() == [IP, IP]
        assert marks["buf"].tolist() == [b"mark 1\n", b"na\xc3\xafve \xff, longer\n"]
        printed = trace.read("ftrace:bprint")
        assert printed["fmt"].tolist() == [IP + 8] * 2
        assert printed["buf"].tolist() == [b"\1\0\0\0\0\0\0\0", b""]
        assert trace.read("ftrace:bputs")["str"].tolist() == [IP + 16]
        called = trace.read("ftrace:function")
        assert called["parent_ip"].tolist() == [IP + 1] * 2
        assert called["args"].tolist() == [b"", b"\0" * 7 + b"\7"]
        entered = trace.read("ftrace:funcgraph_entry")
        assert (entered["func"].tolist(), entered["depth"].tolist(), entered["args"].tolist()) == ([IP], [3], [b""])
        stacks = trace.read("ftrace:kernel_stack")
        assert stacks["size"].tolist() == [3, 12]
        callers = [np.frombuffer(one, f"{'<>'[order == 'big']}u{long}").tolist() for one in stacks["caller"]]
        assert callers == [[IP, IP + 1, IP + 2], [IP + n for n in range(12)]]
        raw = trace.read("ftrace:raw_data")
        assert (raw["id"].tolist(), raw["buf"].tolist()) == ([9], [b"\0\1\0\2"])
        others = trace.read("some:kinds")
        # Zero bytes inside an address are part of the address.
        assert others["addr"].tolist() == [[2, 0, 0, 7, 0, 1]]
        assert (others["name"].tolist(), others["text"].tolist(), others["near"].tolist()) == (
            [b"eth0"],
            [b"far"],
            [b"by"],
        )
        assert others["raw"].tolist() == [b"\0\1\0\0"]
        assert (others["below"].tolist(), others["yes"].tolist(), others["far"].tolist()) == ([-2], [1], [-(2**40)])


@pytest.mark.parametrize("event", texts(8))
def test_a_file_without_an_event_has_its_columns(tmp_path, event):
    with TraceDat(written(tmp_path / "some.dat", EVENTS)) as some, TraceDat(written(tmp_path / "none.dat", [])) as none:
        there, not_there = some.read(event), none.read(event)
    assert list(there) == list(not_there)
    for name, column in there.items():
        assert len(not_there[name]) == 0
        assert not_there[name].dtype.kind == column.dtype.kind
        assert not_there[name].shape[1:] == column.shape[1:]


TEXT = st.binary(max_size=300).map(lambda raw: raw.replace(b"\0", b" "))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    marks=st.lists(st.tuples(TEXT, st.integers(0, 3)), max_size=40),
    kind=st.sampled_from(sorted(MACHINES)),
    algorithm=st.sampled_from(["none", "zlib", "zstd"]),
)
def test_any_marks(tmp_path, marks, kind, algorithm):
    version, _, _ = kind
    events = [("ftrace:print", {"ip": IP, "buf": text + b"\0"}) for text, _ in marks]
    path = written(
        tmp_path / "trace.dat",
        events,
        version=version,
        machine=MACHINES[kind],
        algorithm=algorithm if version == 7 else "none",
        cpus=[cpu for _, cpu in marks],
    )
    with TraceDat(path) as trace:
        found = trace.read("ftrace:print")
        blocks = [text for block in trace.blocks("ftrace:print") for text in block["buf"].tolist()]
    # By CPU, and per CPU in the order of writing.
    for cpu in range(4):
        mine = found["buf"][found["cpu"] == cpu].tolist()
        assert mine == [text for text, one in marks if one == cpu]
    assert blocks == [text for cpu in range(4) for text, one in marks if one == cpu]


def test_one_long_text_does_not_widen_all_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("collector.tracecmd.reader._TEXT_MAX", 50_000)
    buffers = [b"short\0"] * 500 + [b"x" * 3000 + b"\0"] + [b"\0"]
    path = written(tmp_path / "trace.dat", [("ftrace:print", {"ip": IP, "buf": raw}) for raw in buffers])
    with TraceDat(path) as trace:
        found = trace.read("ftrace:print")["buf"]
    assert found.dtype == object
    assert found.tolist() == [raw[:-1] for raw in buffers]


def test_blocks_of_different_widths_are_joined(tmp_path, monkeypatch):
    monkeypatch.setattr("collector.tracecmd.reader._TEXT_MAX", 200_000)
    monkeypatch.setattr("collector.tracecmd.reader._PIECE_PAGES", 1)
    buffers = [b"short\0"] * 2000 + [b"x" * 3000 + b"\0"]
    path = written(tmp_path / "trace.dat", [("ftrace:print", {"ip": IP, "buf": raw}) for raw in buffers])
    with TraceDat(path) as trace:
        assert {block["buf"].dtype.kind for block in trace.blocks("ftrace:print")} == {"S"}
        assert trace.read("ftrace:print")["buf"].tolist() == [raw[:-1] for raw in buffers]


def test_an_event_shorter_than_its_format(tmp_path):
    machine = EventWriter()
    short = machine.event("ftrace:bputs", ip=IP, str=IP)[:-8]
    pages = machine.pages([(1, short)], 10**12)
    path = tmp_path / "trace.dat"
    path.write_bytes(MadeTraceDat({"": {0: pages}}, own=list(texts(8).values())).content())
    with TraceDat(path) as trace, pytest.raises(CaptureError, match="ftrace:bputs: an event that is shorter"):
        trace.read("ftrace:bputs")


@pytest.mark.parametrize("version", [6, 7])
def test_marks_do_not_make_a_replay(tmp_path, version):
    """A file without network events is refused; the error lists its events without ftrace's own."""
    path = written(tmp_path / "trace.dat", EVENTS, version=version)
    with pytest.raises(
        CaptureError, match=r"none of the network events that are measured was recorded; it has some:kinds$"
    ):
        TraceCmdReader(path, FileOptions()).open()


# --- real files ---------------------------------------------------------------------------------

FILES = GOLDEN / "tracecmd-own"
EXPECTED = json.loads((FILES / "expected.json").read_text())


@pytest.mark.parametrize("version", [6, 7])
def test_a_real_file_equals_trace_cmds_report(version):
    with TraceDat(FILES / f"v{version}.dat") as trace:
        assert trace.version == version
        marks, raw = trace.read("ftrace:print"), trace.read("ftrace:raw_data")
        ran, stacks = trace.read("sched:sched_process_exec"), trace.read("ftrace:kernel_stack")
    for found, event in ((marks, "print"), (raw, "raw_data"), (ran, "sched_process_exec"), (stacks, "kernel_stack")):
        told = [row[:2] for row in EXPECTED[event]]
        assert [list(row) for row in zip(found["ts_ns"].tolist(), found["cpu"].tolist(), strict=True)] == told
    texts = [row[2].encode("utf-8", "surrogateescape") for row in EXPECTED["print"]]
    assert len(texts) == 5
    assert [b"0x%x: %s" % (ip, buf.rstrip(b"\n")) for ip, buf in zip(marks["ip"], marks["buf"], strict=True)] == texts
    assert raw["id"].tolist() == [7]
    assert raw["buf"][0].startswith(b"\0\x01\0\x02\0\x03")
    assert set(ran["filename"].tolist()) == {b"/usr/bin/true"}
    for callers, row in zip(stacks["caller"], EXPECTED["kernel_stack"], strict=True):
        told = [int(one.removeprefix("\t=> "), 16) for one in (row[2], *row[3:])]
        # The report always prints eight bytes.
        mine = np.frombuffer(callers, "<u8").tolist()
        assert len(mine) > 4
        assert mine + [0] * (8 - len(mine)) == told


@pytest.mark.needs("trace-cmd")
@pytest.mark.parametrize(("version", "order"), [(6, "little"), (7, "little"), (7, "big")])
def test_trace_cmd_reads_the_made_files(tmp_path, version, order):
    """trace-cmd reads the made files, so they are valid."""
    marks = [event for event in EVENTS if event[0] == "ftrace:print"]
    path = written(tmp_path / "trace.dat", marks, version=version, machine=MACHINES[version, order, 8])
    told = subprocess.run(["trace-cmd", "report", "-N", str(path)], capture_output=True, check=True).stdout
    assert b"mark 1\n" in told
    assert b"na\xc3\xafve \xff, longer\n" in told


FUNCTIONS = json.loads((FILES / "functions.json").read_text())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_a_real_file(name):
    with TraceDat(FILES / name) as trace:
        for event, told in FUNCTIONS[name].items():
            found = trace.read(f"ftrace:{event}")
            assert [list(row) for row in zip(found["ts_ns"].tolist(), found["cpu"].tolist(), strict=True)] == told
            assert len(told) == (1 if event == "print" else 12)
        if name == "v6-functions.dat":
            called = trace.read("ftrace:function")
            # Two functions alternate.
            assert called["ip"].tolist() == called["ip"][:2].tolist() * 6
        else:
            left = trace.read("ftrace:funcgraph_exit")
            assert (left["rettime"] > left["calltime"]).all()
            assert set(trace.read("ftrace:funcgraph_entry")["func"].tolist()) == set(left["func"].tolist())
