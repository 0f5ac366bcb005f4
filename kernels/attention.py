"""Attention of T new positions over S keys: causal, grouped queries, sliding window, documents.

    scores_ij = q_i . k_j / sqrt(E)         where i may see j, else -inf
    y_i       = sum_j softmax_j(scores_ij) v_j

Shapes: q and y (B, H, T, E); k and v (B, K, S, E), where each of the K key heads serves G = H / K query heads.

The queries are the *last* T of the S positions (bottom-right alignment), so the same call serves a whole sequence
(T = S), a chunk of a prompt behind a cache (T < S) and a single new token (T = 1). With i and j counted on the axis of
the keys, query i sees key j when all of these hold:

    j <= i                                       causal
    j >  i - window                              sliding window: `window` keys, the query's own included
    document_ids[i] == key_document_ids[j]       packed documents, or padding, never see each other

A query always sees its own key, so no row of the softmax is empty.

The kernels below never hold the T x S scores. They follow FlashAttention (arXiv:2205.14135, algorithm 1 forward and 4
backward) with the loop order of FlashAttention-2 (arXiv:2307.08691, algorithms 1 and 2): a program owns a block of rows
of the result and walks over the other axis, so nothing is added up across programs and every run gives the same bits.

Forward. The softmax of a row is computed while its scores arrive block by block. With s the scores seen so far, keep

    peak  = max_j s_j,    total = sum_j exp(s_j - peak),    y = sum_j exp(s_j - peak) v_j                          (1)

A block that raises the maximum from peak to peak' leaves all earlier terms too large by one factor, and before its own
terms are added

    total <- exp(peak - peak') total,    y <- exp(peak - peak') y                                                  (2)

and at the end y / total is the result, as in arXiv:2307.08691, section 3.1.1. lse = peak + log(total) is all that the
backward pass needs to compute any block of probabilities again:

    P_ij = exp(s_ij - lse_i)                                                                                       (3)

Backward, given dy (arXiv:2205.14135, appendix B.2). From y_i = sum_j P_ij v_j:

    dv_j = sum_i P_ij dy_i,    dP_ij = dy_i . v_j                                                                  (4)

The softmax has the derivative dP_ij / ds_il = P_ij ([j = l] - P_il), hence

    ds_ij = P_ij (dP_ij - delta_i),    delta_i = sum_l P_il dP_il = dy_i . sum_l P_il v_l = dy_i . y_i             (5)

so delta, a sum over all keys, costs one product of rows (the step that makes a blockwise backward possible), and

    dq_i = sum_j ds_ij k_j / sqrt(E)                                                                               (6)
    dk_j = sum_i ds_ij q_i / sqrt(E)                                                                               (7)

where the sums of dk and dv also run over the G query heads that share the key. Two kernels: one owns queries (dq, and
delta on the way), one owns keys (dk, dv). Scores and dP are computed in both, 7 products where 5 would do if dq were
added up with atomics: the price of bits that repeat.

Exponentials are powers of two, which is what the hardware has: with scale = log2(e) / sqrt(E), exp(s - lse) becomes
exp2(scale * (q . k) - lse'), one fused multiply-add and one exp2, and lse' is stored in those units. What limits the
speed is the tensor cores for long sequences: 4 B H T S E floating-point operations forward, half of them hidden by the
mask and never done, against (2 B H T E + 2 B K S E) elements moved. Close behind come the exponentials, 16 a cycle on a
multiprocessor that multiplies 2048 pairs in that cycle.

The loops. Blocks in which every query sees every key need no mask; only those on the diagonal, at the window's edge and
at the border of a document do. One loop runs over both kinds and branches, for with a loop for each the compiler would
drain and refill the pipeline of loads between them, and keep the accumulators twice. Blocks that no query of the
program sees are never loaded: the bounds come from the window, and from a look at the document ids. Each program
looks at all ids that the rest allows, 1,024 at a time: one to eight looks to 16k positions, but as many as there are
blocks of keys in a document of 2,048 when 128k positions are packed.

Three things cost a factor on Hopper, show only in the machine code, and are why some lines below look as they do:
- The test `begin < end` around each loop. A loop that may run no times leaves accumulators that plain instructions
  define on one path and running wgmmas on the other; ptxas then makes every wgmma wait for the one before (C7515).
- The bounds are carried through the scan of the ids as scalars, and pointers are declared aligned: otherwise the
  analysis of alignment gives up behind that loop, and loads become single elements that cannot be prefetched.
- The kernel that owns keys holds two accumulators and uses all registers that there are. So it masks before the second
  product, and loads lse and delta only where they are needed, without a mask, from padded rows.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.launch import ARCHITECTURES, CompileCase, Config, architecture, check_tensors, tl, triton, why_not


def visible(
    T: int,
    S: int,
    window: int | None,
    document_ids: Tensor | None,
    key_document_ids: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Which key each query sees: True where it does; (T, S), or (B, 1, T, S) with document ids (B, T) and (B, S)."""
    i = torch.arange(S - T, S, device=device)[:, None]
    j = torch.arange(S, device=device)[None, :]
    mask = j <= i
    if window is not None:
        mask &= j > i - window
    if document_ids is not None:
        mask = mask & (document_ids[:, None, :, None] == key_document_ids[:, None, None, :])
    return mask


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None = None,
    document_ids: Tensor | None = None,
    key_document_ids: Tensor | None = None,
) -> Tensor:
    """The specification, softmax in fp32 (fp64 for fp64 inputs). Holds all scores at once: (B, H, T, S)."""
    (_, H, T, E), (_, K, S, _) = q.shape, k.shape
    q32, k32, v32 = (t.float() if t.dtype.itemsize < 4 else t for t in (q, k, v))
    k32, v32 = (t.repeat_interleave(H // K, dim=1) for t in (k32, v32))
    scores = (q32 @ k32.transpose(-2, -1)) * E**-0.5
    scores = scores.masked_fill(~visible(T, S, window, document_ids, key_document_ids, q.device), float("-inf"))
    return (scores.softmax(dim=-1) @ v32).to(q.dtype)


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    document_ids: Tensor | None,
    key_document_ids: Tensor | None,
) -> None:
    """ValueError, naming it, for what no form of attention can take: shapes that do not fit, a window without keys."""
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(f"attention: q {tuple(q.shape)} and k {tuple(k.shape)} must have four dimensions")
    (B, H, T, E), (_, K, S, _) = q.shape, k.shape
    if k.shape != (B, K, S, E) or v.shape != k.shape or H % K or T > S:
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit: (B, H, T, E) and "
            "twice (B, K, S, E) with H a multiple of K and T at most S"
        )
    if window is not None and window < 1:
        raise ValueError(f"attention: window {window} must be at least 1")
    if (document_ids is None) != (key_document_ids is None):
        raise ValueError("attention: document_ids and key_document_ids come together")
    if document_ids is None:
        return
    expected = {"document_ids": (document_ids, (B, T)), "key_document_ids": (key_document_ids, (B, S))}
    for name, (ids, shape) in expected.items():
        if ids.shape != shape or ids.is_floating_point() or ids.device != q.device:
            raise ValueError(
                f"attention: {name} {tuple(ids.shape)} of {ids.dtype} on {ids.device} must be integers {shape} on "
                f"{q.device}"
            )


