"""The embedded base model, `solar/assets/base`: how it is begun, examined and put there. `make base` does all of it.

It is small, made from nothing that would have to be downloaded, and trained by this repository's own train.py: on the
Python sources found on the machine and on generated arithmetic problems (solar/problems.py). So everything downstream,
up-scaling first, has a model at hand that knows something, whose loss can rise and fall.

    python -m solar.base begin --out DIR         a tokenizer trained on the same text, and random weights
    python -m solar.base examine --model DIR     answers to problems that stand in no training set
    python -m solar.base embed --run DIR         the trained model, its curve and its marks, into solar/assets/base
"""

import io
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import sentencepiece
import torch

from solar import cli, problems
from solar.checkpoint import copy_companions, load_model, save_model
from solar.config import TINY
from solar.corpus import standard_library
from solar.metrics import read_metrics
from solar.model import Transformer
from solar.sampling import generate
from solar.tokenizer import Tokenizer

ASSETS = Path(__file__).parent / "assets/base"
TOKENIZER_BYTES = 3_000_000  # of Python sources; more does not change a vocabulary of 2,048 by much
TOKENIZER_PROBLEMS = 8_000
LONGEST_ANSWER = 96  # tokens


# ------------------------------------------------------------------------------------------------ begin


@dataclass
class BeginOptions:
    """Flags of `begin`."""

    out: str = cli.flag("out/base-begun", help="directory to write", metavar="DIR")
    seed: int = cli.flag(0, help="of the random weights and of the problems")
    force: bool = cli.flag(False, help="replace the output if it exists")


def begin(options: BeginOptions) -> None:
    """Write a model with random weights in Mistral's architecture, and the tokenizer for it."""
    cli.check_output(Path(options.out), options.force)
    tokenizer = train_tokenizer(tokenizer_text(options.seed), TINY.vocab_size)
    model = Transformer(TINY)
    model.init_weights(options.seed)
    companions = {"tokenizer.model": tokenizer}
    save_model(model, options.out, dtype=torch.bfloat16, force=options.force, companions=companions)
    print(f"{TINY.num_hidden_layers} layers, {TINY.num_parameters():,} random parameters, {TINY.vocab_size} tokens")
    print(options.out)


def tokenizer_text(seed: int) -> Iterator[str]:
    """The lines that the base's tokenizer is trained on: problems, then Python sources."""
    yield from problems.documents(seed, TOKENIZER_PROBLEMS, "train")
    taken = 0
    for path in standard_library():
        if taken >= TOKENIZER_BYTES:
            break
        text = path.read_text(encoding="utf-8", errors="ignore")
        taken += len(text)
        yield from (line for line in text.splitlines() if line.strip())


def train_tokenizer(lines: Iterator[str], vocab_size: int) -> bytes:
    """A sentencepiece model like Mistral's: BPE, byte fallback, single digits, not normalised; unk 0, bos 1, eos 2."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=0.9995,
        max_sentence_length=1 << 14,
        num_threads=os.cpu_count() or 1,
        minloglevel=2,
    )
    return model.getvalue()


# ------------------------------------------------------------------------------------------------ examine


@dataclass
class ExamineOptions:
    """Flags of `examine`."""

    model: str = cli.flag(str(ASSETS), help="model directory", metavar="DIR")
    count: int = cli.flag(500, help="held-out problems to ask")
    seed: int = cli.flag(1, help="of the problems")
    show: int = cli.flag(3, help="answers to print")


def examine(options: ExamineOptions) -> None:
    """Ask held-out problems, and print how many of each family were answered rightly, beside the majority answer."""
    model, tokenizer = load_model(options.model, dtype=torch.float32), Tokenizer(options.model)
    asked = list(islice(problems.generate(options.seed, "heldout"), options.count))
    written = answer(model, tokenizer, asked)
    for problem, text in zip(asked[: options.show], written, strict=False):
        print(f"{problem.question}\n  -> {text.strip()}  ({'right' if right(problem, text) else problem.answer})")
    print(table(marks(asked, written)))


@torch.inference_mode()
def answer(model: Transformer, tokenizer: Tokenizer, asked: list[problems.Problem], batch: int = 50) -> list[str]:
    """What the model writes after each question, greedily, up to its end of text."""
    written = []
    for first in range(0, len(asked), batch):
        prompts = [tokenizer.encode(problems.prompt(problem)) for problem in asked[first : first + batch]]
        new = generate(model, prompts, LONGEST_ANSWER, eos_id=tokenizer.eos_id)
        written += [tokenizer.decode(ids) for ids in new]
    return written


def right(problem: problems.Problem, text: str) -> bool:
    return problems.extract_answer(text) == problem.answer


def marks(asked: list[problems.Problem], written: list[str]) -> dict[str, dict[str, int | float]]:
    """{family: {"asked", "right", "majority": share that the family's most frequent answer gets}}, "all" last."""
    total, correct, by_majority = Counter(), Counter(), Counter()
    most_frequent = problems.majority(asked)
    for problem, text in zip(asked, written, strict=True):
        for family in (problem.family, "all"):
            total[family] += 1
            correct[family] += right(problem, text)
            by_majority[family] += problem.answer == most_frequent[problem.family]
    return {
        family: {"asked": total[family], "right": correct[family], "majority": by_majority[family] / total[family]}
        for family in [*sorted(total.keys() - {"all"}), "all"]
    }


def table(report: dict[str, dict[str, int | float]]) -> str:
    """What `marks` gave, to be read."""
    lines = [f"{'family':<14} asked  right  majority answer"]
    for family, mark in report.items():
        lines.append(f"{family:<14} {mark['asked']:5}  {mark['right'] / mark['asked']:5.0%}  {mark['majority']:5.0%}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ embed


@dataclass
class EmbedOptions:
    """Flags of `embed`."""

    run: str = cli.flag("out/base", help="--out of the training run", metavar="DIR")
    out: str = cli.flag(str(ASSETS), help="directory to write", metavar="DIR")
    force: bool = cli.flag(False, help="replace the output if it exists")


def embed(options: EmbedOptions) -> None:
    """Copy a run's model, and write training.json: its options, tokens, time, curve, and marks on held-out problems."""
    run = Path(options.run)
    model, tokenizer = load_model(run / "model"), Tokenizer(run / "model")
    asked = list(islice(problems.generate(1, "heldout"), 500))
    report = marks(asked, answer(model.float(), tokenizer, asked))
    log = read_metrics(run / "metrics.jsonl")
    steps = [entry for entry in log if "loss" in entry]
    every = max(len(steps) // 100, 1)
    record = {
        "options": json.loads((run / "options.json").read_text(encoding="utf-8")),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "tokens": sum(entry["tokens"] for entry in steps),
        "seconds": round(sum(entry["tokens"] / entry["tokens_per_second"] for entry in steps)),
        "marks": report,
        "heldout": {entry["step"]: entry["heldout"] for entry in log if "heldout" in entry},
        "loss": {entry["step"]: round(entry["loss"], 4) for entry in steps[every - 1 :: every]},
    }
    with cli.publish(Path(options.out), options.force) as staging:
        for name in ("config.json", "model.safetensors"):
            (staging / name).write_bytes((run / "model" / name).read_bytes())
        copy_companions(run / "model", staging)
        (staging / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(table(report))
    print(options.out)


COMMANDS = {"begin": (BeginOptions, begin), "examine": (ExamineOptions, examine), "embed": (EmbedOptions, embed)}


def main() -> None:
    cli.run_command("python -m solar.base", COMMANDS)


if __name__ == "__main__":
    cli.run(main)
