"""Made trace.dat files give their known events, for every way of writing them."""

import struct

import numpy as np
import pytest

from collector.files import recording, sniff
from collector.reading.options import FileOptions
from collector.tracecmd.source import TraceCmdReader
from contracts.errors import CaptureError
from contracts.hooks import Hook
from contracts.interfaces import StreamHeader
from contracts.records import DTYPES, Batch
from contracts.topology import Topology
from tests.made_capture import TOPOLOGY, batches, capture_bytes
from tests.made_capture import traffic as mace_traffic
from tests.made_tracedat import FORMS, MadeTraceDat, event, to_big, traffic
from tests.ring_pages import EVENTS, Page, formats, layout, payload, simple_decode

PAGES = {"": {0: traffic(0, 7), 1: traffic(1, 4), 5: traffic(5, 1)}}


def replayed(path, options=None):
    """Replay a file; returns (header, all records, topologies, source)."""
    with TraceCmdReader(path, options) as reader:
        items = list(reader.items())
    batch = Batch.concatenate([item for item in items if isinstance(item, Batch)])
    return reader.header, batch, [item for item in items if isinstance(item, Topology)], reader


@pytest.fixture
def file(tmp_path):
    def make(content, name="trace.dat"):
        (tmp_path / name).write_bytes(content.content() if isinstance(content, MadeTraceDat) else content)
        return tmp_path / name

    return make


def expected(pages, page_size=4096):
    """Return (ts, cpu, hook's event, device, skb) of each event by the simple decoder, in order."""
    found = []
    for cpu, raw in pages.items():
        for page in simple_decode(b"".join(raw), layout(page_size), list(FORMS.values())):
            found += [(e.ts_ns, cpu, e.form.event.partition(":")[2], e.name, e.value("skbaddr")) for e in page]
    return sorted(found, key=lambda one: one[:2])


def check(path, pages, page_size=4096, options=None):
    header, batch, topologies, source = replayed(path, options)
    names = topologies[-1].sightings
    wanted = expected(pages, page_size)
    found = list(
        zip(
            batch.ts_ns.tolist(),
            batch.cpu.tolist(),
            [Hook(hook).name.lower() for hook in batch.hook.tolist()],
            [names[code].name for code in batch.dev.tolist()],
            strict=True,
        )
    )
    assert found == [one[:4] for one in wanted]
    # Buffers correspond one to one.
    pairs = set(zip(batch.skb_id.tolist(), [one[4] for one in wanted], strict=True))
    assert len(pairs) == len({one[4] for one in wanted}) == len(np.unique(batch.skb_id))
    return header, batch, source


@pytest.mark.parametrize("version", [6, 7])
def test_written_events_are_read(file, version):
    path = file(MadeTraceDat(PAGES, version=version))
    header, batch, source = check(path, PAGES[""])
    assert sniff(path).name == "trace.dat"
    assert (header.source, header.host, header.kernel, header.cpus) == ("tracecmd", "somewhere", "6.18.0", 6)
    assert set(header.hooks) == set(FORMS)
    assert source.bytes_read == source.bytes_total
    assert source.discarded == 0
    assert {int(n) for n in batch.l3_len[batch.hook == Hook.NET_DEV_QUEUE]} == {84}


@pytest.mark.parametrize("algorithm", ["zlib", "zstd"])
@pytest.mark.parametrize("packed", [True, False])
def test_compressed(file, algorithm, packed):
    check(file(MadeTraceDat(PAGES, algorithm=algorithm, sections_compressed=packed)), PAGES[""])


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("algorithm", ["none", "zstd"])
def test_of_a_big_endian_machine(file, version, algorithm):
    big = {cpu: [to_big(page, layout(), list(FORMS.values())) for page in raw] for cpu, raw in PAGES[""].items()}
    if version == 7 or algorithm == "none":
        check(file(MadeTraceDat({"": big}, version=version, big=True, algorithm=algorithm)), PAGES[""])


