"""The papers' claims, measured: `make reproduce`, `make reproduce-full`, or for any other model

    python -m solar.reproduce --model DIR --data FILES... [--eval FILES...] [--only a b] [--tokens N] [--seeds 0 1 2]

What is claimed stands in solar/claims.py. Here each model to begin with is grown, measured, and trained on by train.py,
a few side by side, with the same tokens in the same order, the same schedule, and as many learning rates to choose from
as any other; then all are measured on the same held-out windows (solar/trials.py), and solar/evidence.py writes the
report. All of it is kept under OUT: the same command again goes on where it was stopped, and with more claims, seeds or
learning rates only what is new is computed.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from solar import claims, cli, evidence, plan
from solar.base import ASSETS
from solar.claims import Term
from solar.corpus import parse_source
from solar.trials import Run, Trials

TEXTS = {"old": evidence.OLD, "new": evidence.NEW}


@dataclass
class Options:
    model: str = cli.flag(str(ASSETS), help="the base: any model directory", metavar="DIR")
    data: list[str] | None = cli.flag(
        None, help="text to train on, as for train.py (default for the embedded base: what it was trained on)",
        metavar="PATH[:WEIGHT]",
    )  # fmt: skip
    eval: list[str] | None = cli.flag(
        None, help="text to measure on (default: what is held out of the data)", metavar="PATH[:WEIGHT]"
    )
    domain: str | None = cli.flag(
        None, help="the new domain of part e: text, or instructions, the generated ones that the embedded base has "
        "never seen, its default; of any other model: problems", metavar="PATH",
    )  # fmt: skip
    plans: list[str] = cli.flag([], help=f"further plans, against DUS in part b: {plan.GRAMMAR}", metavar="PLAN")
    only: list[Literal[tuple(claims.PARTS)]] | None = cli.flag(
        None, help="; ".join(f"{part}: {what}" for part, what in claims.PARTS.items()) + " (default: all; f only for "
        "the embedded base, of which its models are made)",
    )  # fmt: skip
    without: list[str] = cli.flag([], help="models that are not to be trained, and what is claimed of them trained is "
                                  "left out: stack, random, domain-prefix, ...", metavar="ARM")  # fmt: skip
    tokens: int | None = cli.flag(None, help="of each run (default: 32,000, of other models 200,000)", metavar="N")
    seeds: list[int] = cli.flag([0], help="of the order of the samples and of random weights", metavar="SEED")
    lrs: list[float] | None = cli.flag(
        None, help="highest learning rates, of which each arm takes its best, by the first seed and by windows that "
        "are not in the report (default: 1e-4 and 1e-3 for the embedded base, 1e-4 for any other)", metavar="LR",
    )  # fmt: skip
    m: int | None = cli.flag(None, help="layers that DUS drops at each side (default: a quarter)")
    group: int | None = cli.flag(None, help="layers in a group of iDUS (default: a third of a copy)")
    sequence_length: int | None = cli.flag(None, help="tokens in a sequence (default: 256, of other models 512)")
    batch_size: int | None = cli.flag(None, help="sequences in a step (default: 4, of other models 8)")
    dtype: Literal["auto", "bf16", "fp32"] = cli.flag(
        "auto", help="what runs compute in, as of train.py; all are measured in fp32"
    )
    windows: int = cli.flag(64, help="held-out windows of each source that every model is measured on", metavar="N")
    jobs: int = cli.flag(2, help="runs side by side; give each its threads with OMP_NUM_THREADS")
    align: str = cli.flag("out/align", help="what `make align` wrote, for part f", metavar="DIR")
    data_cache: str = cli.flag("out/data", help="directory that keeps tokenised data", metavar="DIR")
    out: str = cli.flag("out/reproduce", help="directory for models, runs and the report", metavar="DIR")
    about: str | None = cli.flag(None, help="what model and texts are, to be said in the report", metavar="TEXT")
    report: str | None = cli.flag(None, help="another directory for the report", metavar="DIR")

    def __post_init__(self):
        """Fill in what hangs on the model."""
        embedded = Path(self.model).resolve() == ASSETS.resolve()
        defaults = {"only": [part for part in claims.PARTS if embedded or part != "f"]}
        defaults |= {"tokens": 200_000, "sequence_length": 512, "batch_size": 8, "lrs": [1e-4], "domain": "problems"}
        if embedded:
            # Of the text that it was made of, the base learns nothing more; what is new takes the larger rate.
            defaults |= {"tokens": 32_000, "sequence_length": 256, "batch_size": 4, "lrs": [1e-4, 1e-3]}
            defaults |= {"data": ["stdlib:0.3", "problems:0.7"], "domain": "instructions"}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.data is None:
            raise ValueError(f"--model {self.model}: name the text to train it on with --data")
        for name in ("tokens", "batch_size", "windows", "jobs"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least 1 is needed")
        if self.sequence_length < 2:
            raise ValueError(f"--sequence-length {self.sequence_length}: at least 2 tokens are needed")
        if wrong := [lr for lr in self.lrs if not 0 < lr < math.inf]:
            raise ValueError(f"--lrs {wrong[0]}: a number above 0 is needed")
        for name in ("seeds", "lrs", "plans"):
            values = getattr(self, name)
            if twice := {value for value in values if values.count(value) > 1}:
                raise ValueError(f"--{name}: {min(twice)} is given twice")


# ------------------------------------------------------------------------------------------------ the report


def collect(job: Trials) -> evidence.Evidence:
    """What was measured, as the report wants it."""
    options = job.options
    samples = {name: [windows.sample for windows in text.windows] for name, text in job.texts.items()}
    findings = [claims.find(claim, samples, job.nats_of) for claim in job.claims]
    if "f" in options.only:
        findings += evidence.orderings(Path(options.align))
    models, training, curves = [], [], []
    shares = {Path(source.path).name: source.share for source in map(parse_source, options.data)}
    batch_tokens = options.batch_size * options.sequence_length
    known = [(name, False) for name in job.plans] + [(name, True) for name in job.arms]
    for name, trained in (key for key in known if key in job.needed):
        losses = losses_of(job, name, trained, job.needed[name, trained])
        if not trained:
            config, what = job.depth(name), "as dus, random weights"
            if job.plans[name]:
                what = evidence.spans(job.plans[name])
            models.append(evidence.Model(name, what, config.num_hidden_layers, config.num_parameters(), losses))
            continue
        arm, lr, tokens = job.arms[name], job.chosen(name), job.steps(name) * batch_tokens
        flops, text = job.flops(arm.start, arm), TEXTS[arm.text]
        training.append(evidence.Training(name, arm.start, arm.train, text, lr, tokens, flops, losses))
        if arm.text == "old" and arm.share >= 1:
            runs = [job.run_dir(Run(name, lr, seed)) for seed in options.seeds]
            if points := evidence.heldout(runs, shares, batch_tokens):  # none where no document was held out
                curves.append(evidence.Curve(name, points, flops))
    return evidence.Evidence(facts(job), findings, models, training, curves)


def losses_of(job: Trials, name: str, trained: bool, texts: set[str]) -> dict[str, float]:
    """Nats a token of a start or an arm on each text, and on each source of a text that has several."""
    found = {}
    for text in sorted(texts, reverse=True):  # old, new
        parts = [windows.sample for windows in job.texts[text].windows]
        term = Term(name, trained, text)
        means = [job.nats_of(term, part.source).mean(axis=0).sum() / part.tokens.sum() for part in parts]
        found[TEXTS[text]] = sum(part.weight * mean for part, mean in zip(parts, means, strict=True))
        if len(parts) > 1:
            found |= {Path(part.source).name: float(mean) for part, mean in zip(parts, means, strict=True)}
    return found


def facts(job: Trials) -> dict[str, str]:
    """What the report begins with."""
    options, config = job.options, job.config
    parts = [part for text in job.texts.values() for part in text.windows]
    windows = "; ".join(
        f"{Path(part.sample.source).name}: {len(part.report[0])} windows of {len(np.unique(part.sample.documents))} "
        "documents" for part in parts
    )  # fmt: skip
    seconds = sum(evidence.seconds(job.out / "runs" / path.stem) for path in (job.out / "losses").glob("*-lr*.json"))
    return ({"about": options.about} if options.about else {}) | {
        "base": f"{evidence.called(options.model)}: {config.num_hidden_layers} layers, "
        f"{config.num_parameters():,} parameters; m = {job.m}, groups of {job.group}",
        "trained on": f"{' '.join(options.data)}, the new domain: {options.domain}",
        "measured on": windows,
        "each run": f"{job.steps('base'):,} steps of {options.batch_size} x {options.sequence_length} tokens, cosine "
        f"to 0, learning rates to choose from: {', '.join(f'{lr:g}' for lr in options.lrs)}; dtype {options.dtype}",
        "seeds": " ".join(map(str, options.seeds)),
        "training took": f"{cli.human_seconds(seconds)}, all runs; threads of each: {torch.get_num_threads()}",
        "machine": evidence.machine(),
        "date": time.strftime("%Y-%m-%d"),
        "command": evidence.command(),
    }


def main() -> None:
    options = cli.parse(Options, prog="python -m solar.reproduce", description="Measure what the papers claim.")
    print(cli.command_line(options, "options     "), flush=True)
    job = Trials(options)
    job.prepare()
    job.carry_out()
    found = collect(job)
    path = evidence.write(found, Path(options.report or options.out))
    print(evidence.table_of_findings(found.findings))
    print(path)


if __name__ == "__main__":
    cli.run(main)
