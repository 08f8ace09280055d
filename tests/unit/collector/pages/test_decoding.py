import contextlib
import random
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from collector.pages.decoding import Gap, PageDecoder, Sightings, Stretch, page_buffer
from contracts.errors import SourceError
from contracts.hooks import BY_TRACEPOINT, Hook, Way
from tests.ring_pages import EVENTS, FORMS, Page, formats, layout, payload, simple_decode

KEY = (1, 2, 3)


def decoder(page_size=4096, **kwargs):
    return PageDecoder(layout(page_size), FORMS.values(), key=KEY, **kwargs)


def decode(pages, cpu=3, skip=0, with_=None):
    """Decode pages (made ones or bytes) with the real decoder."""
    where = pages[0].layout if isinstance(pages[0], Page) else layout(len(pages[0]))
    raw = b"".join(page.bytes() if isinstance(page, Page) else page for page in pages)
    buffer = page_buffer(where, len(pages))
    buffer[: len(raw)] = np.frombuffer(raw, np.uint8)
    real = with_ or decoder(where.page_size)
    (decoded,) = real.decode(buffer, [Stretch(cpu, len(pages), skip)])
    return decoded


def rx(skb=0xFFFF888000001000, length=84, name=b"eth0"):
    return payload(FORMS["net:netif_receive_skb"], name=name, skbaddr=skb, len=length)


def expected_length(event):
    hook = BY_TRACEPOINT[event.form.event]
    if hook.way is Way.END:
        return 0
    header = 0
    if hook.way is Way.TRANSMIT:
        header = event.value("network_offset") if hook.hook is Hook.NET_DEV_START_XMIT else 14
        header = header if header > 0 else 14
    return max(event.value("len") - header, 0)


def compare(pages):
    """Compare all columns with the simple decoder."""
    where = pages[0].layout
    forms = list(FORMS.values())
    given_ = decoder(where.page_size)
    decoded = decode(pages, with_=given_)
    seen = [e for page in simple_decode(b"".join(p.bytes() for p in pages), where, forms) for e in page]
    batch, names = decoded.batch, given_.sightings.snapshot()
    assert batch.ts_ns.tolist() == [e.ts_ns for e in seen]
    assert batch.hook.tolist() == [BY_TRACEPOINT[e.form.event].hook for e in seen]
    assert [names[code].name for code in batch.dev] == [e.name for e in seen]
    assert batch.l3_len.tolist() == [expected_length(e) for e in seen]
    assert batch.skb_id.tolist() == given_.skb_ids(np.array([e.value("skbaddr") for e in seen], np.uint64)).tolist()
    reasons = [e.value("reason") & 0xFFFF if "reason" in e.form.fields else 0 for e in seen]
    assert batch.drop_reason.tolist() == reasons
    segments = [e.value("gso_segs") if "gso_segs" in e.form.fields else 0 for e in seen]
    assert batch.gso_segs.tolist() == segments
    assert batch.cpu.tolist() == [3] * len(seen)
    # Devices are in order of first appearance, whatever the batches.
    assert [s.name for s in names[1:]] == list(dict.fromkeys(e.name for e in seen if e.name))
    return decoded


NAMES = [b"lo", b"eth0", b"vethc0", b"12345678", b"123456789", b"1234567890abcde", b"br-0a1b2c3d4e5f", "µ0".encode()]


def fill(page, rng, entries):
    """Add random entries of all kinds until the page is full or has `entries`."""
    for _ in range(entries):
        delta = rng.choice([0, rng.randrange(2000), rng.randrange(1 << 27)])
        kind = rng.random()
        if kind < 0.05:
            room = page.extend(rng.randrange(1 << 40))
        elif kind < 0.08:
            room = page.stamp(page.ts_ns + rng.randrange(1 << 40))
        elif kind < 0.12:
            room = page.discarded(8 + 4 * rng.randrange(12), max(delta, 1))
        elif kind < 0.15:
            room = page.event(struct.pack("<H", 99) + bytes(rng.randrange(200)), delta)
        else:
            form = FORMS[rng.choice(list(FORMS))]
            values = {"skbaddr": rng.getrandbits(64)}
            for name in ("len", "network_offset", "gso_segs", "reason"):
                if name in form.fields:
                    values[name] = rng.choice([0, rng.randrange(64), rng.getrandbits(15)])
            if "network_offset" in values and rng.random() < 0.3:
                values["network_offset"] = -rng.randrange(20)
            body = payload(form, name=rng.choice(NAMES) if "name" in form.fields else None, **values)
            # Longer than a short event can be: a word before the event has its length.
            body += bytes(rng.choice([0, 0, 0, 120]))
            room = page.event(body, delta)
        if not room:
            return
    return