@pytest.mark.parametrize("page_size", [1024, 16384, 65536])
def test_pages_of_other_sizes(file, page_size):
    pages = {0: traffic(0, 3, page_size=page_size), 1: traffic(1, 2, page_size=page_size)}
    check(file(MadeTraceDat({"": pages}, page_size=page_size, algorithm="zstd")), pages, page_size)


@pytest.mark.parametrize("version", [6, 7])
def test_several_buffers_are_one_stream(file, version):
    queue, rest = traffic(0, 2), []
    for start in range(3):
        page = Page(layout(), 10**12 + start)
        page.event(event("skb:kfree_skb", 77, reason=5), 3)
        rest.append(page.bytes())
    path = file(MadeTraceDat({"": {}, "packets": {0: queue}, "drops": {0: rest}}, version=version))
    _, batch, _, _ = replayed(path)
    assert len(batch) == len(expected({0: queue})) + 3
    assert (np.diff(batch.ts_ns) >= 0).all()
    _, batch, _, _ = replayed(path, FileOptions(buffer="drops"))
    assert batch.hook.tolist() == [Hook.KFREE_SKB] * 3
    with pytest.raises(CaptureError, match=r"no buffer 'dropps' \(did you mean 'drops'\?\)"):
        replayed(path, FileOptions(buffer="dropps"))


def test_an_event_in_two_buffers_is_not_counted_twice(file):
    path = file(MadeTraceDat({"": {0: traffic(0, 2)}, "again": {0: traffic(0, 2)}}))
    with pytest.raises(
        CaptureError, match=r"buffers '(top' and 'again|again' and 'top)' both have net_dev_queue: choose one with"
    ):
        replayed(path)


def test_events_of_other_kinds_are_passed_over(file):
    made = MadeTraceDat(PAGES, events={name: EVENTS[name] for name in ("net:net_dev_queue", "net:netif_receive_skb")})
    header, batch, _, source = replayed(file(made))
    assert set(header.hooks) == {"net:net_dev_queue", "net:netif_receive_skb"}
    wanted = [one for one in expected(PAGES[""]) if one[2] in ("net_dev_queue", "netif_receive_skb")]
    assert len(batch) == len(wanted)
    assert source.skipped == len(expected(PAGES[""])) - len(wanted)


def test_a_file_without_network_events(file):
    made = MadeTraceDat(PAGES, events={"sched:sched_switch": (300, "int prev_pid")})
    with pytest.raises(CaptureError, match=r"none of the network events .*sched:sched_switch"):
        replayed(file(made))


def lost_pages(*missed):
    pages = []
    for number, lost in enumerate(missed):
        page = Page(layout(), 10**12 + 1000 * number, missed=lost)
        page.event(event("skb:consume_skb", 256 * number), 10)
        pages.append(page.bytes())
    return pages


@pytest.mark.parametrize("big", [False, True])
def test_lost_events(file, big):
    pages = lost_pages(None, 12, None, 3)
    if big:
        pages = [to_big(page, layout(), list(FORMS.values())) for page in pages]
    _, batch, _, source = replayed(file(MadeTraceDat({"": {0: pages}}, big=big)))
    assert batch.lost == 15
    assert batch.hook.tolist() == [Hook.CONSUME_SKB, Hook.LOST] + [Hook.CONSUME_SKB] * 2 + [Hook.LOST, Hook.CONSUME_SKB]
    assert not [line for line in source.warnings if "gaps" in line]


def test_gaps_without_a_count_take_the_kernels_total(file):
    stats = b"CPU: 0\nentries: 0\noverrun: 20\ncommit overrun: 1\ndropped events: 4\n\0"
    made = MadeTraceDat({"": {0: lost_pages(-1, 12, -1)}}, options=((2, stats),))
    _, batch, _, source = replayed(file(made))
    assert batch.lost == 25
    assert any("2 gaps have no number" in line for line in source.warnings)
    # A gap at the beginning has no earlier time.
    assert int(batch.ts_ns[0]) == 10**12 + 10
    _, batch, _, _ = replayed(file(MadeTraceDat({"": {0: lost_pages(-1, 12, -1)}})))
    assert batch.lost == 14


