"""Whole SOLAR-10.7B steps on one GPU, random weights: `python -m tests.bench.model_gpu`.

Decode: one token at a time, batch 1, bf16, captured in a CUDA graph; the limit is reading 21.2 GB of weights a token.
Training: forward and backward of as many 10.7B-shaped layers as fit, 4,096 tokens, activation checkpointing.

MFU counts 6 operations for each parameter and token (the embedding table left out) and 12 L D S for the attention, no
halving for causality, against the product rate that this run measures. Recomputation is not counted.
"""

import argparse
import gc
import statistics
import time
from dataclasses import replace

import torch
from torch.utils.checkpoint import checkpoint

import kernels
from kernels.bench import Ceiling, Clock, measure_ceiling
from solar.config import SOLAR_10_7B, TINY, ModelConfig
from solar.model import KVCache, Transformer


def build_random(config: ModelConfig, device: torch.device) -> Transformer:
    with torch.device("meta"):
        model = Transformer(config)
    model.bfloat16().to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1) if name.endswith("norm.weight") else parameter.normal_(std=config.initializer_range)
    return model


@torch.inference_mode()
def decode(config: ModelConfig, device: torch.device, ceiling: Ceiling, context: int, steps: int) -> str:
    """Milliseconds of one decoding step behind `context` tokens, eager and as a CUDA graph."""
    model = build_random(config, device)
    cache = KVCache(config, 1, context + 1, torch.bfloat16, device)
    cache.keys.normal_()
    cache.values.normal_()
    token = torch.zeros(1, 1, dtype=torch.long, device=device)

    def step() -> None:
        cache.length = context  # every step writes the same slot and reads the same keys: the cost of one position
        model(token, cache=cache)

    def milliseconds(call) -> float:
        times = []
        for _ in range(steps):
            torch.cuda.synchronize() if device.type == "cuda" else None
            start = time.perf_counter()
            call()
            torch.cuda.synchronize() if device.type == "cuda" else None
            times.append(1000 * (time.perf_counter() - start))
        return statistics.median(times)

    step()
    eager = milliseconds(step)
    graphed = eager
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        graphed = milliseconds(graph.replay)
    weights = 2 * (config.num_parameters() - config.vocab_size * config.hidden_size)
    rate = 1000 * weights / graphed
    return (
        f"decode, {config.num_hidden_layers} layers, context {context}: {1000 / graphed:.1f} tokens/s in a CUDA graph, "
        f"{1000 / eager:.1f} eager; {rate / 1e9:.0f} GB/s of weights, {rate / ceiling.bytes_per_second:.0%} of the "
        f"measured copy rate, {rate / 4.8e12:.0%} of 4.8 TB/s"
    )


def train(config: ModelConfig, device: torch.device, ceiling: Ceiling, tokens: int, recompute: bool) -> str:
    """Forward and backward of one sequence; gradients are bf16 beside bf16 weights, no optimizer."""
    model = build_random(config, device)
    if recompute:
        for layer in model.model.layers:
            plain = layer.forward
            layer.forward = lambda *args, plain=plain: checkpoint(plain, *args, use_reentrant=False)
    ids = torch.randint(0, config.vocab_size, (1, tokens), device=device)

    def step() -> None:
        model.zero_grad()
        model(ids, labels=ids).sum().backward()

    seconds = Clock(device, budget_ms=3000)(step) / 1000
    parameters = config.num_parameters() - config.vocab_size * config.hidden_size
    operations = tokens * (6 * parameters + 12 * config.num_hidden_layers * config.hidden_size * tokens)
    rate = operations / seconds
    return (
        f"forward + backward, {config.num_hidden_layers} layers, {tokens} tokens, "
        f"{'recomputing layers' if recompute else 'no recomputation'}: {tokens / seconds:.0f} tokens/s, "
        f"{rate / 1e12:.0f} TFLOP/s, {rate / ceiling.flops_per_second:.0%} of the measured product rate, "
        f"MFU {rate / 989e12:.0%} of 989 TFLOP/s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.model_gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a tiny model, on the CPU too: only to see that it runs")
    parser.add_argument("--kernels", choices=kernels.CHOICES, default="auto")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.small:
        parser.exit(2, "error: no GPU here; --small runs a tiny model on the CPU\n")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kernels.select(options.kernels)
    torch.manual_seed(0)
    ceiling = measure_ceiling(Clock(device), options.small)
    config = TINY.with_depth(4) if options.small else SOLAR_10_7B
    print(decode(config, device, ceiling, 16 if options.small else 2048, 3 if options.small else 50), flush=True)
    for recompute in (False, True):
        depth, line = config.num_hidden_layers, None
        while line is None:
            try:
                shape = replace(config, num_hidden_layers=depth)
                line = train(shape, device, ceiling, 64 if options.small else 4096, recompute)
            except torch.OutOfMemoryError:
                if depth <= 4:
                    raise
                depth -= 4  # it does not fit: fewer layers of the same shape
            gc.collect()  # a layer whose forward is a closure over itself goes only now
            torch.cuda.empty_cache()
        print(line, flush=True)


if __name__ == "__main__":
    main()