@st.composite
def rings(draw):
    rng = random.Random(draw(st.integers(0, 2**32)))
    where = layout(draw(st.sampled_from([4096, 8192, 65536])))
    pages = []
    for _ in range(draw(st.integers(1, 5))):
        page = Page(where, draw(st.sampled_from([0, 10**15, (1 << 59) + 5])) + rng.randrange(10**9))
        fill(page, rng, draw(st.sampled_from([0, 1, 3, 20, 5000])))
        if rng.random() < 0.7:
            page.pad(sized=rng.random() < 0.5)
        pages.append(page)
    return pages


@pytest.mark.slow
@given(rings())
def test_every_kind_of_entry_equals_the_naive_decoder(pages):
    compare(pages)


def test_each_field_by_name():
    page = Page(layout(), 1_000)
    page.event(payload(FORMS["net:net_dev_queue"], name=b"eth0", skbaddr=1, len=98), 5)
    page.event(payload(FORMS["net:net_dev_start_xmit"], name=b"eth0", skbaddr=1, len=98, network_offset=18, gso_segs=3))
    page.event(payload(FORMS["net:net_dev_start_xmit"], name=b"eth0", skbaddr=1, len=98), 1)
    page.event(rx(1, 84, b"vethc0"), 2)
    page.event(payload(FORMS["skb:skb_copy_datagram_iovec"], skbaddr=2, len=64), 1)
    page.event(payload(FORMS["skb:kfree_skb"], skbaddr=2, reason=0x1_0005), 1)
    batch = compare([page]).batch
    assert batch.ts_ns.tolist() == [1005, 1005, 1006, 1008, 1009, 1010]
    assert batch.l3_len.tolist() == [84, 80, 84, 84, 64, 0]
    assert batch.gso_segs.tolist() == [0, 3, 0, 0, 0, 0]
    assert batch.drop_reason.tolist() == [0, 0, 0, 0, 0, 5]
    assert batch.dev.tolist() == [1, 1, 1, 2, 0, 0]
    ids = batch.skb_id.tolist()
    assert ids[0] == ids[3] != ids[4] == ids[5]


def test_ids_show_no_address_and_never_collide():
    addresses = np.arange(0xFFFF888000000000, 0xFFFF888000000000 + 256 * 10_000, 256, dtype=np.uint64)
    ids = PageDecoder(layout(), FORMS.values()).skb_ids(addresses.copy())
    assert len(set(ids.tolist())) == len(addresses)
    assert not set(ids.tolist()) & set(addresses.tolist())
    other = PageDecoder(layout(), FORMS.values()).skb_ids(addresses.copy())
    assert not (ids == other).any()


def test_old_kernels_lack_fields():
    without = {
        "net:net_dev_queue": EVENTS["net:net_dev_queue"],
        "skb:kfree_skb": (77, "void * skbaddr, void * location, unsigned short protocol"),
    }
    forms = {f.event: f for f in formats(without)}
    page = Page(layout(), 50)
    page.event(payload(forms["net:net_dev_queue"], name=b"eth0", skbaddr=1, len=10))
    page.event(payload(forms["skb:kfree_skb"], skbaddr=1))
    batch = decode([page], with_=PageDecoder(layout(), forms.values())).batch
    assert batch.drop_reason.tolist() == [0, 0]
    assert batch.l3_len.tolist() == [0, 0]  # shorter than the link-layer header: the length is not below zero


@pytest.mark.parametrize("event", ["net:netif_rx", "skb:consume_skb"])
def test_missing_mandatory_field(event):
    lacking = dict(EVENTS) | {event: (4, "void * skb_addr, unsigned int len, __data_loc char[] name")}
    with pytest.raises(SourceError, match=rf"{event}: .*no field 'skbaddr' \(did you mean 'skb_addr'\?\)"):
        PageDecoder(layout(), formats(lacking))


def test_other_events_are_skipped_and_counted():
    page = Page(layout(), 0)
    page.event(struct.pack("<H", 1) + b"x" * 40)
    page.event(rx())
    page.event(struct.pack("<H", 60000) + b"x" * 40)
    real = decoder()
    assert len(decode([page], with_=real).batch) == 1
    assert real.skipped == 2


def test_gaps_precede_the_page_that_reports_them():
    pages = []
    for missed, count in ((None, 2), (7, 1), (3, 0), (-1, 2)):
        page = Page(layout(), 100, missed=missed)
        for _ in range(count):
            page.event(rx(), 1)
        pages.append(page)
    assert decode(pages).gaps == (Gap(2, 7), Gap(3, 3), Gap(3, None))


def test_a_full_page_has_no_room_for_the_count():
    page = Page(layout(), 100, missed=5)
    while page.event(rx(), 1):
        pass
    page.event(b"\1\0" + bytes(page.layout.data_size - len(page.data) - 4 - 2))
    assert len(page.data) == page.layout.data_size
    decoded = decode([page, Page(layout(), 5)])
    assert decoded.gaps == (Gap(0, None),)
    assert len(decoded.batch) > 80


