"""What a plan does to the stream at its joins, beside the base on the same text.

A copied layer of a plan is given what the plan's layers below it made of the text, not what it was given in the base.
At every place the two inputs are compared, token by token:

    cosine      of the two, averaged over tokens
    norm ratio  |given here| / |given in the base|, geometric mean over tokens

At a seam, where a layer is not fed by the one below it in the base, they part; behind it the curve of the cosines shows
whether the copies pull the stream back to where it was. The plan is judged by what comes out: KL(base || plan), the
divergence of the next token's distribution, in nats a token, averaged over tokens. At a seam it is that of the plan
which this seam would end: everything up to it, then the base's layers to the last. So it shows what each join adds.

A plan that only repeats the base, as `copy` does, gives cosines and ratios of exactly 1 and a KL of exactly 0.

Shapes: B windows, T tokens, D hidden, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from solar import plan as plans
from solar.activations import Walk, distance, unit
from solar.model import Transformer
from solar.plan import Plan
from solar.windows import Batch

CHUNK = 512  # tokens whose logits are compared at a time


class Join(NamedTuple):
    """One place of a plan that holds a copy. jump: as `solar.plan.seams` counts it, 0 where there is no seam."""

    position: int
    layer: int
    jump: int
    cosine: float
    ratio: float
    kl: float | None  # nats a token, at seams only


class Joins(NamedTuple):
    """Every copy of a plan; KL(base || plan), nats a token, of the whole; and the base's depth."""

    places: list[Join]
    kl: float
    depth: int

    @property
    def seams(self) -> list[Join]:
        return [place for place in self.places if place.jump]


@torch.inference_mode()
def measure(
    base: Transformer, plan: Plan, batches: Sequence[Batch], advance: Callable[[int], None] = lambda _: None
) -> Joins:
    """A plan on the base's own layers. advance: told how many tokens have gone through everything.

    Each seam costs the base's layers above it once more. Memory holds the base's states of one batch.
    """
    layers, jumps = base.model.layers, dict(plans.seams(plan))
    cosines, log_ratios, kls = ([0.0] * (len(plan) + 1) for _ in range(3))
    tokens = 0
    for batch in batches:
        walk = Walk(base, [batch.ids])
        inputs = [walk.embed()[0]]  # of each layer of the base, and what comes out
        for layer in layers:
            inputs += walk.through(layer, inputs[-1:])
        truth = inputs[-1][batch.real]
        x = inputs[0]
        for position, source in enumerate(plan):
            if source.init == "identity":
                continue  # gives what it is given, and was never given anything else
            cosine, log_ratio = _compare(x[batch.real], inputs[source.layer][batch.real])
            cosines[position] += cosine
            log_ratios[position] += log_ratio
            if position in jumps:
                rest = [x]
                for layer in layers[source.layer :]:
                    rest = walk.through(layer, rest)
                kls[position] += _kl(walk, truth, rest[0][batch.real])
            (x,) = walk.through(layers[source.layer], [x])
        kls[-1] += _kl(walk, truth, x[batch.real])
        tokens += len(truth)
        advance(len(truth))
    mean = lambda total: total / tokens
    places = [
        Join(
            position,
            source.layer,
            jumps.get(position, 0),
            1 - mean(cosines[position]),
            math.exp(mean(log_ratios[position])),
            mean(kls[position]) if position in jumps else None,
        )
        for position, source in enumerate(plan)
        if source.init == "copy"
    ]
    return Joins(places, mean(kls[-1]), len(layers))


def _compare(here: Tensor, there: Tensor) -> tuple[float, float]:
    """(N, D) twice -> the sums over N of 1 - cosine, and of the logarithm of |here| / |there|."""
    norms = [x.double().norm(dim=-1).log() for x in (here, there)]
    return distance(unit(here), unit(there)).double().sum().item(), (norms[0] - norms[1]).sum().item()


def _kl(walk: Walk, truth: Tensor, x: Tensor) -> float:
    """(N, D) what the last layer gave in the base, and in a plan -> the sum over N of KL(base || plan), in nats."""
    total = 0.0
    for a, b in zip(truth.split(CHUNK), x.split(CHUNK), strict=True):
        p, q = (walk.logits(part).float().log_softmax(dim=-1) for part in (a, b))
        total += (p.exp() * (p - q)).sum(dim=-1).double().sum().item()
    return total


def table(joins: Joins) -> str:
    """The seams, what is left out at either end, and the whole, to be read."""
    lines = [f"{'seam at':>7}  {'from':>4} {'to':>4} {'jump':>5}  {'cosine':>7}  {'norm ratio':>10}  {'KL (nats)':>9}"]
    for seam in joins.seams:
        lines.append(
            f"{seam.position:>7}  {seam.layer - 1 - seam.jump:>4} {seam.layer:>4} {seam.jump:>+5}  {seam.cosine:7.4f}  "
            f"{seam.ratio:10.4f}  {seam.kl:9.4f}"
        )
    first, last = (joins.places[0].layer, joins.places[-1].layer) if joins.places else (0, joins.depth - 1)
    if not joins.seams:
        which = "every layer but the first" if first > 0 else "every layer"
        lines = [f"no seam: {which} is fed by the one below it in the base"]
    if first > 0:
        lines.append(f"begins with layer {first} of the base, which is fed the embedding")
    if last < joins.depth - 1:
        lines.append(f"ends with layer {last} of the base's 0-{joins.depth - 1}, whose output goes to the head")
    if joins.places:
        worst = min(joins.places, key=lambda place: place.cosine)
        lines.append(f"lowest cosine {worst.cosine:.4f}, where position {worst.position} holds layer {worst.layer}")
    return "\n".join([*lines, f"KL of the whole plan's logits from the base's: {joins.kl:.4f} nats a token"])


def to_json(joins: Joins) -> dict:
    """What was measured, by place."""
    return {"places": [place._asdict() for place in joins.places], "kl": joins.kl}


def draw(joins: Joins, figure) -> None:
    """Cosine and norm ratio of every place, the seams marked, on a matplotlib figure."""
    axes = figure.subplots(2, 1, sharex=True)
    positions = [place.position for place in joins.places]
    for axis, name, label in zip(
        axes, ("cosine", "ratio"), ("cosine with the base's input", "norm ratio"), strict=True
    ):
        axis.plot(positions, [getattr(place, name) for place in joins.places], "o-", markersize=3)
        for seam in joins.seams:
            axis.axvline(seam.position, color="gray", alpha=0.4)
        axis.set(ylabel=label)
        axis.grid(alpha=0.3)
    axes[1].set(xlabel=f"position in the plan (lines: seams); KL {joins.kl:.3f} nats a token")
