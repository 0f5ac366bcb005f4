"""Text to token shards, once, and the shards back as one stream of ids.

A model learns from ids, so text becomes ids once, in a directory that is then mapped into memory:

    manifest.json      what the tokens were made from, counts, the size and sha256 of each file below
    train-00000.bin    ids of all documents, one behind the other, each BOS ids EOS; little-endian uint16, or uint32
    train-00001.bin    ... if the vocabulary has more than 65,536 ids; every file but the last holds equally many
    train.offsets      little-endian int64: where each document begins in that stream, and last, where the stream ends
    heldout-...        the same for the documents that training never sees

Writing and reading trust nobody. The directory appears under its name whole or not at all, and the name that `prepare`
gives it covers all that determines the tokens, so what is there can be used as it is. A reader compares each file's
size with the manifest, and the highest id with the model's vocabulary, before anything is learned.
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
from solar.tokenizer import Tokenizer

# ------------------------------------------------------------------------------------------------ tokenising

FORMAT = "solar token shards, version 1"
SPLITS = ("train", "heldout")
SHARD_TOKENS = 1 << 28  # in a file: 0.5 GB of uint16
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
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    out = cache / f"{given.resolve().stem or 'data'}-{key}"
    if out.exists():
        return out
    cache.mkdir(parents=True, exist_ok=True)
    with _alone(cache / f".{out.name}.lock"):
        try:
            if not out.exists():
                tokenise(corpus, tokenizer, out, holdout, workers)
        except FileExistsError:  # where the filesystem has no locks another process may have come first
            if not is_prepared(out):
                raise
    return out


def tokenise(
    corpus: Corpus, tokenizer: Tokenizer, out: Path, holdout: float, workers: int | None = None, force: bool = False
) -> "Manifest":
    """Write the tokens of a corpus to the directory `out`, which appears whole or not at all.

    workers: processes, one a core if None; for 1, or little text, none is started. What is written does not depend on
    them, and memory not on the size of the corpus. Raises ValueError for a corpus without a document.
    """
    _check_holdout(holdout)
    if workers is not None and workers < 1:
        raise ValueError(f"--workers {workers}: at least 1 is needed")
    workers = min(workers or os.cpu_count() or 1, corpus.size // BYTES_PER_WORKER + 1)
    name = ", ".join(source.path for source in corpus.sources)
    dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
    with cli.publish(out, force) as folder:
        progress = cli.Progress("tokenising", corpus.size)
        writers = [SplitWriter(folder, split, dtype) for split in SPLITS]
        groups = _grouped(corpus.documents(holdout, progress.advance))
        for encoded in _encode_all(groups, tokenizer, dtype, workers):
            for writer, (ids, lengths) in zip(writers, encoded, strict=True):
                writer.append(ids, lengths)
        for writer in writers:
            writer.close()
        progress.close()
        train, held_out = writers
        if not train.documents + held_out.documents:
            raise ValueError(f"{name}: no text in it, so there is nothing to learn from")
        if holdout and not held_out.documents:
            warnings.warn(
                f"{name}: none of its {train.documents} documents fell to the held-out side: nothing to evaluate on",
                stacklevel=2,
            )
        for path, count in corpus.skipped.items():
            if count:
                warnings.warn(f"{path}: {count} lines that could not be read were skipped", stacklevel=2)
        manifest = {
            "format": FORMAT,
            "tokenizer": fingerprint(tokenizer),
            "sources": corpus.description,
            "holdout": holdout,
            "skip_bad_lines": corpus.skip_bad_lines,
            "skipped_lines": sum(corpus.skipped.values()),
            "dtype": dtype,
            "shard_tokens": SHARD_TOKENS,
            "splits": {
                writer.split: {
                    "documents": writer.documents, "tokens": writer.tokens, "highest_id": writer.highest_id,
                }
                for writer in writers
            },
            "files": {name: entry for writer in writers for name, entry in writer.files.items()},
        }  # fmt: skip
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return Manifest(out)


def fingerprint(tokenizer: Tokenizer) -> str:
    """sha256 of all that decides which ids a text becomes: the tokenizer's file, and which ids are BOS and EOS."""
    content = hashlib.sha256(tokenizer.path.read_bytes()).hexdigest()
    return hashlib.sha256(f"{content} {tokenizer.bos_id} {tokenizer.eos_id}".encode()).hexdigest()


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
Encoded = list[tuple[np.ndarray, np.ndarray]]  # for each split: ids of all documents joined, and the documents' lengths


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


