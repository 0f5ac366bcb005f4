"""The whole recipe in miniature (`make align`), measured: every model of it, beside what the paper says of its own.

    python -m solar.recipe out/align                      each folder NAME/model of these, in the order of MODELS
    python -m solar.recipe out/align --only sft-v1        asks this one alone; what it answered is kept for the table

Each model gets the same held-out questions, greedily, through the chat template once it has learned that: arithmetic
problems (solar/problems.py) of which the final answer counts, and small instructions (solar/instructions.py) of which
the whole reply counts; no question twice. The score is the mean of both shares, as the paper's H6 is a mean of six.
Whether an ordering of the paper shows is decided by the paired difference of two models on the same questions: shown if
its 95% interval lies above zero, contradicted if below, otherwise not shown at this size.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from solar import cli, instructions, problems
from solar.checkpoint import CheckpointReader, load_model
from solar.intervals import verdict
from solar.sampling import generate
from solar.shards import fingerprint
from solar.tokenizer import TEMPLATES, Tokenizer, encode_prompt, end_ids

LONGEST_REPLY = 96  # tokens
BATCH = 100  # prompts at once


class Row(NamedTuple):
    """A model of the recipe: its folder, what it is, the paper's H6 and GSM8K (arXiv:2312.15166, tables 3 to 8), and
    whether it has learned the chat template: what has not gets the bare question, as in its pretraining."""

    name: str
    what: str
    h6: float | None = None
    gsm8k: float | None = None
    chat: bool = True


MODELS = (
    Row("base", "the base, in plain text", chat=False),
    Row("grown", "up-scaled, not trained; plain text", chat=False),
    Row("continued", "continued pretraining; plain text", chat=False),
    Row("sft-v1", "SFT: Alpaca", 69.15, 52.24),
    Row("sft-v2", "+ Orca", 69.21),
    Row("sft-v3", "+ Orca + math", 70.03, 64.14),
    Row("sft-v4", "Alpaca + math", 70.88),
    Row("sft-v3+v4", "average of v3 and v4", 71.11, 66.57),
    Row("dpo-v1", "DPO from SFT v3: feedback", 73.06, 58.83),
    Row("dpo-v2", "+ math", 73.42, 60.27),
    Row("dpo-v1+v2", "average of v1 and v2", 73.21),
    Row("dpo-v3", "data of v2, from SFT v3+v4", 73.58),
    Row("sdpo-1", "sDPO from SFT v3+v4: mathematics, easy"),
    Row("sdpo-2", "then feedback, harder"),
    Row("cand-1", "candidate 1", 73.73),
    Row("cand-2", "candidate 2", 73.28),
    Row("merge-v1", "average .5, .5", 74.00),
    Row("merge-v2", "average .4, .6", 73.93),
    Row("merge-v3", "average .6, .4", 74.05, 65.50),
    Row("merge-v4", "SLERP", 73.96),
)
ORDERINGS = (  # (better, worse, what the paper concludes)
    ("sft-v3", "sft-v2", "mathematics in SFT helps"),
    ("sft-v4", "sft-v3", "without Orca it helps more"),
    ("sft-v3+v4", "sft-v3", "averaging two SFT models helps"),
    ("dpo-v1", "sft-v3", "DPO on feedback helps"),
    ("dpo-v2", "dpo-v1", "mathematics in DPO helps"),
    ("dpo-v2", "dpo-v1+v2", "averaging with a dominated model does not help"),
    ("dpo-v3", "dpo-v2", "a better SFT model gives a better DPO model"),
    ("merge-v1", "cand-1", "merging candidates helps"),
    ("merge-v1", "cand-2", "merging candidates helps"),
)


class Marks(NamedTuple):
    """How a model did: for each question whether it was answered rightly. format: share of problems whose reply ends by
    itself, in a final answer."""

    problems: np.ndarray
    tasks: np.ndarray
    format: float

    @property
    def score(self) -> float:
        return (self.problems.mean() + self.tasks.mean()) / 2


@torch.inference_mode()
def replies(model_dir: Path, questions: list[str], template: str | None) -> list[tuple[str, bool]]:
    """(what the model answers, whether it ended by itself) for each question, greedily; without a template it goes on
    from the question."""
    model, tokenizer = load_model(model_dir, dtype=torch.float32), Tokenizer(model_dir)
    encode = tokenizer.encode if template is None else partial(encode_prompt, tokenizer, template)
    order = sorted(range(len(questions)), key=lambda i: len(questions[i]))  # of like length: less padding
    written: list[tuple[str, bool]] = [("", False)] * len(questions)
    for first in range(0, len(order), BATCH):
        batch = order[first : first + BATCH]
        prompts = [encode(questions[i]) for i in batch]
        new = generate(model, prompts, LONGEST_REPLY, eos_id=sorted(end_ids(tokenizer, template)))
        for i, ids in zip(batch, new, strict=True):
            written[i] = tokenizer.decode(ids), len(ids) < LONGEST_REPLY
    return written


def distinct(stream: Iterator, question: Callable, count: int) -> list:
    """The first `count` of a stream whose questions are not those of earlier ones: repeats would make an interval
    narrower than what was learned from it."""
    found = {}
    for item in islice(stream, 100 * count):
        found.setdefault(question(item), item)
        if len(found) == count:
            return list(found.values())
    raise ValueError(f"--count {count}: there are few more than {len(found)} distinct questions")


def held_out(count: int, seed: int) -> tuple[list[problems.Problem], list[instructions.Task]]:
    """`count` problems and as many instructions, of which no training set made with any seed holds one."""
    return (
        distinct(problems.generate(seed, "heldout"), problems.prompt, count),
        distinct(instructions.generate(seed, "heldout"), instructions.question, count),
    )


def examine(model_dir: Path, count: int, template: str | None, seed: int) -> Marks:
    """Ask `count` held-out problems and as many held-out instructions."""
    asked, tasks = held_out(count, seed)
    questions = [problems.prompt(problem) for problem in asked] + [instructions.question(task) for task in tasks]
    written = replies(model_dir, questions, template)
    final = [(problems.extract_answer(text), ended) for text, ended in written[:count]]
    right = [answer == problem.answer for (answer, _), problem in zip(final, asked, strict=True)]
    done = [text.strip() == task.answer for (text, _), task in zip(written[count:], tasks, strict=True)]
    return Marks(np.array(right), np.array(done), sum(ended and answer is not None for answer, ended in final) / count)


def examined(folder: Path, count: int, template: str | None, seed: int) -> Marks:
    """The marks of folder/model. They are kept in folder/marks.json, and taken from there while the model, its
    tokenizer, the template and the questions are those that the file names."""
    model_dir, path = folder / "model", folder / "marks.json"
    asked = json.dumps(held_out(count, seed)).encode()
    key = {
        "model": CheckpointReader(model_dir).fingerprint(whole=True),
        "tokenizer": fingerprint(Tokenizer(model_dir))[:16],
        "template": template,
        "questions": hashlib.sha256(asked).hexdigest()[:16],
    }
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept.pop("of") == key:
            return Marks(np.array(kept["problems"]), np.array(kept["tasks"]), kept["format"])
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        pass  # none yet, or cut off: asked again
    marks = examine(model_dir, count, template, seed)
    kept = {"of": key, "problems": marks.problems.tolist(), "tasks": marks.tasks.tolist(), "format": marks.format}
    path.write_text(json.dumps(kept) + "\n", encoding="utf-8")
    return marks


def difference(better: Marks, worse: Marks) -> tuple[float, float]:
    """The difference of two scores on the same questions, and half of its 95% interval: the questions are what is
    sampled, so the variance is that of the paired differences."""
    parts = [getattr(better, part).astype(float) - getattr(worse, part) for part in ("problems", "tasks")]
    mean = sum(part.mean() for part in parts) / 2
    variance = sum(part.var(ddof=1) / len(part) for part in parts) / 4
    return mean, 1.96 * math.sqrt(variance)


def table(marks: dict[str, Marks]) -> str:
    """The measured models as a Markdown table, and the paper's orderings with a verdict each."""
    show = lambda value: "" if value is None else f"{value:.2f}"
    lines = [
        "| model | what it is | problems | format | instructions | score | paper: H6 | GSM8K |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in MODELS:
        if (mark := marks.get(row.name)) is not None:
            lines.append(
                f"| {row.name} | {row.what} | {mark.problems.mean():.1%} | {mark.format:.1%} | {mark.tasks.mean():.1%} "
                f"| {mark.score:.1%} | {show(row.h6)} | {show(row.gsm8k)} |"
            )
    lines += ["", "| the paper's ordering | difference of the scores, 95% | |", "|---|---|---|"]
    for row in orderings(marks):
        lines.append(f"| {row['what']} | {row['mean']:+.1%} ± {row['half']:.1%} | {row['verdict']} |")
    return "\n".join(lines)


def orderings(marks: dict[str, Marks]) -> list[dict]:
    """What was found of each ordering whose models are there: what, mean and half of the interval, verdict."""
    found = []
    for better, worse, what in ORDERINGS:
        if better in marks and worse in marks:
            mean, half = difference(marks[better], marks[worse])
            found.append(
                {"what": f"{what}: {better} over {worse}", "mean": mean, "half": half, "verdict": verdict(mean, half)}
            )
    return found


@dataclass
class Options:
    folder: list[str] = cli.flag(positional=True, metavar="DIR", help="folder that holds the models, as NAME/model")
    only: list[str] = cli.flag([], help="ask these models alone, and print no table", metavar="NAME")
    count: int = cli.flag(120, help="problems, and instructions, to ask each model")
    seed: int = cli.flag(1, help="of the questions")
    template: str = cli.flag("solar", help=f"how they are asked: {', '.join(TEMPLATES)}")


def main() -> None:
    options = cli.parse(Options, prog="python -m solar.recipe", description="Measure every model of the recipe.")
    if len(options.folder) > 1:
        raise ValueError(f"one folder is wanted, not {len(options.folder)}")
    if options.count < 2:
        raise ValueError(f"--count {options.count}: at least 2 questions are needed")
    folder = Path(options.folder[0])
    if unknown := sorted(set(options.only) - {row.name for row in MODELS}):
        raise ValueError(f"--only {unknown[0]}: no model of the recipe; it has {', '.join(row.name for row in MODELS)}")
    rows = [row for row in MODELS if (folder / row.name / "model/config.json").is_file()]
    if options.only and (missing := sorted(set(options.only) - {row.name for row in rows})):
        raise FileNotFoundError(f"{folder / missing[0] / 'model'}: no model in it; `make {folder / missing[0]}/model`")
    if not rows:
        raise FileNotFoundError(f"{folder}: no model of the recipe in it, such as {folder / MODELS[0].name / 'model'}")
    marks = {}
    for row in rows:
        if options.only and row.name not in options.only:
            continue
        template = options.template if row.chat else None
        marks[row.name] = examined(folder / row.name, options.count, template, options.seed)
        print(f"{row.name:<10} {marks[row.name].score:6.1%}", flush=True)
    if options.only:
        return
    models = {
        name: {
            "problems": mark.problems.mean(), "tasks": mark.tasks.mean(), "format": mark.format, "score": mark.score,
        }
        for name, mark in marks.items()
    }  # fmt: skip
    text = table(marks)
    report = {"models": models, "orderings": orderings(marks)}
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n")
    print(folder / "report.md")


if __name__ == "__main__":
    cli.run(main)
