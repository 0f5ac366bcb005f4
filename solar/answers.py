"""Questions answered, each of them once: encoded, put into batches, read by all ranks, and kept in the journal."""

import hashlib
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from solar import cli, dist
from solar.journal import Journal
from solar.model import KVCache, Transformer
from solar.scoring import Limits, Request, continue_greedily, encode_request, log_likelihoods, plan, read_trunk
from solar.tasks import Group, Question, cut
from solar.tokenizer import StreamDecoder, Tokenizer

AT_ONCE = 2048  # questions whose ids are in memory together
PROGRESS_SECONDS = 10


@dataclass
class Run:
    """What the questions of all benchmarks are answered with.

    journal: on rank 0. done: {key: result} of all that is answered, on every rank. reuse: whether shared text is read
    once. lost: {benchmark: prompts that were cut in front}. trunk: the last one that was read, its ids and their cache.
    """

    model: Transformer
    tokenizer: Tokenizer
    world: dist.World
    journal: Journal | None
    done: dict[str, Any]
    bos: bool
    max_length: int
    max_new_tokens: int
    stops: tuple[str, ...]
    limits: Limits
    reuse: bool = True
    lost: dict[str, int] = field(default_factory=dict)
    trunk: tuple[list[int], KVCache | None] = ((), None)

    def answer(self, name: str, groups: list[Group]) -> list[list[Any]]:
        """The result of every question: log-likelihoods, or for GSM8K the text of the answer."""
        progress = Progress(name, sum(len(group.questions) for group in groups)) if self.journal else None
        results = []
        for group in groups:
            keys = []
            for at in range(0, len(group.questions), AT_ONCE):
                part = slice(at, at + AT_ONCE)
                encode = self._encode_prompt if name == "gsm8k" else self._encode
                with ThreadPoolExecutor() as pool:  # sentencepiece lets go of Python while it works
                    requests = list(pool.map(encode, group.before[part], group.questions[part]))
                self.lost[name] = self.lost.get(name, 0) + sum(r.lost > 0 for question in requests for r in question)
                new = [self._key(name, question) for question in requests]
                keys += new
                if progress:
                    progress.advance(sum(key in self.done for key in new), computed=False)
                for found in self._compute(name, requests, new):
                    self.done |= found
                    if self.journal:
                        self.journal.add(found.items())
                        progress.advance(len(found))
            results.append([self.done[key] for key in keys])
        return results

    def _compute(self, name: str, requests: list[list[Request]], keys: list[str]) -> Iterator[dict[str, Any]]:
        """{key: result} of what is not done, a batch of each rank at a time.

        The batches are those of a run that has nothing done and of any number of ranks, so all get the same bits.
        """
        generates = name == "gsm8k"
        batches = plan(requests, self.limits, self.max_new_tokens if generates else 0, self.reuse)
        batches = [batch for batch in batches if any(keys[i] not in self.done for i in batch.questions)]
        for first in range(0, len(batches), self.world.size):
            results = {}
            for batch in batches[first : first + self.world.size][self.world.rank :: self.world.size]:
                if batch.trunk != self.trunk[0]:
                    self.trunk = (batch.trunk, None)  # gives the old one's memory back first
                    self.trunk = (batch.trunk, read_trunk(self.model, batch.trunk))
                asked = [requests[i] for i in batch.questions]
                if generates:
                    answers = self._generate([question[0].ids for question in asked])
                else:
                    answers = log_likelihoods(self.model, asked, self.trunk[1], self.reuse)
                results |= {keys[i]: answer for i, answer in zip(batch.questions, answers, strict=True)}
            everyone = dist.from_all_ranks(results, self.world)
            yield {key: result for part in everyone for key, result in part.items() if key not in self.done}

    def _encode(self, before: str, question: Question) -> list[Request]:
        known: dict[str, list[int]] = {}
        requests = []
        for context, continuation in zip(question.contexts, question.continuations, strict=True):
            text = before + context
            if context not in known:
                known[context] = self.tokenizer.encode(text.rstrip(), bos=self.bos)
            requests.append(
                encode_request(self.tokenizer, text, continuation, self.bos, self.max_length, known[context])
            )
        return requests

    def _encode_prompt(self, before: str, question: Question) -> list[Request]:
        """As a request of which nothing is scored; there is room for the answer behind it."""
        ids = self.tokenizer.encode(before + question.contexts[0], bos=self.bos)
        lost = max(len(ids) - self.max_length + self.max_new_tokens, 0)
        return [Request(ids[lost:], 0, lost)]

    def _key(self, name: str, requests: list[Request]) -> str:
        digest = hashlib.blake2b(f"{name} {[request.scored for request in requests]}".encode(), digest_size=12)
        for request in requests:
            digest.update(np.array(request.ids, dtype=np.int32).tobytes() + b"|")
        return digest.hexdigest()

    def _generate(self, prompts: list[list[int]]) -> list[str]:
        """The text behind each prompt, up to EOS or the first stop."""
        texts = [""] * len(prompts)
        decoders = [StreamDecoder(self.tokenizer, prompt) for prompt in prompts]
        longest = max(map(len, self.stops))

        def ends(row: int, token: int) -> bool:
            piece = decoders[row].push(token)
            texts[row] += piece
            tail = texts[row][-longest - len(piece) :]
            return token == self.tokenizer.eos_id or any(stop in tail for stop in self.stops)

        continue_greedily(self.model, prompts, self.max_new_tokens, ends, self.trunk[1])
        texts = [text + decoder.flush() for text, decoder in zip(texts, decoders, strict=True)]
        return [cut(text, self.stops) for text in texts]


class Progress:
    """Questions done and time left, a line on stderr every PROGRESS_SECONDS."""

    def __init__(self, name: str, total: int):
        self.name, self.total, self.done, self.computed = name, total, 0, 0
        self.start = self.shown = time.monotonic()

    def advance(self, count: int, computed: bool = True) -> None:
        """computed: whether this run has done the work, and an earlier one has not."""
        self.done += count
        self.computed += count * computed
        now = time.monotonic()
        if self.computed and now - self.shown >= PROGRESS_SECONDS:
            self.shown = now
            rate = self.computed / (now - self.start)
            left = cli.human_seconds((self.total - self.done) / rate)
            print(f"{self.name:<14} {self.done:,} of {self.total:,} questions  {rate:,.1f} a second  {left} left",
                  file=sys.stderr, flush=True)  # fmt: skip
