"""Text that tracers print: every kind of line, losses, hashed addresses, and lines that are no event."""

import re
import subprocess
import tracemalloc

import pytest

from collector.files import FileOptions, recording, sniff
from collector.text.lines import LINE_MAX
from contracts.errors import CaptureError
from contracts.hooks import Hook
from contracts.records import Batch
from contracts.topology import Topology
from tests.places import GOLDEN

TEXTS = GOLDEN / "text"
REAL = (GOLDEN / "other-tools" / "trace.txt").read_bytes()
"""ftrace's text of 397 network events."""

FTRACE = """\
# tracer: nop
#
# entries-in-buffer/entries-written: 3/10   #P:2
#
#           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION
#              | |         |   |||||     |         |
            ping-4711    [001] b..1.  1234.500001: net_dev_queue: dev=eth0 skbaddr=00000000d6c17a4f len=98
            ping-4711    [001] b..1.  1234.500003: net_dev_start_xmit: dev=eth0 queue_mapping=0 \
skbaddr=00000000d6c17a4f vlan_tagged=0 len=98 data_len=0 network_offset=18 gso_size=0 gso_segs=3 gso_type=0
CPU:1 [LOST 7 EVENTS]
 a b-c: [x]-99       (   99) [001] ..s1.  1234.500009: netif_rx: dev=veth0 skbaddr=00000000d6c17a4f len=84
          <idle>-0       [000] ..s2.  1234.500010: napi_gro_receive_entry: dev=out0 napi_id=0x1 queue_mapping=0 \
skbaddr=0000000011111111 vlan_tagged=0 len=84 data_len=0
          <idle>-0       [000] ..s2.  1234.500012: kfree_skb: skbaddr=0000000011111111 rx_sk=0000000000000000 \
protocol=2048 location=nf_hook_slow+0xb1/0x120 reason: NETFILTER_DROP
          <idle>-0       [000] d..2.  1234.500013: sched_switch: prev_comm=net_dev_queue: prev_pid=0
CPU:0 [LOST EVENTS]
"""

PERF = """\
swapper     0 [000]   77.000000001:       net:netif_receive_skb: dev=out0 skbaddr=0xffff8881003a5e00 len=84
my prog  4711/4712 [001]   77.000000005:       skb:skb_copy_datagram_iovec: skbaddr=0xffff8881003a5e00 len=56
my prog  4711 [001]   77.000000006: PERF_RECORD_LOST lost 12
my prog  4711 [001]   77.000000009:       skb:consume_skb: skbaddr=0xffff8881003a5e00 location=consume_skb
"""

NAMED = """\
   ping-1 [000]  5.000001000: net_dev_queue:        dev=eth0 skbaddr=0xff456078fff3e040 len=60
CPU:0 [15 EVENTS DROPPED]
   ping-1 [000]  5.000002000: netif_rx:             dev=veth1 skbaddr=0xff456078fff3e040 len=46
CPU:3 [EVENTS DROPPED]
"""


@pytest.fixture
def file(tmp_path):
    def make(text, name="trace.txt"):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return tmp_path / name

    return make


def read(path, options=None):
    """Read a text; returns (records, names of devices, source)."""
    with recording(path, options).reader() as source:
        items = list(source.items())
    batch = Batch.concatenate([item for item in items if isinstance(item, Batch)])
    return batch, [one.name for one in [i for i in items if isinstance(i, Topology)][-1].sightings], source


