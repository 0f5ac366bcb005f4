"""Rephrasing: another question with the same answer, and other words for the answer (arXiv:2309.12284, section 3).

By rules, without a model: a problem of solar/problems.py is told in another phrasing of its family, with the same
operands, people and things. Of any other problem only that is changed which cannot change its meaning: a sentence
before it, the words that introduce its question, and a few words that mean the same. Its worked steps are kept, and
introduced or concluded otherwise.

What comes out is a function of the seed and the problem alone, not of what was rephrased before.

By a model, which is run by solar/mathdata.py: here stands what it is asked, and what is made of what it writes.
"""

import random
import re
from collections import Counter
from dataclasses import dataclass

from solar import problems
from solar.seeds import MARKER, Seed, extract_answer, join_answer, same_answer, split_answer

LEADS = (
    "",
    "Here is a problem.",
    "Consider the following.",
    "Please solve this problem.",
    "Work this out step by step.",
    "Read this carefully.",
)
FORMS = ("", "The question is:", "Now work this out:", "Tell me:", "What we want to know:")
QUESTION = re.compile(r"(?:How|What|Who|Which|When|Where|By|In|At|For|To|After|If)\b[^?]*\?$")
EQUAL = (  # each may stand for the other
    ("altogether", "in total"),
    ("each day", "every day"),
    ("each week", "every week"),
    ("bought", "purchased"),
    ("buys", "purchases"),
    ("twice as", "two times as"),
)
EQUALS = {a: b for pair in EQUAL for a, b in (pair, pair[::-1])}
EQUAL_WORDS = re.compile(r"\b(?:" + "|".join(EQUALS) + r")\b")

OPENINGS = ("", "Let us take it step by step.", "We go through it in order.", "Here is how to find out.")
CLOSINGS = ("", "So the answer is {final}.", "This gives {final}.", "The result is {final}.")


def held_out(question: str) -> bool:
    """Whether a problem that training must not see stands in the question."""
    problem = problems.recognise(question)
    return problem is not None and problems.is_held_out(problem.family, problem.operands)


def rephrase(seed: Seed, number: int, random_seed: int) -> tuple[str, str]:
    """(question, answer): the `number`-th rephrasing of a problem, counted from 0.

    The answer ends as that of `seed` does, with the same marker; it is what the rephrased question asks for, so whether
    it agrees with `seed.final` is for the caller to check.
    """
    order = random.Random(f"{random_seed} {seed.question}")  # the same for each number, so that all are different
    rng = random.Random(f"{random_seed} {number} {seed.question}")
    problem = problems.recognise(seed.question)
    body, ending = split_answer(seed.answer)
    if problem is None or problem.question != seed.question:
        question = _reword(seed.question, number, order, rng)
        return question, join_answer(_rework(body, seed.final, number, order), ending)
    others = [i for i in range(len(problems.FAMILIES[problem.family].phrasings)) if i != problem.phrasing]
    order.shuffle(others)
    turn, place = divmod(number, len(others))
    told = problems.retell(problem, others[place], rng)
    question = f"{LEADS[turn % len(LEADS)]} {told.question}".strip()
    solution = _rework(told.solution, told.answer, number, order) if turn else told.solution
    return question, f"{solution} {problems.MARKER} {told.answer}"


def _reword(question: str, number: int, order: random.Random, rng: random.Random) -> str:
    """Another lead, and another form of the last sentence if that is a question; never neither."""
    start = max((found.end() for found in re.finditer(r"[.!?]\s+", question)), default=0)
    last = question[start:]
    forms = range(len(FORMS) if QUESTION.match(last) else 1)
    ways = [(lead, form) for lead in range(len(LEADS)) for form in forms if lead or form]
    order.shuffle(ways)
    lead, form = ways[number % len(ways)]
    if form:
        last = f"{FORMS[form]} {last[0].lower()}{last[1:]}"
    text = EQUAL_WORDS.sub(lambda found: rng.choice([found.group(), EQUALS[found.group()]]), question[:start] + last)
    return f"{LEADS[lead]} {text}".strip()


