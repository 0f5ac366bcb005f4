"""Values, JSON and noise that stand where something sound should."""

import json
import os
from collections.abc import Callable
from pathlib import Path

from hypothesis import strategies as st

from tests.hostile.model import NAMES

COMMANDS = st.sampled_from(["upscale", "upscale", "load", "merge", "generate"])
name = st.sampled_from(NAMES)
junk_text = st.text(max_size=20) | st.sampled_from(
    ["\n", "a\nerror: b", "\x1b[2J\x1b[31m", "\u202egnp", "\0", "é" * 300, "x" * 5000, "\u2028", "."]
)
leaf = st.none() | st.booleans() | st.integers(-3, 3) | st.integers() | st.floats() | junk_text
leaf |= st.sampled_from([10**400, -(2**63), 2**64, 1e308, "silu", "llama", "0", ""])
anything = st.recursive(
    leaf, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(junk_text, inner, max_size=3), max_leaves=8
)
depth = st.integers(33, 60) | st.integers(900, 1100) | st.sampled_from([10_000, 150_000])


def nested(depth: int, kind: str) -> bytes:
    """JSON that is nested as deep; of kind "open" it never ends."""
    if kind == "dict":
        return b'{"a":' * depth + b"0" + b"}" * depth
    return b"[" * depth + (b"" if kind == "open" else b"]" * depth)


deep = st.builds(nested, depth, st.sampled_from(["list", "dict", "open"]))
noise = st.binary(max_size=300) | st.builds(lambda seed: seed * 999, st.binary(min_size=1, max_size=9))
no_json = (
    noise.filter(lambda data: not _is_json(data))
    | deep
    | st.sampled_from([b"", b"\xef\xbb\xbf{}", b"{}{}", b'{"a":1,"a":1}', b"{'a':1}", b"9" * 5000, b"\xff\xfe{\0}\0"])
)


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


@st.composite
def cut(draw, data: bytes):
    """Less than the whole."""
    return data[: draw(st.integers(0, len(data) - 1))]


def much(unit: bytes, size: int) -> bytes:
    """An object of about `size` bytes that holds one thing very often."""
    middle = (unit * (size // len(unit) + 1))[:-1]
    return b'{"a":[' + middle + b"]}"


# What stands where a file should.
SPECIAL: list[Callable[[Path], None]] = [
    os.mkfifo,
    os.mkdir,
    lambda path: path.symlink_to(path.name),
    lambda path: path.symlink_to("nowhere"),
    lambda path: path.symlink_to("/dev/zero"),
]