def test_ftraces_own_text(file):
    path = file(FTRACE)
    assert sniff(path).name == "text"
    batch, names, source = read(path)
    lost = batch.hook == Hook.LOST
    told = batch[~lost]
    assert told.hook.tolist() == [1, 2, 3, 5, 8]
    assert told.ts_ns.tolist() == [1_234_500_000_000 + us * 1000 for us in (1, 3, 9, 10, 12)]
    assert told.cpu.tolist() == [1, 1, 1, 0, 0]
    assert [names[dev] for dev in told.dev] == ["eth0", "eth0", "veth0", "out0", ""]
    assert told.l3_len.tolist() == [84, 80, 84, 84, 0]
    assert told.gso_segs.tolist() == [0, 3, 0, 0, 0]
    assert told.skb_id[0] == told.skb_id[1] == told.skb_id[2] != told.skb_id[3] == told.skb_id[4]
    # 7 events overwritten before the beginning, 7 in between, and some at the end.
    assert batch[lost].l3_len.tolist() == [7, 7, 1]
    assert any("hashes of 32 bits" in line for line in source.warnings)
    assert any("1 losses have no number" in line for line in source.warnings)
    assert source.bytes_read == source.bytes_total


def test_a_loss_lies_between_events_of_its_cpu(file):
    batch, _, _ = read(file(FTRACE))
    (at,) = [i for i in range(len(batch)) if batch.hook[i] == Hook.LOST and batch.cpu[i] == 1]
    assert (int(batch.ts_ns[at]), int(batch.skb_id[at])) == (1_234_500_003_000, 1_234_500_009_000)


def test_perf_script(file):
    batch, names, source = read(file(PERF))
    assert batch.hook.tolist() == [4, 6, Hook.LOST, 7]
    assert batch.ts_ns.tolist() == [77_000_000_000 + ns for ns in (1, 5, 5, 9)]
    assert batch.lost == 12
    assert names == ["", "out0"]
    assert not any("hashes" in line for line in source.warnings)
    assert source.discarded == 0


def test_a_text_of_perf_without_losses_warns_of_its_option(file):
    without = "".join(line for line in PERF.splitlines(keepends=True) if "LOST" not in line)
    assert any("--show-lost-events" in line for line in read(file(without))[2].warnings)
    for text in (PERF, FTRACE, NAMED):
        assert not any("--show-lost-events" in line for line in read(file(text))[2].warnings)


def test_the_report_of_trace_cmd(file):
    batch, _, source = read(file(NAMED))
    assert batch.hook.tolist() == [1, Hook.LOST, 3, Hook.LOST]
    assert batch[batch.hook == Hook.LOST].l3_len.tolist() == [15, 1]
    assert any("losses have no number" in line for line in source.warnings)


@pytest.mark.parametrize("block", [1, 7, 4096])
def test_block_boundaries_change_nothing(file, block, monkeypatch):
    whole, _, _ = read(file(FTRACE + PERF.replace("77.000000", "1234.900000")))
    monkeypatch.setattr("collector.text.source._READ_BYTES", block)
    cut, _, _ = read(file(FTRACE + PERF.replace("77.000000", "1234.900000")))
    real = whole.hook != Hook.LOST
    assert cut.ts_ns.tolist() == whole.ts_ns.tolist()
    assert cut.hook.tolist() == whole.hook.tolist()
    assert real.sum() == 8


def test_lines_without_an_address_are_counted(file):
    text = FTRACE.replace("skbaddr=0000000011111111", "skbaddr=(____ptrval____)")
    _, _, source = read(file(text))
    assert source.discarded == 2
    assert any("2 lines have no buffer address" in line for line in source.warnings)


def test_the_clock_is_the_users_option(file):
    assert any("--clock mono" in line for line in read(file(PERF))[2].warnings)
    assert not any("--clock mono" in line for line in read(file(PERF), FileOptions(clock="mono"))[2].warnings)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("# tracer: nop\n#\n", "no line of it is a network event that can be read$"),
        ("hello\nworld\n", "no format that can be replayed"),
        (FTRACE.replace("skbaddr", "skb"), "5 lines have no buffer address"),
    ],
)
def test_text_of_another_kind(file, text, why):
    with pytest.raises(CaptureError, match=why):
        recording(file(text))


def test_a_line_without_end(file):
    path = file(FTRACE + "x" * (3 * LINE_MAX))
    with pytest.raises(CaptureError, match=f"a line of more than {LINE_MAX} bytes"):
        read(path)


