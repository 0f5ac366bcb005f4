"""Arithmetic word problems with worked answers, made from a seed: data that no download is needed for.

A family is one computation of two or three steps; a phrasing tells it as one little story. The text of a problem is the
question, the steps in the order of the story, and the marker `Answer:`, all in one paragraph:

    Mia has 12 shells and finds 7 more. Then Mia gives 5 shells to Tom. How many shells does Mia have left?
    First Mia has 12 + 7 = 19 shells. Then Mia has 19 - 5 = 14 shells left. Answer: 14

Whether a problem is for training or held out depends on its family and its operands alone: a hash puts about 5% of them
on the held-out side, in every phrasing and under every name. What is measured there has never been seen in training,
whatever the seeds and however much is generated.
"""

import hashlib
import random
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import islice
from typing import Literal, NamedTuple

Split = Literal["train", "heldout"]

HELD_OUT = 0.05  # share of each family's operands that training never sees
MARKER = "Answer:"


class Problem(NamedTuple):
    """One problem. `question`, `solution` and `answer`, joined by spaces and the marker, are its text."""

    family: str
    phrasing: int
    operands: tuple[int, ...]
    question: str
    solution: str
    answer: str


class Family(NamedTuple):
    """draw(rng) -> operands; results(*operands) -> the result of each step, the last one being the answer; phrasings,
    each (question, solution), in which {a} {b} {c} {d} are the operands and {x} {y} {z} the results.

    {name}, {other}, {things} and {those} are filled at random.
    """

    draw: Callable[[random.Random], tuple[int, ...]]
    results: Callable[..., tuple[int, ...]]
    phrasings: tuple[tuple[str, str], ...]


NAMES = ["Mia", "Tom", "Anna", "Ben", "Lucy", "Sam", "Nina", "Paul", "Emma", "Leo", "Clara", "Max", "Julia", "Omar"]
THINGS = ["apples", "marbles", "stickers", "pencils", "cards", "shells", "buttons", "books", "stamps", "eggs", "nuts"]


def _gains(rng: random.Random) -> tuple[int, ...]:
    a, b = rng.randint(10, 60), rng.randint(5, 40)
    return a, b, rng.randint(3, min(a + b - 2, 60))


def _change(rng: random.Random) -> tuple[int, ...]:
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    return a, b, rng.randint(a * b + 1, 100)


def _two_items(rng: random.Random) -> tuple[int, ...]:
    return tuple(rng.randint(2, 9) for _ in range(4))


def _sharing(rng: random.Random) -> tuple[int, ...]:
    b = rng.randint(2, 9)
    return b * rng.randint(2, 12), b, rng.randint(2, 40)


def _rate(rng: random.Random) -> tuple[int, ...]:
    return rng.randint(2, 12), rng.randint(2, 9), rng.randint(3, 60)


def _comparison(rng: random.Random) -> tuple[int, ...]:
    return rng.randint(4, 50), rng.randint(2, 40)


def _perimeter(rng: random.Random) -> tuple[int, ...]:
    a = rng.randint(5, 40)
    return a, rng.randint(3, a), rng.randint(1, 9)


def _ages(rng: random.Random) -> tuple[int, ...]:
    return rng.randint(5, 14), rng.randint(3, 7), rng.randint(2, 14)


