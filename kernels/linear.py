"""The linear projection, and which library multiplies.

    y = x W^T + b          dx = dy W,   dW = dy^T x,   db = sum over rows of dy

Shapes: x (..., D), weight (O, D), bias (O,) -> (..., O), in their dtype.

On a GPU the product is the library's own, and so it is on a CPU, where there are two of them. For fp32 torch takes MKL,
whose fast paths are for Intel's processors alone; oneDNN compiles a product for the processor at hand. On a Zen 4 it
takes 0.82-0.90 of MKL's time for y and 0.85-0.95 for dx (2,048 rows, D and O from 96 to 2,048; within a tenth of the
time the same for dW, which MKL keeps), and 0.55 with a single row, which is what generating a token asks for. For
16-bit types torch takes oneDNN by itself.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The specification: (..., D), (O, D), (O,) -> (..., O)."""
    y = x @ weight.T
    return y if bias is None else y + bias


def linear_torch(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, but for fp32 on a CPU where oneDNN can be asked directly. (torch.compile chooses for itself.)"""
    plain = x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype != torch.float32
    if plain or torch.compiler.is_compiling() or not _has_onednn():
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Linear.apply(x, weight, bias)
    return product(x, weight, bias)


@functools.cache
def _has_onednn() -> bool:
    """The operator is the one that torch.compile calls; it has an underscore, so a torch without it is survived."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """oneDNN's x W^T + b of fp32 tensors, without a gradient; the weight may be a transposed view."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight = ctx.saved_tensors
        want_dx, want_dw, want_db = ctx.needs_input_grad
        rows = dy.flatten(0, -2)
        return (
            product(dy, weight.T) if want_dx else None,
            rows.T @ x.flatten(0, -2) if want_dw else None,
            rows.sum(0) if want_db else None,
        )
