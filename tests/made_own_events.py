"""Hand-made events of ftrace itself, with fields of all kinds, in the formats of real kernels."""

import struct
from dataclasses import dataclass
from typing import Any

from collector.pages.formats import PageLayout

COMMON = """\
\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;
\tfield:unsigned char common_flags;\toffset:2;\tsize:1;\tsigned:0;
\tfield:unsigned char common_preempt_count;\toffset:3;\tsize:1;\tsigned:0;
\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;
"""
# Formats of Linux 6.18, with `L` for the size of a long; the last one is made up of kinds that few events have.
FIELDS = {
    "ftrace:function": (1, [("unsigned long ip", 8, "L"), ("unsigned long parent_ip", "8+L", "L"),
                            ("unsigned long args[]", "8+2*L", 0)]),
    "ftrace:kernel_stack": (4, [("int size", 8, 4), ("unsigned long caller[8]", "8+L", "8*L")]),
    "ftrace:print": (5, [("unsigned long ip", 8, "L"), ("char buf[]", "8+L", 0)]),
    "ftrace:bprint": (6, [("unsigned long ip", 8, "L"), ("const char * fmt", "8+L", "L"), ("u32 buf[]", "8+2*L", 0)]),
    "ftrace:funcgraph_entry": (11, [("unsigned long func", 8, "L"), ("unsigned int depth", "8+L", 4),
                                    ("unsigned long args[]", "8+2*L", 0)]),
    "ftrace:bputs": (14, [("unsigned long ip", 8, "L"), ("const char * str", "8+L", "L")]),
    "ftrace:raw_data": (16, [("unsigned int id", 8, 4), ("char buf[]", 12, 0)]),
    "some:kinds": (2500, [("unsigned char addr[6]", 8, 6), ("char name[10]", 14, 10), ("__data_loc char[] text", 24, 4),
                          ("__rel_loc char[] near", 28, 4), ("__data_loc unsigned char[] raw", 32, 4),
                          ("short below", 36, 2), ("bool yes", 38, 1), ("s64 far", 40, 8)]),
}  # fmt: skip
PRINTED = {"ftrace:print": '"%ps: %s", (void *)REC->ip, REC->buf'}
QUOTES = '""'
LAYOUTS = {8: PageLayout(0, 8, 8, 16, 4080), 4: PageLayout(0, 8, 4, 12, 4084)}


def texts(long: int) -> dict[str, str]:
    """Return event -> text of its `format` file, for a machine whose long has `long` bytes."""
    made = {}
    for event, (ident, fields) in FIELDS.items():
        lines = "".join(
            f"\tfield:{what};\toffset:{_value(offset, long)};\tsize:{_value(size, long)};"
            f"\tsigned:{int(what.split()[0] in ('int', 'short', 's64'))};\n"
            for what, offset, size in fields
        )
        head = f"name: {event.partition(':')[2]}\nID: {ident}\nformat:\n{COMMON}\n"
        made[event] = f"{head}{lines}\nprint fmt: {PRINTED.get(event, QUOTES)}\n"
    return made


def _value(of: int | str, long: int) -> int:
    return of if isinstance(of, int) else sum(_product(part, long) for part in of.split("+"))


def _product(part: str, long: int) -> int:
    result = 1
    for factor in part.split("*"):
        result *= long if factor == "L" else int(factor)
    return result


@dataclass
class EventWriter:
    """Writes events as a machine of a given byte order and word size does."""

    big: bool = False
    long: int = 8

    @property
    def layout(self) -> PageLayout:
        return LAYOUTS[self.long]

    def _pack(self, code: str, *values: int) -> bytes:
        return struct.pack((">" if self.big else "<") + code.replace("L", "Q" if self.long == 8 else "I"), *values)

    def event(self, event: str, /, pid: int = 7, **values: Any) -> bytes:
        """Return the payload of an event; texts are `bytes` with their NUL."""
        raw = self._pack("HBBi", FIELDS[event][0], 0, 1, pid)
        pad = self._pack("I", 0) if self.long == 8 else b""
        match event:
            case "ftrace:function":
                return raw + self._pack("LL", values["ip"], values["parent_ip"]) + values["args"]
            case "ftrace:kernel_stack":
                callers = values["caller"]
                return raw + self._pack("i", len(callers)) + pad + self._pack("L" * len(callers), *callers)
            case "ftrace:print":
                return raw + self._pack("L", values["ip"]) + values["buf"]
            case "ftrace:bprint":
                return raw + self._pack("LL", values["ip"], values["fmt"]) + values["buf"]
            case "ftrace:funcgraph_entry":
                # The struct is packed: without arguments it ends before the offset of the arguments in its format.
                return raw + self._pack("L", values["func"]) + self._pack("I", values["depth"])
            case "ftrace:bputs":
                return raw + self._pack("LL", values["ip"], values["str"])
            case "ftrace:raw_data":
                return raw + self._pack("I", values["id"]) + values["buf"]
        text, near, data = values["text"], values["near"], values["raw"]
        end = 48
        raw += values["addr"] + values["name"].ljust(10, b"\0")
        raw += self._pack("I", end | len(text) << 16)
        raw += self._pack("I", (end + len(text) - 32) | len(near) << 16)
        raw += self._pack("I", (end + len(text) + len(near)) | len(data) << 16)
        raw += self._pack("h?", values["below"], values["yes"]).ljust(4, b"\0") + self._pack("q", values["far"])
        return raw + text + near + data

    def pages(self, events: list[tuple[int, bytes]], start_ns: int) -> list[bytes]:
        """Return ring-buffer pages of events, given as (ns since the event before, payload)."""
        made: list[bytes] = []
        data, ts, first = b"", start_ns, start_ns
        for delta, payload in events:
            payload += b"\0" * (-len(payload) % 4)
            words = len(payload) // 4
            kind = words if words <= 28 else 0
            whole = self._head(kind, delta) + (b"" if kind else self._pack("I", len(payload) + 4)) + payload
            if len(data) + len(whole) > self.layout.data_size:
                made.append(self._page(first, data))
                data, first = b"", ts
            data, ts = data + whole, ts + delta
        return [*made, self._page(first, data)]

    def _head(self, kind: int, delta: int) -> bytes:
        return self._pack("I", kind << 27 | delta if self.big else kind | delta << 5)

    def _page(self, ts: int, data: bytes) -> bytes:
        return (self._pack("QL", ts, len(data)) + data).ljust(4096, b"\xcd")
