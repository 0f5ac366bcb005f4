"""RMSNorm (arXiv:1910.07467, eq. 4), alone and fused with the residual addition that precedes it.

    y_i = w_i * x_i / sqrt(mean_j(x_j^2) + eps)

Shapes: x (..., D), weight (D,). The normalised value is computed in fp32, rounded to the dtype of x, and only then
multiplied by the weight: that one rounding in the middle is Llama's, and every checkpoint was trained with it.

Backward. With r = (mean(x^2) + eps)^(-1/2) and n = x r, a change of x_j moves r by dr/dx_j = -r^3 x_j / D. The gradient
that arrives at n is g = w * dy, so

    dx_j = r g_j + sum_i g_i x_i dr/dx_j = r g_j - r^3 mean_i(g_i x_i) x_j
    dw_j = sum over rows of dy_j n_j

The rounding of n counts as the identity, as autograd has it. Fused, total = residual + x is an output too; its own
gradient is added to dx, and the sum is the gradient of both addends.

What limits it: bytes. Forward reads and writes each element once (4 bytes in bf16), backward reads x and dy and writes
dx (6 bytes), for ten or so operations an element where an H200 has time for thirty. So a row is read from memory once,
up to a width of 16,384, and dw comes from the same pass as dx: a program walks many rows, sums its share of dw in
registers and writes it to one row of a small fp32 buffer, whose rows are then added in an order that never changes. No
atomics: the same GPU gives the same bits.
"""

import functools
from dataclasses import replace

import torch
from torch import Tensor

from kernels.launch import ARCHITECTURES, CompileCase, Config, architecture, check_tensors, tl, triton, why_not


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
    """The same in three passes forward and six backward; autograd of the reference takes twice as many.

    (Torch's own F.rms_norm multiplies by the weight before it rounds, and on a CPU is these parts one by one.)
    """
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float() if x.dtype.itemsize < 4 else x
        inverse = (torch.linalg.vecdot(wide, wide) / x.shape[-1] + eps).rsqrt()[..., None]
        normalised = (wide * inverse).to(x.dtype)
        ctx.save_for_backward(normalised, inverse, weight)
        return weight * normalised

    @staticmethod
    def backward(ctx, dy: Tensor):
        normalised, inverse, weight = ctx.saved_tensors
        n, g = normalised.to(inverse.dtype), dy.to(inverse.dtype)
        dw = (g * n).reshape(-1, len(weight)).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, dw, None
        g = g * weight
        pull = torch.linalg.vecdot(g, n)[..., None] / n.shape[-1]
        return g.addcmul_(n, pull, value=-1).mul_(inverse).to(normalised.dtype), dw, None


def add_rmsnorm_torch(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = residual + x
    return rmsnorm_torch(total, weight, eps), total


# ---------------------------------------------------------------------------------------------------- forward
#
# N rows of D elements; a program takes a tile of ROWS x BLOCK_D of them. A pointer that is None switches off, when the
# kernel is compiled, what it is for. D is a constant: it is the model's, and nothing else here depends on the input.


@triton.jit(do_not_specialize=["N"])
def _rmsnorm_forward(
    x_ptr,
    residual_ptr,  # None: no addition
    weight_ptr,
    inverse_ptr,  # None: the tile holds whole rows, and r is computed from them
    y_ptr,
    total_ptr,
    N,
    x_stride,
    residual_stride,
    eps,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    inside = (rows < N) & (columns < D)
    x = tl.load(x_ptr + rows * x_stride + columns, mask=inside, other=0.0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + rows * residual_stride + columns, mask=inside, other=0.0)
        # Rounded before it is normalised: the norm sees what the next layer will see.
        x = (residual.to(tl.float32) + x.to(tl.float32)).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + rows * D + columns, x, mask=inside)
    dtype = x.dtype
    weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    x = x.to(tl.float32)
    if inverse_ptr is None:
        inverse = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / D + eps)
    else:
        inverse = tl.load(inverse_ptr + rows, mask=rows < N, other=0.0)
    normalised = (x * inverse).to(dtype).to(tl.float32)
    tl.store(y_ptr + rows * D + columns, (weight * normalised).to(y_ptr.dtype.element_ty), mask=inside)


# ---------------------------------------------------------------------------------------------------- backward