FAMILIES: dict[str, Family] = {
    "gains": Family(
        _gains,
        lambda a, b, c: (a + b, a + b - c),
        (
            (
                "{name} has {a} {things} and finds {b} more. Then {name} gives {c} {things} to {other}. "
                "How many {things} does {name} have left?",
                "First {name} has {a} + {b} = {x} {things}. Then {name} has {x} - {c} = {y} {things} left.",
            ),
            (
                "A bus carries {a} people. At the first stop {b} people get on, at the second {c} get off. "
                "How many people are on the bus now?",
                "After the first stop there are {a} + {b} = {x} people. After the second there are {x} - {c} = {y}.",
            ),
            (
                "A shop has {a} {things}. In the morning {b} {things} arrive, and by the evening {c} are sold. "
                "How many {things} remain?",
                "With the new ones the shop has {a} + {b} = {x} {things}. Of these {x} - {c} = {y} remain.",
            ),
            (
                "{name} saved {a} dollars, got {b} dollars for a birthday and spent {c} dollars. "
                "How many dollars are left?",
                "Together that was {a} + {b} = {x} dollars. After spending there are {x} - {c} = {y} dollars.",
            ),
        ),
    ),
    "change": Family(
        _change,
        lambda a, b, c: (a * b, c - a * b),
        (
            (
                "{name} buys {a} {things} for {b} dollars each and pays with {c} dollars. How much change is there?",
                "The {things} cost {a} * {b} = {x} dollars. The change is {c} - {x} = {y} dollars.",
            ),
            (
                "One ticket costs {b} dollars. {name} has {c} dollars and buys {a} tickets. "
                "How many dollars does {name} keep?",
                "The tickets cost {a} * {b} = {x} dollars. {name} keeps {c} - {x} = {y} dollars.",
            ),
            (
                "With {c} dollars in the pocket {name} orders {a} meals at {b} dollars each. What is left to spend?",
                "The meals come to {a} * {b} = {x} dollars. That leaves {c} - {x} = {y} dollars.",
            ),
            (
                "A rope is {c} meters long. {name} cuts off {a} pieces of {b} meters each. "
                "How many meters of rope are left?",
                "The pieces take {a} * {b} = {x} meters. What is left is {c} - {x} = {y} meters.",
            ),
        ),
    ),
    "two items": Family(
        _two_items,
        lambda a, b, c, d: (a * b, c * d, a * b + c * d),
        (
            (
                "{name} buys {a} {things} for {b} dollars each and {c} {those} for {d} dollars each. "
                "How much does {name} pay?",
                "The {things} cost {a} * {b} = {x} dollars. The {those} cost {c} * {d} = {y} dollars. "
                "In all {name} pays {x} + {y} = {z} dollars.",
            ),
            (
                "{name} packs {a} boxes with {b} {things} in each and {c} boxes with {d} {things} in each. "
                "How many {things} are packed?",
                "The first boxes hold {a} * {b} = {x} {things}. The others hold {c} * {d} = {y}. "
                "Together that is {x} + {y} = {z} {things}.",
            ),
            (
                "A hall has {a} rows of {b} seats and {c} rows of {d} seats. How many seats are there?",
                "The first rows have {a} * {b} = {x} seats. The other rows have {c} * {d} = {y} seats. "
                "In all there are {x} + {y} = {z} seats.",
            ),
            (
                "{name} runs {a} days a week for {b} miles and {other} runs {c} days a week for {d} miles. "
                "How many miles do they run in a week?",
                "{name} runs {a} * {b} = {x} miles. {other} runs {c} * {d} = {y} miles. "
                "Together they run {x} + {y} = {z} miles.",
            ),
        ),
    ),
    "sharing": Family(
        _sharing,
        lambda a, b, c: (a // b, a // b + c),
        (
            (
                "{name} and friends share {a} {things} equally, {b} people in all. {name} already had {c} {things}. "
                "How many {things} does {name} have now?",
                "Each gets {a} / {b} = {x} {things}. Now {name} has {x} + {c} = {y} {things}.",
            ),
            (
                "A farmer puts {a} eggs into {b} baskets, the same number in each. Then {c} eggs are added to one "
                "basket. How many eggs are in that basket?",
                "Each basket holds {a} / {b} = {x} eggs. In that one there are {x} + {c} = {y} eggs.",
            ),
            (
                "{name} reads a book of {a} pages in {b} days, as many pages every day. On the last day {name} reads "
                "{c} pages of another book too. How many pages does {name} read on the last day?",
                "Every day that is {a} / {b} = {x} pages. On the last day it is {x} + {c} = {y} pages.",
            ),
            (
                "A dinner for {b} people costs {a} dollars and is paid in equal parts. {name} pays one part and {c} "
                "dollars for a taxi. How many dollars does {name} spend?",
                "One part is {a} / {b} = {x} dollars. With the taxi {name} spends {x} + {c} = {y} dollars.",
            ),
        ),
    ),
    "rate": Family(
        _rate,
        lambda a, b, c: (a * b, a * b + c),
        (
            (
                "{name} walks {a} miles an hour for {b} hours and then takes a bus for {c} miles. "
                "How many miles is the whole way?",
                "On foot it is {a} * {b} = {x} miles. The whole way is {x} + {c} = {y} miles.",
            ),
            (
                "A tank holds {c} liters of water. A pump adds {a} liters a minute for {b} minutes. "
                "How many liters are in the tank then?",
                "The pump adds {a} * {b} = {x} liters. Then there are {x} + {c} = {y} liters.",
            ),
            (
                "{name} collects {a} {things} every day. After {b} days {other} brings {c} more. "
                "How many {things} are there?",
                "{name} collects {a} * {b} = {x} {things}. With those of {other} there are {x} + {c} = {y} {things}.",
            ),
            (
                "{name} earns {a} dollars an hour and works for {b} hours. Before that {name} had {c} dollars. "
                "How many dollars does {name} have now?",
                "The work pays {a} * {b} = {x} dollars. Now {name} has {x} + {c} = {y} dollars.",
            ),
        ),
    ),
    "comparison": Family(
        _comparison,
        lambda a, b: (a + b, a + a + b),
        (
            (
                "{name} has {a} {things}. {other} has {b} {things} more than {name}. How many do they have together?",
                "{other} has {a} + {b} = {x} {things}. Together they have {a} + {x} = {y} {things}.",
            ),
            (
                "On Monday {name} reads {a} pages, on Tuesday {b} pages more than on Monday. "
                "How many pages is that in two days?",
                "On Tuesday it is {a} + {b} = {x} pages. In two days it is {a} + {x} = {y} pages.",
            ),
            (
                "There are {a} small {things} in a bag and {b} more large ones than small ones. "
                "How many {things} are in the bag?",
                "There are {a} + {b} = {x} large {things}. In the bag there are {a} + {x} = {y} {things}.",
            ),
            (
                "A hat costs {a} dollars and a coat costs {b} dollars more than the hat. What do both cost together?",
                "The coat costs {a} + {b} = {x} dollars. Both cost {a} + {x} = {y} dollars.",
            ),
        ),
    ),
    "perimeter": Family(
        _perimeter,
        lambda a, b, c: (a + b, 2 * (a + b), 2 * (a + b) - c),
        (
            (
                "A garden is {a} meters long and {b} meters wide. It gets a fence all around, with a gate of {c} "
                "meters. How long is the fence?",
                "Length and width are {a} + {b} = {x} meters. All around it is 2 * {x} = {y} meters. "
                "Without the gate it is {y} - {c} = {z} meters.",
            ),
            (
                "{name} frames a picture {a} inches by {b} inches with tape, but {c} inches of tape are missing. "
                "How many inches of tape does {name} have?",
                "Two sides are {a} + {b} = {x} inches. The frame is 2 * {x} = {y} inches. "
                "There are {y} - {c} = {z} inches of tape.",
            ),
            (
                "A room is {a} feet by {b} feet. {name} lays a border along all walls except a door of {c} feet. "
                "How many feet of border are needed?",
                "Two walls are {a} + {b} = {x} feet. All walls are 2 * {x} = {y} feet. "
                "Without the door it is {y} - {c} = {z} feet.",
            ),
            (
                "{name} walks once around a field {a} yards long and {b} yards wide and stops {c} yards before the "
                "end. How many yards does {name} walk?",
                "Length and width are {a} + {b} = {x} yards. Once around is 2 * {x} = {y} yards. "
                "{name} walks {y} - {c} = {z} yards.",
            ),
        ),
    ),
    "ages": Family(
        _ages,
        lambda a, b, c: (a * b, a * b - c),
        (
            (
                "{name} is {a} years old. An uncle is {b} times as old as {name}, and an aunt is {c} years younger "
                "than the uncle. How old is the aunt?",
                "The uncle is {a} * {b} = {x} years old. The aunt is {x} - {c} = {y} years old.",
            ),
            (
                "A tree is {b} times as old as {name}, who is {a}. The house beside it was built {c} years after the "
                "tree was planted. How old is the house?",
                "The tree is {a} * {b} = {x} years old. The house is {x} - {c} = {y} years old.",
            ),
            (
                "{other} is {b} times as old as {name}. If {name} is {a}, how old was {other} {c} years ago?",
                "Now {other} is {a} * {b} = {x} years old. {c} years ago that was {x} - {c} = {y} years.",
            ),
            (
                "{name} is {a}, and the grandmother of {name} is {b} times that age. She came to the city {c} years "
                "ago. How old was she then?",
                "The grandmother is {a} * {b} = {x} years old. When she came she was {x} - {c} = {y} years old.",
            ),
        ),
    ),
}


def is_held_out(family: str, operands: tuple[int, ...]) -> bool:
    """Which side of the split a problem is on, in every phrasing: by a hash that no process or version changes."""
    digest = hashlib.blake2b(f"{family} {operands}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) < HELD_OUT * 2**64


def generate(seed: int, split: Split) -> Iterator[Problem]:
    """An endless stream of problems, families and phrasings equally often; a pure function of (seed, split).

    Raises ValueError for another split than "train" and "heldout".
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"problems are split into train and heldout, not {split!r}")
    return _generate(random.Random(f"{split} {seed}"), split)


def _generate(rng: random.Random, split: Split) -> Iterator[Problem]:
    names = list(FAMILIES)
    while True:
        family = rng.choice(names)
        draw, _, phrasings = FAMILIES[family]
        operands = draw(rng)
        while is_held_out(family, operands) != (split == "heldout"):
            operands = draw(rng)
        phrasing = rng.randrange(len(phrasings))
        name, other = rng.sample(NAMES, 2)
        things, those = rng.sample(THINGS, 2)
        words = {"name": name, "other": other, "things": things, "those": those}
        yield _tell(family, phrasing, operands, words)


def _tell(family: str, phrasing: int, operands: tuple[int, ...], words: dict[str, str]) -> Problem:
    steps = FAMILIES[family].results(*operands)
    filled = words | dict(zip("abcd", operands, strict=False)) | dict(zip("xyz", steps, strict=False))
    question, solution = (template.format(**filled) for template in FAMILIES[family].phrasings[phrasing])
    return Problem(family, phrasing, operands, question, solution, str(steps[-1]))


def recognise(text: str) -> Problem | None:
    """The first problem whose question stands in `text`, word for word, whoever wrote it there; None if there is none.

    Operands that no family would draw are no problem of ours where the story is not true of them: what cannot be shared
    equally, or an answer below 1.
    """
    found = _find(text)
    return found and found[0]


def retell(problem: Problem, phrasing: int, rng: random.Random) -> Problem:
    """The same problem in another phrasing of its family: same operands, same people and things.

    Who or what the first story did not need is drawn. Raises ValueError for a question that is not the problem's.
    """
    found = _find(problem.question)
    if found is None or found[0].operands != problem.operands:
        raise ValueError(f"not a question of the family {problem.family}: {problem.question!r:.80}")
    words = found[1]
    for kinds, choice in ((("name", "other"), NAMES), (("things", "those"), THINGS)):
        for kind in kinds:
            if kind not in words:
                words[kind] = rng.choice([word for word in choice if word not in words.values()])
    return _tell(problem.family, phrasing, problem.operands, words)


def _find(text: str) -> tuple[Problem, dict[str, str]] | None:
    """(problem, the words that fill its story) of the first question in the text."""
    for (family, phrasing), pattern in _patterns().items():
        if (match := pattern.search(text)) is None:
            continue
        words = match.groupdict()
        operands = tuple(int(words.pop(letter)) for letter in "abcd" if letter in words)
        if (family == "sharing" and (not operands[1] or operands[0] % operands[1])) or (
            min(FAMILIES[family].results(*operands)) < 1
        ):
            continue
        return _tell(family, phrasing, operands, words), words
    return None


@cache
def _patterns() -> dict[tuple[str, int], re.Pattern]:
    """{(family, phrasing): a pattern of the question, with a group for everything that fills it}"""
    choices = {"name": NAMES, "other": NAMES, "things": THINGS, "those": THINGS}
    patterns = {}
    for name, family in FAMILIES.items():
        for phrasing, (question, _) in enumerate(family.phrasings):
            pattern, seen = "", set()
            for literal, field, _, _ in string.Formatter().parse(question):
                pattern += re.escape(literal)
                if field in seen:
                    pattern += f"(?P={field})"
                elif field:
                    pattern += f"(?P<{field}>{'|'.join(choices.get(field, ['[0-9]{1,9}']))})"
                    seen.add(field)
            patterns[name, phrasing] = re.compile(pattern)
    return patterns


def documents(seed: int, count: int, split: Split) -> Iterator[str]:
    """The texts of the first `count` problems of `generate(seed, split)`, one problem a document."""
    for problem in islice(generate(seed, split), count):
        yield f"{prompt(problem)} {problem.solution} {MARKER} {problem.answer}"


def prompt(problem: Problem) -> str:
    """What a model is given to answer: the text of a document up to the end of the question."""
    return problem.question


def extract_answer(text: str) -> str | None:
    """The word behind the last marker of what a model wrote; None without a marker, or with nothing behind it."""
    _, marker, rest = text.rpartition(MARKER)
    words = rest.split()
    return words[0] if marker and words else None


def majority(problems: Iterable[Problem]) -> dict[str, str]:
    """{family: its most frequent answer}: a model that has learned nothing but this is the floor to be above."""
    answers: dict[str, Counter] = {}
    for problem in problems:
        answers.setdefault(problem.family, Counter())[problem.answer] += 1
    return {family: counter.most_common(1)[0][0] for family, counter in answers.items()}
