"""RMSNorm (arXiv:1910.07467, eq. 4), alone and fused with the residual addition that precedes it.

    y_i = w_i * x_i / sqrt(mean_j(x_j^2) + eps)

Shapes: x (..., D), weight (D,). The normalised value is computed in fp32, rounded to the dtype of x, and only then
multiplied by the weight: that one rounding in the middle is Llama's, and every checkpoint was trained with it.
"""

import torch.nn.functional as F
from torch import Tensor


def rmsnorm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The specification: (..., D), (D,) -> (..., D) in the promoted dtype of x and weight."""
    x32 = x.float() if x.dtype.itemsize < 4 else x
    normalised = x32 * (x32.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return weight * normalised.to(x.dtype)


def add_rmsnorm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """residual + x, normalised, and the sum itself, which the residual stream carries on."""
    total = residual + x
    return rmsnorm_reference(total, weight, eps), total


def rmsnorm_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    # Without its weight argument: torch's own would multiply before it rounds.
    return weight * F.rms_norm(x, (x.shape[-1],), None, eps)


def add_rmsnorm_torch(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = residual + x
    return rmsnorm_torch(total, weight, eps), total
