"""Batches with content and without."""

import numpy as np
import pytest

from contracts import abi
from contracts.records import CONTENT_DTYPES, DTYPES, Batch, Content, Flag

KEYS = [7, 8, 9]


def keyed():
    return Batch.of(3, Content.of(3, packet_key=KEYS, flags=[Flag.KEY] * 3), ts_ns=[1, 2, 3])


def test_columns_are_of_their_types_and_others_are_zero():
    batch = keyed()
    assert {name: column.dtype for name, column in batch.columns()} == DTYPES
    assert {name: column.dtype for name, column in batch.content.columns()} == CONTENT_DTYPES
    assert batch.content.packet_key.tolist() == KEYS
    assert not batch.content.l4_seq.any()
    assert Batch.of(3).content is None


def test_invalid_columns_are_refused():
    with pytest.raises(ValueError, match="content of 2 records, expected 3"):
        Batch.of(3, Content.of(2))
    with pytest.raises(TypeError, match="no such column: packet_key"):
        Batch.of(1, packet_key=[1])
    with pytest.raises(ValueError, match=r"column flags has shape \(2,\), expected \(1,\)"):
        Content.of(1, flags=[1, 2])


@pytest.mark.parametrize("index", [slice(1, 3), np.array([False, True, True]), np.array([1, 2])])
def test_a_part_of_a_batch_has_that_part_of_the_content(index):
    part = keyed()[index]
    assert part.ts_ns.tolist() == [2, 3]
    assert part.content.packet_key.tolist() == [8, 9]
    assert len(part.content) == 2
    assert Batch.of(3)[index].content is None


def test_records_without_content_among_others_have_zeros_there():
    bare = Batch.of(2, ts_ns=[4, 5])
    whole = Batch.concatenate([keyed(), bare, keyed()])
    assert whole.content.packet_key.tolist() == [*KEYS, 0, 0, *KEYS]
    assert whole.content.flags.tolist() == [1, 1, 1, 0, 0, 1, 1, 1]
    assert {name: column.dtype for name, column in whole.content.columns()} == CONTENT_DTYPES
    assert Batch.concatenate([bare, bare]).content is None
    assert Batch.concatenate([]).content is None


def test_content_is_part_of_the_modules_records():
    for name, dtype in CONTENT_DTYPES.items():
        assert abi.RECORD.fields[name][0] == dtype, name


@pytest.mark.parametrize(("length", "sizes"), [(0, []), (1, [1]), (4, [2, 2]), (5, [2, 2, 1])])
def test_pieces_are_all_of_a_batch(length, sizes):
    batch = Batch.of(length, ts_ns=np.arange(length))
    pieces = list(batch.pieces(2))
    assert [len(piece) for piece in pieces] == sizes
    assert [*np.concatenate([[], *(piece.ts_ns for piece in pieces)])] == list(range(length))
