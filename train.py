"""Train a model: `torchrun train.py`, or `python train.py` for one process.

Every stage is this one loop: draw a batch, score its labels, sum the losses, step. What differs between the stages
stands in `STAGES`. Read `training_step` first, then `train`; the rest is what they call.

What is set by default is ours: the paper keeps its recipe for continued pretraining to itself (arXiv:2312.15166).
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import resource
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kernels import CHOICES, select
from solar import cli, corpus, data, dist, optim, shards, snapshot
from solar.checkpoint import CheckpointReader, parse_dtype
from solar.config import ModelConfig
from solar.losses import learned
from solar.model import Transformer
from solar.tokenizer import Tokenizer

# ------------------------------------------------------------------------------------------------ stages


def token_batches(options: "Options", tokenizer: Tokenizer, config: ModelConfig) -> data.TokenBatches:
    """The pretraining stage's batches: documents joined into one stream per source, cut into sequences."""
    sources = [corpus.parse_source(text) for text in options.data]
    prepared = [
        shards.prepare(
            source, tokenizer, Path(options.data_cache), options.holdout, options.workers, options.skip_bad_lines
        )
        for source in sources
    ]
    return data.TokenBatches(
        sources, prepared, config.vocab_size, options.sequence_length, options.batch_size, options.seed,
        options.document_mask,
    )  # fmt: skip


