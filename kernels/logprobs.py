"""Log-probability of each label: the vocabulary projection and the log-softmax as one step, in chunks.

    logits = x W^T                       (N, V)
    y_n    = logits[n, label_n] - logsumexp_v(logits[n, v])       0 where label_n = -100

    dlogits[n, v] = dy_n * ([v = label_n] - softmax(logits[n])_v)
    dx = dlogits W,   dW = dlogits^T x

Shapes: x (N, D), weight (V, D), labels (N,) of int64 -> (N,) in fp32, or fp64 for fp64 inputs. Held whole, the fp32
logits of 8,192 tokens over a vocabulary of 32,000 take 1.05 GB, and their gradient as much again;
`label_logprobs_torch` holds one chunk of them.

`label_logprobs_triton` holds one chunk of logits in the dtype of x, and never one in fp32. For each chunk the product
x W^T is the library's, and one kernel reads the logits once, each row by one program, for the label's logit and the
logsumexp in fp32. That is computed online: with m the largest logit so far and s the sum of exp(logit - m), a block of
logits z changes them to

    m' = max(m, max z)        s' = exp(m - m') s + sum exp(z - m')        and at the end logsumexp = m + log s

Backward computes the chunk's logits again, one kernel overwrites them with dlogits, where softmax(z) is
exp(z - m - log s), and two more products make dx and the chunk's share of dW. m and log s are kept apart, and z - m is
taken first, in which nothing is rounded that matters: beside a large m their sum would lose the digits of log s.

What the 16-bit logits cost: each is rounded once, by a relative 2^-9 in bf16, so a logit of 10 is off by up to 0.02,
and y by about as much. That is what the reference does too (its x W^T has the dtype of x, as in every Llama), and what
the checkpoint was trained with. dlogits are rounded once, as autograd's are where they enter the two products.

What limits it: the products, 2 N D V operations forward and 6 N D V backward. For D = 4096 the kernels move 2 bytes a
logit forward and 4 backward, against 8,192 operations and 24,576: 4% and 3% of the time where a product runs at 750
TFLOP/s and memory at 4.3 TB/s. Adding a chunk's share to dW, kept in fp32, moves 8 bytes for each element of W: 6% of a
backward pass in chunks of 4,096 tokens, 23% in chunks of 1,024. So a chunk is as large as BUFFER_BYTES holds; with a
single one there is nothing to add, and no fp32 dW.
"""

import torch
from torch import Tensor

from kernels.launch import DTYPES, CompileCase, Config, architecture, tl, triton, why_not
from kernels.linear import linear_torch

IGNORED = -100
CHUNK = 1024  # tokens; the logits of one chunk are all that is held


def label_logprobs_reference(x: Tensor, weight: Tensor, labels: Tensor, summed: bool = False) -> Tensor:
    """The specification, with all logits at once; nothing is gained from `summed`."""
    logits = x @ weight.T
    logprobs = logits.to(_wide(logits)).log_softmax(dim=-1)
    chosen = logprobs.gather(-1, labels.where(labels != IGNORED, 0)[:, None])[:, 0]
    return torch.where(labels == IGNORED, 0.0, chosen)


def label_logprobs_torch(x: Tensor, weight: Tensor, labels: Tensor, summed: bool = False) -> Tensor:
    """The same in chunks, and only for the labels that count.

    summed: a promise that the gradient of every label will be the same, as that of a loss which is their sum.
    """
    summed = summed and torch.is_grad_enabled()  # inside the function it never is, and gradients always seem wanted
    rows = (labels != IGNORED).nonzero()[:, 0]
    if len(rows) == len(labels):
        return _ChunkedLabelLogprobs.apply(x, weight, labels, summed)
    y = _ChunkedLabelLogprobs.apply(x[rows], weight, labels[rows], summed)
    return y.new_zeros(len(labels)).index_copy(0, rows, y)