def attention_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None = None,
    document_ids: Tensor | None = None,
    key_document_ids: Tensor | None = None,
) -> Tensor:
    """`F.scaled_dot_product_attention`, with a mask built only where its own causal one does not serve.

    Of a lone position the G queries of a group see the same keys, so they stand as G positions of one head: torch would
    repeat the keys for each, which on a CPU takes two to five times as long in 16 bits.
    """
    (B, H, T, E), (_, K, S, _) = q.shape, k.shape
    within = window is None or window >= S  # the window hides nothing
    mask, is_causal = None, False
    if document_ids is None and within and (T == S or T == 1):
        is_causal = T > 1  # is_causal aligns the mask top-left, which is right only for T = S; one query sees every key
    else:
        mask = visible(T, S, None if within else window, document_ids, key_document_ids, q.device)
    if T == 1 and H != K:
        return F.scaled_dot_product_attention(q.reshape(B, K, H // K, E), k, v, attn_mask=mask).reshape(B, H, 1, E)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=H != K)


# ---------------------------------------------------------------------------------------------------- Triton: tiles

# Arguments that change from call to call and must not bring a compilation of their own.
LENGTHS = [
    *("heads", "H", "G", "T", "S", "window", "q_ids_b", "k_ids_b"),
    *(f"{name}_{axis}" for name in ("q", "k", "v", "y", "dy", "dq", "dk", "dv") for axis in "bht"),
]


@triton.jit
def _locate(heads, blocks, section):
    """This program's head (0 .. heads - 1) and turn (0 .. blocks - 1).

    Within a section of heads all heads take their first turn, then all their second: when a kernel gives the longest
    blocks to the first turns, no long program starts late and leaves the rest of the GPU waiting for it. A section is
    small enough that what its programs read stays in the L2 cache.
    """
    program = tl.program_id(0)
    before = program // (section * blocks) * section
    width = tl.minimum(section, heads - before)
    program -= before * blocks
    return before + program % width, program // width


@triton.jit
def _tile(base, stride, first, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Pointers to rows first .. first + ROWS - 1, WIDTH columns, of a matrix whose rows lie `stride` apart.

    Every row starts at a multiple of 16 bytes (`_aligned` sees to it), so 16 bytes are loaded at a time.
    """
    row = tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    # 64-bit arithmetic where an offset can pass 2^31, 32-bit within the tile.
    pointers = base + tl.cast(first, tl.int64) * stride + (row[:, None] * stride + column[None, :])
    return tl.max_contiguous(tl.multiple_of(pointers, (16, 16)), (1, WIDTH))


@triton.jit
def _load_tile(pointers, first, limit, ROWS: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr):
    """The tile of a (limit, E) matrix that starts at row `first`: zero outside the matrix."""
    inside = (first + tl.arange(0, ROWS) < limit)[:, None]
    if WIDTH != E:
        inside = inside & (tl.arange(0, WIDTH) < E)[None, :]
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def _store_tile(pointers, first, limit, tile, ROWS: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr):
    inside = (first + tl.arange(0, ROWS) < limit)[:, None] & (tl.arange(0, WIDTH) < E)[None, :]
    tl.store(pointers, tile.to(pointers.dtype.element_ty), mask=inside)


@triton.jit
def _load_ids(base, first, limit, ROWS: tl.constexpr):
    """Document ids of ROWS positions, as 32-bit integers; beyond the limit, the last one's again."""
    at = tl.minimum(first + tl.arange(0, ROWS), limit - 1)
    return tl.load(base + at).to(tl.int32)


@triton.jit
def _sees(i, j, ids, key_ids, window, HAS_WINDOW: tl.constexpr, HAS_DOCUMENTS: tl.constexpr):
    """`visible`, for positions and ids that broadcast to a tile, in either orientation."""
    mask = j <= i
    if HAS_WINDOW:
        mask = mask & (j > i - window)
    if HAS_DOCUMENTS:
        mask = mask & (ids == key_ids)
    return mask


@triton.jit
def _scan_documents(base, low, high, begin, end, alien_begin, alien_end, SCAN: tl.constexpr):
    """Which positions a block with ids low .. high has to visit, from the ids of the positions begin .. end - 1.

    Returns the first position with an id in low .. high and the one behind the last; and, of the positions alien_begin
    .. alien_end - 1, the first whose id is not low and the one behind the last. Exact for ids in any order, for what
    lies outside low .. high equals no id of the block; tight when documents lie one after the other.
    """
    first, last, first_alien, last_alien = end, begin, alien_end, alien_begin
    for start in tl.range(begin, end, SCAN, num_stages=1):
        at = start + tl.arange(0, SCAN)
        ids = tl.load(base + at, mask=at < end, other=0).to(tl.int32)
        near = (at < end) & (ids >= low) & (ids <= high)
        alien = (at >= alien_begin) & (at < alien_end) & (ids != low)
        first = tl.minimum(first, tl.min(tl.where(near, at, end), 0))
        last = tl.maximum(last, tl.max(tl.where(near, at + 1, begin), 0))
        first_alien = tl.minimum(first_alien, tl.min(tl.where(alien, at, alien_end), 0))
        last_alien = tl.maximum(last_alien, tl.max(tl.where(alien, at + 1, alien_begin), 0))
    return first, last, first_alien, last_alien


@triton.jit
def _key_range(
    t, T, S, window, ids, k_ids,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, SCAN: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Keys that the queries t .. t + BLOCK_T - 1 visit: begin <= full_begin <= full_end <= end.

    Every query of the block sees every key of full_begin .. full_end - 1, which are whole blocks; the blocks before
    and after need the mask. No query sees anything before begin or from end on.
    """
    first = t + S - T  # the block's first and last query, on the axis of the keys
    last = tl.minimum(t + BLOCK_T, T) - 1 + S - T
    begin = first * 0  # 0, as a tensor
    end = last + 1
    full_begin = begin
    full_end = first + 1
    if HAS_WINDOW:
        begin = tl.maximum(begin, first - window + 1)
        full_begin = tl.maximum(begin, last - window + 1)
    if HAS_DOCUMENTS and SCAN == 0:
        full_begin = end
    elif HAS_DOCUMENTS:
        low, high = tl.min(ids, 0), tl.max(ids, 0)
        near, _, _, alien = _scan_documents(k_ids, low, high, begin, end, begin, full_end, SCAN)
        begin = near
        full_begin = tl.maximum(full_begin, tl.where(low == high, alien, end))
    begin = begin // BLOCK_S * BLOCK_S
    full_begin = tl.minimum(tl.cdiv(full_begin, BLOCK_S) * BLOCK_S, end)
    full_end = tl.maximum(full_end // BLOCK_S * BLOCK_S, full_begin)
    return begin, full_begin, full_end, end


@triton.jit
def _query_range(
    s, T, S, window, ids, q_ids,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, SCAN: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Queries that the keys s .. s + BLOCK_S - 1 meet: begin <= full_begin <= full_end <= end, as in `_key_range`."""
    first = s - (S - T)  # the block's first and last key, on the axis of the queries
    last = tl.minimum(s + BLOCK_S, S) - 1 - (S - T)
    begin = tl.maximum(first, 0)
    end = T
    full_begin = tl.maximum(last, 0)
    full_end = T
    if HAS_WINDOW:
        end = tl.maximum(tl.minimum(end, last + window), begin)  # below 0 for keys that no query reaches
        full_end = tl.minimum(full_end, first + window)
    if HAS_DOCUMENTS and SCAN == 0:
        full_end = full_begin
    elif HAS_DOCUMENTS:
        low, high = tl.min(ids, 0), tl.max(ids, 0)
        near, behind, alien, _ = _scan_documents(q_ids, low, high, begin, end, full_begin, end, SCAN)
        begin, end = near, behind
        full_end = tl.minimum(full_end, tl.where(low == high, alien, 0))
    begin = begin // BLOCK_T * BLOCK_T
    end = tl.maximum(end, begin)
    full_begin = tl.minimum(tl.cdiv(full_begin, BLOCK_T) * BLOCK_T, tl.cdiv(end, BLOCK_T) * BLOCK_T)
    # Queries from T on weigh nothing, so the last block counts as whole when it ends at T.
    full_end = tl.where(full_end >= T, tl.cdiv(T, BLOCK_T), full_end // BLOCK_T) * BLOCK_T
    full_end = tl.maximum(full_end, full_begin)
    return begin, full_begin, full_end, end


# ---------------------------------------------------------------------------------------------------- Triton: forward


@triton.jit(do_not_specialize=LENGTHS)
def attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, q_ids_ptr, k_ids_ptr, y_ptr, lse_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, q_ids_b, k_ids_b, y_b, y_h, y_t,
    heads, H, G, T, S, window, scale,
    E: tl.constexpr, WIDTH: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, SECTION: tl.constexpr, SCAN: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """y and lse of BLOCK_T queries of one head: the online softmax, eq. 1 and 2."""
    padded = tl.cdiv(T, PAD) * PAD
    blocks = padded // BLOCK_T
    head, turn = _locate(heads, blocks, SECTION * G)
    t = (blocks - 1 - turn) * BLOCK_T  # the last queries see the most keys: they go first
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    k_base = k_ptr + b * k_b + h // G * k_h
    v_base = v_ptr + b * v_b + h // G * v_h
    row = t + tl.arange(0, BLOCK_T)
    ids, k_ids = row, k_ids_ptr
    if HAS_DOCUMENTS:
        ids = _load_ids(q_ids_ptr + b * q_ids_b, t, T, BLOCK_T)
        k_ids += b * k_ids_b
    begin, full_begin, full_end, end = _key_range(
        t, T, S, window, ids, k_ids, BLOCK_T, BLOCK_S, SCAN, HAS_WINDOW, HAS_DOCUMENTS
    )
    q = _load_tile(_tile(q_ptr + b * q_b + h * q_h, q_t, t, BLOCK_T, WIDTH), t, T, BLOCK_T, E, WIDTH)

    peak = tl.full([BLOCK_T], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    y = tl.zeros([BLOCK_T, WIDTH], tl.float32)
    if begin < end:  # always; see "The loops" above
        k_tile = _tile(k_base, k_t, begin, BLOCK_S, WIDTH)
        v_tile = _tile(v_base, v_t, begin, BLOCK_S, WIDTH)
        for start in tl.range(begin, end, BLOCK_S):
            k = _load_tile(k_tile, start, S, BLOCK_S, E, WIDTH)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            if (start < full_begin) | (start >= full_end):
                j = start + tl.arange(0, BLOCK_S)
                key_ids = j
                if HAS_DOCUMENTS:
                    key_ids = _load_ids(k_ids, start, S, BLOCK_S)
                i = row + S - T
                seen = _sees(i[:, None], j[None, :], ids[:, None], key_ids[None, :], window, HAS_WINDOW, HAS_DOCUMENTS)
                scores = tl.where(seen, scores, float("-inf"))
            higher = tl.maximum(peak, tl.max(scores, 1))
            # A row that has seen nothing yet: exp2(-inf - -inf) would be nan, exp2(-inf - 0) is 0.
            pivot = tl.where(higher == float("-inf"), 0.0, higher)
            p = tl.exp2(scores * scale - (pivot * scale)[:, None])
            shrink = tl.exp2((peak - pivot) * scale)
            total = total * shrink + tl.sum(p, 1)
            y = y * shrink[:, None]
            v = _load_tile(v_tile, start, S, BLOCK_S, E, WIDTH)
            y = tl.dot(p.to(v.dtype), v, y, input_precision="ieee")
            peak = higher
            k_tile += BLOCK_S * k_t
            v_tile += BLOCK_S * v_t

    seen_any = total > 0  # a row without any visible key, which `visible` rules out, becomes zero and not nan
    y = y * tl.where(seen_any, 1 / total, 0.0)[:, None]
    lse = tl.where(seen_any & (row < T), peak * scale + tl.log2(total), float("inf"))
    _store_tile(_tile(y_ptr + b * y_b + h * y_h, y_t, t, BLOCK_T, WIDTH), t, T, y, BLOCK_T, E, WIDTH)
    tl.store(lse_ptr + tl.cast(head, tl.int64) * padded + row, lse)


# ---------------------------------------------------------------------------------------------------- Triton: backward


@triton.jit(do_not_specialize=LENGTHS)
def attention_backward_queries_kernel(
    q_ptr, k_ptr, v_ptr, q_ids_ptr, k_ids_ptr, y_ptr, lse_ptr, dy_ptr, dq_ptr, delta_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, q_ids_b, k_ids_b, y_b, y_h, y_t, dy_b, dy_h, dy_t, dq_b, dq_h, dq_t,
    heads, H, G, T, S, window, scale,
    E: tl.constexpr, WIDTH: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, SECTION: tl.constexpr, SCAN: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """dq and delta of BLOCK_T queries of one head: eq. 3, 5, 6 and 7."""
    padded = tl.cdiv(T, PAD) * PAD
    blocks = padded // BLOCK_T
    head, turn = _locate(heads, blocks, SECTION * G)
    t = (blocks - 1 - turn) * BLOCK_T
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    k_base = k_ptr + b * k_b + h // G * k_h
    v_base = v_ptr + b * v_b + h // G * v_h
    row = t + tl.arange(0, BLOCK_T)
    ids, k_ids = row, k_ids_ptr
    if HAS_DOCUMENTS:
        ids = _load_ids(q_ids_ptr + b * q_ids_b, t, T, BLOCK_T)
        k_ids += b * k_ids_b
    begin, full_begin, full_end, end = _key_range(
        t, T, S, window, ids, k_ids, BLOCK_T, BLOCK_S, SCAN, HAS_WINDOW, HAS_DOCUMENTS
    )
    dy = _load_tile(_tile(dy_ptr + b * dy_b + h * dy_h, dy_t, t, BLOCK_T, WIDTH), t, T, BLOCK_T, E, WIDTH)
    y = _load_tile(_tile(y_ptr + b * y_b + h * y_h, y_t, t, BLOCK_T, WIDTH), t, T, BLOCK_T, E, WIDTH)
    delta = tl.sum(dy.to(tl.float32) * y.to(tl.float32), 1)  # the kernel below reads it again
    tl.store(delta_ptr + tl.cast(head, tl.int64) * padded + row, delta)
    lse = tl.load(lse_ptr + tl.cast(head, tl.int64) * padded + row)
    q = _load_tile(_tile(q_ptr + b * q_b + h * q_h, q_t, t, BLOCK_T, WIDTH), t, T, BLOCK_T, E, WIDTH)

    dq = tl.zeros([BLOCK_T, WIDTH], tl.float32)
    if begin < end:
        k_tile = _tile(k_base, k_t, begin, BLOCK_S, WIDTH)
        v_tile = _tile(v_base, v_t, begin, BLOCK_S, WIDTH)
        for start in tl.range(begin, end, BLOCK_S):
            k = _load_tile(k_tile, start, S, BLOCK_S, E, WIDTH)
            v = _load_tile(v_tile, start, S, BLOCK_S, E, WIDTH)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            if (start < full_begin) | (start >= full_end):
                j = start + tl.arange(0, BLOCK_S)
                key_ids = j
                if HAS_DOCUMENTS:
                    key_ids = _load_ids(k_ids, start, S, BLOCK_S)
                i = row + S - T
                seen = _sees(i[:, None], j[None, :], ids[:, None], key_ids[None, :], window, HAS_WINDOW, HAS_DOCUMENTS)
                scores = tl.where(seen, scores, float("-inf"))
            dp = tl.dot(dy, tl.trans(v), input_precision="ieee")
            p = tl.exp2(scores * scale - lse[:, None])
            ds = p * (dp - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
            k_tile += BLOCK_S * k_t
            v_tile += BLOCK_S * v_t
    dq = dq * (scale * 0.6931471805599453)  # scale * ln(2) = 1 / sqrt(E)
    _store_tile(_tile(dq_ptr + b * dq_b + h * dq_h, dq_t, t, BLOCK_T, WIDTH), t, T, dq, BLOCK_T, E, WIDTH)


@triton.jit(do_not_specialize=LENGTHS)
def attention_backward_keys_kernel(
    q_ptr, k_ptr, v_ptr, q_ids_ptr, k_ids_ptr, lse_ptr, dy_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, q_ids_b, k_ids_b, dy_b, dy_h, dy_t, dk_b, dk_h, dk_t, dv_b, dv_h, dv_t,
    heads, H, G, T, S, window, scale,
    E: tl.constexpr, WIDTH: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, SECTION: tl.constexpr, SCAN: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_S keys of one key head, summed over its G query heads in one fixed order: eq. 3 to 7."""
    padded = tl.cdiv(T, PAD) * PAD
    kv_head, turn = _locate(heads // G, tl.cdiv(S, BLOCK_S), SECTION)
    s = turn * BLOCK_S  # the first keys are seen by the most queries: they go first
    b, kv = (kv_head // (H // G)).to(tl.int64), (kv_head % (H // G)).to(tl.int64)
    j = s + tl.arange(0, BLOCK_S)
    ids, q_ids = j, q_ids_ptr
    if HAS_DOCUMENTS:
        ids = _load_ids(k_ids_ptr + b * k_ids_b, s, S, BLOCK_S)
        q_ids += b * q_ids_b
    begin, full_begin, full_end, end = _query_range(
        s, T, S, window, ids, q_ids, BLOCK_T, BLOCK_S, SCAN, HAS_WINDOW, HAS_DOCUMENTS
    )
    k = _load_tile(_tile(k_ptr + b * k_b + kv * k_h, k_t, s, BLOCK_S, WIDTH), s, S, BLOCK_S, E, WIDTH)
    v = _load_tile(_tile(v_ptr + b * v_b + kv * v_h, v_t, s, BLOCK_S, WIDTH), s, S, BLOCK_S, E, WIDTH)

    dk = tl.zeros([BLOCK_S, WIDTH], tl.float32)
    dv = tl.zeros([BLOCK_S, WIDTH], tl.float32)
    if begin < end:
        for g in tl.range(0, G, num_stages=1):
            h = kv * G + g
            q_base = q_ptr + b * q_b + h * q_h
            dy_base = dy_ptr + b * dy_b + h * dy_h
            lse_base = lse_ptr + (b * H + h) * padded
            delta_base = delta_ptr + (b * H + h) * padded
            q_tile = _tile(q_base, q_t, begin, BLOCK_T, WIDTH)
            dy_tile = _tile(dy_base, dy_t, begin, BLOCK_T, WIDTH)
            for start in tl.range(begin, end, BLOCK_T):
                q = _load_tile(q_tile, start, T, BLOCK_T, E, WIDTH)
                dy = _load_tile(dy_tile, start, T, BLOCK_T, E, WIDTH)
                scores = tl.dot(k, tl.trans(q), input_precision="ieee")
                if (start < full_begin) | (start >= full_end):
                    i = start + tl.arange(0, BLOCK_T) + S - T
                    query_ids = i
                    if HAS_DOCUMENTS:
                        query_ids = _load_ids(q_ids, start, T, BLOCK_T)
                    seen = _sees(
                        i[None, :], j[:, None], query_ids[None, :], ids[:, None], window, HAS_WINDOW, HAS_DOCUMENTS
                    )
                    scores = tl.where(seen, scores, float("-inf"))
                dp = tl.dot(v, tl.trans(dy), input_precision="ieee")
                # Queries beyond the last one weigh nothing, without a mask: their lse is inf, and exp2(0 - inf) = 0.
                lse = tl.load(lse_base + start + tl.arange(0, BLOCK_T))
                p = tl.exp2(scores * scale - lse[None, :])
                dv = tl.dot(p.to(dy.dtype), dy, dv, input_precision="ieee")
                delta = tl.load(delta_base + start + tl.arange(0, BLOCK_T))
                ds = p * (dp - delta[None, :])
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
                q_tile += BLOCK_T * q_t
                dy_tile += BLOCK_T * dy_t
    dk = dk * (scale * 0.6931471805599453)
    _store_tile(_tile(dk_ptr + b * dk_b + kv * dk_h, dk_t, s, BLOCK_S, WIDTH), s, S, dk, BLOCK_S, E, WIDTH)
    _store_tile(_tile(dv_ptr + b * dv_b + kv * dv_h, dv_t, s, BLOCK_S, WIDTH), s, S, dv, BLOCK_S, E, WIDTH)


# ---------------------------------------------------------------------------------------------------- launching

PAD = 128  # rows of lse and delta are padded to a multiple of it; every BLOCK_T divides it
MAX_HEAD_DIM = 256
KERNELS = {
    "forward": attention_forward_kernel,
    "queries": attention_backward_queries_kernel,
    "keys": attention_backward_keys_kernel,
}
# Heads whose programs run side by side: key heads, for a kernel that owns queries with the query heads they serve.
SECTIONS = {"forward": 8, "queries": 8, "keys": 16}


def _tiles(block_t: int, block_s: int, num_warps: int, num_stages: int, scan: int = 1024) -> Config:
    """scan: ids that are looked at in one step to find the blocks to visit; 0 saves registers, and visits all."""
    return Config({"BLOCK_T": block_t, "BLOCK_S": block_s, "SCAN": scan}, num_warps, num_stages)


# architecture -> kernel -> width of a row, which is head_dim padded to a power of two -> configuration.
CONFIGS = {
    "sm_80": {  # and its smaller relatives, which have 99 KB of shared memory
        "forward": {64: _tiles(128, 64, 4, 3), 128: _tiles(128, 64, 8, 2), 256: _tiles(64, 32, 4, 2)},
        "queries": {64: _tiles(64, 64, 4, 2), 128: _tiles(64, 64, 8, 2), 256: _tiles(64, 16, 8, 2)},
        "keys": {64: _tiles(32, 128, 8, 2), 128: _tiles(64, 64, 8, 2), 256: _tiles(16, 64, 8, 2)},
    },
    "sm_90": {
        "forward": {64: _tiles(128, 64, 4, 3), 128: _tiles(128, 128, 8, 2), 256: _tiles(128, 64, 8, 2)},
        "queries": {64: _tiles(64, 64, 4, 3), 128: _tiles(128, 64, 8, 3), 256: _tiles(64, 64, 8, 2)},
        "keys": {64: _tiles(64, 64, 4, 3), 128: _tiles(64, 128, 8, 2), 256: _tiles(16, 64, 8, 2, scan=0)},
    },
    "sm_100": {
        "forward": {64: _tiles(128, 64, 4, 3), 128: _tiles(128, 64, 8, 3), 256: _tiles(128, 32, 8, 2)},
        "queries": {64: _tiles(128, 64, 8, 3), 128: _tiles(128, 64, 4, 2), 256: _tiles(64, 32, 8, 2)},
        "keys": {64: _tiles(64, 64, 8, 2), 128: _tiles(16, 64, 8, 2), 256: _tiles(32, 32, 8, 2)},
    },
    "gfx942": {
        "forward": {64: _tiles(128, 64, 4, 2), 128: _tiles(128, 32, 4, 2), 256: _tiles(64, 32, 4, 2)},
        "queries": {64: _tiles(64, 64, 4, 2), 128: _tiles(64, 32, 4, 2), 256: _tiles(64, 16, 4, 2)},
        "keys": {64: _tiles(64, 64, 4, 2), 128: _tiles(32, 64, 4, 2), 256: _tiles(16, 64, 4, 2)},
    },
}
# Products of fp32 tensors are exact and run outside the tensor cores: for tests and small models, in small tiles. The
# second stage of the pipeline is there for its shared memory: without, whole rows would wait in registers, and spill.
_FP32 = {
    "forward": {64: _tiles(32, 32, 4, 2), 128: _tiles(32, 16, 4, 2), 256: _tiles(32, 16, 8, 2)},
    "queries": {64: _tiles(32, 32, 8, 2), 128: _tiles(16, 32, 8, 2), 256: _tiles(16, 16, 4, 2)},
    "keys": {64: _tiles(32, 32, 4, 1), 128: _tiles(16, 32, 4, 1), 256: _tiles(16, 16, 8, 1)},
}
FP32 = dict.fromkeys(ARCHITECTURES, _FP32)
FP32["sm_100"] = _FP32 | {"forward": _FP32["forward"] | {32: _tiles(32, 32, 8, 2)}}  # with 4 warps it spills
FP32["gfx942"] = _FP32 | {"keys": _FP32["keys"] | {256: _tiles(16, 16, 4, 1)}}  # 4 warps have 512 registers each


def _of_width(configs: dict[int, Config], width: int) -> Config:
    """The tiles of 64 serve narrower heads too, unless those have their own."""
    return configs.get(width) or configs[max(width, 64)]


def _config(kernel: str, q: Tensor, width: int) -> Config:
    table = (FP32 if q.dtype == torch.float32 else CONFIGS)[architecture(q.device)]
    return _of_width(table[kernel], width)


def _aligned(x: Tensor) -> Tensor:
    """x, or a copy of it where a row of it does not lie together or does not start at a multiple of 16 bytes."""
    starts = [x.data_ptr(), *(x.stride(at) * x.element_size() for at in range(3) if x.shape[at] > 1)]
    whole = x.stride(3) == 1 and all(start % 16 == 0 for start in starts)
    return x if whole else x.clone(memory_format=torch.contiguous_format)


def _launch(kernel: str, tensors: dict[str, Tensor | None], window: int | None, scale: float) -> None:
    """Run one kernel. tensors: its pointer arguments by name, without `_ptr`; those with heads bring their strides."""
    q, k = tensors["q"], tensors["k"]
    if reason := why_not(q):
        raise ValueError(f"attention: {reason}")
    (B, H, T, E), (_, K, S, _) = q.shape, k.shape
    width = max(16, triton.next_power_of_2(E))
    config = _config(kernel, q, width)
    programs = B * K * triton.cdiv(S, config.constants["BLOCK_S"])
    if kernel != "keys":
        programs = B * H * (triton.cdiv(T, PAD) * PAD // config.constants["BLOCK_T"])
    if programs == 0:
        return
    tiles = {name: t for name, t in tensors.items() if name in ("q", "k", "v", "y", "dy", "dq", "dk", "dv")}
    strides = {f"{name}_{axis}": t.stride(at) for name, t in tiles.items() for at, axis in enumerate("bht")}
    documents = tensors["q_ids"] is not None
    for name in ("q_ids", "k_ids"):
        strides[f"{name}_b"] = tensors[name].stride(0) if documents else 0
    with torch.cuda.device_of(q):
        KERNELS[kernel][(programs,)](
            **{f"{name}_ptr": t for name, t in tensors.items()},
            **strides,
            **{"heads": B * H, "H": H, "G": H // K, "T": T, "S": S, "window": window or 0},
            **{"scale": scale * math.log2(math.e), "E": E, "WIDTH": width, "PAD": PAD, "SECTION": SECTIONS[kernel]},
            **{"HAS_WINDOW": window is not None and window < S, "HAS_DOCUMENTS": documents},
            **config.constants,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )


# ---------------------------------------------------------------------------------------------------- operators


@torch.library.custom_op("solar::attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    document_ids: Tensor | None,
    key_document_ids: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    y, lse = _outputs(q)
    read = {"q": _aligned(q), "k": _aligned(k), "v": _aligned(v), "q_ids": document_ids, "k_ids": key_document_ids}
    _launch("forward", {**read, "y": y, "lse": lse}, window, scale)
    return y, lse


@_attention.register_fake
def _(q, k, v, window, document_ids, key_document_ids, scale):
    return _outputs(q)


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    """y, laid out so that joining the heads again is a view, and lse in padded rows."""
    B, H, T, E = q.shape
    y = q.new_empty((B, T, H, E)).transpose(1, 2)
    return y, q.new_empty((B, H, (T + PAD - 1) // PAD * PAD), dtype=torch.float32)


@torch.library.custom_op("solar::attention_backward", mutates_args=())
def _attention_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    window: int | None,
    document_ids: Tensor | None,
    key_document_ids: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    delta = torch.empty_like(lse)
    read = {"q": _aligned(q), "k": _aligned(k), "v": _aligned(v), "q_ids": document_ids, "k_ids": key_document_ids}
    read |= {"lse": lse, "dy": _aligned(dy)}
    _launch("queries", {**read, "y": y, "dq": dq, "delta": delta}, window, scale)
    _launch("keys", {**read, "delta": delta, "dk": dk, "dv": dv}, window, scale)
    return dq, dk, dv


@_attention_backward.register_fake
def _(dy, q, k, v, y, lse, window, document_ids, key_document_ids, scale):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx, inputs, output) -> None:
    q, k, v, ctx.window, document_ids, key_document_ids, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, document_ids, key_document_ids)


def _differentiate(ctx, dy: Tensor, _):
    q, k, v, y, lse, *ids = ctx.saved_tensors
    return *_attention_backward(dy, q, k, v, y, lse, ctx.window, *ids, ctx.scale), None, None, None, None


_attention.register_autograd(_differentiate, setup_context=_save)


def attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None = None,
    document_ids: Tensor | None = None,
    key_document_ids: Tensor | None = None,
) -> Tensor:
    """The kernels above, for head_dim to 256 and any strides but in E. Document ids are compared as 32 bits."""
    check_attention(q, k, v, window, document_ids, key_document_ids)
    check_tensors("attention", q=q, k=k, v=v)
    if q.shape[3] > MAX_HEAD_DIM:
        raise ValueError(f"attention: head_dim {q.shape[3]}; the kernels take at most {MAX_HEAD_DIM}")
    if document_ids is not None:
        # Rows that lie apart, or one id expanded over a row: a few bytes a token to put right.
        document_ids, key_document_ids = (
            ids if ids.stride(-1) == 1 else ids.contiguous() for ids in (document_ids, key_document_ids)
        )
    E = q.shape[3]
    if missing := -E % (16 // q.dtype.itemsize):  # columns of zeros change no score, and rows are multiples of 16 bytes
        q, k, v = (F.pad(t, (0, missing)) for t in (q, k, v))
    y, _ = _attention(q, k, v, window, document_ids, key_document_ids, E**-0.5)
    return y[..., :E] if missing else y


# ---------------------------------------------------------------------------------------------------- compilation


def compile_cases() -> list[CompileCase]:
    """Every configuration with window and documents, which take the most registers; head_dim 128 also without, and 32
    in the tiles of 64."""
    cases = []
    for arch in ARCHITECTURES:
        for kernel, configs in CONFIGS[arch].items():
            cases.append(_compile_case(arch, kernel, 128, configs[128], masks=False))
            for E in (32, *configs):
                cases.append(_compile_case(arch, kernel, E, _of_width(configs, E)))
                cases.append(_compile_case(arch, kernel, E, _of_width(FP32[arch][kernel], E)).in_fp32())
    return cases


def _compile_case(arch: str, kernel: str, E: int, config: Config, masks: bool = True) -> CompileCase:
    function = KERNELS[kernel]
    constants = {"E": E, "WIDTH": E, "HAS_WINDOW": masks, "HAS_DOCUMENTS": masks}
    constants |= {"SECTION": SECTIONS[kernel], "PAD": PAD}
    if not masks:
        constants |= {"q_ids_ptr": None, "k_ids_ptr": None}
    types = {"q_ids_ptr": "*i64", "k_ids_ptr": "*i64", "lse_ptr": "*fp32", "delta_ptr": "*fp32", "scale": "fp32"}
    names = [name for name in function.arg_names if name not in constants and name not in config.constants]
    signature = {name: types.get(name, "*bf16" if name.endswith("_ptr") else "i32") for name in names}
    told = f"{function.__name__.removesuffix('_kernel')} E{E}" + " masks" * masks
    pointers = tuple(name for name in names if name.endswith("_ptr"))
    return CompileCase(function, told, arch, signature, config, constants, pointers)
