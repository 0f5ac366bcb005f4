"""Perplexity of texts, of any length: `python -m solar.perplexity FILES... --model DIR [--plan dus:8 ...]`.

The number by which an up-scaling is seen to hurt before it is trained. Texts are read in windows, overlapping or not
(solar/windows.py), and every figure comes with its standard error.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from kernels import CHOICES, select
from solar import cli
from solar.checkpoint import CheckpointReader, choose_device, load_model, parse_dtype
from solar.model import Transformer
from solar.plan import GRAMMAR, parse_plan
from solar.tokenizer import Tokenizer
from solar.windows import Window, batches, check_window, collate, read_texts, windows_of

BASE = str(Path(__file__).parent / "assets/base")
WINDOW = 1024  # tokens, where nothing else is asked for and the model has room for them
BATCH_TOKENS = 4096

# ------------------------------------------------------------------------------------------------ scores


@dataclass(frozen=True)
class Perplexity:
    """What a model makes of a text. blocks (N, 3): nats, tokens and bytes of each block, all of them counted.

    Standard errors are taken over the blocks and not over tokens: tokens near each other share a subject and an author,
    so what they cost goes up and down together, and to treat them as independent would promise too much. A total over
    a total is a ratio, of which the usual linear approximation is taken. One block alone has no error: nan.
    """

    blocks: np.ndarray

    @property
    def nats(self) -> float:
        return float(self.blocks[:, 0].sum())

    @property
    def tokens(self) -> int:
        return int(self.blocks[:, 1].sum())

    @property
    def nbytes(self) -> int:
        return int(self.blocks[:, 2].sum())

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def loss_error(self) -> float:
        return ratio_error(self.blocks[:, 0], self.blocks[:, 1])

    @property
    def perplexity(self) -> float:
        return exp(self.loss)

    @property
    def perplexity_error(self) -> float:
        return self.perplexity * self.loss_error

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.nbytes

    @property
    def bits_per_byte_error(self) -> float:
        return ratio_error(self.blocks[:, 0], self.blocks[:, 2]) / math.log(2)

    def over(self, other: "Perplexity") -> tuple[float, float]:
        """How many more nats a token this has than the other on the same text, and the error of that.

        What makes a passage hard is hard for both, so the difference is known far better than either.
        """
        difference = self.blocks[:, 0] - other.blocks[:, 0]
        return float(difference.sum()) / self.tokens, ratio_error(difference, self.blocks[:, 1])

    def to_json(self) -> dict:
        names = "perplexity", "perplexity_error", "bits_per_byte", "bits_per_byte_error", "loss", "loss_error"
        return {name: finite(getattr(self, name)) for name in names} | {
            "nats": finite(self.nats), "tokens": self.tokens, "bytes": self.nbytes, "blocks": len(self.blocks),
        }  # fmt: skip


def ratio_error(tops: np.ndarray, bottoms: np.ndarray) -> float:
    """The standard error of sum(tops) / sum(bottoms) over N independent pairs; nan for fewer than two.

    Cochran, Sampling Techniques, chapter 6: the ratio estimate.
    """
    count = len(tops)
    if count < 2:
        return math.nan
    residuals = tops - tops.sum() / bottoms.sum() * bottoms
    return float(math.sqrt(count / (count - 1) * (residuals**2).sum()) / bottoms.sum())


def exp(loss: float) -> float:
    """e^loss, infinite where no float holds it: a model may be that bad."""
    return math.exp(loss) if loss < 709 else loss * math.inf


def finite(value: float) -> float | None:
    """The value, or None where JSON has none."""
    return value if math.isfinite(value) else None


def total(windows: Sequence[Window], nats: Sequence[float]) -> Perplexity:
    """The windows' nats, summed by block."""
    numbers, where = np.unique([window.block for window in windows], return_inverse=True)
    blocks = np.zeros((len(numbers), 3))
    values = [(cost, window.counted, window.nbytes) for cost, window in zip(nats, windows, strict=True)]
    np.add.at(blocks, where, np.array(values, dtype=np.float64))
    return Perplexity(blocks)


