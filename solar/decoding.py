"""A model made ready for decoding on a CPU: one new token for each sequence, against a KV cache.

What limits a step is reading every weight once from memory; what a step of `solar/model.py` adds to that is the time of
libraries on products with one row, and of Python and torch's dispatcher on some forty small operations a layer. So the
weights are laid out for products with one row (`kernels/linear.py`), projections of the same input are one product,
rotary angles come from a table, and the operations are few. The results are the model's, up to rounding; the residual
stream, the norms and the rotation are fp32 also where the weights have 16 bits.

Shapes: B sequences, D hidden, H query heads, K key and value heads, E head_dim, P positions, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
import solar.model as plain
from kernels.linear import Form, PreparedLinear, has_fbgemm, mkl_is_at_home, multiplies_natively
from solar.model import DecoderLayer, KVCache, Transformer, rotary_table

PAYS_FROM = 16  # new tokens of a sequence
LAYOUT_PAYS_FROM = 64  # new tokens: to lay out fp32 weights took six steps on a Zen 3, and saved a quarter of each
HALF_PAYS_FROM = 128  # new tokens of all sequences together: packing is slow, and each row saves
MAX_COPIED_BYTES = 2 << 30
PARTS = {nn.Embedding, nn.ModuleList, Transformer, plain.Decoder}
PARTS |= {DecoderLayer, plain.Attention, plain.MLP, plain.Linear, plain.RMSNorm}


def prepare(model: Transformer, batch: int, new_tokens: int) -> "PreparedTransformer | None":
    """The model made ready to decode `new_tokens` for each of `batch` sequences.

    None where the model itself should go on: on a GPU, in fp64, with few tokens to come, where `kernels.select` asks
    for the reference, or when anything in it is not what solar/model.py builds (a hook, an adapter, a compiled layer).
    """
    weight = model.model.embed_tokens.weight
    served = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if new_tokens < PAYS_FROM or not served or kernels.kind(weight) != "torch" or not _is_plain(model):
        return None
    return PreparedTransformer(model, choose_form(model, batch, new_tokens))


def choose_form(model: Transformer, batch: int, new_tokens: int) -> Form:
    """How the weights should lie. A model of which more than MAX_COPIED_BYTES would be copied stays as it is.

    So a large model that is mapped to its files takes no memory of its own, and its steps, which last a second and
    more, gain little from what is saved between the products.
    """
    dtype = model.model.embed_tokens.weight.dtype
    copied = sum(parameter.nbytes for part in {*model.model.layers, head(model)} for parameter in part.parameters())
    if copied > MAX_COPIED_BYTES or not has_fbgemm():
        return "own"
    if batch == 1:
        laid_out = "columns" if dtype == torch.float32 and mkl_is_at_home() else "tiles"
        return laid_out if new_tokens >= LAYOUT_PAYS_FROM else "own"
    pays = not multiplies_natively(dtype) and batch * new_tokens >= HALF_PAYS_FROM
    return "half" if pays else "own"


def head(model: Transformer) -> nn.Module:
    """The module whose weight projects to the vocabulary."""
    return model.model.embed_tokens if model.config.tie_word_embeddings else model.lm_head


def _is_plain(model: Transformer) -> bool:
    hung = lambda part: part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part)
    return all(type(part) in PARTS and not hung(part) for part in model.modules())


def _scaled(norm: plain.RMSNorm) -> Tensor:
    """(D,) the weight in fp32, times the root of D."""
    return norm.weight.float() * len(norm.weight) ** 0.5


class PreparedLayer:
    """What a step needs of one decoder layer."""

    def __init__(self, layer: DecoderLayer, form: Form, shared: dict):
        attention, mlp = layer.self_attn, layer.mlp
        together = lambda *parts: PreparedLinear([p.weight for p in parts], [p.bias for p in parts], form, shared)
        self.qkv = together(attention.q_proj, attention.k_proj, attention.v_proj)
        self.output = together(attention.o_proj)
        self.gate_up = together(mlp.gate_proj, mlp.up_proj)
        self.down = together(mlp.down_proj)
        self.input_norm = _scaled(layer.input_layernorm)
        self.post_attention_norm = _scaled(layer.post_attention_layernorm)


class PreparedTransformer:
    """Decodes with the weights that `model` has now; a layer that stands at several positions is laid out once."""

    @torch.inference_mode()
    def __init__(self, model: Transformer, form: Form):
        self.config, self.form = model.config, form
        shared: dict = {}
        made = {layer: PreparedLayer(layer, form, shared) for layer in set(model.model.layers)}
        self.layers = [made[layer] for layer in model.model.layers]
        self.embedding = model.model.embed_tokens.weight
        self.norm = _scaled(model.model.norm)
        self.head = PreparedLinear([head(model).weight], [None], form, shared)
        self.turns = self._turns(1024)

    def _turns(self, length: int) -> Tensor:
        """(P, 2, E) fp32: what a head is multiplied by, and what it is with its halves exchanged."""
        cos, sin = rotary_table(torch.arange(length), self.config)
        return torch.stack((torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)), dim=1)

    @torch.inference_mode()
    def __call__(self, input_ids: Tensor, cache: KVCache) -> Tensor:
        """(B, 1) ids that follow what the cache holds, and are added to it -> logits (B, 1, V), fp32."""
        config, B = self.config, len(input_ids)
        D, E = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        positions, document_ids, key_document_ids = cache.locate(None, B, 1)
        if cache.length >= len(self.turns):
            self.turns = self._turns(2 * cache.length)
        cos, sin = self.turns[positions].unbind(dim=2)  # (B or 1, 1, E) each
        mask = None if document_ids is None else (key_document_ids == document_ids)[:, None, None]

        # Behind the D numbers of a row stands the root of D eps, so that the length of the whole is the root of
        # D (mean(x^2) + eps): an RMSNorm of three operations, where torch's own is a dozen. Its weight is `_scaled`.
        stream = torch.full((B, D + 1), (D * config.rms_norm_eps) ** 0.5)
        x = stream.narrow(1, 0, D)
        norm = lambda weight: (x / torch.linalg.vector_norm(stream, dim=1, keepdim=True)).mul_(weight)

        x.copy_(F.embedding(input_ids[:, 0], self.embedding))
        for index, layer in enumerate(self.layers):
            qkv = layer.qkv(norm(layer.input_norm)).view(B, H + 2 * K, E)
            qk = qkv.narrow(1, 0, H + K).float()
            qk = (qk * cos).addcmul_(qk.roll(E // 2, -1), sin)
            k, v = cache.append(index, qk.narrow(1, H, K).unsqueeze(2), qkv.narrow(1, H + K, K).unsqueeze(2))
            # The queries of a group see the same keys, so they stand as the positions of one query head.
            q = qk.narrow(1, 0, H).view(B, K, H // K, E).to(k.dtype)
            x += layer.output(F.scaled_dot_product_attention(q, k, v, mask).view(B, H * E))
            gate, up = layer.gate_up(norm(layer.post_attention_norm)).chunk(2, dim=1)
            x += layer.down(F.silu(gate).mul_(up))
        cache.length += 1
        return self.head(norm(self.norm)).float()[:, None]