def test_noise_among_the_lines(file):
    noise = bytes(range(1, 256)).replace(b"\n", b"") + b"\n"
    batch, _, _ = read(file(FTRACE.encode() + noise * 50 + PERF.replace("77.000000", "1234.900000").encode()))
    assert (batch.hook != Hook.LOST).sum() == 8


# --- names of tasks -----------------------------------------------------------------------------


def told(path, options=None):
    """Read a text; returns all columns of the records as lists, and the source."""
    batch, names, source = read(path, options)
    columns = [getattr(batch, name).tolist() for name in ("ts_ns", "skb_id", "l3_len", "cpu", "gso_segs", "hook")]
    return [*columns, [names[dev] for dev in batch.dev]], source


def named(name, text=REAL):
    """Return the lines of `text` with another task's name in its 16 columns."""
    return re.sub(rb"(?m)^ {11}<\.\.\.>-", lambda _: name.rjust(16) + b"-", text)


@pytest.mark.parametrize(
    "name",
    [b"GC Thread#0", b"#", b"[000]", b"a [001] b", b"12.345678:", b"[0] 1.123456: ", b"netif_rx: ", b"CPU:0 [EVENTS]"],
)
def test_a_task_may_have_any_name(file, name):
    whole, _ = told(file(REAL))
    assert len(whole[0]) == 397
    found, source = told(file(named(name)))
    assert found == whole
    assert source.discarded == 0
    assert not any("left out" in line for line in source.warnings)


def test_some_tasks_have_odd_names(file):
    whole, _ = told(file(REAL))
    lines = REAL.splitlines(keepends=True)
    some = b"".join(named(b"GC Thread#0", line) if n % 3 else line for n, line in enumerate(lines))
    assert told(file(some))[0] == whole


@pytest.mark.parametrize("name", ["names-perf", "names-ftrace", "names-ftrace-no-irq-info"])
def test_real_texts_of_tasks_with_odd_names(name):
    """Each packet is queued and received on loopback."""
    batch, names, source = read(TEXTS / f"{name}.txt")
    assert batch.hook.tolist() == [Hook.NET_DEV_QUEUE, Hook.NETIF_RX] * 21
    assert (batch.skb_id[::2] == batch.skb_id[1::2]).all()
    assert {names[dev] for dev in batch.dev} == {"lo"}
    assert len(set(batch.cpu.tolist())) == 1
    assert source.discarded == 0
    # The part before the line feed of a name is reported; no event is in it.
    (line,) = [line for line in source.warnings if "left out" in line]
    assert ": 2 lines are no events" in line


def test_both_texts_of_one_ring_give_the_same_records():
    assert told(TEXTS / "names-ftrace.txt")[0] == told(TEXTS / "names-ftrace-no-irq-info.txt")[0]


# --- forms --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [b"", b"x", b"px"])
def test_addresses_of_px(file, suffix):
    raw = (TEXTS / "perf-px.txt").read_bytes()
    assert raw.count(b"x ") > 20
    plain = re.sub(rb"(skbaddr=0x[0-9a-f]{16})x", rb"\1", raw)
    found, source = told(file(re.sub(rb"(skbaddr=0x[0-9a-f]{16})x?", rb"\1" + suffix, raw)))
    assert found == told(file(plain))[0] == told(TEXTS / "perf-px.txt")[0]
    # Also events of netif_rx, whose name follows more blanks.
    assert [found[5].count(hook) for hook in (1, 2, 3, 4)] == [12, 12, 12, 12]
    assert source.discarded == 0


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (rb"\[001\] ", rb"[001] K       "),
        (rb"\[001\] ", rb"[001] 2026-11-29 15:03:51.702801 "),
        (rb"(\.\d{9}: )", rb"\1         1 "),
        (rb"4711 \[", rb"4711/4712   ["),
        (rb"(?m)^(my prog  47.*?|swapper     0) \[", rb"["),
        (rb"(?m)$", rb"\r"),
        (rb"(?m)^(?=.)", rb"trace.txt:  "),
    ],
    ids=["misc", "tod", "period", "pid,tid", "no comm, no tid", "CR", "file names"],
)
def test_other_columns_of_perf(file, before, after):
    changed, times = re.subn(before, after, PERF.encode())
    assert times
    found, source = told(file(changed))
    assert found == told(file(PERF))[0]
    assert source.discarded == 0


