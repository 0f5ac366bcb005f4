"""Loss curves of runs, as characters and as a picture, and what each run scored on held-out text."""

from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from solar.metrics import read_metrics

MARKS = "ox+*#@%&"  # of the runs, in the terminal; of more runs than marks some share one


@dataclass
class Curve:
    """One run: its label, (step, loss of that step), and (step, {source: held-out loss})."""

    label: str
    steps: list[int]
    losses: list[float]
    heldout: list[tuple[int, dict[str, float]]]


def read_curve(run: Path) -> Curve:
    """The curve of a run's metrics.jsonl. Raises FileNotFoundError for a run without one, ValueError without a step."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give what train.py had as --out")
    entries = read_metrics(path)
    taken = [entry for entry in entries if isinstance(entry.get("loss"), float)]
    if not taken:
        raise ValueError(f"{path}: no step in it yet")
    heldout = [(entry["step"], entry["heldout"]) for entry in entries if entry.get("heldout")]
    return Curve(run.name, [entry["step"] for entry in taken], [entry["loss"] for entry in taken], heldout)


def smooth(losses: list[float], window: int) -> list[float]:
    """The mean of each loss and the window - 1 before it, as far as there are any."""
    sums = [0.0]
    for loss in losses:
        sums.append(sums[-1] + loss)
    return [(sums[i + 1] - sums[max(i + 1 - window, 0)]) / min(i + 1, window) for i in range(len(losses))]


def plot_text(curves: list[Curve], width: int = 72, height: int = 18) -> str:
    """All curves as lines of characters, smoothed over a width-th of the longest, with the axes' ends written out."""
    last = max(curve.steps[-1] for curve in curves)
    first = min(curve.steps[0] for curve in curves)
    columns = []
    for curve in curves:
        smoothed = smooth(curve.losses, max(len(curve.losses) // width, 1))
        column: dict[int, float] = {}
        for step, loss in zip(curve.steps, smoothed, strict=True):
            column[round((step - first) / max(last - first, 1) * (width - 1))] = loss
        columns.append(column)
    low = min(min(column.values()) for column in columns)
    high = max(max(column.values()) for column in columns)
    grid = [[" "] * width for _ in range(height)]
    for mark, column in zip(cycle(MARKS), columns, strict=False):
        for x, loss in column.items():
            y = round((high - loss) / max(high - low, 1e-12) * (height - 1))
            grid[y][x] = mark
    lines = []
    for y, row in enumerate(grid):
        label = f"{high:8.3f} " if y == 0 else f"{low:8.3f} " if y == height - 1 else " " * 9
        lines.append(f"{label}|{''.join(row).rstrip()}")
    lines.append(" " * 9 + "+" + "-" * width)
    lines.append(" " * 10 + f"step {first}".ljust(width - 10) + f"{last}".rjust(10))
    lines += [f"{mark:>10} {curve.label}" for mark, curve in zip(cycle(MARKS), curves, strict=False)]
    return "\n".join(lines)


def table_of_heldout(curves: list[Curve]) -> str:
    """What each run scored on the held-out text of each source, first and last."""
    sources = sorted({source for curve in curves for _, losses in curve.heldout for source in losses})
    if not sources:
        return ""
    wide = max(len(curve.label) for curve in curves)
    lines = [f"{'held-out loss':<{wide}}" + "".join(f"  {source[-24:]:>26}" for source in sources)]
    for curve in curves:
        line = f"{curve.label:<{wide}}"
        for source in sources:
            seen = [(step, losses[source]) for step, losses in curve.heldout if source in losses]
            text = f"{seen[0][1]:.4f} -> {seen[-1][1]:.4f} ({seen[-1][0]})" if seen else "-"
            line += f"  {text:>26}"
        lines.append(line)
    return "\n".join(lines)


def draw(curves: list[Curve], figure) -> None:
    """The same on a matplotlib figure."""
    axes = figure.subplots()
    for curve in curves:
        (line,) = axes.plot(curve.steps, smooth(curve.losses, max(len(curve.losses) // 100, 1)), label=curve.label)
        for source in sorted({source for _, losses in curve.heldout for source in losses}):
            points = [(step, losses[source]) for step, losses in curve.heldout if source in losses]
            axes.plot(*zip(*points, strict=True), "o--", color=line.get_color(), alpha=0.5, markersize=3)
            axes.annotate(source, points[-1], fontsize=7, alpha=0.7)
    axes.set(xlabel="step", ylabel="loss of a token (nats)")
    axes.legend()
    axes.grid(alpha=0.3)
