"""Batches of examples for instruction tuning and preference training: many examples in a row, none sees another.

Examples (solar/examples.py) are laid side by side into rows of T tokens, each a document of its own with positions of
its own, so a row costs what its tokens cost and the loss is that of the examples one by one (arXiv:2107.02027). The
rows are made once for a dataset; which of them a step sees is a function of (seed, step), as in pretraining.

Weights decide what an epoch is. Where no source has one, all are one pool, and an epoch sees every example exactly
once. Where every source has one, the weights are shares of the rows, as in pretraining: then a small source may be
seen several times while a large one is seen in part.

Shapes: B rows, T tokens in a row, P pairs in a row.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from solar.corpus import Source
from solar.data import Batches, check_sources
from solar.examples import LEARNED, Chats, Example, Pairs, collate
from solar.losses import IGNORED
from solar.packing import pack
from solar.tokenizer import StreamDecoder, Tokenizer
from solar.tokens import SPLITS


class Rows(NamedTuple):
    """Rows of the examples of some sources, all of one split: `pack`'s answer over their joined list."""

    split: str
    numbers: np.ndarray  # (examples, 2): source, and index in it
    units: np.ndarray
    starts: np.ndarray
    tokens: int

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, index: int) -> "Row":
        return Row(self.split, self.numbers[self.units[self.starts[index] : self.starts[index + 1]]].tolist())


class Row(NamedTuple):
    """The examples of a row, as (source, index); none of them in a row of padding."""

    split: str
    examples: list[tuple[int, int]]


