"""Decode attention: one or a few new queries against a long KV cache, split over the keys. Forward only.

What it computes is `kernels/attention.py`'s attention, and `attention_reference` there is its specification. Only the
shape differs: a head has T = 1 query, or a few, and S keys, often thousands. Attention for training gives each program
a block of queries, so here it would run B H programs on a GPU that wants hundreds, and the G query heads of a group
would each read the same keys. Instead one program takes (sequence, key head, split of the keys), and loads each block
of K and V once for all G T rows of queries that want it; a second, small kernel merges the splits.

**Merging partial softmaxes** (arXiv:2205.14135, section 3.1). Of the scores s_j over a set A of keys keep three things:

    m_A = max_A s_j          l_A = sum_A exp(s_j - m_A)          o_A = sum_A exp(s_j - m_A) v_j

For two disjoint sets the same three things of their union follow, without a look back at the keys:

    m = max(m_A, m_B)        l = exp(m_A - m) l_A + exp(m_B - m) l_B        o = exp(m_A - m) o_A + exp(m_B - m) o_B

and over all keys the attention is y = o / l. The rule is associative: a program applies it from block to block along
its split (the online softmax), and the second kernel from split to split (Flash-Decoding). A set in which a query sees
no key has l = 0 and o = 0, and changes nothing. Both kernels merge in one fixed order, so the result is deterministic.
As exp(x) = 2^(x log2 e), the scores are scaled by log2(e) / sqrt(E) at once and every exp is an exp2.

Shapes: q and y (B, H, T, E); k and v (B, K, S, E), of any stride but in E; G = H / K query heads for each key head;
partial o (B, K, G T, splits, E), m and l (B, K, G T, splits), all fp32.

What limits it: K and V are read once, 2 B K S E elements; with a window, only the S = window + T - 1 last keys. At
batch 16, 8,192 keys, 8 key heads, head_dim 128 that is 537 MB: 125 us at 4.3 TB/s. The partials take 2 (E + 2) 4 bytes
for each row and split, 0.2% of it at two splits. Each byte of a 16-bit K or V meets G T multiplications and additions,
far fewer than the hundreds at which the tensor cores would fall behind, so their 16-row tiles may be mostly padding.
"""

import functools
import math
from dataclasses import replace

import torch
from torch import Tensor

from kernels.attention import MAX_HEAD_DIM, check_attention
from kernels.launch import (
    CompileCase,
    Config,
    architecture,
    check_tensors,
    has_aligned_rows,
    tl,
    triton,
    why_not,
)

MAX_ROWS = 32  # G * T, beyond which attention by blocks of queries does as well

# A block is 16 KB of K and as much of V, whatever head_dim and dtype, and BLOCK_N keys at most; with more than 16 rows
# of queries it has fewer keys, so that the tile of scores stays as small. A processor of an H200 must keep about 40 KB
# in flight to draw its share of the bandwidth (33 GB/s for each of 132, 1.2 us of latency): RESIDENT programs, each
# with up to num_stages - 1 blocks of K and V on their way, have 192 KB, and one computes while the other waits.
BLOCK_BYTES = 16384
RESIDENT = 2
CONFIGS = {
    "sm_80": Config({"BLOCK_N": 128}, num_warps=4, num_stages=3),
    "sm_90": Config({"BLOCK_N": 128}, num_warps=4, num_stages=4),
    "sm_100": Config({"BLOCK_N": 128}, num_warps=4, num_stages=4),
    "gfx942": Config({"BLOCK_N": 32}, num_warps=4, num_stages=2),  # with more keys, the masks spill
}
MERGE_CONFIGS = dict.fromkeys(CONFIGS, Config({"BLOCK_SPLITS": 16}, num_warps=4, num_stages=1))


# ---------------------------------------------------------------------------------------------------- forward

# The number that stands for -inf as the maximum of no scores: it is finite, so that a difference of two maxima never is
# inf - inf, and exp2 of (a masked score, -inf) minus it is 0 as it should be.
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def _rows(pointer, at, stride, e, ALIGNED: tl.constexpr):
    """Pointers to the columns e of the rows `at`.

    The compiler takes a stride for a multiple of 16 elements or of one. Rows of 72 are neither, but start at multiples
    of 16 bytes: unless that is said, their loads are too narrow to run ahead, and each block is waited for.
    """
    pointers = pointer + at[:, None] * stride + e[None, :]
    if ALIGNED:
        pointers = tl.max_contiguous(tl.multiple_of(pointers, (16, 16)), (1, e.shape[0]))
    return pointers