def test_the_option_fields_of_ftrace(file):
    """The option fields of ftrace are read as Linux 6.18 prints them."""
    batch, names, source = read(
        file(
            "    ping-24969   [000] b....  3223.266379: net_dev_start_xmit: name=lo queue_mapping=0x0 (0) "
            "skbaddr=0xffff888104b04700 (-131387265890560) vlan_tagged=(0) len=0x62 (98) data_len=0x0 (0) "
            "network_offset=0xe (14) transport_offset_valid=(1) tx_flags=(0) gso_size=0x0 (0) gso_segs=0x2 (2)\n"
            "    ping-24969   [000] b....  3223.266380: netif_rx: skbaddr=0xffff888104b04700 (-131387265890560) "
            "len=0x54 (84) name=lo\n"
        )
    )
    assert batch.l3_len.tolist() == [84, 84]
    assert batch.gso_segs.tolist() == [2, 0]
    assert len(set(batch.skb_id.tolist())) == 1
    assert {names[dev] for dev in batch.dev} == {"lo"}
    assert source.discarded == 0


@pytest.mark.parametrize("form", ["-l", "--ts-diff", "-R", "-t"])
@pytest.mark.needs("trace-cmd")
def test_the_forms_of_a_report(file, form):
    def report(*options):
        argv = ["trace-cmd", "report", *options, str(GOLDEN / "tracecmd" / "v6.dat")]
        return subprocess.run(argv, capture_output=True, check=True).stdout

    found, source = told(file(report(form)))
    whole, _ = told(file(report(*["-t"] * (form == "-t"))))
    assert len(whole[0]) > 300
    assert found == whole
    assert source.discarded == 0


def test_hashes_beside_addresses_are_reported(file):
    """Linux 5.14 prints the addresses of some events, and the hashes of the others."""
    mixed = FTRACE.replace("eth0 skbaddr=00000000d6c17a4f", "eth0 skbaddr=ffff888103a5e500")
    assert any("some addresses are hashes and some are not" in line for line in read(file(mixed))[2].warnings)
    for text in (FTRACE, PERF, NAMED):
        assert not any("and some are not" in line for line in read(file(text))[2].warnings)


def test_latency_format_is_refused_with_the_option():
    with pytest.raises(CaptureError, match=r"42 lines are in ftrace's latency format.*echo 0 > options/latency-format"):
        recording(TEXTS / "names-ftrace-latency.txt")


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (
            "  ping 4711 77.000001: net:netif_rx: dev=e skbaddr=0xffff8881003a5e00 len=8",
            "have no CPU.*-F comm,tid,cpu",
        ),
        ("77.000001: net:netif_rx: dev=e skbaddr=0xffff8881003a5e00 len=8", "have no CPU.*-F comm,tid,cpu"),
        ("           [000] 4711 77.000001: net:netif_rx: skbaddr=0xffff8881003a5e00 len=8", "have no CPU"),
        ("           [000] 77.000001: net:netif_rx: skbaddr=0xffff8881003a5e00 len=8", "have no CPU"),
        ("  ping 4711 [001] net:netif_rx: dev=e skbaddr=0xffff8881003a5e00 len=8", "have no time"),
        ("  ping 4711 [001] 77.000001: dev=e skbaddr=0xffff8881003a5e00 len=8", "have no event name"),
        ("  ping 4711 [001] 77.000001: net:netif_rx: ", "have no buffer address.*-F comm,tid,cpu,time,event,trace"),
        ("  <...>-10389   0b.... 6248808080us : netif_rx: dev=e skbaddr=000000005d6c94a8 len=8", "latency-format"),
        ("   ping 4711 1 0 00000000 00000000 [00001234] 1234.500ms (+0.001ms): netif_rx: dev=e skbaddr=1", "latency"),
        (" 0)               |  /* netif_rx: dev=e skbaddr=000000005d6c94a8 len=8 */", "echo nop > current_tracer"),
        (
            "  ping-4711 [001] b..1. 12345678901: netif_rx: dev=e skbaddr=000000005d6c94a8 len=8",
            "echo mono > trace_clock",
        ),
    ],
)
def test_an_unsupported_form(file, line, why):
    """A text of this form alone is refused with the option to change; among other lines it is counted and reported."""
    with pytest.raises(CaptureError, match=why):
        recording(file((line + "\n") * 3))
    whole, _ = told(file(FTRACE))
    found, source = told(file(FTRACE + line + "\n"))
    assert found == whole
    assert source.discarded == 1
    assert any(re.search(why, told_line) for told_line in source.warnings)


