"""Directories of token ids on disk: writing them, and reading them back as one stream.

    manifest.json      what the tokens were made from, counts, the size and sha256 of each file below
    train-00000.bin    ids of all documents, one behind the other; little-endian uint16, or uint32
    train-00001.bin    ... if the vocabulary has more than 65,536 ids; every file but the last holds equally many
    train.offsets      little-endian int64: where each document begins in that stream, and last, where the stream ends
    heldout-...        the same for the documents that training never sees

A reader trusts nobody: it compares each file's size with the manifest, and the highest id with the model's vocabulary,
before anything is learned.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from solar import cli
from solar.tally import Tally

FORMAT = "solar token shards, version 1"
SPLITS = ("train", "heldout")
SHARD_TOKENS = 1 << 28  # in a file: 0.5 GB of uint16

# ------------------------------------------------------------------------------------------------ writing


class SplitWriter:
    """The shards and the offsets of one split, written as the documents come."""

    def __init__(self, folder: Path, split: str, dtype: str):
        self.folder, self.split, self.dtype = folder, split, np.dtype(dtype)
        self.shard_tokens = SHARD_TOKENS
        self.documents, self.tokens, self.highest_id = 0, 0, -1
        self.tally = Tally()
        self.files: dict[str, dict] = {}  # name -> {"bytes", "sha256"}
        self._shard, self._offsets = None, HashedFile(folder / f"{split}.offsets")

    def append(self, ids: np.ndarray, lengths: np.ndarray, tally: Tally) -> None:
        """Add documents: their ids joined, how many each of them has, and what was counted on the way."""
        self.tally.merge(tally)
        ends = self.tokens + np.cumsum(lengths)
        self._offsets.write((ends - lengths).astype("<i8").tobytes())
        self.documents += len(lengths)
        self.highest_id = max(self.highest_id, int(ids.max()) if len(ids) else -1)
        while len(ids):
            number, filled = divmod(self.tokens, self.shard_tokens)
            if filled == 0:
                self._close(self._shard)
                self._shard = HashedFile(self.folder / _shard_name(self.split, number))
            part, ids = np.split(ids, [self.shard_tokens - filled])
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


# ------------------------------------------------------------------------------------------------ reading


class SplitCounts(NamedTuple):
    """What a manifest says about one split."""

    documents: int
    tokens: int
    highest_id: int


class Manifest:
    """The manifest of a directory of tokens, after a look at the size of every file that it names.

    `counts` (of each split) and `skipped` (of each file) are what the one who made it counted.
    Raises FileNotFoundError if there is none, ValueError if it is damaged or a file has another size than it says.
    """

    def __init__(self, directory: Path, format: str = FORMAT):
        self.directory, path = directory, directory / "manifest.json"
        if not path.is_file():
            raise FileNotFoundError(f"{directory}: no manifest.json, so nothing that `python -m solar.data` wrote")
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            self.tokenizer, self.dtype, self.shard_tokens = str(raw["tokenizer"]), raw["dtype"], raw["shard_tokens"]
            self.splits = {split: SplitCounts(**raw["splits"][split]) for split in SPLITS}
            self.hashes = {name: str(entry["sha256"]) for name, entry in raw["files"].items()}
            counts, skipped = raw.get("counts", {}), raw.get("skipped", {})
            self.counts = {split: Tally.from_json(counts.get(split, {})) for split in SPLITS}
            self.skipped = {str(name): Tally.from_json(entry) for name, entry in skipped.items()}
            numbers = [self.shard_tokens, *(number for counts in self.splits.values() for number in counts)]
            sound = raw["format"] == format and self.dtype in ("<u2", "<u4") and self.shard_tokens > 0
            if not sound or not all(type(number) is int and number >= -1 for number in numbers):
                raise ValueError
            if not all(name in self.hashes for name, _ in self._sizes()):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{path}: damaged, or not of the format {format!r}; make the directory again") from None
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
    manifest, not contents: that is `Manifest.verify`, which reads all of it, once a start.
    Raises ValueError if a file is not as long as the manifest says, and for ids that are not below vocab_size.
    """

    format, per_id = FORMAT, 1  # per_id: how many different numbers are written for one id

    def __init__(self, directory: Path, split: str, vocab_size: int):
        self.directory, self.split, self.vocab_size = directory, split, vocab_size
        self.manifest = manifest = Manifest(directory, self.format)
        _, self._length, highest = manifest.splits[split]
        if highest >= vocab_size * self.per_id:
            raise ValueError(
                f"{self.directory} holds the token id {highest // self.per_id}, but the model's vocabulary has "
                f"{vocab_size}: make it with the model's own tokenizer"
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
        # On a GPU such an id would end the process without a word.
        if (highest := ids.max(initial=0)) >= self.vocab_size * self.per_id:
            raise ValueError(
                f"{self.directory}: id {highest // self.per_id} between tokens {start} and {stop}, but the vocabulary "
                f"has {self.vocab_size}: a damaged file; make the directory again"
            )
        return ids

    def beginnings(self, start: int, stop: int) -> np.ndarray:
        """Where documents begin within start..stop-1, counted from `start`."""
        first, last = np.searchsorted(self._offsets[:-1], (start, stop))
        return self._offsets[first:last] - start
