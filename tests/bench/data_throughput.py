"""Whether data keep up with training: `python -m tests.bench.data_throughput --tokenizer DIR FILES...`.

MB/s of text that is tokenised by 1 and by 2 processes, and tokens/s that `steps` delivers, as one rank of a run draws
them. Training takes about 5,000 tokens/s on two cores and 60,000 on one GPU (7B); ten times that is wanted.
"""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from solar import cli
from solar.corpus import Corpus, Source
from solar.data import TokenBatches
from solar.shards import tokenise
from solar.tokenizer import Tokenizer

SECONDS = 3.0  # that each shape is drawn for


@dataclass
class Options:
    files: list[str] = cli.flag(positional=True, help="text to tokenise, 10 MB or more", metavar="FILES")
    tokenizer: str = cli.flag(help="model directory, or tokenizer file", metavar="DIR")


def main() -> None:
    options = cli.parse(Options, prog="python -m tests.bench.data_throughput", description="Speed of the data.")
    tokenizer = Tokenizer(options.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        for workers in (1, 2):
            start, out = time.monotonic(), Path(folder) / str(workers)
            corpus = Corpus([Source(path) for path in options.files])
            manifest = tokenise(corpus, tokenizer, out, 0.01, workers)
            rate = corpus.size / 1e6 / (time.monotonic() - start)
            print(f"tokenising, {workers} process{'es' * (workers - 1)}: {rate:.2f} MB/s", flush=True)
        print(f"{manifest.splits['train'].tokens:,} tokens")
        source = Source(str(out))
        for mask in (False, True):
            for batch_size, length in ((8, 256), (64, 256), (8, 4096), (256, 4096)):
                args = tokenizer.vocab_size, length, batch_size, 0, mask
                batches = TokenBatches([source, Source(folder)], [out, Path(folder) / "1"], *args)
                start, count = time.monotonic(), 0
                for _ in batches.steps(0, 1 << 30, 0, 1, batch_size):
                    count += batch_size * length
                    if (seconds := time.monotonic() - start) > SECONDS:
                        break
                masked = "document masks" if mask else ""
                print(f"steps of {batch_size:>3} x {length:<4}  {count / seconds / 1e6:7.2f} M tokens/s  {masked}")


if __name__ == "__main__":
    cli.run(main)
