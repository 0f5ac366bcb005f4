"""The operations a decoder is made of, each in several forms that compute the same thing, and the switch between them.

    reference   the specification: the formula written out, for reading and as the oracle of every test
    torch       PyTorch's own fused operators
    triton      kernels written here, for a GPU

One file an operation: formula, reference, then the fast forms. Callers never say which form runs; `select` does:

    kernels.select("auto")                      # the fastest form there is for the device a tensor is on
    y = kernels.rmsnorm(x, weight, eps)
"""

import functools
import sys
from collections.abc import Callable

from torch import Tensor

from kernels import launch
from kernels.attention import attention_reference, attention_torch, attention_triton, check_attention
from kernels.decode import decode_attention_triton, is_decode
from kernels.linear import linear_reference, linear_torch
from kernels.logprobs import label_logprobs_reference, label_logprobs_torch, label_logprobs_triton
from kernels.rmsnorm import (
    add_rmsnorm_reference,
    add_rmsnorm_torch,
    add_rmsnorm_triton,
    rmsnorm_reference,
    rmsnorm_torch,
    rmsnorm_triton,
)
from kernels.rotary import rotary_reference, rotary_torch, rotary_triton
from kernels.swiglu import swiglu_reference, swiglu_torch, swiglu_triton

CHOICES = ("auto", "triton", "torch", "reference")


def _attention_triton(q: Tensor, k: Tensor, v: Tensor, *mask) -> Tensor:
    """Few queries go to the kernel that splits the keys, all others to the one that takes them in blocks."""
    return (decode_attention_triton if is_decode(q, k, v) else attention_triton)(q, k, v, *mask)


# Which forms each operation has. The first one of the order of preference that exists is taken.
_FORMS: dict[str, dict[str, Callable]] = {
    "linear": {"triton": linear_torch, "torch": linear_torch, "reference": linear_reference},  # a library's everywhere
    "rmsnorm": {"triton": rmsnorm_triton, "torch": rmsnorm_torch, "reference": rmsnorm_reference},
    "add_rmsnorm": {"triton": add_rmsnorm_triton, "torch": add_rmsnorm_torch, "reference": add_rmsnorm_reference},
    "rotary": {"triton": rotary_triton, "torch": rotary_torch, "reference": rotary_reference},
    "attention": {"triton": _attention_triton, "torch": attention_torch, "reference": attention_reference},
    "swiglu": {"triton": swiglu_triton, "torch": swiglu_torch, "reference": swiglu_reference},
    "label_logprobs": {
        "triton": label_logprobs_triton,
        "torch": label_logprobs_torch,
        "reference": label_logprobs_reference,
    },
}
_PREFERENCE = {
    "triton": ("triton", "torch", "reference"),
    "torch": ("torch", "reference"),
    "reference": ("reference",),
}
_choice = "auto"


def select(choice: str = "auto") -> str:
    """Choose the form that every operation takes from now on; returns the choice before. ValueError for an unknown one.

    Prints one line on stderr when an operation lacks the form that was asked for, and says what it takes instead.
    """
    global _choice
    if choice not in CHOICES:
        raise ValueError(f"kernels: {choice!r} is not one of {', '.join(CHOICES)}")
    if choice == "triton":
        lacking = [name for name, forms in _FORMS.items() if "triton" not in forms]
        if lacking:
            _say_once(f"kernels: no triton form of {', '.join(lacking)}; torch's own runs instead")
    before, _choice = _choice, choice
    return before


def kind(x: Tensor) -> str:
    """Which forms run for tensors like this one, by the choice made: triton, torch or reference."""
    choice = ("triton" if x.is_cuda else "torch") if _choice == "auto" else _choice
    if choice == "triton":
        wide = None if x.dtype in launch.DTYPES else f"triton's take 16 and 32 bits, not {x.dtype}"
        if reason := launch.why_not(x) or wide:
            _say_once(f"kernels: {reason}; torch's own operators run instead of triton's")
            choice = "torch"
    return choice


def _form(name: str, x: Tensor) -> Callable:
    forms = _FORMS[name]
    return next(forms[form] for form in _PREFERENCE[kind(x)] if form in forms)


@functools.cache
def _say_once(line: str) -> None:
    print(line, file=sys.stderr)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., D), (O, D), (O,) -> (..., O): see kernels/linear.py."""
    return _form("linear", x)(x, weight, bias)


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """(..., D), (D,) -> (..., D): see kernels/rmsnorm.py."""
    return _form("rmsnorm", x)(x, weight, eps)


def add_rmsnorm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(..., D) twice, (D,) -> rmsnorm(residual + x) and residual + x: see kernels/rmsnorm.py."""
    return _form("add_rmsnorm", x)(x, residual, weight, eps)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """(B, H, T, E), (B, K, T, E), (B or 1, T, E/2) twice -> q and k turned: see kernels/rotary.py."""
    return _form("rotary", q)(q, k, cos, sin)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None = None,
    document_ids: Tensor | None = None,
    key_document_ids: Tensor | None = None,
) -> Tensor:
    """(B, H, T, E), (B, K, S, E) twice -> (B, H, T, E), causal, aligned bottom-right: see kernels/attention.py.

    document_ids (B, T) and key_document_ids (B, S) come together or not at all; ValueError for shapes that do not fit.
    """
    check_attention(q, k, v, window, document_ids, key_document_ids)
    return _form("attention", q)(q, k, v, window, document_ids, key_document_ids)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """(..., F), (..., F) -> (..., F): see kernels/swiglu.py."""
    return _form("swiglu", gate)(gate, up)


def label_logprobs(x: Tensor, weight: Tensor, labels: Tensor, summed: bool = False) -> Tensor:
    """(N, D), (V, D), (N,) -> (N,) fp32 log-probability of each label, 0 where it is -100: see kernels/logprobs.py.

    summed: a promise that the loss is their sum, which can make its gradient cheaper; it changes no result.
    """
    return _form("label_logprobs", x)(x, weight, labels, summed)
