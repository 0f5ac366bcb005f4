"""Shared n-grams: found exactly as a search by hand finds them; and what is kept for its other numbers, on demand."""

import itertools
import random
import re
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solar import problems
from solar.contamination import Benchmarks, Text, read_texts, sift, words
from solar.rows import BadRows

HERE = Path("bench.jsonl")
QUESTION = (
    "A baker sells 16 loaves in the morning and three times as many in the afternoon. On the way home she gives the "
    "last 5 loaves to her neighbour, who has invited 12 guests. How many loaves did she bake that day?"
)


def against(*texts, ngram=13, keep_other_numbers=False):
    return Benchmarks([Text(HERE, line, text) for line, text in enumerate(texts, start=1)], ngram, keep_other_numbers)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't stop: it’s 5 o'clock!", "dont stop its 5 oclock"),
        ("$1,000.00 or 1000?", "1000 or 1000"),
        ("18.0, 18.50 and 0.5%", "18 18.5 and 0.5"),
        ("3,4,5 and 1,23", "3 4 5 and 1 23"),
        ("STRASSE straße ﬁne", "strasse strasse fine"),
        ("48/2=<<48/2=24>>24", "48 2 24"),
        ("snake_case 2nd", "snake case 2 nd"),
        ("", ""),
    ],
)
def test_words(text, expected):
    assert words(text) == expected.split()


def test_a_copy_is_found_whatever_its_punctuation_and_case():
    benchmarks = against("Something else entirely that nobody would ever write down twice in this world.", QUESTION)
    shared = benchmarks.shared(["Solve. " + re.sub(r"[,.?]", " -- ", QUESTION.upper()), "unrelated"])
    assert (shared.path, shared.line) == (HERE, 2)
    assert " ".join(words(QUESTION)).startswith(shared.words)


