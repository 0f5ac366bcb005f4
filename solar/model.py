"""One forward pass of a Llama or Mistral decoder, read from top to bottom.

What sets this architecture apart from the first transformer (arXiv:1706.03762):
- RMSNorm before each block instead of LayerNorm after it; no biases
- rotary position embedding, applied to queries and keys in every layer, instead of learned positions
- grouped-query attention: several query heads share one key and value head (arXiv:2305.13245)
- a gated MLP, SwiGLU, with three projections
- Mistral only: a sliding window, so that a layer sees the last W tokens (arXiv:2310.06825)

Shapes: B batch, T query positions, S key positions, D hidden, F intermediate, H query heads, K key and value heads,
E head_dim, V vocabulary, L layers, C positions that a cache holds. Parameter names are Hugging Face's.
"""

import math
from functools import partial

import torch
from torch import Tensor, nn

import kernels
from solar.config import ModelConfig

# ---------------------------------------------------------------------------------------------------- positions


def rotary_table(positions: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position's angles: (B, T) -> two of (B, T, E/2), fp32.

    Computed afresh in each forward pass, a few microseconds: a buffer would be cast along with the weights by
    `.to(bf16)`, and left empty by `.to_empty()` after a construction on the meta device.
    """
    E = config.head_dim
    exponents = torch.arange(0, E, 2, device=positions.device, dtype=torch.float32) / E
    frequencies = config.rope_theta**-exponents
    if (scaling := config.rope_scaling) is not None:
        slowed = frequencies / scaling.factor
        if scaling.rope_type == "linear":
            frequencies = slowed
        else:  # llama3: short waves keep their frequency, long ones are slowed, those between are blended
            turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
            low, high = scaling.low_freq_factor, scaling.high_freq_factor
            keep = ((turns - low) / (high - low)).clamp(0, 1)
            frequencies = keep * frequencies + (1 - keep) * slowed
    angles = positions[..., None].float() * frequencies
    return angles.cos(), angles.sin()


def document_positions(document_ids: Tensor, last_id: Tensor | None, last_position: Tensor | None) -> Tensor:
    """(B, T) position of each token within its run of equal ids; a run may go on from (B,) last_id at last_position."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device)
    # The index at which each token's run began: negative for a run that began before this chunk.
    first = torch.zeros_like(document_ids[:, :1])
    if last_id is not None:
        first = torch.where(document_ids[:, 0] == last_id, -1 - last_position, 0)[:, None]
    begins = document_ids[:, 1:] != document_ids[:, :-1]
    starts = torch.cat((first, torch.where(begins, index[1:], torch.iinfo(first.dtype).min)), dim=1)
    return index - starts.cummax(dim=1).values


class KVCache:
    """Keys and values of the positions seen so far, allocated once: (L, B, K, C, E) each, on `device` in `dtype`.

    C is the longest sequence that will be asked for or, when that is shorter, the sliding window: then the cache rolls,
    the token at step t lying in slot t mod C. A model with shared layers has one slice for each position, not for each
    layer.
    """

    def __init__(
        self, config: ModelConfig, batch: int, max_length: int, dtype: torch.dtype, device: torch.device | str
    ):
        self.rolls = config.sliding_window is not None and config.sliding_window < max_length
        capacity = config.sliding_window if self.rolls else max_length
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.document_ids: Tensor | None = None  # (B, 1, C), once a forward pass brings some
        self.last_position: Tensor | None = None  # (B,)
        self.last_id: Tensor | None = None  # (B,)
        self.length = 0  # steps taken so far

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, K, T, E); return all that the new queries may see, the new ones last: (B, K, S, E) each."""
        return self._append(self.keys[layer], k), self._append(self.values[layer], v)

    def locate(self, document_ids: Tensor | None, B: int, T: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Positions (B or 1, T) of T new tokens, their document ids (B, T), and those of the keys they meet (B, S)."""
        capacity = self.keys.shape[3]
        if self.length + T > capacity and not self.rolls:
            raise ValueError(
                f"the KV cache holds {capacity} positions; {self.length} are taken and {T} more do not fit"
            )
        device = self.keys.device
        if document_ids is None and self.document_ids is None:
            return torch.arange(self.length, self.length + T, device=device)[None], None, None
        if document_ids is None:  # tokens that come without ids belong to the document before them
            document_ids = self.last_id[:, None].expand(B, T)
        if self.document_ids is None:
            if self.length:
                raise ValueError("document ids must come with the first tokens that a KV cache takes, or not at all")
            self.document_ids = torch.zeros(B, 1, capacity, dtype=document_ids.dtype, device=device)
        positions = document_positions(document_ids, self.last_id, self.last_position)
        self.last_id, self.last_position = document_ids[:, -1], positions[:, -1]
        return positions, document_ids, self._append(self.document_ids, document_ids[:, None])[:, 0]

    def keep(self, rows: Tensor) -> None:
        """Drop all sequences but those of `rows`, ascending numbers of the batch. Moved in place, layer by layer: a
        second cache, even of half the size, may not fit beside the first."""
        B = len(rows)
        for layer in (*self.keys, *self.values):
            layer[:B] = layer[rows]
        self.keys, self.values = self.keys[:, :B], self.values[:, :B]
        if self.document_ids is not None:
            self.document_ids = self.document_ids[rows]
            self.last_position, self.last_id = self.last_position[rows], self.last_id[rows]

    def _append(self, buffer: Tensor, new: Tensor) -> Tensor:
        """Write `new` behind what dimension 2 of `buffer` holds, and return what is held with it."""
        capacity, T, end = buffer.shape[2], new.shape[2], self.length + new.shape[2]
        if end <= capacity:
            buffer.narrow(2, self.length, T).copy_(new)  # of one token, indexing by [...] would take half the time
            return buffer.narrow(2, 0, end)
        if T == 1:  # takes the place of the one token that has left the window; a lone query does not mind the order
            buffer[:, :, self.length % capacity] = new[:, :, 0]
            return buffer
        # Several queries: each needs the window before it, so none may be overwritten before all have seen them.
        held = buffer[:, :, : self.length] if self.length < capacity else buffer.roll(-(self.length % capacity), dims=2)
        everything = torch.cat((held, new), dim=2)
        slots = torch.arange(end - capacity, end, device=buffer.device) % capacity
        buffer[:, :, slots] = everything[:, :, -capacity:]
        return everything


