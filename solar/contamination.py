"""Contamination: whether a training example holds text of a benchmark.

**The n-gram.** An example is contaminated if it shares n words in a row with a text of a benchmark, n = 13 as in GPT-3
(arXiv:2005.14165, appendix C): shorter runs are shared by chance, by texts on the same subject. A benchmark's text of 8
to 12 words is looked for as a whole; shorter ones are names, numbers and choices, which say nothing.

**Words.** Letters in lower case, in Unicode's compatibility form; punctuation parts words and is otherwise ignored, so
are currency and per cent signs; an apostrophe is dropped ("don't" is "dont"). A number is a word by its value: 1,000 is
1000 and 18.0 is 18. Numbers that are spelled out are words like others. GSM8K's calculator marks are left out.

**Other numbers.** Two mathematics problems of one template with other numbers are different problems, but may well
share 13 words: then the rule above leaves one out that is none of the benchmark's. With `keep_other_numbers`, where the
benchmark's text holds numbers, a shared n-gram counts only if the example holds all of them, as often; so do 2n words
in a row, for an excerpt lacks some of the numbers and is a copy, unless a number ends them where the example has
another one. This misses real copies: those in which one number is another, and those in which one is left out with its
sentence, or spelled out, unless 2n words in a row are left. So it is not for claims that a benchmark was not seen.

What is shared is found by hash and then compared word by word, so nothing is dropped for a collision. Memory holds the
benchmarks, about 100 bytes a word, and one example at a time.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from solar.rows import BadRows, Row, read_any, read_rows, strings
from solar.seeds import CALCULATOR

WORDS = 13
SHORTEST = 8  # words of a benchmark's text; GPT-3's lower end too
WORD = re.compile(r"[^\W\d_]+|\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?")
APOSTROPHES = str.maketrans("", "", "'’‘`´")
FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, from the golden ratio: the hash of words w1 w2 ... is a polynomial in it
END, UNKNOWN, BEYOND = -1, -2, -3  # of a benchmark's text; a word of no benchmark; behind all words of an example


def words(text: str) -> list[str]:
    """The words of a text, as they are compared."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    text = CALCULATOR.sub("", text).translate(APOSTROPHES).casefold()
    return [_value(word) if "," in word or "." in word else word for word in WORD.findall(text)]


def _value(number: str) -> str:
    number = number.replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number


class Text(NamedTuple):
    """A text of a benchmark, and where it stands."""

    path: Path
    line: int
    text: str


class Shared(NamedTuple):
    """What an example shares with a benchmark: the words, and the file and line that they stand in."""

    words: str
    path: Path
    line: int


