"""A step of preference training beside one of instruction tuning, in pairs: `python -m tests.bench.preference`.

Both learn the same labels of the same packed rows, with the same random model: once for their likelihood, once as
pairs. Two processes stay alive and take turns, so that a busy machine slows both; the figure is the median of the
turns' ratios. Peak memory is the resident set of each process (`VmHWM`).

On a machine that others use, OMP_NUM_THREADS=1 and --cpu-seconds compare what each process was given of a core. What
the reference pass costs beforehand is in tests/bench/reference.py.
"""

import argparse
import statistics
import sys
from functools import partial

from tests.bench.train_step import Worker, serve

SHAPES = {"7.7M": "8M", "125M": "125M"}  # as train_costs calls them
BATCH, LENGTH, PAIRS = 8, 256, 2  # rows of a step, tokens of a row, pairs in it


def step_of(stage: str, shape: str, answer: float):
    """A function that takes one step of a stage. answer: share of the tokens that is learned."""
    import torch

    import train
    from solar import dist
    from tests.bench.train_costs import build, config_of

    world = dist.setup("cpu")
    config = config_of(SHAPES[shape], LENGTH)
    model, optimizer = build(config, world)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (BATCH, LENGTH), generator=generator)
    side = LENGTH // (2 * PAIRS)
    position = torch.arange(LENGTH).expand(BATCH, LENGTH)
    batch = {
        "input_ids": ids,
        "labels": ids.where(position % side >= max(round((1 - answer) * side), 1), -100),
        "document_ids": position // side,
        "pairs": torch.ones(BATCH, PAIRS, dtype=torch.bool),
        "reference_chosen": torch.full((BATCH, PAIRS), -8.0 * side, dtype=torch.float64),
        "reference_rejected": torch.full((BATCH, PAIRS), -8.0 * side, dtype=torch.float64),
    }
    settings = {"beta": 0.1, "loss": "sigmoid", "label_smoothing": 0.0, "sft_weight": 0.0}
    objective = {"sft": train.lm_objective, "dpo": partial(train.dpo_objective, **settings)}[stage]
    return lambda: train.training_step(model, optimizer, objective, [batch], 1e-5, 1.0, bool, world)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.preference", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", default=["7.7M"], choices=SHAPES)
    parser.add_argument("--answer", type=float, default=0.5, help="share of the tokens that is learned")
    parser.add_argument("--cpu-seconds", action="store_true", help="compare CPU time, not the time that passed")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--steps", type=int, default=4, help="in a turn")
    parser.add_argument("--serve", choices=["sft", "dpo"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(step_of(options.serve, options.shape[0], options.answer))
        return
    clock = int(options.cpu_seconds)
    for shape in options.shape:
        tail = ["--shape", shape, "--answer", str(options.answer)]
        command = lambda stage, tail=tail: [sys.executable, "-m", "tests.bench.preference", "--serve", stage, *tail]
        workers = {stage: Worker(command(stage)) for stage in ("sft", "dpo")}
        for worker in workers.values():
            worker.run(2)  # allocate
        one_turn = lambda workers=workers: {stage: worker.run(options.steps) for stage, worker in workers.items()}
        turns = [one_turn() for _ in range(options.turns)]
        for worker in workers.values():
            worker.close()
        seconds = {stage: statistics.median(turn[stage][clock] for turn in turns) / options.steps for stage in workers}
        ratios = [turn["dpo"][clock] / turn["sft"][clock] for turn in turns]
        memory = {stage: turns[-1][stage][2] for stage in workers}
        print(
            f"{shape}, {BATCH} x {LENGTH} tokens, {BATCH * PAIRS} pairs, {options.answer:.0%} learned:  "
            f"sft {1000 * seconds['sft']:.0f} ms, dpo {1000 * seconds['dpo']:.0f} ms, ratio "
            f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f});  peak memory "
            f"{memory['sft'] / 1e6:.0f} and {memory['dpo'] / 1e6:.0f} MB, ratio {memory['dpo'] / memory['sft']:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