def test_most_lines_without_a_column_are_an_error(file):
    """The name of a task "[000]" could be read as a CPU."""
    line = "{:>16}  77.00000{}: net:netif_rx: dev=e skbaddr=0xffff8881003a5e00 len=8\n"
    path = file("".join(line.format(name, n) for n, name in enumerate(["[000] ", "ping", "ping", "ping"])))
    with pytest.raises(CaptureError, match="most of its network events cannot be read: 3 lines have no CPU"):
        read(path)


# --- single lines -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cut",
    [
        "            ping-4711    [001] b..1.  1234.5",
        "ping-4711    [001] b..1.  12",
        "ev=eth0 skbaddr=00000000d6c17a4f len=98",
    ],
)
def test_lines_that_are_cut_are_counted(file, cut):
    _, _, source = read(file(FTRACE + cut + "\n" + FTRACE))
    assert source.discarded == 1
    assert any("1 lines begin like an event" in line and "line 15)" in line for line in source.warnings)


@pytest.mark.parametrize(
    "line",
    [
        "", "# a comment", "##### CPU 1 buffer started ####", " => netif_rx", "cpus=2", "version = 6", "CPU 1 is empty",
        "\tffffffff81a0b0c1 netif_rx+0x1 ([kernel.kallsyms])", "CPU:0 [SUBBUFFER START]",
        "  ping-4711 [001] b..1.  1234.500013: <stack trace>",
        "  ping-4711 [001] b..1.  1234.500013: net_dev_xmit: dev=e skbaddr=000000005d6c94a8 len=8 rc=0",
        "  ping 4711 [001] 1234.500013: probe:netif_rx: (ffffffff81a0b0c1)",
        "  ping 4711 77.000001: net:net_dev_xmit: dev=e skbaddr=000000005d6c94a8 len=8 rc=0",
    ],
)  # fmt: skip
def test_lines_without_an_event_are_counted(file, line):
    found, source = told(file(FTRACE + line + "\n"))
    assert found == told(file(FTRACE))[0]
    assert source.discarded == 0
    assert not any("left out" in line for line in source.warnings)


def test_lines_of_trace_printk_are_reported(file):
    marks = "  sh-1 [000] .....  1234.500011: tracing_mark_write: first\nsecond\nthird\n"
    _, _, source = read(file(FTRACE + marks))
    assert source.discarded == 0
    assert any("2 lines are no events" in line and "the first is line 16" in line for line in source.warnings)


def test_the_last_line_without_an_end(file):
    whole, _ = told(file(PERF))
    found, source = told(file(PERF.rstrip("\n")))
    assert found == whole
    assert any("no line feed" in line for line in source.warnings)
    # The address of another buffer may begin with these digits.
    found, source = told(file(PERF[: PERF.rindex("5e00") + 2]))
    assert found[5] == whole[5][:-1]
    assert source.discarded == 1


