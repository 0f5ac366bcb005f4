"""What a frozen model thinks of both answers of every pair, computed once and kept in a file:

    python -m solar.reference --model DIR --data PAIRS.jsonl                 (or under torchrun, on many GPUs)
    python -m solar.reference --model DIR --data A.jsonl B.jsonl --rank-chunks

DPO compares the policy with a reference that never changes (arXiv:2305.18290). Its log-probabilities are two numbers a
pair, so training reads them from a file and holds no second model. The file (solar/logps.py) says what they were
computed from: model, tokenizer, pairs, template, lengths, dtype. Where any of it differs they are computed again.

sDPO (arXiv:2403.19270) trains on chunks of the pairs in turn, easy ones first, each with the model of the chunk before
as its reference. How easy a chunk is, the starting model says: in what share of its pairs it already thinks the chosen
answer the more probable one.

Shapes: B rows, T tokens in a row, P pairs in a row, N pairs in the data.
"""

import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from kernels import CHOICES, select
from solar import cli, dist
from solar.checkpoint import CheckpointReader, parse_dtype
from solar.corpus import parse_source
from solar.examples import LEARNED, TOO_LONG, Example, Pairs, collate, prepare
from solar.logps import FORMAT, Writer, current, default_path, read_reference
from solar.losses import pair_logps
from solar.model import Transformer
from solar.packing import pack
from solar.shards import fingerprint
from solar.tally import Tally
from solar.tokenizer import TEMPLATES, Tokenizer
from solar.tokens import SPLITS

PROGRESS_SECONDS = 10

# ------------------------------------------------------------------------------------------------ the pass


class BothSplits:
    """All pairs of a directory that `examples.prepare` gave: those to train on, and behind them the held-out ones.

    trained: how many the first are. content: 16 hexadecimal digits that tell them from any others. Raises as
    `examples.Pairs` does.
    """

    def __init__(self, directory: Path, vocab_size: int):
        self.parts = [Pairs(directory, split, vocab_size) for split in SPLITS]
        self.trained, self.content = len(self.parts[0]), self.parts[0].manifest.content()

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def lengths(self) -> np.ndarray:
        """(N,) tokens of both conversations of each pair."""
        return np.concatenate([part.lengths() for part in self.parts])

    def example(self, index: int) -> list[Example]:
        """The chosen and the rejected conversation of a pair."""
        trained, held_out = self.parts
        return trained.example(index) if index < self.trained else held_out.example(index - self.trained)

    def left_out(self) -> Tally:
        """What of the file is not among the pairs, or not whole."""
        manifest, total = self.parts[0].manifest, Tally()
        for tally in (*manifest.skipped.values(), *manifest.counts.values()):
            total.merge(tally)
        total.pop(LEARNED, None)
        return total


@torch.no_grad()
def score(
    model: Transformer,
    pairs: BothSplits,
    sequence_length: int,
    batch_size: int,
    world: dist.World,
    done: Sequence[bool] | None = None,
) -> Iterator[list[tuple[int, float, float]]]:
    """(index, log p(chosen answer), log p(rejected answer)) of every pair, a batch of each rank at a time.

    The sums over the learned tokens of an answer, in nats; they depend neither on the batch size nor on what shares a
    row, but for rounding. Batches of which all pairs are `done` are left out; the others are the same ones, so that a
    run that goes on gets the bits of one that was not interrupted. Every rank gets all results. Neither this nor the
    model draws a random number.
    """
    units, starts = pack(pairs.lengths(), sequence_length, seed=0)
    rows = [row.tolist() for row in np.split(units, starts[1:-1])]
    for first in range(0, len(rows), batch_size * world.size):
        batch_rows = rows[first : first + batch_size * world.size]
        if done is not None and all(done[i] for row in batch_rows for i in row):
            continue
        mine = batch_rows[world.rank :: world.size]
        # A rank without rows takes part all the same: sharded models compute in step.
        texts = [[text for i in row for text in pairs.example(i)] for row in mine or [[]]]
        longest = max(sum(len(text.ids) for text in row) for row in texts)
        batch = collate(texts, max(longest, 2))
        batch = {name: tensor.to(world.device, non_blocking=True) for name, tensor in batch.items()}
        logps = model(batch["input_ids"], labels=batch["labels"], document_ids=batch["document_ids"])
        sides = pair_logps(logps, batch["document_ids"], max(map(len, mine), default=0))
        chosen, rejected = torch.stack(sides).tolist()
        results = [(i, chosen[b][j], rejected[b][j]) for b, row in enumerate(mine) for j, i in enumerate(row)]
        yield [result for rank in dist.from_all_ranks(results, world) for result in rank]