class ChatBatches(Batches):
    """The batches of instruction tuning.

    A batch is int64 tensors (B, T): input_ids; labels, the same ids where they are learned, -100 elsewhere;
    document_ids, which count the examples of a row from 0. What is left of a row is padding: id 0, a document of its
    own, not learned.

    sources, directories: what `parse_source` and `examples.prepare` gave. pack_rows=False gives each example a row of
    its own, still of T tokens. Raises ValueError if some sources have a weight and others have none, and for a source
    without an example to train on, or with one that is longer than a row.
    """

    kind: type[Chats] = Chats
    unit = "examples"

    def __init__(
        self,
        sources: Sequence[Source],
        directories: Sequence[Path],
        vocab_size: int,
        sequence_length: int,
        batch_size: int,
        seed: int,
        pack_rows: bool = True,
    ):
        names = check_sources(sources)
        weighted = sources[0].weight is not None
        self.sources, self.sequence_length, self.pack_rows = sources, sequence_length, pack_rows
        self.examples = {
            split: [self.kind(directory, split, vocab_size) for directory in directories] for split in SPLITS
        }
        for source, examples in zip(sources, self.examples["train"], strict=True):
            if not len(examples):
                raise ValueError(f"{source.path} has no {self.unit} to train on; {'; '.join(examples.tally().lines())}")
        everything = range(len(sources))
        self.weighted, self._seed = weighted, seed
        self.train = [self._pack("train", [k] if weighted else everything) for k in (everything if weighted else [0])]
        self.held_out = [self._pack("heldout", [k]) for k in everything]
        shares = [source.share for source in sources] if weighted else [1.0]
        super().__init__(names, [len(rows) for rows in self.train], shares, batch_size, seed)

    def _pack(self, split: str, sources: Sequence[int]) -> Rows:
        parts = [self.examples[split][k] for k in sources]
        lengths = np.concatenate([examples.lengths() for examples in parts])
        numbers = np.concatenate(
            [np.stack([np.full(len(e), k), np.arange(len(e))], axis=1) for k, e in zip(sources, parts, strict=True)]
        )
        if (longest := lengths.max(initial=0)) > self.sequence_length:
            raise ValueError(
                f"{parts[0].directory} holds {self.unit} of {longest} tokens, more than a row of "
                f"{self.sequence_length}: prepare it for this sequence length"
            )
        if not len(lengths) or not self.pack_rows:
            units, starts = np.arange(len(lengths)), np.arange(len(lengths) + 1)
        else:
            units, starts = pack(lengths, self.sequence_length, self._seed)
        return Rows(split, numbers, units, starts, int(lengths.sum()))

    def identity(self) -> dict:
        data = [
            f"{Path(source.path).name} {examples.manifest.content()}" + self.weighted * f" x {source.share:g}"
            for source, examples in zip(self.sources, self.examples["train"], strict=True)
        ]
        return {
            "tokenizer": self.examples["train"][0].manifest.tokenizer[:16],
            "data": data,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "sequence_length": self.sequence_length,
            "packed": self.pack_rows,
        }

    def _row(self, source: int, index: int) -> Row:
        return self.train[source].row(index)

    def _held_out(self) -> Iterator[tuple[str, int, Callable, Row]]:
        for name, rows in zip(self.names, self.held_out, strict=True):
            yield name, len(rows), rows.row, Row("heldout", [])

    def _conversations(self, row: Row) -> list[Example]:
        return [part for k, i in row.examples for part in self.examples[row.split][k].example(i)]

    def _batch(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        return collate([self._conversations(row) for row in rows], self.sequence_length)

    def describe(self, rows: int) -> list[str]:
        lines = []
        for k, source in enumerate(self.sources):
            train, held_out = (self.examples[split][k] for split in SPLITS)
            tally = train.tally()
            learned, _ = tally.pop(LEARNED, (0, ""))
            lines.append(
                f"{source.path}: {len(train):,} {self.unit} to train on, {len(held_out):,} held out; "
                f"{train.lengths().sum():,} tokens, of which {learned:,} are learned"
            )
            tally.merge(held_out.tally())
            tally.pop(LEARNED, None)
            lines += [f"{source.path}: {line}" for line in tally.lines()]
            for path, skipped in train.manifest.skipped.items():
                lines += [f"{path}: skipped, {line}" for line in skipped.lines()]
        filled = sum(source.tokens for source in self.train) / (self.epoch_rows * self.sequence_length)
        lines.append(
            f"{self.epoch_rows:,} rows of {self.sequence_length:,} tokens in an epoch, {filled:.1%} filled; "
            f"{rows / self.epoch_rows:.2f} epochs"
        )
        return lines


class PairBatches(ChatBatches):
    """The batches of preference training: as `ChatBatches`, with the two conversations of a pair side by side.

    Documents 2j and 2j+1 of a row are the chosen and the rejected one of its pair j. Further tensors (B, P), P the most
    pairs of a row in this batch and at least 1: pairs, bool, which of them there are; and if `reference` was given
    reference_chosen and reference_rejected, fp64, 0 where there is no pair.

    reference: for each source {"train": (pairs, 2), "heldout": (pairs, 2)}, the log-probabilities of the chosen and the
    rejected answers under the reference model, in the order of the examples.
    """

    kind, unit = Pairs, "pairs"

    def __init__(self, *args, reference: Sequence[dict[str, np.ndarray]] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        assert reference is None or len(reference) == len(self.sources)
        self.reference = reference
        for k, values in enumerate([] if reference is None else reference):
            for split in SPLITS:
                wanted = (len(self.examples[split][k]), 2)
                if values[split].shape != wanted:
                    raise ValueError(
                        f"{self.names[k]}: reference log-probabilities of shape {values[split].shape} for {split}, "
                        f"but {wanted} are needed; compute them again for this data"
                    )

    def identity(self) -> dict:
        tables = [values[split].tobytes() for values in self.reference or [] for split in SPLITS]
        return super().identity() | {"reference": hashlib.sha256(b"".join(tables)).hexdigest()[:16]}

    def _batch(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        batch = super()._batch(rows)
        shape = len(rows), max([1, *(len(row.examples) for row in rows)])
        pairs, logps = np.zeros(shape, bool), np.zeros((*shape, 2))
        for b, row in enumerate(rows):
            pairs[b, : len(row.examples)] = True
            for j, (k, i) in enumerate([] if self.reference is None else row.examples):
                logps[b, j] = self.reference[k][row.split][i]
        batch["pairs"] = torch.from_numpy(pairs)
        if self.reference is not None:
            batch["reference_chosen"], batch["reference_rejected"] = torch.from_numpy(logps).unbind(-1)
        return batch


COLOURED = "\033[32m", "\033[0m"  # for a terminal


def show(batch: dict[str, Tensor], tokenizer: Tokenizer, rows: int = 1, marks: tuple[str, str] = ("[[", "]]")) -> str:
    """The first rows of a batch as text: what is learned stands between the marks, each document below a line.

    Control tokens are written by name, though they add nothing to a text.
    """
    lines = []
    for b in range(min(rows, len(batch["input_ids"]))):
        ids, learned = batch["input_ids"][b], batch["labels"][b] != IGNORED
        documents = batch.get("document_ids", torch.zeros_like(batch["input_ids"]))[b]
        for document in documents.unique_consecutive().tolist():
            here = documents == document
            if "pairs" in batch and document < 2 * batch["pairs"][b].sum():
                kind = f"pair {document // 2}, {('chosen', 'rejected')[document % 2]}"
            else:
                kind = f"document {document}"
            if not (ids[here].any() or learned[here].any()):
                lines.append(f"--- row {b}: {here.sum()} tokens of padding")
                continue
            lines.append(f"--- row {b}, {kind}: {here.sum()} tokens, {learned[here].sum()} learned")
            lines.append(_marked(ids[here].tolist(), learned[here].tolist(), tokenizer, marks))
    return "\n".join(lines)


def _marked(ids: list[int], learned: list[bool], tokenizer: Tokenizer, marks: tuple[str, str]) -> str:
    text, inside, stream = "", False, StreamDecoder(tokenizer)
    for i, now in zip(ids, learned, strict=True):
        if now != inside:
            text += stream.flush() + marks[inside]
        text, inside = text + (stream.push(i) if tokenizer.token_bytes(i) else tokenizer.piece(i)), now
    return text + stream.flush() + (marks[1] if inside else "")
