"""Token shards to training batches, and the command that makes shards of text:

    python -m solar.data --tokenizer DIR --out DIR FILES...

**The order is a function, not a state.** A stream of ids is cut into windows of T tokens. Nothing shuffles a list of
them: the i-th window to be drawn is computed from i, by a permutation that is a cipher on the numbers 0..N-1, and which
source a draw comes from, by a fixed pattern of the weights. So what a step sees depends on (seed, step) and on nothing
else, not on ranks, workers or interruptions; a checkpoint needs to keep the step alone, and any step can be looked at
by itself. `Batches` is this order; the batches of pretraining are here, those of conversations in solar/packed.py.

Shapes: B sequences, T tokens in a sequence.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from solar import cli
from solar.corpus import Corpus, Source
from solar.losses import IGNORED
from solar.permutation import permutation
from solar.shards import tokenise
from solar.tokenizer import Tokenizer
from solar.tokens import SPLITS, Tokens, is_prepared

# ------------------------------------------------------------------------------------------------ order

PERIOD = 1024  # draws after which the pattern of the sources repeats


def interleave(weights: Sequence[float]) -> np.ndarray:
    """(PERIOD,) which source each draw of a period comes from: in proportion to the weights, evenly spread.

    Every source has at least one draw, so a share below 1 in PERIOD counts as that. Raises ValueError for more sources
    than draws.
    """
    if len(weights) > PERIOD:
        raise ValueError(f"{len(weights)} sources: at most {PERIOD} can be mixed; put files into one directory")
    shares = np.array(weights, np.float64) / max(weights)
    shares *= PERIOD / shares.sum()
    slots = np.maximum(shares.astype(np.int64), 1)
    while (missing := PERIOD - slots.sum()) != 0:  # one at a time to, or from, the source that is furthest off
        if missing > 0:
            slots[np.argmax(shares - slots)] += 1
        else:
            slots[np.argmax(np.where(slots > 1, slots - shares, -np.inf))] -= 1
    source = np.repeat(np.arange(len(slots)), slots)
    nth = np.arange(PERIOD) - (np.cumsum(slots) - slots)[source]
    return source[np.lexsort((source, (nth + 0.5) / slots[source]))]


class Batches:
    """What every step of a run learns from, as a function of the step: rows that are drawn from sources.

    A subclass says what a row is (`_row`, `_held_out`), and makes tensors of rows (`_batch`).
    names, sizes, shares: of each source, how many rows it has, and its share of the rows that are drawn.
    """

    def __init__(self, names: Sequence[str], sizes: Sequence[int], shares: Sequence[float], batch_size: int, seed: int):
        self.names, self.sizes, self.batch_size, self.seed = names, sizes, batch_size, seed
        self._pattern = interleave(shares)
        self._slots = np.bincount(self._pattern)
        drawn = np.cumsum(self._pattern[:, None] == np.arange(len(sizes)), axis=0)  # of each source, by each draw
        self._before = drawn[np.arange(PERIOD), self._pattern] - 1  # of the draw's own source, earlier in the period

    @property
    def epoch_rows(self) -> int:
        """Rows in one pass over the data. Sources with weights of their own do not end together: it is their sum."""
        return sum(self.sizes)

    def describe(self, rows: int) -> list[str]:
        """Lines that say what there is, how much of it a run of so many rows sees, and what was left out and why."""
        raise NotImplementedError

    def identity(self) -> dict:
        """What must not change when a run goes on, for its steps to see the samples that they would have seen."""
        raise NotImplementedError

    def _row(self, source: int, index: int):
        raise NotImplementedError

    def _held_out(self) -> Iterator[tuple[str, int, Callable, object]]:
        """(source, number of rows, index -> row, a row of padding) of every source."""
        raise NotImplementedError

    def _batch(self, rows: Sequence) -> dict[str, Tensor]:
        raise NotImplementedError

    def rows(self, step: int) -> list[tuple[int, int]]:
        """(source, number of its row) of each row of a step; steps count from 0.

        Draw g of the run is the n-th of its source, n known in closed form from the pattern. Of that source's N rows it
        takes number n % N, in the order that epoch n // N has for itself.
        """
        draw = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        period, place = np.divmod(draw, PERIOD)
        source = self._pattern[place]
        nth = period * self._slots[source] + self._before[place]
        epoch, nth = np.divmod(nth, np.array(self.sizes)[source])
        row = np.empty_like(nth)
        for k, e in {*zip(source.tolist(), epoch.tolist(), strict=True)}:
            here = (source == k) & (epoch == e)
            row[here] = permutation(nth[here], self.sizes[k], f"{self.seed} {k} {e}")
        return [*zip(source.tolist(), row.tolist(), strict=True)]

    def batch(self, step: int) -> dict[str, Tensor]:
        """The rows of a step, all of them, as tensors whose first dimension is B."""
        return self._batch([self._row(*row) for row in self.rows(step)])

    def steps(
        self, start: int, stop: int, rank: int, world_size: int, micro_batch_size: int
    ) -> Iterator[list[dict[str, Tensor]]]:
        """For each step in start..stop-1 the micro-batches of this rank; the next step's are made while one runs.

        Micro-batch j of rank r holds the rows from (j * world_size + r) * micro_batch_size on, so the ranks together
        see the rows in their order. Close it (`contextlib.closing`) to end its thread before the last step.
        Raises ValueError if the micro-batches of all ranks do not make up whole batches.
        """
        at_once = micro_batch_size * world_size
        if micro_batch_size < 1 or self.batch_size % at_once:
            raise ValueError(
                f"a batch of {self.batch_size} sequences cannot be dealt out as micro-batches of {micro_batch_size} to "
                f"{world_size} ranks: {self.batch_size} must be a multiple of {micro_batch_size} x {world_size}"
            )
        firsts = range(rank * micro_batch_size, self.batch_size, at_once)

        def micro_batches(step: int) -> list[dict[str, Tensor]]:
            rows = [self._row(*row) for row in self.rows(step)]
            return [self._batch(rows[first : first + micro_batch_size]) for first in firsts]

        return _ahead(micro_batches, range(start, stop))

    def heldout(
        self, batch_size: int, rank: int = 0, world_size: int = 1, limit: int | None = None
    ) -> Iterator[tuple[str, Iterator[dict[str, Tensor]]]]:
        """(source, this rank's batches of its held-out rows), for every source that has any, in a fixed order.

        With `limit` only so many rows, evenly spread. All ranks get equally many batches of batch_size rows, since
        sharded models compute in step: what is missing is rows of padding.
        """
        for name, count, row, padding in self._held_out():
            if count:
                taken = min(limit or count, count)
                rows = [row(i * count // taken) for i in range(taken)]
                rows += [padding] * (-taken % (batch_size * world_size))
                firsts = range(rank * batch_size, len(rows), batch_size * world_size)
                yield name, map(self._batch, [rows[first : first + batch_size] for first in firsts])


class TokenBatches(Batches):
    """The batches of pretraining: windows of a stream of text.

    A source's stream is cut into windows of T tokens that overlap by one. Labels stand at their inputs' places, and the
    first token of a window has nothing before it to be learned from; it is the last of the window before, where it was
    learned. So an epoch learns each token once, but the first of the stream and the last ones, fewer than T - 1, that
    fill no window.
    Held-out windows are those of training, in their order; the last one is padded, so every held-out token is counted
    once, but the first.

    A batch is int64 tensors (B, T): input_ids; labels, the same ids, but -100 where nothing is learned; with
    document_mask also document_ids, which count up along a row, and the first token of a document is not learned, since
    it sees nothing before it.

    Sources with weights have their shares of the windows that are drawn; without, each has as many as it holds, and
    an epoch sees every window once, but for what the period of the pattern rounds.

    sources, directories: what `parse_source` and `prepare` gave. Raises ValueError for a source given twice, for one
    without a window, and if some have a weight and others have none.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        directories: Sequence[Path],
        vocab_size: int,
        sequence_length: int,
        batch_size: int,
        seed: int,
        document_mask: bool = False,
    ):
        names = check_sources(sources)
        self.weighted = sources[0].weight is not None
        self.sources, self.sequence_length, self.document_mask = sources, sequence_length, document_mask
        self.train, self.held_out = (
            [Tokens(directory, split, vocab_size) for directory in directories] for split in SPLITS
        )
        self.windows = [(len(tokens) - 1) // (sequence_length - 1) for tokens in self.train]
        for source, tokens, windows in zip(sources, self.train, self.windows, strict=True):
            if windows < 1:
                raise ValueError(
                    f"{source.path} has {len(tokens)} tokens to train on, fewer than a sequence of {sequence_length}: "
                    "give more text, or a lower --sequence-length"
                )
        shares = [source.share for source in sources] if self.weighted else self.windows
        super().__init__(names, self.windows, shares, batch_size, seed)

    def describe(self, rows: int) -> list[str]:
        lines = []
        for k, name in enumerate(self.names):
            share, tokens = self._slots[k] / PERIOD, len(self.train[k])
            lines.append(
                f"{name}: {tokens:,} tokens to train on, {len(self.held_out[k]):,} held out; {self.windows[k]:,} "
                f"sequences, {share:.1%} of those drawn, {share * rows / self.windows[k]:.2f} passes"
            )
        return lines

    def identity(self) -> dict:
        data = [
            f"{Path(source.path).name} {tokens.manifest.content()}" + self.weighted * f" x {source.share:g}"
            for source, tokens in zip(self.sources, self.train, strict=True)
        ]
        return {
            "tokenizer": self.train[0].manifest.tokenizer[:16],
            "data": data,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "sequence_length": self.sequence_length,
        }

    def _row(self, source: int, index: int) -> tuple[Tokens, int]:
        return self.train[source], index * (self.sequence_length - 1)

    def _held_out(self) -> Iterator[tuple[str, int, Callable, tuple[Tokens, int]]]:
        stride = self.sequence_length - 1
        for name, tokens in zip(self.names, self.held_out, strict=True):
            count = -(-max(len(tokens) - 1, 0) // stride)
            yield name, count, lambda i, tokens=tokens: (tokens, i * stride), (tokens, len(tokens))

    def _batch(self, rows: Sequence[tuple[Tokens, int]]) -> dict[str, Tensor]:
        """Windows as (tokens, start); what lies behind the end of the tokens is padding, which is not learned."""
        shape = len(rows), self.sequence_length
        input_ids, labels, document_ids = np.zeros(shape, np.int64), np.full(shape, IGNORED), np.zeros(shape, np.int64)
        for row, (tokens, start) in enumerate(rows):
            ids = tokens.read(start, min(start + self.sequence_length, len(tokens)))
            input_ids[row, : len(ids)] = labels[row, : len(ids)] = ids
            if self.document_mask:
                begins = tokens.beginnings(start, start + len(ids))
                labels[row, begins] = IGNORED
                document_ids[row, begins] = 1
        batch = {"input_ids": input_ids, "labels": labels}
        if self.document_mask:
            batch["document_ids"] = document_ids.cumsum(axis=1)
        return {name: torch.from_numpy(array) for name, array in batch.items()}


def check_sources(sources: Sequence[Source]) -> list[str]:
    """The paths of the sources. Raises ValueError if one is given twice, or if some but not all have a weight."""
    names, places = [source.path for source in sources], [Path(source.path).resolve() for source in sources]
    if twice := [name for name, place in zip(names, places, strict=True) if places.count(place) > 1]:
        raise ValueError(f"{min(twice)} is given twice; give it once, with the sum of the weights")
    bare = [source.path for source in sources if source.weight is None]
    if bare and len(bare) < len(sources):
        weighted = next(source.path for source in sources if source.weight is not None)
        raise ValueError(
            f"{weighted} has a weight and {bare[0]} has none: give a weight to every source, for shares of the rows, "
            "or to none, to see all of each once an epoch"
        )
    return names


def _ahead(function: Callable[[int], list], numbers: range) -> Iterator[list]:
    """`function` of each number, computed in a thread while the caller works on the one before."""
    with ThreadPoolExecutor(1, "prefetch") as thread:
        upcoming = thread.submit(function, numbers[0]) if numbers else None
        for number in numbers:
            ready = upcoming.result()  # raises what the thread has raised
            upcoming = thread.submit(function, number + 1) if number + 1 in numbers else None
            yield ready


# ------------------------------------------------------------------------------------------------ the command


@dataclass
class Options:
    files: list[str] = cli.flag(
        positional=True, metavar="FILES", help="text, .jsonl, directories of them, or the corpora stdlib and problems"
    )
    tokenizer: str = cli.flag(help="model directory, or tokenizer file", metavar="DIR")
    out: str = cli.flag(help="directory to write", metavar="DIR")
    holdout: float = cli.flag(0.01, help="share of the documents that is held out")
    workers: int | None = cli.flag(None, help="processes that tokenise (default: one a core)")
    skip_bad_lines: bool = cli.flag(False, help="count jsonl lines that cannot be read instead of stopping")
    force: bool = cli.flag(False, help="replace the output if it exists")


def main() -> None:
    options = cli.parse(Options, prog="python -m solar.data", description="Tokenise text once, for training.")
    out = Path(options.out)
    cli.check_output(out, options.force)
    for path in options.files:
        if is_prepared(Path(path)):
            raise ValueError(f"{path} is tokenised already; give it to train.py --data as it is")
    tokenizer = Tokenizer(options.tokenizer)
    corpus = Corpus([Source(path) for path in options.files], options.skip_bad_lines)
    manifest = tokenise(corpus, tokenizer, out, options.holdout, options.workers, options.force)
    for split, (documents, tokens, _) in manifest.splits.items():
        print(f"{split:<7}  {documents:,} documents, {tokens:,} tokens")
    print(out)


if __name__ == "__main__":
    cli.run(main)
