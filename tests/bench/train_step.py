"""A training step beside transformers', in pairs: `python -m tests.bench.train_step --peer PEER/bin/python`.

Both train the same random Llama on the same random tokens with fused AdamW and clipping. Two processes stay alive and
take turns, a step each, so that a busy machine slows both; the figure is the median over the turns of tokens/s, and the
ratio that of the turns, with its quartiles. Peak memory is the resident set of each process (`VmHWM`).

On a machine that others use, OMP_NUM_THREADS=1 and --cpu-seconds compare what each process was given of a core instead
of the time that passed.

Without --peer it only measures ours. --ranks puts two ranks with one thread each beside one rank with two; these are
started anew for each turn.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

SHAPES = {  # hidden, layers, heads, kv heads, intermediate, vocabulary
    "7.7M": (288, 6, 6, 2, 768, 4096),
    "125M": (768, 12, 12, 4, 2048, 32000),
}
BATCH, LENGTH = 8, 256


def memory() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def serve(step) -> None:
    """Take `N` on stdin, run that many steps, answer with seconds, CPU seconds and peak memory; until stdin ends."""
    for line in sys.stdin:
        start = time.perf_counter(), time.process_time()
        for _ in range(int(line)):
            step()
        print(json.dumps([time.perf_counter() - start[0], time.process_time() - start[1], memory()]), flush=True)


def count_out(steps: int, step) -> None:
    """Run that many steps after two to warm up, and print the seconds."""
    step()
    step()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    if os.environ.get("RANK", "0") == "0":
        print(time.perf_counter() - start, flush=True)


def ours(shape: str, dtype: str, compiled: bool, run=serve) -> None:
    import torch

    import train
    from solar import dist, optim
    from solar.config import ModelConfig
    from solar.model import Transformer

    D, L, H, K, F, V = SHAPES[shape]
    config = ModelConfig(
        model_type="llama", vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=L,
        num_attention_heads=H, num_key_value_heads=K, head_dim=D // H, max_position_embeddings=LENGTH,
    )  # fmt: skip
    world = dist.setup("cpu")
    with torch.device("meta"):
        model = Transformer(config)
    dist.shard(model, world, torch.float32 if dtype == "fp32" else torch.bfloat16, compile_layers=compiled)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            part = parameter.to_local()
            part.fill_(1.0) if name.endswith("norm.weight") else part.normal_(std=0.02)
    optimizer = optim.build_optimizer(model, 0.1, (0.9, 0.95))
    rows = BATCH // world.size
    ids = torch.randint(0, V, (rows, LENGTH))
    micro_batches = [{"input_ids": ids, "labels": ids}]
    run(lambda: train.training_step(model, optimizer, train.lm_objective, micro_batches, 3e-4, 1.0, bool, world))


def beside_two_ranks(shape: str, dtype: str, steps: int, turns: int) -> str:
    """Seconds of the same steps by one rank with two threads and by two ranks with one, in turns."""
    tail = ["-m", "tests.bench.train_step", "--count", "--shape", shape, "--dtype", dtype, "--steps", str(steps)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(turns):
        for ranks, head in ((1, [sys.executable]), (2, torchrun)):
            env = os.environ | {"OMP_NUM_THREADS": str(2 // ranks)}
            done = subprocess.run(head + tail, env=env, stdout=subprocess.PIPE, text=True, check=True)
            seconds[ranks].append(float(done.stdout))
    ratio = statistics.median(two / one for one, two in zip(seconds[1], seconds[2], strict=True))
    rates = [BATCH * LENGTH * steps / statistics.median(seconds[ranks]) for ranks in (1, 2)]
    return f"{shape} {dtype}: one rank {rates[0]:,.0f} tokens/s, two {rates[1]:,.0f}, time ratio {ratio:.2f}"


def theirs(shape: str, dtype: str, compiled: bool) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    D, L, H, K, F, V = SHAPES[shape]
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=D, num_hidden_layers=L, num_attention_heads=H, num_key_value_heads=K, intermediate_size=F,
            vocab_size=V, max_position_embeddings=LENGTH, use_cache=False, tie_word_embeddings=False,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    ids = torch.randint(0, V, (BATCH, LENGTH))
    forward = torch.compile(model) if compiled else model

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            loss = forward(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    serve(step)


class Worker:
    """A process that runs `serve`."""

    def __init__(self, command: list[str]):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, steps: int) -> tuple[float, float, int]:
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.train_step", description=__doc__.splitlines()[0])
    parser.add_argument("--peer", help="an interpreter that has transformers", metavar="PYTHON")
    parser.add_argument("--shape", nargs="+", default=["7.7M"], choices=SHAPES)
    parser.add_argument("--dtype", nargs="+", default=["fp32"], choices=["fp32", "bf16"])
    parser.add_argument("--compile", action="store_true", help="the peer's compiled form instead of its eager one")
    parser.add_argument("--cpu-seconds", action="store_true", help="compare CPU time, not the time that passed")
    parser.add_argument("--turns", type=int, help="(default: 30, with --ranks 7)")
    parser.add_argument("--steps", type=int, help="in a turn (default: 1, with --ranks 4)")
    parser.add_argument("--ranks", action="store_true", help="two ranks beside one, and no peer")
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--serve", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.turns = options.turns or (7 if options.ranks else 30)
    options.steps = options.steps or (4 if options.ranks else 1)
    if options.serve:
        {"ours": ours, "theirs": theirs}[options.serve](options.shape[0], options.dtype[0], options.compile)
        return
    if options.count:
        run = functools.partial(count_out, options.steps)
        ours(options.shape[0], options.dtype[0], options.compile, run)
        return
    if options.ranks:
        for shape in options.shape:
            print(beside_two_ranks(shape, options.dtype[0], options.steps, options.turns), flush=True)
        return
    tokens, clock = options.steps * BATCH * LENGTH, int(options.cpu_seconds)
    for shape in options.shape:
        for dtype in options.dtype:
            tail = ["--shape", shape, "--dtype", dtype]
            serving = lambda what, tail=tail: ["-m", "tests.bench.train_step", "--serve", what, *tail]
            workers = {"ours": Worker([sys.executable, *serving("ours")])}
            if options.peer:
                workers["theirs"] = Worker([options.peer, *serving("theirs"), *["--compile"] * options.compile])
            for worker in workers.values():
                worker.run(2)  # allocate, compile
            one_turn = lambda workers=workers: {name: worker.run(options.steps) for name, worker in workers.items()}
            turns = [one_turn() for _ in range(options.turns)]
            for worker in workers.values():
                worker.close()
            line = f"{shape} {dtype}, batch {BATCH} x {LENGTH}:"
            for name in workers:
                rate = statistics.median(tokens / turn[name][clock] for turn in turns)
                line += f"  {name} {rate:,.0f} tokens/s, {max(turn[name][2] for turn in turns) / 1e6:,.0f} MB"
            if options.peer:
                low, ratio, high = statistics.quantiles(turn["theirs"][clock] / turn["ours"][clock] for turn in turns)
                line += f"  ratio {ratio:.2f} ({low:.2f} to {high:.2f})" + " (theirs compiled)" * options.compile
            print(line, flush=True)


if __name__ == "__main__":
    main()
