"""How much each layer does, and which layers are alike: the hidden states between them, compared.

Block influence (arXiv:2403.03853, section 2): BI = 1 - cosine of what a layer is given and what it gives, averaged over
tokens. A layer of little influence is the one that a second copy of disturbs least, or that is missed least.

The similarity of two layers is the cosine of what they give, averaged over tokens. That is one measure throughout: the
first diagonal beside the main one is 1 - BI. And it is the one that a seam is about: a plan that goes from layer i on
to layer j gives it the state behind i where it used to get the one behind j - 1, so the cosine at that seam stands in
row i, column j - 1, before any plan has been tried. (arXiv:2403.17887 takes arccos / pi of the cosine at the last token
of each sequence: another scale, and one token in a window instead of all.) Each token counts the same, whatever its
norm: the few whose norm is a thousand times that of the others decide nothing.

Shapes: B windows, T tokens, D hidden, L layers.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from solar.activations import Walk, distance, unit
from solar.model import Transformer
from solar.windows import Batch


class Similarity(NamedTuple):
    """influence (L,) of each layer; similarity (L + 1, L + 1) of the states: the embedding, then what each layer gives;
    norms (L + 1,) of the states, in the geometric mean over tokens. All in fp64."""

    influence: Tensor
    similarity: Tensor
    norms: Tensor


@torch.inference_mode()
def measure(
    model: Transformer, batches: Sequence[Batch], advance: Callable[[int], None] = lambda _: None
) -> Similarity:
    """Averages over the real tokens of the batches, in fp32 per token and fp64 over them.

    Memory holds the L + 1 states of one batch. advance: told how many tokens have been compared.
    """
    layers = model.model.layers
    distances = torch.zeros(len(layers) + 1, len(layers) + 1, dtype=torch.float64)
    log_norms, tokens = torch.zeros(len(layers) + 1, dtype=torch.float64), 0
    for batch in batches:
        walk = Walk(model, [batch.ids])
        states = walk.embed()
        directions = []
        for index in range(len(layers) + 1):
            if index:
                states = walk.through(layers[index - 1], states)
            x = states[0][batch.real]
            log_norms[index] += x.double().norm(dim=-1).log().sum().item()
            directions.append(unit(x))
            for below in range(index):
                distances[index, below] += distance(directions[index], directions[below]).double().sum().item()
        tokens += len(x)
        advance(len(x))
    distances = (distances + distances.T) / tokens
    return Similarity(distances.diagonal(-1).clone(), 1 - distances, (log_norms / tokens).exp())


def table(found: Similarity) -> str:
    """Influence and norm of each layer, with a bar, and the similarities as characters, to be read."""
    most = found.influence.max().item()
    lines = [f"{'layer':>5}  {'influence':>9}  {'norm out':>8}"]
    for index, influence in enumerate(found.influence.tolist()):
        bar = "#" * round(40 * influence / most) if most > 0 else ""
        lines.append(f"{index:>5}  {influence:9.4f}  {found.norms[index + 1]:8.1f}  {bar}".rstrip())
    return "\n".join([*lines, "", heat_map(found.similarity)])


SHADES = " .:-=+*#%@"  # from a cosine of 0, or less, to 1


def heat_map(similarity: Tensor) -> str:
    """A character a pair: `@` is above 0.9, a space below 0.1. Row and column e: the embedding, then the layers."""
    shade = lambda cosine: SHADES[min(max(int(cosine * 10), 0), 9)]
    names = ["e", *(str(index % 10) for index in range(len(similarity) - 1))]
    lines = [
        f"similarity of what the layers give: {SHADES!r} for a cosine of 0.0, 0.1, ... 0.9",
        "      " + "".join(names),
    ]
    for index, row in enumerate(similarity.tolist()):
        lines.append(f"{'e' if index == 0 else index - 1:>5} " + "".join(map(shade, row)))
    return "\n".join(lines)


def to_json(found: Similarity) -> dict:
    """What was measured, as lists."""
    return {
        "influence": found.influence.tolist(),
        "similarity": found.similarity.tolist(),
        "norms": found.norms.tolist(),
    }


def draw(found: Similarity, figure) -> None:
    """Influence as bars beside the heat map, on a matplotlib figure."""
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.15])
    left.bar(range(len(found.influence)), found.influence.tolist())
    left.set(xlabel="layer", ylabel="block influence, 1 - cosine(in, out)")
    edge = len(found.similarity) - 0.5
    image = right.imshow(found.similarity, origin="lower", extent=(-1.5, edge - 1, -1.5, edge - 1), vmax=1)
    right.set(xlabel="layer (-1: embedding)", ylabel="layer", title="cosine of what two layers give")
    figure.colorbar(image, ax=right)