class _ChunkedLabelLogprobs(torch.autograd.Function):
    """Keeps no logits between forward and backward.

    d y_i / d logits_i = onehot(l_i) - p_i needs nothing from above, so the forward pass takes the gradients along while
    it has the logits: those of x row by row, to be scaled by dy_i, and that of W summed, if all dy_i are promised to be
    equal. Without the promise, or where it is broken, the backward pass computes the logits again: four products of
    N x D x V instead of three.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, labels: Tensor, summed: bool) -> Tensor:
        want_dx, want_dw, *_ = ctx.needs_input_grad
        y = x.new_empty(len(x), dtype=_wide(x))
        # Of y and not of the loss, with the sign turned; dw is kept in fp32, which a sum over many chunks needs.
        dx = torch.empty_like(x) if want_dx else None
        dw = torch.zeros_like(weight, dtype=_wide(weight)) if want_dw and summed else None
        for part in _parts(x):
            logprobs = linear_torch(x[part], weight).log_softmax(dim=-1, dtype=_wide(weight))
            y[part] = logprobs.gather(1, labels[part, None])[:, 0]
            if want_dx or dw is not None:
                dlogits = _minus_onehot(logprobs.exp_(), labels[part]).to(x.dtype)
                if want_dx:
                    torch.matmul(dlogits, weight, out=dx[part])
                if dw is not None:
                    _add_product_to(dw, dlogits, x[part])
        ctx.save_for_backward(x, weight, labels, dx, dw)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight, labels, dx, dw = ctx.saved_tensors
        if dx is not None:
            dx = dx * -dy[:, None].to(dx.dtype)
        if dw is not None and (len(dy) == 0 or bool((dy == dy[0]).all())):
            dw = dw * -(dy[0] if len(dy) else 0.0)
        elif ctx.needs_input_grad[1]:
            dw = torch.zeros_like(weight, dtype=_wide(weight))
            for part in _parts(x):
                p = linear_torch(x[part], weight).softmax(dim=-1, dtype=_wide(weight))
                dlogits = _minus_onehot(p, labels[part]).mul_(-dy[part, None]).to(x.dtype)
                _add_product_to(dw, dlogits, x[part])
        return dx, None if dw is None else dw.to(weight.dtype), None, None


def _parts(x: Tensor) -> list[slice]:
    return [slice(at, at + CHUNK) for at in range(0, len(x), CHUNK)]


def _minus_onehot(p: Tensor, labels: Tensor) -> Tensor:
    """p - onehot(labels), which is -dy/dlogits, in place of p."""
    return p.scatter_add_(1, labels[:, None], p.new_full((len(p), 1), -1.0))


def _add_product_to(dw: Tensor, dlogits: Tensor, x: Tensor) -> None:
    if dw.dtype == x.dtype:
        dw.addmm_(dlogits.T, x)
    else:  # a 16-bit product is quicker than one of fp32 copies, and rounded once a chunk
        dw += dlogits.T @ x


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


# ---------------------------------------------------------------------------------------------------- forward
#
# Rows of V logits lie `stride` apart, a multiple of 64, which V need not be (a tokenizer with added tokens has 32,002).
# So the kernels load and store up to the stride, 16 bytes at a time whatever V is, and mask what lies beyond V later.


@triton.jit
def _logprobs_forward(
    logits_ptr,
    labels_ptr,
    y_ptr,
    m_ptr,
    log_s_ptr,
    V,
    stride,
    IGNORED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """y, m and log s of one row."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    logits_ptr += row * stride
    m = -3.0e38  # below every logit, and finite: exp(m - m') never meets inf - inf
    s = tl.zeros([BLOCK_V], tl.float32)  # summed over the columns only at the end
    for first in range(0, tl.where(label == IGNORED, 0, V), BLOCK_V):  # an ignored row is not read at all
        columns = first + tl.arange(0, BLOCK_V)
        logits = tl.load(logits_ptr + columns, mask=columns < stride, other=0.0).to(tl.float32)
        logits = tl.where(columns < V, logits, float("-inf"))
        m_next = tl.maximum(m, tl.max(logits, 0))
        s = s * tl.exp(m - m_next) + tl.exp(logits - m_next)
        m = m_next
    if label == IGNORED:  # numbers that do no harm where backward computes what it will not use
        m, log_s = 0.0, 0.0
    else:
        log_s = tl.log(tl.sum(s, 0))
    # A kernel cannot raise: a label outside the vocabulary makes NaN.
    inside = (label >= 0) & (label < V)
    chosen = tl.load(logits_ptr + label, mask=inside, other=0.0).to(tl.float32)
    y = tl.where(inside, (chosen - m) - log_s, float("nan"))
    tl.store(y_ptr + row, tl.where(label == IGNORED, 0.0, y))
    tl.store(m_ptr + row, m)
    tl.store(log_s_ptr + row, log_s)


