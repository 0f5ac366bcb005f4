"""The trials behind the papers' claims: models grown, measured, trained by train.py, and measured again.

Each run is a process of its own, and what it gave is kept under OUT: what is there is not computed again, and what was
cut goes on from its last checkpoint.

    OUT/starts/NAME              the models to begin with
    OUT/runs/ARM-lrLR-seedSEED   what train.py leaves; its checkpoints are removed once the run is measured
    OUT/losses/NAME.json         what each of these loses on each held-out window
    OUT/settings.json            what all of them have in common
"""

import contextlib
import json
import math
import shutil
import subprocess
import sys
import threading
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from solar import claims, cli, instructions, plan, upscale
from solar.checkpoint import CheckpointReader, load_model, save_model
from solar.claims import Arm, Term
from solar.config import ModelConfig
from solar.corpus import parse_source
from solar.heldout import HOLDOUT, Text, nats, overlap, read_text
from solar.losses import IGNORED
from solar.metrics import read_metrics
from solar.model import Transformer
from solar.pool import Task, side_by_side
from solar.tokenizer import Tokenizer

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
EVALUATIONS = 8  # of the curve, in a run of all tokens
CURVE_WINDOWS = 8  # of each source, in each of them
DOMAIN_DOCUMENTS = {"train": 10_000, "heldout": 2_000}  # of solar/instructions.py, none of them twice


def training_flops(config: ModelConfig, length: int, new_layers: int | None) -> int:
    """Operations for one token of training (ModelConfig.training_flops). new_layers: how many are trained; None: all.

    A frozen matrix needs no gradient of its own, only that of its input: 4 for each parameter instead of 6. (That the
    backward pass ends at the lowest layer that is trained is not counted.)
    """
    whole = config.training_flops(length)
    if new_layers is None:
        return whole
    head = config.vocab_size * config.hidden_size
    products = config.num_parameters() - (0 if config.tie_word_embeddings else head)
    layer = sum(math.prod(shape) for shape in config.layer_shapes().values())
    return whole - 2 * (products - new_layers * layer)


class Diverged(ValueError):
    """A training whose loss or gradient did not stay finite."""


class Run(NamedTuple):
    """One training."""

    arm: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm}-lr{self.lr:g}-seed{self.seed}"


