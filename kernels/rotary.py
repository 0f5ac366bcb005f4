"""Rotary position embedding (arXiv:2104.09864, eq. 34), in the half-split layout of every Hugging Face Llama.

Dimension i of the first half and dimension i of the second form a pair, turned by the angle position * frequency_i:

    y_first  = x_first * cos - x_second * sin
    y_second = x_second * cos + x_first * sin

Shapes: q (B, H, T, E), k (B, K, T, E), cos and sin (B or 1, T, E/2) in fp32. Computed in fp32 and rounded once.

Backward. Each pair is multiplied by a rotation matrix R (eq. 13), so its gradient is multiplied by the transpose of R:
the turn by the negative angle. It is the same kernel with the sign of sin changed.

What limits it: bytes, 4 an element in bf16, for six operations. q and k go in one launch, and cos and sin, the same for
every head, are loaded once a token. Both arrive as views (B, T, H * E) -> (B, H, T, E) of what a projection wrote, and
leave with the same strides: nothing is copied here, and to write them into a cache or to undo the view costs nothing.
"""

import torch
from torch import Tensor

from kernels.launch import ARCHITECTURES, CompileCase, Config, architecture, check_tensors, tl, triton, why_not


def rotary_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The specification: q and k turned, in their own dtypes."""
    return _turn(q, cos, sin), _turn(k, cos, sin)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # the same for every head
    first, second = x.to(torch.promote_types(x.dtype, cos.dtype)).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rotary_torch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q and k turned in three passes each, forward and backward, where autograd of the reference takes a dozen."""
    return _Turn.apply(q, cos, sin), _Turn.apply(k, cos, sin)


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn_in_place(x, cos, sin)

    @staticmethod
    def backward(ctx, dy: Tensor):
        cos, sin = ctx.saved_tensors
        return _turn_in_place(dy, cos, -sin), None, None


