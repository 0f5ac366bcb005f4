"""JSON from outside: what is refused, within which bounds, and how a value is shown."""

import json
import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solar.jsonfile import MAX_DEPTH, MAX_MEMORY, brief, parse_json, plain, read_json


def test_json_from_outside_names_where_it_came_from():
    assert parse_json(b'{"a": [1, {"b": null}]}', "there") == {"a": [1, {"b": None}]}
    for bad in (b"", b"{", b"\xff", b"\xef\xbb\xbf{}", b'{"a":1,"a":1}', b"[" * 100_000):
        with pytest.raises(ValueError, match=r"^there: not valid JSON: "):
            parse_json(bad, "there")


def test_what_is_nested_deeper_than_any_config_is_refused():
    for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
        deepest = opening * MAX_DEPTH + b"0" + closing * MAX_DEPTH
        assert parse_json(deepest, "there") is not None
        for more in (1, 2, 900, 960, 990, 1010, 100_000):  # where Python's own bound is depends on who calls
            deep = opening * (MAX_DEPTH + more) + b"0" + closing * (MAX_DEPTH + more)
            with pytest.raises(ValueError, match=r"^there: not valid JSON: nested too deeply"):
                parse_json(deep, "there")


# What Python needs most memory for, relative to its length in JSON.
MUCH = {
    "lists": "[],",
    "full dictionaries": '{"a":0},',
    "keys": '{"%07d":0},',
    "keys of emoji": '{"\U0001f600%05d":0},',
    "texts": '"%03d",',
}


@pytest.mark.parametrize("unit", MUCH.values(), ids=MUCH)
def test_what_is_accepted_fits_the_memory(unit):
    """Half as much each time, until it is accepted: that may take no more than was allowed, and not much less."""
    count = 1 << 20
    while True:
        data = f"[{''.join(unit % i if '%' in unit else unit for i in range(count))[:-1]}]".encode()
        tracemalloc.start()
        try:
            parse_json(data, "there")
            break
        except ValueError as error:
            refusal = str(error)
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert refusal.startswith("there: more JSON than 47 MB of memory hold")
        assert peak < 1_000_000
        count //= 2
    assert MAX_MEMORY // 8 < peak < MAX_MEMORY


def test_a_header_of_twenty_thousand_tensors_is_none_too_many():
    entry = {"dtype": "BF16", "shape": [14336, 4096], "data_offsets": [123456789012, 123456789013]}
    header = {f"model.layers.{i}.mlp.down_proj.weight": entry for i in range(20_000)}
    assert parse_json(json.dumps(header).encode(), "there") == header


def test_a_file_is_not_read_beyond_what_could_be_accepted(tmp_path):
    with open(tmp_path / "x.json", "wb") as file:
        file.truncate(1 << 40)
    start = time.process_time()
    with pytest.raises(ValueError, match=r"x\.json: more JSON than"):
        read_json(tmp_path / "x.json")
    assert time.process_time() - start < 1


inner = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
values = st.recursive(inner, lambda part: st.lists(part) | st.dictionaries(st.text(), part), max_leaves=8)


@settings(max_examples=60)
@given(values)
def test_any_value_is_shown_on_one_line_of_some_length(value):
    assert brief(value).isprintable()
    assert len(brief(value)) <= 203


def test_what_is_short_is_shown_as_it_is():
    for value in (None, True, 5, -0.5, "text", [1, "a"], {"a": [1]}, (1, 2)):
        assert brief(value) == repr(value)
    assert plain("model.layers.0.mlp.up_proj.weight") == "model.layers.0.mlp.up_proj.weight"
    assert plain("a\nb") == "'a\\nb'"
    assert len(plain("x" * 10_000)) < 110
    deep: tuple = ()
    for _ in range(100_000):
        deep = (deep, deep)
    assert len(brief(deep)) < 203
