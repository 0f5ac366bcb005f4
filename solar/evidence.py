"""The report of a reproduction: what was claimed, what was measured, and the curves. `solar.reproduce` fills it in.

A Markdown file, the same numbers as JSON, and the curves as a picture; without matplotlib they are drawn in characters.
"""

import importlib.util
import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch

from solar import cli
from solar.base import ASSETS
from solar.claims import COLLAPSED, EARLY, EQUAL, PARTS, RECOVERED, SLIGHT, Finding
from solar.curves import Curve as Drawn
from solar.curves import plot_text, read_curve
from solar.intervals import VERDICTS
from solar.metrics import read_metrics
from solar.plan import Plan

OLD, NEW = "old text", "new domain"
FLATTENING = ("random", "idus-1")  # curves that begin so far up that of the others nothing would be seen
NOT_MEASURED = "not measured"


class Model(NamedTuple):
    """A start. layers: of the base, as `spans` writes them; losses: in nats a token, {text or source: loss}."""

    name: str
    layers: str
    depth: int
    parameters: int
    losses: dict[str, float]


class Training(NamedTuple):
    """An arm. lr: the one that was chosen; flops: for a token."""

    name: str
    start: str
    train: str
    text: str
    lr: float
    tokens: int
    flops: int
    losses: dict[str, float]


class Curve(NamedTuple):
    """Held-out losses of an arm while it was trained, (tokens, nats a token), mean over the seeds."""

    name: str
    points: list[tuple[int, float]]
    flops: int


class Evidence(NamedTuple):
    """All of a report."""

    facts: dict[str, str]
    findings: list[Finding]
    models: list[Model]
    training: list[Training]
    curves: list[Curve]


# ------------------------------------------------------------------------------------------------ what is read


def orderings(folder: Path) -> list[Finding]:
    """Part f, out of what `make align` left in a folder; one line that says how to make it if there is nothing.

    Raises ValueError for a report that is not one.
    """
    path, where = folder / "report.json", "arXiv:2312.15166, tables 3 to 8"
    if not path.is_file():
        return [Finding("f", "the orderings of the aligned models", where, "`make align` measures them", NOT_MEASURED)]
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["orderings"]
        return [
            Finding("f", row["what"], where, f"{row['mean']:+.1%} ± {row['half']:.1%}", row["verdict"]) for row in rows
        ]
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{path}: no orderings in it; `python -m solar.recipe {folder}` writes it anew, or give another --align"
        ) from None


def heldout(runs: Sequence[Path], shares: dict[str, float], batch_tokens: int) -> list[tuple[int, float]]:
    """(tokens, held-out loss, mean over the sources by their shares and over the runs) of each evaluation."""
    curves = []
    for run in runs:
        evaluations = read_curve(run).heldout
        # By name: a run may have been told of the same text by another path.
        losses = [(step, {Path(path).name: loss for path, loss in each.items()}) for step, each in evaluations]
        present = {name: share for name, share in shares.items() if all(name in each for _, each in losses)}
        if losses and not present:
            raise ValueError(f"{run}: evaluated on {', '.join(losses[0][1])}, and not on {', '.join(shares)}")
        whole = sum(present.values())
        curves.append(
            [
                (step * batch_tokens, sum(share / whole * each[name] for name, share in present.items()))
                for step, each in losses
            ]
        )
    return [(points[0][0], sum(loss for _, loss in points) / len(points)) for points in zip(*curves, strict=True)]


def seconds(run: Path) -> float:
    """How long the steps of a run took."""
    entries = read_metrics(run / "metrics.jsonl")
    return sum(entry["tokens"] / entry["tokens_per_second"] for entry in entries if entry.get("tokens_per_second"))


def machine() -> str:
    """Processor, cores, GPU if there is one, and versions."""
    name = platform.machine()
    if (info := Path("/proc/cpuinfo")).is_file():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        name = names[0] if names else name
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{os.cpu_count()} cores of {name}{gpu}; Python {platform.python_version()}, torch {torch.__version__}"


def command() -> str:
    """The command that this process is."""
    return shlex.join(["python", "-m", "solar.reproduce", *sys.argv[1:]])


