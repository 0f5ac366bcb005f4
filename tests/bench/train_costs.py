"""What training costs beside the step itself, and how the step grows: `python -m tests.bench.train_costs WHAT`.

sizes    models of 1M to 200M parameters: tokens/s, share of the measured matrix rate
lengths  sequences of 256 to 8,192 tokens at the same tokens a step
save     a checkpoint every 50 steps, asynchronously: what it adds to the loop; resuming beside reading the bare files
start    two ranks on a checkpoint of 2 GB: peak memory of each against its shard, the largest tensor and 300 MB
"""

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import train
from solar import dist, meter, optim, restore, snapshot
from solar.checkpoint import CheckpointReader
from solar.config import ModelConfig
from solar.manifest import verify
from solar.model import Transformer

SIZES = {  # name -> hidden, layers, heads, kv heads, intermediate, vocabulary
    "1M": (96, 6, 3, 1, 256, 2048),
    "8M": (288, 6, 6, 2, 768, 4096),
    "30M": (512, 8, 8, 2, 1408, 8192),
    "125M": (768, 12, 12, 4, 2048, 32000),
    "200M": (1024, 14, 16, 4, 2816, 32000),
}
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
ALLOWANCE = 300e6  # bytes that a rank may hold beside its shard and one tensor: Python, torch, buffers


def config_of(size: str, length: int) -> ModelConfig:
    D, L, H, K, F, V = SIZES[size]
    return ModelConfig(
        model_type="llama", vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=L,
        num_attention_heads=H, num_key_value_heads=K, head_dim=D // H, max_position_embeddings=length,
    )  # fmt: skip


def build(config: ModelConfig, world: dist.World):
    """A sharded model with random weights, and its optimizer."""
    with torch.device("meta"):
        model = Transformer(config)
    dist.shard(model, world, torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            part = parameter.to_local()
            part.fill_(1.0) if name.endswith("norm.weight") else part.normal_(std=0.02)
    return model, optim.build_optimizer(model, 0.1, (0.9, 0.95))


def step_of(config: ModelConfig, world: dist.World, batch: int, length: int):
    model, optimizer = build(config, world)
    ids = torch.randint(0, config.vocab_size, (batch, length))
    micro_batches = [{"input_ids": ids, "labels": ids}]
    take = lambda: train.training_step(model, optimizer, train.lm_objective, micro_batches, 3e-4, 1.0, bool, world)
    return model, optimizer, take


def seconds_of(call) -> float:
    """The median of five calls after one to warm up, or of three where one takes more than ten seconds."""
    call()
    taken = []
    while len(taken) < (3 if taken and taken[0] > 10 else 5):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def row(size: str, batch: int, length: int, world: dist.World) -> str:
    config = config_of(size, length)
    peak = meter.matrix_rate(world.device, torch.float32)
    seconds = seconds_of(step_of(config, world, batch, length)[2])
    rate = batch * length / seconds
    share = rate * config.training_flops(length) / peak
    return (
        f"{size:>5} {config.num_parameters():>13,} {batch:>5} x {length:<5} {rate:>9,.0f} tokens/s  "
        f"{share:.0%} of {peak / 1e9:.0f} GFLOP/s"
    )


def save(world: dist.World) -> None:
    """Fifty steps with a save behind the first of them, and fifty without, in turns."""
    config = config_of("8M", 256)
    model, optimizer, take = step_of(config, world, 8, 256)
    take()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        snapshots = snapshot.Snapshots(
            Path(folder) / "checkpoints", 1, world.rank, world.size, world.background, config, None, "stop"
        )
        ratios, copies = [], []
        for turn in range(5):
            seconds = {}
            for saving in (False, True):
                start = time.perf_counter()
                if saving:
                    snapshots.save(turn + 1, model, optimizer, {"step": turn + 1})
                    copies.append(time.perf_counter() - start)
                for _ in range(50):
                    take()
                seconds[saving] = time.perf_counter() - start
            snapshots.wait()
            ratios.append(seconds[True] / seconds[False] - 1)
        print(
            f"saving 8M once in 50 steps of 8 x 256: +{statistics.median(ratios):.1%} (median of 5 pairs; "
            f"{min(ratios):+.1%} to {max(ratios):+.1%}), of it the copy {1000 * statistics.median(copies):.0f} ms"
        )
        path = snapshots.latest()
        size = sum(file.stat().st_size for file in path.iterdir())
        verifying = seconds_of(lambda: verify(path))
        loading = seconds_of(lambda: restore.load(path, model, optimizer, verified=True))
        reading = seconds_of(lambda: [file.read_bytes() for file in path.iterdir()])
        print(
            f"resuming from {size / 1e6:.0f} MB: {verifying:.2f} s to verify (SHA-256), {loading:.2f} s to load, "
            f"{reading:.2f} s for reading the files alone"
        )


def start(model: str) -> None:
    """Peak resident memory of each of two ranks that load a model and stop. `model`: of tests.bench.make_checkpoint."""
    reader = CheckpointReader(model)
    sizes = [4 * weight.stored.numel for weight in reader.weights.values()]  # held in fp32
    program = "import sys; from tests.bench import train_costs; train_costs.load_only(sys.argv[1])"
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
        script.write(program)
        script.flush()
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", script.name, model]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": "."}, check=True)
    allowed = sum(sizes) / 2 + max(sizes) + ALLOWANCE
    for line in sorted(done.stdout.splitlines()):
        rank, peak = line.split()
        print(
            f"rank {rank}: peak {int(peak) / 1e6:,.0f} MB; shard {sum(sizes) / 2e6:,.0f} + largest tensor "
            f"{max(sizes) / 1e6:,.0f} + 300 = {allowed / 1e6:,.0f} MB allowed"
        )


def load_only(path: str) -> None:
    world = dist.setup("cpu")
    reader = CheckpointReader(path)
    with torch.device("meta"):
        model = Transformer(dataclasses.replace(reader.config)).float()
    dist.shard(model, world, torch.float32)
    dist.load_weights(model, reader, world)
    status = Path("/proc/self/status").read_text(encoding="ascii")
    print(world.rank, 1024 * int(status.split("VmHWM:")[1].split()[0]), flush=True)
    dist.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.train_costs", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["sizes", "lengths", "save", "start"])
    parser.add_argument("--model", help="for start: a checkpoint of about 2 GB", metavar="DIR")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES, help="for sizes: which")
    options = parser.parse_args()
    if options.what == "start":
        start(options.model)
        return
    world = dist.setup("cpu")
    if options.what == "sizes":
        for size in options.sizes:
            print(row(size, 8, 256, world), flush=True)
    elif options.what == "lengths":
        for length in LENGTHS:
            print(row("8M", max(8192 // length, 1), length, world), flush=True)
    else:
        save(world)
    dist.close()


if __name__ == "__main__":
    main()
