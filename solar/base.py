"""A small base model to begin with, made here: `python -m solar.base --out DIR`.

For a machine without a checkpoint at hand. The tokenizer is trained on text found on the machine, the Python standard
library's own sources; the weights are random and seeded, in Mistral's architecture. Everything downstream runs on it as
on the real thing (12 layers, grouped queries, a sliding window), but what it says is noise until it has been trained.
"""

import io
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch

from solar import cli
from solar.checkpoint import save_model
from solar.config import TINY
from solar.model import Transformer

TOKENIZER_BYTES = 3_000_000  # of text; more does not change a vocabulary of 2,048 by much


def standard_library_text(max_bytes: int) -> list[str]:
    """The sources of this Python's standard library, file by file in alphabetical order, about max_bytes of them."""
    root = Path(sysconfig.get_path("stdlib"))
    texts, taken = [], 0
    for path in sorted(root.glob("*.py")) + sorted(root.glob("*/*.py")):
        if taken >= max_bytes:
            break
        if path.parent.name in ("site-packages", "dist-packages", "test", "idlelib"):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        texts.append(text)
        taken += len(text)
    if not texts:
        raise FileNotFoundError(
            f"{root}: no Python sources to train a tokenizer on; give a model with --model (MODEL=)"
        )
    return texts


def train_tokenizer(texts: list[str], vocab_size: int) -> bytes:
    """A sentencepiece model like Mistral's: BPE, byte fallback, single digits, not normalised; unk 0, bos 1, eos 2."""
    lines = (line for text in texts for line in text.splitlines() if line.strip())
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=0.9995,
        max_sentence_length=1 << 14,
        num_threads=os.cpu_count() or 1,
        minloglevel=2,
    )
    return model.getvalue()


@dataclass
class Options:
    out: str = cli.flag("out/base", help="directory to write", metavar="DIR")
    seed: int = cli.flag(0, help="of the random weights")
    force: bool = cli.flag(False, help="replace the output if it exists")


def main() -> None:
    options = cli.parse(
        Options, prog="python -m solar.base", description="Make a small base model with random weights."
    )
    out = Path(options.out)
    cli.check_output(out, options.force)
    print(
        "no MODEL given: making a small base with random weights, and a tokenizer trained on this Python's own sources"
    )
    print(
        f"  12 layers, {TINY.num_parameters():,} parameters; it speaks noise: give MODEL=DIR for real weights",
        flush=True,
    )
    tokenizer = train_tokenizer(standard_library_text(TOKENIZER_BYTES), TINY.vocab_size)
    model = Transformer(TINY)
    model.init_weights(options.seed)
    save_model(model, out, dtype=torch.bfloat16, force=options.force, companions={"tokenizer.model": tokenizer})
    print(out)


if __name__ == "__main__":
    cli.run(main)
