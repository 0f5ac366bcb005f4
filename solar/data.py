"""Text to token shards (`python -m solar.data --tokenizer DIR --out DIR FILES...`), and shards to training batches.

Two ideas carry this file.

**Tokenise once.** A model learns from ids, so text becomes ids once, in a directory that is then mapped into memory:

    manifest.json      what the tokens were made from, counts, the size and sha256 of each file below
    train-00000.bin    ids of all documents, one behind the other, each BOS ids EOS; little-endian uint16, or uint32
    train-00001.bin    ... if the vocabulary has more than 65,536 ids; every file but the last holds equally many
    train.offsets      little-endian int64: where each document begins in that stream, and last, where the stream ends
    heldout-...        the same for the documents that training never sees

Which side a document is on, a hash of its own bytes decides: copies of it land on the same side, and further files move
none that is there.

**The order is a function, not a state.** A stream is cut into windows of T tokens. Nothing shuffles a list of them: the
i-th window to be drawn is computed from i, by a permutation that is a cipher on the numbers 0..N-1, and which source a
draw comes from, by a fixed pattern of the weights. So what a step sees depends on (seed, step) and on nothing else, not
on ranks, workers or interruptions; a checkpoint needs to keep the step alone, and any step can be looked at by itself.

Shapes: B sequences, T tokens in a sequence.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import multiprocessing
import os
import re
import signal
import sysconfig
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, compress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from solar import cli, problems
from solar.losses import IGNORED
from solar.tokenizer import Tokenizer

# ------------------------------------------------------------------------------------------------ sources

BUILT_IN = ("stdlib", "problems")
PROBLEMS = 100_000  # documents of the corpus `problems`: about 10 million tokens in a vocabulary of 2,048
PROBLEM_BYTES = 210  # of text in one: for the progress line only
CUT_BYTES = 64 << 10  # a text file longer than this is cut into documents, at the next blank line
LONGEST_BYTES = 256 << 10  # ... or, where none comes, at a line's end before this
LONGEST_LINE_BYTES = 64 << 20  # of a jsonl file: what is longer is some other kind of file

BLANK_LINES = re.compile(rb"\n(?:[ \t]*\r?\n)+")
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Source:
    """Where documents come from: a text file, a .jsonl file, a directory of them, one that this module wrote, or the
    built-in corpora "stdlib" and "problems" (files of those names are ./stdlib and ./problems).

    weight: its share of the sequences, relative to the other sources' weights. limit: how many documents at most.
    """

    path: str
    weight: float = 1.0
    limit: int | None = None


def parse_source(text: str) -> Source:
    """ "PATH[:WEIGHT[:LIMIT]]" -> Source. Only numbers are taken off the end, so a path may hold colons.

    Raises ValueError for a weight that is not above 0 and finite, and for a limit that is no positive whole number.
    """
    path, numbers = text, []
    while len(numbers) < 2 and ":" in path and _is_number(path.rpartition(":")[2]):
        path, _, number = path.rpartition(":")
        numbers.insert(0, number)
    weight, limit = [*numbers, None, None][:2]
    if not path:
        raise ValueError(f"{text!r}: no path; PATH, PATH:WEIGHT or PATH:WEIGHT:LIMIT is wanted")
    if weight is not None and not 0 < float(weight) < math.inf:
        raise ValueError(f"{text!r}: the weight {weight} must be above 0 and finite; leave a source out to not use it")
    if limit is not None and not (limit.isdecimal() and int(limit) > 0):
        raise ValueError(f"{text!r}: the limit {limit} must be a whole number of documents, at least 1")
    return Source(path, float(weight or 1), int(limit) if limit else None)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def standard_library() -> list[Path]:
    """The sources of this Python's standard library, sorted: real text that is found on every machine.

    Without the packages installed beside it, without its tests, and without `encodings`, which is tables of numbers.
    Raises FileNotFoundError for a Python that came without sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "encodings"}
    paths = sorted(path for path in root.rglob("*.py") if left_out.isdisjoint(path.relative_to(root).parts))
    if not paths:
        raise FileNotFoundError(f"{root}: no Python sources; give text with --data instead of stdlib")
    return paths