def lm_objective(model: Transformer, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The sum of -log p(label | tokens before it), the number of learned labels, and nothing further to report."""
    logps = model(batch["input_ids"], labels=batch["labels"], document_ids=batch.get("document_ids"))
    return -logps.sum(), learned(batch["labels"]).sum(), {}


# Stage -> its batches, and its objective: (model, batch) -> (sum of losses, count, further sums to report).
STAGES = {
    "pretrain": (token_batches, lm_objective),
}


SKIPS_IN_A_ROW = 10  # updates that --on-nonfinite skip may leave out before it gives up


class Outcome(NamedTuple):
    """What a step came to, over all ranks."""

    loss: float  # a learned token
    count: int  # of learned tokens
    grad_norm: float
    sums: dict[str, float]
    finite: bool
    stop: bool  # some rank was told to end
    local_loss: Tensor  # the sum on this rank alone


# ------------------------------------------------------------------------------------------------ one step


def training_step(model, optimizer, objective, micro_batches, lr: float, clip: float, stop, world) -> Outcome:
    """One update. Losses and gradients are summed over micro-batches and ranks, and divided once, by what was learned.

    All ranks decide alike whether to update, since they decide from the same sums: not if anything is infinite or NaN.
    stop() says whether this rank was told to end.
    """
    total, count, sums = 0.0, 0, {}
    for batch in micro_batches:
        batch = {name: tensor.to(world.device, non_blocking=True) for name, tensor in batch.items()}
        loss, learned_here, further = objective(model, batch)
        loss.backward()
        total, count = total + loss.detach().double(), count + learned_here
        sums = {name: sums.get(name, 0.0) + value.detach().double() for name, value in further.items()}
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    squares = optim.square_sum(gradients) / world.replicas
    local = [total, count, squares, stop(), *sums.values()]
    agreed = dist.sum_over_ranks(torch.stack([torch.as_tensor(x, device=world.device).double() for x in local]))
    total, count, squares, stop, *rest = agreed.tolist()

    loss, grad_norm = total / max(count, 1), math.sqrt(squares) / max(count, 1)
    finite = math.isfinite(loss) and math.isfinite(grad_norm)
    if finite and count:
        optim.scale_(gradients, min(1.0, clip / max(grad_norm, 1e-12)) / count)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad()
    sums = {name: value / max(count, 1) for name, value in zip(sums, rest, strict=True)}
    return Outcome(loss, int(count), grad_norm, sums, finite, bool(stop), local[0])


# ------------------------------------------------------------------------------------------------ the run


@dataclass
class Options:
    stage: Literal[tuple(STAGES)] = cli.flag("pretrain", help="what to train for")
    model: str = cli.flag("out/solar", help="model directory to begin with", metavar="DIR")
    data: list[str] = cli.flag(
        ["stdlib:0.5", "problems:0.5"],
        help="text or jsonl files, folders of them, what `python -m solar.data` wrote, or the built-in corpora stdlib "
        "and problems; the weight is a share of the sequences, the limit a number of documents",
        metavar="PATH[:WEIGHT[:LIMIT]]",
    )
    out: str = cli.flag("out/pretrain", help="directory for checkpoints, metrics and the trained model", metavar="DIR")
    max_steps: int = cli.flag(200, help="length of the run; the learning rate is planned for it")
    max_tokens: int | None = cli.flag(None, help="length of the run in tokens, instead of --max-steps")
    sequence_length: int = cli.flag(256, help="tokens in a sequence")
    batch_size: int = cli.flag(8, help="sequences in a step, over all ranks and micro-batches")
    micro_batch_size: int | None = cli.flag(
        None, help="sequences that a rank holds at once; fewer need less memory (default: its share of the batch)"
    )
    document_mask: bool = cli.flag(False, help="packed documents do not see each other")
    # A twentieth of the steps for warm-up and a decay to a tenth are what most published runs agree on; 3e-4 is right
    # for models below 1B, about 1e-4 or less for 10B (LLaMA Pro trains its new layers with 2e-4).
    lr: float = cli.flag(3e-4, help="the highest learning rate")
    warmup_steps: int = cli.flag(10, help="steps over which the learning rate rises")
    schedule: Literal[optim.SCHEDULES] = cli.flag("cosine", help="of the learning rate; wsd: warm-up, stable, decay")
    min_lr: float = cli.flag(0.1, help="the last learning rate, as a share of the highest")
    decay: float = cli.flag(0.2, help="share of the steps over which wsd falls")
    # A short memory of the second moment, as GPT-3 and Llama: 0.999 would look back further than most continued runs.
    betas: list[float] = cli.flag([0.9, 0.95], help="of AdamW: what its moments keep at each step")
    weight_decay: float = cli.flag(0.1, help="of matrices; norms and biases do not decay")
    clip: float = cli.flag(1.0, help="longest gradient, as a global norm")
    train: str = cli.flag("all", help="all, new (the layers that up-scaling added), or a regular expression on names")
    seed: int = cli.flag(0, help="of the order of the samples")
    eval_every: int = cli.flag(100, help="steps between evaluations on held-out documents, 0 for none")
    eval_sequences: int = cli.flag(64, help="held-out sequences of each source that an evaluation takes at most")
    holdout: float = cli.flag(0.01, help="share of the documents that is held out")
    save_every: int = cli.flag(50, help="steps between checkpoints; the last step is always saved")
    keep: int = cli.flag(2, help="checkpoints to keep")
    resume: str | None = cli.flag(None, help="checkpoint to go on from (default: the latest of --out)", metavar="DIR")
    no_resume: bool = cli.flag(False, help="refuse an --out that holds checkpoints instead of going on from them")
    on_nonfinite: Literal["stop", "skip"] = cli.flag("stop", help="for a loss or gradient that is infinite or NaN")
    on_save_error: Literal["stop", "continue"] = cli.flag("stop", help="for a checkpoint that cannot be written")
    device: str = cli.flag("auto", help="cuda, cpu, or auto: a GPU if there is one")
    dtype: Literal["auto", "bf16", "fp32"] = cli.flag("auto", help="to compute in; auto: bf16 on a GPU, fp32 elsewhere")
    param_dtype: Literal["fp32", "bf16"] = cli.flag("fp32", help="of weights and gradients")
    optimizer_dtype: Literal["fp32", "bf16"] = cli.flag("fp32", help="of AdamW's two moments")
    recompute: Literal["none", "selective", "full"] = cli.flag("none", help="activations to compute again, not to keep")
    compile: bool = cli.flag(False, help="compile each layer with torch.compile")
    cpu_offload: bool = cli.flag(False, help="keep weights, gradients and moments in the CPU's memory")
    sharding: Literal["full", "hybrid"] = cli.flag("full", help="hybrid: shard within machines, copy across them")
    kernels: Literal[CHOICES] = cli.flag("auto", help="which implementation of the operations")
    data_cache: str = cli.flag("out/data", help="directory that keeps tokenised data", metavar="DIR")
    workers: int | None = cli.flag(None, help="processes that tokenise (default: one a core)")
    skip_bad_lines: bool = cli.flag(False, help="count jsonl lines that cannot be read instead of stopping")


def train(options: Options, world: dist.World) -> None:
    """Read the model, train it, leave it in OUT/model; go on from the latest checkpoint of OUT if it has one."""
    out, model_dir = Path(options.out), Path(options.model)
    say = print if world.rank == 0 else lambda *_, **__: None
    select(options.kernels)
    reader = CheckpointReader(model_dir)
    steps = check(options, reader.config, world)
    say(cli.command_line(options, "options     "))
    make_batches, objective = STAGES[options.stage]
    batches = make_batches(options, Tokenizer(model_dir), reader.config)
    model, optimizer = build(options, reader, world, say)
    record = {
        "step": 0,
        "tokens": 0,
        "identity": {
            "stage": options.stage,
            "model": reader.fingerprint(),
            "optimizer_dtype": options.optimizer_dtype,
            **batches.identity(),
        },
        "options": dataclasses.asdict(options),
    }
    snapshots = snapshot.Snapshots(
        out / "checkpoints", options.keep, world.rank, world.size, world.background, reader.config, model_dir,
        options.on_save_error,
    )  # fmt: skip
    if found := find_checkpoint(options, snapshots, world):
        record = resume(found, model, optimizer, record, steps, say)
    if world.rank == 0:
        (out / "options.json").write_text(json.dumps(record["options"], indent=2) + "\n", encoding="utf-8")
    log = cli.MetricsLog(out / "metrics.jsonl", after_step=record["step"]) if world.rank == 0 else None
    meter = Meter(reader.config, options, record["step"], steps, world)

    def evaluate_after(step: int) -> None:
        losses = evaluate(model, batches, options, world)
        if not losses:
            say("held out: no documents, so nothing is evaluated")
        for source, (loss, count) in losses.items():
            say(f"held out {source}: loss {loss:.4f}, perplexity {perplexity(loss):.2f}, {count:,} tokens", flush=True)
        if log:
            log.write({"step": step, "heldout": {source: loss for source, (loss, _) in losses.items()}})

    if options.eval_every and record["step"] == 0:
        evaluate_after(0)
    stop, skipped = Interruption(), 0
    upcoming = batches.steps(record["step"], steps, world.rank, world.size, micro_batch_size(options, world))
    with contextlib.closing(snapshots), contextlib.closing(upcoming):
        for step, micro_batches in enumerate(upcoming, start=record["step"] + 1):
            lr = optim.learning_rate(
                step - 1, steps, options.lr, options.warmup_steps, options.schedule, options.min_lr, options.decay
            )
            outcome = training_step(model, optimizer, objective, micro_batches, lr, options.clip, stop, world)
            skipped = 0 if outcome.finite else skipped + 1
            if skipped:
                report_nonfinite(outcome, step, skipped, options, world, say)
            record |= {"step": step, "tokens": record["tokens"] + outcome.count}
            entry = meter.entry(step, lr, outcome)
            say(meter.line(entry), flush=True)
            if log:
                log.write(entry)
            if options.eval_every and (step % options.eval_every == 0 or step == steps) and not outcome.stop:
                evaluate_after(step)
            if step % options.save_every == 0 or step == steps or outcome.stop:
                snapshots.save(step, model, optimizer, record)
            if outcome.stop:
                break
            meter.lap()
        snapshots.wait()
    last = snapshots.written or found
    if last is None or snapshot.read_manifest(last)["step"] != record["step"]:
        raise OSError(
            f"step {record['step']} could not be saved; the newest checkpoint is {last}: make room, start again"
        )
    if record["step"] < steps:
        say(f"stopped after step {record['step']} of {steps}, which is saved; the same command goes on from there")
        sys.exit(128 + signal.SIGTERM)
    if world.rank == 0:
        snapshot.export(last, out / "model", dtype=reader.dtype, force=True)
    dist.wait_for_all(world)
    say(out / "model")


def check(options: Options, config: ModelConfig, world: dist.World) -> int:
    """How many steps the run has. ValueError for options that cannot be."""
    at_least_1 = ("max_steps", "max_tokens", "sequence_length", "batch_size", "micro_batch_size", "save_every", "keep")
    shares = ("min_lr", "decay", "holdout")
    for names, sound, wanted in (
        ((*at_least_1, "eval_sequences"), lambda value: value >= 1, "at least 1"),
        (("warmup_steps", "eval_every", "weight_decay"), lambda value: 0 <= value < math.inf, "at least 0"),
        (("lr", "clip"), lambda value: 0 < value < math.inf, "a number above 0"),
        (shares, lambda value: 0 <= value <= 1, "a share between 0 and 1"),
    ):
        for name in names:
            value = getattr(options, name)
            if value is not None and not sound(value):
                raise ValueError(f"--{name.replace('_', '-')} {value}: {wanted} is needed")
    if options.sequence_length < 2:
        raise ValueError("--sequence-length 1: a token is learned from those before it, so at least 2 are needed")
    if options.sequence_length > config.max_position_embeddings:
        raise ValueError(
            f"--sequence-length {options.sequence_length}: the model has room for {config.max_position_embeddings} "
            f"positions (max_position_embeddings of {options.model}); give a shorter one"
        )
    if len(options.betas) != 2 or not all(0 <= beta < 1 for beta in options.betas):
        raise ValueError(f"--betas {' '.join(map(str, options.betas))}: two numbers are needed, at least 0 and below 1")
    if options.batch_size % (micro_batch_size(options, world) * world.size):
        asked = f"micro-batches of {options.micro_batch_size} on " if options.micro_batch_size else ""
        raise ValueError(
            f"--batch-size {options.batch_size} cannot be shared out in {asked}{world.size} ranks: it must be a "
            f"multiple of {micro_batch_size(options, world) * world.size}"
        )
    cli.check_output(Path(options.out) / "model", force=True)  # now, and not when everything has been trained
    if options.cpu_offload and world.device.type == "cpu":
        raise ValueError("--cpu-offload: without a GPU everything is in the CPU's memory already; leave it out")
    if options.max_tokens is None:
        return options.max_steps
    return max(math.ceil(options.max_tokens / (options.batch_size * options.sequence_length)), 1)


def micro_batch_size(options: Options, world: dist.World) -> int:
    return options.micro_batch_size or max(options.batch_size // world.size, 1)


def build(
    options: Options, reader: CheckpointReader, world: dist.World, say
) -> tuple[Transformer, torch.optim.Optimizer]:
    """The sharded model with its weights, and its optimizer. Says what is trained and in which types."""
    with torch.device("meta"):
        model = Transformer(reader.config).to(parse_dtype(options.param_dtype))
    trainable = choose_trainable(model, options.train, reader.path)
    compute = compute_dtype(options, world)
    dist.shard(model, world, compute, options.recompute, options.compile, options.cpu_offload)
    dist.load_weights(model, reader, world)
    optimizer = optim.build_optimizer(
        model, options.weight_decay, tuple(options.betas), parse_dtype(options.optimizer_dtype),
        seed=options.seed * world.shards + world.shard,
    )  # fmt: skip
    count = reader.config.num_parameters()
    say(f"model       {reader.path}: {reader.config.num_hidden_layers} layers, {count:,} parameters")
    say(f"training    {trainable:,} of them, {count - trainable:,} frozen (--train {options.train})")
    say(
        f"memory      weights {options.param_dtype}, moments {options.optimizer_dtype}, computed in {str(compute)[6:]} "
        f"on {world.size} x {world.device.type}"
        + (f", {world.replicas} copies sharded {world.shards}-fold" if world.replicas > 1 else "")
    )
    return model, optimizer


def compute_dtype(options: Options, world: dist.World) -> torch.dtype:
    return parse_dtype(options.dtype if options.dtype != "auto" else "bf16" if world.device.type == "cuda" else "fp32")


def choose_trainable(model: Transformer, choice: str, model_dir: Path) -> int:
    """Freeze all parameters but the chosen ones; returns how many numbers those hold.

    "new" takes the layers that up-scaling added and nothing else, neither embeddings nor norms of the base: LLaMA Pro's
    recipe (arXiv:2401.02415, section 3.3). Raises ValueError if nothing is left to train.
    """
    if choice == "new":
        record = model_dir / "upscale.json"
        if not record.is_file():
            raise ValueError(f"--train new: {record} would say which layers are new, but is not there")
        new = {str(layer) for layer in json.loads(record.read_text(encoding="utf-8"))["new_layers"]}
        chosen = lambda name: name.startswith("model.layers.") and name.split(".")[2] in new
    else:
        try:
            pattern = re.compile("" if choice == "all" else choice)
        except re.error as error:
            raise ValueError(f"--train {choice}: not all, not new, and no regular expression: {error}") from None
        chosen = lambda name: pattern.search(name) is not None
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(chosen(name))
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if not count:
        raise ValueError(f"--train {choice}: no parameter is left to train; names look like {name}")
    return count


def find_checkpoint(options: Options, snapshots: snapshot.Snapshots, world: dist.World) -> Path | None:
    """The checkpoint to go on from, verified: --resume, or else the newest good one of this run. All ranks agree."""
    found = snapshots.latest()
    if found is None and (damaged := sorted(snapshots.root.glob("step-*"))):
        raise ValueError(
            f"{damaged[-1]} and all before it are damaged: look at the disk, then give another --out, or remove them"
        )
    restarted = world.restarts > 0  # by torchrun: what --out holds is this run's own
    if found is not None and options.no_resume and not restarted:
        raise FileExistsError(f"{found} is there: --no-resume wants an --out without checkpoints, so give another")
    if options.resume is None:
        return found
    # A run that was stopped itself, after it had gone on from --resume, goes on from where it was.
    if found is not None and snapshot.read_manifest(found)["record"]["options"]["resume"] == options.resume:
        return found
    snapshot.verify(options.resume, world.control)
    return Path(options.resume)


def resume(found: Path, model: Transformer, optimizer: torch.optim.Optimizer, record: dict, steps: int, say) -> dict:
    """Fill model and optimizer from a checkpoint and return its record. ValueError if it belongs to another run."""
    saved = snapshot.read_manifest(found)["record"]
    for what, value in record["identity"].items():
        if saved["identity"].get(what) != value:
            raise ValueError(
                f"{found} was trained with {what} {saved['identity'].get(what)}, now it is {value}: "
                "give what it was trained with, or another --out"
            )
    if saved["step"] > steps:
        raise ValueError(
            f"{found} is after step {saved['step']}, the run ends with step {steps}: give more --max-steps"
        )
    snapshot.load(found, model, optimizer, verified=True)
    say(f"resuming    {found}, after step {saved['step']}")
    for name, value in record["options"].items():
        if name not in ("resume", "no_resume") and saved["options"].get(name) != value:
            say(f"note: --{name.replace('_', '-')} was {saved['options'].get(name)}, now it is {value}")
    return saved | {"options": record["options"]}


def report_nonfinite(outcome: Outcome, step: int, in_a_row: int, options: Options, world: dist.World, say) -> None:
    """Name the ranks on which it began; then raise ValueError, or say that the step is skipped."""
    ranks = dist.from_all_ranks(not math.isfinite(outcome.local_loss), world)
    where = [str(rank) for rank, bad in enumerate(ranks) if bad]
    what = f"loss on rank {', '.join(where)}" if where else "gradient"
    if options.on_nonfinite == "stop" or in_a_row == SKIPS_IN_A_ROW:
        again = f", {in_a_row} times in a row" if in_a_row > 1 else ""
        raise ValueError(
            f"step {step}: the {what} is infinite or NaN{again}; nothing was updated or saved. Lower --lr, look at the "
            "data of this step, or go on over single bad batches with --on-nonfinite skip"
        )
    say(f"step {step}: the {what} is infinite or NaN; skipped, the model stays as it was")


@torch.no_grad()
def evaluate(model: Transformer, batches, options: Options, world: dist.World) -> dict[str, tuple[float, int]]:
    """Held-out source -> mean loss of a token and how many were scored. The ranks share the sequences."""
    losses = {}
    for source, held_out in batches.heldout(
        micro_batch_size(options, world), world.rank, world.size, options.eval_sequences
    ):
        sums = torch.zeros(2, dtype=torch.float64, device=world.device)
        for batch in held_out:
            loss, count, _ = lm_objective(model, {name: tensor.to(world.device) for name, tensor in batch.items()})
            sums += torch.stack([loss.double(), count.double()])
        loss, count = dist.sum_over_ranks(sums).tolist()
        losses[source] = (loss / max(count, 1), int(count))
    dist.free_gathered(model)
    return losses


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))


class Interruption:
    """Whether to stop after the step: SIGTERM or Ctrl-C ask for it; a second one ends the process at once.

    (At once when Python comes to it: not while a rank waits for another in a collective.)
    """

    def __init__(self):
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def __call__(self) -> bool:
        return self.asked

    def _ask(self, number: int, _frame) -> None:
        # torchrun passes on a Ctrl-C that the terminal has sent to its ranks already: that is still the first one.
        if self.asked and time.monotonic() - self.when > 1:
            os._exit(128 + number)
        if not self.asked:
            self.asked, self.when = True, time.monotonic()
            print("stopping after this step; once more to stop at once", file=sys.stderr, flush=True)


class Meter:
    """What a step's line and its entry in metrics.jsonl say.

    MFU, model FLOPs utilisation (arXiv:2204.02311, appendix B): the operations that the model needs for the tokens,
    recomputation not counted, over what these devices could do in the time. The latter is measured at the start, by a
    large product of random matrices, and not taken from a data sheet.
    """

    def __init__(self, config: ModelConfig, options: Options, first: int, steps: int, world: dist.World):
        self.tokens = options.batch_size * options.sequence_length
        self.flops = self.tokens * config.training_flops(options.sequence_length)
        self.device, self.steps, self.first = world.device, steps, first
        self.peak = world.size * matrix_rate(world.device, compute_dtype(options, world))
        self.start = self.before = time.monotonic()

    def entry(self, step: int, lr: float, outcome: Outcome) -> dict:
        now = time.monotonic()
        seconds = now - self.before
        left = (now - self.start) / (step - self.first) * (self.steps - step)
        on_gpu = self.device.type == "cuda"
        return {
            "step": step,
            "loss": outcome.loss,
            **outcome.sums,
            "lr": lr,
            "grad_norm": outcome.grad_norm,
            "tokens": outcome.count,
            "tokens_per_second": self.tokens / seconds,
            "mfu": self.flops / seconds / self.peak,
            "memory_bytes": torch.cuda.max_memory_allocated()
            if on_gpu
            else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            "seconds_left": left,
        }

    def lap(self) -> None:
        """The next step's time begins here: it does not pay for evaluating and saving."""
        self.before = time.monotonic()

    def line(self, entry: dict) -> str:
        width = len(str(self.steps))
        return (
            f"step {entry['step']:{width}}/{self.steps}  loss {entry['loss']:.4f}  lr {entry['lr']:.2e}  "
            f"norm {entry['grad_norm']:.2f}  {entry['tokens_per_second']:,.0f} tokens/s  mfu {entry['mfu']:.0%}  "
            f"{cli.human_bytes(entry['memory_bytes'])}  {cli.human_seconds(entry['seconds_left'])} left"
        )


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product on one device: the best of twenty, after one to warm up."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(21):
        start = time.perf_counter()
        product = a @ b
        product[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:])


def run(options: Options) -> None:
    """Train in the job that torchrun has started, or in one of this process alone."""
    world = dist.setup(options.device, options.sharding)
    try:
        train(options, world)
    finally:
        dist.close()


def main() -> None:
    run(cli.parse(Options, prog="train.py", description="Train a model: one process, or as many as torchrun starts."))


if __name__ == "__main__":
    cli.run(main)
