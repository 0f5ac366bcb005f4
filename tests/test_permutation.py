"""Every permutation is one, whatever its size, and nothing of the order that went in is left."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solar.permutation import permutation


@given(st.integers(1, 3000), st.text(max_size=5))
@settings(max_examples=60)
def test_a_permutation_is_a_bijection(size, key):
    image = permutation(np.arange(size), size, key)
    assert np.array_equal(np.sort(image), np.arange(size))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 1 << 20])
def test_a_permutation_is_a_bijection_at_the_edges(size):
    assert np.array_equal(np.sort(permutation(np.arange(size), size, "x")), np.arange(size))


@given(st.integers(1, 1 << 60), st.integers(0, 1 << 60))
def test_a_permutation_of_many_needs_no_table(size, start):
    index = (start + np.arange(100)) % size if size < 100 else start % (size - 99) + np.arange(100)
    image = permutation(index, size, "x")
    assert len({*image.tolist()}) == len({*index.tolist()})
    assert 0 <= image.min() <= image.max() < size
    assert permutation(index[:1], size, "x")[0] == image[0]  # one by one or together


def test_permutations_are_many_and_random():
    assert len({tuple(permutation(np.arange(4), 4, str(key)).tolist()) for key in range(2000)}) == 24
    image = permutation(np.arange(10_000), 10_000, "x")
    assert abs(np.corrcoef(image, np.arange(10_000))[0, 1]) < 0.03
    assert abs(np.corrcoef(image[1:], image[:-1])[0, 1]) < 0.03
    assert np.bincount(image[:1000] // 1000, minlength=10).min() > 60
