"""Examples of different lengths, laid side by side into rows of one length, with little of it left empty."""

import numpy as np

from solar.permutation import permutation


def pack(lengths: np.ndarray, capacity: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(units, starts): row r holds the units starts[r]..starts[r + 1] - 1 of `units`, which lists every unit once.

    Best fit decreasing: the longest first, each into the row that it fills best. That takes at most about 11/9 of the
    rows that the best packing needs (Johnson et al. 1974), and with many short units nearly every row is full. Among
    units of one length the order is random by `seed`. Which row a unit fills best is found without a search: one bit
    of a number for each space that some row has left, and of those the lowest from `length` on.
    Rows hold texts of like length, the longest in the first rows: so small batches of them are often of one kind.
    """
    assert 0 < lengths.min() <= lengths.max() <= capacity
    order = permutation(np.arange(len(lengths)), len(lengths), f"{seed} pack")
    order = order[np.argsort(-lengths[order], kind="stable")]
    with_space: list[list[int]] = [[] for _ in range(capacity + 1)]  # space that is left -> rows
    spaces, count = 0, 0
    row_of = np.empty(len(lengths), np.int64)
    for unit, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        if fitting := spaces >> length:
            space = length + (fitting & -fitting).bit_length() - 1
            row = with_space[space].pop()
            if not with_space[space]:
                spaces ^= 1 << space
        else:
            space, row, count = capacity, count, count + 1
        row_of[unit] = row
        with_space[space - length].append(row)
        spaces |= 1 << (space - length)
    units = order[np.argsort(row_of[order], kind="stable")]
    return units, np.concatenate([[0], np.bincount(row_of, minlength=count).cumsum()])
