"""Instruction and preference files to examples: ids that know which of them are learned, made once and kept.

The files, and what a row may look like, are those of solar/chats.py: a .jsonl file, a .json file with a list of rows
(or with a row a line), or a directory of them, in which reference files (*.ref.jsonl) are no data. Examples are kept
like the tokens of text (solar/tokens.py), in a directory whose name covers all that they depend on. A number of their
stream is 2 * id + 1 for an id that is learned, 2 * id for one that is not: so ids and mask cannot come apart, and a
vocabulary of up to 32,768 still takes 16 bits.

Nothing is left out silently. A row that cannot be used stops, or is counted by file and reason; an example that is too
long is dropped or cut, as one says, and counted too.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from solar.chats import Chat, parse_chat, parse_pair
from solar.corpus import BUILT_IN, Corpus, Source, json_row, numbered_lines, read
from solar.losses import IGNORED
from solar.shards import cached, fingerprint, write
from solar.tally import Tally
from solar.tokenizer import TEMPLATES, Tokenizer, encode_chat
from solar.tokens import Tokens

CHATS, PAIRS = "solar chats, version 3", "solar preference pairs, version 3"
TOO_LONG = ("drop", "truncate")
LEARNED = "tokens are learned"  # in a tally


def prepare(
    source: Source,
    tokenizer: Tokenizer,
    cache: Path,
    holdout: float,
    template: str,
    max_length: int,
    pairs: bool = False,
    too_long: Literal["drop", "truncate"] = "drop",
    workers: int | None = None,
    skip_bad_lines: bool = False,
    seed: int = 0,
) -> Path:
    """The directory of a source's examples, CACHE/NAME-HASH, made if it is not there.

    max_length: tokens that an example may have; a pair counts as both of its conversations, side by side.
    too_long: what is longer is dropped, or cut at the end; of a pair the longer side first, so both keep their prompt.
    seed: picks the rejected one of several completions (`parse_pair`).
    A row is held out by what the user says first, or by its "original_question" where it has one: a question and its
    rephrasings are never on both sides, and in a preference file they are on the side where they are in an instruction
    file with the same share.
    HASH covers the bytes of the files and of the tokenizer, and all of these options. Several processes may call this
    at once: one does the work, in `workers` processes, while the others wait for it.
    Raises FileNotFoundError, and ValueError with one line: for the first row that cannot be used (unless
    skip_bad_lines), a file without a row that can, a template that the tokenizer cannot express.
    """
    if template not in TEMPLATES:
        raise ValueError(f"unknown template {template!r}; known are {', '.join(TEMPLATES)}")
    if too_long not in TOO_LONG:
        raise ValueError(f"--too-long {too_long}: one of {', '.join(TOO_LONG)} is wanted")
    encoder = Encoder(tokenizer, template, max_length, too_long, pairs)
    encoder.encode(Chat([("user", "?")], ["!"] * encoder.width))  # what no row can change is said before any is read
    corpus = ChatCorpus(source, template, pairs, seed, skip_bad_lines)
    content = [
        encoder.format, fingerprint(tokenizer), corpus.description, holdout, skip_bad_lines, template, max_length,
        too_long, seed,
    ]  # fmt: skip
    return cached(source, cache, content, lambda out: write(corpus, encoder, out, holdout, workers))


# ------------------------------------------------------------------------------------------------ rows


class ChatCorpus(Corpus):
    """The rows of instruction or preference files that can be used, each as JSON: [place, the fields of a Chat]."""

    nothing = "no example in it is left"

    def __init__(self, source: Source, template: str, pairs: bool, seed: int, skip_bad_lines: bool = False):
        self.template, self.pairs, self.seed = template, pairs, seed
        super().__init__([source], skip_bad_lines)

    def _files(self, source: Source) -> tuple[Path, list[Path]]:
        if source.path in BUILT_IN:
            raise ValueError(f"{source.path} is a corpus of text; this stage takes .jsonl and .json files of rows")
        directory, paths = super()._files(source)
        if not Path(source.path).is_file():
            paths = [path for path in paths if path.suffix in (".json", ".jsonl")]
            paths = [path for path in paths if not path.name.endswith(".ref.jsonl")]  # solar/logps.py
        if not paths:
            raise ValueError(f"{source.path}: no .jsonl or .json file in it")
        return directory, paths

    def _key(self, document: bytes) -> bytes:
        _, *fields = json.loads(document)
        return Chat(*fields).opening().encode()

    def _from_file(self, source: Source, path: Path, sha256: str, advance: Callable[[int], None]) -> Iterator[bytes]:
        used = 0
        for place, chat in self._parsed(path, _rows(path, sha256, advance), self._parse):
            used += 1
            yield json.dumps([f"{path}, {place}", *chat]).encode()
        if not used:
            reasons = "; ".join(f"{first}: {reason}" for reason, (_, first) in self.skipped[path].items())
            raise ValueError(f"{path}: none of its {self.skipped[path].total()} rows can be used; {reasons or 'empty'}")

    def _parse(self, row) -> Chat:
        row = json_row(row) if isinstance(row, bytes) else row
        chat = parse_pair(row, self.seed) if self.pairs else parse_chat(row)
        TEMPLATES[self.template](chat.conversation(0, self.template))  # alpaca has no place for a system message
        return chat


def _rows(path: Path, sha256: str, advance: Callable[[int], None]) -> Iterator[tuple[str, object]]:
    """("line 1", bytes), ... of a file with a row a line, ("row 1", object), ... of one that is a list."""
    if path.suffix == ".jsonl":
        yield from numbered_lines(path, read(path, sha256, advance, lines=True))
        return
    content = b"".join(read(path, sha256, advance))
    try:
        rows = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        if content.lstrip().startswith(b"["):
            raise ValueError(f"{path}: begins like a list, but is not JSON ({error})") from None
        rows = None
    if not isinstance(rows, list):  # the name is given to files of lines too
        if rows is not None and b"\n" in content.strip():
            raise ValueError(f"{path}: one JSON value; a list of rows is wanted, or a row a line")
        yield from numbered_lines(path, content.split(b"\n"))
        return
    yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))


# ------------------------------------------------------------------------------------------------ tokens


class Encoder(NamedTuple):
    """A row to its example: one conversation, or the two of a pair. It goes to the worker processes."""

    tokenizer: Tokenizer
    template: str
    max_length: int
    too_long: str
    pairs: bool

    @property
    def format(self) -> str:
        return PAIRS if self.pairs else CHATS

    @property
    def width(self) -> int:
        """How many conversations make an example."""
        return 2 if self.pairs else 1

    @property
    def highest(self) -> int:
        """The highest number that can be written."""
        return 2 * self.tokenizer.vocab_size - 1

    def encode(self, chat: Chat) -> list[list[int]]:
        """The numbers of each conversation. Of a pair only the answers to be compared are learned, not earlier ones."""
        return [
            [2 * i + learned for i, learned in zip(*encoding, strict=True)]
            for answer in range(len(chat.answers))
            for encoding in [
                encode_chat(self.tokenizer, self.template, chat.conversation(answer, self.template), self.pairs)
            ]
        ]

    def __call__(self, document: bytes, tally: Tally) -> list[list[int]]:
        place, *fields = json.loads(document)
        sides = [[first & ~1, *rest] for first, *rest in self.encode(Chat(*fields))]  # nothing stands before the first
        total, longest = sum(map(len, sides)), max(map(len, sides))
        cut = total > self.max_length
        if cut:
            if self.too_long == "drop":
                tally.add(f"dropped, longer than {self.max_length} tokens", place)
                return []
            keep = max(self.max_length - (total - longest), self.max_length // self.width)
            sides = [side[:keep] for side in sides]
        if any(not any(number & 1 for number in side) for side in sides):
            tally.add(f"dropped, since nothing of the answer is within {self.max_length} tokens", place)
            return []
        if self.pairs and sides[0] == sides[1]:
            tally.add("dropped, since chosen and rejected are the same tokens", place)
            return []
        if cut:
            tally.add(f"cut to {self.max_length} tokens", place)
        tally.add(LEARNED, place, sum(number & 1 for side in sides for number in side))
        return sides


# ------------------------------------------------------------------------------------------------ reading


class Example(NamedTuple):
    """One conversation: (n,) int64 ids, and (n,) bool which of them are learned."""

    ids: np.ndarray
    learned: np.ndarray


class Chats(Tokens):
    """The examples of one split, "train" or "heldout", of a directory that `prepare` gave, mapped into memory.

    len(): how many there are; they are numbered 0, 1, ... in the order of the files. Raises as `Tokens` does.
    """

    format, per_id, width = CHATS, 2, 1

    def __len__(self) -> int:
        return (len(self._offsets) - 1) // self.width

    def lengths(self) -> np.ndarray:
        """(len,) tokens of each example, all its conversations together."""
        return np.diff(self._offsets[:: self.width])

    def example(self, index: int) -> list[Example]:
        """The conversations of an example: one, or chosen and rejected."""
        ends = self._offsets[index * self.width : (index + 1) * self.width + 1].tolist()
        numbers = self.read(ends[0], ends[-1])
        parts = np.split(numbers, [end - ends[0] for end in ends[1:-1]])
        return [Example(part >> 1, (part & 1).astype(bool)) for part in parts]

    def units(self, indices: Iterable[int] | None = None) -> Iterator[tuple[int, list[Example]]]:
        """(index, conversations) of these examples, or of all, in order."""
        for index in range(len(self)) if indices is None else indices:
            yield index, self.example(index)

    def key(self) -> str:
        """64 hexadecimal digits that tell the examples of a split apart from any others, their order included."""
        hashes = {name: digest for name, digest in self.manifest.hashes.items() if name.startswith(self.split)}
        return hashlib.sha256(json.dumps([self.format, sorted(hashes.items())]).encode()).hexdigest()

    def tally(self) -> Tally:
        """What was counted when this split was made: dropped and cut examples, learned tokens."""
        return Tally(self.manifest.counts[self.split])


class Pairs(Chats):
    """Preference pairs: two conversations an example, the chosen one and the rejected one, with one prompt."""

    format, width = PAIRS, 2


def collate(rows: Sequence[Sequence[Example]], length: int) -> dict[str, Tensor]:
    """Rows of conversations as int64 tensors (B, length): input_ids; labels, the same ids where they are learned, -100
    elsewhere; document_ids, which count the conversations of a row from 0.

    What is left of a row is padding: id 0, a document of its own, not learned.
    """
    shape = len(rows), length
    input_ids, labels, document_ids = np.zeros(shape, np.int64), np.full(shape, IGNORED), np.zeros(shape, np.int64)
    for b, row in enumerate(rows):
        start = 0
        for number, (ids, learned) in enumerate(row):
            here = slice(start, start := start + len(ids))
            input_ids[b, here], document_ids[b, here] = ids, number
            labels[b, here] = np.where(learned, ids, IGNORED)
        document_ids[b, start:] = len(row)
    batch = {"input_ids": input_ids, "labels": labels, "document_ids": document_ids}
    return {name: torch.from_numpy(array) for name, array in batch.items()}
