"""The Triton kernels of flash attention: what kernels/attention.py derives (equations 1 to 7), forward and backward.

Exponentials are powers of two, which is what the hardware has: with scale = log2(e) / sqrt(E), exp(s - lse) becomes
exp2(scale * (q . k) - lse'), one fused multiply-add and one exp2, and lse' is stored in those units. What limits the
speed is the tensor cores for long sequences: 4 B H T S E floating-point operations forward, half of them hidden by the
mask and never done, against (2 B H T E + 2 B K S E) elements moved. Close behind come the exponentials, 16 a cycle on a
multiprocessor that multiplies 2048 pairs in that cycle.

The loops. Blocks in which every query sees every key need no mask; only those on the diagonal, at the window's edge and
at the border of a document do. One loop runs over both kinds and branches, for with a loop for each the compiler would
drain and refill the pipeline of loads between them, and keep the accumulators twice. Blocks that no query of the
program sees are never loaded: positions and window bound the loop, and with documents a small kernel runs before each
large one, looks at the ids once for all heads, and leaves two numbers for each block.

Three things cost a factor on Hopper, show only in the machine code, and are why some lines below look as they do:
- The test `begin < end` around each loop. A loop that may run no times leaves accumulators that plain instructions
  define on one path and running wgmmas on the other; ptxas then makes every wgmma wait for the one before (C7515).
- Pointers are declared aligned, for lengths and strides say nothing of it: loads would become single elements that
  cannot be prefetched.
- The kernel that owns keys holds two accumulators and uses all registers that there are, and the forward one nearly. So
  they mask before the second product, load lse, delta and ids only where they are needed, and keep few numbers through
  the loop: a third or fourth number of a range in registers, not known from the position, makes them spill.
"""

import itertools
import math

import torch
from torch import Tensor

