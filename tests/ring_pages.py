"""Hand-made trace ring pages, and a naive decoder to compare with.

The writer supports every kind of entry that the kernel writes into a page; the decoder is a loop over the entries.
"""

import struct
from dataclasses import dataclass, field

from collector.pages.formats import EventFormat, PageLayout, parse_format

C_TYPES = {
    "void *": 8,
    "unsigned int": 4,
    "int": 4,
    "u16": 2,
    "unsigned short": 2,
    "u8": 1,
    "bool": 1,
    "u32": 4,
    "enum skb_drop_reason": 4,
    "__data_loc char[]": 4,
}
EVENTS = {
    "net:net_dev_queue": (2304, "void * skbaddr, unsigned int len, __data_loc char[] name"),
    "net:net_dev_start_xmit": (
        2307,
        (
            "__data_loc char[] name, u16 queue_mapping, void * skbaddr, bool vlan_tagged, u16 vlan_proto, "
            "u16 vlan_tci, u16 protocol, u8 ip_summed, unsigned int len, unsigned int data_len, int network_offset, "
            "bool transport_offset_valid, int transport_offset, u8 tx_flags, u16 gso_size, u16 gso_segs, u16 gso_type"
        ),
    ),
    "net:netif_rx": (2302, "void * skbaddr, unsigned int len, __data_loc char[] name"),
    "net:netif_receive_skb": (2303, "void * skbaddr, unsigned int len, __data_loc char[] name"),
    "net:napi_gro_receive_entry": (
        2300,
        (
            "__data_loc char[] name, unsigned int napi_id, u16 queue_mapping, void * skbaddr, bool vlan_tagged, "
            "u16 vlan_proto, u16 vlan_tci, u16 protocol, u8 ip_summed, u32 hash, bool l4_hash, unsigned int len, "
            "unsigned int data_len, unsigned int truesize, bool mac_header_valid, int mac_header, u8 nr_frags, "
            "u16 gso_size, u16 gso_type"
        ),
    ),
    "skb:skb_copy_datagram_iovec": (2308, "void * skbaddr, int len"),
    "skb:consume_skb": (2309, "void * skbaddr, void * location"),
    "skb:kfree_skb": (
        2310,
        "void * skbaddr, void * location, void * rx_sk, unsigned short protocol, enum skb_drop_reason reason",
    ),
}
"""Event ids and fields of Linux 6.18, in the order of the C structs."""

COMMON = "unsigned short common_type, u8 common_flags, u8 common_preempt_count, int common_pid"