def called(model: str) -> str:
    """The name of a model in a report: not where it lies on this machine."""
    return "the embedded base" if Path(model).resolve() == ASSETS.resolve() else Path(model).resolve().name


def spans(plan: Plan) -> str:
    """A plan in one line: 0-8 3-11; an identity copy of layer k is +k."""
    parts: list[list] = []  # [first, last, mark]
    for source in plan:
        mark = "+" if source.init == "identity" else ""
        if parts and parts[-1][1] + 1 == source.layer and parts[-1][2] == mark:
            parts[-1][1] = source.layer
        else:
            parts.append([source.layer, source.layer, mark])
    return " ".join(f"{mark}{first}" if first == last else f"{mark}{first}-{last}" for first, last, mark in parts)


# ------------------------------------------------------------------------------------------------ what is written


def table_of_findings(findings: Sequence[Finding]) -> str:
    """The claims, part by part, as Markdown."""
    parts = []
    for part, rows in groupby(findings, key=lambda finding: finding.part):
        table = markdown(
            ["claim", "source", "measured, 95% interval", "verdict"],
            [[row.what, row.where, row.value, row.verdict] for row in rows],
        )
        parts.append(f"**({part}) {PARTS[part]}**\n\n{table}")
    counts = [f"{sum(row.verdict == verdict for row in findings)} {verdict}" for verdict in (*VERDICTS, NOT_MEASURED)]
    return "\n\n".join([*parts, f"{len(findings)} claims: {', '.join(counts)}."])


def tables_of_models(found: Evidence) -> str:
    """Every start and every arm with its losses, of each text and each source, and the perplexity of the old text."""
    columns = list(dict.fromkeys(name for row in (*found.models, *found.training) for name in row.losses))
    losses = lambda row: [f"{row.losses[name]:.4f}" if name in row.losses else "" for name in columns]
    perplexity = lambda row: f"{math.exp(min(row.losses[OLD], 700)):,.2f}" if OLD in row.losses else ""
    starts = [
        [row.name, row.layers, row.depth, f"{row.parameters:,}", *losses(row), perplexity(row)] for row in found.models
    ]
    arms = [
        [row.name, row.start, row.train, row.text, f"{row.lr:g}", f"{row.tokens:,}", f"{row.tokens * row.flops:.2e}",
         *losses(row), perplexity(row)] for row in found.training
    ]  # fmt: skip
    measured = [*columns, "perplexity, old text"]
    text = markdown(["to begin with", "layers of the base", "layers", "parameters", *measured], starts)
    if arms:
        heads = ["trained", "from", "parameters trained", "on", "learning rate", "tokens", "operations", *measured]
        text += "\n\n" + markdown(heads, arms)
    return text


