"""Decodes ftrace events in the protobuf of a Perfetto trace into columns, thousands at a time.

    FtraceEventBundle (one CPU)
      event: timestamp, pid, and one of
        netif_receive_skb, ...          a message of its own kind, fields by number            "typed"
        generic                         event_name, then name and value of each field          "generic"
        field 65536 and up              fields by number; the bundle's descriptors name them   "described"

The position of an event is known only from the event before it: a loop in Python finds the positions (and does nothing
else). From there on all events are walked at once, field by field: step i reads the i-th field of each. Fields of
generic events carry their names; the order of the fields is determined at one event and verified at all others.

**Whose buffer?** traced replaces kernel addresses by small numbers, which identify an address within a bundle only. It
does so in typed events, and in fields that the kernel declares as `void *`; fields declared as `const void *` (of
`net_dev_start_xmit`, `skb_copy_datagram_iovec`) keep the address. Two rules reveal the address of a number. First,
`net_dev_xmit` follows `net_dev_start_xmit` of the same device and length, because a CPU is in one driver at a time.
Second, a packet that is put on an empty backlog (`netif_rx`) is the next packet received. A number that the rules do
not resolve, or resolve in different ways, is an identity of its own: its records are matched with one another, and
those that name a device are counted in `unresolved`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from collector.pages.decoding import Sightings
from collector.perfetto.bundle import Bundle
from collector.perfetto.walk import TEXT_MASK, Buffer, walk
from collector.perfetto.wire import BYTES, fields
from contracts.arrays import U64, Ints, Mask
from contracts.errors import WireError
from contracts.hooks import HOOKS, TRACEPOINTS, Hook, Way
from contracts.records import Batch

_TYPED: Final = {
    360: (Hook.NETIF_RECEIVE_SKB, {1: "len", 2: "name", 3: "skbaddr"}),
    361: (None, {1: "len", 2: "name", 4: "skbaddr"}),
    365: (Hook.NAPI_GRO_RECEIVE_ENTRY, {7: "len", 10: "name", 15: "skbaddr"}),
    367: (Hook.KFREE_SKB, {3: "skbaddr"}),
}
"""Field of FtraceEvent -> (hook, names of its fields). None: net_dev_xmit, which is no hook but reveals addresses."""
_GENERIC: Final = 327
_XMIT_DONE: Final = 254
"""Number of net_dev_xmit among the hooks in this module."""

_COLUMNS: Final = ("skbaddr", "len", "name", "network_offset", "gso_segs", "reason")
"""Fields that are decoded; a column's number is its index here."""
_NAME: Final = _COLUMNS.index("name")
_NUMBERS: Final = 64
"""Field number of a described event up to which fields are decoded: no event has as many."""
_BY_NAME: Final = {info.name: info.hook for info in TRACEPOINTS}
_KNOWN: Final = {name: int(hook) for name, hook in _BY_NAME.items()} | {"net_dev_xmit": _XMIT_DONE}
_TRANSMIT: Final = np.isin(np.arange(256), [info.hook for info in HOOKS if info.way is Way.TRANSMIT])
_AT_DEVICE: Final = np.isin(np.arange(256), [info.hook for info in HOOKS if info.has_device])
_NAME_MAX: Final = 15
_ETH_HLEN: Final = 14
"""Bytes of an Ethernet header, subtracted if the event has no `network_offset`, as in collector.pages.decoding."""
_KERNEL_HALF: Final = 1 << 47
"""Smallest kernel address: kernel addresses have their upper bits set on every 64-bit machine. Smaller values are
numbers."""
_U: Final = np.uint64


@dataclass(frozen=True, slots=True, eq=False)
class DecodedBundle:
    """Records of one bundle, in the bundle's order and clock."""

    batch: Batch
    damaged: int
    """Events that could not be read."""
    why: str


