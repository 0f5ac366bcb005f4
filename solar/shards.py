"""Text to directories of tokens (solar/tokens.py), once, in as many processes as there are cores.

A document becomes BOS ids EOS, and is on the side of training or held out. The directory appears under its name whole
or not at all, and the name that `prepare` gives it covers all that determines the tokens, so what is there can be used
as it is.
"""

import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from solar import cli
from solar.corpus import BUILT_IN, Corpus, Source
from solar.tally import Tally
from solar.tokenizer import Tokenizer
from solar.tokens import FORMAT, SPLITS, Manifest, SplitWriter, is_prepared

GROUP_BYTES = 512 << 10  # of text that a worker process gets at once
BYTES_PER_WORKER = 16 << 20  # a process takes seconds to start: less than this is not worth one more


def prepare(
    source: Source,
    tokenizer: Tokenizer,
    cache: Path,
    holdout: float,
    workers: int | None = None,
    skip_bad_lines: bool = False,
) -> Path:
    """The directory of a source's tokens: `source.path` if that is one, else CACHE/NAME-HASH, made if it is not there.

    HASH covers all that determines the tokens: the bytes of the source and of the tokenizer, and the options. So the
    source is hashed on every call (at 1 to 2 GB/s): file dates could not replace that, `cp -p` and rsync set them.
    Several processes may call this at once: one does the work, in `workers` processes, while the others wait for it.

    A directory that was given is verified whole, since it may have been copied; its own held-out documents count.
    Raises FileNotFoundError for a source that is not there, ValueError with one line for what cannot be used.
    """
    _check_holdout(holdout)
    given = Path(source.path)
    if source.path not in BUILT_IN and is_prepared(given):
        if source.limit is not None:
            raise ValueError(f"{given} is tokenised already: a limit ({source.limit}) is for text")
        manifest = Manifest(given)
        if manifest.tokenizer != (ours := fingerprint(tokenizer)):
            raise ValueError(
                f"{given} was made with the tokenizer {manifest.tokenizer[:16]}, the model's is {ours[:16]}: "
                "make it again from the text, with the model's tokenizer"
            )
        manifest.verify()
        return given
    corpus = Corpus([source], skip_bad_lines)
    content = [FORMAT, fingerprint(tokenizer), corpus.description, holdout, skip_bad_lines]
    return cached(source, cache, content, lambda out: tokenise(corpus, tokenizer, out, holdout, workers))


def cached(source: Source, cache: Path, content: list, make: Callable[[Path], object]) -> Path:
    """CACHE/NAME-HASH, after `make` of it if it is not there. HASH is of `content`, JSON that covers all that matters.

    Of several processes that want the same one makes it, while the others wait.
    """
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    out = cache / f"{Path(source.path).resolve().stem or 'data'}-{key}"
    if out.exists():
        return out
    cache.mkdir(parents=True, exist_ok=True)
    with _alone(cache / f".{out.name}.lock"):
        try:
            if not out.exists():
                make(out)
        except FileExistsError:  # where the filesystem has no locks another process may have come first
            if not is_prepared(out):
                raise
    return out


class TextEncoder(NamedTuple):
    """A document to one sequence: BOS ids EOS. Such an encoder goes to the worker processes, so it can be pickled.

    `format` names what is written; `width` is how many sequences stand together, one behind the other, for one row.
    """

    tokenizer: Tokenizer

    format, width = FORMAT, 1

    @property
    def highest(self) -> int:
        """The highest number that can be written."""
        return self.tokenizer.vocab_size - 1

    def __call__(self, document: bytes, tally: Tally) -> list[list[int]]:
        return [self.tokenizer.encode(document.decode(), bos=True, eos=True)]


def tokenise(
    corpus: Corpus, tokenizer: Tokenizer, out: Path, holdout: float, workers: int | None = None, force: bool = False
) -> Manifest:
    """Write the tokens of a corpus to the directory `out`, which appears whole or not at all.

    workers: processes, one a core if None; for 1, or little text, none is started. What is written does not depend on
    them, and memory not on the size of the corpus. Raises ValueError for a corpus without a document.
    """
    made = write(corpus, TextEncoder(tokenizer), out, holdout, workers, force)
    for path, skipped in corpus.skipped.items():
        if skipped:
            warnings.warn(f"{path}: {skipped.total()} lines that could not be read were skipped", stacklevel=2)
    return made


