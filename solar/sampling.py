"""Generation: read the prompts in chunks, then one token at a time.

Prompts of uneven length run as one batch, padded on the left, so that all rows take each step together. Padding is a
document of its own: nothing sees it, and positions begin at each row's first real token, so a row's logits are those
that it would get alone, up to rounding: products with another number of rows add in another order, and two tokens that
are all but equally likely may change places.

Shapes: B prompts, T positions, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from solar.decoding import PreparedTransformer, prepare
from solar.model import KVCache, Transformer, check_finite

PREFILL_CHUNK = 1024  # prompt tokens in one forward pass, of all rows together: bounds the memory that it takes
PADDING, PROMPT = -1, 0  # document ids


def choose_probabilities(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """(B, V) logits -> (B, V) probabilities to draw from, in fp32; the filters apply in the order of the arguments.

    top_k keeps the k likeliest tokens; top_p the fewest likeliest whose probabilities reach p, at least one
    (arXiv:1904.09751); min_p those at least min_p times as likely as the likeliest (arXiv:2407.01082).
    """
    logits = logits.float()
    logits = logits - logits.amax(dim=-1, keepdim=True)  # at most 0: no temperature makes an infinity that counts
    logits = logits / max(temperature, torch.finfo(logits.dtype).tiny)  # a smaller one is 0 in fp32
    if top_k is not None and top_k < logits.shape[-1]:
        threshold = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    if top_p is not None and top_p < 1:
        ordered, order = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered  # what is likelier than each token
        drop = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= top_p)
        drop.scatter_(-1, order[:, :1], False)
        logits = logits.masked_fill(drop, float("-inf"))
    probabilities = logits.softmax(dim=-1)
    if min_p is not None:
        keep = probabilities >= min_p * probabilities.amax(dim=-1, keepdim=True)
        probabilities = logits.masked_fill(~keep, float("-inf")).softmax(dim=-1)
    return probabilities


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make what was `seen` (B, V) less likely: logits / penalty, or * penalty if negative (arXiv:1909.05858)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


class Memory:
    """What one call of `generate` leaves to the next: the KV cache of its prompt and answer, and the prepared weights.

    For one prompt at a time, of a model whose weights stay as they are. A prompt that begins like what the cache holds,
    as the next turn of a conversation does, is read only from where it differs.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []  # whose keys and values the cache holds
        self.cache: KVCache | None = None
        self.prepared: PreparedTransformer | None = None

    def recall(self, model: Transformer, prompt: list[int], length: int) -> KVCache:
        """A cache for `length` positions that holds what it can of the prompt, at most all but its last token."""
        old, ids, weight = self.cache, self.ids, model.model.embed_tokens.weight
        self.ids, known = [], 0
        while known < min(len(ids), len(prompt) - 1) and ids[known] == prompt[known]:
            known += 1
        if old is not None and old.length > old.keys.shape[3] and known < old.length:
            known = 0  # the window has rolled over what came before
        fits = old is not None and (length <= old.keys.shape[3] or (old.rolls and known == old.length))
        if not fits:
            self.cache = KVCache(model.config, 1, length, weight.dtype, weight.device)
            if known:
                for new, held in ((self.cache.keys, old.keys), (self.cache.values, old.values)):
                    new[:, :, :, :known] = held[:, :, :, :known]
        self.cache.length = known
        return self.cache


