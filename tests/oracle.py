"""What the tests of kernels are held against: the truth in fp64, and how far from it rounding alone leads.

The rule: every output and every gradient is at most twice as far from the truth as the reference in its dtype is.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.attention import visible


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Drawn in fp64, then rounded: every dtype sees the same numbers as nearly as it can."""
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape))
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def outputs_and_gradients(form: Callable, inputs: list[Tensor], cotangents: list[Tensor]) -> list[Tensor]:
    """Every output of `form(*inputs)`, then, where there are cotangents, the gradient of every floating input."""
    leaves = [x.detach().requires_grad_(x.is_floating_point() and bool(cotangents)) for x in inputs]
    found = form(*leaves)
    found = found if isinstance(found, tuple) else (found,)
    if not cotangents:
        return list(found)
    torch.autograd.backward(found, [dy.to(y.dtype) for y, dy in zip(found, cotangents, strict=True)])
    return [y.detach() for y in found] + [x.grad for x in leaves if x.requires_grad]


def hold(
    ours: Callable,
    reference: Callable,
    inputs: list[Tensor],
    yardstick: Callable | None = None,
    gradients: bool = True,
    cancels: float = 0.0,
) -> None:
    """Assert the rule for `ours`, with `reference` in fp64 as the truth and `yardstick` (else it too) in the dtype.

    Errors are compared in the 2-norm and, so that no single element stands out, four times in the maximum. Another
    order of summation in fp32 may add 2e-6 of the size of a result; `cancels` is what it may add to an element that
    is the small difference of large terms. nan fails.
    """
    exact = [x.double() if x.is_floating_point() else x for x in inputs]
    shapes = reference(*exact)
    shapes = shapes if isinstance(shapes, tuple) else (shapes,)
    # Numbers of few enough bits to be the same in every dtype.
    draw = lambda y, seed: randn(*y.shape, seed=seed, dtype=torch.bfloat16).half().to(y.device)
    cotangents = [draw(y, 7 + n) for n, y in enumerate(shapes)] if gradients else []
    truth = outputs_and_gradients(reference, exact, cotangents)
    theirs = outputs_and_gradients(yardstick or reference, inputs, cotangents)
    mine = outputs_and_gradients(ours, inputs, cotangents)
    for number, (true, their, my) in enumerate(zip(truth, theirs, mine, strict=True)):
        assert my.dtype == their.dtype
        assert my.shape == true.shape
        if not my.numel():
            continue
        for times, order in ((2, 2), (4, torch.inf)):
            size, error, allowed = (torch.linalg.vector_norm(x, order).item() for x in (true, my - true, their - true))
            floor = 2e-6 * size + cancels * (my.numel() ** (1 / order))
            assert error <= times * allowed + floor, (
                f"result {number}, {order}-norm {size:.2e}: {error:.2e} from the truth, the reference {allowed:.2e}"
            )


class _Rounded(torch.autograd.Function):
    """Attention by equations 3 to 7 of kernels/attention.py, all scores at once; q, k, v (B, H, T or S, E) in fp32."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, float("-inf"))
        p = scores.softmax(dim=-1)
        y = (p.to(dtype).float() @ v).to(dtype).float()
        ctx.save_for_backward(q, k, v, p, y)
        ctx.dtype = dtype
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        q, k, v, p, y = ctx.saved_tensors
        delta = (dy * y).sum(-1, keepdim=True)
        ds = (p * (dy @ v.mT - delta)).to(ctx.dtype).float()
        scale = q.shape[-1] ** -0.5
        return ds @ k * scale, ds.mT @ q * scale, p.to(ctx.dtype).float().mT @ dy, None, None


def attention_rounded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None = None,
    document_ids: Tensor | None = None,
    key_document_ids: Tensor | None = None,
) -> Tensor:
    """`attention_reference` with the roundings that no kernel on tensor cores can do without, and fp32 between them.

    Their operands have 16 bits, so P is rounded for P V and P^T dY, and dS for dS K and dS^T Q; and y, of which delta
    is made, is read back as it was stored. Beside this the kernels' errors are 0.8 to 1.1 times as large. Beside the
    plain reference, which rounds results alone, they are 1.2 to 1.9 times as large, and 3.2 times with a window of 2.
    """
    mask = visible(q.shape[2], k.shape[2], window, document_ids, key_document_ids, q.device)
    k, v = (t.float().repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    return _Rounded.apply(q.float(), k, v, mask, q.dtype).to(q.dtype)
