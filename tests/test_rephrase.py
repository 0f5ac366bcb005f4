"""Rephrasing by rules keeps the problem; and what of a model's text is taken."""

import re
from collections import Counter
from itertools import islice

import pytest

from solar import problems
from solar.rephrase import (
    Kept,
    answer_ends,
    clean_question,
    finish_answer,
    held_out,
    question_ends,
    question_fault,
    rephrase,
)
from solar.seeds import Seed, extract_answer, same_answer

FOREIGN = Seed(
    "Weng earns $12.50 an hour each day. Yesterday, she bought 2 books. How much did she earn altogether?",
    "It is 12.5 * 2 = 25.\nMore.\n#### 25",
    "25",
)


def seed_of(problem):
    return Seed(problem.question, f"{problem.solution} Answer: {problem.answer}", problem.answer)


def test_generated_problems_are_told_in_another_phrasing_with_the_same_operands():
    for problem in islice(problems.generate(0, "train"), 2_000):
        told = []
        for number in range(3):
            question, answer = rephrase(seed_of(problem), number, 0)
            again = problems.recognise(question)
            assert (again.family, again.operands, again.question) == (problem.family, problem.operands, question)
            assert again.phrasing != problem.phrasing
            assert answer == f"{again.solution} Answer: {problem.answer}"
            told.append(again.phrasing)
        assert len(set(told)) == 3
        question, answer = rephrase(seed_of(problem), 3, 0)
        assert problems.recognise(question).operands == problem.operands
        assert extract_answer(answer) == problem.answer


def test_foreign_problems_keep_their_numbers_steps_and_ending():
    questions = set()
    for number in range(20):
        question, answer = rephrase(FOREIGN, number, 3)
        assert question not in (FOREIGN.question, *questions)
        questions.add(question)
        assert re.findall(r"[\d.]*\d", question) == ["12.50", "2"]
        assert answer != FOREIGN.answer
        assert "It is 12.5 * 2 = 25.\nMore.\n" in answer
        assert answer.endswith("\n#### 25")
        assert same_answer(extract_answer(answer), "25")
    assert any("purchased" in question for question in questions)
    assert any("how much did she earn" in question for question in questions)


def test_a_rephrasing_depends_on_seed_and_problem_alone():
    assert rephrase(FOREIGN, 1, 0) == rephrase(FOREIGN, 1, 0)
    assert len({rephrase(FOREIGN, 0, seed) for seed in range(10)}) > 3


def test_held_out_problems_are_known_in_any_surroundings():
    for problem in islice(problems.generate(0, "heldout"), 200):
        assert held_out(problem.question)
        assert held_out(f"Here is a problem. {problem.question} Think.")
    assert not any(held_out(problem.question) for problem in islice(problems.generate(0, "train"), 500))
    assert not held_out(FOREIGN.question)


def test_what_is_kept_and_why_not():
    kept = Kept([], Counter())
    kept.take(FOREIGN, FOREIGN.question, FOREIGN.answer)
    kept.take(FOREIGN, "Another?", "25")
    kept.take(FOREIGN, "Another?", "Answer: 26")
    kept.take(FOREIGN, next(problems.generate(0, "heldout")).question, "Answer: 25")
    with pytest.raises(ValueError, match="nothing could be kept: kept 0 of 4"):
        kept.check()
    kept.take(FOREIGN, "Another?", "Answer: 25.0")
    kept.take(FOREIGN, "Another?", "Answer: 25.0")
    assert kept.rows == [
        {
            "instruction": "Another?",
            "output": "Answer: 25.0",
            "original_question": FOREIGN.question,
            "original_answer": FOREIGN.answer,
            "answer": "25",
        }
    ]
    assert kept.dropped == Counter(
        [
            "question unchanged",
            "no final answer",
            "another final answer",
            "a held-out problem",
            "question there already",
        ]
    )
    assert kept.full(1)
    assert not kept.full(2)
    assert not kept.full(None)


@pytest.mark.parametrize(
    ("text", "question"),
    [
        ("How many?", "How many?"),
        ("Rephrased question: How many?", "How many?"),
        ('Here it is:\n\n"How many?"\n', "How many?"),
        ("Sure, here is the text:\n\nThe new problem: **How many?**", "How many?"),
        ("It is 3:30. How late is it?", "It is 3:30. How late is it?"),
        ("", ""),
    ],
)
def test_a_models_question_is_taken_out_of_what_it_says(text, question):
    assert clean_question(text) == question


def test_where_a_models_text_ends():
    assert question_ends("How many?\n")
    assert not question_ends("How many?")
    assert not question_ends("Here it is:\n")
    assert not question_ends("\n")
    assert answer_ends("1 + 1 = 2\nThe answer is: 2\n")
    assert not answer_ends("1 + 1 = 2\n")
    assert not answer_ends("1 + 1 = 2\nThe answer is: 2")


def test_a_models_question_must_ask_and_keep_the_numbers():
    assert question_fault(FOREIGN, "At $12.50, with 2 books: how much?") is None
    assert question_fault(FOREIGN, "At $12.50, how much?") == "a number of the question lost"
    for text in ("", "It is $12.50 and 2.", "With 12.50 and 2 the answer is 25. Is it?"):
        assert question_fault(FOREIGN, text) == "no question"


def test_all_rows_of_a_file_end_alike():
    assert finish_answer(FOREIGN, "So it is.\nThe answer is: 25") == "So it is.\nThe answer is: 25\n#### 25"
    assert finish_answer(FOREIGN, "So it is.\n#### 25") == "So it is.\n#### 25"
    assert finish_answer(FOREIGN, "The answer is: 26") == "The answer is: 26"
