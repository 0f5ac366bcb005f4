"""Log-likelihoods of continuations, and greedy answers, with what their prompts share computed once.

A benchmark asks log p(continuation | context) for every choice of every question. The prompts are long and alike: with
25 shots before each question, 95% of what a model would read is the same text again, and the choices of one question
share all but their last words. So requests are laid out as a tree of token ids, and each part is read once:

    trunk        what all questions of a group begin with: the shots
    stem         what the choices of one question then have in common: the question
    tail         the rest of one choice

The trunk is read alone into a KV cache. A batch of stems goes on from copies of it, and a batch of tails from copies of
those. What is shared is found by comparing ids, not texts, so a tokenizer that merges across a border makes a shorter
stem and no error; a prompt that lost its beginning to the model's limit shares no trunk. With reuse=False each request
is read whole, a row of its own: the specification that the other way is held to.

Shapes: B rows of a batch, T new tokens of the longest, V vocabulary; shorter rows are filled up behind their end, where
no position before looks at.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from solar.model import KVCache, Transformer, check_finite
from solar.tokenizer import Tokenizer

PADDING, PROMPT = -1, 0  # document ids
TRUNK_CHUNK = 1024  # tokens of a trunk in one forward pass
POSITIONS = 512  # positions whose logits are in fp32 at once


class Request(NamedTuple):
    """log p of the last `scored` of `ids` given those before them. lost: ids that were cut off in front."""

    ids: list[int]
    scored: int
    lost: int = 0


def encode_request(
    tokenizer: Tokenizer, context: str, continuation: str, bos: bool, max_length: int, context_ids: list[int] | None
) -> Request:
    """The ids of a request, as lm-evaluation-harness makes them.

    White space at the context's end is moved to the continuation. Both are encoded as one text, of which the first
    len(ids(context)) are the context's. Of more than max_length + 1 ids the first are left out; the last is never read.
    context_ids: those of the stripped context, if they are known. Raises ValueError if nothing is left to be scored.
    """
    stripped = context.rstrip()
    if context_ids is None:
        context_ids = tokenizer.encode(stripped, bos=bos)
    whole = tokenizer.encode(context + continuation, bos=bos)
    new = whole[len(context_ids) :]
    if not new or not context_ids or len(new) > max_length:
        raise ValueError(
            f"nothing to score: {len(new)} tokens of {continuation!r:.60} behind {len(context_ids)} of its context, "
            f"in a model that reads {max_length}"
        )
    ids = context_ids + new
    lost = max(len(ids) - max_length - 1, 0)
    return Request(ids[lost:], len(new), lost)


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """How many leading items all of the sequences share."""
    first, last = min(sequences), max(sequences)  # whatever these two share, all between them share
    return next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


# ------------------------------------------------------------------------------------------------ what goes together


class Limits(NamedTuple):
    """What a forward pass may hold: questions, new tokens (filled up), and positions of the KV caches."""

    questions: int
    tokens: int
    cached: int


class Batch(NamedTuple):
    """Questions to read together, by their index; `trunk` ids are read before them, once for all batches with these."""

    trunk: list[int]
    questions: list[int]


def plan(questions: Sequence[list[Request]], limits: Limits, room: int = 0, reuse: bool = True) -> list[Batch]:
    """All questions as batches, those of one trunk one after the other, the longest first; a function of its arguments.

    room: tokens that will be generated behind each. No limit keeps a single question from being read.
    """
    whole = [i for i, requests in enumerate(questions) if reuse and not any(request.lost for request in requests)]
    batches, rest = [], sorted(set(range(len(questions))) - set(whole))
    for members, shares in ((whole, True), (rest, False)):
        if not members:
            continue
        start = _trunk([request for i in members for request in questions[i]]) if shares else 0
        trunk = questions[members[0]][0].ids[:start]
        sizes = {i: _size(questions[i], start, reuse) for i in members}
        together: list[int] = []
        for i in sorted(members, key=lambda i: (-sum(sizes[i]), i)):
            bigger = [*together, i]
            rows = sum(len(questions[j]) for j in bigger)
            if together and not _fits([sizes[j] for j in bigger], rows, start, limits, room):
                batches.append(Batch(trunk, together))
                bigger = [i]
            together = bigger
        batches.append(Batch(trunk, together))
    return batches


def _trunk(requests: Sequence[Request]) -> int:
    """The ids that all have in common; at least one of each context is left, whose logits are the first wanted."""
    return max(min(common_prefix([r.ids for r in requests]), min(len(r.ids) - r.scored for r in requests) - 1), 0)


def _size(requests: list[Request], start: int, reuse: bool) -> tuple[int, int]:
    """(tokens of the stem, tokens of the longest tail) behind `start` ids."""
    stem = common_prefix([request.ids[start:-1] for request in requests]) if reuse else 0
    return stem, max(len(request.ids) for request in requests) - 1 - start - stem


def _fits(sizes: list[tuple[int, int]], rows: int, start: int, limits: Limits, room: int) -> bool:
    stem, tail = (max(size[part] for size in sizes) for part in (0, 1))
    return (
        len(sizes) <= limits.questions
        and len(sizes) * stem <= limits.tokens
        and rows * tail <= limits.tokens
        and len(sizes) * (start + stem) + rows * (start + stem + tail + room) <= limits.cached
    )


# ------------------------------------------------------------------------------------------------ reading


@torch.inference_mode()
def read_trunk(model: Transformer, ids: list[int]) -> KVCache | None:
    """A cache of one row that holds these ids; None for none."""
    if not ids:
        return None
    cache = _cache(model, 1, len(ids))
    for at in range(0, len(ids), TRUNK_CHUNK):
        model(_tensor(model, [ids[at : at + TRUNK_CHUNK]]), cache=cache, last_only=True)
    return cache


def branch(
    model: Transformer, source: KVCache | None, rows: list[int], lengths: list[int], room: int
) -> KVCache | None:
    """A cache whose row b goes on behind the first lengths[b] positions of row rows[b] of `source`.

    Rows end at the same slot, so shorter ones are filled up in front, with a document that they do not see. None where
    there is nothing to go on from.
    """
    longest = max(lengths)
    if longest == 0:
        return None
    cache = _cache(model, len(rows), longest + room)
    for b, (row, n) in enumerate(zip(rows, lengths, strict=True)):
        for mine, theirs in ((cache.keys, source.keys), (cache.values, source.values)):
            mine[:, b, :, : longest - n] = 0  # a masked NaN would still be one
            mine[:, b, :, longest - n : longest] = theirs[:, row, :, :n]
    cache.length = longest
    if min(lengths) < longest:
        device = cache.keys.device
        held = torch.arange(longest + room) >= longest - torch.tensor(lengths)[:, None]
        cache.document_ids = torch.where(held, PROMPT, PADDING)[:, None].to(device)
        cache.last_id = torch.full((len(rows),), PROMPT, device=device)
        cache.last_position = torch.tensor(lengths, device=device) - 1
    return cache


def _cache(model: Transformer, rows: int, length: int) -> KVCache:
    """One that never rolls: it is copied from by position. The layers apply the sliding window themselves."""
    weight = model.model.embed_tokens.weight
    return KVCache(dataclasses.replace(model.config, sliding_window=None), rows, length, weight.dtype, weight.device)


def _tensor(model: Transformer, rows: Sequence[list[int]]) -> Tensor:
    longest = max(map(len, rows))
    filled = [row + [0] * (longest - len(row)) for row in rows]
    return torch.tensor(filled, device=model.model.embed_tokens.weight.device)


class Read(NamedTuple):
    """A row of a pass has read the ids begin..end-1 of a request, and tells how likely each of begin+1..end is."""

    row: int
    begin: int
    end: int
    question: int
    request: int


@torch.inference_mode()
def log_likelihoods(
    model: Transformer, questions: Sequence[list[Request]], trunk: KVCache | None = None, reuse: bool = True
) -> list[list[float]]:
    """log p of the continuation of every request of a batch, in nats.

    trunk: what all of them begin with, from `read_trunk`. Raises ValueError for a result that is not finite.
    """
    start = trunk.length if trunk else 0
    stems = [_size(requests, start, reuse)[0] for requests in questions]
    sums = [[0.0] * len(requests) for requests in questions]
    source = trunk
    if max(stems):
        rows = [requests[0].ids[start : start + n] for requests, n in zip(questions, stems, strict=True)]
        source = branch(model, trunk, [0] * len(rows), [start] * len(rows), max(stems)) or _cache(
            model, len(rows), max(stems)
        )
        logits = model(_tensor(model, rows), cache=source)
        reads = [Read(q, start, start + stems[q], q, i) for q, asked in enumerate(questions) for i in range(len(asked))]
        _add(sums, logits, questions, reads)
    reads, tails = [], []
    for q, (requests, stem) in enumerate(zip(questions, stems, strict=True)):
        for i, request in enumerate(requests):
            if tail := request.ids[start + stem : -1]:
                reads.append(Read(len(tails), start + stem, len(request.ids) - 1, q, i))
                tails.append(tail)
    if tails:
        has_stems = source is not trunk  # a row for each question; else the trunk's only one
        rows = [read.question if has_stems else 0 for read in reads]
        cache = branch(model, source, rows, [read.begin for read in reads], max(map(len, tails)))
        _add(sums, model(_tensor(model, tails), cache=cache), questions, reads)
    return sums


def _add(sums: list[list[float]], logits: Tensor, questions: Sequence[list[Request]], reads: Sequence[Read]) -> None:
    """Add what a pass tells of its requests: log p of those of the ids that are scored."""
    places, requests = [], []  # (row, position in it, id that follows), and whose it is
    for read in reads:
        request = questions[read.question][read.request]
        first_scored = len(request.ids) - request.scored
        for t in range(max(first_scored, read.begin + 1), read.end + 1):
            places.append((read.row, t - 1 - read.begin, request.ids[t]))
            requests.append((read.question, read.request))
    for at in range(0, len(places), POSITIONS):
        part = slice(at, at + POSITIONS)
        rows, columns, labels = torch.tensor(places[part], device=logits.device).T
        logps = logits[rows, columns].float().log_softmax(dim=-1).gather(1, labels[:, None])[:, 0]
        if not bool(logps.isfinite().all()):
            raise ValueError(
                f"a log-likelihood is not finite in {logits.dtype}: try --dtype fp32, or check the weights"
            )
        for (q, i), logp in zip(requests[part], logps.tolist(), strict=True):
            sums[q][i] += logp


@torch.inference_mode()
def continue_greedily(
    model: Transformer,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    on_token: Callable[[int, int], bool],
    trunk: KVCache | None = None,
) -> list[list[int]]:
    """The likeliest next id of each prompt, again and again: at most max_new_tokens of them, until on_token says stop.

    prompts: whole, `trunk` included. on_token(row, id) is called for each new id and returns whether the row ends with
    it. Rows that have ended leave the batch once half of it has. Raises ValueError for logits that are not finite.
    """
    dtype = model.model.embed_tokens.weight.dtype
    start, B = trunk.length if trunk else 0, len(prompts)
    stems = [prompt[start:] for prompt in prompts]
    longest = max(map(len, stems))
    source = branch(model, trunk, [0] * B, [start] * B, longest) or _cache(model, B, longest)
    logits = model(_tensor(model, stems), cache=source)
    logits = logits[torch.arange(B), torch.tensor([len(stem) - 1 for stem in stems])]
    cache = branch(model, source, list(range(B)), [len(prompt) for prompt in prompts], max_new_tokens)
    del source
    new: list[list[int]] = [[] for _ in prompts]
    rows = list(range(B))  # of `new`, for each row of the cache
    running = set(rows)
    for step in range(max_new_tokens):
        check_finite(logits, dtype)
        chosen = logits.argmax(dim=-1)
        for row, token in zip(rows, chosen.tolist(), strict=True):
            if row in running:
                new[row].append(token)
                if on_token(row, token):
                    running.discard(row)
        if not running or step == max_new_tokens - 1:
            break
        if 2 * len(running) <= len(rows):
            kept = [b for b, row in enumerate(rows) if row in running]
            rows, chosen = [rows[b] for b in kept], chosen[kept]
            cache.keep(torch.tensor(kept, device=chosen.device))
        logits = model(chosen[:, None], cache=cache)[:, -1]
    return new
