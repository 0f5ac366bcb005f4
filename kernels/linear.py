"""The linear projection, and which library multiplies.

    y = x W^T + b          dx = dy W,   dW = dy^T x,   db = sum over rows of dy

Shapes: x (..., D), weight (O, D), bias (O,) -> (..., O), in their dtype.

On a GPU the product is the library's own, and so it is on a CPU, where there are two of them. For fp32 torch takes MKL,
whose fast paths are for Intel's processors alone; oneDNN compiles a product for the processor at hand. On a Zen 4 it
takes 0.82-0.90 of MKL's time for y and 0.85-0.95 for dx (2,048 rows, D and O from 96 to 2,048; within a tenth of the
time the same for dW, which MKL keeps), and 0.55 with a single row. On Intel's own (a Xeon with AMX) it takes 1.0-1.2 of
MKL's time with 2,048 rows, and 1.0-1.9 with one or two; only between 4 and 15 rows MKL is the slower one, by up to 1.9.
For 16-bit types torch takes oneDNN by itself, where the processor multiplies them; where it does not, torch's own loop
remains, at 13 GFLOP/s on two cores of a Zen 3, a fifth of what they do in fp32 or less. There many rows are multiplied
in fp32.

Generating a token asks for products with a single row, or a few: `PreparedLinear` is for those.
"""

import functools
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

SLOW_FOR_MKL = range(4, 16)  # rows, on Intel's processors
WIDENED_FROM = 32  # rows: with fewer, to widen the weight takes longer than it saves
WIDENED_BLOCK = 1 << 20  # numbers of a weight: 4 MB in fp32


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The specification: (..., D), (O, D), (O,) -> (..., O)."""
    y = x @ weight.T
    return y if bias is None else y + bias


def linear_torch(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, but on a CPU for fp32, where oneDNN can be asked directly, and for 16 bits where they must be widened.

    (torch.compile chooses for itself.)
    """
    learns = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if x.device.type != "cpu" or torch.compiler.is_compiling() or x.dtype != weight.dtype or not _has_onednn():
        return F.linear(x, weight, bias)
    rows = x.numel() // x.shape[-1]
    if x.dtype == torch.float32:
        if mkl_is_at_home() and rows not in SLOW_FOR_MKL:
            return F.linear(x, weight, bias)
        return (_Linear.apply if learns else product)(x, weight, bias)
    if learns or multiplies_natively(x.dtype) or rows < WIDENED_FROM:
        return F.linear(x, weight, bias)
    return _widened(x, weight, bias)


@functools.cache
def mkl_is_at_home() -> bool:
    """Whether torch has MKL, and this is one of Intel's processors."""
    info = Path("/proc/cpuinfo")
    return torch.backends.mkl.is_available() and info.is_file() and "GenuineIntel" in info.read_text(errors="replace")


@functools.cache
def _has_onednn() -> bool:
    """The operator is the one that torch.compile calls; it has an underscore, so a torch without it is survived."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """oneDNN's x W^T + b of fp32 tensors, without a gradient; the weight may be a transposed view."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _widened(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b of 16-bit tensors, computed in fp32 and rounded once, without a gradient.

    The weight is widened block by block: a block is multiplied while it lies in the cache, and no whole weight is ever
    held in fp32.
    """
    size = max(WIDENED_BLOCK // weight.shape[1], 1)
    wide, y = x.float(), x.new_empty(*x.shape[:-1], len(weight))
    blocks, outputs = weight.split(size), y.split(size, dim=-1)
    biases = [None] * len(blocks) if bias is None else bias.float().split(size)
    for block, b, output in zip(blocks, biases, outputs, strict=True):
        output.copy_(product(wide, block.float(), b))
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight = ctx.saved_tensors
        want_dx, want_dw, want_db = ctx.needs_input_grad
        rows = dy.reshape(-1, len(weight))
        return (
            product(dy, weight.T) if want_dx else None,
            rows.T @ x.reshape(-1, weight.shape[1]) if want_dw else None,
            rows.sum(0) if want_db else None,
        )


# ---------------------------------------------------------------------------------------------------- prepared weights
#
# A product with one row is a weighted sum of the weight's columns, y = sum_j x_j W[:, j], and what limits it is reading
# the weight from memory. Libraries tune products with many rows; with one they read at half of what memory gives, or
# less. torch has an operator that is nothing but a weighted sum of rows, `embedding_bag`, whose kernels (FBGEMM's) are
# compiled for the processor at hand, fetch ahead, and turn 16-bit weights into fp32 in registers. So the weight is laid
# out as tiles, each D rows of as many adjacent numbers as the tile has outputs. A tile is a bag, whose sum stays in
# registers while the tile is read from end to end, and the bags are dealt out to the threads evenly.
#
# On Intel's processors MKL's product of a row with a matrix that lies column by column reads fp32 faster still, 24-32
# GB/s where tiles give 17-24 and the weights as they are 20-25 (a Xeon whose memory gives 30): there the weight is
# transposed, in strips, at 1.8-4.7 GB/s where torch transposes the whole at 1.1-1.5.
#
# With several rows and weights of 16 bits that the processor does not multiply, FBGEMM has a product of fp32 rows with
# fp16 weights, packed beforehand. fp16 holds every bf16 weight between 2^-17 and 65504 exactly; of smaller ones it
# loses what lies below 2^-24, a millionth of a usual weight; and where there is a larger one the weights stay as they
# are.


Form = Literal["own", "tiles", "columns", "half"]
LARGEST_HALF = 65504.0  # of fp16
STRIP = 64  # outputs that are transposed at once


@functools.cache
def has_fbgemm() -> bool:
    """Whether torch has FBGEMM's kernels on this processor: an x86 with AVX2."""
    fast = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return fast and torch.backends.quantized.engine in ("x86", "fbgemm")


