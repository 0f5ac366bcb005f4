"""Documents of every kind of file, none lost, and every kind of file that is no text."""

import collections
import itertools
import json
import os
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solar import corpus, problems
from solar.corpus import Corpus, Source, parse_source, standard_library


def texts(path, holdout=0.0, held_out=False, limit=None):
    """The documents of a source that are held out, or that are not."""
    documents = Corpus([Source(str(path), limit=limit)]).documents(holdout, lambda count: None)
    return [text.decode() for text, side in documents if side == held_out]


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("a.txt", Source("a.txt")),
        ("a.txt:2", Source("a.txt", 2.0)),
        ("a.txt:.5:70", Source("a.txt", 0.5, 70)),
        (r"C:\texts\a.txt", Source(r"C:\texts\a.txt")),
        (r"C:\a.txt:1e-2:3", Source(r"C:\a.txt", 0.01, 3)),
        ("s3:bucket:3", Source("s3:bucket", 3.0)),
        ("a:1:2:3", Source("a:1", 2.0, 3)),
        ("stdlib:0.5", Source("stdlib", 0.5)),
        ("a.txt::70", Source("a.txt", None, 70)),
        (r"C:\a.txt::3", Source(r"C:\a.txt", None, 3)),
    ],
)
def test_sources_are_parsed(text, source):
    assert parse_source(text) == source


