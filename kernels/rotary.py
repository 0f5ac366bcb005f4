"""Rotary position embedding (arXiv:2104.09864, eq. 34), in the half-split layout of every Hugging Face Llama.

Dimension i of the first half and dimension i of the second form a pair, turned by the angle position * frequency_i:

    y_first  = x_first * cos - x_second * sin
    y_second = x_second * cos + x_first * sin

Shapes: q (B, H, T, E), k (B, K, T, E), cos and sin (B or 1, T, E/2) in fp32. Computed in fp32 and rounded once.
"""

import torch
from torch import Tensor


def rotary_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The specification: q and k turned, in their own dtypes."""
    return _turn(q, cos, sin), _turn(k, cos, sin)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # the same for every head
    first, second = x.to(torch.promote_types(x.dtype, cos.dtype)).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
