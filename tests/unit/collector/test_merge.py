import numpy as np
import pytest

from collector.merge import Merger
from contracts.hooks import Hook
from contracts.records import Batch


def records(*ts, cpu=0, **columns):
    return Batch.of(len(ts), ts_ns=ts, cpu=[cpu] * len(ts), **columns)


def merger(cpus=2, hold_back_ns=0):
    m = Merger(hold_back_ns)
    for cpu in range(cpus):
        m.add_cpu(cpu, 0)
    return m


def test_records_wait_for_every_cpu():
    m = merger(hold_back_ns=10)
    m.push(0, records(1, 5, 100))
    m.complete(0, 100)
    assert m.watermark_ns == -10
    m.complete(1, 16)
    assert m.watermark_ns == 6
    assert m.take(6).ts_ns.tolist() == [1, 5]
    assert len(m) == 1


def test_the_time_of_complete_is_exclusive():
    m = merger(cpus=2)
    m.push(0, records(7))
    m.complete(0, 7)
    m.complete(1, 7)
    assert len(m.take(7)) == 0
    m.push(1, records(7, cpu=1))
    m.push(0, records(7, skb_id=[2]))
    assert m.take(8).cpu.tolist() == [0, 0, 1]
    assert m.late == 0


def test_ties_are_ordered_by_cpu_then_ring():
    m = merger(cpus=3)
    m.push(2, records(5, 5, cpu=2, skb_id=[1, 2]))
    m.push(0, records(5, 5, skb_id=[3, 4]))
    m.push(1, records(4, 5, cpu=1, skb_id=[5, 6]))
    assert m.flush().skb_id.tolist() == [5, 3, 4, 6, 1, 2]


def test_a_ring_slightly_out_of_order():
    m = merger(cpus=1)
    m.push(0, records(1, 9, 8, 12))
    m.push(0, records(11, 13))
    m.push(0, records(10, 14))
    assert m.flush().ts_ns.tolist() == [1, 8, 9, 10, 11, 12, 13, 14]
    assert m.late == 0


def test_late_records_are_counted_and_markers_kept():
    m = merger(cpus=1)
    m.push(0, records(1, 50))
    m.take(40)
    m.push(
        0, records(3, 39, 40, 60, hook=[Hook.NETIF_RX, Hook.LOST, Hook.NETIF_RX, Hook.NETIF_RX], l3_len=[0, 9, 0, 0])
    )
    rest = m.flush()
    assert rest.ts_ns.tolist() == [40, 40, 50, 60]
    assert rest.lost == 9
    assert m.late == 1


def test_a_new_cpu_is_waited_for():
    m = merger(cpus=1)
    m.complete(0, 100)
    m.add_cpu(5, 50)
    assert m.watermark_ns == 50


def test_the_end():
    m = merger()
    assert len(m.flush()) == 0
    m.push(0, records(np.iinfo(np.int64).max - 1))
    assert len(m.flush()) == 1


def test_no_cpu_no_watermark():
    assert Merger(0).watermark_ns is None
    with pytest.raises(ValueError, match="hold_back_ns"):
        Merger(-1)