def _rework(body: str, final: str, number: int, order: random.Random) -> str:
    """The same steps with another opening or closing; never neither."""
    separator = "\n" if "\n" in body else " "
    closings = range(1 if MARKER.search(body) else len(CLOSINGS))  # steps that name the answer need no closing
    ways = [(opening, closing) for opening in range(len(OPENINGS)) for closing in closings if opening or closing]
    order.shuffle(ways)
    opening, closing = ways[number % len(ways)]
    parts = (OPENINGS[opening], body, CLOSINGS[closing].format(final=final))
    return separator.join(part for part in parts if part)


# ------------------------------------------------------------------------------------------------ by a model

ASK_QUESTION = """Say the question in other words. Keep all the numbers, and do not answer it.

Question: Mia has 12 shells and finds 7 more. Then she gives 5 of them to Tom. How many shells does Mia have left?
Rephrased question: Mia starts with 12 shells, picks up another 7 and lets Tom have 5. How many shells remain hers?

Question: {question}
Rephrased question:"""
ASK_ANSWER = """Work out the answer step by step, and end with "The answer is: " and the number.

Question: Mia has 12 shells and finds 7 more. Then she gives 5 of them to Tom. How many shells does Mia have left?
Answer: With those that she finds Mia has 12 + 7 = 19 shells. After giving some to Tom she has 19 - 5 = 14 shells.
The answer is: 14

Question: {question}
Answer:"""
PREAMBLE = re.compile(r"(?:[^\n]{0,100}:\s*\n)?\s*(?:[\w ]{0,20}\b(?:problem|question)\s*:\s*)?", re.IGNORECASE)
DIGITS = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")


def question_ends(text: str) -> bool:
    """Whether a model has written its question: one paragraph, not what it says before that, ending in a colon."""
    return text.endswith("\n") and bool(clean_question(text))


def answer_ends(text: str) -> bool:
    """Whether a model has written its answer: up to the line of the marker."""
    return text.endswith("\n") and extract_answer(text) is not None


def clean_question(text: str) -> str:
    """A question without what a model says before it, and without the quotes around it."""
    return text[PREAMBLE.match(text).end() :].strip("*\"'` \n")


def question_fault(seed: Seed, question: str) -> str | None:
    """Why a model's question cannot be another form of the seed's, or None."""
    if not question or MARKER.search(question) or ("?" in seed.question and not question.endswith("?")):
        return "no question"
    if not {*DIGITS.findall(seed.question)} <= {*DIGITS.findall(question)}:
        return "a number of the question lost"
    return None


def finish_answer(seed: Seed, answer: str) -> str:
    """A right answer with the ending of the seed's behind its own, so that all rows of a file end alike."""
    ending = split_answer(seed.answer)[1]
    right = same_answer(extract_answer(answer), seed.final)
    return join_answer(answer, ending) if right and not answer.endswith(ending) else answer


# ------------------------------------------------------------------------------------------------ what is kept


@dataclass
class Kept:
    """The rows of Math-Instruct so far, and why other attempts were dropped."""

    rows: list[dict]
    dropped: Counter

    def __post_init__(self):
        self.questions = {row["instruction"] for row in self.rows}

    def full(self, count: int | None) -> bool:
        """Whether there are `count` rows."""
        return count is not None and len(self.rows) >= count

    def take(self, seed: Seed, question: str, answer: str) -> None:
        """Keep a rephrasing if it is another question that has the seed's final answer."""
        final = extract_answer(answer)
        if question == seed.question:
            reason = "question unchanged"
        elif question in self.questions:
            reason = "question there already"
        elif held_out(question):
            reason = "a held-out problem"
        elif final is None:
            reason = "no final answer"
        elif not same_answer(final, seed.final):
            reason = "another final answer"
        else:
            self.questions.add(question)
            row = {"instruction": question, "output": answer, "original_question": seed.question}
            self.rows.append(row | {"original_answer": seed.answer, "answer": seed.final})
            return
        self.dropped[reason] += 1

    def check(self) -> None:
        """Raise ValueError if there is nothing to write."""
        if not self.rows:
            raise ValueError(f"nothing could be kept: {self.report()}")

    def report(self) -> str:
        """One line: how many were kept of how many, and why others were not."""
        total = len(self.rows) + self.dropped.total()
        reasons = "".join(f"; {reason}: {count:,}" for reason, count in self.dropped.most_common() if count)
        return f"kept {len(self.rows):,} of {total:,} rephrasings{reasons}"
