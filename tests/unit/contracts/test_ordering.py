"""Sorting by digits gives the same order as sorting by comparison."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.ordering import GOLDEN, grouped, stable_order

WIDE = st.integers(0, (1 << 64) - 1)
SOME = st.one_of(st.lists(st.integers(0, 5)), st.lists(st.integers(0, 1 << 20)), st.lists(WIDE))


@given(SOME)
def test_stable_order_of_unsigned(values):
    column = np.array(values, np.uint64)
    assert stable_order(column).tolist() == np.argsort(column, kind="stable").tolist()


@given(st.lists(st.integers(-(1 << 63), (1 << 63) - 1) | st.integers(-3, 3)))
def test_stable_order_of_signed(values):
    column = np.array(values, np.int64)
    assert stable_order(column).tolist() == np.argsort(column, kind="stable").tolist()


def check_groups(column):
    order, same = grouped(column)
    assert sorted(order.tolist()) == list(range(len(column)))
    assert np.array_equal(same[1:], column[order[1:]] == column[order[:-1]])
    assert not len(same) or not same[0]
    assert (~same).sum() == len(np.unique(column)), "equal values are apart"
    assert (np.diff(order)[same[1:]] > 0).all(), "equal values changed their order"


@given(SOME)
def test_equal_values_come_together(values):
    check_groups(np.array(values, np.uint64))


@pytest.mark.parametrize("distinct", [2, 300, 20_000])
def test_different_values_of_one_digit_are_kept_apart(distinct):
    rng = np.random.default_rng(1)
    inverse = pow(int(GOLDEN), -1, 1 << 64)
    # Products with GOLDEN whose upper 16 bits take three values only.
    products = [(int(rng.integers(3)) << 48) | int(rng.integers(1 << 48)) for _ in range(distinct)]
    values = np.array([product * inverse % (1 << 64) for product in products], np.uint64)
    assert len(np.unique((values * GOLDEN) >> np.uint64(48))) <= 3
    check_groups(values[rng.integers(0, distinct, 50_000)])
