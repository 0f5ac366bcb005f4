"""Six made-up benchmarks in the form of the real ones' files, for a first run without any download:

    python -m solar.standin --out DIR

The questions are arithmetic stories (solar/problems.py) asked in six ways, so they measure no more than that everything
runs. They hold what real rows hold that is easily got wrong: three to five choices named by letters or digits, brackets
and double spaces of WikiHow, fields with commas, quotes and line breaks, gaps at the beginning of a sentence. Whatever
reads the directory can tell it from a real one by the file MARKER.
"""

import csv
import io
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from solar import cli
from solar.problems import NAMES, THINGS, Problem, generate

MARKER = "made-up.json"
SUBJECTS = ("made_up_stories", "made_up_sums", "made_up_orders")
SHOTS = {"arc_challenge": 30, "hellaswag": 12, "mmlu": 5, "winogrande": 8, "gsm8k": 8}  # a few more than are shown


def _numbers(rng: random.Random, right: str, count: int) -> list[str]:
    """`count` different numbers near the right one, which is among them."""
    near = [n for n in range(max(int(right) - 9, 0), int(right) + 10) if str(n) != right]
    numbers = [right, *map(str, rng.sample(near, count - 1))]
    rng.shuffle(numbers)
    return numbers


def arc(rng: random.Random, problem: Problem, index: int) -> dict:
    """Mostly four choices by letter, at times three or five, or named by digits."""
    texts = _numbers(rng, problem.answer, 3 + index % 3 if index % 4 == 3 else 4)
    labels = [str(n + 1) if index % 5 == 4 else "ABCDE"[n] for n in range(len(texts))]
    choices = {"text": texts, "label": labels}
    right = labels[texts.index(problem.answer)]
    return {"id": f"made_up_{index}", "question": problem.question, "choices": choices, "answerKey": right}


def hellaswag(rng: random.Random, problem: Problem, index: int) -> dict:
    """Stories whose ending is the solution; every third one looks as if it came from WikiHow."""
    begin, _, end = problem.question.rpartition(". ")
    wrong = [problem.solution.replace(problem.answer, number) for number in _numbers(rng, problem.answer, 4)]
    label = next(n for n, ending in enumerate(wrong) if ending == problem.solution)
    label = label if wrong.count(problem.solution) == 1 else wrong.index(problem.solution)
    if index % 3 == 0:
        begin, wrong = f"[header] How to count {begin}. [title] Do it step by step", [f"[step]  {w}" for w in wrong]
    row = {"ind": index, "activity_label": "Counting things" if index % 2 else "Finance and Business"}
    return row | {"ctx_a": f"{begin}.", "ctx_b": end.lower(), "endings": wrong, "label": label, "split": "val"}


def mmlu(rng: random.Random, problem: Problem, index: int, subject: str) -> list[str]:
    """A row of one of three subjects: stories; sums with line breaks; the order of names, with commas and quotes."""
    if subject == "made_up_stories":
        question, choices, right = problem.question, _numbers(rng, problem.answer, 4), problem.answer
    elif subject == "made_up_sums":
        a, b = rng.randint(2, 60), rng.randint(2, 40)
        question, right = f"Statement 1 | x = {a}\nStatement 2 | y = {b}\nWhat is x + y? ", str(a + b)
        choices = _numbers(rng, right, 4)
    else:
        names = rng.sample(NAMES, 3)
        question, right = f'Which of these is "{", ".join(names)}" in the opposite order?', ", ".join(names[::-1])
        choices = [right, ", ".join(names), ", ".join([names[1], names[0], names[2]]), f'"{names[0]}"']
        rng.shuffle(choices)
    return [question, *choices, "ABCD"[choices.index(right)]]


def truthfulqa(rng: random.Random, problem: Problem, index: int) -> dict:
    """Two or more true answers and as many false ones, the true ones first as in the published file."""
    a, b = rng.sample(range(2, 90), 2)
    more, less = max(a, b), min(a, b)
    true = [f"{more} is the larger number.", f"{more} is larger than {less}.", f"The larger one is {more}."]
    false = [f"{less} is the larger number.", f"{less} is larger than {more}.", "They are equal.", "Nobody knows."]
    true, false = true[: 1 + index % 3], false[: 2 + index % 3]
    answers = dict.fromkeys(true, 1) | dict.fromkeys(false, 0)
    first = {true[0]: 1} | dict.fromkeys(false, 0)
    return {"question": f"Which number is larger, {a} or {b}?", "mc1_targets": first, "mc2_targets": answers}


