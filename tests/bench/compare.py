"""A real model against what transformers computed: `python -m tests.bench.compare --model DIR --golden FILE.npz`.

The file comes from `tests/golden/make_golden.py --compare DIR --out FILE.npz`, run where transformers is installed.
Both sides compute in fp32, and continue each prompt greedily with end tokens ignored.
"""

from dataclasses import dataclass

import numpy as np
import torch

from solar import cli
from solar.checkpoint import load_model
from solar.sampling import generate
from solar.tokenizer import Tokenizer


@dataclass
class Options:
    model: str = cli.flag(help="model directory", metavar="DIR")
    golden: str = cli.flag(help="what make_golden.py --compare wrote", metavar="FILE")


def main() -> None:
    options = cli.parse(Options, prog="python -m tests.bench.compare", description="A model against transformers.")
    golden = np.load(options.golden)
    model, tokenizer = load_model(options.model, dtype="float32"), Tokenizer(options.model)
    worst, equal = 0.0, 0
    for number, prompt in enumerate(golden["prompts"].tolist()):
        ids = golden[f"ids_{number}"].tolist()
        if tokenizer.encode(prompt, bos=False) != ids:
            raise ValueError(f"{prompt!r}: {tokenizer.encode(prompt, bos=False)}, transformers has {ids}")
        with torch.inference_mode():
            logits = model(torch.tensor([ids]))[0].numpy()
        difference = float(np.abs(logits - golden[f"logits_{number}"].reshape(logits.shape)).max())
        expected = golden[f"greedy_{number}"].tolist()
        same = generate(model, [ids], len(expected))[0] == expected
        worst, equal = max(worst, difference), equal + same
        print(
            f"{prompt[:40]!r:<44} logits differ by at most {difference:.1e}, {len(expected)} greedy ids equal: {same}"
        )
    print(f"largest difference {worst:.1e}, greedy text equal for {equal} of {len(golden['prompts'])} prompts")


if __name__ == "__main__":
    cli.run(main)