class EventDecoder:
    """Decodes bundles; its only state is the sightings, the key of skb_id, and counts."""

    def __init__(self, sightings: Sightings, key: tuple[int, int, int]) -> None:
        self.sightings = sightings
        self.skipped = 0
        """Events that belong to no hook."""
        self.unresolved = 0
        """Records whose number could not be resolved to a buffer's address."""
        xor, first, second = key
        self._key = _U(xor), _U(first | 1), _U(second | 1)

    def decode(self, bundles: Sequence[Bundle]) -> list[DecodedBundle]:
        """Return the records of each bundle."""
        buffer = Buffer([bundle.data for bundle in bundles])
        base = np.cumsum([0, *(len(bundle.data) for bundle in bundles)])
        counts = [len(bundle.starts) for bundle in bundles]
        of = np.repeat(np.arange(len(bundles)), counts)
        start = np.array([at for bundle in bundles for at in bundle.starts], np.int64) + base[of]
        end = np.array([at for bundle in bundles for at in bundle.ends], np.int64) + base[of]
        ts, kind, at, until, bad = _outer(buffer, start, end)

        hook = np.zeros(len(start), np.uint8)
        table = np.zeros((len(start), len(_COLUMNS)), np.uint64)
        names = np.zeros((len(start), 2), np.int64)
        """Start and length of the device's name."""
        wanted = _FieldFiller(buffer, hook, table, names, bad)
        for number, (what, meaning) in _TYPED.items():
            rows = np.flatnonzero((kind == number) & ~bad)
            wanted.numbered(rows, at[rows], until[rows], _XMIT_DONE if what is None else int(what), meaning)
        described = _described(bundles)
        for (number, raw), members in described.items():
            told = _description(raw)
            if told is not None:
                inside = np.zeros(len(bundles), np.bool_)
                inside[members] = True
                rows = np.flatnonzero((kind == number) & inside[of] & ~bad)
                wanted.numbered(rows, at[rows], until[rows], *told)
        rows = np.flatnonzero((kind == _GENERIC) & ~bad)
        wanted.generic(rows, at[rows], until[rows])

        if (hook[bad] > 0).any():
            hook[bad] = 0
        self.skipped += int(((hook == 0) & ~bad).sum()) + int((hook == _XMIT_DONE).sum())
        rows = np.flatnonzero(hook)
        return self._batches(bundles, of, rows, ts[rows], hook[rows], table[rows], names[rows], buffer, bad)

    def _batches(
        self,
        bundles: Sequence[Bundle],
        of: Ints,
        rows: Ints,
        ts: U64,
        hook: npt.NDArray[np.uint8],
        table: U64,
        names: Ints,
        buffer: Buffer,
        bad: Mask,
    ) -> list[DecodedBundle]:
        mine = of[rows]
        low, high = buffer.text(names[:, 0], np.minimum(names[:, 1], _NAME_MAX))
        device = self.sightings.codes(low, high)
        address = _addresses(mine, hook, device, table)
        done = hook == _XMIT_DONE
        if done.any():
            keep = ~done
            rows, ts, hook, table, device, address, mine = (
                column[keep] for column in (rows, ts, hook, table, device, address, mine)
            )
        numbers = address < _KERNEL_HALF
        self.unresolved += int((numbers & _AT_DEVICE[hook]).sum())
        # An unresolved number is valid within its bundle: combine it with the bundle's offset into a unique identity.
        place = np.array([bundle.offset for bundle in bundles], np.uint64) if bundles else np.zeros(0, np.uint64)
        address = np.where(numbers, address | (place[mine] << _U(16)) & _U(_KERNEL_HALF - 1), address)
        length = (table[:, 1] & _U(0xFFFFFFFF)).astype(np.uint32)
        offset = table[:, 3].astype(np.uint32).view(np.int32)
        header = np.where(_TRANSMIT[hook], np.where(offset > 0, offset, _ETH_HLEN), 0).astype(np.uint32)
        length -= np.minimum(header, length)
        cpus = np.array([bundle.cpu for bundle in bundles], np.uint16)
        batch = Batch.of(
            len(rows),
            ts_ns=ts.view(np.int64),
            skb_id=self._skb_ids(address),
            dev=device,
            l3_len=length,
            cpu=cpus[mine],
            drop_reason=table[:, 5] & _U(0xFFFF),
            gso_segs=table[:, 4] & _U(0xFFFF),
            hook=hook,
        )
        edges = np.searchsorted(mine, np.arange(len(bundles) + 1))
        damaged = np.bincount(of[bad], minlength=len(bundles)).tolist()
        found = []
        for i, bundle in enumerate(bundles):
            why = bundle.wrong or ("an event that is no message" if damaged[i] else "")
            found.append(DecodedBundle(batch[edges[i] : edges[i + 1]], damaged[i] + bool(bundle.wrong), why))
        return found

    def _skb_ids(self, addresses: U64) -> U64:
        # As PageDecoder.skb_ids: a bijection, so that no kernel address leaves the machine.
        xor, first, second = self._key
        mixed = (addresses ^ xor) * first
        mixed ^= mixed >> _U(32)
        mixed *= second
        return mixed ^ mixed >> _U(32)


