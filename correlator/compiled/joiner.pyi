"""The type of the compiled module.

All arrays are C-contiguous. A column that a method returns is a bytearray, which numpy can use without a copy. Methods
raise `IndexError` for arrays of other sizes, before they read any element, `MemoryError`, and what an asked function
raises; after an error in `add`, `restore` or `end` the joiner refuses to work (`RuntimeError`). One thread may use a
joiner at a time (`RuntimeError`); `add`, `restore` and `end` release the GIL.
"""

from collections.abc import Callable
from typing import Any, TypeAlias, final

import numpy as np
import numpy.typing as npt

from contracts.arrays import Ints

Column: TypeAlias = npt.NDArray[Any] | None
Columns: TypeAlias = tuple[bytearray, ...]

@final
class Joiner:
    def __new__(
        cls,
        tables: tuple[bytes, bytes, bytes],
        times: tuple[int, int, int],
        wanted: tuple[bool, bool],
        asked: tuple[
            Callable[[int, int], tuple[int, int, int, int]],
            Callable[[int], int],
            Callable[[int, int], bool],
            Callable[[bytes], bytes],
        ],
    ) -> Joiner:
        """Make a joiner of no records.

        `tables`, of 256 bytes each: by hook number, bits of `correlator.answers.HookBit`; by a record's traits, the two
        bits that matter where the key changes; by the number of bytes that a copy is shorter than its packet, whether
        it may be.

        `times`: timeout of a life, longest time from a tail to its head, and what is added to times for UTC, ns.
        `wanted`: whether `rows` and `measured` are asked for.

        `asked`: `judge`, `start`, `passes` and `shape` of `correlator.answers.Answers`, each called once for each case
        until `forget`.
        """

    def forget(self, only: Ints, /) -> None:
        """Forget all answers. `only`: device number of each sighting, -1 for no device or several candidates."""

    def begin(self, gap_starts: Ints, gap_ends: Ints, asked_devs: Ints, asked_times: Ints, /) -> None:
        """Begin a slice: with disjoint gaps in order, and neighbour requests (answers) ordered by device and time."""

    def add(self, columns: tuple[Column, ...], /) -> None:
        """Add records, in order of time.

        `columns`: ts, skb, hook, dev, length, reason, and key, trait, flow, proto, cpu, each of which may be None; of
        the dtypes of `contracts.records` and, for trait and flow, of `correlator.records.Records`.
        """

    def end(self, upto_ns: int, last: bool, open_records: int, loose_records: int, /) -> bytes:
        """End a slice, and lives that are idle; returns the numbers that `correlator.lives.Numbers` names, int64."""

    def windows(self, before_utc_ns: int | None, /) -> tuple[bytearray, bytearray]:
        """Return the windows that end at or before a time (None: all), and forget them.

        int64 of shapes (6, n) and (4, m): the tables of `correlator.windows`, in their order.
        """

    def rows(self, entries: npt.NDArray[np.int32], /) -> Columns:
        """Return the columns of `contracts.schema.Delays`, and forget the rows.

        `entries` has the index into `Rows.devices` of each entry that `shape` has named. Raises `IndexError` if it
        lacks one; the rows then stay.
        In order of time: rows of lives that have ended, and then those of lives that had waited for another buffer's.
        """

    def measured(self) -> tuple[Columns, Columns]:
        """Return the lives with rows, and forget them.

        Records, life by life: ts, place, length, cpu, trait, proto, key, flow, number, cross. Lives: shape (the first
        number of the answer), packet, size, length, grade, waited.
        """

    def open(self) -> tuple[Columns, Columns]:
        """Return the open lives: records as in `measured`; skb and size of each life."""

    def loose(self) -> tuple[Columns, Columns]:
        """Return the lives that wait for another buffer's: records as in `measured`; skb, size, head, end, grade."""

    def restore(self, columns: tuple[Column, ...], /) -> None:
        """Take records of open lives, in order of time; `columns` as in `add`, and number and cross."""

    def loosen(self, skb: int, end: int, head: bool, grade: int, /) -> None:
        """Make the open life of a buffer one that waits. Raises `ValueError` for a life that does not exist."""