def test_a_page_read_in_two_goes():
    page = Page(layout(), 100)
    page.event(rx(), 1)
    page.extend(1 << 30)
    seen = len(page.data)
    first = decode([page])
    page.event(rx(), 4)
    page.event(rx(), 5)
    second = decode([page], skip=seen)
    assert first.batch.ts_ns.tolist() == [101]
    assert second.batch.ts_ns.tolist() == [105 + (1 << 30), 110 + (1 << 30)]


@pytest.mark.slow
@given(rings(), rings(), st.integers(0, 200))
def test_cpus_decoded_together_equal_cpus_decoded_apart(one, two, skip):
    if one[0].layout != two[0].layout:
        return
    skip = min(4 * skip, len(two[0].data))
    where = one[0].layout
    raw = b"".join(page.bytes() for page in one + two)
    buffer = page_buffer(where, len(one) + len(two))
    buffer[: len(raw)] = np.frombuffer(raw, np.uint8)
    real = decoder(where.page_size)
    together = real.decode(buffer, [Stretch(1, len(one)), Stretch(0, 0), Stretch(9, len(two), skip)])
    apart = [decode(one, cpu=1, with_=real), None, decode(two, cpu=9, skip=skip, with_=real)]
    assert len(together[1].batch) == 0
    for got, expected in zip(together, apart, strict=True):
        if expected is not None:
            assert got.gaps == expected.gaps
            for name, column in got.batch.columns():
                assert column.tolist() == getattr(expected.batch, name).tolist(), name


def test_no_pages():
    decoded = decode([Page(layout(), 100), Page(layout(), 200)])
    assert (len(decoded.batch), decoded.gaps) == (0, ())


@pytest.mark.slow
@given(st.integers(0, 2**32), st.integers(1, 30))
def test_damaged_pages_are_refused_or_read_within_their_bounds(seed, flips):
    rng = random.Random(seed)
    page, after = Page(layout(), 10**12), Page(layout(), 10**12)
    fill(page, rng, 5000)
    fill(after, rng, 20)
    raw = bytearray(page.bytes() + after.bytes())
    for _ in range(flips):
        raw[rng.randrange(4096)] = rng.randrange(256)
    try:
        decoded = decode([bytes(raw[:4096]), bytes(raw[4096:])])
    except SourceError as error:
        assert "ring of CPU 3" in str(error)  # noqa: PT017
    else:
        assert len(decoded.batch) <= 2 * 4080 // 8


@given(st.integers(0, 2**32), st.integers(0, 4080))
def test_random_bytes_as_a_page(seed, commit):
    noise = random.Random(seed).randbytes(4080)
    with contextlib.suppress(SourceError):
        decode([struct.pack("<QQ", 1 << 62, commit & ~3) + noise])


@pytest.mark.parametrize(
    ("head", "why"),
    [
        (struct.pack("<QQ", 0, 4088), "no such number of bytes"),
        (struct.pack("<QQ", 0, 10), "no such number of bytes"),
        (struct.pack("<QQI", 0, 16, 20), "reaches over its end"),
        (struct.pack("<QQII", 0, 16, 0, 0), "no valid length"),
        (struct.pack("<QQII", 0, 16, 0, 0xFFFFFFFC), "no valid length"),
        (struct.pack("<QQII", 0, 8, 29 | 32, 6), "no valid length"),
        (struct.pack("<QQI", 0, 4, 0), "no valid length"),
        (struct.pack("<QQIH", 0, 8, 1, 2303), "shorter than its format"),
    ],
)
def test_errors_name_the_fault_of_a_page(head, why):
    with pytest.raises(SourceError, match=why):
        decode([head.ljust(4096, b"\0")])


def test_a_name_outside_its_event():
    body = bytearray(rx())
    body[20:24] = struct.pack("<HH", 24, 200)
    page = Page(layout(), 0)
    page.event(bytes(body))
    with pytest.raises(SourceError, match="device name"):
        decode([page])


class TestSightings:
    def words(self, names):
        raw = np.frombuffer(b"".join(n.ljust(16, b"\0") for n in names), np.uint64).reshape(-1, 2)
        return raw[:, 0].copy(), raw[:, 1].copy()

    def test_thousands_of_names_with_colliding_hashes(self):
        names = [f"veth{i:x}".encode() for i in range(3000)] + [f"br-{i:012d}".encode() for i in range(2000)]
        sightings = Sightings()
        codes = sightings.codes(*self.words(names))
        assert codes.tolist() == list(range(1, 5001))
        assert [s.name.encode() for s in sightings.snapshot()[1:]] == names
        again = [*reversed(names), b"", b"new"]
        assert sightings.codes(*self.words(again)).tolist() == [*range(5000, 0, -1), 0, 5001]

    def test_a_name_that_is_a_prefix_of_another(self):
        sightings = Sightings()
        assert sightings.codes(*self.words([b"abcdefgh", b"abcdefghi", b"abcdefgh"])).tolist() == [1, 2, 1]

    def test_a_name_that_is_not_utf_8(self):
        sightings = Sightings()
        sightings.codes(*self.words([b"\xff\xfe"]))
        assert sightings.snapshot()[1].name == r"\xff\xfe"
