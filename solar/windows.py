"""Texts cut into windows: what a model reads at once, and which of its tokens are counted.

A text is longer than what a model reads, so it is read in windows of W tokens, each beginning S tokens (the stride)
behind the one before. Of a window those tokens are counted that no window before it has counted. So every token is
counted once, given at least the W - S tokens before it; a smaller stride gives more context and costs W / S times the
work. S = W are windows that do not overlap.

What opens a window has nothing before it and cannot be counted: with S < W that is the first token of the text alone,
and none if BOS stands before the text; with S = W the first one of every further window.

Tokens differ between tokenizers, bytes do not: bits per byte compare models of different vocabularies. Each byte of a
text belongs to one token, so that what is counted of both is the same stretch of text.

Shapes: B windows side by side, T tokens of the longest.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from solar import cli, problems
from solar.corpus import BUILT_IN, PROBLEMS, Corpus, Source, from_text, read, source_files
from solar.tokenizer import Tokenizer

HOLDOUT = 0.02  # of the built-in corpora: the share that `make base` and `make pretrain` do not train on

# ------------------------------------------------------------------------------------------------ texts


def read_texts(path: str) -> list[tuple[str, Iterator[str]]]:
    """(name, its texts) of a file, of every file of a directory, or of a built-in corpus: the held-out part of that.

    A .jsonl file holds a text a line, any other file is one text. Raises FileNotFoundError, and ValueError that names
    file and line for what is no text, or a directory without files.
    """
    if path == "problems":
        return [(path, problems.documents(0, round(PROBLEMS * HOLDOUT), "heldout"))]
    if path in BUILT_IN:
        documents = Corpus([Source(path)]).documents(HOLDOUT, _nobody)
        return [(path, (document.decode() for document, held_out in documents if held_out))]
    files = source_files(Source(path))[1]
    if not files:
        raise ValueError(f"{path}: no file in this directory; hidden ones are left out")
    return [(str(file), _texts_of_file(file)) for file in files]


def _texts_of_file(path: Path) -> Iterator[str]:
    if path.suffix == ".jsonl":
        documents = Corpus([Source(str(path))]).documents(0, _nobody)
        yield from (document.decode() for document, _ in documents)
    else:
        yield b"".join(from_text(path, read(path, cli.file_sha256(path), _nobody))).decode()


def _nobody(_: int) -> None:
    """Nobody is told how many bytes have been read."""


def encode(tokenizer: Tokenizer, text: str) -> tuple[np.ndarray, np.ndarray]:
    """(T,) the ids of a text, without BOS, and (T,) how many of its bytes belong to each: together all of them.

    A byte belongs to the last token that begins at its character or before: so what a tokenizer adds, drops or
    normalises changes no count.
    """
    ids, spans = tokenizer.encode_with_offsets(text)
    characters = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    lengths = 1 + (characters > 0x7F) + (characters > 0x7FF) + (characters > 0xFFFF)
    byte_at = np.concatenate([[0], lengths.cumsum()])  # where each character begins, and the end
    edges = [0, *(start for start, _ in spans[1:]), len(text)] if ids else [0]
    return np.array(ids, dtype=np.int64), np.diff(byte_at[edges])


# ------------------------------------------------------------------------------------------------ windows


class Window(NamedTuple):
    """Ids that a model reads at once, of which the last `counted` are counted; they stand for `nbytes` bytes.

    block: which of the blocks it belongs to, over which the standard error is taken.
    """

    ids: np.ndarray
    counted: int
    nbytes: int
    block: int


def check_window(window: int, stride: int) -> None:
    """Raise ValueError unless 1 <= stride <= window and window >= 2."""
    if window < 2:
        raise ValueError(f"--window {window}: at least 2 tokens are needed, one to predict and one before it")
    if not 1 <= stride <= window:
        raise ValueError(f"--stride {stride}: must be from 1 to the window of {window}")


def cut(ids: np.ndarray, nbytes: np.ndarray, window: int, stride: int, block: int = 0) -> list[Window]:
    """The windows of one text, given the bytes of each id. block: the number of its first block.

    A block is what is counted of W positions one after the other, to within a stride. Raises as `check_window` does.
    """
    check_window(window, stride)
    found, counted = [], 1  # the first token is no prediction
    for start in range(0, len(ids), stride):
        stop, first = min(start + window, len(ids)), max(counted, start + 1)
        if first < stop:
            number = block + first // window
            found.append(Window(ids[start:stop], stop - first, int(nbytes[first:stop].sum()), number))
        counted = stop
        if stop == len(ids):
            break
    return found


def batches(windows: Sequence[Window], batch_tokens: int) -> list[list[int]]:
    """The windows' indices in batches of at most batch_tokens, padding included (or of one window), the longest first.

    The first batch is the largest, so that memory which does not suffice shows at once.
    """
    order = sorted(range(len(windows)), key=lambda i: -len(windows[i].ids))
    found, rows = [], 0
    for i in order:
        if rows == 0:
            found.append([])
            rows = max(batch_tokens // len(windows[i].ids), 1)
        found[-1].append(i)
        rows -= 1
    return found


class Batch(NamedTuple):
    """(B, T) each: ids; labels, -100 where nothing is counted; real, False where a shorter window is padded.

    Padding stands behind, where no token ever sees it.
    """

    ids: Tensor
    labels: Tensor
    real: Tensor


def collate(windows: Sequence[Window], device: torch.device | str = "cpu") -> Batch:
    """Windows side by side."""
    longest = max(len(window.ids) for window in windows)
    ids = torch.zeros(len(windows), longest, dtype=torch.int64)
    labels, real = torch.full_like(ids, -100), torch.zeros_like(ids, dtype=torch.bool)
    for row, window in enumerate(windows):
        length = len(window.ids)
        ids[row, :length] = torch.as_tensor(window.ids)
        labels[row, length - window.counted : length] = ids[row, length - window.counted : length]
        real[row, :length] = True
    return Batch(ids.to(device), labels.to(device), real.to(device))


# ------------------------------------------------------------------------------------------------ windows of texts


def windows_of(
    tokenizer: Tokenizer, texts: Iterable[str], window: int, stride: int, bos: bool, tokens: int | None = None
) -> list[Window]:
    """The windows of texts one after the other. bos: put it before each. tokens: of how many (None: all), without BOS.

    Raises ValueError where nothing can be counted.
    """
    found: list[Window] = []
    for text in texts:
        ids, nbytes = (values[:tokens] for values in encode(tokenizer, text))
        found += cut(*_opened(ids, nbytes, tokenizer, bos), window, stride, found[-1].block + 1 if found else 0)
        if tokens is not None and (tokens := tokens - len(ids)) == 0:
            break
    if not found:
        raise ValueError("no token to count: a text of at least 2 tokens is needed")
    return found


def _opened(ids: np.ndarray, nbytes: np.ndarray, tokenizer: Tokenizer, bos: bool) -> tuple[np.ndarray, np.ndarray]:
    """The same with BOS before it, which stands for no byte, if there is one to be had."""
    if not bos or tokenizer.bos_id is None:
        return ids, nbytes
    return np.concatenate([[tokenizer.bos_id], ids]), np.concatenate([[0], nbytes])


def deal(
    sources: Sequence[tuple[str, Iterator[str]]],
    tokenizer: Tokenizer,
    window: int,
    bos: bool,
    sizes: Sequence[int],
    fewer: bool = False,
) -> list[list[Window]]:
    """Samples of at least `sizes` counted tokens, in windows that do not overlap: no two samples share one.

    The windows come from all sources, from the beginning of each: the one that has given the fewest tokens gives the
    next. sources: as `read_texts` gives them. Raises ValueError if there are not so many tokens; or none, if `fewer`
    will do.
    """
    enough = 16 * (sum(sizes) + window)  # characters of a text: what lies behind need not be tokenised

    def windows(texts: Iterator[str]) -> Iterator[Window]:
        for text in texts:
            ids, nbytes = encode(tokenizer, text[:enough])
            yield from cut(*_opened(ids, nbytes, tokenizer, bos), window, window)

    streams = {name: windows(found) for name, found in sources}
    given = dict.fromkeys(streams, 0)
    samples: list[list[Window]] = []
    for size in sizes:
        sample, tokens = [], 0
        while tokens < size:
            if not streams and fewer and sample:
                break
            if not streams:
                raise ValueError(
                    f"{', '.join(given)}: {sum(given.values()):,} tokens in all, {sum(sizes):,} are wanted; "
                    "give more text, or ask for fewer tokens"
                )
            name = min(streams, key=given.__getitem__)
            if (taken := next(streams[name], None)) is None:
                del streams[name]
                continue
            sample.append(taken._replace(block=len(sample)))
            tokens += taken.counted
            given[name] += taken.counted
        samples.append(sample)
    return samples