class Trials:
    """Everything that is computed, and where it is kept.

    options: of solar.reproduce. Raises ValueError for what cannot be, and where OUT was computed with other settings.
    """

    def __init__(self, options):
        self.options, self.out = options, Path(options.out)
        self.reader = CheckpointReader(options.model)
        self.config = config = self.reader.config
        n = config.num_hidden_layers
        self.m = claims.default_m(n) if options.m is None else options.m
        self.group = claims.default_group(n, self.m) if options.group is None else options.group
        self.further = {Path(text).stem.replace(":", "-"): plan.parse_plan(text, n) for text in options.plans}
        if len(self.further) < len(options.plans):
            raise ValueError(f"--plans {' '.join(options.plans)}: two of one name; rename a file")
        self.plans = claims.starts(n, self.m, self.group, self.further)
        ratio = self.flops("dus") / self.flops("base")
        self.arms = claims.arms(self.plans, ratio)
        rows = claims.claims(n, self.m, self.group, list(self.further))
        if unknown := set(options.without) - self.arms.keys():
            raise ValueError(f"--without {min(unknown)}: not one of {', '.join(self.arms)}")
        trained = lambda row: {term.name for term in row.terms if term.trained}
        self.claims = [row for row in rows if row.part in options.only and not trained(row) & set(options.without)]
        self.needed = claims.needed(self.claims)
        self.processes: list[subprocess.Popen] = []
        self.stopping, self.growing = threading.Event(), threading.Lock()
        if options.sequence_length > (room := config.with_depth(n).max_position_embeddings):
            raise ValueError(f"--sequence-length {options.sequence_length}: the model has room for {room} positions")

    # -------------------------------------------------------------------------------------------- what there is

    def depth(self, start: str) -> ModelConfig:
        """The config of a start."""
        return self.config.with_depth(len(self.plans[start] or self.plans["dus"]))

    def flops(self, start: str, arm: Arm | None = None) -> int:
        """Operations for a token of training a start, as an arm does it."""
        new = len(plan.new_layers(self.plans[start])) if arm and arm.train == "new" else None
        return training_flops(self.depth(start), self.options.sequence_length, new)

    def steps(self, arm: str, whole: bool = False) -> int:
        """How many steps an arm is trained for; whole: a run of all tokens."""
        share = 1.0 if whole else self.arms[arm].share
        return max(round(share * self.options.tokens / (self.options.batch_size * self.options.sequence_length)), 1)

    def prepare(self) -> None:
        """Tokenise the texts, and make sure that OUT holds nothing of other settings."""
        options, tokenizer = self.options, Tokenizer(self.options.model)
        wanted = {text for texts in self.needed.values() for text in texts}
        data, measured = {"old": options.data}, {"old": options.eval, "new": None}
        if "new" in wanted and options.domain == "instructions":
            data["new"], measured["new"] = ([str(write_domain(self.out, split))] for split in DOMAIN_DOCUMENTS)
        elif "new" in wanted:
            data["new"] = [options.domain]
        if "new" in wanted and any(overlap(data["new"][0], text) for text in options.data):
            raise ValueError(f"--domain {options.domain}: it is trained on before; give a text that is new")
        for text in (texts for texts in (options.data, options.eval) if texts):
            names = [Path(parse_source(source).path).name for source in text]
            if twice := {name for name in names if names.count(name) > 1}:
                raise ValueError(f"{' '.join(text)}: the report tells texts by their names; rename a {min(twice)}")
        self.texts: dict[str, Text] = {}
        for name in ("old", "new"):
            if name in wanted:
                self.texts[name] = read_text(
                    data[name], measured[name], tokenizer, Path(options.data_cache),
                    self.config.vocab_size, options.sequence_length, options.windows,
                )  # fmt: skip
        self._check_settings()

    def _check_settings(self) -> None:
        options, path = self.options, self.out / "settings.json"
        settings = {
            "model": self.reader.fingerprint(), "m": self.m, "group": self.group, "tokens": options.tokens,
            "batch size": options.batch_size, "sequence length": options.sequence_length, "windows": options.windows,
            "dtype": options.dtype, "device": "cuda" if torch.cuda.is_available() else "cpu", "holdout": HOLDOUT,
        }  # fmt: skip
        settings |= {f"arm {name}": list(self.arms[name]) for name, trained in self.needed if trained}
        settings |= {f"{name} text": text.identity for name, text in self.texts.items()}
        settings |= {f"plan {name}": plan.to_json(layers) for name, layers in self.further.items()}
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for what, value in settings.items():
            if known.get(what, value) != value:
                raise ValueError(
                    f"{self.out} was computed with {what} {known[what]}, now it is {value}: give another --out, or "
                    "remove it"
                )
        self.out.mkdir(parents=True, exist_ok=True)
        with cli.publish_file(path) as file:
            file.write(json.dumps(known | settings, indent=1) + "\n")

    # -------------------------------------------------------------------------------------------- starts

    def start_key(self, start: str, seed: int) -> str:
        """Random weights are others for each seed."""
        return start if self.plans[start] else f"{start}-seed{seed}"

    def start_dir(self, start: str, seed: int) -> Path:
        """The directory of a start, made if it is not there."""
        out, source = self.out / "starts" / self.start_key(start, seed), self.plans[start]
        with self.growing:  # two arms may begin with it at once
            if source is None:
                if not out.exists():
                    model = Transformer(self.depth(start))
                    model.init_weights(seed)
                    save_model(model, out, dtype=self.reader.dtype, companions=self.reader.path)
            elif not out.exists():
                upscale.upscale(self.options.model, out, source)
        return out

    # -------------------------------------------------------------------------------------------- measuring

    def losses_path(self, key: str) -> Path:
        return self.out / "losses" / f"{key}.json"

    def unmeasured(self, key: str, texts: set[str], choosing: str | None) -> list[tuple[str, int, str]]:
        """(text, number of its source, role) of all windows that a model has still to be measured on: those of the
        report of `texts`, and those by which to choose of the text `choosing`."""
        path = self.losses_path(key)
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        roles = [(text, "report") for text in sorted(texts)] + ([(choosing, "choice")] if choosing else [])
        return [
            (text, number, role)
            for text, role in roles
            for number, windows in enumerate(self.texts[text].windows)
            if role not in known.get(text, {}).get(windows.sample.source, {})
        ]

    def measure(self, model_dir: Path, key: str, texts: set[str], choosing: str | None = None) -> None:
        """Keep what a model loses on each window: {text: {source: {"report": [...], "choice": [...]}}}."""
        path = self.losses_path(key)
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_model(model_dir, dtype=torch.float32, device=device)
        for text, number, role in self.unmeasured(key, texts, choosing):
            windows = self.texts[text].windows[number]
            found = known.setdefault(text, {}).setdefault(windows.sample.source, {})
            found[role] = nats(model, *getattr(windows, role))
        self._keep(key, known)

    def rule_out(self, run: Run, text: str) -> None:
        """Keep infinite losses of a learning rate with which the loss did not stay finite: another is chosen."""
        found = {part.sample.source: {"choice": [math.inf] * len(part.choice[0])} for part in self.texts[text].windows}
        self._keep(run.name, {text: found})

    def _keep(self, key: str, losses: dict) -> None:
        with cli.publish_file(self.losses_path(key)) as file:
            file.write(json.dumps(losses) + "\n")

    @cache  # noqa: B019 (one object a process)
    def losses(self, key: str, text: str, source: str, role: str = "report") -> np.ndarray:
        return np.array(json.loads(self.losses_path(key).read_text(encoding="utf-8"))[text][source][role])

    # -------------------------------------------------------------------------------------------- training

    def run_dir(self, run: Run) -> Path:
        return self.out / "runs" / run.name

    def train(self, run: Run) -> None:
        """Train as train.py does it, in a process of its own, or go on with it."""
        options, arm, out = self.options, self.arms[run.arm], self.run_dir(run)
        if (out / "model/config.json").is_file():
            return
        steps, whole = self.steps(run.arm), self.steps(run.arm, whole=True)
        flags = {
            "model": self.start_dir(arm.start, run.seed), "data": self.texts[arm.text].data, "out": out,
            "train": arm.train, "max-steps": steps, "batch-size": options.batch_size,
            "sequence-length": options.sequence_length, "lr": run.lr, "warmup-steps": max(steps // 20, 1),
            "schedule": "cosine", "min-lr": 0, "seed": run.seed, "holdout": HOLDOUT,
            "eval-every": max(whole // EVALUATIONS, 1), "eval-sequences": CURVE_WINDOWS, "dtype": options.dtype,
            "save-every": max(steps // 4, 1), "keep": 1, "data-cache": options.data_cache,
        }  # fmt: skip
        words = [sys.executable, str(TRAIN)]
        for name, value in flags.items():
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        out.mkdir(parents=True, exist_ok=True)
        with open(out / "log", "ab") as log:
            # A session of its own: Ctrl-C reaches this process alone, which tells the runs once.
            process = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)
            self.processes.append(process)
            if self.stopping.is_set():
                process.terminate()
            code = process.wait()
        if code:
            lines = (out / "log").read_text(encoding="utf-8", errors="replace").splitlines() or [""]
            kind = Diverged if "is infinite or NaN" in lines[-1] else ValueError
            raise kind(f"{run.name}: {lines[-1].removeprefix('error: ')} (train.py ended with {code}; {out / 'log'})")

    def train_and_measure(self, run: Run, texts: set[str], choosing: str | None) -> None:
        if self.stopping.is_set():
            return
        try:
            self.train(run)
        except Diverged:
            if choosing is None:
                raise
            self.rule_out(run, choosing)
        else:
            self.measure(self.run_dir(run) / "model", run.name, texts, choosing)
        shutil.rmtree(self.run_dir(run) / "checkpoints", ignore_errors=True)

    def progress(self, run: Run) -> float:
        """The share of a run's steps that has been taken."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            return read_metrics(self.run_dir(run) / "metrics.jsonl")[-1]["step"] / self.steps(run.arm)
        return 0.0

    # -------------------------------------------------------------------------------------------- all of it

    def carry_out(self) -> None:
        """Grow, measure; train with every learning rate and choose one for each arm; train with all seeds."""
        options, first = self.options, self.options.seeds[0]
        tasks = []
        for (start, trained), texts in self.needed.items():
            for seed in [] if trained else options.seeds if self.plans[start] is None else [first]:
                if self.unmeasured(key := self.start_key(start, seed), texts, None):
                    do = partial(self.measure_start, start, seed, key, texts)
                    tasks.append(Task(key, self.flops(start), do))
        self.side_by_side("untrained models", tasks)
        arms = [name for name, trained in self.needed if trained]
        if len(options.lrs) > 1:
            tasks = [self.task(Run(arm, lr, first), set(), self.arms[arm].text) for arm in arms for lr in options.lrs]
            self.side_by_side("learning rates", tasks)
        tasks = [
            self.task(Run(arm, self.chosen(arm), seed), self.needed[arm, True], None)
            for arm in arms for seed in options.seeds
        ]  # fmt: skip
        self.side_by_side("training", tasks)

    def task(self, run: Run, texts: set[str], choosing: str | None) -> Task | None:
        """To train and measure; None if that has been done."""
        if not self.unmeasured(run.name, texts, choosing):
            return None
        arm = self.arms[run.arm]
        do = partial(self.train_and_measure, run, texts, choosing)
        return Task(run.name, self.steps(run.arm) * self.flops(arm.start, arm), do, partial(self.progress, run))

    def side_by_side(self, label: str, tasks: list[Task | None]) -> None:
        side_by_side(label, [task for task in tasks if task], self.options.jobs, self.stop)

    def stop(self) -> None:
        """Runs save what they have, and go on from there the next time."""
        self.stopping.set()
        for process in self.processes:
            process.terminate()

    def measure_start(self, start: str, seed: int, key: str, texts: set[str]) -> None:
        self.measure(self.start_dir(start, seed), key, texts)

    def chosen(self, arm: str) -> float:
        """The learning rate with which an arm did best with the first seed, on the text that it was trained on."""
        if len(self.options.lrs) == 1:
            return self.options.lrs[0]
        text = self.arms[arm].text

        def loss(lr: float) -> float:
            key = Run(arm, lr, self.options.seeds[0]).name
            parts = self.texts[text].windows
            return sum(
                part.sample.weight * self.losses(key, text, part.sample.source, "choice").sum()
                / (part.choice[1][:, 1:] != IGNORED).sum().item() for part in parts
            )  # fmt: skip

        losses = {lr: loss(lr) for lr in self.options.lrs}
        best = min(losses, key=losses.get)
        if math.isinf(losses[best]):
            rates = ", ".join(f"{lr:g}" for lr in losses)
            raise ValueError(f"{arm}: infinite or NaN with every learning rate, {rates}; give lower --lrs")
        return best

    def nats_of(self, term: Term, source: str) -> np.ndarray:
        """(S, N) nats of a term of a claim: seed by seed, window by window."""
        keys = [
            Run(term.name, self.chosen(term.name), seed).name if term.trained else self.start_key(term.name, seed)
            for seed in self.options.seeds
        ]
        return np.stack([self.losses(key, term.text, source) for key in keys])


def write_domain(folder: Path, split: str) -> Path:
    """Generated instructions of a split as a file of documents."""
    path = folder / f"instructions-{split}.jsonl"
    if not path.is_file():
        with cli.publish_file(path) as file:
            for text in instructions.documents(0, DOMAIN_DOCUMENTS[split], split):
                file.write(json.dumps({"text": text}) + "\n")
    return path
