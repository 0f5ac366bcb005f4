"""Safetensors files that lie, are too much, or are cut short."""

import json
import struct
from collections.abc import Callable

from hypothesis import strategies as st

from tests.hostile.model import (
    INDEX,
    NAMES,
    SHAPES,
    SHARDS,
    SINGLE,
    Case,
    dumps,
    entries,
    numel,
    shard,
    sharded,
    single,
)
from tests.hostile.values import COMMANDS, anything, deep, junk_text, much


@st.composite
def in_header(draw, change: Callable) -> Case:
    """A header that is changed: change(draw, header, name) -> the header or its bytes, and what `shard` is told."""
    whole = draw(st.booleans())
    names = NAMES if whole else NAMES[1::3]
    header, target = entries(names), draw(st.sampled_from(names))
    changed = change(draw, header, target)
    header, more = changed if isinstance(changed, tuple) else (changed, {})
    more = {"size": sum(numel(SHAPES[name]) * 2 for name in names)} | more
    file = shard(header, **more)
    files = single() | {SINGLE: file} if whole else sharded() | {SHARDS[1]: file}
    return Case(files, (SINGLE if whole else SHARDS[1], "missing from the files"), draw(COMMANDS))


def length_over(draw, header, _):
    text = dumps(header)
    over = st.integers(1, 100) | st.sampled_from([2**31, 2**32, 2**63, 2**64 - 1]) | st.integers(2**20, 2**64 - 1)
    size = sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header.values())
    return text, {"length": draw(over.map(lambda n: min(len(text) + size + n, 2**64 - 1)))}


def length_short(draw, header, _):
    text = dumps(header)
    return text, {"length": draw(st.integers(0, len(text) - 1))}


def nesting(draw, header, target):
    bad, place = draw(deep), draw(st.sampled_from(["entry", "shape", "dtype", "offsets", "metadata", "top"]))
    text = {
        "entry": b'{"a":%s}',
        "shape": b'{"a":{"dtype":"U8","shape":%s,"data_offsets":[0,0]}}',
        "dtype": b'{"a":{"dtype":%s,"shape":[0],"data_offsets":[0,0]}}',
        "offsets": b'{"a":{"dtype":"U8","shape":[0],"data_offsets":%s}}',
        "metadata": b'{"__metadata__":{"a":%s}}',
        "top": b"%s",
    }[place]
    return text % bad


def twice(draw, header, target):
    text, entry = json.dumps(header), json.dumps(header[target])
    spelt = draw(st.sampled_from([target, "".join(f"\\u{ord(c):04x}" for c in target)]))
    where = draw(st.sampled_from(["name", "key", "metadata"]))
    if where == "name":
        return f'{text[:-1]}, "{spelt}": {entry}}}'.encode()
    if where == "metadata":
        return f'{{"__metadata__": {{"a": "", "a": ""}}, {text[1:]}'.encode()
    key = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
    return text.replace(entry, f'{entry[:-1]}, "{key}": {json.dumps(header[target][key])}}}').encode()


def overlap(draw, header, target):
    begin, end = header[target]["data_offsets"]
    by = draw(st.integers(1, 40))
    moved = [begin - by, end - by] if begin >= by and draw(st.booleans()) else [begin + by, end + by]
    header[target]["data_offsets"] = moved
    return header, {}


def same_place(draw, header, target):
    other = draw(st.sampled_from([name for name in header if name != target]))
    same = [name for name in header if SHAPES[name] == SHAPES[target] and name != target]
    other = draw(st.sampled_from(same)) if same else other
    header[target] = header[other]
    return header


def hole(draw, header, target):
    by, begin = draw(st.integers(1, 4000)), header[target]["data_offsets"][0]
    for entry in header.values():
        if entry["data_offsets"][0] >= begin:
            entry["data_offsets"] = [at + by for at in entry["data_offsets"]]
    return header, {"size": max(entry["data_offsets"][1] for entry in header.values())}