def winogrande(rng: random.Random, problem: Problem, index: int) -> dict:
    """Who has more afterwards: the gap stands in the middle, or at the beginning of the second sentence."""
    (giver, taker), things, n = rng.sample(NAMES, 2), rng.choice(THINGS), rng.randint(2, 30)
    more = index % 2 == 0
    told = f"{giver} gave {n} {things} to {taker}"
    rest = f"has {'more' if more else 'fewer'} {things} than before."
    sentence = f"{told}, so now _ {rest}" if index % 3 else f"{told}. _ now {rest}"
    options = [giver, taker] if index % 4 < 2 else [taker, giver]
    answer = str(options.index(taker if more else giver) + 1)
    return {"qID": f"made-up-{index}", "sentence": sentence, "option1": options[0], "option2": options[1],
            "answer": answer}  # fmt: skip


def gsm8k(rng: random.Random, problem: Problem, index: int) -> dict:
    """A story with its steps, a line each, and the number behind "#### "."""
    steps = problem.solution.replace(". ", ".\n")
    return {"question": problem.question, "answer": f"{steps}\n#### {problem.answer}"}


# ------------------------------------------------------------------------------------------------ files


def _jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def files(seed: int = 0, count: int = 48) -> Iterator[tuple[str, str]]:
    """(path, text) of every file: `count` questions a benchmark, and shots of which no question is one."""

    def rows(ask: Callable, name: str, split: str, wanted: int, *more: str) -> list:
        rng = random.Random(f"{name} {split} {more} {seed}")
        # One stream of problems for all shots, one for all questions: no answer stands among the shots by accident.
        drawn = generate(seed, "train" if split == "shots" else "heldout")
        return [ask(rng, problem, index, *more) for index, problem in enumerate(islice(drawn, wanted))]

    for ask, tests, shots in (
        (arc, "arc_challenge/test.jsonl", "arc_challenge/train.jsonl"),
        (hellaswag, "hellaswag/hellaswag_val.jsonl", "hellaswag/hellaswag_train.jsonl"),
        (winogrande, "winogrande/dev.jsonl", "winogrande/train_xl.jsonl"),
        (gsm8k, "gsm8k/test.jsonl", "gsm8k/train.jsonl"),
    ):
        name = tests.partition("/")[0]
        yield tests, _jsonl(rows(ask, name, "test", count))
        yield shots, _jsonl(rows(ask, name, "shots", SHOTS[name]))
    yield "truthfulqa/mc_task.json", json.dumps(rows(truthfulqa, "truthfulqa", "test", count), indent=1) + "\n"
    for subject in SUBJECTS:
        for split, wanted in (("dev", SHOTS["mmlu"]), ("test", -(-count // len(SUBJECTS)))):
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows(
                rows(mmlu, "mmlu", "shots" if split == "dev" else "test", wanted, subject)
            )
            yield f"mmlu/{split}/{subject}_{split}.csv", text.getvalue()


@dataclass
class Options:
    """What to write."""

    out: str = cli.flag("out/standin", help="directory to write", metavar="DIR")
    count: int = cli.flag(48, help="questions of each benchmark")
    seed: int = cli.flag(0, help="of the questions")


def write(options: Options) -> None:
    """Write the six folders."""
    if options.count < 1:
        raise ValueError(f"--count {options.count}: at least 1 is needed")
    with cli.publish(Path(options.out)) as staging:
        for name, text in files(options.seed, options.count):
            path = staging / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="")
        marker = {"made_up_by": "solar/standin.py", "seed": options.seed, "count": options.count}
        (staging / MARKER).write_text(json.dumps(marker) + "\n", encoding="utf-8")
    print(options.out)


def main() -> None:
    write(cli.parse(Options, prog="python -m solar.standin", description="Write six made-up benchmarks."))


if __name__ == "__main__":
    cli.run(main)