def test_losses_without_a_page_are_reported_at_the_end(file):
    stats = b"CPU: 0\noverrun: 0\ndropped events: 9\n\0"
    _, batch, _, _ = replayed(file(MadeTraceDat({"": {0: lost_pages(None)}}, options=((2, stats),))))
    assert batch.hook.tolist() == [Hook.CONSUME_SKB, Hook.LOST]
    assert batch.lost == 9


# Clocks -------------------------------------------------------------------------------------------


def test_the_time_of_day(file, tmp_path):
    date = (5, b"Linux a 6.1 x\0"), (1, b"0x64b0a\0")
    header, batch, _, _ = replayed(file(MadeTraceDat(PAGES, options=date)))
    assert header.clock.offset_ns == 0x64B0A * 1000
    found = recording(file(MadeTraceDat(PAGES, options=date)))
    assert found.first_utc_ns <= int(batch.ts_ns[0]) + header.clock.offset_ns
    assert found.first_utc_ns > int(batch.ts_ns[0]) + header.clock.offset_ns - 10_000
    _, _, _, source = replayed(file(MadeTraceDat(PAGES)))
    assert any("contains no time of day" in line for line in source.warnings)


def test_an_offset_is_added(file):
    _, plain, _, _ = replayed(file(MadeTraceDat(PAGES)))
    _, moved, _, _ = replayed(file(MadeTraceDat(PAGES, options=((7, b"-500\0"),))))
    assert (moved.ts_ns == plain.ts_ns - 500).all()


def test_cycles_become_ns(file):
    _, plain, _, _ = replayed(file(MadeTraceDat(PAGES)))
    mult, shift = 3_355_443_200, 33  # 2.56 GHz
    tsc = struct.pack("<IIQ", mult, shift, 0)
    _, batch, _, _ = replayed(file(MadeTraceDat(PAGES, clock="x86-tsc", options=((14, tsc),))))
    assert batch.ts_ns.tolist() == [int(ts) * mult >> shift for ts in plain.ts_ns]


@pytest.mark.parametrize(
    ("clock", "why"),
    [
        ("counter", "it counts events"),
        ("uptime", "jiffies"),
        ("x86-tsc", "does not tell how long one is"),
        ("ppc-tb", "ticks"),
        ("mnoo", r"did you mean 'mono'\?"),
    ],
)
def test_clocks_without_time_are_refused(file, clock, why):
    with pytest.raises(CaptureError, match=why):
        replayed(file(MadeTraceDat(PAGES, clock=clock)))


@pytest.mark.parametrize("clock", ["local", "boot", "mono_raw", "tai", "global", "perf"])
def test_other_clocks_are_reported(file, clock):
    _, _, _, source = replayed(file(MadeTraceDat(PAGES, clock=clock)))
    assert any(f"its clock {clock} " in line for line in source.warnings)


def test_a_file_without_a_clock_takes_the_users_option(file):
    path = file(MadeTraceDat(PAGES, clock=""))
    assert any("does not say which clock" in line for line in replayed(path)[3].warnings)
    assert not any("its clock" in line for line in replayed(path, FileOptions(clock="mono"))[3].warnings)
    with pytest.raises(CaptureError, match="recorded with the clock 'boot', not 'mono' as asked for"):
        replayed(file(MadeTraceDat(PAGES, clock="boot")), FileOptions(clock="mono"))


# Devices ------------------------------------------------------------------------------------------


