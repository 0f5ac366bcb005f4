"""Text that models are trained on, and the held-out windows of it that all of them are measured on.

Windows are cut as train.py cuts its own (solar/data.py) and spread evenly over the held-out text. Every second one is
for the report; some of the others serve to choose between runs: no window of the report has a say in the choice.

Shapes: N windows, T tokens.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from solar import shards
from solar.claims import Sample
from solar.corpus import Source, parse_source
from solar.losses import IGNORED
from solar.model import Transformer
from solar.tokenizer import Tokenizer
from solar.tokens import Manifest, Tokens

HOLDOUT = 0.02  # what the embedded base was trained with: with more it would be measured on what it has seen
ROWS = 16  # windows that are measured side by side


class Windows(NamedTuple):
    """Held-out windows of one source: (ids, labels), (N, T) each, -100 for what is not counted. sample describes those
    of the report."""

    sample: Sample
    report: tuple[Tensor, Tensor]
    choice: tuple[Tensor, Tensor]


class Text(NamedTuple):
    """What is trained on, as train.py takes it; what is measured; a line for each source that tells contents apart."""

    data: list[str]
    windows: list[Windows]
    identity: list[str]


def read_text(
    data: list[str], measured: list[str] | None, tokenizer: Tokenizer, cache: Path, vocab: int, length: int, count: int
) -> Text:
    """Tokenise a text, unless that has been done, and choose `count` windows of `length` tokens of each source for the
    report, and a quarter as many others. vocab: of the model.

    measured: other text, all of it, to measure on instead of what is held out of the data. Raises ValueError where
    there is too little, and for text that would be measured although it is trained on.
    """
    for text in measured or []:
        if any(overlap(text, other) for other in data):
            raise ValueError(f"--eval {text}: it is trained on; leave it out to measure on what is held out of it")
    sources, prepared = _prepare(data, tokenizer, cache, HOLDOUT)
    identity, split = _identity(sources, prepared), "heldout"
    if measured is not None:
        sources, prepared = _prepare(measured, tokenizer, cache, 0.0)
        identity += [f"measured {line}" for line in _identity(sources, prepared)]
        split = "train"
    whole = sum(source.share for source in sources)
    windows = []
    for source, directory in zip(sources, prepared, strict=True):
        tokens = Tokens(directory, split, vocab)
        windows.append(choose_windows(tokens, source.path, source.share / whole, length, count))
    return Text(data, windows, identity)


def _prepare(data: list[str], tokenizer: Tokenizer, cache: Path, holdout: float) -> tuple[list[Source], list[Path]]:
    sources = [parse_source(text) for text in data]
    return sources, [shards.prepare(source, tokenizer, cache, holdout) for source in sources]


def overlap(one: str, other: str) -> bool:
    """Whether of two texts, as --data takes them, one is the other or lies in it, however their paths are written."""
    a, b = (Path(parse_source(text).path).resolve() for text in (one, other))
    return a.is_relative_to(b) or b.is_relative_to(a)


def _identity(sources: Sequence[Source], prepared: Sequence[Path]) -> list[str]:
    return [
        f"{Path(source.path).name} {Manifest(directory).content()} x {source.share:g}"
        for source, directory in zip(sources, prepared, strict=True)
    ]


def choose_windows(tokens: Tokens, name: str, weight: float, length: int, count: int) -> Windows:
    """At most 2 x count windows of a split, evenly spread. ValueError for windows of fewer than two documents."""
    stride = length - 1
    there = -(-max(len(tokens) - 1, 0) // stride)
    taken = min(2 * count, there)
    starts = [i * there // taken * stride for i in range(taken)]
    ids = torch.zeros(taken, length, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORED)
    for row, start in enumerate(starts):
        read = torch.from_numpy(tokens.read(start, min(start + length, len(tokens))))
        ids[row, : len(read)] = labels[row, : len(read)] = read
    documents = np.array([len(tokens.beginnings(0, start + 1)) for start in starts[::2]])
    if (different := len(np.unique(documents))) < 2:
        raise ValueError(
            f"{name}: {len(tokens):,} tokens to measure on, with windows of {different} documents; at least 2 are "
            "needed for an interval: give more text, or another with --eval"
        )
    counted = (labels[::2, 1:] != IGNORED).sum(dim=1).numpy()  # the first token of a window has nothing before it
    sample = Sample(name, weight, counted, documents)
    return Windows(sample, (ids[::2], labels[::2]), (ids[1::8], labels[1::8]))


@torch.inference_mode()
def nats(model: Transformer, ids: Tensor, labels: Tensor) -> list[float]:
    """What each of the windows costs: the sum of -log p(token | those before it in the window), in fp64."""
    device, costs = model.model.embed_tokens.weight.device, []
    for first in range(0, len(ids), ROWS):
        rows = slice(first, first + ROWS)
        costs += (-model(ids[rows].to(device), labels=labels[rows].to(device)).double().sum(dim=1)).tolist()
    return costs
