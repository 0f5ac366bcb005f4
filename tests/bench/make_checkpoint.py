"""A checkpoint with the shape of Mistral-7B and random weights: `python -m tests.bench.make_checkpoint --out DIR`.

Written in the stored size and layout of the real one (14.5 GB, three shards). `--layers`, `--hidden-size` and
`--intermediate-size` make it smaller: 2048 and 2816 give 2.04 GB, which `dus:8` grows to 2.93 GB.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from solar import cli
from solar.config import MISTRAL_7B
from solar.directory import DEFAULT_MAX_SHARD_BYTES, write_config
from solar.elements import write_bytes
from solar.tensorfile import TensorToWrite, write_shards


@dataclass
class Options:
    out: str = cli.flag(help="directory to write", metavar="DIR")
    layers: int = cli.flag(32, help="decoder layers; each takes 436 MB of the widest", metavar="N")
    hidden_size: int = cli.flag(4096, help="a multiple of 128; one head for each 128, a kv head for four", metavar="N")
    intermediate_size: int = cli.flag(14336, help="of the MLP", metavar="N")
    seed: int = cli.flag(0, help="another one gives other weights", metavar="N")
    tokenizer: str | None = cli.flag(None, help="tokenizer.model to put beside the weights", metavar="FILE")


def main() -> None:
    options = cli.parse(Options, prog="python -m tests.bench.make_checkpoint", description="Random Mistral-7B weights.")
    heads = options.hidden_size // MISTRAL_7B.head_dim
    config = replace(
        MISTRAL_7B,
        num_hidden_layers=options.layers,
        hidden_size=options.hidden_size,
        intermediate_size=options.intermediate_size,
        num_attention_heads=heads,
        num_key_value_heads=max(heads // 4, 1),
    )
    generator = torch.Generator().manual_seed(options.seed)
    block = (torch.randn(1 << 23, generator=generator) * config.initializer_range).bfloat16()
    ones = torch.ones(config.hidden_size, dtype=torch.bfloat16)
    progress = cli.Progress("writing", 2 * config.num_parameters())

    def write(file, name: str, numel: int) -> None:
        start = hash_of(name) % len(block)  # the same random block everywhere, but never the same tensor twice
        source = ones if numel == config.hidden_size else torch.cat((block[start:], block[:start]))
        for at in range(0, numel, len(source)):
            write_bytes(file, source[: min(len(source), numel - at)])
        progress.advance(2 * numel)

    tensors = []
    for name, shape in config.tensor_shapes().items():
        numel = torch.Size(shape).numel()
        tensors.append(TensorToWrite(name, shape, "bfloat16", lambda file, n=name, k=numel: write(file, n, k)))
    with cli.publish(Path(options.out)) as staging:
        write_shards(staging, tensors, DEFAULT_MAX_SHARD_BYTES)
        if options.tokenizer:
            (staging / "tokenizer.model").write_bytes(Path(options.tokenizer).read_bytes())
        write_config(staging, config)
    progress.close()
    print(options.out)


def hash_of(name: str) -> int:
    return sum(ord(char) * 31**i for i, char in enumerate(name))


if __name__ == "__main__":
    cli.run(main)