def _source_files(source: Source) -> tuple[Path, list[Path]]:
    """(directory, files in it) of a source; of a directory all files in order, but no hidden ones."""
    if source.path == "problems":
        module = Path(problems.__file__)  # what is generated changes with it
        return module.parent, [module]
    if source.path == "stdlib":
        return Path(sysconfig.get_path("stdlib")), standard_library()
    path = Path(source.path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or directory")
    if path.is_file():
        return path.parent, [path]
    if not path.is_dir():
        raise ValueError(f"{path} is neither a file nor a directory: text is read twice, so write a pipe's to a file")
    inside = [found for found in path.rglob("*") if found.is_file()]
    return path, sorted(
        found for found in inside if not any(part.startswith(".") for part in found.relative_to(path).parts)
    )


class Corpus:
    """The documents of some sources, one after the other, read as they are needed.

    `description` says what they are, as JSON: files with their sizes and hashes. `size` is what will be read, in bytes.
    `skipped` counts the jsonl lines left out per file, once `documents` has run.
    """

    def __init__(self, sources: Sequence[Source], skip_bad_lines: bool = False):
        self.sources, self.skip_bad_lines = sources, skip_bad_lines
        self.skipped: dict[Path, int] = {}
        self.size = 0
        self._paths: list[list[Path]] = []  # of each source
        self.description = [self._describe(source) for source in sources]

    def _describe(self, source: Source) -> dict:
        directory, paths = _source_files(source)
        self._paths.append(paths)
        files = [
            {"path": path.relative_to(directory).as_posix(), "bytes": path.stat().st_size, "sha256": _sha256(path)}
            for path in paths
        ]
        if source.path == "problems":
            count = source.limit or PROBLEMS
            self.size += count * PROBLEM_BYTES
            return {"corpus": "problems", "seed": 0, "count": count, "files": files}
        self.size += sum(file["bytes"] for file in files)
        corpus = {"corpus": "stdlib"} if source.path == "stdlib" else {}
        return corpus | {"limit": source.limit, "files": files}

    def documents(self, holdout: float, advance: Callable[[int], None]) -> Iterator[tuple[bytes, bool]]:
        """(UTF-8 text, whether it is held out) of every document; `advance` is told how many bytes have been read.

        Raises ValueError that names file and line for what is no text, and for a file that is not what it was when this
        corpus was made.
        """
        for source, paths, description in zip(self.sources, self._paths, self.description, strict=True):
            if source.path == "problems":
                yield from _problems(description["seed"], description["count"], holdout, advance)
                continue
            files = list(zip(paths, (file["sha256"] for file in description["files"]), strict=True))
            found = self._documents(source, files, advance)
            if source.limit is not None:
                # Which ones are taken is known when it is known how many there are; so the files are read twice.
                count = sum(1 for _ in self._documents(source, files, lambda _: None))
                taken = np.zeros(count, bool)
                taken[permutation(np.arange(min(source.limit, count)), count, "limit")] = True
                found = compress(found, taken)
            for document in found:
                yield document, _is_held_out(document, holdout)

    def _documents(
        self, source: Source, files: list[tuple[Path, str]], advance: Callable[[int], None]
    ) -> Iterator[bytes]:
        """The documents of one source that hold more than white space."""
        for path, sha256 in files:
            if source.path == "stdlib":
                documents = [b"".join(_read(path, sha256, advance)).decode(errors="ignore").encode()]
            elif path.suffix == ".jsonl":
                documents = self._from_jsonl(path, _read(path, sha256, advance, lines=True))
            else:
                documents = _from_text(path, _read(path, sha256, advance))
            yield from (document for document in documents if document.strip())

    def _from_jsonl(self, path: Path, lines: Iterable[bytes]) -> Iterator[bytes]:
        self.skipped[path] = 0
        for number, line in enumerate(lines, start=1):
            if len(line) > LONGEST_LINE_BYTES:
                raise ValueError(f"{path}, line {number}: longer than {LONGEST_LINE_BYTES >> 20} MB; no jsonl file")
            try:
                if line.strip():
                    yield _json_text(line)
            except ValueError as error:
                if not self.skip_bad_lines:
                    raise ValueError(f"{path}, line {number}: {error}; --skip-bad-lines leaves it out") from None
                self.skipped[path] += 1


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path, sha256: str, advance: Callable[[int], None], lines: bool = False) -> Iterator[bytes]:
    """A file in pieces or lines, without the mark that some editors put first. ValueError if it is not what was hashed:
    tokens of a file that is still being written would be kept under the name of what it was before."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        first = True
        while piece := file.readline(LONGEST_LINE_BYTES + 1) if lines else file.read(LONGEST_BYTES):
            digest.update(piece)
            advance(len(piece))
            yield piece.removeprefix(BOM) if first else piece
            first = False
    if digest.hexdigest() != sha256:
        raise ValueError(f"{path} changed while it was read; start again when nothing writes to it any more")


def _from_text(path: Path, pieces: Iterable[bytes]) -> Iterator[bytes]:
    lines = 0
    for document in cut(pieces):
        if b"\0" in document:
            number = lines + document[: document.index(b"\0")].count(b"\n") + 1
            raise ValueError(f"{path}, line {number}: a NUL byte, so this is no text file; leave it out")
        try:
            document.decode()
        except UnicodeDecodeError as error:
            number, byte = lines + document[: error.start].count(b"\n") + 1, document[error.start]
            raise ValueError(
                f"{path}, line {number}: byte 0x{byte:02x} is not UTF-8; convert the file, or leave it out"
            ) from None
        yield document
        lines += document.count(b"\n")


def cut(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Cut a text, which comes in pieces of any size, into documents that joined are the text again.

    A document ends with the first blank lines behind its first CUT_BYTES; if none come before LONGEST_BYTES, with a
    line, at worst within one, but never within a character.
    """
    rest = b""
    for piece in pieces:
        rest += piece
        while len(rest) > LONGEST_BYTES:  # enough to find the end, wherever the pieces end
            end = _document_end(rest)
            yield rest[:end]
            rest = rest[end:]
    while rest:
        end = _document_end(rest)
        yield rest[:end]
        rest = rest[end:]


