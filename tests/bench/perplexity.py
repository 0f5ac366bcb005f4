"""Perplexity of a text, in windows that do not overlap: `python -m tests.bench.perplexity --model DIR --text FILE`.

The number by which an up-scaling is seen to hurt before it is trained. Windows begin without context and without BOS;
the first token of each is not counted.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from solar import cli
from solar.checkpoint import load_model
from solar.tokenizer import Tokenizer


@dataclass
class Options:
    model: str = cli.flag(help="model directory", metavar="DIR")
    text: str = cli.flag(help="a text file", metavar="FILE")
    plan: list[str] = cli.flag([], help="plans to try on the model, one after the other", metavar="PLAN")
    tokens: int = cli.flag(3072, help="of the beginning of the text", metavar="N")
    window: int = cli.flag(512, help="tokens in a window", metavar="N")
    dtype: str = cli.flag("float32", help="to compute in")


def main() -> None:
    options = cli.parse(Options, prog="python -m tests.bench.perplexity", description="Perplexity of a text.")
    ids = Tokenizer(options.model).encode(Path(options.text).read_text(encoding="utf-8"), bos=False)[: options.tokens]
    if len(ids) < options.window:
        raise ValueError(f"{options.text}: {len(ids)} tokens, fewer than one window of {options.window}")
    windows = torch.tensor(ids[: len(ids) // options.window * options.window]).view(-1, options.window)
    for plan in [None, *options.plan]:
        model = load_model(options.model, dtype=options.dtype, plan=plan)
        with torch.inference_mode():
            total = sum(model(row[None], labels=row[None]).sum().item() for row in windows)
        counted = len(windows) * (options.window - 1)
        layers = model.config.num_hidden_layers
        print(
            f"{plan or 'as it is':<16} {layers} layers  perplexity {math.exp(-total / counted):.2f}  ({counted} tokens)"
        )


if __name__ == "__main__":
    cli.run(main)
