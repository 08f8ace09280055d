"""What tracers print: every kind of line, losses, hashed addresses, and what is no event."""

import asyncio
from pathlib import Path

import pytest

from collector.files import FileOptions, recording, sniff
from collector.text_lines import LINE_MAX
from mace.errors import CaptureError
from mace.hooks import Hook
from mace.records import Batch
from mace.topology import Topology

GOLDEN = Path(__file__).parents[2] / "golden" / "tracecmd"

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
    """(records, names of devices, source)."""

    async def run():
        source = recording(path, options).source()
        try:
            await source.open()
            items = [item async for item in source.items()]
        finally:
            await source.aclose()
        return items, source

    items, source = asyncio.run(run())
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
    # 7 overwritten before the beginning, 7 between, and some at the end.
    assert batch[lost].l3_len.tolist() == [7, 7, 1]
    assert any("hashes of 32 bits" in line for line in source.warnings)
    assert any("1 losses do not say" in line for line in source.warnings)
    assert source.bytes_read == source.bytes_total


def test_a_loss_is_between_what_its_cpu_told(file):
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


def test_the_report_of_trace_cmd(file):
    batch, _, source = read(file(NAMED))
    assert batch.hook.tolist() == [1, Hook.LOST, 3, Hook.LOST]
    assert batch[batch.hook == Hook.LOST].l3_len.tolist() == [15, 1]
    assert any("losses do not say" in line for line in source.warnings)


@pytest.mark.parametrize("block", [1, 7, 4096])
def test_however_it_is_cut(file, block, monkeypatch):
    whole, _, _ = read(file(FTRACE + PERF.replace("77.000000", "1234.900000")))
    monkeypatch.setattr("collector.text_source._READ_BYTES", block)
    cut, _, _ = read(file(FTRACE + PERF.replace("77.000000", "1234.900000")))
    real = whole.hook != Hook.LOST
    assert cut.ts_ns.tolist() == whole.ts_ns.tolist()
    assert cut.hook.tolist() == whole.hook.tolist()
    assert real.sum() == 8


def test_lines_without_an_address_are_counted(file):
    text = FTRACE.replace("skbaddr=0000000011111111", "skbaddr=(____ptrval____)")
    _, _, source = read(file(text))
    assert source.discarded == 2
    assert any("2 lines do not tell" in line for line in source.warnings)


def test_the_clock_is_the_users_word(file):
    assert any("--clock mono" in line for line in read(file(PERF))[2].warnings)
    assert not any("--clock mono" in line for line in read(file(PERF), FileOptions(clock="mono"))[2].warnings)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("# tracer: nop\n#\n", "no line of it is a network event"),
        ("hello\nworld\n", "no format that can be replayed"),
        (FTRACE.replace("skbaddr", "skb"), "no line of it is a network event"),
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