def _check(
    model: Transformer, prompts, max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed
) -> None:
    if not prompts or not all(prompts):
        raise ValueError("every prompt needs at least one token; begin an empty one with the BOS id")
    vocabulary, context = model.config.vocab_size, model.config.max_position_embeddings
    for row, prompt in enumerate(prompts):
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            wrong = next(i for i in prompt if not 0 <= i < vocabulary)
            raise ValueError(f"prompt {row} holds the id {wrong}; the model's vocabulary is 0 to {vocabulary - 1}")
        if len(prompt) + max_new_tokens > context:
            raise ValueError(
                f"prompt {row} has {len(prompt)} tokens; with {max_new_tokens} new ones it exceeds the model's context "
                f"of {context} (max_position_embeddings): shorten it"
            )
    ranges = {
        "max_new_tokens": (max_new_tokens, max_new_tokens >= 1, "at least 1"),
        "temperature": (temperature, 0 <= temperature < float("inf"), "0 (greedy) or more"),
        "top_k": (top_k, top_k is None or top_k >= 1, "at least 1"),
        "top_p": (top_p, top_p is None or 0 < top_p <= 1, "above 0 and at most 1"),
        "min_p": (min_p, min_p is None or 0 <= min_p <= 1, "between 0 and 1"),
        "repetition_penalty": (repetition_penalty, 0 < repetition_penalty < float("inf"), "above 0; 1 is none"),
        "seed": (seed, seed is None or -(2**63) <= seed < 2**63, "a whole number of at most 64 bits"),
    }
    for name, (value, fits, wanted) in ranges.items():
        if not fits:
            raise ValueError(f"{name} must be {wanted}, found {value}")


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos_id: int | list[int] | tuple[int, ...] | None = None,
    seed: int | None = None,
    on_token: Callable[[int, int], bool | None] | None = None,
    memory: Memory | None = None,
) -> list[list[int]]:
    """Continue each prompt (a list of ids) by at most max_new_tokens; returns the new ids of each.

    temperature 0 takes the likeliest token. A row ends at an `eos_id`, which is not returned. on_token(row, id) is
    called for every new id as it is made; returning True ends that row. Each row draws from its own generator, seeded
    with seed + row, so what it gets does not depend on its neighbours. memory: what the call before left, for a single
    prompt.
    Raises ValueError for an empty prompt, an id outside the vocabulary, a setting out of range, a prompt that with
    max_new_tokens exceeds the model's context, or logits that are not finite.
    """
    _check(model, prompts, max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed)
    stops = set() if eos_id is None else {eos_id} if isinstance(eos_id, int) else set(eos_id)
    weight = model.model.embed_tokens.weight
    device, B, longest = weight.device, len(prompts), max(map(len, prompts))
    if memory is not None and B > 1:
        raise ValueError(f"a memory is of one conversation; {B} prompts are given")

    input_ids = torch.zeros(B, longest, dtype=torch.long)
    document_ids = torch.full((B, longest), PADDING)
    seen = torch.zeros(B, model.config.vocab_size, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        input_ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        document_ids[row, longest - len(prompt) :] = PROMPT
        seen[row, prompt] = True
    input_ids, document_ids, seen = input_ids.to(device), document_ids.to(device), seen.to(device)
    uneven = any(len(prompt) != longest for prompt in prompts)

    generators = [torch.Generator() for _ in prompts]
    for row, generator in enumerate(generators):
        generator.seed() if seed is None else generator.manual_seed(seed + row)

    prepared = (memory and memory.prepared) or prepare(model, B, max_new_tokens)
    length = longest + max_new_tokens
    if memory is None:
        cache = KVCache(model.config, B, length, weight.dtype, device)
    else:
        cache, memory.prepared = memory.recall(model, prompts[0], length), prepared
    chunk = max(PREFILL_CHUNK // B, 1)
    for at in range(cache.length, longest, chunk):
        ids = document_ids[:, at : at + chunk] if uneven else None
        logits = model(input_ids[:, at : at + chunk], document_ids=ids, cache=cache, last_only=True)

    new: list[list[int]] = [[] for _ in prompts]
    rows = list(range(B))  # of `new`, for each row of the cache
    running = set(rows)
    for step in range(max_new_tokens):
        logits = logits[:, -1]
        check_finite(logits, weight.dtype)
        if repetition_penalty != 1.0:
            logits = penalise_repetition(logits, seen, repetition_penalty)
        if temperature == 0:
            chosen = logits.argmax(dim=-1)
        else:
            probabilities = choose_probabilities(logits, temperature, top_k, top_p, min_p).cpu()
            drawn = [p.multinomial(1, generator=generators[row]) for p, row in zip(probabilities, rows, strict=True)]
            chosen = torch.cat(drawn).to(device)
        for row, token in zip(rows, chosen.tolist(), strict=True):
            if row not in running:
                continue
            if token in stops:
                running.discard(row)
                continue
            new[row].append(token)
            if on_token is not None and on_token(row, token):
                running.discard(row)
        if not running or step == max_new_tokens - 1:
            break
        if repetition_penalty != 1.0:
            seen.scatter_(1, chosen[:, None], True)
        if 2 * len(running) <= len(rows):  # rows that have ended leave once they are half: few moves, little waste
            kept = torch.tensor([b for b, row in enumerate(rows) if row in running], device=device)
            rows, chosen, seen = sorted(running), chosen[kept], seen[kept]
            cache.keep(kept)
        logits = (prepared or model)(chosen[:, None], cache=cache)
    if memory is not None:
        memory.ids = (prompts[0] + new[0])[: cache.length]
    return new
