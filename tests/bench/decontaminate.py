"""How fast examples are held against benchmarks: `python -m tests.bench.decontaminate`.

100,000 examples of GSM8K's length and shape, made of random words, against benchmark files of the same kind; a share of
the examples are copies, which must all be found, and as many are copies with other numbers. Those must all be found
where they share 13 words with what they are copies of, and all be kept with --keep-other-numbers.
"""

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from solar import cli

QUESTION_WORDS, ANSWER_WORDS = 45, 60  # means of GSM8K's train.jsonl: 45 and 58


@dataclass
class Options:
    count: int = cli.flag(100_000, help="examples")
    benchmark: int = cli.flag(20_000, help="rows of the benchmark files")
    copies: int = cli.flag(200, help="examples that are copies, and as many with other numbers")
    keep_other_numbers: bool = cli.flag(False, help="as `solar.mathdata decontaminate` takes it")
    against: list[str] = cli.flag([], help="real benchmark files to hold against as well", metavar="FILES")


def problem(rng: random.Random, vocabulary: list[str]) -> list[str]:
    """The words of one text, every 16th a number: 15 in a row are none."""
    number = lambda: str(rng.randint(1, 999))
    return [number() if place % 16 == 15 else rng.choice(vocabulary) for place in range(QUESTION_WORDS)]


def row(question: list[str], rng: random.Random, vocabulary: list[str]) -> str:
    """A line of a GSM8K file."""
    answer = " ".join(rng.choice(vocabulary) for _ in range(ANSWER_WORDS))
    return json.dumps({"question": " ".join(question) + "?", "answer": f"{answer}\n#### {rng.randint(1, 999)}"}) + "\n"


def main() -> None:
    options = cli.parse(Options, prog="python -m tests.bench.decontaminate", description="Speed of decontamination.")
    rng = random.Random(0)
    vocabulary = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(8_000)]
    with tempfile.TemporaryDirectory() as folder:
        data, benchmark, out = (Path(folder) / name for name in ("data.jsonl", "test.jsonl", "clean.jsonl"))
        theirs = [problem(rng, vocabulary) for _ in range(options.benchmark)]
        benchmark.write_text("".join(row(question, rng, vocabulary) for question in theirs))
        copies = theirs[: options.copies]
        others = [[str(int(word) + 1) if word.isdigit() else word for word in question] for question in copies]
        ours = [problem(rng, vocabulary) for _ in range(options.count - 2 * len(copies))] + copies + others
        rng.shuffle(ours)
        data.write_text("".join(row(question, rng, vocabulary) for question in ours))
        command = [sys.executable, "-m", "solar.mathdata", "decontaminate", "--data", data, "--out", out]
        command += ["--keep-other-numbers"] * options.keep_other_numbers
        start = time.monotonic()
        subprocess.run([*command, "--against", benchmark, *options.against], check=True)
        seconds = time.monotonic() - start
        dropped = len((Path(folder) / "clean.dropped.jsonl").read_text().splitlines())
    wanted = len(copies) if options.keep_other_numbers else 2 * len(copies)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"{len(ours):,} examples in {seconds:.1f} s, {used.ru_utime + used.ru_stime:.1f} s of one core, start included"
    )
    print(
        f"dropped {dropped}, wanted {wanted}, of 2 x {len(copies)} copies; peak memory {used.ru_maxrss / 1024:.0f} MB"
    )


if __name__ == "__main__":
    cli.run(main)
