"""Generation beside transformers' `generate`, in pairs: `python -m tests.bench.generation --peer PEER/bin/python`.

Both open the same random weights, which `save_model` wrote, and continue the same random prompts greedily. Two
processes stay alive and take turns, a whole generation each, so that a busy machine slows both. The figures are medians
over the turns: the time to the first token, and how much of it went into making the model ready for decoding; tokens/s
from the first token to the last; GB/s of weights read meanwhile, beside the most that this machine gave torch from
memory; ratios are those of the turns. Memory is the most that a process had resident (`VmHWM`), its mapped weights
included.

On a machine that others use, OMP_NUM_THREADS=1 and --cpu-seconds compare what each process was given of a core instead
of the time that passed.

Without --peer it only measures ours. A case has processes of its own: --batch 1 4 --prompt 64 8192 are four cases.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

from tests.bench.train_step import SHAPES, Worker, memory


def prompts_of(batch: int, length: int, vocabulary: int) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(vocabulary) for _ in range(length)] for _ in range(batch)]


def write_model(shape: str, dtype: str, longest: int, path: Path) -> None:
    import torch

    from solar.checkpoint import save_model
    from solar.config import ModelConfig
    from solar.model import Transformer

    D, L, H, K, F, V = SHAPES[shape]
    config = ModelConfig(
        model_type="llama", vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=L,
        num_attention_heads=H, num_key_value_heads=K, head_dim=D // H, max_position_embeddings=longest,
    )  # fmt: skip
    model = Transformer(config)
    model.init_weights(0)
    save_model(model, path, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype], force=True)


def serve(generate, clock) -> None:
    """For each line on stdin, run generate(count, note), which calls `note` after each token, and print its times.

    What `generate` returns are the seconds in which it made the model ready.
    """
    for line in sys.stdin:
        times: list[float] = []
        start = clock()
        ready = generate(int(line), lambda times=times: times.append(clock()))
        print(json.dumps([times[0] - start, times[-1] - times[0], ready, memory()]), flush=True)


def ours(path: str, batch: int, length: int, clock) -> None:
    from solar import cli, sampling
    from solar.checkpoint import load_model

    cli.keep_freed_memory()  # as generate.py does
    model = load_model(path)
    prompts = prompts_of(batch, length, model.config.vocab_size)
    prepare, spent = sampling.prepare, []

    def timed(*arguments):
        start = clock()
        made = prepare(*arguments)
        spent.append(clock() - start)
        return made

    sampling.prepare = timed

    def run(count: int, note) -> float:
        sampling.generate(model, prompts, count, on_token=lambda row, token: note() if row == 0 else None)
        return spent.pop()

    serve(run, clock)


def theirs(path: str, batch: int, length: int, clock) -> None:
    import torch
    from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    model.generation_config.eos_token_id = None
    input_ids = torch.tensor(prompts_of(batch, length, model.config.vocab_size))

    class Note(StoppingCriteria):
        def __init__(self, note):
            self.note = note

        def __call__(self, input_ids, scores, **more):
            self.note()
            return torch.zeros(len(input_ids), dtype=torch.bool)

    def run(count: int, note) -> float:
        made = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([Note(note)]),
        )
        assert made.shape == (batch, length + count)
        return 0.0

    serve(run, clock)


def bandwidth() -> float:
    """The most GB/s that torch's own operators read from memory here: a sum, and a product with one row."""
    import torch

    x = torch.zeros(1 << 27)
    matrix, row = x.view(1024, -1), torch.zeros(1, 1024)
    best = 0.0
    for read in (x.sum, lambda: row @ matrix):
        for _ in range(5):
            start = time.perf_counter()
            read()
            best = max(best, x.nbytes / (time.perf_counter() - start) / 1e9)
    return best


def weight_bytes(shape: str, dtype: str) -> int:
    """Bytes of weights that a decoding step reads."""
    D, L, H, K, F, V = SHAPES[shape]
    layer = 2 * D * D + 2 * D * D // H * K + 3 * D * F
    return (L * layer + V * D) * {"fp32": 4, "bf16": 2}[dtype]


def measure(options, shape: str, dtype: str, batch: int, length: int, path: Path) -> str:
    tail = [*["--cpu-seconds"] * options.cpu_seconds, "--serve"]
    serving = lambda what: ["-m", "tests.bench.generation", *tail, what, str(path), str(batch), str(length)]
    workers = {"ours": Worker([sys.executable, *serving("ours")])}
    if options.peer:
        workers["theirs"] = Worker([options.peer, *serving("theirs")])
    for worker in workers.values():
        worker.run(min(options.new, 32))  # reads the files, and all that is made only once
    turns = [{name: worker.run(options.new) for name, worker in workers.items()} for _ in range(options.turns)]
    for worker in workers.values():
        worker.close()
    line = f"{shape} {dtype}, {batch} x {length} + {options.new}:"
    for name in workers:
        first, rest, ready = (statistics.median(turn[name][at] for turn in turns) for at in range(3))
        steps = options.new - 1
        prepared = f" ({ready:.2f} to make the model ready)" if ready else ""
        line += (
            f"  {name} first token {first:.2f} s{prepared}, then "
            f"{batch * steps / rest:.1f} tokens/s, {steps * weight_bytes(shape, dtype) / rest / 1e9:.1f} GB/s, "
            f"{max(turn[name][3] for turn in turns) / 1e6:,.0f} MB;"
        )
    if options.peer:
        ratio = lambda time: statistics.median(time(turn["theirs"]) / time(turn["ours"]) for turn in turns)
        line += (
            f"  theirs over ours: first token {ratio(lambda turn: turn[0]):.2f}, reading the prompt "
            f"{ratio(lambda turn: turn[0] - turn[2]):.2f}, a token {ratio(lambda turn: turn[1]):.2f}"
        )
    return line


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.generation", description=__doc__.splitlines()[0])
    parser.add_argument("--peer", help="an interpreter that has transformers", metavar="PYTHON")
    parser.add_argument("--shape", nargs="+", default=["125M"], choices=SHAPES)
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1], help="prompts side by side")
    parser.add_argument("--prompt", nargs="+", type=int, default=[64], help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens that follow each prompt")
    parser.add_argument("--cpu-seconds", action="store_true", help="compare CPU time, not the time that passed")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--serve", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        what, path, batch, length = options.serve
        clock = time.process_time if options.cpu_seconds else time.perf_counter
        {"ours": ours, "theirs": theirs}[what](path, int(batch), int(length), clock)
        return
    print(f"memory gives {bandwidth():.1f} GB/s", flush=True)
    for shape in options.shape:
        for dtype in options.dtype:
            with tempfile.TemporaryDirectory() as folder:
                write_model(shape, dtype, max(options.prompt) + options.new, Path(folder) / "model")
                for batch in options.batch:
                    for length in options.prompt:
                        print(measure(options, shape, dtype, batch, length, Path(folder) / "model"), flush=True)


if __name__ == "__main__":
    main()
