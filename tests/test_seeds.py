"""Problems out of files, and the final answer of a text."""

import json

import pytest

from solar.rows import BadRows
from solar.seeds import Seed, extract_answer, join_answer, read_seeds, same_answer, split_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("She sold 48+24 = 72.\n#### 72", "72"),
        ("#### $1,234", "1234"),
        ("First 12 + 7 = 19. Answer: 14", "14"),
        ("Answer: 14\nSomething else: 3", "14"),
        ("The answer is: 42", "42"),
        ("So the answer is $18.00.", "18.00"),
        ("the answer is 50%.", "50"),
        ("The answer is **42**.", "42"),
        ("The answer is 72 clips, since 8*9 is 72.", "72"),
        ("The answer is that she sold 72 clips.", "72"),
        ("The answer is 48 + 24 = 72 clips.", "72"),
        ("#### -3", "-3"),
        ("#### -$5.5", "-5.5"),
        ("Answer: .5", "0.5"),
        ("The answer is 1/2", "1/2"),
        ("answer = 7", "7"),
        (r"It is \boxed{1,000}.", "1000"),
        (r"The answer is: $\frac{3}{4}$", r"\frac{3}{4}"),
        (r"so \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        ("The answer is: (3, 5)", "(3, 5)"),
        ("The answer is 12:30", "12:30"),
        ("The answer is 10 - 3", "10 - 3"),
        ("The answer is x+y.", "x+y"),
        ("#### 5\nThe answer is: 6", "6"),
        ("#### 5\nThe answer is:", "5"),
        ("Answer:", None),
        ("She has 5 clips.", None),
        ("", None),
    ],
)
def test_final_answers(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("18", "18.0", True),
        ("18.00", "18", True),
        ("0.5", "1/2", True),
        ("-3", "3", False),
        ("18", "18.1", False),
        ("x + y", "x+y", True),
        ("x", "y", False),
        ("1/0", "1/0", True),
        ("1e999999999", "1e999999999", True),
        ("1" * 5_000, "1" * 5_000, True),
        (None, "3", False),
        (None, None, False),
    ],
)
def test_answers_compare_as_numbers(first, second, same):
    assert same_answer(first, second) is same
    assert same_answer(second, first) is same


@pytest.mark.parametrize(
    ("text", "steps", "ending"),
    [
        ("A = 1.\nB = 2.\n#### 2", "A = 1.\nB = 2.", "#### 2"),
        ("A is 1.5 + 1. Answer: 2.5", "A is 1.5 + 1.", "Answer: 2.5"),
        ("A is 1.\nSo the answer is 1.", "A is 1.", "So the answer is 1."),
        ("Answer: 2", "", "Answer: 2"),
        ("none", "none", ""),
    ],
)
def test_an_answer_is_its_steps_and_its_ending(text, steps, ending):
    assert split_answer(text) == (steps, ending)
    assert join_answer(steps, ending).split() == text.split()


def test_all_shapes_are_read_and_calculator_marks_removed(write):
    rows = [
        {"question": " Half of 48? ", "answer": "48/2 = <<48/2=24>>24\n#### 24"},
        {"query": "q", "response": "1 + 1 = 2\nThe answer is: 2", "type": "GSM_AnsAug"},
        {"instruction": "i", "input": "more", "output": "So. Answer: 3.0"},
        {"instruction": "i", "input": "", "output": "Answer: 3"},
    ]
    folder = write({"a.jsonl": "\n".join(map(json.dumps, rows)), "a.json": json.dumps(rows, indent=1)})
    expected = [
        Seed("Half of 48?", "48/2 = 24\n#### 24", "24"),
        Seed("q", "1 + 1 = 2\nThe answer is: 2", "2"),
        Seed("i\n\nmore", "So. Answer: 3.0", "3.0"),
        Seed("i", "Answer: 3", "3"),
    ]
    for name in ("a.jsonl", "a.json"):
        assert read_seeds([folder / name], BadRows()) == expected


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"question": "q", "answer": "it is 3"}', "no final answer"),
        ('{"question": "", "answer": "Answer: 3"}', 'an empty "question"'),
        ('{"question": "q", "answer": "  "}', 'an empty "answer"'),
        ('{"question": 3, "answer": "Answer: 3"}', 'no string "question"'),
        ('{"question": "q"}', "wanted is one of {question, answer}, {query, response}, {instruction, output}"),
        ('{"question": "\\ud800", "answer": "Answer: 3"}', "surrogate"),
        ("[1]", "JSON, but no object"),
        ("{", "no JSON"),
    ],
)
def test_a_row_that_is_no_problem_is_named_by_file_and_line(write, line, reason):
    good = '{"question": "q", "answer": "Answer: 3"}'
    path = write({"a.jsonl": f"{good}\n{line}\n"}) / "a.jsonl"
    with pytest.raises(ValueError) as error:
        read_seeds([path], BadRows())
    assert str(error.value).startswith(f"{path}, line 2: ")
    assert reason in str(error.value)
    bad = BadRows(skip=True)
    assert len(read_seeds([path], bad)) == len(bad.found) == 1
    path.write_text(line)
    with pytest.raises(
        ValueError, match=r"a\.jsonl: no problem in it that can be used \(1 bad lines, the first: .*line 1"
    ):
        read_seeds([path], BadRows(skip=True))
