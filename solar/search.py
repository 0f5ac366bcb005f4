"""For a depth, the plan that hurts least before it is trained: which layers of the base to repeat, and where.

Three samples of a text, none of which shares a window with another, keep the search honest:

    calibration    what plans are tried on, as many as the budget of forward passes allows
    validation     by which the best of the finalists is picked
    reporting      of which the figures are, and on which nothing has been chosen yet

The named plans of that depth (`dus`, `idus`, `stack`, `expand`) are measured on the reporting text too. Where one of
them does better there than what was picked, it is what is proposed: so a proposal is never worse there than they are.
The price of that promise is said with it: a plan that was picked before has a figure without any choice in it, and one
that was chosen on the reporting text has the least of several figures, which flatters it a little.

`expand` computes exactly what the base does, so before training nothing can be expected to beat it, and nothing is to
be found out about it. It is the proposal wherever it has the depth, as the numbers demand; beside it there is always a
second one, the best plan of copies, whose layers all compute something from the first step. `--copies-only` leaves
identity layers out.

What is tried: first the named plans; then one run of layers that stands twice, at every place; then, beginning with the
best plan so far, its neighbours: a seam moved, or layers given by one run to another or to a new one. Of the neighbours
that nobody has tried the most promising one is next, by prices that all trials so far suggest for each layer (`guess`).
Every layer of the base stands somewhere in every plan, in order: what was trained is kept.

Shapes: B windows, T tokens, D hidden; n layers in the base.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from solar import cli
from solar.activations import Walk
from solar.model import Transformer
from solar.perplexity import Perplexity, exp, finite, total, with_error
from solar.plan import Plan, expand, interlock, seams, slices
from solar.plan import to_json as plan_json
from solar.windows import Window, batches, collate

FAR_OFF = 1.0  # nats a token above the best plan: such plans teach nothing about the good ones
RIDGE = 0.1
FINALISTS = 6  # plans that calibration hands over to validation

Slices = tuple[tuple[int, int], ...]  # half-open ranges of the base's layers, one behind the other


# ------------------------------------------------------------------------------------------------ named plans


def named_plans(n: int, depth: int) -> dict[str, Plan]:
    """The plans of that depth that have a name, but for repetitions. ValueError for a depth that none could have.

    Of `idus` those with groups of 1, 2, 4, 8, ... layers, and half of each copy; of `expand` the one with most groups:
    all of them compute the same.
    """
    if not n < depth <= 2 * n:
        raise ValueError(f"--depth {depth}: the base has {n} layers, so from {n + 1} to {2 * n} can be searched")
    found: dict[str, Plan] = {}
    if depth % 2 == 0:
        m, half = n - depth // 2, depth // 2
        found["stack" if m == 0 else f"dus:{m}"] = interlock(n, m, half)
        groups = {-(-half // 2), *(1 << i for i in range(half.bit_length()))}
        for group in sorted(groups, reverse=True):
            if group < half:
                found[f"idus:{m}:{group}"] = interlock(n, m, group)
    for groups in range(n, 0, -1):
        if n % groups == 0 and (depth - n) % groups == 0 and (depth - n) // groups <= n // groups:
            found[f"expand:{groups}:{(depth - n) // groups}"] = expand(n, groups, (depth - n) // groups)
            break
    return found


def is_of_copies(plan: Plan) -> bool:
    return all(source.init == "copy" for source in plan)


# ------------------------------------------------------------------------------------------------ scoring


class Scorer:
    """The perplexity of plans on one sample of text, the states behind shared beginnings used again.

    Two plans that begin with the same layers make the same states of the text up to where they part. Those states are
    kept, the least recently used given up beyond `cache_bytes`, and a plan is computed from the longest beginning that
    is known. passes: what has been computed so far, in forward passes of a model of `depth` layers, each with the
    vocabulary projection: what is used again costs nothing. (Counted in products with weights, without attention's own,
    which grow with the window and are the same for every layer.)
    """

    def __init__(self, base: Transformer, windows: Sequence[Window], depth: int, batch_tokens: int, cache_bytes: int):
        self.base, self.windows, self.cache_bytes = base, windows, cache_bytes
        self.order = batches(windows, batch_tokens)
        device = base.model.embed_tokens.weight.device
        found = [collate([windows[i] for i in batch], device) for batch in self.order]
        self.walk, self.labels = Walk(base, [batch.ids for batch in found]), [batch.labels for batch in found]
        self.states: OrderedDict[tuple[int, ...], list[Tensor]] = OrderedDict()  # the last used last
        self.layer_size = sum(parameter.numel() for parameter in base.model.layers[0].parameters())
        self.head_size = base.config.vocab_size * base.config.hidden_size
        self.whole = depth * self.layer_size + self.head_size
        self.passes, self.held = 0.0, 0

    def cost(self, plan: Plan) -> float:
        """How many forward passes `score` would compute for a plan now."""
        layers = _computed(plan)
        return ((len(layers) - len(self._known(layers))) * self.layer_size + self.head_size) / self.whole

    @torch.inference_mode()
    def score(self, plan: Plan) -> Perplexity:
        """What a plan, carried out on the base's own layers, makes of the text."""
        self.passes += self.cost(plan)
        layers = _computed(plan)
        known = self._known(layers)
        for length in range(1, len(known) + 1):
            if layers[:length] in self.states:
                self.states.move_to_end(layers[:length])
        states = self.states[known] if known else self.walk.embed()
        for length in range(len(known) + 1, len(layers) + 1):
            states = self.walk.through(self.base.model.layers[layers[length - 1]], states)
            self._keep(layers[:length], states)
        nats = np.empty(len(self.windows))
        for indices, labels, x in zip(self.order, self.labels, states, strict=True):
            nats[indices] = -self.walk.logps(x, labels).double().sum(dim=1).cpu().numpy()
        return total(self.windows, nats)

    def _known(self, layers: tuple[int, ...]) -> tuple[int, ...]:
        """The longest beginning whose states are kept."""
        return next((layers[:length] for length in range(len(layers), 0, -1) if layers[:length] in self.states), ())

    def _keep(self, beginning: tuple[int, ...], states: list[Tensor]) -> None:
        self.states[beginning] = states
        self.held += sum(x.nbytes for x in states)
        while self.held > self.cache_bytes and self.states:
            _, dropped = self.states.popitem(last=False)
            self.held -= sum(x.nbytes for x in dropped)


