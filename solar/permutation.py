"""A shuffle without a list: the i-th of N shuffled things is computed from i, for any N at once.

Shuffling in memory needs a table of N entries, and its state wherever one wants to go on. A permutation that is a
cipher on the numbers 0..N-1 needs neither: it is a function of the index and a key.
"""

import hashlib
import math

import numpy as np

ROUNDS = 8


def permutation(index: np.ndarray, size: int, key: str) -> np.ndarray:
    """Where a permutation of 0..size-1, chosen by `key`, sends each index; without a table of it.

    A Feistel cipher on a rectangle (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains"): a number is a row
    and a column, and each round shifts one of them by a hash of the other. Every round can be undone, whatever the hash
    is, so the whole is a bijection of the rectangle. It has a few more cells than `size`; what lands there goes through
    again until it does not. That follows the cycle of a bijection to its next member below `size`, and no two numbers
    come to the same one.
    """
    assert size > 0
    rows = math.isqrt(size - 1) + 1
    rows, columns = np.uint64(rows), np.uint64(-(-size // rows))
    keys = np.frombuffer(hashlib.blake2b(key.encode(), digest_size=8 * ROUNDS).digest(), "<u8")
    result = np.array(index, np.uint64)
    outside = np.arange(len(result))
    while len(outside):
        row, column = np.divmod(result[outside], columns)
        for row_key, column_key in zip(keys[::2], keys[1::2], strict=True):
            row = (row + _mix(column + row_key) % rows) % rows
            column = (column + _mix(row + column_key) % columns) % columns
        result[outside] = row * columns + column
        outside = outside[result[outside] >= size]
    return result.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every bit of the result hangs on every bit of x."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
