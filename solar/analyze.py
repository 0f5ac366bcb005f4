"""Looking into models and runs: `python -m solar.analyze layers|seams|search|curves`. No checkpoint is written.

    layers    how much each layer does, and which are alike          (solar/similarity.py)
    seams     what a plan does to the stream at its joins            (solar/seams.py)
    search    for a depth, the plan that hurts least before training (solar/search.py)
    curves    what training did: loss curves of runs                 (solar/curves.py)

Each prints a table. The first three write what they measured as JSON into --out, `search` also the plan it found, for
any --plan. Where matplotlib is installed there are pictures too.
"""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kernels import CHOICES
from solar import cli, similarity
from solar import curves as loss_curves
from solar import plan as plans
from solar import seams as joins
from solar import search as plan_search
from solar.checkpoint import load_model
from solar.model import Transformer
from solar.perplexity import BASE, BATCH_TOKENS, choose_window, place
from solar.tokenizer import Tokenizer
from solar.windows import Batch, Window, batches, collate, deal, read_texts

WINDOW = 512

# ------------------------------------------------------------------------------------------------ what they share


@dataclass
class TextOptions:
    """Flags of the analyses that run a model on a text."""

    model: str = cli.flag(BASE, help="model directory", metavar="DIR")
    data: list[str] = cli.flag(
        ["stdlib", "problems"],
        help="text or .jsonl files, directories of them, or stdlib, problems: what was held out of those",
        metavar="FILE",
    )
    window: int | None = cli.flag(
        None, help=f"tokens read at once (default: {WINDOW}, or as many as there is room for)"
    )
    batch_tokens: int = cli.flag(BATCH_TOKENS, help="tokens that go through the model side by side", metavar="N")
    device: str = cli.flag("auto", help="cuda, cpu, or auto: a GPU if there is one")
    dtype: Literal["auto", "bf16", "fp32"] = cli.flag("auto", help="to compute in; auto: bf16 on a GPU, fp32 elsewhere")
    kernels: Literal[CHOICES] = cli.flag("auto", help="which implementation of the operations")
    out: str = cli.flag("out/analyze", help="directory for JSON and pictures; what is there is replaced", metavar="DIR")
    png: str | None = cli.flag(None, help="picture to write (default: one in --out)", metavar="FILE")


def open_model(options: TextOptions, sizes: list[int], plan: str = "copy") -> tuple[Transformer, list[list[Window]]]:
    """The model, grown by a plan if there is one, and samples of the text, of at least so many tokens each; a single
    sample may be shorter, where the text is.

    The model is that of an up-scaling, a Llama without sliding window: within the window that is read its logits are
    the base's. Raises as `load_model`, `read_texts` and `deal` do, and ValueError for flags out of range.
    """
    check_png(options.png)
    for name, value in (("--batch-tokens", options.batch_tokens), ("a sample's tokens", min(sizes))):
        if value < 1:
            raise ValueError(f"{name}: {value}, at least 1 is needed")
    model = load_model(options.model, plan=plan, **place(options))
    room = model.config.max_position_embeddings
    window = choose_window(min(WINDOW, room) if options.window is None else options.window, room, options.model)
    tokenizer = Tokenizer(options.model)
    sources = [source for path in options.data for source in read_texts(path)]
    return model, deal(sources, tokenizer, window, tokenizer.adds_bos, sizes, fewer=len(sizes) == 1)


def to_batches(model: Transformer, windows: list[Window], options: TextOptions) -> list[Batch]:
    """A sample on the model's device."""
    device = model.model.embed_tokens.weight.device
    return [collate([windows[i] for i in batch], device) for batch in batches(windows, options.batch_tokens)]


def names(paths: list[str]) -> str:
    """Of a few files their names, of many how many."""
    return ", ".join(Path(path).name for path in paths) if len(paths) <= 3 else f"{len(paths)} files"


def tokens_of(sample: list[Batch]) -> int:
    return sum(int(batch.real.sum()) for batch in sample)


def show_tokens(count: float) -> str:
    return f"{count:,.0f} tokens"


def record(options: TextOptions, name: str, values: dict[str, Any]) -> Path:
    """Write OUT/NAME.json: the values, and on what they were measured."""
    path = Path(options.out) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {"model": options.model, "data": options.data} | values
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return path


def check_png(png: str | None) -> None:
    """ValueError if a picture is asked for and nothing here can draw it."""
    if png and not importlib.util.find_spec("matplotlib"):
        raise ValueError("--png needs matplotlib: pip install matplotlib")


