"""SwiGLU (arXiv:2002.05202, eq. 6): the gated activation between an MLP's projections.

    y = silu(gate) * up,   silu(z) = z * sigmoid(z) = z / (1 + exp(-z))

Shapes: gate and up (..., F). Computed in fp32 and rounded once.

Backward. With s = sigmoid(gate), whose derivative is s (1 - s):

    dup   = dy * gate * s
    dgate = dy * up * (s + gate * s (1 - s)) = dy * up * s * (1 + gate * (1 - s))

What limits it: bytes. Forward moves 6 an element in bf16, backward 10. silu(gate) is computed again from gate, which
costs one exponential; saved, it would cost a tensor of (..., F), the widest that a decoder layer has.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.launch import ARCHITECTURES, CompileCase, Config, architecture, check_tensors, tl, triton, why_not


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The specification: (..., F), (..., F) -> (..., F)."""
    gate32, up32 = (t.float() if t.dtype.itemsize < 4 else t for t in (gate, up))
    return (gate32 * gate32.sigmoid() * up32).to(gate.dtype)


def swiglu_torch(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


# ---------------------------------------------------------------------------------------------------- kernels
#
# A program takes BLOCK elements of one row. Where every tensor is contiguous the launcher makes one long row of them.


@triton.jit
def _swiglu_forward(gate_ptr, up_ptr, y_ptr, width, gate_stride, up_stride, BLOCK: tl.constexpr):
    blocks = (width - 1) // BLOCK + 1  # not tl.cdiv, which overflows just below 2^31
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + row * width + columns, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, width, dy_stride, gate_stride, up_stride, BLOCK: tl.constexpr
):
    blocks = (width - 1) // BLOCK + 1  # not tl.cdiv, which overflows just below 2^31
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    dy = tl.load(dy_ptr + row * dy_stride + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    dup = dy * gate * sigmoid
    dgate = dy * up * sigmoid * (1 + gate * (1 - sigmoid))
    tl.store(dgate_ptr + row * width + columns, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)
    tl.store(dup_ptr + row * width + columns, dup.to(dup_ptr.dtype.element_ty), mask=inside)


# ---------------------------------------------------------------------------------------------------- launchers

_EACH = {"forward": Config({"BLOCK": 2048}, 4), "backward": Config({"BLOCK": 1024}, 4)}
CONFIGS = dict.fromkeys(ARCHITECTURES, _EACH)


def _launch(kernel, config: Config, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> None:
    if reason := why_not(inputs[0]):
        raise ValueError(f"swiglu: {reason}")
    if outputs[0].numel() == 0:
        return
    width = outputs[0].shape[-1]
    if all(x.is_contiguous() for x in inputs):
        width = outputs[0].numel()
    rows = [x.reshape(-1, width) for x in inputs]
    rows = [x if x.stride(1) == 1 or width == 1 else x.contiguous() for x in rows]  # gradients come as they like
    with torch.cuda.device_of(outputs[0]):
        kernel[(len(rows[0]) * triton.cdiv(width, config.constants["BLOCK"]),)](
            *(*rows, *outputs, width, *(x.stride(0) for x in rows)),
            **config.constants,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )


# ---------------------------------------------------------------------------------------------------- operators


@torch.library.custom_op("solar::swiglu", mutates_args=())
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _launch(_swiglu_forward, CONFIGS[architecture(gate.device)]["forward"], (gate, up), (y,))
    return y


@torch.library.custom_op("solar::swiglu_backward", mutates_args=())
def _swiglu_gradients(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    _launch(_swiglu_backward, CONFIGS[architecture(gate.device)]["backward"], (dy, gate, up), (dgate, dup))
    return dgate, dup


@_swiglu.register_fake
def _(gate, up):
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


@_swiglu_gradients.register_fake
def _(dy, gate, up):
    dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    return dgate, dup


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dy):
    return _swiglu_gradients(dy, *ctx.saved_tensors)


_swiglu.register_autograd(_differentiate, setup_context=_save)


def swiglu_triton(gate: Tensor, up: Tensor) -> Tensor:
    if gate.ndim == 0 or up.shape != gate.shape:
        raise ValueError(f"swiglu: gate {tuple(gate.shape)} and up {tuple(up.shape)} are not both (..., F)")
    check_tensors("swiglu", gate=gate, up=up)
    return _swiglu(gate, up)


# ---------------------------------------------------------------------------------------------------- compile cases


def compile_cases() -> list[CompileCase]:
    """Both kernels with bf16 and fp32 tensors; as one long row, whose length passes 2^31 or does not."""
    cases = []
    for arch in ARCHITECTURES:
        for kind, kernel in (("forward", _swiglu_forward), ("backward", _swiglu_backward)):
            config = CONFIGS[arch][kind]
            names = [name for name in kernel.arg_names if name not in config.constants]
            for width in ("i32", "i64"):
                signature = {name: "*bf16" if name.endswith("_ptr") else width for name in names}
                case = CompileCase(kernel, f"swiglu_{kind} {width}", arch, signature, config, {}, tuple(signature))
                cases += [case, case.in_fp32()]
    return cases
