"""From the options of a run to its batches, one function for each kind of stage."""

from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from solar import corpus, data, examples, packed, reference, shards
from solar.checkpoint import CheckpointReader
from solar.tokenizer import Tokenizer


class Options(Protocol):
    """Of train.py's options those that decide what is learned from."""

    data: list[str]
    data_cache: str
    sequence_length: int
    batch_size: int
    seed: int
    holdout: float
    workers: int | None
    skip_bad_lines: bool
    document_mask: bool
    template: str
    too_long: str
    reference: list[str] | None
    show_batch: bool


class Job(NamedTuple):
    """What a stage makes its batches from. compute: the dtype of the forward pass."""

    options: Options
    reader: CheckpointReader
    tokenizer: Tokenizer
    compute: torch.dtype

    def sources(self) -> list[corpus.Source]:
        return [corpus.parse_source(text) for text in self.options.data]

    def shape(self) -> tuple[int, int, int, int]:
        """What all batches are told: the vocabulary's size, tokens in a row, rows in a batch, the seed of the order."""
        options = self.options
        return self.reader.config.vocab_size, options.sequence_length, options.batch_size, options.seed


def token_batches(job: Job) -> data.TokenBatches:
    """Pretraining: documents joined into one stream per source, cut into sequences."""
    options, sources = job.options, job.sources()
    prepared = [
        shards.prepare(
            source, job.tokenizer, Path(options.data_cache), options.holdout, options.workers, options.skip_bad_lines
        )
        for source in sources
    ]
    return data.TokenBatches(sources, prepared, *job.shape(), options.document_mask)


def packed_chats(job: Job) -> packed.ChatBatches:
    """Instruction tuning: whole conversations, as many in a row as fit, of which the answers are learned."""
    sources = job.sources()
    return packed.ChatBatches(sources, _examples(job, sources, pairs=False), *job.shape())


def preference_pairs(job: Job) -> packed.PairBatches:
    """Preference training: pairs of answers, with what the reference model thinks of them, which is read from files.

    To be shown they need no reference: who looks at them first has not paid for it in vain.
    """
    options, sources = job.options, job.sources()
    prepared = _examples(job, sources, pairs=True)
    if options.show_batch:
        return packed.PairBatches(sources, prepared, *job.shape())
    files = options.reference or [None] * len(sources)
    if len(files) != len(sources):
        raise ValueError(f"--reference names {len(files)} files for {len(sources)} of --data: one for each is needed")
    tables = [
        reference.reference_for(file, text, directory, job.reader, job.tokenizer, options, job.compute)
        for file, text, directory in zip(files, options.data, prepared, strict=True)
    ]
    return packed.PairBatches(sources, prepared, *job.shape(), reference=tables)


def _examples(job: Job, sources: list[corpus.Source], pairs: bool) -> list[Path]:
    options = job.options
    return [
        examples.prepare(
            source, job.tokenizer, Path(options.data_cache), options.holdout, options.template,
            options.sequence_length, pairs, options.too_long, options.workers, options.skip_bad_lines,
        )
        for source in sources
    ]  # fmt: skip
