"""Train a model: `torchrun train.py`, or `python train.py` for one process.

Every stage is this one loop: draw a batch, score its labels, sum the losses, step. What differs between the stages
stands in `STAGES`. Read `training_step` first, then `train`; the rest is what they call.

What is set by default is ours: the paper keeps its recipe for continued pretraining to itself (arXiv:2312.15166).
"""

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import solar

if __name__ == "__main__":
    solar.interruptible()

import torch
from torch import Tensor

from kernels import CHOICES, select
from solar import cli, data, dist, examples, losses, optim, packed, restore, snapshot
from solar.checkpoint import CheckpointReader, parse_dtype
from solar.inputs import Job, packed_chats, preference_pairs, token_batches
from solar.manifest import read_manifest, verify
from solar.meter import Meter
from solar.metrics import MetricsLog, read_metrics
from solar.model import Transformer
from solar.tokenizer import TEMPLATES, Tokenizer

# ------------------------------------------------------------------------------------------------ stages


def lm_objective(model: Transformer, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The sum of -log p(label | tokens before it), the number of learned labels, and nothing further to report."""
    document_ids = batch.get("document_ids")
    loss = -model(batch["input_ids"], labels=batch["labels"], document_ids=document_ids, summed=True)
    return loss, losses.learned(batch["labels"]).sum(), {}


def dpo_objective(
    model: Transformer, batch: dict[str, Tensor], beta: float, loss: str, label_smoothing: float, sft_weight: float
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The sum of the losses of the batch's pairs, how many there are, and sums of their rewards, margins and so on."""
    logps = model(batch["input_ids"], labels=batch["labels"], document_ids=batch["document_ids"])
    return losses.preference_loss(logps, batch, beta, loss, label_smoothing, sft_weight)


class Stage(NamedTuple):
    """What a stage learns from, and how. The objective: (model, batch) -> (sum of losses, count, sums to report).

    unit: what the count counts. settings: options that the objective takes too. defaults: of options not given.
    """

    batches: Callable[[Job], data.Batches]
    objective: Callable[..., tuple[Tensor, Tensor, dict[str, Tensor]]]
    unit: str
    settings: tuple[str, ...]
    defaults: dict[str, object]


# The learning rates: 3e-4 is right for pretraining models below 1B, about 1e-4 or less for 10B (LLaMA Pro trains its
# new layers with 2e-4); 2e-5 and 5e-7 are what Zephyr took at 7B, which SOLAR followed (arXiv:2310.16944).
STAGES = {
    "pretrain": Stage(
        token_batches, lm_objective, "tokens", (),
        {"model": "out/solar", "data": ["stdlib:0.3", "problems:0.7"], "sequence_length": 256, "lr": 3e-4,
         "max_steps": 200},
    ),
    "sft": Stage(
        packed_chats, lm_objective, "tokens", (),
        {"model": "out/pretrain/model", "sequence_length": 1024, "lr": 2e-5, "epochs": 1.0},
    ),
    "dpo": Stage(
        preference_pairs, dpo_objective, "pairs", ("beta", "loss", "label_smoothing", "sft_weight"),
        {"model": "out/sft/model", "sequence_length": 1024, "lr": 5e-7, "epochs": 1.0},
    ),
}  # fmt: skip
MADE_BY = {"out/solar": "upscale", "out/pretrain/model": "pretrain", "out/sft/model": "sft"}  # a make target for each
LENGTHS = ("max_steps", "max_tokens", "epochs")  # each says how long a run is; one of them is given
WITHOUT_EFFECT = ("resume", "no_resume", "data_cache", "workers")  # on what is learned


SHOWN = 2  # sequences that --show-batch prints
FAR = 10  # nats of held-out margin, where the loss has long been near 0 and still pushes both answers down
SKIPS_IN_A_ROW = 10  # updates that --on-nonfinite skip may leave out before it gives up


class Outcome(NamedTuple):
    """What a step came to, over all ranks."""

    loss: float  # a mean over the learned tokens, or the pairs
    count: int  # of those
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
    for number, batch in enumerate(micro_batches, start=1):
        dist.sum_over_replicas(model, number == len(micro_batches))
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


def by_stage(what: str, option: str) -> str:
    """The help of an option whose default hangs on the stage."""
    defaults = {stage: STAGES[stage].defaults[option] for stage in STAGES if option in STAGES[stage].defaults}
    told = ", ".join(
        f"{stage} {' '.join(value) if isinstance(value, list) else value}" for stage, value in defaults.items()
    )
    return f"{what} (default: {told})"


@dataclass
class Options:
    stage: Literal[tuple(STAGES)] = cli.flag("pretrain", help="what to train for")
    model: str | None = cli.flag(None, help=by_stage("model directory to begin with", "model"), metavar="DIR")
    data: list[str] | None = cli.flag(
        None,
        help=by_stage(
            "pretrain: text or jsonl files, folders of them, what `python -m solar.data` wrote, or the built-in "
            "corpora stdlib and problems; sft and dpo: files of rows in the usual shapes (solar/chats.py). The weight "
            "is a share of the sequences, the limit a number of documents or rows", "data"
        ),
        metavar="PATH[:WEIGHT[:LIMIT]]",
    )  # fmt: skip
    out: str | None = cli.flag(
        None, help="directory for checkpoints, metrics and the trained model (default: out/STAGE)", metavar="DIR"
    )
    max_steps: int | None = cli.flag(None, help=by_stage("length of the run; the learning rate follows", "max_steps"))
    max_tokens: int | None = cli.flag(None, help="length of the run in tokens of its batches, instead")
    epochs: float | None = cli.flag(None, help=by_stage("length of the run in passes over the data, instead", "epochs"))
    sequence_length: int | None = cli.flag(None, help=by_stage("tokens in a sequence", "sequence_length"))
    batch_size: int = cli.flag(8, help="sequences in a step, over all ranks and micro-batches")
    micro_batch_size: int | None = cli.flag(
        None, help="sequences that a rank holds at once; fewer need less memory (default: its share of the batch)"
    )
    document_mask: bool = cli.flag(False, help="pretrain: packed documents do not see each other (others never do)")
    template: Literal[tuple(TEMPLATES)] = cli.flag("solar", help="sft, dpo: how a conversation becomes text")
    too_long: Literal[examples.TOO_LONG] = cli.flag("drop", help="sft, dpo: for examples longer than a sequence")
    reference: list[str] | None = cli.flag(
        None, help="dpo: what `python -m solar.reference` wrote (default: beside each of --data)", metavar="FILE"
    )
    beta: float = cli.flag(0.1, help="dpo: how much it costs to leave the reference")
    loss: Literal[losses.KINDS] = cli.flag("sigmoid", help="dpo: the loss of a pair")
    label_smoothing: float = cli.flag(0.0, help="dpo: share of pairs taken to stand the wrong way round")
    sft_weight: float = cli.flag(0.0, help="dpo: weight of -log p a token of the chosen answer, beside the loss")
    show_batch: bool = cli.flag(False, help="print the first sequences, what is learned set off, and stop")
    # A twentieth of the steps for warm-up and a decay to a tenth are what most published runs agree on.
    lr: float | None = cli.flag(None, help=by_stage("the highest learning rate", "lr"))
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
    skip_bad_lines: bool = cli.flag(False, help="count lines that cannot be used instead of stopping")

    def __post_init__(self):
        """Fill in what hangs on the stage."""
        length_given = any(getattr(self, name) is not None for name in LENGTHS)
        for name, value in (STAGES[self.stage].defaults | {"out": f"out/{self.stage}"}).items():
            if getattr(self, name) is None and not (name in LENGTHS and length_given):
                setattr(self, name, value)


def train(options: Options, world: dist.World) -> None:
    """Read the model, train it, leave it in OUT/model; go on from the latest checkpoint of OUT if it has one."""
    out, model_dir, stage = Path(options.out), Path(options.model), STAGES[options.stage]
    if options.model in MADE_BY and not model_dir.exists():
        raise FileNotFoundError(
            f"{options.model} does not exist yet: `make {MADE_BY[options.model]}` makes it, or give --model DIR"
        )
    say = print if world.rank == 0 else lambda *_, **__: None
    select(options.kernels)
    reader = CheckpointReader(model_dir)
    check(options, reader, world)
    trained = optim.choose_trainable(reader.config.tensor_shapes(), options.train, reader.path)
    say(cli.command_line(options, "options     "))
    compute = compute_dtype(options, world)
    tokenizer = Tokenizer(model_dir)
    batches = stage.batches(Job(options, reader, tokenizer, compute))
    steps = length(options, batches)
    for line in batches.describe(steps * options.batch_size):
        say(f"data        {line}")
    if options.show_batch:
        say(packed.show(batches.batch(0), tokenizer, SHOWN, *[packed.COLOURED] * sys.stdout.isatty()))
        return
    with dist.alone_in(out, world):
        record = {
            "step": 0,
            stage.unit: 0,
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
        found = find_checkpoint(options, snapshots, world)
        if found:
            record = resume(found, record, steps, say)
        model, optimizer = build(options, reader, trained, compute, world, say, weights=not found)
        if found:
            restore.load(found, model, optimizer, verified=True)
        if world.rank == 0:
            (out / "options.json").write_text(json.dumps(record["options"], indent=2) + "\n", encoding="utf-8")
        with contextlib.closing(snapshots):
            flops = reader.config.training_flops(options.sequence_length, trained)
            record, signalled = loop(options, flops, batches, model, optimizer, record, steps, snapshots, world, say)
        last = snapshots.written or found
        if last is None or read_manifest(last)["step"] != record["step"]:
            raise OSError(
                f"step {record['step']} could not be saved; the newest checkpoint is {last}: make room, start again"
            )
        if record["step"] < steps:
            say(f"stopped after step {record['step']} of {steps}, which is saved; the same command goes on from there")
            sys.exit(128 + signalled)
        if world.rank == 0:
            restore.export(last, out / "model", dtype=reader.dtype, force=True)
        dist.wait_for_all(world)
    say(out / "model")


def loop(
    options: Options, flops: int, batches, model, optimizer, record: dict, steps: int, snapshots, world, say
) -> tuple[dict, int]:
    """The steps from where the record stands, with what they print, log, evaluate and save.

    flops: operations for a token. Returns the last record, and the signal that has ended the run if one has.
    """
    stage, out, say = STAGES[options.stage], Path(options.out), cli.unheard(say)
    objective = partial(stage.objective, **{name: getattr(options, name) for name in stage.settings})
    log = MetricsLog(out / "metrics.jsonl", after_step=record["step"]) if world.rank == 0 else None

    def evaluate_after(step: int) -> None:
        results = evaluate(model, objective, batches, options, world)
        if not results:
            say("held out: nothing, so nothing is evaluated")
        for source, (loss, count, sums) in results.items():
            means = sums or {"perplexity": math.exp(min(loss, 700.0))}
            told = "".join(f", {name.replace('_', ' ')} {value:.2f}" for name, value in means.items())
            say(f"held out {source}: loss {loss:.4f}{told}, {count:,} {stage.unit}", flush=True)
            if sums.get("margin", 0.0) > FAR:
                say(f"note: a margin above {FAR}: far from the reference; lower --lr or more --beta keeps it nearer")
        if log:
            means = {source: sums for source, (_, _, sums) in results.items() if sums}
            log.write(
                {"step": step, "heldout": {source: loss for source, (loss, _, _) in results.items()}}
                | ({"heldout_means": means} if means else {})
            )

    evaluates = lambda step: options.eval_every and (step % options.eval_every == 0 or step == steps)
    evaluated = {entry["step"] for entry in read_metrics(out / "metrics.jsonl") if "heldout" in entry}
    # Before the first step, and where a run was stopped, which leaves it no time to evaluate.
    if evaluates(record["step"]) and not dist.from_all_ranks(record["step"] in evaluated, world)[0]:
        evaluate_after(record["step"])
    meter = Meter(
        options.batch_size * options.sequence_length, flops, stage.unit, record["step"], steps, world.device,
        world.size, compute_dtype(options, world),
    )  # fmt: skip
    stop, skipped = cli.Interruption(), 0
    upcoming = batches.steps(record["step"], steps, world.rank, world.size, micro_batch_size(options, world))
    with contextlib.closing(upcoming):
        for step, micro_batches in enumerate(upcoming, start=record["step"] + 1):
            lr = optim.learning_rate(
                step - 1, steps, options.lr, options.warmup_steps, options.schedule, options.min_lr, options.decay
            )
            outcome = training_step(model, optimizer, objective, micro_batches, lr, options.clip, stop, world)
            skipped = 0 if outcome.finite else skipped + 1
            if skipped:
                report_nonfinite(outcome, step, skipped, options, world, say)
            record |= {"step": step, stage.unit: record[stage.unit] + outcome.count}
            entry = meter.entry(step, lr, outcome)
            say(meter.line(entry), flush=True)
            if log:
                log.write(entry)
            if evaluates(step) and not outcome.stop:
                evaluate_after(step)
            if step % options.save_every == 0 or step == steps or outcome.stop:
                snapshots.save(step, model, optimizer, record)
            if outcome.stop:
                break
            meter.lap()
        snapshots.wait()
    return record, stop.number


def check(options: Options, reader: CheckpointReader, world: dist.World) -> None:
    """Raise ValueError for options that cannot be."""
    room = reader.config.max_position_embeddings
    if not options.data:
        raise ValueError(f"--stage {options.stage} learns from files of your own: name them with --data")
    if len(given := [name for name in LENGTHS if getattr(options, name) is not None]) > 1:
        raise ValueError(f"--{given[0]} and --{given[1]} both say how long the run is: give one".replace("_", "-"))
    for name in ("reference", *STAGES["dpo"].settings):
        default = Options.__dataclass_fields__[name].default
        if options.stage != "dpo" and getattr(options, name) != default:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} is for --stage dpo, not for {options.stage}; leave it out")
    losses.check_preference(options.beta, options.loss, options.label_smoothing, options.sft_weight)
    at_least_1 = ("max_steps", "max_tokens", "sequence_length", "batch_size", "micro_batch_size", "save_every", "keep")
    shares = ("min_lr", "decay", "holdout")
    for names, sound, wanted in (
        ((*at_least_1, "eval_sequences"), lambda value: value >= 1, "at least 1"),
        (("warmup_steps", "eval_every", "weight_decay"), lambda value: 0 <= value < math.inf, "at least 0"),
        (("lr", "clip", "epochs"), lambda value: 0 < value < math.inf, "a number above 0"),
        (shares, lambda value: 0 <= value <= 1, "a share between 0 and 1"),
    ):
        for name in names:
            value = getattr(options, name)
            if value is not None and not sound(value):
                raise ValueError(f"--{name.replace('_', '-')} {value}: {wanted} is needed")
    if options.sequence_length < 2:
        raise ValueError("--sequence-length 1: a token is learned from those before it, so at least 2 are needed")
    if options.sequence_length > room:
        raise ValueError(
            f"--sequence-length {options.sequence_length}: the model has room for {room} "
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
    if (Path(options.out) / "config.json").exists():
        raise FileExistsError(
            f"--out {options.out} is a model, and training leaves a folder with checkpoints, metrics and a model: "
            "give another directory"
        )
    cli.check_output(Path(options.out) / "model", force=True)  # now, and not when everything has been trained
    if options.cpu_offload and world.device.type == "cpu":
        raise ValueError("--cpu-offload: without a GPU everything is in the CPU's memory already; leave it out")


def length(options: Options, batches: data.Batches) -> int:
    """How many steps the run has."""
    if options.max_steps is not None:
        return options.max_steps
    rows = options.epochs * batches.epoch_rows if options.epochs else options.max_tokens / options.sequence_length
    # Rounded first: 0.07 passes over 100 rows are 7.000000000000001.
    return max(math.ceil(round(rows / options.batch_size, 9)), 1)


def micro_batch_size(options: Options, world: dist.World) -> int:
    return options.micro_batch_size or max(options.batch_size // world.size, 1)


def build(
    options: Options, reader: CheckpointReader, trained: set[str], compute: torch.dtype, world: dist.World, say,
    weights: bool,
) -> tuple[Transformer, torch.optim.Optimizer]:  # fmt: skip
    """The sharded model, with the weights of the reader unless they come from a checkpoint, and its optimizer.

    Says what is trained and in which types.
    """
    with torch.device("meta"):
        model = Transformer(reader.config).to(parse_dtype(options.param_dtype))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    dist.shard(model, world, compute, options.recompute, options.compile, options.cpu_offload)
    if weights:
        dist.load_weights(model, reader, world)
    optimizer = optim.build_optimizer(
        model, options.weight_decay, tuple(options.betas), parse_dtype(options.optimizer_dtype),
        seed=options.seed * world.shards + world.shard,
    )  # fmt: skip
    count = reader.config.num_parameters()
    learning = sum(math.prod(shape) for name, shape in reader.config.tensor_shapes().items() if name in trained)
    say(f"model       {reader.path}: {reader.config.num_hidden_layers} layers, {count:,} parameters")
    say(f"training    {learning:,} of them, {count - learning:,} frozen (--train {options.train})")
    say(
        f"memory      weights {options.param_dtype}, moments {options.optimizer_dtype}, computed in {str(compute)[6:]} "
        f"on {world.size} x {world.device.type}"
        + (f", {world.replicas} copies sharded {world.shards}-fold" if world.replicas > 1 else "")
    )
    return model, optimizer


def compute_dtype(options: Options, world: dist.World) -> torch.dtype:
    return parse_dtype(options.dtype if options.dtype != "auto" else "bf16" if world.device.type == "cuda" else "fp32")


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
    if found is not None and read_manifest(found)["record"]["options"]["resume"] == options.resume:
        return found
    verify(options.resume, world.control)
    return Path(options.resume)


def resume(found: Path, record: dict, steps: int, say) -> dict:
    """The record of a checkpoint, from which this run goes on. ValueError if it belongs to another run."""
    saved = read_manifest(found)["record"]
    for what, value in record["identity"].items():
        if saved["identity"].get(what) != value:
            raise ValueError(
                f"{found} was trained with {what} {saved['identity'].get(what)}, now it is {value}: "
                "give what it was trained with, or another --out"
            )
    if saved["step"] > steps:
        length = next(name for name in LENGTHS if record["options"][name] is not None).replace("_", "-")
        raise ValueError(f"{found} is after step {saved['step']}, the run ends with step {steps}: give more --{length}")
    if saved["step"] == steps:
        say(f"finished    {found} is after step {steps}, the last: nothing is left to train; a longer run would go on")
        return saved
    say(f"resuming    {found}, after step {saved['step']}")
    for name, value in record["options"].items():
        if name not in WITHOUT_EFFECT and saved["options"].get(name) != value:
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
def evaluate(
    model: Transformer, objective, batches: data.Batches, options: Options, world: dist.World
) -> dict[str, tuple[float, int, dict[str, float]]]:
    """Held-out source -> mean loss, how many tokens or pairs were scored, and the means of what the objective reports.
    The ranks share the sequences."""
    results = {}
    for source, held_out in batches.heldout(
        micro_batch_size(options, world), world.rank, world.size, options.eval_sequences
    ):
        totals = 0.0
        for batch in held_out:
            loss, count, sums = objective(model, {name: tensor.to(world.device) for name, tensor in batch.items()})
            totals = totals + torch.stack([value.double() for value in (loss, count, *sums.values())])
        loss, count, *rest = dist.sum_over_ranks(totals).tolist()
        mean = lambda total, count=count: total / max(count, 1)
        results[source] = mean(loss), int(count), dict(zip(sums, map(mean, rest), strict=True))
    dist.free_gathered(model)
    return results


def run(options: Options) -> None:
    """Train in the job that torchrun has started, or in one of this process alone."""
    with dist.joined(options.device, options.sharding) as world:
        train(options, world)


def main() -> None:
    run(cli.parse(Options, prog="train.py", description="Train a model: one process, or as many as torchrun starts."))


if __name__ == "__main__":
    cli.run(main)