def _encode(tokenizer: Tokenizer, dtype: str, group: Group) -> Encoded:
    splits = []
    for split in (False, True):
        documents = [
            tokenizer.encode(text.decode(), bos=True, eos=True) for text, held_out in group if held_out == split
        ]
        ids = np.fromiter(chain.from_iterable(documents), dtype)
        splits.append((ids, np.array([len(document) for document in documents], np.int64)))
    return splits


def _encode_all(groups: Iterable[Group], tokenizer: Tokenizer, dtype: str, workers: int) -> Iterator[Encoded]:
    """`_encode` of every group, in their order, with only so many of them in memory that no worker has to wait."""
    if workers == 1:
        yield from (_encode(tokenizer, dtype, group) for group in groups)
        return
    # A forked process inherits the locks of threads that it does not have, torch's among them: so spawn.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (tokenizer, dtype))
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


_worker: tuple[Tokenizer, str] = None  # in a worker process: read once, not with every group


def _start_worker(tokenizer: Tokenizer, dtype: str) -> None:
    global _worker
    _worker = tokenizer, dtype
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes: the parent ends its workers
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """A parent that is killed outright closes no queue, so its workers would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(group: Group) -> Encoded:
    return _encode(*_worker, group)


class SplitWriter:
    """The shards and the offsets of one split, written as the documents come."""

    def __init__(self, folder: Path, split: str, dtype: str):
        self.folder, self.split, self.dtype = folder, split, np.dtype(dtype)
        self.documents, self.tokens, self.highest_id = 0, 0, -1
        self.files: dict[str, dict] = {}  # name -> {"bytes", "sha256"}
        self._shard, self._offsets = None, HashedFile(folder / f"{split}.offsets")

    def append(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Add documents: their ids joined, and how many each of them has."""
        ends = self.tokens + np.cumsum(lengths)
        self._offsets.write((ends - lengths).astype("<i8").tobytes())
        self.documents += len(lengths)
        self.highest_id = max(self.highest_id, int(ids.max()) if len(ids) else -1)
        while len(ids):
            number, filled = divmod(self.tokens, SHARD_TOKENS)
            if filled == 0:
                self._close(self._shard)
                self._shard = HashedFile(self.folder / _shard_name(self.split, number))
            part, ids = np.split(ids, [SHARD_TOKENS - filled])
            self._shard.write(part.astype(self.dtype).tobytes())
            self.tokens += len(part)

    def close(self) -> None:
        """Write what is left; `files` is complete then."""
        self._offsets.write(np.array([self.tokens], "<i8").tobytes())
        self._close(self._shard)
        self._close(self._offsets)

    def _close(self, file: "HashedFile | None") -> None:
        if file is not None:
            self.files[file.path.name] = file.close()


class HashedFile:
    """A new file whose hash and size are known when it is closed, without reading it again."""

    def __init__(self, path: Path):
        self.path, self._file, self._digest, self._bytes = path, open(path, "xb"), hashlib.sha256(), 0  # noqa: SIM115

    def write(self, content: bytes) -> None:
        self._file.write(content)
        self._digest.update(content)
        self._bytes += len(content)

    def close(self) -> dict:
        self._file.close()
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}


def _shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05}.bin"


# ------------------------------------------------------------------------------------------------ reading tokens


class SplitCounts(NamedTuple):
    """What a manifest says about one split."""

    documents: int
    tokens: int
    highest_id: int