@pytest.mark.parametrize("device", ["len=1", "skbaddr=0x1", "a=b", "name=x", "naïve"])
def test_a_device_may_be_named_like_a_field(file, device):
    found, _ = told(file(FTRACE.replace("dev=eth0", f"dev={device}")))
    whole, _ = told(file(FTRACE))
    assert found[:6] == whole[:6]
    assert found[6] == [device if name == "eth0" else name for name in whole[6]]


@pytest.mark.parametrize(
    "text",
    [
        "CPU:70000 [LOST 7 EVENTS]",
        "  ping-1 [70000] ....  1234.500001: netif_rx: skbaddr=1",
        "  ping-1 [001] ....  9999999999.000000: netif_rx: skbaddr=1",
    ],
)
def test_impossible_numbers(file, text):
    found, source = told(file(FTRACE + text + "\n"))
    assert found == told(file(FTRACE))[0]
    assert any("left out" in line for line in source.warnings)


def test_an_overlong_count_of_losses(file):
    _, _, source = read(file(FTRACE.replace("LOST 7 ", f"LOST {10**30} ")))
    assert any("2 losses have no number" in line for line in source.warnings)


def test_times_that_are_differences(file):
    line = "ping 1 [001]  0.{:06d}: net:netif_rx: dev=e skbaddr=0xffff8881003a5e00 len=8\n"
    path = file("".join(line.format(n % 3) for n in range(60)))
    with pytest.raises(CaptureError, match=r"times go back at .*--deltatime"):
        read(path)


def test_concatenated_texts(file, monkeypatch):
    """Events of concatenated texts that are read at once are sorted."""
    monkeypatch.setattr("collector.text.source._READ_BYTES", len(FTRACE))
    path = file(FTRACE + FTRACE.replace("1234.", "1200."))
    _, _, source = read(path)
    assert source.discarded == 5
    assert any("5 events are left out: they are more than 50 ms older" in line for line in source.warnings)


# --- where the first network event comes late ---------------------------------------------------

LATE = {
    "trace-cmd report": b"cpus=2\n"
    + b"          <idle>-0     [000]  1200.500000: sched_switch:  swapper/0:0 [120]\n" * 900,
    "no head": b"          <idle>-0     [000]  1200.500000: sched_switch:  swapper/0:0 [120]\n" * 900,
    "odd names": b"   GC Thread#0 [0]-7  [000]  1200.500000: sched_switch:  swapper/0:0 [120]\n" * 900,
    "losses": b"CPU:0 [LOST 1 EVENTS]\n" * 3000,
    "stacks": b"  sh-1  [000]  1200.500000: kernel_stack:  <stack trace >\n"
    + b"=> do_syscall_64 (ffffffff81a0b0c1)\n" * 3000,
}


@pytest.mark.parametrize("before", LATE)
def test_the_first_event_may_come_late(file, before):
    whole, _ = told(file(NAMED))
    found, source = told(file(LATE[before] + NAMED.encode()))
    if before != "losses":
        assert found == whole
    assert found[5].count(Hook.NETIF_RX) == 1
    assert source.discarded == 0


@pytest.mark.slow
def test_a_late_event_costs_no_memory(file):
    path = file(LATE["no head"] * 70 + NAMED.encode())
    tracemalloc.start()
    try:
        recording(path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 4 << 20


@pytest.mark.parametrize("form", ["{} 77.0000{:02d}: sched:sched_switch: a", "  sh 1 [000] sched:sched_switch: a",
                                  "  sh 1 [000] 77.000001: prev_comm=a"])  # fmt: skip
def test_a_text_without_a_column_that_is_recognised_late(file, form):
    sched = "".join(form.format("", n % 100) + "\n" for n in range(3000))
    path = file(sched + "77.000001: net:netif_rx: dev=e skbaddr=0xffff8881003a5e00 len=8\n")
    assert path.stat().st_size > 1 << 16
    with pytest.raises(CaptureError, match="have no CPU"):
        recording(path)
