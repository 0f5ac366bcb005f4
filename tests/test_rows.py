"""Rows of files: what is read, on which line it stands, and what is said of what cannot be read."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from solar.rows import BadRows, read_any, read_rows, strings

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def rows(path, skip=False):
    return [(row.line, row.value) for row in read_any(path, BadRows(skip))]


def test_jsonl_lines_are_counted_with_blank_ones(write):
    path = write({"a.jsonl": b'\xef\xbb\xbf{"a": 1}\n\n  \n{"b": 2}\r\n[3]'}) / "a.jsonl"
    assert rows(path) == [(1, {"a": 1}), (4, {"b": 2}), (5, [3])]


@pytest.mark.parametrize("line", [b"{", b'{"a": 1} x', b"\xff", b"[" * 100_000])
def test_a_line_that_is_no_json_stops_or_is_counted(write, line):
    path = write({"a.jsonl": b"1\n" + line + b"\n2\n"}) / "a.jsonl"
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: no JSON; --skip-bad-lines leaves it out"):
        rows(path)
    bad = BadRows(skip=True)
    assert [row.value for row in read_rows(path, bad)] == [1, 2]
    assert bad.found == [f"{path}, line 2: no JSON"]


@given(st.lists(JSON, max_size=5), st.sampled_from([None, 1]))
def test_a_json_array_is_its_items(tmp_path_factory, items, indent):
    path = tmp_path_factory.mktemp("json") / "a.json"
    text = json.dumps(items, indent=indent)
    path.write_text(text)
    found = [*read_rows(path, BadRows())]
    assert [row.value for row in found] == items
    for row in found:
        assert json.loads(row.text) == row.value
        assert row.text.split("\n")[0] in text.split("\n")[row.line - 1]


def test_any_other_json_is_one_row(write):
    folder = write({"a.json": '\n\n{"a": [1]}\n', "b.json": "[]", "c.json": "7"})
    assert rows(folder / "a.json") == [(3, {"a": [1]})]
    assert rows(folder / "b.json") == []
    assert rows(folder / "c.json") == [(1, 7)]


@pytest.mark.parametrize(
    ("text", "line"),
    [("[1,\n2", 2), ("[1\n 2]", 2), ("", 1), ("[1,\n\n x]", 3), ("{}\n{}\n", 2), ("[1,\n", 2), ("[1,]", 1)],
)
def test_a_json_file_that_is_cut_short_names_the_line(write, text, line):
    with pytest.raises(ValueError, match=rf"a\.json, line {line}: no JSON"):
        rows(write({"a.json": text}) / "a.json", skip=True)


def test_csv_rows_may_hold_lines(write):
    path = write({"a.csv": 'question,A\n"two\nlines, and a comma",4\nlast,5\n'}) / "a.csv"
    assert rows(path) == [(1, ["question", "A"]), (2, ["two\nlines, and a comma", "4"]), (4, ["last", "5"])]


def test_text_is_its_paragraphs(write):
    path = write({"a.txt": "\nfirst\nstill first\n \n\n  second\n"}) / "a.txt"
    assert rows(path) == [(2, "first\nstill first\n"), (6, "  second\n")]


def test_what_is_no_text_is_named(write):
    with pytest.raises(ValueError, match=r"a\.txt, line 2: byte 0xff is not UTF-8"):
        rows(write({"a.txt": b"good\nbad \xff"}) / "a.txt")
    with pytest.raises(ValueError, match=r"a\.txt: rows are read from \.jsonl and \.json files"):
        read_rows(write({"a.txt": b"good"}) / "a.txt", BadRows())


def test_strings_are_all_there_is_in_order():
    value = {"q": "a", "list": ["b", {"c": "d", "an answer": 1}], "none": None}
    assert [*strings(value)] == ["a", "b", "d", "an answer"]
    assert [*strings("x")] == ["x"]
