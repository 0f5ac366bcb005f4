"""Log-probability of each label: the vocabulary projection and the log-softmax as one step, in chunks.

    logits = x W^T                       (N, V)
    y_n    = logits[n, label_n] - logsumexp_v(logits[n, v])       0 where label_n = -100

    dlogits[n, v] = dy_n * ([v = label_n] - softmax(logits[n])_v)
    dx = dlogits W,   dW = dlogits^T x

Shapes: x (N, D), weight (V, D), labels (N,) of int64 -> (N,) in fp32. Held whole, the fp32 logits of 8,192 tokens over
a vocabulary of 32,000 take 1.05 GB, and their gradient as much again; `label_logprobs_torch` holds one chunk of them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
CHUNK = 1024  # tokens; the logits of one chunk are all that is held


def label_logprobs_reference(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The specification, with all logits at once."""
    logits = x @ weight.T
    logprobs = (logits.float() if logits.dtype.itemsize < 4 else logits).log_softmax(dim=-1)
    chosen = logprobs.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    return torch.where(labels == IGNORED, 0.0, chosen)


def label_logprobs_torch(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return _ChunkedLabelLogprobs.apply(x, weight, labels)


class _ChunkedLabelLogprobs(torch.autograd.Function):
    """Keeps no logits between forward and backward: the backward pass computes each chunk's again."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, labels)
        return torch.cat(
            [_chunk_logprobs(xs, weight, ls) for xs, ls in zip(x.split(CHUNK), labels.split(CHUNK), strict=True)]
        )

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight, labels = ctx.saved_tensors
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        # Summed over the chunks in fp32: a sum of many bf16 terms would lose the small ones.
        dw = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for at in range(0, len(x), CHUNK):
            xs, ls = x[at : at + CHUNK], labels[at : at + CHUNK]
            scale = torch.where(ls == IGNORED, 0.0, dy[at : at + CHUNK])[:, None]
            dlogits = F.linear(xs, weight).float().softmax(dim=-1).mul_(-scale)
            dlogits.scatter_add_(1, ls.clamp(min=0)[:, None], scale)
            dlogits = dlogits.to(x.dtype)
            if dx is not None:
                dx[at : at + CHUNK] = dlogits @ weight
            if dw is not None:
                dw += dlogits.T @ xs
        return dx, None if dw is None else dw.to(weight.dtype), None


def _chunk_logprobs(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logprobs = F.linear(x, weight).float()
    return -F.cross_entropy(logprobs, labels, ignore_index=IGNORED, reduction="none")
