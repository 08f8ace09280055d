import pytest

from collector.pages.formats import parse_format, parse_header_page
from contracts.errors import SourceError
from tests.ring_pages import EVENTS, format_text, formats

HEADER_PAGE = """\
\tfield: u64 timestamp;\toffset:0;\tsize:8;\tsigned:0;
\tfield: local_t commit;\toffset:8;\tsize:8;\tsigned:1;
\tfield: int overwrite;\toffset:8;\tsize:1;\tsigned:1;
\tfield: char data;\toffset:16;\tsize:4080;\tsigned:0;
"""


def test_header_page():
    layout = parse_header_page(HEADER_PAGE)
    assert (layout.timestamp_offset, layout.commit_offset, layout.commit_size) == (0, 8, 8)
    assert (layout.data_offset, layout.data_size, layout.page_size) == (16, 4080, 4096)
    assert parse_header_page(HEADER_PAGE.replace("4080", "65520")).page_size == 65536


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("timestamp", "time", "no field 'timestamp'"),
        ("size:8;\tsigned:0", "size:4;\tsigned:0", "4-byte timestamp"),
        ("offset:16", "offset:18", "at 18"),
        ("size:4080;", "", "line 4 is not a field description"),
    ],
)
def test_invalid_header_pages_are_refused(old, new, why):
    with pytest.raises(SourceError, match=why):
        parse_header_page(HEADER_PAGE.replace(old, new))


def test_formats_of_all_hooks():
    parsed = {f.event: f for f in formats()}
    xmit = parsed["net:net_dev_start_xmit"]
    assert xmit.id == 2307
    # Offsets of the format file of Linux 6.18 on x86-64.
    assert [
        (n, xmit.field(n).offset, xmit.field(n).size) for n in ("skbaddr", "len", "network_offset", "gso_segs")
    ] == [
        ("skbaddr", 16, 8),
        ("len", 36, 4),
        ("network_offset", 44, 4),
        ("gso_segs", 60, 2),
    ]
    assert xmit.field("name").is_data_loc
    assert xmit.field("network_offset").signed


def test_arrays_and_qualifiers():
    text = "ID: 5\nformat:\n\tfield:const char comm[16];\toffset:8;\tsize:16;\tsigned:0;\n"
    comm = parse_format("a:b", text).field("comm")
    assert (comm.type, comm.size) == ("const char", 16)


def test_a_kernel_without_the_signed_column():
    text = "ID: 5\nformat:\n\tfield:int x;\toffset:8;\tsize:4;\n"
    assert not parse_format("a:b", text).field("x").signed


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("ID: 2303\n", "", "net:netif_receive_skb: format has no line 'ID:'"),
        ("ID: 2303", "ID: 70000", "line 2: the id is '70000'"),
        ("ID: 2303", "ID: x", "line 2: the id is 'x'"),
        ("offset:8;", "offset:eight;", "net:netif_receive_skb: format: line 9 is not a field description"),
        ("void * skbaddr", "skbaddr", "line 9 declares no field"),
        ("format:", "fields:", "format has no fields"),
    ],
)
def test_an_unknown_format_is_refused(old, new, why):
    event = "net:netif_receive_skb"
    text = format_text(event, *EVENTS[event])
    assert old in text
    with pytest.raises(SourceError, match=why):
        parse_format(event, text.replace(old, new))
