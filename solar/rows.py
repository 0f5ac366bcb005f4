"""Rows of data files, each with the file and the line where it stands, so that what is wrong can be named.

rows.jsonl     a JSON value a line
rows.json      one JSON array, whose items are the rows, or any other JSON value, which is one row
rows.csv       a list of fields a row
anything else  text: its paragraphs, which blank lines part
"""

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

LONGEST_LINE_BYTES = 64 << 20  # of a jsonl file: what is longer is some other kind of file
BETWEEN_ITEMS = re.compile(r"[ \t\r\n]*")
PARAGRAPH = re.compile(r"(?:[^\S\n]*\S.*(?:\n|$))+")


class Row(NamedTuple):
    """A row as it was read: `text` as it stands in the file, `value` what that means; `line` counts from 1."""

    path: Path
    line: int
    text: str
    value: Any


class BadRows:
    """What to do about a row that cannot be used: stop, or go on and remember it.

    `found` holds one line of text for each, which names file, line and reason.
    """

    def __init__(self, skip: bool = False):
        self.skip = skip
        self.found: list[str] = []

    def add(self, path: Path, line: int, reason: str) -> None:
        """Raises ValueError, unless bad rows are to be skipped."""
        if not self.skip:
            raise ValueError(f"{path}, line {line}: {reason}; --skip-bad-lines leaves it out")
        self.found.append(f"{path}, line {line}: {reason}")


def read_rows(path: Path, bad: BadRows) -> Iterator[Row]:
    """The rows of a .jsonl or .json file. A jsonl file is read line by line, a json file at once.

    Raises FileNotFoundError, and ValueError for a row that is no JSON unless `bad` takes it, always for a .json file
    that ends before its array does, and for a file of another kind.
    """
    if path.suffix == ".jsonl":
        return _jsonl(path, bad)
    if path.suffix == ".json":
        return _json(path)
    raise ValueError(f"{path}: rows are read from .jsonl and .json files, by the end of the name")


def read_any(path: Path, bad: BadRows) -> Iterator[Row]:
    """The rows of a file of any of the kinds above."""
    if path.suffix in (".jsonl", ".json"):
        return read_rows(path, bad)
    return _csv(path) if path.suffix == ".csv" else _paragraphs(path)


def strings(value: Any) -> Iterator[str]:
    """All strings in a JSON value, and keys of objects that are more than a word: some benchmarks' answers are keys."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            for key, item in reversed(value.items()):
                waiting += [item, key] if " " in key else [item]
        elif isinstance(value, list):
            waiting += reversed(value)


def _jsonl(path: Path, bad: BadRows) -> Iterator[Row]:
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(LONGEST_LINE_BYTES + 1):
            number += 1
            if len(line) > LONGEST_LINE_BYTES:
                raise ValueError(f"{path}, line {number}: longer than {LONGEST_LINE_BYTES >> 20} MB; no jsonl file")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                value = json.loads(text) if text else None
            except (ValueError, RecursionError):
                bad.add(path, number, "no JSON")
                continue
            if text:
                yield Row(path, number, text, value)


def _json(path: Path) -> Iterator[Row]:
    """The items one after the other, since a decoder of the whole array would forget the lines that they stand in."""
    text, decoder = _read_text(path), json.JSONDecoder()
    at, line = BETWEEN_ITEMS.match(text).end(), 1
    line += text.count("\n", 0, at)
    is_array = text[at : at + 1] == "["
    if is_array:
        start, at = at, BETWEEN_ITEMS.match(text, at + 1).end()
        line += text.count("\n", start, at)
    if is_array and text[at : at + 1] == "]":
        return
    while True:
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            raise ValueError(f"{path}, line {line}: no JSON") from None
        yield Row(path, line, text[at:end], value)
        after = BETWEEN_ITEMS.match(text, end).end()
        line += text.count("\n", at, after)
        separator = text[after : after + 1]
        if separator == ("]" if is_array else ""):
            return
        if separator != "," or not is_array:
            raise ValueError(f"{path}, line {line}: no JSON; rows of their own are read from .jsonl files")
        at = BETWEEN_ITEMS.match(text, after + 1).end()
        line += text.count("\n", after, at)


def _csv(path: Path) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(_read_text(path), newline=""))
    line = 1
    try:
        for fields in reader:
            yield Row(path, line, "", fields)
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {line}: {error}") from None


def _paragraphs(path: Path) -> Iterator[Row]:
    text, line, counted = _read_text(path), 1, 0
    for found in PARAGRAPH.finditer(text):
        line += text.count("\n", counted, found.start())
        counted = found.start()
        yield Row(path, line, found.group(), found.group())


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {number}: byte 0x{error.object[error.start]:02x} is not UTF-8") from None
