"""Reference log-probabilities on disk: two numbers a pair, and of what they were made.

    {"format": ..., "model": ..., "tokenizer": ..., "data": ..., "template": ..., ..., "pairs": N}
    {"pair": 0, "chosen": -41.25, "rejected": -60.5}
    ...

Whoever reads a file compares its first line with what it has. Whoever writes one begins again where anything differs,
and goes on where a run of the same was interrupted.
"""

import itertools
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from solar import cli

FORMAT = "solar reference, version 1"


def default_path(data: str) -> Path:
    """PAIRS.jsonl, PAIRS.json or the directory PAIRS -> PAIRS.ref.jsonl, beside it."""
    path = Path(data)
    name = path.stem if path.suffix in (".json", ".jsonl") else path.name
    return path.with_name(f"{name}.ref.jsonl")


# ------------------------------------------------------------------------------------------------ reading


def read_reference(path: str | Path, expected: dict, command: str = "python -m solar.reference") -> np.ndarray:
    """(N, 2) fp64: log-probabilities of the chosen and the rejected answer of every pair, by the pair's index.

    expected: of what the file must have been made; what is not named in it may be anything. command: what makes the
    right file, for the error. Raises FileNotFoundError, and ValueError, in one line, for a file of something else, and
    for one that is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; the reference's log-probabilities are made by  {command}")
    lines = path.read_bytes().split(b"\n")
    header = _header(path, lines[0])
    if differs := difference(header, expected):
        raise ValueError(f"{path} was made with {differs}; make it again:  {command}")
    if header["pairs"] > len(lines):
        raise ValueError(f"{path}: damaged, {header['pairs']} pairs in {len(lines)} lines; make it again:  {command}")
    table, sound = _values(lines[1:], header["pairs"])
    missing = np.flatnonzero(np.isnan(table[:, 0]))
    if lines[1 + sound :] != [b""] or len(missing):
        what = f"{len(missing)} of {header['pairs']} pairs are missing" if len(missing) else "something is left over"
        raise ValueError(f"{path}, line {2 + sound}: damaged, {what}; make it again:  {command}")
    return table


def difference(found: dict, expected: dict) -> str:
    """The first thing in which a file's header is not what is expected, with both values; "" if there is none."""
    for name, value in expected.items():
        if found.get(name) != value:
            return f"{name} {found.get(name)}, wanted is {value}"
    return ""


def _header(path: Path, line: bytes) -> dict:
    try:
        header = json.loads(line)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f'{path}, line 1: no file of reference log-probabilities ("format": "{FORMAT}" is wanted)')
    if type(header.get("pairs")) is not int or header["pairs"] < 0:
        raise ValueError(f'{path}, line 1: "pairs" is {header.get("pairs")!r}, a count is wanted')
    return header


def _values(lines: Sequence[bytes], count: int) -> tuple[np.ndarray, int]:
    """(N, 2), NaN for pairs without a line, and how many lines are sound before the first that is not (or is empty)."""
    table = np.full((count, 2), math.nan)
    for number, line in enumerate(lines):
        try:
            row = json.loads(line)
            index, values = row["pair"], (row["chosen"], row["rejected"])
        except (ValueError, RecursionError, KeyError, TypeError):
            return table, number
        known = type(index) is int and 0 <= index < count and math.isnan(table[index, 0])
        if not known or not all(type(x) is float and math.isfinite(x) for x in values):
            return table, number
        table[index] = values
    return table, len(lines)


def current(path: Path, header: dict) -> tuple[np.ndarray | None, str]:
    """What a complete file with this header holds, or None and what stands in its place ("" if there is nothing)."""
    if not path.is_file():
        return None, ""
    try:
        return read_reference(path, header), ""
    except ValueError as error:
        return None, str(error).partition("; make it again")[0]


# ------------------------------------------------------------------------------------------------ writing


class Writer:
    """A reference file in the making: what comes is kept in OUT.partial, and OUT appears when all of it is there.

    table: (N, 2), what an interrupted run of the same header has left, NaN elsewhere; filled by `add`. Raises
    ValueError if another process writes to the same file.
    """

    def __init__(self, path: Path, header: dict):
        self.path, self.header = path, header
        self.partial = path.with_name(f"{path.name}.partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = cli.open_growing(self.partial)
        self._file.seek(0)
        content = self._file.read()
        # A line without its end does not count, even if it is all there: what is added would go on in it.
        first, *lines = content[: content.rfind(b"\n") + 1].split(b"\n")
        self.table, sound = np.full((header["pairs"], 2), math.nan), 0
        if same := first + b"\n" == _line(header):
            self.table, sound = _values(lines, header["pairs"])
        self._file.truncate(sum(len(line) + 1 for line in [first, *lines[:sound]]) if same else 0)
        if not same:
            self._file.write(_line(header))

    def add(self, results: Sequence[tuple[int, float, float]]) -> int:
        """Keep the log-probabilities of those of these pairs that have none yet; returns how many those are.

        Raises ValueError for one that is not finite: nothing could learn from it.
        """
        results = [result for result in results if np.isnan(self.table[result[0], 0])]
        for index, chosen, rejected in results:
            if not (math.isfinite(chosen) and math.isfinite(rejected)):
                raise ValueError(
                    f"pair {index}: log-probabilities {chosen} (chosen) and {rejected} (rejected) are nothing to learn "
                    "from: look at the model's weights, or try --dtype fp32"
                )
            self.table[index] = chosen, rejected
        self._file.writelines(itertools.starmap(_row, results))
        self._file.flush()
        return len(results)

    def publish(self) -> None:
        """Put the file in its place, its pairs in order, once everything is on the disk."""
        assert not np.isnan(self.table).any()
        whole = self.path.with_name(f".{self.path.name}.whole")
        with open(whole, "wb") as file:
            file.write(_line(self.header))
            file.writelines(_row(index, *values) for index, values in enumerate(self.table.tolist()))
            file.flush()
            os.fsync(file.fileno())
        os.replace(whole, self.path)
        cli.fsync(self.path.absolute().parent)
        self.partial.unlink(missing_ok=True)

    def close(self) -> None:
        self._file.close()


def _line(row: dict) -> bytes:
    return (json.dumps(row, allow_nan=False) + "\n").encode()


def _row(index: int, chosen: float, rejected: float) -> bytes:
    return _line({"pair": index, "chosen": chosen, "rejected": rejected})
