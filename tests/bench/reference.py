"""What `solar.reference` costs beside bare forward passes over the same rows: `python -m tests.bench.reference`.

Both score random pairs with the same model of 8 million parameters on this machine's CPU, in turns.
"""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from solar import dist, reference
from solar.checkpoint import CheckpointReader, save_model
from solar.examples import Example, collate
from solar.logps import FORMAT, Writer
from solar.model import Transformer
from solar.packing import pack
from tests.bench.train_costs import config_of

PAIRS, LENGTH, BATCH, TURNS = 48, 512, 4, 5


class Random:
    """Pairs of random ids: prompts of 20 to 119 tokens, answers of 20 to 119."""

    def __init__(self, vocab_size: int):
        draw = np.random.default_rng(0)
        ids = lambda: draw.integers(vocab_size, size=draw.integers(20, 120))
        self.pairs = []
        for _ in range(PAIRS):
            prompt = ids()
            texts = [np.concatenate([prompt, ids()]) for _ in range(2)]
            self.pairs.append([Example(text, np.arange(len(text)) >= len(prompt)) for text in texts])
        self.example = self.pairs.__getitem__

    def __len__(self):
        return PAIRS

    def lengths(self):
        return np.array([len(chosen.ids) + len(rejected.ids) for chosen, rejected in self.pairs])


def main() -> None:
    world = dist.setup("cpu")
    config = config_of("8M", LENGTH)
    with tempfile.TemporaryDirectory() as folder:
        plain = Transformer(config).requires_grad_(False)
        plain.init_weights(seed=0)
        reader = CheckpointReader(save_model(plain, Path(folder) / "model"))
        model = reference.build(reader, torch.float32, world)
        pairs = Random(config.vocab_size)
        units, starts = pack(pairs.lengths(), LENGTH, seed=0)
        rows = np.split(units, starts[1:-1])
        batches = [
            collate([[text for i in row for text in pairs.example(i)] for row in rows[first : first + BATCH]], LENGTH)
            for first in range(0, len(rows), BATCH)
        ]
        tokens = sum(batch["input_ids"].numel() for batch in batches)
        full = pairs.lengths().sum() / tokens

        def bare(which) -> float:
            start = time.perf_counter()
            with torch.no_grad():
                for batch in batches:
                    which(batch["input_ids"], batch["labels"], batch["document_ids"])
            return time.perf_counter() - start

        def whole(turn: int) -> float:
            start = time.perf_counter()
            header = {"format": FORMAT, "turn": turn, "pairs": PAIRS}
            writer = Writer(Path(folder) / f"{turn}.ref.jsonl", header)
            for results in reference.score(model, pairs, LENGTH, BATCH, world):
                writer.add(results)
            writer.publish()
            writer.close()
            return time.perf_counter() - start

        bare(plain), bare(model), whole(-1)
        taken = [(bare(plain), bare(model), whole(turn)) for turn in range(TURNS)]
        of_plain, of_sharded = ([times[2] / times[i] for times in taken] for i in (0, 1))
        print(
            f"{PAIRS} pairs in {len(rows)} rows of {LENGTH}, {full:.0%} full, {tokens:,} tokens; {BATCH} rows at once"
        )
        print(f"the pass: {statistics.median(times[2] for times in taken):.2f} s (median of {TURNS})")
        for name, ratios in (("a plain model's forward passes", of_plain), ("the sharded model's", of_sharded)):
            print(f"beside {name}: x {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    dist.close()


if __name__ == "__main__":
    main()