def test_no_weight_is_not_a_weight_of_1():
    assert [parse_source(text).weight for text in ("a", "a:1", "a:1:3")] == [None, 1.0, 1.0]
    assert [parse_source(text).share for text in ("a", "a:1", "a:.5")] == [1.0, 1.0, 0.5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a:0", "weight 0 must"),
        ("a:-1", "weight -1 must"),
        ("a:nan", "weight nan must"),
        ("a:inf:3", "weight inf must"),
        ("a:1:0", "limit 0 must"),
        ("a:1:-3", "limit -3 must"),
        ("a:1:2.5", "limit 2.5 must"),
        ("a::2.5", "limit 2.5 must"),
        (":0.5", "no path"),
        ("::3", "no path"),
    ],
)
def test_bad_weights_and_limits_are_named(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_source(text)


def test_documents_of_every_kind_of_file(write):
    folder = write(
        {
            "b.txt": "eins\r\n\r\nzwei \n",
            "a.jsonl": '{"text": "größer\\n", "more": 1}\n\n{"text": "  "}\r\n{"text": "🙂"}',
            "deep/er/c": "\ufeffthree",
            ".hidden": b"\0",
            ".git/x": b"\0",
            "empty.txt": "",
        }
    )
    assert texts(folder) == ["größer\n", "🙂", "eins\r\n\r\nzwei \n", "three"]
    assert texts(folder / "b.txt") == ["eins\r\n\r\nzwei \n"]


@given(st.data())
@settings(max_examples=200)
def test_cutting_loses_nothing_and_does_not_see_the_pieces(drawn):
    text = drawn.draw(st.text("ab \n\ré🙂", max_size=200)).encode()
    ends = sorted(drawn.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    pieces = [text[a:b] for a, b in itertools.pairwise([0, *ends, len(text)])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "CUT_BYTES", 12)
        patch.setattr(corpus, "LONGEST_BYTES", 30)
        documents = [*corpus.cut(pieces)]
        assert documents == [*corpus.cut([text])]
    assert b"".join(documents) == text
    for document in documents:
        assert document.decode()
        assert len(document) <= 30
    for document in documents[:-1]:
        assert document.endswith((b"\n", b" ")) or len(document) >= 27


def test_a_long_file_is_cut_at_blank_lines(write):
    paragraph = "word " * 2000 + "\n\n\n"
    documents = texts(write({"a": paragraph * 20}) / "a")
    assert documents == [paragraph * 7] * 2 + [paragraph * 6]


def test_the_built_in_corpora():
    assert texts("problems", 0.1, limit=50) == [*problems.documents(0, 50, "train")]
    assert texts("problems", 0.1, held_out=True, limit=50) == [*problems.documents(0, 5, "heldout")]
    assert texts("problems", 0.0, held_out=True, limit=50) == []
    library = standard_library()
    assert {"argparse.py", "decoder.py"} <= {path.name for path in library}
    assert not {"test", "tests", "site-packages"} & {part for path in library for part in path.parts}
    some = texts("stdlib", limit=5)
    assert len(some) == 5
    assert set(some) <= {path.read_bytes().decode() for path in library}


def test_a_limit_is_a_fair_sample(write):
    lines = [f"document {i}" for i in range(400)]
    file = write({"a.jsonl": "\n".join(json.dumps({"text": line}) for line in lines)}) / "a.jsonl"
    some = texts(file, limit=40)
    assert len(some) == 40 == len({*some})
    assert some == [line for line in lines if line in {*some}]  # in their order
    thirds = collections.Counter(int(line.split()[1]) // 134 for line in some)
    assert min(thirds[k] for k in range(3)) >= 6
    assert texts(file, limit=401) == lines


def test_held_out_by_the_documents_own_bytes(write):
    rows = lambda words: "".join(json.dumps({"text": word}) + "\n" for word in words)
    folder = write({"a.jsonl": rows(f"word {i}" for i in range(1000))})
    before = {*texts(folder, 0.2, held_out=True)}
    assert 150 < len(before) < 250
    write({"0.jsonl": rows(f"new {i}" for i in range(50)), "z.jsonl": rows(f"word {i}" for i in range(1000))})
    after = {*texts(folder, 0.2, held_out=True)}
    assert {word for word in after if word.startswith("word")} == before
    assert not {*texts(folder, 0.2)} & after  # copies are on the same side
    assert before < {*texts(folder, 0.4, held_out=True)}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "one\ntwo\0\n", "a.txt, line 2: a NUL byte"),
        ("a.txt", b"x" * 70000 + b"\n\nx\n\xff\n", "a.txt, line 4: byte 0xff is not UTF-8"),
        ("a.txt", "text".encode("utf-16"), "line 1: a NUL byte"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b"\n', "a.jsonl, line 2: no JSON"),
        ("a.jsonl", b'{"text": "\xff"}', "line 1: no JSON"),
        ("a.jsonl", "[" * 100000, "line 1: no JSON"),
        ("a.jsonl", '["text"]', "line 1: JSON, but no object"),
        ("a.jsonl", '{"content": "a"}', 'line 1: an object without a string "text"'),
        ("a.jsonl", '{"text": 3}', 'line 1: an object without a string "text"'),
        ("a.jsonl", r'{"text": "\ud83d"}', "line 1: .*surrogate"),
    ],
)
def test_what_is_no_text_is_named(name, content, message, write):
    folder = write({name: content})
    for path in (folder, folder / name):
        with pytest.raises(ValueError, match=message):
            texts(path)


def test_a_line_without_end_is_not_read_whole(write, monkeypatch):
    monkeypatch.setattr(corpus, "LONGEST_LINE_BYTES", 100)
    source = Source(str(write({"a.jsonl": '{"text": "a"}\n' + "x" * 300})))
    with pytest.raises(ValueError, match=r"line 2: longer than"):
        list(Corpus([source], skip_bad_lines=True).documents(0.0, lambda count: None))


def test_bad_lines_are_skipped_and_counted(write):
    folder = write({"a.jsonl": 'no\n{"text": "a"}\n[]\n', "b.jsonl": '{"text": "b"}\n'})
    some = Corpus([Source(str(folder))], skip_bad_lines=True)
    assert [*some.documents(0.0, lambda count: None)] == [(b"a", False), (b"b", False)]
    reasons = {"no JSON": (1, "line 1"), "JSON, but no object": (1, "line 3")}
    assert some.skipped == {folder / "a.jsonl": reasons, folder / "b.jsonl": {}}


def test_a_source_that_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or directory"):
        texts("nowhere")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="neither a file nor a directory"):
        texts(tmp_path / "pipe")


def test_a_file_that_grows_while_it_is_read(write):
    documents = Corpus([Source(str(write({"a": "text"})))]).documents(0.0, lambda count: None)
    write({"a": "more text"})
    with pytest.raises(ValueError, match="changed while it was read"):
        list(documents)