from kernels.launch import ARCHITECTURES, CompileCase, Config, architecture, has_aligned_rows, tl, triton, why_not

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
    if WIDTH != E:  # a limit to each column costs one register; an `&` of two masks, more of them
        limit = tl.where(tl.arange(0, WIDTH) < E, limit, 0)[None, :]
    inside = (first + tl.arange(0, ROWS))[:, None] < limit
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
def _hide(
    scores, t, s, T, S, window, q_ids, k_ids,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    """The scores of the queries from t and the keys from s on, -inf where not `visible`; KEYS_FIRST: the transpose.

    The order and form of these few lines decide whether the larger tiles spill.
    """
    i = t + tl.arange(0, BLOCK_T) + S - T
    j = s + tl.arange(0, BLOCK_S)
    i = i[None, :] if KEYS_FIRST else i[:, None]
    j = j[:, None] if KEYS_FIRST else j[None, :]
    mask = j <= i
    if HAS_WINDOW:
        mask = (i - j).to(tl.uint32) < window.to(tl.uint32)  # both in one: unsigned, a negative distance is large
    scores = tl.where(mask, scores, float("-inf"))
    if HAS_DOCUMENTS:  # the ids are loaded here, not before the loop, where they would hold registers all along
        ids = _load_ids(q_ids, t, T, BLOCK_T)
        key_ids = _load_ids(k_ids, s, S, BLOCK_S)
        ids = ids[None, :] if KEYS_FIRST else ids[:, None]
        key_ids = key_ids[:, None] if KEYS_FIRST else key_ids[None, :]
        scores = tl.where(ids == key_ids, scores, float("-inf"))
    return scores


# ---------------------------------------------------------------------------------------------------- Triton: ranges
#
# A program owns a block of queries or of keys and visits blocks of the other axis. Which, four numbers say:
#
#     begin <= start < end              blocks to visit: no pair with a position outside [begin, end) is visible
#     full_begin <= start < full_end    blocks that need no mask: all of their pairs are visible
#
# begin, full_begin and full_end are multiples of the visited axis's block; begin <= end; and where no block is full,
# full_begin >= full_end. Query i sees key j when i - window < j <= i, so by position alone
#
#     queries first .. last  see  some: first - window < j <= last     all: last - window < j <= first           (8)
#     keys first .. last are seen by  some: first <= i < last + window     all: last <= i < first + window       (9)
#
# Without a window, `window` is so large that it hides nothing.


@triton.jit
def _whole(begin, full_begin, full_end, BLOCK: tl.constexpr):
    """What to visit rounded to blocks outwards, what is full inwards."""
    return begin // BLOCK * BLOCK, tl.cdiv(full_begin, BLOCK) * BLOCK, full_end // BLOCK * BLOCK


@triton.jit
def _key_range(t, T, S, window, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr):
    """begin, full_begin, full_end and end of the keys for the queries t .. t + BLOCK_T - 1: eq. 8.

    Queries from T on, whose results go nowhere, count as the last one again.
    """
    first = tl.minimum(t, T - 1) + S - T  # on the axis of the keys
    last = tl.minimum(t + BLOCK_T, T) - 1 + S - T
    begin, full_begin, full_end = _whole(
        tl.maximum(first - window + 1, 0), tl.maximum(last - window + 1, 0), first + 1, BLOCK_S
    )
    return begin, full_begin, full_end, last + 1


@triton.jit
def _query_range(s, T, S, window, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr):
    """begin, full_begin, full_end and end of the queries for the keys s .. s + BLOCK_S - 1: eq. 9.

    For what is full, the axis of the queries goes on to the end of its last block: queries from T on weigh nothing,
    since their lse is inf, and need no mask.
    """
    first = s - (S - T)  # on the axis of the queries; negative for a key before the first query
    last = tl.minimum(s + BLOCK_S, S) - 1 - (S - T)
    limit = tl.cdiv(T, BLOCK_T) * BLOCK_T
    begin, full_begin, full_end = _whole(
        tl.maximum(first, 0), tl.maximum(last, 0), tl.minimum(first + window, limit), BLOCK_T
    )
    end = tl.maximum(tl.minimum(last + window, T), begin)  # keys so old that no query reaches them: nothing
    return begin, full_begin, full_end, end


@triton.jit
def _load_pair(pointer, index):
    return tl.load(pointer + 2 * index), tl.load(pointer + 2 * index + 1)


@triton.jit(do_not_specialize=["q_ids_b", "k_ids_b", "T", "S", "window"])
def document_ranges_kernel(
    q_ids_ptr, k_ids_ptr, ranges_ptr, q_ids_b, k_ids_b, T, S, window,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, SCAN: tl.constexpr, OWNS_KEYS: tl.constexpr,
):  # fmt: skip
    """What the documents leave of the range of one block of queries, or OWNS_KEYS of keys: its far end, two numbers.

    A block meets itself at the near end of its range, so only the far end moves: begin and full_begin of a block of
    queries, whose document lies before it, full_end and end of a block of keys. Right for ids in any order, tight when
    documents lie one after the other.

    All positions that the causal mask and the window allow are looked at, SCAN at a time and once for all heads. That
    is quadratic in the positions, with a small factor: 131,072 of them take, for blocks of 128, 65,536 looks of 8 KB.
    """
    block = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    q_ids = q_ids_ptr + b * q_ids_b
    k_ids = k_ids_ptr + b * k_ids_b
    if OWNS_KEYS:
        begin, full_begin, full_end, end = _query_range(block * BLOCK_S, T, S, window, BLOCK_T, BLOCK_S)
        own = _load_ids(k_ids, block * BLOCK_S, S, BLOCK_S)
    else:
        begin, full_begin, full_end, end = _key_range(block * BLOCK_T, T, S, window, BLOCK_T, BLOCK_S)
        own = _load_ids(q_ids, block * BLOCK_T, T, BLOCK_T)
    low, high = tl.min(own, 0), tl.max(own, 0)
    # The positions farthest from the block that may be visible, and nearest to it that may not; of each lane its own.
    far = tl.zeros([SCAN], tl.int32) + (begin if OWNS_KEYS else end)
    full_far = tl.zeros([SCAN], tl.int32) + (full_end if OWNS_KEYS else full_begin)
    for start in tl.range(begin, end, SCAN):
        at = start + tl.arange(0, SCAN)
        ids = _load_ids(q_ids, start, T, SCAN) if OWNS_KEYS else _load_ids(k_ids, start, S, SCAN)
        near = (at < end) & (ids >= low) & (ids <= high)  # an id outside low .. high equals none of the block
        alien = (at >= full_begin) & (at < full_end) & ((ids != low) | (low != high))
        if OWNS_KEYS:
            far = tl.maximum(far, tl.where(near, at + 1, begin))
            full_far = tl.minimum(full_far, tl.where(alien, at, full_end))
        else:
            far = tl.minimum(far, tl.where(near, at, end))
            full_far = tl.maximum(full_far, tl.where(alien, at + 1, full_begin))
    ranges_ptr += 2 * (b * tl.num_programs(0) + block)
    if OWNS_KEYS:
        _, _, full_end = _whole(begin, full_begin, tl.min(full_far, 0), BLOCK_T)
        tl.store(ranges_ptr, full_end)
        tl.store(ranges_ptr + 1, tl.max(far, 0))
    else:
        begin, full_begin, _ = _whole(tl.min(far, 0), tl.max(full_far, 0), full_end, BLOCK_S)
        tl.store(ranges_ptr, begin)
        tl.store(ranges_ptr + 1, full_begin)


# ---------------------------------------------------------------------------------------------------- Triton: forward


@triton.jit(do_not_specialize=LENGTHS)
def attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, q_ids_ptr, k_ids_ptr, ranges_ptr, y_ptr, lse_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, q_ids_b, k_ids_b, y_b, y_h, y_t,
    heads, H, G, T, S, window, scale,
    E: tl.constexpr, WIDTH: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, SECTION: tl.constexpr, PAD: tl.constexpr,
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
    begin, full_begin, full_end, end = _key_range(t, T, S, window, BLOCK_T, BLOCK_S)
    q_ids, k_ids = q_ids_ptr, k_ids_ptr
    if HAS_DOCUMENTS:
        begin, full_begin = _load_pair(ranges_ptr, b * blocks + t // BLOCK_T)
        q_ids += b * q_ids_b
        k_ids += b * k_ids_b
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
                scores = _hide(
                    scores,
                    t,
                    start,
                    T,
                    S,
                    window,
                    q_ids,
                    k_ids,
                    BLOCK_T,
                    BLOCK_S,
                    HAS_WINDOW,
                    HAS_DOCUMENTS,
                    KEYS_FIRST=False,
                )
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
    q_ptr, k_ptr, v_ptr, q_ids_ptr, k_ids_ptr, ranges_ptr, y_ptr, lse_ptr, dy_ptr, dq_ptr, delta_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, q_ids_b, k_ids_b, y_b, y_h, y_t, dy_b, dy_h, dy_t, dq_b, dq_h, dq_t,
    heads, H, G, T, S, window, scale,
    E: tl.constexpr, WIDTH: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, SECTION: tl.constexpr, PAD: tl.constexpr,
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
    begin, full_begin, full_end, end = _key_range(t, T, S, window, BLOCK_T, BLOCK_S)
    q_ids, k_ids = q_ids_ptr, k_ids_ptr
    if HAS_DOCUMENTS:
        begin, full_begin = _load_pair(ranges_ptr, b * blocks + t // BLOCK_T)
        q_ids += b * q_ids_b
        k_ids += b * k_ids_b
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
                scores = _hide(
                    scores,
                    t,
                    start,
                    T,
                    S,
                    window,
                    q_ids,
                    k_ids,
                    BLOCK_T,
                    BLOCK_S,
                    HAS_WINDOW,
                    HAS_DOCUMENTS,
                    KEYS_FIRST=False,
                )
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
    q_ptr, k_ptr, v_ptr, q_ids_ptr, k_ids_ptr, ranges_ptr, lse_ptr, dy_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, q_ids_b, k_ids_b, dy_b, dy_h, dy_t, dk_b, dk_h, dk_t, dv_b, dv_h, dv_t,
    heads, H, G, T, S, window, scale,
    E: tl.constexpr, WIDTH: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, SECTION: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_S keys of one key head, summed over its G query heads in one fixed order: eq. 3 to 7."""
    padded = tl.cdiv(T, PAD) * PAD
    kv_head, turn = _locate(heads // G, tl.cdiv(S, BLOCK_S), SECTION)
    s = turn * BLOCK_S  # the first keys are seen by the most queries: they go first
    b, kv = (kv_head // (H // G)).to(tl.int64), (kv_head % (H // G)).to(tl.int64)
    begin, full_begin, full_end, end = _query_range(s, T, S, window, BLOCK_T, BLOCK_S)
    q_ids, k_ids = q_ids_ptr, k_ids_ptr
    if HAS_DOCUMENTS:
        full_end, end = _load_pair(ranges_ptr, b * tl.cdiv(S, BLOCK_S) + turn)
        q_ids += b * q_ids_b
        k_ids += b * k_ids_b
    k = _load_tile(_tile(k_ptr + b * k_b + kv * k_h, k_t, s, BLOCK_S, WIDTH), s, S, BLOCK_S, E, WIDTH)
    v = _load_tile(_tile(v_ptr + b * v_b + kv * v_h, v_t, s, BLOCK_S, WIDTH), s, S, BLOCK_S, E, WIDTH)

    dk = tl.zeros([BLOCK_S, WIDTH], tl.float32)
    dv = tl.zeros([BLOCK_S, WIDTH], tl.float32)
    if begin < end:
        for g in tl.range(0, G, num_stages=1):
            h = kv * G + g
            q_base = q_ptr + b * q_b + h * q_h
            dy_base = dy_ptr + b * dy_b + h * dy_h
            head = (
                tl.cast(kv_head, tl.int64) * G + g
            )  # not b * H + h: one value less to keep through the loop, or a spill
            lse_base = lse_ptr + head * padded
            delta_base = delta_ptr + head * padded
            q_tile = _tile(q_base, q_t, begin, BLOCK_T, WIDTH)
            dy_tile = _tile(dy_base, dy_t, begin, BLOCK_T, WIDTH)
            for start in tl.range(begin, end, BLOCK_T):
                q = _load_tile(q_tile, start, T, BLOCK_T, E, WIDTH)
                dy = _load_tile(dy_tile, start, T, BLOCK_T, E, WIDTH)
                scores = tl.dot(k, tl.trans(q), input_precision="ieee")
                if (start < full_begin) | (start >= full_end):
                    scores = _hide(
                        scores, start, s, T, S, window, q_ids, k_ids,
                        BLOCK_T, BLOCK_S, HAS_WINDOW, HAS_DOCUMENTS, KEYS_FIRST=True,
                    )  # fmt: skip
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
SCAN = 1024  # document ids that are looked at in one step
KERNELS = {
    "forward": attention_forward_kernel,
    "queries": attention_backward_queries_kernel,
    "keys": attention_backward_keys_kernel,
}
# Heads whose programs run side by side: key heads, for a kernel that owns queries with the query heads they serve.
SECTIONS = {"forward": 8, "queries": 8, "keys": 16}


def _tiles(block_t: int, block_s: int, num_warps: int, num_stages: int) -> Config:
    return Config({"BLOCK_T": block_t, "BLOCK_S": block_s}, num_warps, num_stages)


# architecture -> kernel -> width of a row, which is head_dim padded to a power of two -> configuration.
CONFIGS = {
    "sm_80": {  # and its smaller relatives, which have 99 KB of shared memory
        "forward": {64: _tiles(128, 64, 4, 3), 128: _tiles(128, 64, 8, 2), 256: _tiles(64, 32, 4, 2)},
        "queries": {64: _tiles(64, 32, 4, 3), 128: _tiles(64, 64, 8, 2), 256: _tiles(64, 16, 8, 2)},
        "keys": {64: _tiles(32, 64, 8, 2), 128: _tiles(64, 64, 8, 2), 256: _tiles(16, 64, 8, 2)},
    },
    "sm_90": {
        "forward": {64: _tiles(128, 64, 4, 3), 128: _tiles(128, 128, 8, 2), 256: _tiles(128, 64, 8, 2)},
        "queries": {64: _tiles(64, 64, 4, 3), 128: _tiles(128, 64, 8, 3), 256: _tiles(64, 64, 8, 2)},
        "keys": {64: _tiles(64, 64, 4, 3), 128: _tiles(64, 128, 8, 2), 256: _tiles(16, 64, 8, 2)},
    },
    "sm_100": {
        "forward": {64: _tiles(128, 64, 8, 3), 128: _tiles(128, 64, 8, 3), 256: _tiles(128, 32, 8, 2)},
        "queries": {64: _tiles(128, 64, 8, 3), 128: _tiles(128, 64, 8, 2), 256: _tiles(64, 32, 8, 2)},
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
FP32["sm_80"] = _FP32 | {
    "queries": _FP32["queries"] | {16: _tiles(32, 32, 4, 2)},
    "keys": {32: _tiles(32, 32, 4, 1), 64: _tiles(32, 32, 8, 2), 128: _tiles(16, 32, 8, 2), 256: _tiles(16, 16, 8, 2)},
}
FP32["sm_90"] = _FP32 | {"forward": _FP32["forward"] | {16: _tiles(32, 32, 8, 2)}}
FP32["sm_100"] = _FP32 | {"forward": _FP32["forward"] | {32: _tiles(32, 32, 8, 2)}}  # with 4 warps it spills
FP32["gfx942"] = _FP32 | {"keys": _FP32["keys"] | {256: _tiles(16, 16, 4, 1)}}  # 4 warps have 512 registers each


# Rows that are padded to their width take a mask of their columns, too, for which some of these have no register left.
PADDED = {
    ("sm_80", "forward", 64): _tiles(128, 64, 8, 3),
    ("sm_80", "forward", 256): _tiles(64, 32, 8, 2),
    ("sm_90", "forward", 128): _tiles(128, 64, 8, 3),
    ("sm_100", "queries", 256): _tiles(64, 32, 4, 2),
}
PADDED_FP32 = {
    ("sm_80", "keys", 128): _tiles(16, 32, 8, 1),
    ("sm_80", "keys", 256): _tiles(16, 16, 8, 1),
    ("sm_90", "queries", 128): _tiles(16, 32, 4, 2),
    ("sm_100", "forward", 64): _tiles(32, 32, 8, 2),
}


def _config_of(arch: str, kernel: str, E: int, width: int, fp32: bool) -> Config:
    """The tiles of 64 serve narrower heads too, unless those have their own."""
    configs, padded = (FP32, PADDED_FP32) if fp32 else (CONFIGS, PADDED)
    if width > E and (arch, kernel, width) in padded:
        return padded[arch, kernel, width]
    configs = configs[arch][kernel]
    return configs.get(width) or configs[max(width, 64)]


def _config(kernel: str, q: Tensor, width: int) -> Config:
    return _config_of(architecture(q.device), kernel, q.shape[3], width, q.dtype == torch.float32)


def _aligned(x: Tensor) -> Tensor:
    """x, or a copy of it where a row of it does not lie together or does not start at a multiple of 16 bytes."""
    return x if has_aligned_rows(x) else x.clone(memory_format=torch.contiguous_format)


def _launch(kernel: str, tensors: dict[str, Tensor | None], window: int | None, scale: float) -> None:
    """Run one kernel. tensors: its pointer arguments by name, without `_ptr`; those with heads bring their strides."""
    q, k, q_ids, k_ids = (tensors[name] for name in ("q", "k", "q_ids", "k_ids"))
    if reason := why_not(q):
        raise ValueError(f"attention: {reason}")
    (B, H, T, E), (_, K, S, _) = q.shape, k.shape
    width = max(16, triton.next_power_of_2(E))
    config = _config(kernel, q, width)
    if kernel == "keys":
        heads, blocks = B * K, triton.cdiv(S, config.constants["BLOCK_S"])
    else:
        heads, blocks = B * H, triton.cdiv(T, PAD) * PAD // config.constants["BLOCK_T"]
    if heads * blocks == 0:
        return
    tiles = {name: t for name, t in tensors.items() if name in ("q", "k", "v", "y", "dy", "dq", "dk", "dv")}
    strides = {f"{name}_{axis}": t.stride(at) for name, t in tiles.items() for at, axis in enumerate("bht")}
    documents = q_ids is not None
    id_strides = {"q_ids_b": q_ids.stride(0), "k_ids_b": k_ids.stride(0)} if documents else {"q_ids_b": 0, "k_ids_b": 0}
    has_window = window is not None and window < S
    lengths = {"T": T, "S": S, "window": window if has_window else S + PAD}  # S + PAD: past the padded queries, too
    ranges = None
    with torch.cuda.device_of(q):
        if documents:
            ranges = torch.empty((B, blocks, 2), dtype=torch.int32, device=q.device)
            document_ranges_kernel[(blocks, B)](
                *(q_ids, k_ids, ranges),
                **id_strides,
                **lengths,
                **config.constants,
                SCAN=SCAN,
                OWNS_KEYS=kernel == "keys",
                num_warps=4,
                num_stages=1,
            )
        KERNELS[kernel][(heads * blocks,)](
            **{f"{name}_ptr": t for name, t in tensors.items()},
            **{"ranges_ptr": ranges, "heads": B * H, "H": H, "G": H // K, "scale": scale * math.log2(math.e)},
            **strides,
            **id_strides,
            **lengths,
            **{"E": E, "WIDTH": width, "PAD": PAD, "SECTION": SECTIONS[kernel]},
            **{"HAS_WINDOW": has_window, "HAS_DOCUMENTS": documents},
            **config.constants,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )


# ---------------------------------------------------------------------------------------------------- operators


@torch.library.custom_op("solar::attention", mutates_args=())
def attention_operator(
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


@attention_operator.register_fake
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


attention_operator.register_autograd(_differentiate, setup_context=_save)


# ---------------------------------------------------------------------------------------------------- compilation


def compile_cases() -> list[CompileCase]:
    """Every kernel with each pair of masks, in 16 bits and in fp32, for each width of a row, filled and padded.

    Of these `make test` takes, in 16 bits, every pair for head_dim 64 and 128, both masks and, padded, none for others;
    in fp32 both masks. The rest, hundreds, is slow.
    """
    cases = []
    for arch in ARCHITECTURES:
        for kernel in KERNELS:
            for (width, padded), masks, fp32 in itertools.product(WIDTHS.items(), MASKS, (False, True)):
                both = masks == (True, True)
                usual = {width: width > 16 and both, padded: False}
                if not fp32 and width in (64, 128):
                    usual = {width: True, padded: width == 128 and (both or not any(masks))}
                for E in (width, padded):
                    config = _config_of(arch, kernel, E, width, fp32)
                    case = _compile_case(arch, kernel, E, width, config, masks, not usual[E])
                    cases.append(case.in_fp32() if fp32 else case)
            for (width, padded), fp32 in itertools.product(WIDTHS.items(), (False, True)):
                for E in (width, padded):
                    config = _config_of(arch, kernel, E, width, fp32)
                    case = _ranges_case(arch, kernel, E, config, E != 128)
                    cases.append(case.in_fp32() if fp32 else case)
    return cases


WIDTHS = {16: 8, 32: 24, 64: 40, 128: 80, 256: 160}  # and, of each, a head_dim that is padded to it
MASKS = tuple(itertools.product((False, True), repeat=2))  # window, documents


def _compile_case(
    arch: str, kernel: str, E: int, width: int, config: Config, masks: tuple[bool, bool], slow: bool
) -> CompileCase:
    function = KERNELS[kernel]
    has_window, has_documents = masks
    constants = {"E": E, "WIDTH": width, "HAS_WINDOW": has_window, "HAS_DOCUMENTS": has_documents}
    constants |= {"SECTION": SECTIONS[kernel], "PAD": PAD}
    if not has_documents:
        constants |= dict.fromkeys(("q_ids_ptr", "k_ids_ptr", "ranges_ptr"))
    told = f"{function.__name__.removesuffix('_kernel')} E{E}" + " window" * has_window + " documents" * has_documents
    return _case(function, told, arch, config, constants, slow)


def _ranges_case(arch: str, kernel: str, E: int, config: Config, slow: bool) -> CompileCase:
    config = Config(config.constants, num_warps=4, num_stages=1)
    constants = {"SCAN": SCAN, "OWNS_KEYS": kernel == "keys"}
    return _case(document_ranges_kernel, f"document_ranges {kernel} E{E}", arch, config, constants, slow)


def _case(function, told: str, arch: str, config: Config, constants: dict[str, object], slow: bool) -> CompileCase:
    types = {"q_ids_ptr": "*i64", "k_ids_ptr": "*i64", "ranges_ptr": "*i32", "lse_ptr": "*fp32", "delta_ptr": "*fp32"}
    types["scale"] = "fp32"
    names = [name for name in function.arg_names if name not in constants and name not in config.constants]
    signature = {name: types.get(name, "*bf16" if name.endswith("_ptr") else "i32") for name in names}
    # Ids may begin anywhere in a longer row of them; all else is aligned.
    pointers = tuple(name for name in names if name.endswith("_ptr") and not name.endswith("_ids_ptr"))
    return CompileCase(function, told, arch, signature, config, constants, pointers, slow)