def test_devices_come_from_a_capture_of_the_host(file):
    capture = file(capture_bytes([TOPOLOGY, *batches(mace_traffic(500), 500)]), "host.mace")
    header, _, topologies, source = replayed(file(MadeTraceDat(PAGES, options=())), FileOptions(topology=capture))
    assert topologies[0].devices == TOPOLOGY.devices
    assert topologies[0].host_netns == TOPOLOGY.host_netns
    assert isinstance(header, StreamHeader)
    assert not any("only names devices" in line for line in source.warnings)
    _, _, topologies, source = replayed(file(MadeTraceDat(PAGES)))
    assert topologies[0].devices == ()
    assert any("only names devices" in line for line in source.warnings)


def test_devices_of_another_clock_are_used_from_the_start(file):
    capture = file(capture_bytes([TOPOLOGY, *batches(mace_traffic(500), 500)]), "host.mace")
    header, _, topologies, _ = replayed(
        file(MadeTraceDat(PAGES, clock="local", options=())), FileOptions(topology=capture)
    )
    assert {one.devices for one in topologies} == {TOPOLOGY.devices}
    assert header.boot_id == ""


def test_an_empty_recording(file):
    with pytest.raises(CaptureError, match="no pages of any CPU"):
        replayed(file(MadeTraceDat({"": {}})))


def test_all_columns_have_their_types(file):
    _, batch, _, _ = replayed(file(MadeTraceDat(PAGES)))
    assert {name: column.dtype for name, column in batch.columns()} == DTYPES


def test_an_instance_with_a_wrong_clock(file):
    path = file(MadeTraceDat({"": {}, "packets": {0: traffic(0, 2)}}, clock="local"))
    assert any("says local of every instance" in line for line in replayed(path)[3].warnings)
    assert not any("its clock" in line for line in replayed(path, FileOptions(clock="mono"))[3].warnings)


def test_fields_in_another_order_and_events_with_other_numbers(file):
    """Other kernels have other numbers and orders: the reader relies only on the names of fields."""
    events = {
        "net:net_dev_queue": (17, "__data_loc char[] name, unsigned int len, void * skbaddr"),
        "net:netif_receive_skb": (903, "u16 more, void * skbaddr, u8 other, __data_loc char[] name, unsigned int len"),
    }
    forms = {form.event: form for form in formats(events)}
    page = Page(layout(), 10**12)
    page.event(payload(forms["net:net_dev_queue"], name=b"eth0", skbaddr=256, len=98), 5)
    page.event(payload(forms["net:netif_receive_skb"], name=b"veth-of-somebody"[:15], skbaddr=256, len=84, more=7), 5)
    for big in (False, True):
        raw = to_big(page.bytes(), layout(), list(forms.values())) if big else page.bytes()
        _, batch, topologies, _ = replayed(file(MadeTraceDat({"": {3: [raw]}}, events=events, big=big)))
        assert batch.hook.tolist() == [Hook.NET_DEV_QUEUE, Hook.NETIF_RECEIVE_SKB]
        assert batch.l3_len.tolist() == [84, 84]
        assert batch.skb_id[0] == batch.skb_id[1]
        assert batch.cpu.tolist() == [3, 3]
        assert [topologies[-1].sightings[dev].name for dev in batch.dev] == ["eth0", "veth-of-somebod"]


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        (b"flyrecord\0", b"latency  \0", "the text of a latency tracer, no events"),
        (b"tracing6\0", b"tracing8\0", "version '8'; this MACE reads versions 6 and 7"),
        (b"header_page\0", b"header_pagf\0", "here header_page should begin"),
        (b"field: u64 timestamp", b"field: u64 timestimp", "no field 'timestamp'"),
    ],
)
def test_unknown_frames(file, old, new, why):
    content = MadeTraceDat(PAGES, version=6).content()
    assert old in content
    with pytest.raises(CaptureError, match=why):
        replayed(file(content.replace(old, new)))


def test_an_unknown_compression(file):
    content = MadeTraceDat(PAGES, algorithm="zstd").content().replace(b"zstd\x001", b"lzma\x001")
    with pytest.raises(CaptureError, match="compressed with 'lzma'; known are none, zlib, zstd"):
        replayed(file(content))