def _turn_in_place(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    wide = x.to(torch.promote_types(x.dtype, cos.dtype))
    y = wide * torch.cat((cos, cos), dim=-1)
    (x_first, x_second), (y_first, y_second) = wide.chunk(2, dim=-1), y.chunk(2, dim=-1)
    y_first.addcmul_(x_second, sin, value=-1)
    y_second.addcmul_(x_first, sin)
    return y.to(x.dtype)


# ---------------------------------------------------------------------------------------------------- the kernel
#
# A program takes all heads of one token: in the layout (B, T, H, E) they lie side by side in memory.


@triton.jit
def _turn_heads(
    x_ptr,
    y_ptr,
    cos,
    sin,
    HEADS,
    x_stride,
    y_stride,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Turn the heads of one token, the first of which begins at x_ptr, by angles of (1, BLOCK)."""
    columns = tl.arange(0, BLOCK)[None, :]
    for first_head in range(0, HEADS, BLOCK_HEADS):
        heads = (first_head + tl.arange(0, BLOCK_HEADS)).to(tl.int64)[:, None]
        inside = (heads < HEADS) & (columns < HALF)
        x = x_ptr + heads * x_stride + columns
        first = tl.load(x, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(x + HALF, mask=inside, other=0.0).to(tl.float32)
        y = y_ptr + heads * y_stride + columns
        dtype = y_ptr.dtype.element_ty
        tl.store(y, (first * cos - second * sin).to(dtype), mask=inside)
        tl.store(y + HALF, (second * cos + first * sin).to(dtype), mask=inside)


@triton.jit(do_not_specialize=["T"])
def _rotary(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    T,
    q_stride_b,
    q_stride_h,
    q_stride_t,
    k_stride_b,
    k_stride_h,
    k_stride_t,
    q_out_stride_b,
    q_out_stride_h,
    q_out_stride_t,
    k_out_stride_b,
    k_out_stride_h,
    k_out_stride_t,
    angle_stride_b,  # 0: the same angles for the whole batch
    H: tl.constexpr,
    K: tl.constexpr,
    HALF: tl.constexpr,  # E / 2
    BACK: tl.constexpr,  # turn by the negative angle
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b, t = (tl.program_id(0) // T).to(tl.int64), (tl.program_id(0) % T).to(tl.int64)
    columns = tl.arange(0, BLOCK)[None, :]
    angles = b * angle_stride_b + t * HALF + columns
    cos = tl.load(cos_ptr + angles, mask=columns < HALF, other=0.0)
    sin = tl.load(sin_ptr + angles, mask=columns < HALF, other=0.0)
    if BACK:
        sin = -sin
    q, q_out = q_ptr + b * q_stride_b + t * q_stride_t, q_out_ptr + b * q_out_stride_b + t * q_out_stride_t
    _turn_heads(q, q_out, cos, sin, H, q_stride_h, q_out_stride_h, HALF, BLOCK_H, BLOCK)
    k, k_out = k_ptr + b * k_stride_b + t * k_stride_t, k_out_ptr + b * k_out_stride_b + t * k_out_stride_t
    _turn_heads(k, k_out, cos, sin, K, k_stride_h, k_out_stride_h, HALF, BLOCK_K, BLOCK)


# ---------------------------------------------------------------------------------------------------- launcher

TILE = 2048  # pairs that a program turns at a time: 32 heads of 128
CONFIGS = {"sm_80": Config({}, 4), "sm_90": Config({}, 4), "sm_100": Config({}, 4), "gfx942": Config({}, 4)}


def _blocks(H: int, K: int, E: int) -> dict[str, int]:
    """Powers of two that hold half a head, and as many heads as a tile has room for."""
    padded = lambda n: 1 << (n - 1).bit_length()
    block = padded(E // 2)
    room = max(1, TILE // block)
    return {"BLOCK_H": min(padded(H), room), "BLOCK_K": min(padded(K), room), "BLOCK": block}


def _launch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    if reason := why_not(q):
        raise ValueError(f"rotary: {reason}")
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))  # gradients come as they like
    # The strides of the input, or, where memory lies between its elements, the same order of dimensions without it.
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    (B, H, T, E), K = q.shape, k.shape[1]
    if B * T == 0:
        return q_out, k_out
    config = CONFIGS[architecture(q.device)]
    cos, sin = cos.contiguous(), sin.contiguous()
    strides = [stride for x in (q, k, q_out, k_out) for stride in x.stride()[:3]]
    with torch.cuda.device_of(q):
        _rotary[(B * T,)](
            *(q, k, cos, sin, q_out, k_out, T, *strides, 0 if len(cos) == 1 else cos.stride(0)),
            *(H, K, E // 2, back),
            **config.constants,
            **_blocks(H, K, E),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return q_out, k_out


# ---------------------------------------------------------------------------------------------------- operators


@torch.library.custom_op("solar::rotary", mutates_args=())
def _turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _launch(q, k, cos, sin, back=False)


@torch.library.custom_op("solar::rotary_backward", mutates_args=())
def _turned_back(dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _launch(dq, dk, cos, sin, back=True)


@_turned.register_fake
@_turned_back.register_fake
def _(q, k, cos, sin):
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    return torch.empty_like(q), torch.empty_like(k)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[2:])


def _differentiate(ctx, dq, dk):
    return *_turned_back(dq, dk, *ctx.saved_tensors), None, None


_turned.register_autograd(_differentiate, setup_context=_save)


def rotary_triton(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """No gradient goes to cos and sin: positions are not learned."""
    if q.ndim != 4 or k.ndim != 4 or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]) or q.shape[-1] % 2:
        raise ValueError(f"rotary: q {tuple(q.shape)} and k {tuple(k.shape)} are not (B, H or K, T, E) with an even E")
    B, _, T, E = q.shape
    for name, x in {"cos": cos, "sin": sin}.items():
        if x.shape not in ((1, T, E // 2), (B, T, E // 2)) or x.shape != cos.shape:
            raise ValueError(f"rotary: {name} {tuple(x.shape)} does not fit q {tuple(q.shape)}: {(B, T, E // 2)} or 1")
        if x.dtype != torch.float32:
            raise ValueError(f"rotary: {name} is {x.dtype}, not float32")
        if x.device != q.device:
            raise ValueError(f"rotary: {name} is on {x.device}, q on {q.device}")
    check_tensors("rotary", q=q, k=k)
    return _turned(q, k, cos, sin)


# ---------------------------------------------------------------------------------------------------- compile cases


def compile_cases() -> list[CompileCase]:
    """Head dimensions and head counts of real models, with bf16 and fp32 tensors."""
    pointers = {name: "*fp32" if name in ("cos_ptr", "sin_ptr") else "*bf16" for name in _POINTERS}
    strides = [f"{x}_stride_{axis}" for x in ("q", "k", "q_out", "k_out") for axis in "bht"] + ["angle_stride_b"]
    signature = pointers | {"T": "i32"} | dict.fromkeys(strides, "i32")
    cases = [
        CompileCase(
            _rotary,
            f"rotary {H}/{K} {E}{' back' if back else ''}",
            arch,
            signature,
            CONFIGS[arch],
            {"H": H, "K": K, "HALF": E // 2, "BACK": back, **_blocks(H, K, E)},
            (*pointers, *strides),
        )
        for arch in ARCHITECTURES
        for H, K, E, back in (
            (32, 8, 128, False), (32, 8, 128, True), (32, 4, 64, False), (16, 8, 256, False), (8, 2, 32, False)
        )
    ]  # fmt: skip
    return cases + [case.in_fp32() for case in cases]


_POINTERS = ("q_ptr", "k_ptr", "cos_ptr", "sin_ptr", "q_out_ptr", "k_out_ptr")
