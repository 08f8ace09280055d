"""Whatever interrupts the programs that fill a ring, the reader returns each record once, whole and in order."""

import mmap
import os
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from collector.bpf.layout import RING, WRITTEN
from collector.bpf.ring import SLOT_BYTES, BufferRing, MappedRing
from contracts.abi import COLUMNS, HOOK_SLOTS, RECORD, WORDS
from contracts.hooks import Hook

SIZE = mmap.PAGESIZE
STEPS = 1500
NESTED = 8
"""Runs that may be under way on a CPU: one of each program."""
FACTOR = np.uint64(0x9E3779B97F4A7C15)


def record(number):
    """Return the eight words of a record, each of which depends on its number."""
    made = np.zeros((), RECORD)
    words = (np.arange(1, 9, dtype=np.uint64) + np.uint64(number)) * FACTOR
    made[...] = words.view(RECORD)[0]
    made["hook"] = Hook.NETIF_RX
    return made


class MadeMapped:
    """The programs' half of a mapped array, as mace_put() in bpf/mace.bpf.c. `first`: number of the first record."""

    reader = MappedRing

    def __init__(self, first):
        self.fd = os.memfd_create("ring")
        os.ftruncate(self.fd, RING.itemsize + SIZE)
        memory = mmap.mmap(self.fd, RING.itemsize + SIZE)
        self.head = np.frombuffer(memory, RING, 1)
        self.head["head"] = self.head["tail"] = first
        self.slots = np.frombuffer(memory, WORDS, SIZE // RECORD.itemsize, RING.itemsize)

    @classmethod
    def firsts(cls):
        # A slot of a fresh ring has no mark, so any number may be the first.
        return st.sampled_from([0, 2**32 - 30, 2**63 - 100]) | st.integers(0, 1000)

    def has_room(self):
        return int(self.head["head"][0]) - int(self.head["tail"][0]) <= len(self.slots) - HOOK_SLOTS

    def reserve(self):
        number = int(self.head["head"][0])
        self.head["head"] += np.uint64(1)
        assert number - int(self.head["tail"][0]) < len(self.slots), "a slot that the reader has not released"
        return number

    def write(self, number):
        """Write a record word by word; yield where an interrupt may come, and after all words but the last."""
        words = record(number).reshape(1).view("<u8")
        words[7] |= np.uint64(WRITTEN)
        for i, word in enumerate(words):
            if i in (0, 3, 7):
                yield
            self.slots[number % len(self.slots)][i] = word


class MadeBuffer:
    """The kernel's half of a BPF ring buffer, in a file that holds the data twice, as the kernel maps it."""

    reader = BufferRing

    def __init__(self, first):
        self.fd = os.memfd_create("ring")
        os.ftruncate(self.fd, 2 * mmap.PAGESIZE + 2 * SIZE)
        memory = mmap.mmap(self.fd, 0)
        self.consumed = np.frombuffer(memory, np.uint64, 1)
        self.produced = np.frombuffer(memory, np.uint64, 1, mmap.PAGESIZE)
        self.data = np.frombuffer(memory, np.uint8, 2 * SIZE, 2 * mmap.PAGESIZE)
        self.consumed[0] = self.produced[0] = first * SLOT_BYTES

    @classmethod
    def firsts(cls):
        return st.sampled_from([0, 2**32 // SLOT_BYTES - 5]) | st.integers(0, 1000)

    def has_room(self):
        return True

    def _put(self, number, offset, value):
        raw = np.frombuffer(value.tobytes(), np.uint8)
        at = (number * SLOT_BYTES + offset + np.arange(len(raw))) % SIZE
        self.data[at] = self.data[at + SIZE] = raw

    def reserve(self):
        position = int(self.produced[0])
        if position + SLOT_BYTES - int(self.consumed[0]) >= SIZE:
            return None
        self._put(position // SLOT_BYTES, 0, np.uint32(1 << 31 | RECORD.itemsize))
        self.produced[0] = position + SLOT_BYTES
        return position // SLOT_BYTES

    def write(self, number):
        yield
        self._put(number, 8, record(number))
        yield
        self._put(number, 0, np.uint32(RECORD.itemsize))


def program(made, counts):
    """One run of a program; it yields where an interrupt may come."""
    counts["calls"] += 1
    number = None
    if made.has_room():
        yield
        number = made.reserve()
    if number is None:
        counts["lost"] += 1
        return
    counts["written"] += 1
    yield from made.write(number)


def check(records, number):
    """Check that these are the records from `number` on; return the number behind them."""
    words = records.view(WORDS)
    for at in range(len(records)):
        assert words[at].tobytes() == record(number + at).tobytes()
    return number + len(records)


def run(made, first, seed):
    rng = random.Random(seed)
    ring = made.reader(0, made.fd, SIZE)
    counts = dict.fromkeys(("calls", "lost", "written", "busy"), 0)
    under_way, held = [], []
    number = first
    eager = rng.random()

    def step(running):
        try:
            next(running)
        except StopIteration:
            under_way.pop()

    for _ in range(STEPS):
        if len(under_way) < NESTED and (not under_way or rng.random() < 0.3):
            under_way.append(program(made, counts))
        # Only the innermost run goes on: the others wait until the interrupt ends.
        step(under_way[-1])
        if rng.random() < eager / 4:
            stretches, complete = ring.take()
            held += stretches
            assert complete or under_way, "a slot can be busy only while a program runs"
            counts["busy"] += not complete and ring.seen < first + counts["written"] - len(under_way)
            assert 0 <= ring.fill <= 1
        while held and rng.random() < eager / 3:
            some = rng.randint(1, len(held[0].records))
            number = check(held[0].records[:some], number)
            held[0].given(some)
            if len(held[0].records) == 0:
                held.pop(0)
        if rng.random() < 0.05:
            ring.copy_out()
        if rng.random() < 0.2:
            ring.release()
            assert 0 <= ring.waiting <= 1
    while under_way:
        step(under_way[-1])
    stretches, complete = ring.take()
    assert complete
    for taken in held + stretches:
        number = check(taken.records, number)
        taken.given(len(taken.records))
    assert number - first == counts["written"]
    assert counts["written"] + counts["lost"] == counts["calls"]
    ring.release()
    assert ring.waiting == ring.fill == 0
    assert ring.take() == ([], True)
    ring.close()
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("kind", [MadeMapped, MadeBuffer])
@given(st.data(), st.integers(0, 2**32))
def test_each_written_record_is_returned_once_whole_and_in_order(kind, data, seed):
    first = data.draw(kind.firsts())
    made = kind(first)
    try:
        run(made, first, seed)
    finally:
        os.close(made.fd)


@pytest.mark.parametrize("kind", [MadeMapped, MadeBuffer])
def test_the_runs_above_reach_every_case(kind):
    """Rings get full and wrap; a slot is busy while later slots are complete."""
    total = dict.fromkeys(("lost", "written", "busy"), 0)
    for seed in range(30):
        made = kind(0)
        counts = run(made, 0, seed)
        os.close(made.fd)
        for name in total:
            total[name] += counts[name]
    assert total["lost"] > 0
    assert total["busy"] > 0
    assert total["written"] > 30 * SIZE // RECORD.itemsize


def test_a_view_shows_the_hook_without_the_mark():
    made = MadeMapped(0)
    ring = MappedRing(3, made.fd, SIZE)
    for _ in made.write(made.reserve()):
        assert ring.take() == ([], False)
    (taken,), complete = ring.take()
    assert complete
    assert taken.records.dtype == COLUMNS
    assert taken.records["hook"].tolist() == [Hook.NETIF_RX]
    assert taken.held
    os.close(made.fd)