@triton.jit(
    do_not_specialize=["T", "S", "window", "start", "keys_per_split", "splits", "stride_ib", "stride_it", "stride_jb"]
)
def _decode_split(
    q_ptr,
    k_ptr,
    v_ptr,
    ids_ptr,  # document ids (B, T) and (B, S); None, both of them: no documents
    key_ids_ptr,
    o_ptr,
    m_ptr,
    l_ptr,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_ib,
    stride_it,
    stride_jb,
    scale,
    G,
    T,
    S,
    window,
    start,
    keys_per_split,
    splits,
    HEAD_DIM: tl.constexpr,
    ALIGNED: tl.constexpr,  # every row of k and v starts at a multiple of 16 bytes
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """m, l and o of one split of the keys, for the G * T rows of queries of one key head of one sequence."""
    split, kv_head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows, n, e = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_E)
    in_rows, in_e = rows < G * T, e < HEAD_DIM
    t = rows % T
    head = (kv_head * G + tl.minimum(rows // T, G - 1)).to(tl.int64)  # rows that pad the tile read what others do
    q_at = q_ptr + b * stride_qb + head[:, None] * stride_qh + t[:, None] * stride_qt + e[None, :]
    queries = tl.load(q_at, mask=in_e[None, :], other=0.0)
    if ids_ptr is not None:
        document = tl.load(ids_ptr + b * stride_ib + t * stride_it)

    low = start + split * keys_per_split
    high = tl.minimum(low + keys_per_split, S)
    i = S - T + t  # the query's place among the keys; of this split it sees those in (i - window, i]
    newest = tl.minimum(i, high - 1)[:, None]
    oldest = (i - window + 1)[:, None]
    # S * stride may pass 2^31: the start of a block is counted in 64 bits, and only what is within it in 32.
    k_ptr += b * stride_kb + kv_head.to(tl.int64) * stride_kh + low.to(tl.int64) * stride_kn
    v_ptr += b * stride_vb + kv_head.to(tl.int64) * stride_vh + low.to(tl.int64) * stride_vn
    m = tl.full((BLOCK_M,), LOWEST, tl.float32)
    # l is summed over the columns only after the loop: one reduction across warps less for each block.
    l_columns = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    o = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    for first in range(low, high, BLOCK_N):
        # Where the last block has no more keys it reads its last one again, which the mask hides.
        at = tl.minimum(n, high - 1 - first)
        keys = tl.load(_rows(k_ptr, at, stride_kn, e, ALIGNED), mask=in_e[None, :], other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        j = first + n[None, :]
        scores = tl.where((j <= newest) & (j >= oldest), scores, float("-inf"))
        if ids_ptr is not None:
            key_document = tl.load(key_ids_ptr + b * stride_jb + first + at)
            scores = tl.where(document[:, None] == key_document[None, :], scores, float("-inf"))
        m_next = tl.maximum(m, tl.max(scores, 1))
        weights = tl.exp2(scores - m_next[:, None])
        shrink = tl.exp2(m - m_next)
        l_columns = l_columns * shrink[:, None] + weights
        values = tl.load(_rows(v_ptr, at, stride_vn, e, ALIGNED), mask=in_e[None, :], other=0.0)
        o = tl.dot(weights.to(values.dtype), values, o * shrink[:, None], input_precision="ieee")
        m = m_next
        k_ptr += BLOCK_N * stride_kn
        v_ptr += BLOCK_N * stride_vn

    row = ((b * tl.num_programs(1) + kv_head) * G * T + rows) * splits + split
    tl.store(m_ptr + row, m, mask=in_rows)
    tl.store(l_ptr + row, tl.sum(l_columns, 1), mask=in_rows)
    tl.store(o_ptr + row[:, None] * HEAD_DIM + e[None, :], o, mask=in_rows[:, None] & in_e[None, :])


@triton.jit(do_not_specialize=["T", "splits"])
def _decode_merge(
    o_ptr,
    m_ptr,
    l_ptr,
    y_ptr,
    stride_yb,
    stride_yh,
    stride_yt,
    T,
    splits,
    HEAD_DIM: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """One row of y from the m, l and o of its splits."""
    t, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = (b * tl.num_programs(1) + head) * T + t
    e = tl.arange(0, BLOCK_E)
    in_e = e < HEAD_DIM
    m_all = LOWEST
    l_all = 0.0
    o_all = tl.zeros((BLOCK_E,), tl.float32)
    for first in range(0, splits, BLOCK_SPLITS):
        split = first + tl.arange(0, BLOCK_SPLITS)
        at = row * splits + split
        m = tl.load(m_ptr + at, mask=split < splits, other=LOWEST)
        l = tl.load(l_ptr + at, mask=split < splits, other=0.0)  # noqa: E741
        o_at = o_ptr + at[:, None] * HEAD_DIM + e[None, :]
        o = tl.load(o_at, mask=(split < splits)[:, None] & in_e[None, :], other=0.0)
        m_next = tl.maximum(m_all, tl.max(m, 0))
        shrink, weights = tl.exp2(m_all - m_next), tl.exp2(m - m_next)
        l_all = l_all * shrink + tl.sum(weights * l, 0)
        o_all = o_all * shrink + tl.sum(weights[:, None] * o, 0)
        m_all = m_next
    y_at = y_ptr + b * stride_yb + head * stride_yh + t * stride_yt + e
    tl.store(y_at, (o_all / l_all).to(y_ptr.dtype.element_ty), mask=in_e)


# ---------------------------------------------------------------------------------------------------- launchers


def _block_e(head_dim: int) -> int:
    return max(16, 1 << (head_dim - 1).bit_length())  # a side of tl.dot is a power of two, and no less than 16


def _block_m(rows: int) -> int:
    return max(16, 1 << (rows - 1).bit_length())


def _config(name: str, block_e: int, itemsize: int, block_m: int) -> Config:
    """The configuration of an architecture for tiles of so many columns and rows of queries."""
    config = CONFIGS[name]
    block_n = min(config.constants["BLOCK_N"], BLOCK_BYTES // (block_e * itemsize)) * 16 // block_m
    num_warps = 8 if itemsize == 4 else config.num_warps  # fp32 products hold their operands in registers: half as many
    return replace(config, constants={"BLOCK_N": max(16, block_n)}, num_warps=num_warps)


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # the interpreter: enough for several splits
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.lru_cache(maxsize=4096)
def _split(groups: int, blocks: int, slots: int) -> int:
    """Blocks of keys to a split, for `groups` = B * K groups of `blocks` each and a GPU that runs `slots` programs.

    The programs run in rounds of `slots`, and each takes as long as its blocks and about two more, to start and to
    write: the fewest rounds times length wins, and of equals the fewest splits. At batch 16 with 8 key heads an H200
    has 264 slots for 128 groups, so two splits; at batch 1 up to 33.
    """

    def cost(splits: int) -> int:
        return -(-groups * splits // slots) * (-(-blocks // splits) + 2)

    return -(-blocks // min(range(1, min(blocks, slots) + 1), key=cost))


def is_decode(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `decode_attention_triton` serves: few rows of queries to a key head, and no gradient wanted."""
    rows = q.shape[2] * (q.shape[1] // k.shape[1])
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    return 0 < rows <= MAX_ROWS and not learns


def decode_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None = None,
    document_ids: Tensor | None = None,
    key_document_ids: Tensor | None = None,
) -> Tensor:
    """`attention_reference` for few queries, G * T <= MAX_ROWS, and head_dim to 256; has no gradient.

    k and v may be views of a cache. ValueError for shapes, dtypes, devices or strides that do not fit.
    """
    check_attention(q, k, v, window, document_ids, key_document_ids)
    check_tensors("decode attention", q=q, k=k, v=v)
    rows = q.shape[1] // k.shape[1] * q.shape[2]
    if not 1 <= rows <= MAX_ROWS:
        raise ValueError(f"decode attention: {rows} rows of queries a key head; it takes 1 to {MAX_ROWS}")
    if q.shape[3] > MAX_HEAD_DIM:
        raise ValueError(f"decode attention: head_dim {q.shape[3]}; it takes at most {MAX_HEAD_DIM}")
    return torch.ops.solar.decode_attention(q, k, v, window, document_ids, key_document_ids)


# ---------------------------------------------------------------------------------------------------- operator


def _new_output(q: Tensor) -> Tensor:
    """(B, H, T, E) that lies in memory as (B, T, H, E): the output projection then takes it as it is."""
    B, H, T, E = q.shape
    return torch.empty(B, T, H, E, dtype=q.dtype, device=q.device).transpose(1, 2)


@torch.library.custom_op("solar::decode_attention", mutates_args=())
def _decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    document_ids: Tensor | None,
    key_document_ids: Tensor | None,
) -> Tensor:
    if reason := why_not(q):
        raise ValueError(f"decode attention: {reason}")
    (B, H, T, E), (_, K, S, _) = q.shape, k.shape
    G = H // K
    window = S if window is None else min(window, S)
    start = max(0, S - T + 1 - window)  # the first key that the first query sees
    name = architecture(q.device)
    block_e, block_m = _block_e(E), _block_m(G * T)
    config = _config(name, block_e, q.dtype.itemsize, block_m)
    block_n = config.constants["BLOCK_N"]
    blocks = -(-(S - start) // block_n)
    blocks_per_split = _split(B * K, blocks, RESIDENT * _processors(q.device))
    splits = -(-blocks // blocks_per_split)  # not one of them empty
    id_strides = 0, 0, 0
    if document_ids is not None:
        key_document_ids = key_document_ids if key_document_ids.stride(1) == 1 else key_document_ids.contiguous()
        id_strides = *document_ids.stride(), key_document_ids.stride(0)

    y = _new_output(q)
    o = torch.empty(B * H * T, splits, E, dtype=torch.float32, device=q.device)
    m, l = (torch.empty(B * H * T, splits, dtype=torch.float32, device=q.device) for _ in range(2))  # noqa: E741
    strides = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *id_strides
    lengths = T, S, window, start, blocks_per_split * block_n, splits
    with torch.cuda.device_of(q):
        _decode_split[(splits, K, B)](
            *(q, k, v, document_ids, key_document_ids, o, m, l, *strides, E**-0.5 * math.log2(math.e), G, *lengths),
            HEAD_DIM=E,
            ALIGNED=has_aligned_rows(k) and has_aligned_rows(v),
            BLOCK_E=block_e,
            BLOCK_M=block_m,
            **config.constants,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        merge = MERGE_CONFIGS[name]
        _decode_merge[(T, H, B)](
            *(o, m, l, y, *y.stride()[:3], T, splits),
            HEAD_DIM=E,
            BLOCK_E=block_e,
            **merge.constants,
            num_warps=merge.num_warps,
            num_stages=merge.num_stages,
        )
    return y


@_decode_attention.register_fake
def _(q, k, v, window, document_ids, key_document_ids):
    return _new_output(q)


# ---------------------------------------------------------------------------------------------------- ahead of time


def compile_cases() -> list[CompileCase]:
    """Both kernels for head_dim 32 to 256, bf16 and fp32; the first with few rows and many, documents and none, and for
    rows of 72, whose stride is no multiple of 16 elements."""
    cases = []
    strides = [f"stride_{x}{dim}" for x, dims in (("q", "bht"), ("k", "bhn"), ("v", "bhn")) for dim in dims]
    integers = ["stride_ib", "stride_it", "stride_jb", "G", "T", "S", "window", "start", "keys_per_split", "splits"]
    partials = dict.fromkeys(("o_ptr", "m_ptr", "l_ptr"), "*fp32")
    ids = ("ids_ptr", "key_ids_ptr")
    shapes = [(32, 16, True), (64, 16, False), (64, MAX_ROWS, True)]
    shapes += [(128, 16, False), (128, 16, True), (128, MAX_ROWS, False)]
    shapes += [(256, 16, False), (256, MAX_ROWS, True), (72, 16, True)]
    for name in CONFIGS:
        for E, rows, documents in shapes:
            pointers = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), "*bf16") | partials
            pointers |= dict.fromkeys(ids, "*i64") if documents else {}
            case = CompileCase(
                kernel=_decode_split,
                name=f"decode_split E{E} M{rows}" + " documents" * documents,
                architecture=name,
                signature=pointers | dict.fromkeys([*strides, *integers], "i32") | {"scale": "fp32"},
                config=_config(name, _block_e(E), 2, rows),
                constants={"HEAD_DIM": E, "BLOCK_E": _block_e(E), "BLOCK_M": rows, "ALIGNED": True}
                | ({} if documents else dict.fromkeys(ids)),
                divisible=(*pointers, *(strides if E % 16 == 0 else [])),
            )
            cases += [case, case.in_fp32(_config(name, _block_e(E), 4, rows))]
        for E in (32, 64, 128, 256):
            y_strides = ["stride_yb", "stride_yh", "stride_yt"]
            case = CompileCase(
                kernel=_decode_merge,
                name=f"decode_merge E{E}",
                architecture=name,
                signature=partials | {"y_ptr": "*bf16"} | dict.fromkeys([*y_strides, "T", "splits"], "i32"),
                config=MERGE_CONFIGS[name],
                constants={"HEAD_DIM": E, "BLOCK_E": E},
                divisible=(*partials, "y_ptr", *y_strides),
            )
            cases += [case, case.in_fp32()]
    return cases
