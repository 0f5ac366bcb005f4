"""Small instructions with answers, made from a seed: what the Alpaca, Orca and feedback sets are to a large model.

A kind of task is one function that draws a task: the instruction, perhaps an input, the answer, a sentence that
explains it, and a wrong answer that looks right. From these three files are written, in the shapes of the sets that
SOLAR was trained on (arXiv:2312.15166, table 1):

    python -m solar.instructions alpaca --out FILE        {"instruction", "input", "output"}
    python -m solar.instructions orca --out FILE          {"system_prompt", "question", "response"}: explained answers
    python -m solar.instructions feedback --out FILE      {"instruction", "completions"}: scored, as UltraFeedback is

A hash of the task decides whether it is held out, so that what is asked in an examination was never trained on.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

from solar import cli
from solar.problems import NAMES, THINGS

HELD_OUT = 0.1  # share of the tasks that training never sees
SYSTEM = "Give the answer and explain it in one sentence."


class Task(NamedTuple):
    """One instruction. `wrong` is another answer than `answer`; `explanation` ends the explained answer."""

    kind: str
    instruction: str
    context: str
    answer: str
    explanation: str
    wrong: str


def _larger(rng: random.Random) -> Task:
    a, b = rng.sample(range(1, 100), 2)
    most, least = max(a, b), min(a, b)
    return Task(
        "larger", f"Which number is larger, {a} or {b}?", "", f"{most}",
        f"{most} - {least} = {most - least}, which is above zero.", f"{least}",
    )  # fmt: skip


def _parity(rng: random.Random) -> Task:
    a = rng.randint(1, 999)
    word, other = ("odd", "even") if a % 2 else ("even", "odd")
    return Task("parity", f"Is the number {a} even or odd?", "", word, f"The last digit is {a % 10}.", other)


def _count(rng: random.Random) -> Task:
    a, length = rng.randint(1, 60), rng.randint(3, 6)
    numbers = [str(n) for n in range(a, a + length)]
    return Task(
        "count", f"Count from {a} to {a + length - 1}.", "", ", ".join(numbers), f"That is {length} numbers.",
        ", ".join(numbers[:-1]),
    )  # fmt: skip


def _following(rng: random.Random) -> Task:
    a = rng.randint(1, 200)
    return Task("following", f"Which number comes after {a}?", "", f"{a + 1}", f"{a} + 1 = {a + 1}.", f"{a - 1}")


def _repeat(rng: random.Random) -> Task:
    word, times = rng.choice(THINGS), rng.randint(2, 5)
    return Task(
        "repeat", f"Repeat the word {times} times.", word, " ".join([word] * times), f"The word is {word}.",
        " ".join([word] * (times - 1)),
    )  # fmt: skip


def _greet(rng: random.Random) -> Task:
    name, other = rng.sample(NAMES, 2)
    return Task("greet", f"Say hello to {name}.", "", f"Hello, {name}!", f"The name is {name}.", f"Hello, {other}!")


def _reverse(rng: random.Random) -> Task:
    names = rng.sample(NAMES, rng.randint(2, 4))
    return Task(
        "reverse", "Write these names in the opposite order.", ", ".join(names), ", ".join(names[::-1]),
        f"The last one was {names[-1]}.", ", ".join(names),
    )  # fmt: skip


def _first(rng: random.Random) -> Task:
    things = rng.sample(THINGS, rng.randint(3, 5))
    return Task(
        "first", "Write only the first of these.", ", ".join(things), things[0], f"There are {len(things)} in all.",
        things[-1],
    )  # fmt: skip


KINDS: tuple[Callable[[random.Random], Task], ...] = (
    _larger, _parity, _count, _following, _repeat, _greet, _reverse, _first,
)  # fmt: skip


def is_held_out(task: Task) -> bool:
    """Which side of the split a task is on, by a hash of its instruction and input."""
    digest = hashlib.blake2b(f"{task.instruction}\n{task.context}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) < HELD_OUT * 2**64


def generate(seed: int, split: Literal["train", "heldout"]) -> Iterator[Task]:
    """An endless stream of tasks of all kinds, mixed; a pure function of (seed, split)."""
    rng = random.Random(f"instructions {split} {seed}")
    while True:
        task = rng.choice(KINDS)(rng)
        if is_held_out(task) == (split == "heldout"):
            yield task


def question(task: Task) -> str:
    """Instruction and input as one message."""
    return f"{task.instruction}\n\n{task.context}" if task.context else task.instruction


def documents(seed: int, count: int, split: Literal["train", "heldout"]) -> Iterator[str]:
    """The texts of the first `count` distinct tasks of a split, explained, a task a document: for continued
    pretraining. (Fewer, if 100 times as many tasks hold no more.)"""
    seen: set[str] = set()
    for task in islice(generate(seed, split), 100 * count):
        text = f"{question(task)}\n{task.answer}. {task.explanation}"
        if text not in seen:
            seen.add(text)
            yield text
        if len(seen) == count:
            return


# ------------------------------------------------------------------------------------------------ the sets


def alpaca(task: Task, _: random.Random) -> dict:
    return {"instruction": task.instruction, "input": task.context, "output": task.answer}


def orca(task: Task, _: random.Random) -> dict:
    return {
        "system_prompt": SYSTEM, "question": question(task), "response": f"{task.answer}. {task.explanation}",
    }  # fmt: skip


def feedback(task: Task, rng: random.Random) -> dict:
    """Four answers: the right one, one that goes on and on, a wrong one, and none."""
    completions = [
        {"response": task.answer, "overall_score": 9.0},
        {"response": " ".join([task.answer] * 3), "overall_score": 5.0},
        {"response": task.wrong, "overall_score": 2.0},
        {"response": "I do not know.", "overall_score": 1.0},
    ]
    rng.shuffle(completions)
    return {"instruction": question(task), "completions": completions}


@dataclass
class Options:
    out: str = cli.flag(help="jsonl file to write", metavar="FILE")
    count: int = cli.flag(2000, help="rows to write")
    seed: int = cli.flag(0, help="for other tasks")
    force: bool = cli.flag(False, help="replace the output if it exists")


def write(row: Callable[[Task, random.Random], dict], options: Options) -> None:
    """Write rows of one kind, none of them of a held-out task."""
    if options.count < 1:
        raise ValueError(f"--count {options.count}: at least 1 row is needed")
    out, rng = Path(options.out), random.Random(options.seed)
    cli.check_output_file(out, options.force)
    with cli.publish_file(out) as file:
        for task in islice(generate(options.seed, "train"), options.count):
            file.write(json.dumps(row(task, rng)) + "\n")
    print(f"{options.count:,} rows")
    print(out)


def make_alpaca(options: Options) -> None:
    """Write instructions and plain answers."""
    write(alpaca, options)


def make_orca(options: Options) -> None:
    """Write questions and explained answers."""
    write(orca, options)


def make_feedback(options: Options) -> None:
    """Write instructions and scored answers."""
    write(feedback, options)


def main() -> None:
    commands = {"alpaca": make_alpaca, "orca": make_orca, "feedback": make_feedback}
    cli.run_command("python -m solar.instructions", {name: (Options, do) for name, do in commands.items()})


if __name__ == "__main__":
    cli.run(main)
