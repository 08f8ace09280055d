"""Hand-made trace.dat files from the pages of `ring_pages`: both versions and byte orders, compressed or not."""

import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import zstandard

from collector.pages.formats import EventFormat, PageLayout
from tests.ring_pages import EVENTS, FORMS, Page, format_text, layout, payload

Buffers = Mapping[str, Mapping[int, Sequence[bytes]]]

UNAME = b"Linux somewhere 6.18.0 #1 SMP x86_64\0"
CHUNK_PAGES = 3


def header_page(where: PageLayout) -> str:
    rows = [
        ("u64 timestamp", where.timestamp_offset, 8, 0),
        ("local_t commit", where.commit_offset, where.commit_size, 1),
        ("int overwrite", where.commit_offset, 1, 1),
        ("char data", where.data_offset, where.data_size, 1),
    ]
    return "".join(f"\tfield: {d};\toffset:{o};\tsize:{s};\tsigned:{g};\n" for d, o, s, g in rows)


@dataclass
class MadeTraceDat:
    """A file in the making. `buffers`: name -> CPU -> pages."""

    buffers: Buffers
    version: int = 7
    big: bool = False
    algorithm: str = "none"
    page_size: int = 4096
    clock: str = "mono"
    options: Sequence[tuple[int, bytes]] = ((5, UNAME),)
    events: Mapping[str, tuple[int, str]] = field(default_factory=lambda: EVENTS)
    sections_compressed: bool = True
    texts: Mapping[str, str] | None = None
    """Formats of a real kernel, in place of those of `events`."""
    own: Sequence[str] = ()
    """Formats of ftrace's own events, which a file stores separately."""
    pages_like: PageLayout | None = None
    """Layout of the pages, if it is not that of 64-bit kernels."""

    def number(self, code: str, value: int) -> bytes:
        return struct.pack((">" if self.big else "<") + code, value)

    def content(self) -> bytes:
        head = b"\x17\x08\x44tracing" + str(self.version).encode() + b"\0" + bytes([self.big, self._layout.commit_size])
        head += self.number("I", self.page_size)
        return self._version_6(head) if self.version == 6 else self._version_7(head)

    @property
    def _layout(self) -> PageLayout:
        return self.pages_like or layout(self.page_size)

    def _own(self) -> bytes:
        return self.number("I", len(self.own)) + b"".join(
            self.number("Q", len(text.encode())) + text.encode() for text in self.own
        )

    def _header_info(self) -> bytes:
        text = header_page(self._layout).encode()
        return b"".join(
            name + b"\0" + self.number("Q", len(body)) + body
            for name, body in ((b"header_page", text), (b"header_event", b"# nothing of interest"))
        )

    def _formats(self) -> bytes:
        systems: dict[str, list[bytes]] = {}
        texts = self.texts or {event: format_text(event, *what) + "\n" for event, what in self.events.items()}
        for event, text in texts.items():
            systems.setdefault(event.partition(":")[0], []).append(text.encode())
        raw = self.number("I", len(systems))
        for system, texts in systems.items():
            raw += system.encode() + b"\0" + self.number("I", len(texts))
            raw += b"".join(self.number("Q", len(text)) + text for text in texts)
        return raw

    def _option(self, ident: int, data: bytes) -> bytes:
        return self.number("H", ident) + self.number("I", len(data)) + data

    def _version_6(self, raw: bytes) -> bytes:
        raw += self._header_info() + self._own() + self._formats()
        raw += self.number("I", 0) + self.number("I", 0) + self.number("Q", 0)
        cpus = max((cpu + 1 for pages in self.buffers.values() for cpu in pages), default=0)
        raw += self.number("I", cpus) + b"options  \0"
        for option in (*self.options, (4, f"local [{self.clock}] boot\0".encode())):
            raw += self._option(*option)
        names = [name for name in self.buffers if name]
        table = 16 * cpus
        end = len(raw) + sum(6 + 9 + len(name) for name in names) + 2 + 10 + table
        # Behind the first table those of the other buffers, then all pages.
        where = {name: end + i * (10 + table) for i, name in enumerate(names)}
        for name in names:
            raw += self._option(3, self.number("Q", where[name]) + name.encode() + b"\0")
        raw += self.number("H", 0)
        at = -(-(end + len(names) * (10 + table)) // self.page_size) * self.page_size
        tail = b""
        begin = at
        for name in ("", *names):
            raw += b"flyrecord\0"
            for cpu in range(cpus):
                body = b"".join(self.buffers.get(name, {}).get(cpu, ()))
                raw += self.number("Q", at) + self.number("Q", len(body))
                tail, at = tail + body, at + len(body)
        return raw.ljust(begin, b"\0") + tail

    def _version_7(self, raw: bytes) -> bytes:
        raw += self.algorithm.encode() + b"\x001\0"
        place = len(raw)
        raw += bytes(8)
        options = list(self.options)
        own = ((17, self._own()),) if self.own else ()
        for ident, body in ((16, self._header_info()), *own, (18, self._formats())):
            options.append((ident, self.number("Q", len(raw))))
            raw += self._section(ident, body)
        for name, cpus in self.buffers.items():
            at = len(raw)
            data, table = b"", b""
            for cpu, pages in cpus.items():
                body = self._data(pages)
                told = len(body) - (4 if self.algorithm != "none" else 0)
                data += b"\0" * (-(at + 16 + len(data)) % self.page_size)
                table += self.number("I", cpu) + self.number("Q", at + 16 + len(data)) + self.number("Q", told)
                data += body
            raw += self.number("H", 3) + self.number("H", self.algorithm != "none") + self.number("I", 0)
            raw += self.number("Q", len(data)) + data
            told_of = self.number("Q", at) + name.encode() + b"\0" + self.clock.encode() + b"\0"
            options.append((3, told_of + self.number("I", self.page_size) + self.number("I", len(cpus)) + table))
        # Two sections of options, one leading to the other.
        half = len(options) // 2
        for part, last in ((options[:half], False), (options[half:], True)):
            body = b"".join(self._option(*option) for option in part)
            size = len(body) + 14
            after = 0 if last else len(raw) + 16 + size
            if not last:
                raw = raw[:place] + self.number("Q", len(raw)) + raw[place + 8 :]
            raw += self._section(0, body + self._option(0, self.number("Q", after)), packed=False)
        return raw

    def _section(self, ident: int, body: bytes, *, packed: bool = True) -> bytes:
        packed = packed and self.sections_compressed and self.algorithm != "none"
        if packed:
            whole, body = len(body), self.packed(body)
            body = self.number("I", len(body)) + self.number("I", whole) + body
        return self.number("H", ident) + self.number("H", packed) + self.number("IQ"[:1], 0) + self.number(
            "Q", len(body)
        ) + body  # fmt: skip

    def packed(self, body: bytes) -> bytes:
        return zlib.compress(body) if self.algorithm == "zlib" else zstandard.ZstdCompressor().compress(body)

    def _data(self, pages: Sequence[bytes]) -> bytes:
        if self.algorithm == "none":
            return b"".join(pages)
        chunks = [b"".join(pages[i : i + CHUNK_PAGES]) for i in range(0, len(pages), CHUNK_PAGES)]
        raw = self.number("I", len(chunks))
        for chunk in chunks:
            body = self.packed(chunk)
            raw += self.number("I", len(body)) + self.number("I", len(chunk)) + body
        return raw


def to_big(page: bytes, where: PageLayout, forms: Sequence[EventFormat]) -> bytes:
    """Convert a page to that of a big-endian machine, event by event (include/linux/ring_buffer.h)."""
    by_id = {form.id: form for form in forms}
    raw = bytearray(page)
    ts, commit = struct.unpack_from("<QQ", raw)
    struct.pack_into(">QQ", raw, 0, ts, commit)
    at, end = where.data_offset, where.data_offset + (commit & 0x3FFFFFFF)
    if commit & 1 << 30:
        raw[end : end + 8] = raw[end : end + 8][::-1]
    while at < end:
        (head,) = struct.unpack_from("<I", raw, at)
        kind, delta = head & 31, head >> 5
        struct.pack_into(">I", raw, at, kind << 27 | delta)
        if kind == 29 and not delta:
            break
        extra = 0
        if kind == 0 or kind >= 29:
            (extra,) = struct.unpack_from("<I", raw, at + 4)
            struct.pack_into(">I", raw, at + 4, extra)
        if kind <= 28:
            body = at + (8 if kind == 0 else 4)
            form = by_id[struct.unpack_from("<H", raw, body)[0]]
            for f in form.fields.values():
                if f.is_array and not (f.is_data_loc or f.is_rel_loc):
                    continue
                raw[body + f.offset : body + f.offset + f.size] = raw[body + f.offset : body + f.offset + f.size][::-1]
        at += 8 if kind in (30, 31) else 4 + extra if kind in (0, 29) else 4 + 4 * kind
    return bytes(raw)


def event(name: str, skb: int, *, dev: bytes | None = None, **values: int) -> bytes:
    """Return the bytes of an event."""
    form = FORMS[name]
    given = {"skbaddr": skb, **{key: value for key, value in values.items() if key in form.fields}}
    return payload(form, name=dev if "name" in form.fields else None, **given)


def traffic(cpu: int, pages: int, *, page_size: int = 4096, start_ns: int = 10**12, step_ns: int = 700) -> list[bytes]:
    """Return pages of one CPU: packets from eth0 over veth0 and br0 to out0, mixed with every kind of ring entry."""
    where, made = layout(page_size), []
    ts, number = start_ns + cpu * 13, 0
    path = [
        ("net:net_dev_queue", b"eth0"), ("net:net_dev_start_xmit", b"eth0"), ("net:netif_rx", b"veth0"),
        ("net:netif_receive_skb", b"veth0"), ("net:netif_receive_skb", b"br0"), ("net:net_dev_queue", b"out0"),
        ("net:net_dev_start_xmit", b"out0"), ("skb:consume_skb", None),
    ]  # fmt: skip
    for _ in range(pages):
        page = Page(where, ts)
        while True:
            name, dev = path[number % len(path)]
            skb = 0xFFFF888000000000 + 4096 * cpu + 256 * (number // len(path) % 5)
            length = 84 + (14 if name.startswith("net:net_dev") else 0)
            if number % 97 == 50:
                page.extend(1 << 28)
                ts += 1 << 28
            if number % 41 == 7:
                page.discarded(16, 5)
                ts += 5
            if not page.event(event(name, skb, dev=dev, len=length, network_offset=14), step_ns):
                break
            ts, number = ts + step_ns, number + 1
        page.pad(sized=False)
        made.append(page.bytes())
    return made