def test_thirteen_words_in_a_row_are_too_many_and_twelve_are_not():
    text = [f"w{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    benchmarks = against(" ".join(text))
    assert benchmarks.shared([" ".join(["x", *text[4:16], "y"])]) is None
    assert benchmarks.shared([" ".join(["x", *text[4:17], "y"])]).words == " ".join(text[4:17])
    assert benchmarks.shared([" ".join(text[4:11]), " ".join(text[11:17])]) is None  # not from one text to the next
    assert against(" ".join(text[:13]), " ".join(text[13:])).shared([" ".join(text[6:19])]) is None


@pytest.mark.parametrize(
    "copy",
    [
        QUESTION.partition(" How many loaves")[0],  # without its last sentence
        QUESTION.partition(" On the way")[0] + " How many loaves did she bake that day?",
        QUESTION.replace("16", "17"),
        QUESTION.replace("last 5", "last five").replace("12", "twelve"),
        "Say " + " ".join(words(QUESTION)[7:20]),
    ],
)
def test_a_copy_that_was_changed_or_cut_is_found_where_13_words_are_left(copy):
    assert against(QUESTION).shared([copy])


def test_copies_that_are_missed_where_other_numbers_are_kept():
    benchmarks = against(QUESTION, keep_other_numbers=True)
    assert benchmarks.shared([QUESTION.replace("16", "17")]) is None
    assert benchmarks.shared([QUESTION.partition(" On the way")[0]]) is None
    assert benchmarks.shared([QUESTION.replace("16", "sixteen").replace("last 5", "last five")]) is None


def test_the_same_template_with_other_numbers_may_be_kept():
    benchmarks = against(QUESTION, keep_other_numbers=True)
    for old, new in (("16", "17"), ("last 5", "last 6"), ("12", "9")):
        assert benchmarks.shared([QUESTION.replace(old, new)]) is None, new
    assert benchmarks.shared([QUESTION.replace("baker", "farmer")])  # the same numbers in the same words
    assert benchmarks.shared([QUESTION.replace("16", "16.0").replace("12", "$12")])


def test_an_excerpt_of_twice_the_words_is_a_copy_though_numbers_are_missing():
    cut = QUESTION.partition(", who has")[0]  # without the 12
    assert len(words(cut)) >= 26
    assert against(QUESTION, keep_other_numbers=True).shared([cut + " today."])
    assert against(QUESTION, keep_other_numbers=True).shared([" ".join(words(cut)[:25])]) is None


def test_training_problems_are_no_copies_of_held_out_ones():
    held_out = [p.question for p in islice(problems.generate(1, "heldout"), 500)]
    benchmarks = against(*held_out, keep_other_numbers=True)
    training = [p.question for p in islice(problems.generate(0, "train"), 1500)]
    dropped = [text for text in training if (shared := benchmarks.shared([text])) and shared.line]
    numbers = {tuple(sorted(re.findall(r"\d+", text))) for text in held_out}
    assert all(tuple(sorted(re.findall(r"\d+", text))) in numbers for text in dropped)
    assert len(dropped) < 15
    assert all(benchmarks.shared([text]) for text in held_out if len(words(text)) >= 8)


def test_short_texts_are_looked_for_as_a_whole():
    benchmarks = against("an apple a day keeps the doctor away", "too short for that", QUESTION)
    assert (benchmarks.texts, benchmarks.short) == (2, 1)
    assert benchmarks.shared(["They say: an apple a day keeps the doctor away!"]).line == 1
    assert benchmarks.shared(["an apple a day keeps the doctor at bay"]) is None
    assert benchmarks.shared(["too short for that"]) is None


def test_the_text_whose_numbers_agree_is_found_among_many_of_one_template():
    texts = [QUESTION.replace("16", str(n)) for n in range(100, 160)]
    benchmarks = against(*texts, keep_other_numbers=True)
    assert benchmarks.shared([QUESTION.replace("16", "133")]).line == 34
    assert benchmarks.shared([QUESTION.replace("16", "99")]) is None
    assert against(*texts).shared([QUESTION.replace("16", "99")])


def common_runs(first, second):
    """(length, the pairs of words before and behind it) of every longest run of words that both have in common"""
    for i, j in itertools.product(range(len(first)), range(len(second))):
        if first[i] == second[j] and not (i and j and first[i - 1] == second[j - 1]):
            pairs = [*zip(first[i:], second[j:], strict=False)]
            run = next((k for k, (a, b) in enumerate(pairs) if a != b), len(pairs))
            yield run, [(first[i - 1], second[j - 1])] * bool(i and j) + pairs[run : run + 1]


@settings(max_examples=300)
@given(st.data())
def test_it_agrees_with_a_search_by_hand(data):
    """A vocabulary of few words makes chance matches of every kind, numbers and short texts among them."""
    word = st.sampled_from(["a", "b", "c", "4", "7"])
    text = st.lists(word, max_size=12).map(" ".join)
    benchmark = data.draw(st.lists(text, min_size=1, max_size=5))
    example = data.draw(st.lists(text, min_size=1, max_size=3))
    n, keep = data.draw(st.integers(2, 5)), data.draw(st.booleans())
    long_enough = [text.split() for text in benchmark if len(text.split()) >= n]
    if not long_enough:
        with pytest.raises(ValueError, match=f"no text of {n} words"):
            against(*benchmark, ngram=n)
        return
    parts = [part.split() for part in example]
    present = Counter(word for part in parts for word in part)
    expected = False
    for text in long_enough:
        numbers_agree = not keep or Counter(filter(str.isdigit, text)) <= present
        for part in parts:
            for run, borders in common_runs(text, part):
                other_number = any(a.isdigit() and b.isdigit() for a, b in borders)
                expected |= run >= n and (numbers_agree or (run >= 2 * n and not other_number))
    shared = against(*benchmark, ngram=n, keep_other_numbers=keep).shared(example)
    assert (shared is not None) == expected
    if shared:
        assert any(f" {shared.words} " in f" {part} " for part in example)
        assert f" {shared.words} " in f" {benchmark[shared.line - 1]} "


def test_equal_hashes_are_not_enough(monkeypatch):
    """n-grams with the same last word get one hash: only the comparison word by word is left to tell them apart."""
    monkeypatch.setattr("solar.contamination.FACTOR", np.uint64(0))
    text = [random.Random(0).choice(["red", "green", "blue", "grey"]) for _ in range(60)]
    benchmarks = against(" ".join(text))
    assert benchmarks.shared([" ".join(text[20:40])])
    assert benchmarks.shared([" ".join([*text[20:30], "pink", *text[30:40]])]) is None


def test_files_of_all_kinds_with_their_lines(write):
    folder = write(
        {
            "a.jsonl": '{"x": 1}\n{"deep": [{"%s": 1}]}\n' % QUESTION,  # noqa: UP031
            "b.csv": f'id,text\n1,"{QUESTION}"\n',
            "c.txt": f"Title\n\n{QUESTION}\n",
            "data.jsonl": '{"text": "fine"}\n7\n{"n": 1}\n{"messages": [{"content": "%s"}]}\n' % QUESTION,  # noqa: UP031
        }
    )
    for name, line in (("a.jsonl", 2), ("b.csv", 2), ("c.txt", 3)):
        benchmarks = Benchmarks(read_texts([folder / name], BadRows()))
        bad = BadRows(skip=True)
        found = [*sift(folder / "data.jsonl", benchmarks, bad)]
        assert [(row.line, shared and shared.line) for row, shared in found] == [(1, None), (4, line)]
        assert [reason.partition(", ")[2] for reason in bad.found] == [
            "line 2: no object with text in it",
            "line 3: no object with text in it",
        ]


def test_a_file_without_examples_is_an_error(write):
    path = write({"a.jsonl": "7\n"}) / "a.jsonl"
    with pytest.raises(ValueError, match="no example in it that can be used"):
        [*sift(path, against(QUESTION), BadRows(skip=True))]


@pytest.mark.parametrize("ngram", [1, 0, -3])
def test_an_ngram_has_two_words_at_least(ngram):
    with pytest.raises(ValueError, match="at least 2"):
        against(QUESTION, ngram=ngram)