def _outer(buffer: Buffer, start: Ints, end: Ints) -> tuple[U64, Ints, Ints, Ints, Mask]:
    """Return for each FtraceEvent its time, its payload's field number, start and end, and whether it is damaged."""
    count = len(start)
    ts = np.zeros(count, np.uint64)
    kind = np.zeros(count, np.int64)
    at, until = np.zeros(count, np.int64), np.zeros(count, np.int64)
    bad = np.zeros(count, np.bool_)
    for step in walk(buffer, np.arange(count), start, end, bad):
        if len(step.varints):
            first = step.varints[step.number[step.varints] == 1]
            ts[step.rows[first]] = step.value[first]
        payload = step.payloads[step.number[step.payloads] > 2]
        rows = step.rows[payload]
        kind[rows], at[rows], until[rows] = step.number[payload], step.at[payload], step.after[payload]
    bad |= ts >> _U(62) > 0
    return ts, kind, at, until, bad


class _FieldFiller:
    """Fills the columns of decoded fields, one kind of event after the other."""

    def __init__(self, buffer: Buffer, hook: npt.NDArray[np.uint8], table: U64, names: Ints, bad: Mask) -> None:
        self._buffer, self._hook, self._table, self._names, self._bad = buffer, hook, table, names, bad

    def numbered(self, rows: Ints, at: Ints, end: Ints, hook: int, meaning: dict[int, str]) -> None:
        """Decode events whose fields have numbers; `meaning` maps field numbers to columns."""
        if not len(rows):
            return
        self._hook[rows] = hook
        column = np.full(_NUMBERS, -1, np.int64)
        for number, name in meaning.items():
            column[number] = _COLUMNS.index(name)
        for step in walk(self._buffer, rows, at, end, self._bad):
            which = column[np.minimum(step.number, _NUMBERS - 1)]
            told = step.varints[which[step.varints] >= 0]
            self._table[step.rows[told], which[told]] = step.value[told]
            text = step.payloads[which[step.payloads] == _NAME]
            self._names[step.rows[text], 0] = step.at[text]
            self._names[step.rows[text], 1] = step.after[text] - step.at[text]

    def generic(self, rows: Ints, at: Ints, end: Ints) -> None:
        """Decode events that contain their own name and those of their fields."""
        if not len(rows):
            return
        buffer = self._buffer
        # traced writes event_name first, with its length in one byte; events written otherwise are read one by one.
        length = buffer.bytes[buffer.clip(at + 1)].astype(np.int64)
        regular = (buffer.bytes[buffer.clip(at)] == 0x0A) & (length < 128) & (at + 2 + length <= end)
        start = at + 2
        low, high = buffer.text(start, np.minimum(length, 16))
        third = buffer.words[buffer.clip(start + 16)] & TEXT_MASK.take(np.maximum(length - 16, 0), mode="clip")
        for name, hook in _KNOWN.items():
            words = np.frombuffer(name.encode().ljust(24, b"\0"), "<u8")
            mine = regular & (length == len(name)) & (low == words[0]) & (high == words[1]) & (third == words[2])
            members = np.flatnonzero(mine)
            if len(members):
                self._hook[rows[members]] = hook
                self._named(rows[members], start[members] + length[members], end[members])
        for i in np.flatnonzero(~regular).tolist():
            self._one(int(rows[i]), int(at[i]), int(end[i]))

    def _named(self, rows: Ints, at: Ints, end: Ints) -> None:
        """Decode the fields, from `at` on, of events of one name."""
        order = self._order(int(at[0]), int(end[0]))
        buffer = self._buffer
        fine = np.ones(len(rows), np.bool_)
        begun = at
        for place in range(max(order, default=-1) + 1):
            length = buffer.bytes[buffer.clip(at + 1)].astype(np.int64)
            after = at + 2 + length
            fine &= (buffer.bytes[buffer.clip(at)] == 0x12) & (length < 128) & (after <= end)
            if place in order:
                fine &= self._field(rows, at + 2, after, order[place])
            at = after
        for i in np.flatnonzero(~fine).tolist():
            self._table[rows[i]] = 0
            self._fields(int(rows[i]), int(begun[i]), int(end[i]))

    def _order(self, at: int, end: int) -> dict[int, str]:
        """Return the positions of the decoded fields in the event at `at`: position -> name."""
        data = self._buffer.bytes[at:end].tobytes()
        found: dict[int, str] = {}
        try:
            for place, one in enumerate(fields(data)):
                name = next(data[f.start : f.end] for f in fields(data, one.start, one.end) if f.number == 1)
                if name.decode("latin-1") in _COLUMNS:
                    found[place] = name.decode("latin-1")
        except (WireError, StopIteration):
            pass
        return found

    def _field(self, rows: Ints, at: Ints, end: Ints, name: str) -> Mask:
        """Read a field that should have the given name; return where it does."""
        buffer = self._buffer
        words = np.frombuffer(name.encode().ljust(16, b"\0"), "<u8")
        size = np.full(len(at), len(name))
        low, high = buffer.text(at + 2, size)
        head = buffer.words[buffer.clip(at)] & _U(0xFFFF)
        fine: Mask = (head == _U(len(name) << 8 | 0x0A)) & (low == words[0]) & (high == words[1])
        value_at = at + 2 + len(name)
        tag = buffer.bytes[buffer.clip(value_at)]
        value, after = buffer.varints(value_at + 1)
        if name == "name":
            fine &= (tag == 0x1A) & (after + np.minimum(value, _U(1 << 20)).astype(np.int64) == end)
            self._names[rows[fine], 0] = after[fine]
            self._names[rows[fine], 1] = value[fine].astype(np.int64)
        else:
            fine &= ((tag == 0x20) | (tag == 0x28)) & (after == end)
            self._table[rows[fine], _COLUMNS.index(name)] = value[fine]
        return fine

    def _one(self, row: int, at: int, end: int) -> None:
        """Decode one event that is not written the way traced writes events."""
        try:
            data = self._buffer.bytes[at:end].tobytes()
            name = next((data[f.start : f.end] for f in fields(data) if f.number == 1 and f.wire == BYTES), b"")
        except WireError:
            self._bad[row] = True
            return
        self._hook[row] = _KNOWN.get(name.decode("latin-1"), 0)
        if self._hook[row]:
            self._fields(row, at, end)

    def _fields(self, row: int, at: int, end: int) -> None:
        data = self._buffer.bytes[at:end].tobytes()
        try:
            for one in fields(data):
                if one.number == 2 and one.wire == BYTES:
                    self._value(row, data, at, one.start, one.end)
        except WireError:
            self._bad[row] = True

    def _value(self, row: int, data: bytes, base: int, at: int, end: int) -> None:
        told = {f.number: f for f in fields(data, at, end)}
        name = data[told[1].start : told[1].end].decode("latin-1") if 1 in told else ""
        if name == "name" and 3 in told:
            self._names[row] = base + told[3].start, told[3].end - told[3].start
        elif name in _COLUMNS:
            value = told.get(4) or told.get(5)
            self._table[row, _COLUMNS.index(name)] = value.value if value else 0