def write(
    corpus: Corpus, encoder, out: Path, holdout: float, workers: int | None = None, force: bool = False
) -> Manifest:
    """`tokenise`, for any encoder: what it makes of each document, as the numbers of shards and their offsets."""
    _check_holdout(holdout)
    if workers is not None and workers < 1:
        raise ValueError(f"--workers {workers}: at least 1 is needed")
    workers = min(workers or os.cpu_count() or 1, corpus.size // BYTES_PER_WORKER + 1)
    name = ", ".join(source.path for source in corpus.sources)
    dtype = "<u2" if encoder.highest < 1 << 16 else "<u4"
    with cli.publish(out, force) as folder:
        progress = cli.Progress("tokenising", corpus.size)
        writers = [SplitWriter(folder, split, dtype) for split in SPLITS]
        groups = _grouped(corpus.documents(holdout, progress.advance))
        for encoded in _encode_all(groups, encoder, dtype, workers):
            for writer, part in zip(writers, encoded, strict=True):
                writer.append(*part)
        for writer in writers:
            writer.close()
        progress.close()
        train, held_out = writers
        if not train.documents + held_out.documents:
            train.tally.merge(held_out.tally)
            raise ValueError("; ".join([f"{name}: {corpus.nothing}", *train.tally.lines()]))
        if holdout and not held_out.documents:
            warnings.warn(
                f"{name}: none of its {train.documents // encoder.width} documents fell to the held-out side: nothing "
                "to evaluate on",
                stacklevel=3,
            )
        manifest = {
            "format": encoder.format,
            "tokenizer": fingerprint(encoder.tokenizer),
            "sources": corpus.description,
            "holdout": holdout,
            "skip_bad_lines": corpus.skip_bad_lines,
            "skipped_lines": sum(skipped.total() for skipped in corpus.skipped.values()),
            "skipped": {str(path): skipped for path, skipped in corpus.skipped.items() if skipped},
            "counts": {writer.split: writer.tally for writer in writers},
            "dtype": dtype,
            "shard_tokens": train.shard_tokens,
            "splits": {
                writer.split: {
                    "documents": writer.documents, "tokens": writer.tokens, "highest_id": writer.highest_id,
                }
                for writer in writers
            },
            "files": {name: entry for writer in writers for name, entry in writer.files.items()},
        }  # fmt: skip
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return Manifest(out, encoder.format)


def fingerprint(tokenizer: Tokenizer) -> str:
    """sha256 of all that decides which ids a text becomes: the tokenizer's file, which ids are BOS and EOS, whether it
    adds BOS by habit, and the ids of its pieces, to which the files beside it can add."""
    content = hashlib.sha256(tokenizer.path.read_bytes())
    content.update(f"{tokenizer.bos_id} {tokenizer.eos_id} {tokenizer.adds_bos}".encode())
    content.update(repr(tokenizer.vocabulary()).encode())
    return content.hexdigest()


def _check_holdout(holdout: float) -> None:
    if not 0 <= holdout < 1:
        raise ValueError(f"--holdout {holdout}: a share of the documents is wanted, at least 0 and below 1")


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time. The file stays: if it were removed, one process could hold the old one, one the new."""
    with open(path, "w") as file:
        with contextlib.suppress(OSError):  # no locks on this filesystem
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


Group = list[tuple[bytes, bool]]
Encoded = list[tuple[np.ndarray, np.ndarray, Tally]]  # per split: ids of all documents joined, their lengths, counts


def _grouped(documents: Iterable[tuple[bytes, bool]]) -> Iterator[Group]:
    group, size = [], 0
    for document in documents:
        group.append(document)
        size += len(document[0])
        if size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _encode(encoder, dtype: str, group: Group) -> Encoded:
    splits = []
    for split in (False, True):
        tally = Tally()
        documents = [sequence for text, side in group if side == split for sequence in encoder(text, tally)]
        ids = np.fromiter(chain.from_iterable(documents), dtype)
        splits.append((ids, np.array([len(document) for document in documents], np.int64), tally))
    return splits


def _encode_all(groups: Iterable[Group], encoder, dtype: str, workers: int) -> Iterator[Encoded]:
    """`_encode` of every group, in their order, with only so many of them in memory that no worker has to wait."""
    if workers == 1:
        yield from (_encode(encoder, dtype, group) for group in groups)
        return
    # A forked process inherits the locks of threads that it does not have, torch's among them: so spawn.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (encoder, dtype))
    try:
        yield from _in_order(pool, _work, groups, ahead=2 * workers)
    except BrokenExecutor:
        raise ValueError(
            f"one of the {workers} tokenising processes was killed, perhaps for want of memory: give fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(pool: Executor, function: Callable, items: Iterable, ahead: int) -> Iterator:
    pending = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


_worker: tuple[Callable, str] = None  # in a worker process: read once, not with every group


def _start_worker(encoder: Callable, dtype: str) -> None:
    global _worker
    _worker = encoder, dtype
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes: the parent ends its workers
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """A parent that is killed outright closes no queue, so its workers would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(group: Group) -> Encoded:
    return _encode(*_worker, group)