def format_text(event: str, ident: int, declarations: str) -> str:
    """Return the text of a `format` file; offsets follow from the natural alignment of the C types."""
    lines = [f"name: {event.partition(':')[2]}", f"ID: {ident}", "format:"]
    offset = 0
    for part, tail in ((COMMON, ""), (declarations, None)):
        for declaration in filter(None, part.split(", ")):
            type_name = max((t for t in C_TYPES if declaration.startswith(t + " ")), key=len)
            size = C_TYPES[type_name]
            offset = -(-offset // size) * size
            signed = int(type_name == "int")
            lines.append(f"\tfield:{declaration};\toffset:{offset};\tsize:{size};\tsigned:{signed};")
            offset += size
        if tail is not None:
            lines.append(tail)
    return "\n".join([*lines, "", 'print fmt: "field:x", REC->skbaddr'])


def formats(events: dict[str, tuple[int, str]] | None = None) -> list[EventFormat]:
    return [parse_format(event, format_text(event, *what)) for event, what in (events or EVENTS).items()]


FORMS = {form.event: form for form in formats()}


def layout(page_size: int = 4096) -> PageLayout:
    return PageLayout(0, 8, 8, 16, page_size - 16)


def payload(form: EventFormat, name: bytes | None = None, **values: int) -> bytes:
    """Return the bytes of an event; the device name follows the last field, where its __data_loc points."""
    size = max(f.offset + f.size for f in form.fields.values())
    raw = bytearray(size)
    for key, value in {"common_type": form.id, **values}.items():
        f = form.fields[key]
        raw[f.offset : f.offset + f.size] = (value % (1 << 8 * f.size)).to_bytes(f.size, "little")
    if name is not None:
        text = name + b"\0"
        place = form.fields["name"]
        raw[place.offset : place.offset + 4] = struct.pack("<HH", size, len(text))
        raw += text
    return bytes(raw)


@dataclass
class Page:
    """A ring-buffer page under construction."""

    layout: PageLayout
    ts_ns: int
    data: bytearray = field(default_factory=bytearray)
    missed: int | None = None
    """Number of events lost before this page; None if none was lost, -1 if the number is unknown."""

    def _head(self, kind: int, delta: int) -> bytes:
        assert 0 <= delta < 1 << 27
        return struct.pack("<I", kind | delta << 5)

    def _put(self, raw: bytes) -> bool:
        """Append bytes if there is room, and return whether there was."""
        if len(self.data) + len(raw) > self.layout.data_size:
            return False
        self.data += raw
        return True

    def event(self, body: bytes, delta: int = 0, junk: bytes = b"\xee\xdd\xcc") -> bool:
        """Append a data event; its padding to whole words is arbitrary, like stale memory."""
        body += junk[: -len(body) % 4]
        if len(body) <= 28 * 4:
            return self._put(self._head(len(body) // 4, delta) + body)
        return self._put(self._head(0, delta) + struct.pack("<I", len(body) + 4) + body)

    def extend(self, delta: int) -> bool:
        return self._put(self._head(30, delta % (1 << 27)) + struct.pack("<I", delta >> 27))

    def stamp(self, ts_ns: int) -> bool:
        return self._put(self._head(31, ts_ns % (1 << 27)) + struct.pack("<I", ts_ns >> 27 & 0xFFFFFFFF))

    def discarded(self, size: int, delta: int = 1) -> bool:
        """Append an event that was reserved and discarded, of `size` bytes with its header."""
        return self._put(self._head(29, delta) + struct.pack("<I", size - 4) + b"\xaa" * (size - 8))

    def pad(self, *, sized: bool) -> None:
        """Pad to the end of the page, as the kernel does if the next event does not fit."""
        rest = self.layout.data_size - len(self.data)
        if sized and rest >= 8:
            self._put(self._head(29, 1) + struct.pack("<I", rest - 4) + b"\xbb" * (rest - 8))
        elif rest >= 4:
            self._put(self._head(29, 0) + b"\xbb" * (rest - 4))

    def bytes(self) -> bytes:
        commit = len(self.data)
        tail = b""
        if self.missed is not None:
            commit |= 1 << 31
            if self.missed >= 0 and len(self.data) + 8 <= self.layout.data_size:
                commit |= 1 << 30
                tail = struct.pack("<Q", self.missed)
        raw = struct.pack("<QQ", self.ts_ns, commit) + self.data + tail
        return raw.ljust(self.layout.page_size, b"\xcd")


@dataclass
class SeenEvents:
    """One event as the naive decoder returns it."""

    ts_ns: int
    form: EventFormat
    body: bytes

    def value(self, name: str) -> int:
        f = self.form.fields[name]
        return int.from_bytes(self.body[f.offset : f.offset + f.size], "little", signed=f.signed)

    @property
    def name(self) -> str:
        if "name" not in self.form.fields:
            return ""
        offset, length = struct.unpack_from("<HH", self.body, self.form.fields["name"].offset)
        return self.body[offset : offset + length - 1].decode()


def simple_decode(raw: bytes, where: PageLayout, forms: list[EventFormat]) -> list[list[SeenEvents]]:
    """Decode the events of each page one at a time, following the comment in include/linux/ring_buffer.h."""
    by_id = {form.id: form for form in forms}
    pages = []
    for start in range(0, len(raw), where.page_size):
        ts, commit = struct.unpack_from("<QQ", raw, start)
        base = ts
        data = raw[start + where.data_offset :][: commit & 0x3FFFFFFF]
        at, seen = 0, []
        while at < len(data):
            (head,) = struct.unpack_from("<I", data, at)
            kind, delta = head & 31, head >> 5
            extra = struct.unpack_from("<I", data, at + 4)[0] if at + 8 <= len(data) else 0
            if kind == 29 and not delta:
                break
            if kind == 30:
                ts, at = ts + delta + (extra << 27), at + 8
            elif kind == 31:
                ts, at = delta + (extra << 27) | base >> 59 << 59, at + 8
            elif kind == 29:
                ts, at = ts + delta, at + 4 + extra
            else:
                ts += delta
                body = data[at + 8 : at + 4 + extra] if kind == 0 else data[at + 4 : at + 4 + 4 * kind]
                at += 4 + extra if kind == 0 else 4 + 4 * kind
                ident = struct.unpack_from("<H", body)[0]
                if ident in by_id:
                    seen.append(SeenEvents(ts, by_id[ident], body))
        pages.append(seen)
    return pages
