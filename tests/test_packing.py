"""Rows that hold every unit once, never too much, and little air."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from solar.packing import pack


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60), st.integers(0, 3))
def test_every_unit_once_and_no_row_too_long(lengths, seed):
    lengths = np.array(lengths)
    units, starts = pack(lengths, 20, seed)
    assert sorted(units.tolist()) == [*range(len(lengths))]
    assert starts[0] == 0
    assert starts[-1] == len(lengths)
    sums = np.add.reduceat(lengths[units], starts[:-1])
    assert len(sums) == len(starts) - 1
    assert np.diff(starts).min() >= 1
    assert sums.max() <= 20
    again = pack(lengths, 20, seed)
    assert all(np.array_equal(a, b) for a, b in zip((units, starts), again, strict=True))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=40))
def test_it_is_best_fit_decreasing(lengths):
    spaces = []
    for length in sorted(lengths, reverse=True):
        fitting = [space for space in spaces if space >= length]
        if fitting:
            spaces.remove(min(fitting))
        spaces.append((min(fitting) if fitting else 20) - length)
    units, starts = pack(np.array(lengths), 20, 0)
    sums = np.add.reduceat(np.array(lengths)[units], starts[:-1])
    assert sorted(20 - sums) == sorted(spaces)


def test_many_examples_fill_their_rows():
    lengths = np.random.default_rng(0).lognormal(5.5, 0.8, 50_000).astype(int).clip(5, 2048)
    units, starts = pack(lengths, 2048, 0)
    assert lengths.sum() / (2048 * (len(starts) - 1)) > 0.995
    other = pack(lengths, 2048, 1)[0]
    assert not np.array_equal(units, other)


@pytest.mark.parametrize("lengths", [[5], [5, 5], [20, 20, 20], [1] * 20])
def test_small_ones(lengths):
    assert len(pack(np.array(lengths), 20, 0)[1]) - 1 == -(-sum(lengths) // 20)


def test_the_rows_never_change():
    """Frozen: with other rows, a run that goes on from a checkpoint would see examples twice and others never."""
    units, starts = pack(np.arange(40) * 7 % 13 + 5, 30, 5)
    rows = [row.tolist() for row in np.split(units, starts[1:-1])]
    assert rows[:6] == [[37, 3], [24, 29], [11, 16], [9, 31], [22, 18], [35, 5]]
    assert len(rows) == 15