# ---------------------------------------------------------------------------------------------------- layers


class Linear(nn.Linear):
    def reset_parameters(self) -> None:
        """Nothing: weights come from a checkpoint or `init_weights`, and torch's default costs more than loading."""

    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return kernels.rmsnorm(x, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        D, H, K, E = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.head_dim, self.window = E, config.sliding_window
        self.q_proj = Linear(D, H * E, bias=config.attention_bias)
        self.k_proj = Linear(D, K * E, bias=config.attention_bias)
        self.v_proj = Linear(D, K * E, bias=config.attention_bias)
        self.o_proj = Linear(H * E, D, bias=config.attention_bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, documents: tuple, store=None) -> Tensor:
        split = lambda y: y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, T, H*E) -> (B, H, T, E)
        q, k, v = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        q, k = kernels.rotary(q, k, cos, sin)
        if store is not None:
            k, v = store(k, v)  # from here on S keys, of which the last T are these
        y = kernels.attention(q, k, v, self.window, *documents)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        D, F = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(D, F, bias=config.mlp_bias)
        self.up_proj = Linear(D, F, bias=config.mlp_bias)
        self.down_proj = Linear(F, D, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(kernels.swiglu(self.gate_proj(x), self.up_proj(x)))


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, documents: tuple, store=None) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), cos, sin, documents, store)
        norm = self.post_attention_layernorm
        normalised, x = kernels.add_rmsnorm(attended, x, norm.weight, norm.eps)
        return x + self.mlp(normalised)


# ---------------------------------------------------------------------------------------------------- the model


class Decoder(nn.Module):
    """Everything below the vocabulary projection; the prefix `model.` of the checkpoint's names."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(
            config.vocab_size, config.hidden_size, _weight=torch.empty(config.vocab_size, config.hidden_size)
        )
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    """A causal language model. `state_dict()` has exactly the names of a Hugging Face checkpoint.

    Construct it under `torch.device("meta")` and it allocates nothing. One layer may stand at several positions of
    `model.layers` (an up-scaled model that shares its weights); nothing in a layer knows its position.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
        last_only: bool = False,
        summed: bool = False,
    ) -> Tensor:
        """(B, T) ids -> logits (B, T, V); with `last_only` of the last position alone (B, 1, V).

        labels (B, T), aligned with the inputs: returns instead the log-probability of each label given the tokens
        before it, (B, T) in fp32: 0 where the label is -100, and where no token of the same document stands before it.
        summed: returns their sum instead, whose gradient is cheaper than that of sums made outside.
        document_ids (B, T): tokens see only their own document, whose tokens stand together; positions restart with it.
        cache: the tokens follow those that it holds, and are added to it.
        """
        B, T = input_ids.shape
        if labels is not None and (cache is not None or last_only):
            raise ValueError("labels are scored in one pass over whole sequences, without cache and last_only")
        if summed and labels is None:
            raise ValueError("summed is for the log-probabilities of labels, and none are given")
        if cache is None:
            positions = torch.arange(T, device=input_ids.device)[None]
            if document_ids is not None:
                positions = document_positions(document_ids, None, None)
            documents = (document_ids, document_ids)
        else:
            positions, *documents = cache.locate(document_ids, B, T)
        cos, sin = rotary_table(positions, self.config)

        x = self.model.embed_tokens(input_ids)
        for index, layer in enumerate(self.model.layers):
            x = layer(x, cos, sin, documents, partial(cache.append, index) if cache else None)
        if cache is not None:
            cache.length += T
        x = self.model.norm(x[:, -1:] if last_only else x)

        head = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        if labels is None:
            return kernels.linear(x, head.weight)
        labels = labels[:, 1:]
        if document_ids is not None:
            labels = labels.masked_fill(document_ids[:, 1:] != document_ids[:, :-1], -100)
        logprobs = kernels.label_logprobs(x[:, :-1].flatten(0, 1), head.weight, labels.flatten(), summed)
        return logprobs.sum() if summed else nn.functional.pad(logprobs.view(B, T - 1), (1, 0))

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Random weights: normal with the config's `initializer_range`; norms 1, biases 0."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith(".bias"):
                parameter.zero_()
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * self.config.initializer_range)


def check_finite(logits: Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError if a logit is not finite, as 16 bits may make one at any step. dtype: the model's."""
    if not bool(logits.isfinite().all()):
        raise ValueError(f"the logits are not finite in {dtype}: try bfloat16 or float32, or check the weights")