@triton.jit(do_not_specialize=["N"])
def _rmsnorm_backward(
    dy_ptr,
    dtotal_ptr,  # None: no addition was fused
    x_ptr,
    weight_ptr,
    inverse_ptr,  # None, with pull_ptr: the tile holds whole rows
    pull_ptr,
    dx_ptr,
    partial_ptr,  # (programs, D)
    N,
    dy_stride,
    dtotal_stride,
    x_stride,
    eps,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    RELOAD: tl.constexpr,
):
    program = tl.program_id(0)
    columns = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    dw = tl.zeros([ROWS, BLOCK_D], tl.float32)
    # STAGES: while one tile is computed, the next ones are already on their way from memory.
    for first in tl.range(program * ROWS, N, tl.num_programs(0) * ROWS, num_stages=STAGES):
        rows = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (rows < N) & (columns < D)
        x = tl.load(x_ptr + rows * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + rows * dy_stride + columns, mask=inside, other=0.0).to(tl.float32)
        gradient = dy * weight
        if inverse_ptr is None:
            # r again from x, rather than saved by the forward pass: the row is here anyway.
            inverse = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / D + eps)
            inverse = tl.where(rows < N, inverse, 0.0)  # eps may be 0, and 0 * inf would spoil dw
            pull = inverse * inverse * (inverse * (tl.sum(gradient * x, axis=1, keep_dims=True) / D))
        else:
            inverse = tl.load(inverse_ptr + rows, mask=rows < N, other=0.0)
            pull = tl.load(pull_ptr + rows, mask=rows < N, other=0.0)
        if RELOAD:
            # The widest rows spill when x and dy stay beside dw until the sums are known: they come again, from L2.
            # The other eviction policy also keeps the compiler from merging these loads with those above.
            x = tl.load(x_ptr + rows * x_stride + columns, mask=inside, other=0.0, eviction_policy="evict_first")
            dy = tl.load(dy_ptr + rows * dy_stride + columns, mask=inside, other=0.0, eviction_policy="evict_first")
            x, dy = x.to(tl.float32), dy.to(tl.float32)
            gradient = dy * tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
        dx = gradient * inverse - x * pull
        if dtotal_ptr is not None:
            dtotal = tl.load(dtotal_ptr + rows * dtotal_stride + columns, mask=inside, other=0.0)
            dx += dtotal.to(tl.float32)
        tl.store(dx_ptr + rows * D + columns, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        dw += dy * (x * inverse).to(x_ptr.dtype.element_ty).to(tl.float32)
    share = tl.sum(dw, axis=0, keep_dims=True)
    tl.store(partial_ptr + program.to(tl.int64) * D + columns, share, mask=columns < D)


@triton.jit(do_not_specialize=["programs"])
def _rmsnorm_sum(partial_ptr, dw_ptr, programs, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Add up the shares of dw: (programs, D) -> (D,)."""
    columns = (tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    dw = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for first in range(0, programs, ROWS):
        rows = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        dw += tl.load(partial_ptr + rows * D + columns, mask=(rows < programs) & (columns < D), other=0.0)
    total = tl.sum(dw, axis=0, keep_dims=True)
    tl.store(dw_ptr + columns, total.to(dw_ptr.dtype.element_ty), mask=columns < D)


# ---------------------------------------------------------------------------------------------------- wide rows
#
# A row that does not fit into the registers is read twice: first for its sums, one program a row, and then by the
# kernels above in tiles that no longer hold whole rows.


@triton.jit
def _rmsnorm_row_sums(
    x_ptr,
    residual_ptr,  # None: no addition
    dy_ptr,  # None: forward
    weight_ptr,
    total_ptr,
    inverse_ptr,
    pull_ptr,
    x_stride,
    residual_stride,
    dy_stride,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros([BLOCK_D], tl.float32)
    products = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, D, BLOCK_D):
        columns = first + tl.arange(0, BLOCK_D)
        inside = columns < D
        x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + row * residual_stride + columns, mask=inside, other=0.0).to(tl.float32)
            total = (residual + x).to(total_ptr.dtype.element_ty)
            tl.store(total_ptr + row * D + columns, total, mask=inside)
            x = total.to(tl.float32)
        squares += x * x
        if dy_ptr is not None:
            dy = tl.load(dy_ptr + row * dy_stride + columns, mask=inside, other=0.0).to(tl.float32)
            weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
            products += dy * weight * x
    inverse = tl.rsqrt(tl.sum(squares, axis=0) / D + eps)
    tl.store(inverse_ptr + row, inverse)
    if dy_ptr is not None:
        tl.store(pull_ptr + row, inverse * inverse * (inverse * (tl.sum(products, axis=0) / D)))


# ---------------------------------------------------------------------------------------------------- launchers

WARPS_PER_SM = 16  # of the backward pass: enough to hide the memory, few enough that the partial dw stay a small buffer

# Architecture -> kernel -> elements in a tile -> configuration. The smallest tile that holds a row is taken, and narrow
# rows share it; a row wider than the largest tile is read twice. A backward tile takes up to 12 bytes of shared memory
# an element (STAGES 3: x, dy and dtotal, two of each in flight): of 16,384 more than an A100 has.
_FORWARD = {4096: Config({}, 4, 1), 8192: Config({}, 8, 1), 16384: Config({}, 16, 1)}
_BACKWARD = {4096: Config({"STAGES": 3, "RELOAD": 0}, 8), 8192: Config({"STAGES": 3, "RELOAD": 0}, 16)}
_BACKWARD_HOPPER = _BACKWARD | {16384: Config({"STAGES": 2, "RELOAD": 1}, 16)}
_BACKWARD_AMD = {
    4096: Config({"STAGES": 2, "RELOAD": 0}, 4),
    8192: Config({"STAGES": 2, "RELOAD": 0}, 8),
    16384: Config({"STAGES": 1, "RELOAD": 0}, 8),
}
CONFIGS: dict[str, dict[str, dict[int, Config]]] = {
    "sm_80": {"forward": _FORWARD, "backward": _BACKWARD},
    "sm_90": {"forward": _FORWARD, "backward": _BACKWARD_HOPPER},
    "sm_100": {"forward": _FORWARD, "backward": _BACKWARD_HOPPER},
    "gfx942": {"forward": _FORWARD, "backward": _BACKWARD_AMD},
}
SUM = Config({"ROWS": 64, "BLOCK_D": 32}, 4)
ROW_SUMS = Config({"BLOCK_D": 4096}, 8)


def _tiled(kernel: str, arch: str, D: int, itemsize: int = 2) -> Config:
    """The configuration for rows of D elements, with how many rows and columns its tile has."""
    tiles = CONFIGS[arch][kernel]
    block = 1 << (D - 1).bit_length()
    if block * itemsize > 2 * max(tiles):  # the tables are for 16 bits; of 32, half as many take the same room
        block = min(tiles)
    tile = next(tile for tile in tiles if tile >= block)
    return replace(tiles[tile], constants={**tiles[tile].constants, "ROWS": tile // block, "BLOCK_D": block})


@functools.cache
def _most_programs(device: torch.device, warps: int) -> int:
    """How many programs of the backward pass a GPU holds at a time."""
    if device.type != "cuda":
        return 3  # the interpreter: few, so that each walks several tiles
    return torch.cuda.get_device_properties(device).multi_processor_count * max(1, WARPS_PER_SM // warps)


def _as_rows(x: Tensor) -> Tensor:
    """(..., D) -> (N, D) without a copy wherever one stride can step from row to row, with contiguous rows."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()  # gradients come as they like


def _row_sums(x, residual, dy, weight, total, eps: float) -> tuple[Tensor, Tensor]:
    """r and r^3 mean(g x) of each wide row; fills `total` where there is a residual."""
    N, D = x.shape
    inverse, pull = x.new_empty(2, N, dtype=torch.float32)
    strides = [0 if t is None else t.stride(0) for t in (x, residual, dy)]
    _rmsnorm_row_sums[(N,)](
        *(x, residual, dy, weight, total, inverse, pull, *strides, eps, D),
        **ROW_SUMS.constants,
        num_warps=ROW_SUMS.num_warps,
        num_stages=ROW_SUMS.num_stages,
    )
    return inverse, pull


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y and residual + x; the latter is empty where there is no residual."""
    if reason := why_not(x):
        raise ValueError(f"rmsnorm: {reason}")
    D = x.shape[-1]
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = torch.empty(x.shape, dtype=torch.promote_types(dtype, weight.dtype), device=x.device)
    total = None if residual is None else torch.empty(x.shape, dtype=dtype, device=x.device)
    if y.numel() == 0:
        return y, total
    config = _tiled("forward", architecture(x.device), D)
    with torch.cuda.device_of(x):
        rows, added, inverse, filled = _as_rows(x), None if residual is None else _as_rows(residual), None, total
        if config.constants["BLOCK_D"] < D:
            inverse, _ = _row_sums(rows, added, None, weight, total, eps)
            if residual is not None:
                rows, added, filled = total.view(-1, D), None, None
        grid = (triton.cdiv(len(rows), config.constants["ROWS"]), triton.cdiv(D, config.constants["BLOCK_D"]))
        strides = rows.stride(0), 0 if added is None else added.stride(0)
        _rmsnorm_forward[grid](
            *(rows, added, weight, inverse, y, filled, len(rows), *strides, eps, D),
            **config.constants,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return y, total


def _backward(dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """dx, with dtotal in it, and dw."""
    D = x.shape[-1]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dw = torch.empty_like(weight)
    if dx.numel() == 0:
        return dx, dw.zero_()
    config = _tiled("backward", architecture(x.device), D, max(dy.dtype.itemsize, x.dtype.itemsize))
    with torch.cuda.device_of(x):
        dy, x, dtotal = _as_rows(dy), _as_rows(x), None if dtotal is None else _as_rows(dtotal)
        inverse, pull = None, None
        if config.constants["BLOCK_D"] < D:
            inverse, pull = _row_sums(x, None, dy, weight, None, eps)
        programs = min(triton.cdiv(len(x), config.constants["ROWS"]), _most_programs(x.device, config.num_warps))
        partial = torch.empty(programs, D, dtype=torch.float32, device=x.device)
        strides = dy.stride(0), 0 if dtotal is None else dtotal.stride(0), x.stride(0)
        _rmsnorm_backward[(programs, triton.cdiv(D, config.constants["BLOCK_D"]))](
            *(dy, dtotal, x, weight, inverse, pull, dx, partial, len(x), *strides, eps, D),
            **config.constants,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        _rmsnorm_sum[(triton.cdiv(D, SUM.constants["BLOCK_D"]),)](
            *(partial, dw, programs, D),
            **SUM.constants,
            num_warps=SUM.num_warps,
            num_stages=SUM.num_stages,
        )
    return dx, dw


# ---------------------------------------------------------------------------------------------------- operators


@torch.library.custom_op("solar::rmsnorm", mutates_args=())
def _rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _forward(x, None, weight, eps)[0]


@torch.library.custom_op("solar::rmsnorm_backward", mutates_args=())
def _rmsnorm_gradients(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _backward(dy, None, x, weight, eps)


@torch.library.custom_op("solar::add_rmsnorm", mutates_args=())
def _add_rmsnorm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _forward(x, residual, weight, eps)


@torch.library.custom_op("solar::add_rmsnorm_backward", mutates_args=())
def _add_rmsnorm_gradients(
    dy: Tensor, dtotal: Tensor, total: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return _backward(dy, dtotal, total, weight, eps)


@_rmsnorm.register_fake
def _(x, weight, eps):
    return torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)


@_add_rmsnorm.register_fake
def _(x, residual, weight, eps):
    total = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device)
    return torch.empty_like(total, dtype=torch.promote_types(total.dtype, weight.dtype)), total


@_rmsnorm_gradients.register_fake
def _(dy, x, weight, eps):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(weight)


@_add_rmsnorm_gradients.register_fake
def _(dy, dtotal, total, weight, eps):
    return torch.empty(total.shape, dtype=total.dtype, device=total.device), torch.empty_like(weight)


def _save(ctx, inputs, output):
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _differentiate(ctx, dy):
    return *_rmsnorm_gradients(dy, *ctx.saved_tensors, ctx.eps), None


def _save_sum(ctx, inputs, output):
    x, residual, weight, ctx.eps = inputs
    ctx.dtypes = x.dtype, residual.dtype
    ctx.save_for_backward(output[1], weight)


def _differentiate_sum(ctx, dy, dtotal):
    d, dw = _add_rmsnorm_gradients(dy, dtotal, *ctx.saved_tensors, ctx.eps)
    return *(d.to(dtype) for dtype in ctx.dtypes), dw, None


_rmsnorm.register_autograd(_differentiate, setup_context=_save)
_add_rmsnorm.register_autograd(_differentiate_sum, setup_context=_save_sum)


def rmsnorm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    _check("rmsnorm", weight, x=x)
    return _rmsnorm(x, weight, eps)


def add_rmsnorm_triton(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _check("add_rmsnorm", weight, x=x, residual=residual)
    return _add_rmsnorm(x, residual, weight, eps)


def _check(name: str, weight: Tensor, **rows: Tensor) -> None:
    x = rows["x"]
    if x.ndim == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(f"{name}: weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}")
    if not weight.is_contiguous():
        raise ValueError(f"{name}: weight must be contiguous, its stride is {weight.stride(0)}, not 1")
    for label, t in rows.items():
        if t.shape != x.shape:
            raise ValueError(f"{name}: {label} {tuple(t.shape)} is not of the shape of x {tuple(x.shape)}")
    check_tensors(name, one_dtype=False, **rows, weight=weight)


# ---------------------------------------------------------------------------------------------------- compile cases


def compile_cases() -> list[CompileCase]:
    """Every kernel for every size of tile, alone and fused, with bf16 and fp32 tensors, in widths of real models."""
    tensors = ["x_ptr", "residual_ptr", "dy_ptr", "dtotal_ptr", "weight_ptr", "y_ptr", "total_ptr", "dx_ptr", "dw_ptr"]
    types = dict.fromkeys(tensors, "*bf16") | dict.fromkeys(("inverse_ptr", "pull_ptr", "partial_ptr"), "*fp32")
    types |= dict.fromkeys(["N", "programs", "x_stride", "residual_stride", "dy_stride", "dtotal_stride"], "i32")
    types["eps"] = "fp32"

    def case(kernel, name: str, arch: str, config: Config, D: int, absent: tuple[str, ...] = ()) -> CompileCase:
        constants = {"D": D} | {pointer: None for pointer in absent if pointer in kernel.arg_names}
        fixed = constants.keys() | config.constants.keys()
        signature = {argument: types[argument] for argument in kernel.arg_names if argument not in fixed}
        divisible = tuple(argument for argument in signature if argument.endswith(("_ptr", "_stride")))
        return CompileCase(kernel, name, arch, signature, config, constants, divisible)

    cases = []
    added, sums = ("residual_ptr", "total_ptr"), ("inverse_ptr", "pull_ptr")
    for arch in ARCHITECTURES:
        for D in (128, 4096, 8192, 16384):
            forward = case(_rmsnorm_forward, f"rmsnorm_forward add {D}", arch, _tiled("forward", arch, D), D, sums)
            cases += [forward, forward.in_fp32()]
            for itemsize in (2, 4):
                config = _tiled("backward", arch, D, itemsize)
                if config.constants["BLOCK_D"] >= D:
                    backward = case(_rmsnorm_backward, f"rmsnorm_backward add {D}", arch, config, D, sums)
                    cases.append(backward if itemsize == 2 else backward.in_fp32())
        D = 4096
        forward, backward = (_tiled(kernel, arch, D) for kernel in ("forward", "backward"))
        others = [
            case(_rmsnorm_forward, f"rmsnorm_forward {D}", arch, forward, D, (*added, *sums)),
            case(_rmsnorm_backward, f"rmsnorm_backward {D}", arch, backward, D, ("dtotal_ptr", *sums)),
            case(_rmsnorm_sum, f"rmsnorm_sum {D}", arch, SUM, D),
        ]
        D = 20480
        forward, backward = (_tiled(kernel, arch, D) for kernel in ("forward", "backward"))
        others += [
            case(_rmsnorm_row_sums, f"rmsnorm_row_sums add {D}", arch, ROW_SUMS, D, ("dy_ptr",)),
            case(_rmsnorm_row_sums, f"rmsnorm_row_sums dy {D}", arch, ROW_SUMS, D, added),
            case(_rmsnorm_forward, f"rmsnorm_forward {D}", arch, forward, D, added),
            case(_rmsnorm_backward, f"rmsnorm_backward add {D}", arch, backward, D),
        ]
        cases += others + [other.in_fp32() for other in others]
    return cases