@torch.inference_mode()
def score(
    model: Transformer,
    windows: Sequence[Window],
    batch_tokens: int = BATCH_TOKENS,
    advance: Callable[[int], None] = lambda _: None,
) -> np.ndarray:
    """(N,) nats that the counted tokens of each window cost: the sum of -log p(token | those before it in the window).

    Summed in fp64. What shares a batch changes nothing but rounding. advance: told how many bytes have been counted.
    """
    nats = np.empty(len(windows))
    for batch in batches(windows, batch_tokens):
        found = collate([windows[i] for i in batch], model.model.embed_tokens.weight.device)
        nats[batch] = -model(found.ids, labels=found.labels).double().sum(dim=1).cpu().numpy()
        advance(sum(windows[i].nbytes for i in batch))
    return nats


def perplexity(
    model: Transformer,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    window: int,
    stride: int,
    bos: bool | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> Perplexity:
    """The perplexity of texts, each read for itself, in sliding windows. bos: put it before each (None: as the
    tokenizer does by itself). Raises ValueError where nothing can be counted, and as `cut` does."""
    head = tokenizer.adds_bos if bos is None else bos
    windows = windows_of(tokenizer, texts, window, stride, head)
    return total(windows, score(model, windows, batch_tokens))


# ------------------------------------------------------------------------------------------------ the command


@dataclass
class Options:
    """What to measure. `solar.evaluate --perplexity` hands the same over."""

    files: list[str] = cli.flag(
        help="text or .jsonl files, directories of them, or stdlib, problems: what was held out of those",
        metavar="FILE",
        positional=True,
    )
    model: str = cli.flag(BASE, help="model directory", metavar="DIR")
    plan: list[str] = cli.flag([], help=f"also the model grown by each of these: {GRAMMAR}", metavar="PLAN")
    window: int | None = cli.flag(
        None, help=f"tokens read at once (default: {WINDOW}, or as many as there is room for)"
    )
    stride: int | None = cli.flag(None, help="tokens from one window to the next (default: half a window)")
    tokens: int | None = cli.flag(None, help="only so many at the beginning of each file", metavar="N")
    bos: Literal["auto", "yes", "no"] = cli.flag("auto", help="BOS before each text; auto: as the tokenizer does")
    batch_tokens: int = cli.flag(BATCH_TOKENS, help="tokens that go through the model side by side", metavar="N")
    device: str = cli.flag("auto", help="cuda, cpu, or auto: a GPU if there is one")
    dtype: Literal["auto", "bf16", "fp32"] = cli.flag("auto", help="to compute in; auto: bf16 on a GPU, fp32 elsewhere")
    kernels: Literal[CHOICES] = cli.flag("auto", help="which implementation of the operations")
    out: str | None = cli.flag(None, help="write the table as JSON too", metavar="FILE.json")


def report(options: Options) -> dict:
    """Measure the model and each plan on the files, print a table, and return it.

    Raises FileNotFoundError or ValueError for what is not there, no text, or out of range.
    """
    reader, tokenizer = CheckpointReader(options.model), Tokenizer(options.model)
    for name in ("tokens", "batch_tokens"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: at least 1 is needed")
    configs = [reader.config, *[reader.config.with_depth(1)] * bool(options.plan)]
    window = choose_window(options.window, min(config.max_position_embeddings for config in configs), options.model)
    stride = options.stride if options.stride is not None else max(window // 2, 1)
    check_window(window, stride)
    for plan in options.plan:
        parse_plan(plan, reader.config.num_hidden_layers)
    if options.bos == "yes" and tokenizer.bos_id is None:
        raise ValueError(f"--bos yes: {tokenizer.path} has no BOS; leave it out or say --bos no")
    bos = tokenizer.adds_bos if options.bos == "auto" else options.bos == "yes"
    placement = place(options)
    windows: dict[str, list[Window]] = {}
    for name, found in [found for path in options.files for found in read_texts(path)]:
        try:
            windows[name] = windows_of(tokenizer, found, window, stride, bos, options.tokens)
        except ValueError as error:
            if str(error).startswith(name):  # of reading it
                raise
            raise ValueError(f"{name}: {error}") from None
    plans = [None, *options.plan]
    progress = cli.Progress("reading", len(plans) * sum(w.nbytes for found in windows.values() for w in found))
    rows = []
    for plan in plans:
        model = load_model(options.model, plan=plan, **placement)
        found = {
            name: total(cut, score(model, cut, options.batch_tokens, progress.advance)) for name, cut in windows.items()
        }
        rows.append((plan or "as it is", model.config.num_hidden_layers, found))
    progress.close()
    whole = [together(found.values()) for _, _, found in rows]
    print(
        f"counted     {whole[0].tokens:,} tokens, {whole[0].nbytes:,} bytes of {', '.join(windows)}\n"
        f"windows     of {window} tokens, stride {stride}, {'with' if bos else 'without'} BOS; "
        f"standard errors over {len(whole[0].blocks)} blocks\n{table(rows)}"
    )
    result = {
        "model": options.model,
        "window": window,
        "stride": stride,
        "bos": bos,
        "rows": [
            {"plan": plan, "layers": layers, **together(found.values()).to_json()}
            | {"files": {name: part.to_json() for name, part in found.items()}}
            for plan, layers, found in rows
        ],
    }
    if options.out:
        path = Path(options.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(path)
    return result


def choose_window(asked: int | None, room: int, model: str) -> int:
    """The window in tokens: what is asked for, or WINDOW if there is room. ValueError if there is none."""
    if asked is not None and asked > room:
        raise ValueError(f"--window {asked}: {model} has room for {room} positions (max_position_embeddings)")
    return min(WINDOW, room) if asked is None else asked


def place(options) -> dict:
    """What `load_model` is told of device and dtype, by options with device, dtype and kernels; selects the kernels."""
    device = choose_device(options.device)
    if device == "cpu":
        cli.keep_freed_memory()
    select(options.kernels)
    dtype = options.dtype if options.dtype != "auto" else "bf16" if device.startswith("cuda") else "fp32"
    return {"device": device, "dtype": parse_dtype(dtype)}


def together(parts: Iterable[Perplexity]) -> Perplexity:
    """The blocks of several texts as one."""
    return Perplexity(np.concatenate([part.blocks for part in parts]))


def table(rows: Sequence[tuple[str, int, dict[str, Perplexity]]]) -> str:
    """(plan, layers, perplexity of each text) of several models, to be read; the first is what the others are held
    against. Where there are several texts, a line for each follows."""
    files = list(rows[0][2])
    names = [name for plan, *_ in rows for name in (plan, *(f"  {file}" for file in files if len(files) > 1))]
    wide = max(len(name) for name in names)
    lines = [f"{'':<{wide}}  layers            perplexity        bits per byte  nats a token more"]
    for plan, layers, found in rows:
        parts = {plan: (layers, together(found.values()), together(rows[0][2].values()))}
        if len(files) > 1:
            parts |= {f"  {file}": ("", part, rows[0][2][file]) for file, part in found.items()}
        for name, (depth, part, first) in parts.items():
            line = (
                f"{name:<{wide}}  {depth:>6}  {with_error(part.perplexity, part.perplexity_error):>20}  "
                f"{with_error(part.bits_per_byte, part.bits_per_byte_error, 3):>19}"
            )
            more = "" if found is rows[0][2] else f"  {with_error(*part.over(first), 4, '+'):>17}"
            lines.append((line + more).rstrip())
    return "\n".join(lines)


def with_error(value: float, error: float, digits: int = 2, sign: str = "") -> str:
    """ "26.96 ± 1.20", or the value alone if its error is not known."""
    return f"{value:{sign},.{digits}f}" + (f" ± {error:,.{digits}f}" if math.isfinite(error) else "")


def main() -> None:
    report(cli.parse(Options, prog="python -m solar.perplexity", description="Measure the perplexity of texts."))


if __name__ == "__main__":
    cli.run(main)