def _computed(plan: Plan) -> tuple[int, ...]:
    """The layers that compute something: an identity layer gives exactly what it is given."""
    return tuple(source.layer for source in plan if source.init == "copy")


# ------------------------------------------------------------------------------------------------ trying plans


def to_slices(plan: Plan) -> Slices:
    """A plan of copies as ranges: cut at its seams."""
    edges = [0, *(position for position, _ in seams(plan)), len(plan)]
    return tuple((plan[a].layer, plan[b - 1].layer + 1) for a, b in pairwise(edges))


def one_run(n: int, first: int, length: int) -> Slices:
    """The base with layers first, ..., first + length - 1 standing twice."""
    return (0, first + length), (first, n)


def neighbours(plan: Slices, n: int) -> Iterator[Slices]:
    """Plans of the same depth that differ by one seam moved, or by layers that one run has given to another place.

    A run is what two slices that follow each other share: (0, 8), (5, 12) repeats 5, 6 and 7.
    """
    seams = [(plan[i][1], plan[i + 1][0]) for i in range(len(plan) - 1)]  # up to here, then again from here
    extra = sum(end - start for end, start in seams)
    steps = sorted({1, 2, 4, 8, extra // 2} - {0})
    for i, (end, start) in enumerate(seams):
        others = seams[:i] + seams[i + 1 :]
        for step in (sign * step for step in steps for sign in (1, -1)):
            yield from _joined([*others, (end + step, start + step)], n)
        for step in (step for step in steps if step <= end - start):
            for shrunk in ((end - step, start), (end, start + step)):
                for j, (to_end, to_start) in enumerate(others):
                    rest = [*others[:j], *others[j + 1 :], shrunk]
                    yield from _joined([*rest, (to_end + step, to_start)], n)
                    yield from _joined([*rest, (to_end, to_start - step)], n)
                for place in range(n - step + 1):
                    yield from _joined([*others, shrunk, (place + step, place)], n)


def _joined(seams: list[tuple[int, int]], n: int) -> Iterator[Slices]:
    """The plan of these seams, if there is one: without those that repeat nothing, ends and starts in order."""
    seams = sorted((end, start) for end, start in seams if end != start)
    starts, ends = [0, *(start for _, start in seams)], [*(end for end, _ in seams), n]
    in_order = starts == sorted(starts) and ends == sorted(ends) and starts[-1] >= 0 and starts[0] == 0
    if in_order and all(0 <= start < end <= n for start, end in zip(starts, ends, strict=True)):
        yield tuple(zip(starts, ends, strict=True))


class Trial(NamedTuple):
    """A plan that has been tried; passes: how many had been computed by then."""

    plan: Slices
    measured: Perplexity
    passes: float

    @property
    def loss(self) -> float:
        return loss_of(self.measured)


def explore(
    scorer: Scorer, depth: int, starts: Sequence[Plan], budget: float, advance: Callable[[float], None]
) -> dict[Slices, Trial]:
    """Try the base, then plans of copies of that depth until the budget is used up or nothing is left.

    starts: plans to begin with. advance: told how many passes have been computed since the last time.
    """
    n = len(scorer.base.model.layers)
    trials: dict[Slices, Trial] = {}

    def attempt(plan: Slices) -> bool:
        """Try a plan, if it has not been; False if the budget does not allow it."""
        if plan in trials:
            return True
        copies = slices(n, list(plan))
        before = scorer.passes
        if before + scorer.cost(copies) > budget:
            return False
        trials[plan] = Trial(plan, scorer.score(copies), scorer.passes)
        advance(scorer.passes - before)
        return True

    base = ((0, n),)
    runs = [one_run(n, first, depth - n) for first in range(2 * n - depth + 1)]
    if not all(attempt(plan) for plan in [base, *map(to_slices, starts), *runs]):
        return trials
    exhausted = {base}
    while left := [trial for plan, trial in trials.items() if plan not in exhausted]:
        best = min(left, key=lambda trial: trial.loss)
        around = [plan for plan in neighbours(best.plan, n) if plan not in trials]
        if not around:
            exhausted.add(best.plan)
        elif not attempt(around[np.argmin(guess(around, list(trials.values())[1:], n))]):
            break
    return trials


def guess(plans: Sequence[Slices], trials: Sequence[Trial], n: int) -> np.ndarray:
    """(N,) what plans may cost, in nats a token, from what others of their depth have cost.

    As if each layer that stands once more had a price of its own, and each seam one for all: ridge regression on the
    trials within FAR_OFF of the best, since what ruins the model says nothing about what does not.
    """
    best = min(trial.loss for trial in trials)
    near = [trial for trial in trials if trial.loss <= best + FAR_OFF]
    known, losses = _copies_and_seams([trial.plan for trial in near], n), np.array([trial.loss for trial in near])
    mean = known.mean(axis=0)
    centred = known - mean
    prices = np.linalg.solve(centred.T @ centred + RIDGE * np.eye(n + 1), centred.T @ (losses - losses.mean()))
    return (_copies_and_seams(plans, n) - mean) @ prices


def _copies_and_seams(plans: Sequence[Slices], n: int) -> np.ndarray:
    """(N, n + 1) how often each layer stands in each plan, and how many seams it has."""
    found = np.zeros((len(plans), n + 1))
    for row, plan in zip(found, plans, strict=True):
        for start, stop in plan:
            row[start:stop] += 1
        row[n] = len(plan) - 1
    return found


# ------------------------------------------------------------------------------------------------ choosing


def loss_of(measured: Perplexity) -> float:
    """Nats a token; infinite if it is not a number, so that such a plan is never the best."""
    return measured.loss if measured.loss == measured.loss else float("inf")


@dataclass(eq=False)
class Row:
    """A plan, and its perplexity on each sample that it was measured on."""

    name: str
    plan: Plan
    measured: dict[str, Perplexity] = field(default_factory=dict)

    def loss(self, sample: str) -> float:
        return loss_of(self.measured[sample])


class Found(NamedTuple):
    """What a search has found. rows: the base, the named plans, the finalists, the picked one among them.

    picked: the plan of copies that validation picks. copies: the same, or the named plan of copies that does better on
    the reporting text. proposal: that, or a plan with identity layers which does better still. passes, trials: what
    calibration has cost, and what was tried.
    """

    rows: list[Row]
    picked: Row
    copies: Row
    proposal: Row
    passes: float
    trials: list[Trial]


def find(
    base: Transformer,
    depth: int,
    samples: dict[str, Sequence[Window]],
    budget: float,
    batch_tokens: int,
    cache_bytes: int,
    copies_only: bool = False,
) -> Found:
    """Search among the plans of that depth. base: as `load_model(plan="copy")` gives it.

    samples: windows for "calibration", "validation" and "reporting". budget: forward passes over the calibration text,
    see `Scorer`. Raises ValueError as `named_plans` does, and for a budget that does not allow to try a plan.
    """
    n = len(base.model.layers)
    if not budget >= 1:
        raise ValueError(f"--budget {budget:g}: at least 1 forward pass is needed")
    whole = Row("the base", slices(n, [(0, n)]))
    named = [Row(name, plan) for name, plan in named_plans(n, depth).items() if is_of_copies(plan) or not copies_only]
    of_copies = [row for row in named if is_of_copies(row.plan)]
    scorer = Scorer(base, samples["calibration"], depth, batch_tokens, cache_bytes)
    progress = cli.Progress("searching", budget, lambda count: f"{count:.1f} passes")
    trials = explore(scorer, depth, [row.plan for row in of_copies], budget, progress.advance)
    progress.close()
    leading = finalists(trials, of_copies, n)
    if not leading:
        raise ValueError(f"--budget {budget:g}: not enough to try a plan of {depth} layers; give more")
    rows = [whole, *named, *(row for row in leading if row not in named)]
    for row in rows:
        computed = to_slices([source for source in row.plan if source.init == "copy"])
        if computed in trials:
            row.measured["calibration"] = trials[computed].measured
    passes = scorer.passes
    del scorer  # and with it the states that it keeps

    def measure(sample: str, rows: Sequence[Row]) -> None:
        scorer = Scorer(base, samples[sample], depth, batch_tokens, cache_bytes)
        progress = cli.Progress(sample, len(rows), lambda count: f"{count:.0f} plans")
        for row in rows:
            row.measured[sample] = scorer.score(row.plan)
            progress.advance(1)
        progress.close()

    measure("validation", [whole, *leading])
    picked = min(leading, key=lambda row: row.loss("validation"))
    measure("reporting", [whole, *named, *[picked] * (picked not in named)])
    copies = min([picked, *of_copies], key=lambda row: row.loss("reporting"))
    proposal = min([copies, *named], key=lambda row: row.loss("reporting"))
    return Found(rows, picked, copies, proposal, passes, list(trials.values()))


def finalists(trials: dict[Slices, Trial], named: Sequence[Row], n: int) -> list[Row]:
    """The plans that validation decides between: FINALISTS that calibration likes best, and always a named one."""
    ranked = sorted((trial for plan, trial in trials.items() if plan != ((0, n),)), key=lambda trial: trial.loss)
    known = {to_slices(row.plan): row for row in named}
    rows = [known.get(trial.plan) or Row(to_text(trial.plan), slices(n, list(trial.plan))) for trial in ranked]
    first_named = next((row for row in rows[FINALISTS:] if row in named), None)
    heard = any(row in named for row in rows[:FINALISTS])
    return rows[:FINALISTS] + [first_named] * (first_named is not None and not heard)


def to_text(plan: Slices) -> str:
    """As `--plan` takes it."""
    return "slices:" + ",".join(f"{start}-{stop}" for start, stop in plan)


# ------------------------------------------------------------------------------------------------ telling


def table(found: Found) -> str:
    """Every row with its perplexities, what was chosen, and what the choice is worth, to be read."""
    samples = "calibration", "validation", "reporting"
    wide = max(len(row.name) for row in found.rows)
    whole = found.rows[0].measured["reporting"]
    lines = [f"{'perplexity':<{wide}}  seams" + "".join(f"  {name:>15}" for name in samples) + "  nats a token more"]
    for row in found.rows:
        texts = [
            with_error(part.perplexity, part.perplexity_error) if (part := row.measured.get(name)) else ""
            for name in samples
        ]
        more = ""
        if row is not found.rows[0] and "reporting" in row.measured:
            more = with_error(*row.measured["reporting"].over(whole), 4, "+")
        cells = "".join(f"  {text:>15}" for text in texts)
        lines.append(f"{row.name:<{wide}}  {len(seams(row.plan)):>5}{cells}  {more:>17}".rstrip())
    lines += [
        "",
        f"tried       {len(found.trials)} plans in {found.passes:.1f} forward passes over the calibration text",
    ]
    lines.append(f"of copies   {found.copies.name}")
    if found.copies is not found.picked:
        lines.append(
            f"note: validation picked {found.picked.name}; {found.copies.name} does better on the reporting text and "
            "is given instead, so its figure there is the least of several and flatters it a little"
        )
    if found.proposal is not found.copies:
        lines.append(
            f"proposed    {found.proposal.name}: its new layers are identities, so until it is trained it is the base"
        )
    return "\n".join(lines)


def to_json(found: Found) -> dict:
    """What was measured, and every trial."""
    rows = [
        {"name": row.name, "plan": plan_json(row.plan), "seams": len(seams(row.plan))}
        | {sample: part.to_json() for sample, part in row.measured.items()}
        for row in found.rows
    ]
    trials = [
        {"plan": to_text(trial.plan), "loss": finite(trial.loss), "passes": round(trial.passes, 3)}
        for trial in found.trials
    ]
    chosen = {name: getattr(found, name).name for name in ("picked", "copies", "proposal")}
    return {**chosen, "passes": found.passes, "rows": rows, "trials": trials}


def draw(found: Found, figure) -> None:
    """Perplexity of every trial against the passes computed, the least so far, and the named plans as lines."""
    axes = figure.subplots()
    trials = found.trials[1:]  # without the base
    losses = [trial.loss for trial in trials]
    shown = [trial for trial in trials if trial.loss < min(losses) + FAR_OFF]
    axes.plot([trial.passes for trial in shown], [exp(trial.loss) for trial in shown], ".", label="plans tried")
    least = [exp(min(losses[: i + 1])) for i in range(len(losses))]
    axes.step([trial.passes for trial in trials], least, where="post", label="best so far")
    named = [row for row in found.rows if not row.name.startswith("slices") and is_of_copies(row.plan)]
    for row in named:
        if (part := row.measured.get("calibration")) and row.loss("calibration") < min(losses) + FAR_OFF:
            axes.axhline(part.perplexity, color="gray", linewidth=0.7)
            axes.annotate(row.name, (trials[-1].passes, part.perplexity), fontsize=7, ha="right", va="bottom")
    axes.set(xlabel="forward passes over the calibration text", ylabel="perplexity of the calibration text")
    axes.legend()
