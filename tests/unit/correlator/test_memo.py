"""A memo returns the values of its function, also for colliding slots, and calls the function once per value."""

import pickle
from collections import Counter

import numpy as np

from correlator.memo import Memo

ASKED = Counter()


def answer(key):
    ASKED[key] += 1
    return key * 3 + 1


def test_a_memo_calls_the_function_once_per_value():
    ASKED.clear()
    memo = Memo(answer)
    random = np.random.default_rng(1)
    for most in (5, 400, 5_000, 1 << 40):
        keys = random.integers(0, most, 20_000)
        for _ in range(3):
            assert (memo(keys) == keys * 3 + 1).all()
    assert set(ASKED.values()) == {1}
    again = pickle.loads(pickle.dumps(memo))
    assert (again(keys) == keys * 3 + 1).all()
    assert set(ASKED.values()) == {1}


def test_forgotten_values_are_computed_again():
    ASKED.clear()
    memo = Memo(answer)
    keys = np.arange(1_000)
    memo(keys)
    memo.forget()
    assert (memo(keys) == keys * 3 + 1).all()
    assert set(ASKED.values()) == {2}