class Manifest:
    """The manifest of a directory of tokens, after a look at the size of every file that it names.

    Raises FileNotFoundError if there is none, ValueError if it is damaged or a file has another size than it says.
    """

    def __init__(self, directory: Path):
        self.directory, path = directory, directory / "manifest.json"
        if not path.is_file():
            raise FileNotFoundError(f"{directory}: no manifest.json, so nothing that `python -m solar.data` wrote")
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            self.tokenizer, self.dtype, self.shard_tokens = str(raw["tokenizer"]), raw["dtype"], raw["shard_tokens"]
            self.splits = {split: SplitCounts(**raw["splits"][split]) for split in SPLITS}
            self.hashes = {name: str(entry["sha256"]) for name, entry in raw["files"].items()}
            numbers = [self.shard_tokens, *(number for counts in self.splits.values() for number in counts)]
            sound = raw["format"] == FORMAT and self.dtype in ("<u2", "<u4") and self.shard_tokens > 0
            if not sound or not all(type(number) is int and number >= -1 for number in numbers):
                raise ValueError
            if not all(name in self.hashes for name, _ in self._sizes()):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{path}: damaged, or not of the format {FORMAT!r}; make the directory again") from None
        for name, size in self._sizes():
            found = (directory / name).stat().st_size if (directory / name).is_file() else "no"
            if found != size:
                raise ValueError(
                    f"{directory / name}: {found} bytes, but {size} by the manifest; remove the directory and make "
                    "it again"
                )

    def shards(self, split: str) -> list[Path]:
        """The files of a split's ids, in order."""
        count = -(-self.splits[split].tokens // self.shard_tokens)
        return [self.directory / _shard_name(split, number) for number in range(count)]

    def _sizes(self) -> Iterator[tuple[str, int]]:
        """(name, bytes) of every file. Names are made here, none is taken from the manifest."""
        for split, counts in self.splits.items():
            yield f"{split}.offsets", 8 * (counts.documents + 1)
            for start in range(0, counts.tokens, self.shard_tokens):
                size = min(self.shard_tokens, counts.tokens - start) * np.dtype(self.dtype).itemsize
                yield _shard_name(split, start // self.shard_tokens), size

    def verify(self) -> None:
        """Read every file and compare its hash, at 1 to 2 GB/s. Raises ValueError that names the first that differs."""
        progress = cli.Progress(f"checking {self.directory.name}", sum(size for _, size in self._sizes()))
        for name, size in self._sizes():
            found = cli.file_sha256(self.directory / name)
            if found != self.hashes[name]:
                raise ValueError(
                    f"{self.directory / name}: sha256 {found[:16]}, but {self.hashes[name][:16]} by the manifest; "
                    "copy or make the directory again"
                )
            progress.advance(size)
        progress.close()

    def content(self) -> str:
        """16 hexadecimal digits that tell contents apart, whatever the directory is called."""
        return hashlib.sha256(json.dumps(sorted(self.hashes.items())).encode()).hexdigest()[:16]


def is_prepared(path: Path) -> bool:
    """Whether `path` looks like a directory of tokens."""
    return (path / "manifest.json").is_file() and (path / "train.offsets").is_file()


class Tokens:
    """The stream of ids of a split, "train" or "heldout", of a directory that `prepare` gave.

    It is mapped into memory: only what is read is loaded, and the system may forget it. Opening compares sizes with the
    manifest, not contents: that reads all of it (`Manifest.verify`), and a job that starts again should not have to.
    Raises ValueError if a file is not as long as the manifest says, and for ids that are not below vocab_size.
    """

    def __init__(self, directory: Path, split: str, vocab_size: int):
        self.directory, self.vocab_size = directory, vocab_size
        self.manifest = manifest = Manifest(directory)
        _, self._length, highest_id = manifest.splits[split]
        if highest_id >= vocab_size:
            raise ValueError(
                f"{self.directory} holds the token id {highest_id}, but the model's vocabulary has {vocab_size}: "
                "make it with the model's own tokenizer"
            )
        self._shard_tokens = manifest.shard_tokens
        # Views as plain arrays: slicing a memmap costs ten times as much.
        self._shards = [np.asarray(np.memmap(path, manifest.dtype, "r")) for path in manifest.shards(split)]
        self._offsets = np.asarray(np.memmap(self.directory / f"{split}.offsets", "<i8", "r"))

    def __len__(self) -> int:
        return self._length

    def read(self, start: int, stop: int) -> np.ndarray:
        """The ids at start..stop-1, as int64. Raises ValueError for ids that the vocabulary does not have."""
        parts, at = [np.empty(0, np.int64)], start
        while at < stop:
            number, inside = divmod(at, self._shard_tokens)
            parts.append(self._shards[number][inside : inside + stop - at])
            at += len(parts[-1])
        ids = np.concatenate(parts, dtype=np.int64)
        if (highest := ids.max(initial=0)) >= self.vocab_size:  # on a GPU it would end the process without a word
            raise ValueError(
                f"{self.directory}: id {highest} between tokens {start} and {stop}, but the vocabulary has "
                f"{self.vocab_size}: a damaged file; make the directory again"
            )
        return ids

    def beginnings(self, start: int, stop: int) -> np.ndarray:
        """Where documents begin within start..stop-1, counted from `start`."""
        first, last = np.searchsorted(self._offsets[:-1], (start, stop))
        return self._offsets[first:last] - start
