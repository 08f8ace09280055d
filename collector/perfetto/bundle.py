"""A packet of ftrace events of one CPU: finds where each event begins, one after the other.

This is the only loop over single events; `collector.perfetto.events` decodes their content, thousands at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from collector.perfetto.wire import BYTES, VARINT, fields, varint
from contracts.errors import WireError

FIRST_EVENTS: Final = 16
"""Number of a bundle's first events that are searched for a time; without one the bundle has no place in time."""


@dataclass(slots=True, eq=False)
class Bundle:
    """The events of one CPU in one packet."""

    offset: int
    """Byte of the packet in the file."""
    data: bytes
    cpu: int = 0
    clock: int = 0
    """FtraceClock."""
    ftrace_ns: int = 0
    boot_ns: int = 0
    """The instant of `ftrace_ns` on the boot clock, if the bundle's clock is another."""
    lost: bool = False
    starts: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    descriptors: dict[int, bytes] = field(default_factory=dict)
    """Field of FtraceEvent -> DescriptorProto."""
    wrong: str = ""
    """Damage behind the last of `ends`; "" if there is none."""

    @classmethod
    def parse(cls, offset: int, data: bytes, *, most: int = 1 << 62) -> Bundle:
        """Find the events in a packet's data, at most `most`. `wrong` describes damage; events before it are valid."""
        bundle = cls(offset, data)
        starts, ends = bundle.starts, bundle.ends
        at, size = 0, len(data)
        try:
            while at < size:
                if data[at] == 0x12:  # event
                    length = data[at + 1]
                    start = at + 2
                    if length > 127:
                        # Nearly all lengths take one or two bytes.
                        second = data[start]
                        if second < 128:
                            length += (second - 1) * 128
                            start += 1
                        else:
                            length, start = varint(data, at + 1, size)
                    at = start + length
                    if at > size:
                        raise WireError(f"an event of {length} bytes, of which {size - start} are there")
                    if most:
                        starts.append(start)
                        ends.append(at)
                        most -= 1
                    continue
                at = bundle._other(at)
        except IndexError:
            bundle.wrong = "it ends inside an event"
        except WireError as error:
            bundle.wrong = str(error)
        return bundle

    def _other(self, at: int) -> int:
        """Read a field that is no event, and return where it ends."""
        found = next(fields(self.data, at))
        if found.wire == VARINT:
            match found.number:
                case 1:
                    self.cpu = found.value & 0xFFFF
                case 3:
                    self.lost = bool(found.value)
                case 5:
                    self.clock = found.value
                case 6:
                    self.ftrace_ns = found.value
                case 7:
                    self.boot_ns = found.value
        elif found.wire == BYTES and found.number == 11:
            number, described = 0, b""
            for one in fields(self.data, found.start, found.end):
                if one.number == 1:
                    number = one.value
                elif one.number == 2:
                    described = self.data[one.start : one.end]
            self.descriptors[number] = described
        return found.end

    def first_ns(self) -> int | None:
        """Return the time of the first event in the bundle's clock, ns; None without one."""
        for start, end in zip(self.starts[:FIRST_EVENTS], self.ends[:FIRST_EVENTS], strict=True):
            try:
                for one in fields(self.data, start, end):
                    if one.number == 1 and one.wire == VARINT:
                        return one.value
            except WireError:
                pass
        return None