@functools.cache
def multiplies_natively(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies numbers of this dtype itself, and oneDNN has products of them."""
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    return name is None or (hasattr(torch.ops.mkldnn, name) and getattr(torch.ops.mkldnn, name)())


class _Bags:
    """What `embedding_bag` is given beside the tiles: the same for all weights of one shape."""

    def __init__(self, count: int, D: int, dtype: torch.dtype):
        self.indices = torch.arange(count * D, dtype=torch.int32)
        self.offsets = torch.arange(0, count * D + 1, D, dtype=torch.int32)
        self.rows = torch.empty(count, D, dtype=dtype)  # the row, once for each bag
        self.factors = self.rows.view(-1)


def _tiles(weights: list[Tensor], size: int) -> Tensor:
    """(O_i, D) each -> (O / size, D, size): the outputs of all, and zeros behind the last if they do not come out."""
    if any(len(weight) % size for weight in weights):
        weights = [F.pad(torch.cat(weights), (0, 0, 0, -sum(map(len, weights)) % size))]
    counts = [len(weight) // size for weight in weights]
    tiles = weights[0].new_empty(sum(counts), weights[0].shape[1], size)
    for weight, place in zip(weights, tiles.split(counts), strict=True):
        place.copy_(weight.unflatten(0, (-1, size)).mT)
    return tiles


def _columns(weights: list[Tensor]) -> Tensor:
    """(O_i, D) each -> (D, O): the outputs of all."""
    counts = [len(weight) for weight in weights]
    table = weights[0].new_empty(weights[0].shape[1], sum(counts))
    for weight, place in zip(weights, table.split(counts, dim=1), strict=True):
        for strip, target in zip(weight.split(STRIP), place.split(STRIP, dim=1), strict=True):
            target.copy_(strip.T)
    return table


class PreparedLinear:
    """Projections of one input as one product, for few rows and without a gradient: (N, D) -> (N, O).

    O counts the outputs of all `weights` (O_i, D), which share one dtype; `biases` (O_i,) are all there or all None.
    form: "tiles" or "columns", for a single row; "half", for weights of 16 bits; "own", the weights as they are, where
    the others copy them. The rows may be fp32 whatever the weights are, and so may the result.
    shared: a dict, empty at first, for what the products that are made together have in common.
    """

    def __init__(self, weights: list[Tensor], biases: list[Tensor | None], form: Form, shared: dict):
        self.weights, self.size, D = weights, sum(map(len, weights)), weights[0].shape[1]
        self.bias = None if biases[0] is None else torch.cat(biases)
        self.form = form
        if form == "tiles":
            tiles = _tiles(weights, 64 if self.size <= 8192 else 128)  # of the row, each tile has a copy: not too many
            self.table = tiles.flatten(0, 1)
            key = (len(tiles), D)
            self.bags = shared[key] = shared.get(key) or _Bags(*key, tiles.dtype)
        elif form == "columns":
            self.table = _columns(weights)
        elif form == "half":
            wide = torch.cat(weights).float()
            if wide.abs().max() > LARGEST_HALF:
                self.form = "own"
            else:
                self.packed = torch.ops.quantized.linear_prepack_fp16(wide, None)

    def __call__(self, x: Tensor) -> Tensor:
        if self.form == "tiles":
            bags = self.bags
            bags.rows.copy_(x)
            y, *_ = torch.embedding_bag(self.table, bags.indices, bags.offsets, False, 0, False, bags.factors, True)
            y = y.view(1, -1)[:, : self.size]
        elif self.form == "columns":
            y = x.to(self.table.dtype) @ self.table
        elif self.form == "half":
            y = torch.ops.quantized.linear_dynamic_fp16(x.float(), self.packed)
        else:
            x = x.to(self.weights[0].dtype)
            y = torch.cat([linear_torch(x, weight) for weight in self.weights], dim=-1)
        return y if self.bias is None else y.add_(self.bias)
