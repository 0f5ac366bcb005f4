"""JSON from outside: read within bounds, refused in one line that names the file, and quoted without harm.

A `config.json` from a stranger may be 10 GB of brackets, be nested 100,000 deep, say two things under one key, or hold
an escape sequence for the terminal that shows the error.
"""

import json
import reprlib
from collections import Counter
from pathlib import Path
from typing import Any

MAX_MEMORY = 50_000_000  # bytes that Python may need for one file: the header of 28,000 tensors, all in one file
MAX_DEPTH = 32  # a config has four levels; what is deeper cannot be compared or printed without a RecursionError
MAX_SHOWN = 200  # characters of a value or a name in a message

_shorten = reprlib.Repr()
_shorten.maxlevel, _shorten.maxstring, _shorten.maxother = 3, 100, 100


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises ValueError as `parse_json`, OSError for a file that cannot be read."""
    with open(path, "rb") as file:
        return parse_json(file.read(MAX_MEMORY), path)  # more than half of that is refused, so the rest can wait


def parse_json(data: bytes, what: Path | str) -> Any:
    """JSON from outside. ValueError naming `what` if it is malformed, too much, or has a key twice in one object."""

    def unique(pairs):
        if len(pairs) != len(values := dict(pairs)):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"the key {brief(twice)} stands twice")
        return values

    # The text and its strings as Python holds them, and an object for each key, value, list and dictionary. Signs in
    # strings are counted too; what is real stays far below.
    text = len(data) * (2 if data.isascii() else 8)
    costs = {b":": 200, b",": 60, b"{": 70, b"[": 64}
    if text + sum(cost * data.count(sign) for sign, cost in costs.items()) > MAX_MEMORY:
        raise ValueError(
            f"{what}: more JSON than {MAX_MEMORY >> 20} MB of memory hold: nothing that belongs to a model"
        )
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except RecursionError:
        raise ValueError(f"{what}: not valid JSON: nested too deeply") from None
    except ValueError as error:
        reason = str(error).partition("; use sys.")[0]  # advice for who can change the program
        raise ValueError(f"{what}: not valid JSON: {reason}") from None
    level = [value]
    for _ in range(MAX_DEPTH):
        parts = (
            outer.values() if isinstance(outer, dict) else outer for outer in level if isinstance(outer, dict | list)
        )
        level = [inner for part in parts for inner in part if isinstance(inner, dict | list)]
    if level:
        raise ValueError(f"{what}: not valid JSON: nested too deeply, more than {MAX_DEPTH} levels")
    return value


def brief(value: Any) -> str:
    """A value from outside as a message shows it: as Python writes it, printable, on one line, of some length."""
    text = _shorten.repr(value)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."


def plain(name: str) -> str:
    """A name from outside as a message shows it: as it is, unless that would spoil the line."""
    return name if name.strip() == name != "" and name.isprintable() and len(name) <= MAX_SHOWN else brief(name)