def _document_end(text: bytes) -> int:
    if found := BLANK_LINES.search(text, CUT_BYTES, LONGEST_BYTES):
        return found.end()
    if len(text) <= LONGEST_BYTES:
        return len(text)
    end = text.rfind(b"\n", 0, LONGEST_BYTES) + 1 or text.rfind(b" ", 0, LONGEST_BYTES) + 1 or LONGEST_BYTES
    while end > LONGEST_BYTES - 4 and text[end] & 0xC0 == 0x80:  # the second, third or fourth byte of a character
        end -= 1
    return end


def _json_text(line: bytes) -> bytes:
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError):
        raise ValueError("no JSON") from None
    if not isinstance(row, dict):
        raise ValueError("JSON, but no object")
    if not isinstance(row.get("text"), str):
        raise ValueError('an object without a string "text"')
    try:
        return row["text"].encode()
    except UnicodeEncodeError:
        raise ValueError('"text" holds half of a surrogate pair') from None


def _problems(seed: int, count: int, holdout: float, advance: Callable[[int], None]) -> Iterator[tuple[bytes, bool]]:
    """Generated problems bring a split of their own; `holdout` only says how many held-out ones to make."""
    held_out = max(round(count * holdout), 1) if holdout else 0
    for split, number in (("train", count), ("heldout", held_out)):
        for text in problems.documents(seed, number, split):
            advance(len(text))
            yield text.encode(), split == "heldout"


def _is_held_out(document: bytes, holdout: float) -> bool:
    return int.from_bytes(hashlib.blake2b(document, digest_size=8).digest(), "big") < holdout * 2**64


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
    if source.path not in BUILT_IN and _is_prepared(given):
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
            if not _is_prepared(out):
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
    content = hashlib.sha256(tokenizer._path.read_bytes()).hexdigest()
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
            found = _sha256(self.directory / name)
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


def _is_prepared(path: Path) -> bool:
    return (path / "manifest.json").is_file() and (path / "train.offsets").is_file()


