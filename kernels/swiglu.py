"""SwiGLU (arXiv:2002.05202, eq. 6): the gated activation between an MLP's projections.

    y = silu(gate) * up,   silu(z) = z / (1 + exp(-z))

Shapes: gate and up (..., F). Computed in fp32 and rounded once.
"""

import torch.nn.functional as F
from torch import Tensor


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The specification: (..., F), (..., F) -> (..., F)."""
    gate32, up32 = (t.float() if t.dtype.itemsize < 4 else t for t in (gate, up))
    return (gate32 * gate32.neg().exp().add(1).reciprocal() * up32).to(gate.dtype)


def swiglu_torch(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up