class Benchmarks:
    """The texts of benchmarks, to be held against examples.

    `texts` counts those that are looked for, `short` those that are not, of fewer than 8 words (or than `ngram`).
    keep_other_numbers: as the head of this file says. Raises ValueError for an ngram below 2, and if nothing is
    left to look for.
    """

    def __init__(self, texts: Iterable[Text], ngram: int = WORDS, keep_other_numbers: bool = False):
        if ngram < 2:
            raise ValueError(f"an n-gram of {ngram} words: it must have at least 2")
        self.ngram, self.keep_other_numbers = ngram, keep_other_numbers
        self.short = 0
        self._vocabulary: dict[str, int] = {}
        self._places: list[tuple[Path, int]] = []
        self._numbers: list[Counter[int]] = []  # of each text
        ids: list[np.ndarray] = []
        for path, line, text in texts:
            found = words(text)
            if len(found) < min(SHORTEST, ngram):
                self.short += 1
                continue
            own = [self._vocabulary.setdefault(word, len(self._vocabulary)) for word in found]
            self._places.append((path, line))
            self._numbers.append(Counter(i for i, word in zip(own, found, strict=True) if word[0].isdigit()))
            ids.append(np.array([*own, END], np.int32))
        self.texts = len(ids)
        if not ids:
            raise ValueError(f"no text of {min(SHORTEST, ngram)} words or more in the benchmarks")
        self._starts = np.cumsum([0, *map(len, ids)])[:-1]
        self._ids = np.concatenate([*ids, np.full(2 * ngram, END, np.int32)])
        self._words = [*self._vocabulary]
        self._index = self._build(np.array([len(own) - 1 for own in ids]))

    def _build(self, lengths: np.ndarray) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """{words: (sorted hashes, position of each)}: all n-grams, and the shorter texts, each by its own length."""
        index = {}
        inside = self._ids != END
        for length, hashes in _hashes(self._ids, range(min(SHORTEST, self.ngram), self.ngram + 1)):
            if length < self.ngram:
                positions = self._starts[lengths == length]
            else:
                ends = np.concatenate([[0], np.cumsum(~inside)])
                positions = np.flatnonzero(ends[length:] == ends[:-length])
            if len(positions):
                found = hashes[positions]
                order = np.argsort(found, kind="stable")
                index[length] = found[order], positions[order]
        return index

    def shared(self, texts: Iterable[str]) -> Shared | None:
        """The first contamination found in the texts of one example, or None."""
        spoken = []
        for text in texts:
            spoken += words(text)
            spoken.append("")  # no benchmark's word: no n-gram goes on from one text to the next
        known_id = self._vocabulary.get
        ids = [known_id(word, UNKNOWN) for word in spoken]
        own, present = np.array(ids, np.int32), None
        for length, hashes in _hashes(own, self._index):
            known, _ = self._index[length]
            first = np.searchsorted(known, hashes)
            hit = np.flatnonzero(known[np.minimum(first, len(known) - 1)] == hashes)
            if not len(hit):
                continue
            present = Counter(ids) if present is None else present
            if found := self._verified(spoken, own, hit, hashes[hit], length, present):
                return found
        return None

    def _verified(
        self,
        spoken: list[str],
        own: np.ndarray,
        hit: np.ndarray,
        hashes: np.ndarray,
        length: int,
        present: Counter[int],
    ) -> Shared | None:
        """The first of an example's n-grams, at `hit`, that is in a benchmark word for word and counts."""
        known, positions = self._index[length]
        first, last = (np.searchsorted(known, hashes, side) for side in ("left", "right"))
        count = last - first
        at = np.repeat(hit, count)
        place = positions[np.arange(count.sum()) - np.repeat(np.cumsum(count) - count - first, count)]
        reach = np.arange(2 * length)
        padded = np.concatenate([own, np.full(2 * length, BEYOND, np.int32)])
        equal = padded[at[:, None] + reach] == self._ids[place[:, None] + reach]
        same, twice = equal[:, :length].all(1), equal.all(1)
        text = np.searchsorted(self._starts, place, "right") - 1
        for i in np.flatnonzero(same):
            if not self.keep_other_numbers or self._numbers[text[i]] <= present:
                end = length
            elif twice[i] and not self._other_number(spoken, own, at[i], place[i]):
                end = 2 * length
            else:
                continue
            shared = " ".join(self._words[word] for word in self._ids[place[i] : place[i] + end])
            return Shared(shared, *self._places[text[i]])
        return None

    def _other_number(self, spoken: list[str], own: np.ndarray, at: int, place: int) -> bool:
        """Whether the words that are shared here and around end where each side has a number, but not the same."""
        for step in (1, -1):
            mine, theirs = at, place
            while own[mine] == self._ids[theirs]:
                mine, theirs = mine + step, theirs + step
                if not (0 <= mine < len(own) and theirs >= 0):
                    break
            else:
                word = self._ids[theirs]
                if spoken[mine][:1].isdigit() and word >= 0 and self._words[word][0].isdigit():
                    return True
        return False


def _hashes(ids: np.ndarray, lengths: Iterable[int]) -> Iterator[tuple[int, np.ndarray]]:
    """(words, hash of the n-gram of so many words that begins at each place), for lengths in ascending order.

    A hash is that of one word less, times the factor, plus the next word's id: one pass gives all lengths.
    """
    wanted = sorted(lengths)
    ids = ids.astype(np.uint64)
    hashes = np.zeros(len(ids), np.uint64)
    for length in range(1, min(wanted[-1], len(ids)) + 1):
        stop = len(ids) - length + 1
        hashes = hashes[:stop] * FACTOR + ids[length - 1 :]
        if length in wanted:
            yield length, hashes


def read_texts(paths: Iterable[Path], bad: BadRows) -> Iterator[Text]:
    """All strings of benchmark files, whatever their fields are called. Raises ValueError as `read_any` does."""
    for path in paths:
        for row in read_any(path, bad):
            yield from (Text(path, row.line, text) for text in strings(row.value))


def sift(path: Path, benchmarks: Benchmarks, bad: BadRows) -> Iterator[tuple[Row, Shared | None]]:
    """(example, what it shares with a benchmark or None) of a .jsonl or .json file of objects.

    Objects without text go to `bad`, as do lines that are none. Raises ValueError for a file without any example.
    """
    found = False
    for row in read_rows(path, bad):
        if not isinstance(row.value, dict) or not any(text.strip() for text in strings([*row.value.values()])):
            bad.add(path, row.line, "no object with text in it")
            continue
        found = True
        yield row, benchmarks.shared(strings(row.value))
    if not found:
        raise ValueError(f"{path}: no example in it that can be used")
