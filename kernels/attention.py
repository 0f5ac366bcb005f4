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

The kernels, in kernels/attention_triton.py, never hold the T x S scores. They follow FlashAttention (arXiv:2205.14135,
algorithm 1 forward and 4 backward) with the loop order of FlashAttention-2 (arXiv:2307.08691, algorithms 1 and 2): a
program owns a block of rows of the result and walks over the other axis, so nothing is added up across programs and
every run gives the same bits.

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
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention_triton import attention_operator
from kernels.launch import check_tensors

MAX_HEAD_DIM = 256  # that the kernels take


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
    elif document_ids is None and within and _can_join(q, k, v):
        return _behind_earlier_keys(q, k, v)
    else:
        mask = visible(T, S, None if within else window, document_ids, key_document_ids, q.device)
    if T == 1 and H != K:
        return F.scaled_dot_product_attention(q.reshape(B, K, H // K, E), k, v, attn_mask=mask).reshape(B, H, 1, E)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=H != K)


def _can_join(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether torch's kernel for CPUs can be asked for its logsumexp: a private operator, here without a gradient."""
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    there = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
    return there and q.device.type == "cpu" and q.dtype != torch.float64 and not learns


def _behind_earlier_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of a chunk of a prompt, T < S, without a mask.

    The queries see all S - T earlier keys, which takes none, and of the chunk's own T keys the lower half, which is
    torch's causal form and skips the upper one. By (3) the two results belong together in proportion to exp(lse). For
    1,024 queries and 8,192 keys this takes 0.78 of the time with a mask in fp32, and 0.88 in bf16 (a Zen 4).
    """
    G, earlier = q.shape[1] // k.shape[1], k.shape[2] - q.shape[2]
    k, v = (t.repeat_interleave(G, dim=1) for t in (k, v))
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    y, lse = flash(q, k[:, :, :earlier], v[:, :, :earlier])
    own, own_lse = flash(q, k[:, :, earlier:], v[:, :, earlier:], is_causal=True)
    share = torch.sigmoid(own_lse - lse)[..., None]
    return torch.lerp(y.to(share.dtype), own.to(share.dtype), share).to(q.dtype)


def attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None = None,
    document_ids: Tensor | None = None,
    key_document_ids: Tensor | None = None,
) -> Tensor:
    """The kernels of kernels/attention_triton.py, for head_dim to 256 and any strides but in E.

    Document ids are compared as 32 bits.
    """
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
    y, _ = attention_operator(q, k, v, window, document_ids, key_document_ids, E**-0.5)
    return y[..., :E] if missing else y
