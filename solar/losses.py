"""What training minimises, as sums over tokens. Tensors in, tensors out: nothing here sees a model.

A loss is a sum and a count, and whoever steps divides by the count of the whole step, over all micro-batches and ranks.
The mean of their means is another number as soon as they count differently, and masks make them differ.

Shapes: B batch, T positions, V vocabulary.
"""

import torch
from torch import Tensor

IGNORED = -100  # a label that is not learned


def learned(labels: Tensor) -> Tensor:
    """(B, T) labels -> (B, T) bool: those that are learned. Nothing stands before a sequence's first token."""
    mask = labels != IGNORED
    mask[:, 0] = False
    return mask


def token_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, T, V), (B, T) -> (B, T) fp32 log-probability of each label given the tokens before it; 0 where not learned.

    Labels are aligned with the inputs: the logits at t-1 are asked for label t. This is the specification of what
    `model(input_ids, labels=labels)` computes in chunks.
    """
    mask = learned(labels)[:, 1:]
    logps = logits[:, :-1].float().log_softmax(-1)
    picked = logps.gather(-1, labels[:, 1:].where(mask, 0)[..., None])[..., 0]
    return torch.nn.functional.pad(picked.where(mask, 0.0), (1, 0))


def lm_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T, V), (B, T) -> the sum of -log p(label) over the learned labels, and how many those are."""
    return -token_logps(logits, labels).sum(), learned(labels).sum()
