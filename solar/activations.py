"""A model taken one layer at a time: the hidden states between its layers, kept, compared or used again.

`Transformer.forward` goes from ids to logits in one call. To look between the layers, to run them in another order, or
to go on from where another order left off, the same steps are taken here one by one, and give the same bits.

Shapes: B windows side by side, T tokens of the longest, D hidden, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

import kernels
from solar.model import DecoderLayer, RMSNorm, Transformer, rotary_table


class Walk:
    """Batches of ids (B, T) on their way through the layers of a model; their hidden states are a list, one a batch.

    walk = Walk(model, [ids])
    states = walk.embed()
    for layer in model.model.layers:
        states = walk.through(layer, states)
    logits = walk.logits(states[0])
    """

    def __init__(self, model: Transformer, batches: Sequence[Tensor]):
        self.model, self.batches = model, batches
        self.angles = [
            rotary_table(torch.arange(ids.shape[1], device=ids.device)[None], model.config) for ids in batches
        ]

    def embed(self) -> list[Tensor]:
        """What the first layer is given: (B, T, D) of each batch."""
        return [self.model.model.embed_tokens(ids) for ids in self.batches]

    def through(self, layer: DecoderLayer, states: Sequence[Tensor]) -> list[Tensor]:
        """What a layer, of this model or of one of its kind, makes of the states."""
        return [layer(x, *angles, (None, None)) for x, angles in zip(states, self.angles, strict=True)]

    def logits(self, x: Tensor) -> Tensor:
        """(..., D) what the last layer gave -> (..., V)."""
        return kernels.linear(self._norm(x), self._head)

    def logps(self, x: Tensor, labels: Tensor) -> Tensor:
        """(B, T, D) what the last layer gave, (B, T) -> (B, T) log-probabilities, as `model(ids, labels=labels)`."""
        shape = labels[:, 1:].shape
        found = kernels.label_logprobs(self._norm(x)[:, :-1].flatten(0, 1), self._head, labels[:, 1:].flatten())
        return torch.nn.functional.pad(found.view(shape), (1, 0))

    @property
    def _norm(self) -> RMSNorm:
        return self.model.model.norm

    @property
    def _head(self) -> Tensor:
        tied = self.model.config.tie_word_embeddings
        return (self.model.model.embed_tokens if tied else self.model.lm_head).weight


def unit(x: Tensor) -> Tensor:
    """(..., D) -> the same directions with length 1, in fp32."""
    return torch.nn.functional.normalize(x.float(), dim=-1)


def distance(a: Tensor, b: Tensor) -> Tensor:
    """(..., D) twice, as `unit` gives them -> (...,) 1 - cosine: exactly 0 for equal vectors.

    Half the squared length of the difference, which is the same and, unlike 1 - a b, does not lose what is small: many
    layers turn their input by a few degrees only.
    """
    return (a - b).square_().sum(dim=-1) / 2