def markdown(heads: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def crossing(curves: Sequence[Curve]) -> str:
    """At which evaluation the grown model first stood below the base, both trained on as many tokens."""
    by_name = {curve.name: dict(curve.points) for curve in curves}
    if not {"base", "dus"} <= by_name.keys():
        return ""
    below = [tokens for tokens, loss in by_name["dus"].items() if loss < by_name["base"].get(tokens, -1.0)]
    if not below:
        return "At no evaluation did DUS stand below the base trained on as many tokens."
    return f"DUS first stood below the base trained on as many tokens after {min(below):,} tokens."


def report(found: Evidence, picture: str | None) -> str:
    """The report as Markdown. picture: the file of the curves, beside it; None: they are drawn here."""
    facts = [[name, value] for name, value in found.facts.items() if name != "command"]
    parts = [
        f"# The papers' claims, measured\n\n{markdown(['', ''], facts)}\n\n```sh\n{found.facts['command']}\n```",
        f"## The claims\n\n{table_of_findings(found.findings)}\n\n{METHOD}",
    ]
    if found.models:
        parts.append(f"## The models\n\nLosses in nats a token, mean over the seeds.\n\n{tables_of_models(found)}")
    if found.curves:
        drawn = f"![held-out loss over tokens and over operations]({picture})"
        if picture is None:
            drawn = f"```\n{in_characters(found.curves)}\n```"
        parts.append(f"## The curves\n\n{CURVES}\n\n{drawn}\n\n{crossing(found.curves)}".rstrip())
    return "\n\n".join(parts) + "\n"


METHOD = f"""A difference is one of losses, in nats a token, taken window by window between models that read the same
windows; above zero is the claimed side. *Shown*: its 95% interval lies above zero; *contradicted*: below; otherwise
*not shown at this size*. The interval is one over held-out documents and, where there are several seeds, over these too
(`solar/intervals.py`); of one seed it says nothing about others. One in twenty such intervals misses.

Equal tokens: every run has the same number, from the same seed the same sequences in the same order, and a schedule of
its own length; `-early` has {EARLY:.1%} of them, `base-flops` as many as cost what DUS costs (6 operations a parameter
and the attention; 4 for what is frozen). Equal tuning: all have the same schedule, batch and optimizer, and one
learning rate or, of several, each its best by the first seed and by windows that are not in the report. Thresholds, in
`solar/claims.py` since before the first run: fast is {RECOVERED:.0%} of the gap, slightly {SLIGHT:.0%} of what iDUS-1
loses, about equal {EQUAL:.0%} of the distance to it, collapsed {COLLAPSED:.0%} of the way to random weights. Slightly
and about equal are measured by the collapse of iDUS-1: where it has not collapsed, as on a base that bears any order of
its layers, they say little.

Part (f) has differences of scores on the same questions instead, of one seed, in the models that `make align` makes of
the embedded base (`solar/recipe.py`)."""


CURVES = """Evaluated during training, on a few windows held out of the text that is trained on; the claims are measured
on more of them."""


def in_characters(curves: Sequence[Curve]) -> str:
    """The curves as solar/curves.py draws them, without those that would flatten the others."""
    chosen = [curve for curve in curves if curve.name not in FLATTENING] or list(curves)
    per_step = min(tokens for curve in chosen for tokens, _ in curve.points if tokens)
    read = []
    for curve in chosen:
        steps, losses = zip(*((tokens // per_step, loss) for tokens, loss in curve.points), strict=True)
        read.append(Drawn(curve.name, list(steps), list(losses), []))
    return f"{plot_text(read)}\nheld-out loss; a step is {per_step:,} tokens"


def plot(curves: Sequence[Curve], path: Path) -> None:
    """The curves over tokens and over operations, as a picture. Needs matplotlib.

    The loss axis ends a little above where DUS ever was: random weights and what has collapsed would flatten the rest.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    lowest = min(loss for curve in curves for _, loss in curve.points)
    highest = {curve.name: max(loss for _, loss in curve.points) for curve in curves}
    height = highest.get("dus", max(highest.values())) - lowest
    for curve in curves:
        tokens, losses = zip(*curve.points, strict=True)
        label = curve.name if min(losses) < lowest + 1.1 * height else f"{curve.name} (above)"
        style = {"linewidth": 2.5 if curve.name in ("base", "dus") else 1.2, "marker": "o", "markersize": 3}
        panels[0].plot(tokens, losses, label=label, **style)
        panels[1].plot([count * curve.flops for count in tokens], losses, **style)
    panels[0].set(xlabel="tokens", ylabel="held-out loss (nats a token)")
    panels[0].set_ylim(lowest - 0.05 * height, lowest + 1.1 * height)
    panels[1].set(xlabel="operations")
    for panel in panels:
        panel.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write(found: Evidence, folder: Path) -> Path:
    """report.md, report.json and, where matplotlib is installed, curves.png in a folder; returns the first."""
    folder.mkdir(parents=True, exist_ok=True)
    picture = None
    if found.curves and importlib.util.find_spec("matplotlib"):
        picture = "curves.png"
        plot(found.curves, folder / picture)
    elif found.curves:
        print("note: no picture, only characters: pip install matplotlib", file=sys.stderr)
    rows = {
        name: [item._asdict() for item in getattr(found, name)] for name in ("findings", "models", "training", "curves")
    }
    with cli.publish_file(folder / "report.json") as file:
        file.write(json.dumps({"facts": found.facts} | rows, indent=1) + "\n")
    with cli.publish_file(folder / "report.md") as file:
        file.write(report(found, picture))
    return folder / "report.md"