class Tokens:
    """The stream of ids of one split, mapped into memory: only what is read is loaded, and the system may forget it."""

    def __init__(self, manifest: Manifest, split: str, vocab_size: int):
        self.manifest, self.directory, self.vocab_size = manifest, manifest.directory, vocab_size
        self.documents, self._length, highest_id = manifest.splits[split]
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


def open_tokens(directory: Path, split: str, vocab_size: int, verify: bool = False) -> Tokens:
    """The ids of a split ("train" or "heldout") of a directory that `prepare` gave.

    Sizes are always compared with the manifest, contents only with `verify`: that reads all of it, and a job that
    starts again should not have to. `prepare` has verified a directory that came from elsewhere.
    Raises ValueError if a file is not what the manifest says, and for ids that are not below vocab_size.
    """
    manifest = Manifest(directory)
    if verify:
        manifest.verify()
    return Tokens(manifest, split, vocab_size)


# ------------------------------------------------------------------------------------------------ order

PERIOD = 1024  # draws after which the pattern of the sources repeats
ROUNDS = 8


def permutation(index: np.ndarray, size: int, key: str) -> np.ndarray:
    """Where a permutation of 0..size-1, chosen by `key`, sends each index; without a table of it.

    A Feistel cipher on a rectangle (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains"): a number is a row
    and a column, and each round shifts one of them by a hash of the other. Every round can be undone, whatever the hash
    is, so the whole is a bijection of the rectangle. It has a few more cells than `size`; what lands there goes through
    again until it does not. That follows the cycle of a bijection to its next member below `size`, and no two numbers
    come to the same one.
    """
    assert size > 0
    rows = math.isqrt(size - 1) + 1
    rows, columns = np.uint64(rows), np.uint64(-(-size // rows))
    keys = np.frombuffer(hashlib.blake2b(key.encode(), digest_size=8 * ROUNDS).digest(), "<u8")
    result = np.array(index, np.uint64)
    outside = np.arange(len(result))
    while len(outside):
        row, column = np.divmod(result[outside], columns)
        for row_key, column_key in zip(keys[::2], keys[1::2], strict=True):
            row = (row + _mix(column + row_key) % rows) % rows
            column = (column + _mix(row + column_key) % columns) % columns
        result[outside] = row * columns + column
        outside = outside[result[outside] >= size]
    return result.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every bit of the result hangs on every bit of x."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def interleave(weights: Sequence[float]) -> np.ndarray:
    """(PERIOD,) which source each draw of a period comes from: in proportion to the weights, evenly spread.

    Every source has at least one draw, so a share below 1 in PERIOD counts as that. Raises ValueError for more sources
    than draws.
    """
    if len(weights) > PERIOD:
        raise ValueError(f"{len(weights)} sources: at most {PERIOD} can be mixed; put files into one directory")
    shares = np.array(weights, np.float64) / max(weights)
    shares *= PERIOD / shares.sum()
    slots = np.maximum(shares.astype(np.int64), 1)
    while (missing := PERIOD - slots.sum()) != 0:  # one at a time to, or from, the source that is furthest off
        if missing > 0:
            slots[np.argmax(shares - slots)] += 1
        else:
            slots[np.argmax(np.where(slots > 1, slots - shares, -np.inf))] -= 1
    source = np.repeat(np.arange(len(slots)), slots)
    nth = np.arange(PERIOD) - (np.cumsum(slots) - slots)[source]
    return source[np.lexsort((source, (nth + 0.5) / slots[source]))]


class TokenBatches:
    """What every step of a pretraining run learns from, as a function of the step.

    A source's stream is cut into windows of T tokens that overlap by one. Labels stand at their inputs' places, and the
    first token of a window has nothing before it to be learned from; it is the last of the window before, where it was
    learned. So an epoch learns each token once, but the first of the stream and the last ones, fewer than T - 1, that
    fill no window.

    sources, directories: what `parse_source` and `prepare` gave. Raises ValueError for a source given twice, or without
    a window.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        directories: Sequence[Path],
        vocab_size: int,
        sequence_length: int,
        batch_size: int,
        seed: int,
        document_mask: bool = False,
    ):
        names = [source.path for source in sources]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"{min(twice)} is given twice; give it once, with the sum of the weights")
        self.sources, self.sequence_length, self.batch_size = sources, sequence_length, batch_size
        self.seed, self.document_mask = seed, document_mask
        self.train, self.held_out = (
            [open_tokens(directory, split, vocab_size) for directory in directories] for split in SPLITS
        )
        self.windows = [(len(tokens) - 1) // (sequence_length - 1) for tokens in self.train]
        for source, tokens, windows in zip(sources, self.train, self.windows, strict=True):
            if windows < 1:
                raise ValueError(
                    f"{source.path} has {len(tokens)} tokens to train on, fewer than a sequence of {sequence_length}: "
                    "give more text, or a lower --sequence-length"
                )
        self._pattern = interleave([source.weight for source in sources])
        self._slots = np.bincount(self._pattern)
        drawn = np.cumsum(self._pattern[:, None] == np.arange(len(sources)), axis=0)  # of each source, by each draw
        self._before = drawn[np.arange(PERIOD), self._pattern] - 1  # of the draw's own source, earlier in the period

    def identity(self) -> dict:
        """What must not change when a run goes on, for its steps to see the samples that they would have seen."""
        data = [
            f"{Path(source.path).name} {tokens.manifest.content()} x {source.weight:g}"
            for source, tokens in zip(self.sources, self.train, strict=True)
        ]
        return {
            "tokenizer": self.train[0].manifest.tokenizer[:16],
            "data": data,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "sequence_length": self.sequence_length,
        }

    def rows(self, step: int) -> list[tuple[int, int]]:
        """(source, window) of each sequence of a step; steps count from 0.

        Draw g of the run is the n-th of its source, n known in closed form from the pattern. Of that source's N windows
        it takes number n % N, in the order that epoch n // N has for itself.
        """
        draw = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        period, place = np.divmod(draw, PERIOD)
        source = self._pattern[place]
        nth = period * self._slots[source] + self._before[place]
        epoch, nth = np.divmod(nth, np.array(self.windows)[source])
        window = np.empty_like(nth)
        for k, e in {*zip(source.tolist(), epoch.tolist(), strict=True)}:
            here = (source == k) & (epoch == e)
            window[here] = permutation(nth[here], self.windows[k], f"{self.seed} {k} {e}")
        return [*zip(source.tolist(), window.tolist(), strict=True)]

    def batch(self, step: int, rows: slice = slice(None)) -> dict[str, Tensor]:
        """The sequences of a step, or some of them: int64 tensors (B, T).

        input_ids; labels, the same ids, but -100 where nothing is learned; with document_mask also document_ids, which
        count up along a row, and the first token of a document is not learned, since it sees nothing before it.
        """
        return self._batch([self._window(*row) for row in self.rows(step)[rows]])

    def _window(self, source: int, window: int) -> tuple[Tokens, int]:
        return self.train[source], window * (self.sequence_length - 1)

    def _batch(self, windows: Sequence[tuple[Tokens, int]]) -> dict[str, Tensor]:
        """Windows as (tokens, start); what lies behind the end of the tokens is padding, which is not learned."""
        shape = len(windows), self.sequence_length
        input_ids, labels, document_ids = np.zeros(shape, np.int64), np.full(shape, IGNORED), np.zeros(shape, np.int64)
        for row, (tokens, start) in enumerate(windows):
            ids = tokens.read(start, min(start + self.sequence_length, len(tokens)))
            input_ids[row, : len(ids)] = labels[row, : len(ids)] = ids
            if self.document_mask:
                begins = tokens.beginnings(start, start + len(ids))
                labels[row, begins] = IGNORED
                document_ids[row, begins] = 1
        batch = {"input_ids": input_ids, "labels": labels}
        if self.document_mask:
            batch["document_ids"] = document_ids.cumsum(axis=1)
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def steps(
        self, start: int, stop: int, rank: int, world_size: int, micro_batch_size: int
    ) -> Iterator[list[dict[str, Tensor]]]:
        """For each step in start..stop-1 the micro-batches of this rank; the next step's are made while one runs.

        Micro-batch j of rank r holds the rows from (j * world_size + r) * micro_batch_size on, so the ranks together
        see the rows in their order. Close it (`contextlib.closing`) to end its thread before the last step.
        Raises ValueError if the micro-batches of all ranks do not make up whole batches.
        """
        at_once = micro_batch_size * world_size
        if micro_batch_size < 1 or self.batch_size % at_once:
            raise ValueError(
                f"a batch of {self.batch_size} sequences cannot be dealt out as micro-batches of {micro_batch_size} to "
                f"{world_size} ranks: {self.batch_size} must be a multiple of {micro_batch_size} x {world_size}"
            )
        firsts = range(rank * micro_batch_size, self.batch_size, at_once)

        def micro_batches(step: int) -> list[dict[str, Tensor]]:
            windows = [self._window(*row) for row in self.rows(step)]
            return [self._batch(windows[first : first + micro_batch_size]) for first in firsts]

        return _ahead(micro_batches, range(start, stop))

    def heldout(
        self, batch_size: int, rank: int = 0, world_size: int = 1, limit: int | None = None
    ) -> Iterator[tuple[str, Iterator[dict[str, Tensor]]]]:
        """(source, this rank's batches of its held-out sequences), for every source that has any.

        The windows are those of training, in their order; the last one is padded, so every held-out token is counted
        once, but the first. With `limit` only so many windows, evenly spread. All ranks get equally many batches of
        batch_size rows, since sharded models compute in step: what is missing is rows of padding.
        """
        stride = self.sequence_length - 1
        for source, tokens in zip(self.sources, self.held_out, strict=True):
            if count := -(-max(len(tokens) - 1, 0) // stride):
                taken = min(limit or count, count)
                windows = [(tokens, i * count // taken * stride) for i in range(taken)]
                windows += [(tokens, len(tokens))] * (-taken % (batch_size * world_size))
                firsts = range(rank * batch_size, len(windows), batch_size * world_size)
                shares = [windows[first : first + batch_size] for first in firsts]
                yield source.path, map(self._batch, shares)


def _ahead(function: Callable[[int], list], numbers: range) -> Iterator[list]:
    """`function` of each number, computed in a thread while the caller works on the one before."""
    with ThreadPoolExecutor(1, "prefetch") as thread:
        upcoming = thread.submit(function, numbers[0]) if numbers else None
        for number in numbers:
            ready = upcoming.result()  # raises what the thread has raised
            upcoming = thread.submit(function, number + 1) if number + 1 in numbers else None
            yield ready


# ------------------------------------------------------------------------------------------------ the command


@dataclass
class Options:
    files: list[str] = cli.flag(
        positional=True, metavar="FILES", help="text, .jsonl, directories of them, or the corpora stdlib and problems"
    )
    tokenizer: str = cli.flag(help="model directory, or tokenizer file", metavar="DIR")
    out: str = cli.flag(help="directory to write", metavar="DIR")
    holdout: float = cli.flag(0.01, help="share of the documents that is held out")
    workers: int | None = cli.flag(None, help="processes that tokenise (default: one a core)")
    skip_bad_lines: bool = cli.flag(False, help="count jsonl lines that cannot be read instead of stopping")
    force: bool = cli.flag(False, help="replace the output if it exists")


def main() -> None:
    options = cli.parse(Options, prog="python -m solar.data", description="Tokenise text once, for training.")
    out = Path(options.out)
    cli.check_output(out, options.force)
    for path in options.files:
        if _is_prepared(Path(path)):
            raise ValueError(f"{path} is tokenised already; give it to train.py --data as it is")
    tokenizer = Tokenizer(options.tokenizer)
    corpus = Corpus([Source(path) for path in options.files], options.skip_bad_lines)
    manifest = tokenise(corpus, tokenizer, out, options.holdout, options.workers, options.force)
    for split, (documents, tokens, _) in manifest.splits.items():
        print(f"{split:<7}  {documents:,} documents, {tokens:,} tokens")
    print(out)


if __name__ == "__main__":
    cli.run(main)