def negative(draw, header, target):
    below = st.integers(-(2**70), -1)
    where = draw(st.sampled_from(["begin", "end", "both", "shape", "two"]))
    begin, end = header[target]["data_offsets"]
    shape = header[target]["shape"]
    if where in ("begin", "end", "both"):
        by = draw(below)
        header[target]["data_offsets"] = {"begin": [by, end], "end": [begin, by], "both": [by, by + end - begin]}[where]
    elif where == "shape":
        shape[draw(st.integers(0, len(shape) - 1))] = draw(below)
    else:
        header[target]["shape"] = [-2, -(end - begin) // 4]
    return header


def unknown_dtype(draw, header, target):
    known = ["BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2", "BOOL", "U8", "I8", "I16", "I32", "I64"]
    odd = st.sampled_from(["bf16", "F4", "C64", "U16", "U32", "U64", "F8_E8M0", "object", "", "BF16\0"]) | anything
    header[target]["dtype"] = draw(odd.filter(lambda value: value not in known))
    return header


def wrong_dtype(draw, header, target):
    """Of the size that it should have, and no weights."""
    entry = header[target]
    dtype = draw(st.sampled_from(["U8", "I8", "BOOL", "F8_E4M3", "F8_E5M2", "I16", "F64", "I64", "I32"]))
    size = {"U8": 1, "I8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "I32": 4}.get(dtype, 8)
    entry |= {"dtype": dtype, "shape": [(entry["data_offsets"][1] - entry["data_offsets"][0]) // size]}
    return header


def overflow(draw, header, target):
    sides = st.sampled_from([2**31, 2**32, 2**33, 2**47, 2**48 - 1, 2**48, 2**62, 2**63, 2**64, 10**30])
    header[target]["shape"] = draw(st.lists(sides, min_size=2, max_size=6)) + draw(st.sampled_from([[], [8], [2]]))
    if draw(st.booleans()):
        header[target]["shape"] = [2**33 + numel(SHAPES[target]) % 7, 2**31]
    return header


def trailing(draw, header, _):
    size = max(entry["data_offsets"][1] for entry in header.values())
    return header, {"size": size + draw(st.integers(1, 5000))}


def wrong_type(draw, header, target):
    kind = draw(st.sampled_from(["entry", "shape", "side", "offsets", "offset", "missing", "extra"]))
    entry, good = header[target], json.dumps(header[target])
    odd = draw(anything.filter(lambda value: type(value) is not int))
    if kind == "entry":
        header[target] = odd
    elif kind == "side":
        entry["shape"][0] = odd
    elif kind == "offset":
        entry["data_offsets"][draw(st.integers(0, 1))] = odd
    elif kind == "missing":
        del entry[draw(st.sampled_from(sorted(entry)))]
    elif kind == "extra":
        entry[draw(junk_text.filter(lambda key: key not in entry))] = odd
    else:
        entry["shape" if kind == "shape" else "data_offsets"] = odd
    assert json.dumps(header[target]) != good
    return header


def metadata(draw, header, _):
    inner = st.dictionaries(
        junk_text, anything.filter(lambda value: not isinstance(value, str)), min_size=1, max_size=3
    )
    return {"__metadata__": draw(inner | anything.filter(lambda value: not isinstance(value, dict)))} | header


def odd_name(draw, header, target):
    header[draw(junk_text.filter(lambda name: name not in NAMES))] = header.pop(target)
    return header


@st.composite
def huge(draw) -> Case:
    """Much JSON: as header, config or index."""
    units = [b"[],", b"{},", b'"",', b"0,", b'{"a":0},', b'"abcdefgh",', b"1e9,", b" ," + b" " * 99, b"[[]],"]
    size = draw(st.sampled_from([100_000_000, 30_000_000, 10_000_000, 5_000_000, 2_000_000]))
    text = much(draw(st.sampled_from(units)), size - 10)
    where = draw(st.sampled_from([SINGLE, SINGLE, "config.json", INDEX]))
    files = sharded() if where == INDEX else single()
    files[where] = shard(text, size=0) if where == SINGLE else text
    return Case(files, (where,), draw(COMMANDS), header=len(text))


PLACES = ("word", "header", "begin", "middle", "end")


@st.composite
def truncated(draw, place: str) -> Case:
    one = draw(st.booleans())
    files = single() if one else sharded()
    file = SINGLE if one else draw(st.sampled_from(SHARDS))
    data = files[file]
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    begin, end = (8 + length + at for at in header[draw(st.sampled_from(list(header)))]["data_offsets"])
    low, high = {
        "word": (0, 7),
        "header": (8, 7 + length),
        "begin": (begin, begin + 1),
        "middle": (begin + 2, end - 2),
        "end": (end - 1, min(end, len(data) - 1)),
    }[place]
    files[file] = data[: draw(st.integers(low, high))]
    return Case(files, (file,), draw(COMMANDS))