def _described(bundles: Sequence[Bundle]) -> dict[tuple[int, bytes], list[int]]:
    """Return (field of FtraceEvent, its description) -> indices of the bundles with that description."""
    found: dict[tuple[int, bytes], list[int]] = {}
    for i, bundle in enumerate(bundles):
        for number, raw in bundle.descriptors.items():
            found.setdefault((number, raw), []).append(i)
    return found


def _description(raw: bytes) -> tuple[int, dict[int, str]] | None:
    """Return hook and decoded fields (number -> name) of a DescriptorProto; None for an event of no hook."""
    try:
        name = b""
        meaning: dict[int, str] = {}
        for one in fields(raw):
            if one.number == 1 and one.wire == BYTES:
                name = raw[one.start : one.end]
            elif one.number == 2 and one.wire == BYTES:
                told = {f.number: f for f in fields(raw, one.start, one.end)}
                if 1 in told and 3 in told and 0 < told[3].value < _NUMBERS:
                    meaning[told[3].value] = raw[told[1].start : told[1].end].decode("latin-1")
    except WireError:
        return None
    hook = _KNOWN.get(name.decode("latin-1"))
    if hook is None:
        return None
    return hook, {number: text for number, text in meaning.items() if text in _COLUMNS}


def _addresses(of: Ints, hook: npt.NDArray[np.uint8], device: npt.NDArray[Any], table: U64) -> U64:
    """Return the addresses of buffers, with bundle-local numbers replaced by addresses where the rules resolve them."""
    address = table[:, 0].copy()
    numbers = address < _KERNEL_HALF
    if not numbers.any():
        return address
    length = table[:, 1]
    places = (of << 32) | device
    votes: list[tuple[Ints, Ints]] = []
    for first, then, clean in (
        (Hook.NET_DEV_START_XMIT, _XMIT_DONE, False),
        (Hook.NETIF_RX, Hook.NETIF_RECEIVE_SKB, True),
    ):
        at = np.flatnonzero((hook == first) | (hook == then))
        at = at[np.argsort(places[at], kind="stable")]
        one, two = at[:-1], at[1:]
        told = (hook[one] == first) & (hook[two] == then) & (places[one] == places[two]) & (length[one] == length[two])
        if clean:
            # Only if the backlog was empty: the event before, at the same device, was a reception.
            told[1:] &= (hook[at[:-2]] == then) & (places[at[:-2]] == places[at[2:]])
            told[:1] = False
        told &= numbers[two] & ~numbers[one]
        votes.append((two[told], one[told]))
    number = np.concatenate([two for two, _ in votes])
    knows = np.concatenate([one for _, one in votes])
    key = (of.astype(np.uint64) << _U(32)) | (address & _U(0xFFFFFFFF))
    ranked = np.lexsort((address[knows], key[number]))
    number, knows = number[ranked], knows[ranked]
    keys, first_at, count = np.unique(key[number], return_index=True, return_counts=True)
    if not len(keys):
        return address
    lowest, highest = address[knows[first_at]], address[knows[first_at + count - 1]]
    rows = np.flatnonzero(numbers)
    found = np.minimum(np.searchsorted(keys, key[rows]), len(keys) - 1)
    sure = (keys[found] == key[rows]) & (lowest == highest)[found]
    address[rows[sure]] = lowest[found[sure]]
    return address


assert {info.name for info in TRACEPOINTS} <= _KNOWN.keys()
