from collector.machine import softnet
from collector.machine.kernel import online_cpus
from contracts.cpus import CpuCounters

NEWER = """\
0000ff10 00000003 0000002a 00000000 00000000 00000000 00000000 00000000 00000000 00000000 00000000 00000000 00000001 \
00000000 00000000
ffffffff 00000000 00000000 00000000 00000000 00000000 00000000 00000000 00000000 00000000 00000000 00000000 00000006 \
00000000 00000000
"""
OLDER = """\
00000010 00000000 00000001 00000000 00000000 00000000 00000000 00000000 00000000 00000000 00000000
00000020 00000002 00000000 00000000 00000000 00000000 00000000 00000000 00000000 00000000 00000000
"""


def test_kernels_that_number_their_lines():
    assert softnet.parsed(NEWER, 9, (0, 1)) == [CpuCounters(9, 1, 0xFF10, 3, 42), CpuCounters(9, 6, 0xFFFFFFFF, 0, 0)]


def test_lines_of_older_kernels_are_those_of_the_online_cpus():
    assert softnet.parsed(OLDER, 9, (0, 3)) == [CpuCounters(9, 0, 16, 0, 1), CpuCounters(9, 3, 32, 2, 0)]


def test_lines_without_numbers_are_left_out():
    assert softnet.parsed("cpu0 total\n12\n" + OLDER, 9, (0, 1, 2, 3)) == [
        CpuCounters(9, 2, 16, 0, 1),
        CpuCounters(9, 3, 32, 2, 0),
    ]


def test_this_machine_has_a_line_for_each_online_cpu():
    assert {each.cpu for each in softnet.counters()} == set(online_cpus())


def test_a_machine_without_the_file_has_no_counters(tmp_path, monkeypatch):
    monkeypatch.setattr(softnet, "_PATH", tmp_path / "none")
    assert softnet.counters() == []
