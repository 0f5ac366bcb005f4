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
"""

import torch
import torch.nn.functional as F
from torch import Tensor


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


def attention_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None = None,
    document_ids: Tensor | None = None,
    key_document_ids: Tensor | None = None,
) -> Tensor:
    """`F.scaled_dot_product_attention`, with a mask built only where its own causal one does not serve."""
    T, S = q.shape[2], k.shape[2]
    within = window is None or window >= S  # the window hides nothing
    mask, is_causal = None, False
    if document_ids is None and within and (T == S or T == 1):
        is_causal = T > 1  # is_causal aligns the mask top-left, which is right only for T = S; one query sees every key
    else:
        mask = visible(T, S, None if within else window, document_ids, key_document_ids, q.device)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=q.shape[1] != k.shape[1]
    )