def picture(png: str | None, default: Path, draw: Callable[[Any], None], size: tuple[float, float] = (8, 5)) -> None:
    """Write a picture and print its path, if matplotlib is installed. draw: told the figure. Raises as `check_png`."""
    check_png(png)
    if not importlib.util.find_spec("matplotlib"):
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    path = Path(png or default)
    figure = pyplot.figure(figsize=size, layout="constrained")
    draw(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    print(path)


# ------------------------------------------------------------------------------------------------ layers


@dataclass
class LayersOptions(TextOptions):
    """Flags of `layers`."""

    plan: str = cli.flag("copy", help=f"look at the model grown by this: {plans.GRAMMAR}")
    tokens: int = cli.flag(4096, help="of the text, as far as there is one", metavar="N")


def layers(options: LayersOptions) -> None:
    """Measure the influence of each layer, and how alike the states behind any two are."""
    model, (windows,) = open_model(options, [options.tokens], options.plan)
    sample = to_batches(model, windows, options)
    progress = cli.Progress("comparing", tokens_of(sample), show_tokens)
    found = similarity.measure(model, sample, progress.advance)
    progress.close()
    print(f"{options.model}, {options.plan}: {tokens_of(sample):,} tokens of {names(options.data)}")
    print(similarity.table(found))
    path = record(options, "layers", {"plan": options.plan, "tokens": tokens_of(sample), **similarity.to_json(found)})
    picture(options.png, path.with_suffix(".png"), lambda figure: similarity.draw(found, figure), (12, 5))
    print(path)


# ------------------------------------------------------------------------------------------------ seams


@dataclass
class SeamsOptions(TextOptions):
    """Flags of `seams`."""

    plan: str = cli.flag("dus", help=plans.GRAMMAR)
    tokens: int = cli.flag(2048, help="of the text, as far as there is one", metavar="N")


def seams(options: SeamsOptions) -> None:
    """Compare what a plan's layers are given with what they are given in the base, and the logits."""
    base, (windows,) = open_model(options, [options.tokens])
    plan = plans.parse_plan(options.plan, base.config.num_hidden_layers)
    sample = to_batches(base, windows, options)
    progress = cli.Progress("comparing", tokens_of(sample), show_tokens)
    found = joins.measure(base, plan, sample, progress.advance)
    progress.close()
    print(f"{options.model}, {options.plan}: {tokens_of(sample):,} tokens of {names(options.data)}")
    print(plans.layer_table(plan))
    print(joins.table(found))
    values = {"plan_text": options.plan, "plan": plans.to_json(plan), "tokens": tokens_of(sample)}
    path = record(options, "seams", values | joins.to_json(found))
    picture(options.png, path.with_suffix(".png"), lambda figure: joins.draw(found, figure))
    print(path)


# ------------------------------------------------------------------------------------------------ search


@dataclass
class SearchOptions(TextOptions):
    """Flags of `search`."""

    depth: int | None = cli.flag(None, help="layers of the grown model (default: as many as `dus` gives)", metavar="N")
    budget: float = cli.flag(60.0, help="forward passes over the calibration text, at most", metavar="PASSES")
    calibration: int = cli.flag(2048, help="tokens of the text that plans are searched with", metavar="N")
    validation: int = cli.flag(4096, help="further tokens, by which the best of the finalists is picked", metavar="N")
    reporting: int = cli.flag(8192, help="further tokens, of which the figures are", metavar="N")
    copies_only: bool = cli.flag(False, help="leave out plans with identity layers, which compute what the base does")
    cache_bytes: int = cli.flag(2 << 30, help="memory for hidden states that plans share", metavar="N")


def search(options: SearchOptions) -> None:
    """Find the plan of a depth that hurts least before it is trained, and is never worse than the named plans."""
    sizes = {name: getattr(options, name) for name in ("calibration", "validation", "reporting")}
    base, windows = open_model(options, list(sizes.values()))
    n = base.config.num_hidden_layers
    depth = options.depth if options.depth is not None else 2 * (n - n // 4)
    samples = dict(zip(sizes, windows, strict=True))
    counts = ", ".join(f"{name} {sum(w.counted for w in sample):,}" for name, sample in samples.items())
    print(f"{options.model}: {n} -> {depth} layers; tokens of {names(options.data)}: {counts}", flush=True)
    limits = options.budget, options.batch_tokens, options.cache_bytes
    found = plan_search.find(base, depth, samples, *limits, options.copies_only)
    print(plan_search.table(found))
    path = record(options, f"search-{depth}", {"depth": depth, "tokens": sizes, **plan_search.to_json(found)})
    picture(options.png, path.with_suffix(".png"), lambda figure: plan_search.draw(found, figure))
    print(path)
    for name, row in ("copies", found.copies), ("plan", found.proposal):
        values = {"plan_text": row.name, "plan": plans.to_json(row.plan)}
        print(record(options, f"{name}-{depth}", values))


# ------------------------------------------------------------------------------------------------ curves


@dataclass
class CurvesOptions:
    """Flags of `curves`."""

    runs: list[str] = cli.flag(help="what train.py had as --out", metavar="RUN", positional=True)
    png: str | None = cli.flag(None, help="picture to write (default: curves.png in the first run)", metavar="FILE")


def curves(options: CurvesOptions) -> None:
    """Draw the loss curves of runs."""
    check_png(options.png)
    read = [loss_curves.read_curve(Path(run)) for run in options.runs]
    print(loss_curves.plot_text(read))
    print(loss_curves.table_of_heldout(read))
    picture(options.png, Path(options.runs[0]) / "curves.png", lambda figure: loss_curves.draw(read, figure))


COMMANDS = {
    "layers": (LayersOptions, layers),
    "seams": (SeamsOptions, seams),
    "search": (SearchOptions, search),
    "curves": (CurvesOptions, curves),
}


def main() -> None:
    cli.run_command("python -m solar.analyze", COMMANDS)


if __name__ == "__main__":
    cli.run(main)
