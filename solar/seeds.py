"""Maths problems with worked answers, out of the files that they come in, and the final answer of a text.

    {"question", "answer"}        GSM8K, whose answers end in "#### 42", and this repository's, in "Answer: 42"
    {"query", "response"}         MetaMathQA, "The answer is: 42"
    {"instruction", "output"}     instruction sets, with "input" or without, ending in any of these ways

GSM8K writes down for a calculator what it has to do, as in 48/2=<<48/2=24>>24; that is taken out of the text.
"""

import re
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from solar.rows import BadRows, Row, read_rows

SHAPES = (("question", "answer"), ("query", "response"), ("instruction", "output"))
CALCULATOR = re.compile(r"<<[^<>\n]*>>")

MARKER = re.compile(r"####|\banswer(?: is)?\s*[:=]|\banswer is\b|\\boxed\{", re.IGNORECASE)
NUMBER = re.compile(
    r"[-−–]?[\s$€£]*[-−–]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:\s?/\s?\d+)?|\.\d+)(?!\d)"
    r"(?=\s?%|[*_`$.,;:!?)\]]*(?:$|\s+[^\W\d_])|[^\W\d_]{2})"  # behind it nothing, or words: not the rest of a formula
)
PLAIN = re.compile(
    r"-?\d{1,100}(?:\.\d{1,100}|/0*[1-9]\d{0,99})?"
)  # what Fraction reads at once: 1e999999999 it does not
SENTENCE_END = re.compile(r"[.!?]\s+|\n\s*")
DECORATION = "*_`\"'$:=~≈ \t"


class Seed(NamedTuple):
    """A problem as it was read: two texts without calculator marks, and what `extract_answer` finds in the second."""

    question: str
    answer: str
    final: str


def extract_answer(text: str) -> str | None:
    """The final answer behind the last marker: `####`, `Answer:`, `The answer is`, `\\boxed{`; None without one.

    A number comes as digits alone: without currency, per cent, thousands' commas, a trailing dot or words behind it;
    of an equation it is the right-hand side. What is no number comes as the text up to the end of its line.
    """
    for found in reversed([*MARKER.finditer(text)]):
        line = text[found.end() :].lstrip().partition("\n")[0]
        if found.group().startswith("\\"):
            line = _braced(line)
        if answer := _final(line):
            return answer
    return None


def split_answer(text: str) -> tuple[str, str]:
    """(worked steps, the sentence or line with the last marker and all behind it), without white space between them."""
    markers = [*MARKER.finditer(text)]
    if not markers:
        return text, ""
    before = text[: markers[-1].start()]
    start = max((found.end() for found in SENTENCE_END.finditer(before)), default=0)
    return text[:start].rstrip(), text[start:].lstrip()


def join_answer(steps: str, ending: str) -> str:
    """Worked steps and what `split_answer` splits off: on a line of its own if the steps have lines, or if GSM8K's."""
    separate = "\n" if "\n" in steps or ending.startswith("####") else " "
    return f"{steps}{separate}{ending}".strip()


def _braced(text: str) -> str:
    """What stands before the brace that closes one opened before."""
    depth = 1
    for at, char in enumerate(text):
        depth += {"{": 1, "}": -1}.get(char, 0)
        if not depth:
            return text[:at]
    return text


def _final(line: str) -> str | None:
    text = (line.rpartition("=")[2].strip(DECORATION) or line.strip(DECORATION)).removesuffix(".").strip(DECORATION)
    number = NUMBER.match(text)
    if number is None and re.match(r"[^\W\d_]{2}[^\\^{}]*$", text):  # a sentence
        number = next(reversed([*NUMBER.finditer(text)]), None)
    return _digits(number.group()) if number else text or None


def _digits(number: str) -> str:
    digits = re.sub(r"[^\d./]", "", number)
    digits = ("0" if digits.startswith(".") else "") + digits
    return ("-" if re.match(r"[\s$€£]*[-−–]", number) else "") + digits


def same_answer(first: str | None, second: str | None) -> bool:
    """Whether two final answers are equal: as numbers if both are (18.0 is 18, 1/2 is 0.5), else as text.

    Spaces do not count, and no answer equals nothing.
    """
    if first is None or second is None:
        return False
    if PLAIN.fullmatch(first) and PLAIN.fullmatch(second):
        return Fraction(first) == Fraction(second)
    return re.sub(r"\s", "", first) == re.sub(r"\s", "", second)


def read_seeds(paths: Iterable[Path], bad: BadRows) -> list[Seed]:
    """The problems of .jsonl and .json files. Rows that are none go to `bad`: it stops at them or counts them.

    Raises ValueError for a file without a single problem.
    """
    seeds = []
    for path in paths:
        before = len(seeds)
        for row in read_rows(path, bad):
            try:
                seeds.append(_seed(row))
            except ValueError as error:
                bad.add(path, row.line, str(error))
        if len(seeds) == before:
            raise ValueError(f"{path}: no problem in it that can be used" + _first_reason(path, bad))
    return seeds


def _first_reason(path: Path, bad: BadRows) -> str:
    of_path = [reason for reason in bad.found if reason.startswith(f"{path}, line ")]
    return f" ({len(of_path)} bad lines, the first: {of_path[0]})" if of_path else ""


def _seed(row: Row) -> Seed:
    question, answer = text_fields(row.value, next((shape for shape in SHAPES if _has(row.value, shape)), ()))
    if isinstance(more := row.value.get("input"), str) and more.strip() and "instruction" in row.value:
        question = f"{question}\n\n{more.strip()}"  # as solar/chats.py joins them
    answer = CALCULATOR.sub("", answer)
    if (final := extract_answer(answer)) is None:
        raise ValueError(f'no final answer ("#### 42", "Answer: 42", "The answer is 42") in {answer[-60:]!r}')
    return Seed(CALCULATOR.sub("", question), answer, final)


def _has(value: object, shape: tuple[str, ...]) -> bool:
    return isinstance(value, dict) and all(name in value for name in shape)


def text_fields(value: object, names: tuple[str, ...]) -> list[str]:
    """The fields of a row that have these names, without white space around them.

    Raises ValueError, which says what is wrong, unless all are there and are text.
    """
    if not isinstance(value, dict):
        raise ValueError("JSON, but no object")
    if not names:
        wanted = ", ".join("{" + ", ".join(shape) + "}" for shape in SHAPES)
        raise ValueError(f"fields {sorted(value)!s:.80}; wanted is one of {wanted}")
    texts = []
    for name in names:
        if not isinstance(value.get(name), str):
            raise ValueError(f'no string "{name}"')
        texts.append(value[name].strip())
        if not texts[-1]:
            raise ValueError(f'an empty "{name}"')
        try:
            texts[-1].encode()
        except UnicodeEncodeError:
            raise ValueError(f'"{name}" holds half of a surrogate pair') from None
    return texts