# ---------------------------------------------------------------------------------------------------- backward


@triton.jit
def _logprobs_backward(
    logits_ptr,
    labels_ptr,
    dy_ptr,
    m_ptr,
    log_s_ptr,
    V,
    stride,
    IGNORED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """dlogits in the place of logits: a block of one row."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    dy = tl.load(dy_ptr + row)
    m = tl.load(m_ptr + row)
    log_s = tl.load(log_s_ptr + row)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    counted = label != IGNORED
    at = logits_ptr + row * stride + columns
    logits = tl.load(at, mask=(columns < stride) & counted, other=0.0).to(tl.float32)
    dlogits = dy * (tl.where(columns == label, 1.0, 0.0) - tl.exp((logits - m) - log_s))
    dlogits = tl.where(counted, dlogits, 0.0)
    tl.store(at, dlogits.to(logits_ptr.dtype.element_ty), mask=columns < stride)


# ---------------------------------------------------------------------------------------------------- launchers

BUFFER_BYTES = 256 << 20  # the logits of a chunk: 4,096 tokens over a vocabulary of 32,000, 1,024 over 128,256

_FORWARD = Config({"BLOCK_V": 4096}, num_warps=8, num_stages=1)
_BACKWARD = Config({"BLOCK_V": 4096}, num_warps=8, num_stages=1)
CONFIGS = {name: {"forward": _FORWARD, "backward": _BACKWARD} for name in ("sm_80", "sm_90", "sm_100", "gfx942")}


def _chunk_tokens(N: int, V: int, itemsize: int) -> int:
    """Tokens to a chunk: as many as BUFFER_BYTES hold, 128 at least, and all chunks but the last of one size."""
    most = max(128, BUFFER_BYTES // (V * itemsize) // 128 * 128)
    chunks = max(1, -(-N // most))
    return max(128, -(-N // chunks // 128) * 128)


def _chunks(x: Tensor, weight: Tensor):
    """(chunk's slice, its logits) for each chunk; the logits lie in one buffer, which the next chunk takes again."""
    N, V = len(x), len(weight)
    size = _chunk_tokens(N, V, x.dtype.itemsize)
    stride = -(-V // 64) * 64
    buffer = torch.empty(min(size, N), stride, dtype=x.dtype, device=x.device)
    for at in range(0, N, size):
        part = slice(at, min(at + size, N))
        yield part, torch.mm(x[part], weight.T, out=buffer[: part.stop - at, :V])


def _launch(kernel, kind: str, logits: Tensor, *columns: Tensor) -> None:
    """One program a row; backward, one for each block of it."""
    config = CONFIGS[architecture(logits.device)][kind]
    rows, V = logits.shape
    grid = (rows,) if kind == "forward" else (rows, triton.cdiv(logits.stride(0), config.constants["BLOCK_V"]))
    kernel[grid](
        *(logits, *columns, V, logits.stride(0), IGNORED),
        **config.constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def label_logprobs_triton(x: Tensor, weight: Tensor, labels: Tensor, summed: bool = False) -> Tensor:
    """The same, holding one chunk of logits in the dtype of x. ValueError for arguments that do not fit.

    Its backward pass computes the logits again in any case, so nothing is gained from `summed`.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or labels.shape != x.shape[:1]:
        raise ValueError(
            f"label_logprobs: x {tuple(x.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)} do not "
            "fit: (N, D), (V, D) and (N,)"
        )
    if x.dtype not in DTYPES or weight.dtype != x.dtype:
        raise ValueError(f"label_logprobs: x {x.dtype} and weight {weight.dtype} must be of one dtype of 16 or 32 bits")
    if labels.dtype != torch.int64:
        raise ValueError(f"label_logprobs: labels {labels.dtype} must be torch.int64")
    if weight.device != x.device or labels.device != x.device:
        raise ValueError(f"label_logprobs: x on {x.device}, weight on {weight.device}, labels on {labels.device}")
    return torch.ops.solar.label_logprobs(x, weight, labels)[0]


# ---------------------------------------------------------------------------------------------------- operators


@torch.library.custom_op("solar::label_logprobs", mutates_args=())
def _label_logprobs(x: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if reason := why_not(x):
        raise ValueError(f"label_logprobs: {reason}")
    y, m, log_s = (torch.empty(len(x), dtype=torch.float32, device=x.device) for _ in range(3))
    labels = labels.contiguous()
    with torch.cuda.device_of(x):
        for part, logits in _chunks(x, weight):
            _launch(_logprobs_forward, "forward", logits, labels[part], y[part], m[part], log_s[part])
    return y, m, log_s


@torch.library.custom_op("solar::label_logprobs_backward", mutates_args=())
def _label_logprobs_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    m: Tensor,
    log_s: Tensor,
    want_dx: bool,
    want_dw: bool,
) -> tuple[Tensor, Tensor]:
    """dx and dW; an empty tensor for one that is not wanted (a frozen head, an embedding that is not trained)."""
    dx, dw = _new_gradients(x, weight, want_dx, want_dw)
    if not len(x):
        return dx, dw.zero_()
    dy, labels = dy.contiguous(), labels.contiguous()
    # Several chunks are summed in fp32: each share rounded to 16 bits, and a sum of them in 16 bits, would lose digits.
    several = want_dw and len(x) > _chunk_tokens(len(x), len(weight), x.dtype.itemsize)
    total = torch.zeros(weight.shape, dtype=torch.float32, device=x.device) if several else None
    with torch.cuda.device_of(x):
        for part, logits in _chunks(x, weight):
            _launch(_logprobs_backward, "backward", logits, labels[part], dy[part], m[part], log_s[part])
            if want_dx:
                torch.mm(logits, weight, out=dx[part])
            if several:
                _add_product(total, logits.T, x[part])
            elif want_dw:
                torch.mm(logits.T, x[part], out=dw)
    return dx, dw.copy_(total) if several else dw


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, where nothing is rounded to 16 bits on the way."""
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:  # the interpreter: the CPU's products have the dtype of their operands
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _new_gradients(x: Tensor, weight: Tensor, want_dx: bool, want_dw: bool) -> tuple[Tensor, Tensor]:
    return tuple(
        torch.empty(t.shape if wanted else 0, dtype=t.dtype, device=t.device)
        for t, wanted in ((x, want_dx), (weight, want_dw))
    )


@_label_logprobs.register_fake
def _(x, weight, labels):
    return tuple(torch.empty(len(x), dtype=torch.float32, device=x.device) for _ in range(3))


@_label_logprobs_backward.register_fake
def _(dy, x, weight, labels, m, log_s, want_dx, want_dw):
    return _new_gradients(x, weight, want_dx, want_dw)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx, dy, *_):
    want_dx, want_dw, _ = ctx.needs_input_grad
    dx, dw = _label_logprobs_backward(dy, *ctx.saved_tensors, want_dx, want_dw)
    return dx if want_dx else None, dw if want_dw else None, None


_label_logprobs.register_autograd(_differentiate, setup_context=_save)


# ---------------------------------------------------------------------------------------------------- ahead of time


def compile_cases() -> list[CompileCase]:
    """Both kernels with bf16 and fp32 logits, for a vocabulary that is a multiple of 16 and for one that is not."""
    kernels = {
        "forward": (_logprobs_forward, ("y_ptr", "m_ptr", "log_s_ptr")),
        "backward": (_logprobs_backward, ("dy_ptr", "m_ptr", "log_s_ptr")),
    }
    cases = []
    for name, configs in CONFIGS.items():
        for kind, (kernel, vectors) in kernels.items():
            for odd in (False, True):
                pointers = {"logits_ptr": "*bf16", "labels_ptr": "*i64"} | dict.fromkeys(vectors, "*fp32")
                case = CompileCase(
                    kernel=kernel,
                    name=f"logprobs_{kind}" + " odd V" * odd,
                    architecture=name,
                    signature=pointers | {"V": "i32", "stride": "i32"},
                    config=configs[kind],
                    constants={"IGNORED": IGNORED},
                    divisible=(*pointers, "stride", *([] if odd else ["V"])),
                )
                cases += [case, case.in_fp32()]
    return cases