def build(reader: CheckpointReader, compute: torch.dtype, world: dist.World) -> Transformer:
    """The frozen model, sharded over the ranks, with its weights; in evaluation mode, and without gradients."""
    with torch.device("meta"):
        model = Transformer(reader.config).to(compute).requires_grad_(False).eval()
    dist.shard(model, world, compute)
    dist.load_weights(model, reader, world)
    return model


# ------------------------------------------------------------------------------------------------ the command


def header_of(reader: CheckpointReader, tokenizer: Tokenizer, pairs: BothSplits, options, compute: torch.dtype) -> dict:
    """All that decides what stands in a reference file, and how many pairs there are.

    options: with template, sequence_length, too_long and holdout. The first in the order of the header are those that
    explain a difference best: `data`, which follows from them too, says no more than that the pairs are others.
    """
    return {
        "format": FORMAT,
        "model": reader.fingerprint(whole=True),
        "tokenizer": fingerprint(tokenizer)[:16],
        "template": options.template,
        "sequence_length": options.sequence_length,
        "too_long": options.too_long,
        "holdout": options.holdout,
        "data": pairs.content,
        "dtype": str(compute).removeprefix("torch."),
        "pairs": len(pairs),
    }


def command_for(model: str | Path, data: str, options, compute: torch.dtype) -> str:
    """The command that makes the reference file of a file of pairs. options: as `reference_for` takes them."""
    flags = {
        "model": model, "data": data, "template": options.template, "sequence-length": options.sequence_length,
        "too-long": options.too_long, "holdout": options.holdout,
        "dtype": {torch.bfloat16: "bf16", torch.float32: "fp32"}[compute],
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", shlex.quote(str(value)))]
    return " ".join(["python -m solar.reference", *words, *["--skip-bad-lines"] * options.skip_bad_lines])


def reference_for(
    path: str | Path | None, data: str, directory: Path, reader: CheckpointReader, tokenizer: Tokenizer, options,
    compute: torch.dtype,
) -> dict[str, np.ndarray]:  # fmt: skip
    """What training on a source of pairs needs of its reference: split -> (pairs, 2), as `packed.PairBatches` takes it.

    path: of the file, None for that beside the data. data: the source as it was given. directory: what
    `examples.prepare` made of it. options: with template, sequence_length, too_long, holdout and skip_bad_lines. Raises
    as `read_reference` does.
    """
    pairs = BothSplits(directory, reader.config.vocab_size)
    header = header_of(reader, tokenizer, pairs, options, compute)
    command = command_for(reader.path, data, options, compute)
    table = read_reference(path or default_path(parse_source(data).path), header, command)
    return dict(zip(SPLITS, np.split(table, [pairs.trained]), strict=True))


def compute(path: Path, header: dict, pairs: BothSplits, options, model: Transformer, world: dist.World) -> None:
    """Write the reference file of a preference set, going on where an interrupted run of the same header was."""
    writer = Writer(path, header) if world.rank == 0 else None
    try:
        table = dist.from_all_ranks(writer and writer.table, world)[0]
        done = ~np.isnan(table[:, 0])
        if writer and done.any():
            print(f"going on    {writer.partial} has {done.sum():,} of {len(pairs):,} pairs already")
        progress = Progress(len(pairs) - int(done.sum())) if writer else None
        for results in score(model, pairs, options.sequence_length, options.batch_size, world, done.tolist()):
            if writer:
                progress.advance(writer.add(results))
        if writer:
            writer.publish()
    finally:
        if writer:
            writer.close()


class Progress:
    """Pairs done and time left, a line on stderr every PROGRESS_SECONDS."""

    def __init__(self, total: int):
        self.total, self.done = total, 0
        self.start = self.shown = time.monotonic()

    def advance(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.shown >= PROGRESS_SECONDS:
            self.shown = now
            rate = self.done / (now - self.start)
            left = cli.human_seconds((self.total - self.done) / rate)
            print(
                f"pairs {self.done:,} of {self.total:,}  {rate:,.1f} a second  {left} left", file=sys.stderr, flush=True
            )


class Ease(NamedTuple):
    """How a model ranks the pairs of a chunk before it is trained on them."""

    accuracy: float  # share of pairs whose chosen answer is the more probable one; a tie is wrong
    gamma: float  # mean of log p(chosen) - log p(rejected)
    pairs: int


def ease(table: np.ndarray) -> Ease:
    """(N, 2) log-probabilities of chosen and rejected answers -> how easy they are (arXiv:2403.19270)."""
    gammas = table[:, 0] - table[:, 1]
    return Ease(float((gammas > 0).mean()), float(gammas.mean()), len(table))


def easy_to_hard(eases: dict[str, Ease]) -> list[str]:
    """The chunks by accuracy, the highest first; of equal ones that with the higher gamma."""
    return sorted(eases, key=lambda chunk: (-eases[chunk].accuracy, -eases[chunk].gamma))


@dataclass
class Options:
    data: list[str] = cli.flag(
        help="files of pairs, a reference file for each, with a limit as train.py takes it", metavar="PAIRS.jsonl"
    )
    model: str = cli.flag("out/sft/model", help="directory of the reference model", metavar="DIR")
    out: str | None = cli.flag(None, help="file to write, for a single --data (default: PAIRS.ref.jsonl beside it)")
    rank_chunks: bool = cli.flag(
        False, help="write nothing, but print the files of --data from easy to hard, all of them in the last line"
    )
    template: Literal[tuple(TEMPLATES)] = cli.flag("solar", help="how a conversation becomes text")
    sequence_length: int = cli.flag(1024, help="tokens in a row, which hold as many pairs as fit")
    batch_size: int = cli.flag(8, help="rows that a rank holds at once")
    too_long: Literal[TOO_LONG] = cli.flag("drop", help="what to do with pairs whose two texts are longer than a row")
    holdout: float = cli.flag(0.01, help="share of the pairs that is held out; as training will have it")
    skip_bad_lines: bool = cli.flag(False, help="count lines that cannot be used instead of stopping")
    data_cache: str = cli.flag("out/data", help="directory that keeps tokenised data", metavar="DIR")
    workers: int | None = cli.flag(None, help="processes that tokenise (default: one a core)")
    device: str = cli.flag("auto", help="cuda, cpu, or auto: a GPU if there is one")
    dtype: Literal["auto", "bf16", "fp32"] = cli.flag("auto", help="to compute in; auto: bf16 on a GPU, fp32 elsewhere")
    kernels: Literal[CHOICES] = cli.flag("auto", help="which implementation of the operations")


def make(options: Options, world: dist.World) -> None:
    """Write the reference file of each of the files of pairs, or print these from easy to hard."""
    say = print if world.rank == 0 else lambda *_, **__: None
    reader = check(options)
    select(options.kernels)
    dtype = compute_dtype(options.dtype, world)
    tokenizer, model, eases, outs = Tokenizer(options.model), None, {}, []
    for text in options.data:
        source = parse_source(text)
        directory = prepare(
            source, tokenizer, Path(options.data_cache), options.holdout, options.template, options.sequence_length,
            pairs=True, too_long=options.too_long, workers=options.workers, skip_bad_lines=options.skip_bad_lines,
        )  # fmt: skip
        pairs = BothSplits(directory, reader.config.vocab_size)
        say(
            "\n            ".join([f"pairs       {len(pairs):,} of {source.path}", *pairs.left_out().lines()]),
            flush=True,
        )
        header = header_of(reader, tokenizer, pairs, options, dtype)
        out = Path(options.out or default_path(source.path))
        table, why = dist.from_all_ranks(current(out, header) if world.rank == 0 else None, world)[0]
        if table is None and model is None:
            model = build(reader, dtype, world)
        if options.rank_chunks:
            eases[text] = ease(score_all(model, pairs, options, world) if table is None else table)
        elif table is not None:
            say(f"up to date  {out}", flush=True)
        else:
            say(f"computing   {out}" + (f"; {why}" if why else ""), flush=True)
            compute(out, header, pairs, options, model, world)
        outs.append(str(out))
    if options.rank_chunks:
        outs = easy_to_hard(eases)
        for text in outs:
            accuracy, gamma, count = eases[text]
            say(f"{text}: accuracy {accuracy:.1%}, gamma {gamma:.2f}, {count:,} pairs")
    say(" ".join(map(shlex.quote, outs)))


def score_all(model: Transformer, pairs: BothSplits, options: Options, world: dist.World) -> np.ndarray:
    """(N, 2): what `score` gives, kept in memory."""
    table = np.empty((len(pairs), 2))
    for results in score(model, pairs, options.sequence_length, options.batch_size, world):
        for index, *values in results:
            table[index] = values
    return table


def compute_dtype(name: str, world: dist.World) -> torch.dtype:
    return parse_dtype(name if name != "auto" else "bf16" if world.device.type == "cuda" else "fp32")


def check(options: Options) -> CheckpointReader:
    """The model's reader. ValueError for options that cannot be."""
    reader = CheckpointReader(options.model)
    for name, least in (("sequence_length", 2), ("batch_size", 1)):
        if getattr(options, name) < least:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} {getattr(options, name)}: at least {least} is needed")
    if not 0 <= options.holdout <= 1:
        raise ValueError(f"--holdout {options.holdout}: a share between 0 and 1 is needed")
    if options.sequence_length > reader.config.max_position_embeddings:
        raise ValueError(
            f"--sequence-length {options.sequence_length}: the model has room for "
            f"{reader.config.max_position_embeddings} positions (max_position_embeddings of {options.model}); give a "
            "shorter one"
        )
    if options.out and (options.rank_chunks or len(options.data) > 1):
        why = "--rank-chunks writes nothing" if options.rank_chunks else "each of --data has a reference of its own"
        raise ValueError(f"--out {options.out}: {why}; leave it out")
    if twice := {path for path in options.data if options.data.count(path) > 1}:
        raise ValueError(f"--data {min(twice)} is given twice")
    written: dict[Path, str] = {}
    for text in [] if options.rank_chunks else options.data:
        out = Path(options.out or default_path(parse_source(text).path)).resolve()
        if (other := written.setdefault(out, text)) != text:
            raise ValueError(f"--data {other} and {text} have one reference file, {out.name}; rename one of them")
        if out == Path(parse_source(text).path).resolve():
            raise ValueError(f"--out {options.out} is the file of pairs itself; give another one")
    return reader


def run(options: Options) -> None:
    """Compute in the job that torchrun has started, or in one of this process alone."""
    with dist.joined(options.device) as world:
        make(options, world)


def main() -> None:
    run(cli.parse(Options, prog="python -m solar.reference", description="Keep what a model thinks of answers."))


if __name__ == "__main__":
    cli.run(main)
