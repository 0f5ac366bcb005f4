"""Documents out of files: UTF-8 text, one document after the other, each for training or held out from it.

    book.txt      any file that is text: cut into documents of 64 kB and more, at blank lines
    rows.jsonl    a document a line: the "text" of a JSON object
    folder        all such files in it, in order, but no hidden ones
    stdlib        the sources of Python's standard library, a document each
    problems      generated arithmetic problems (solar/problems.py)

Memory holds a document, never a file, so a corpus may be of any size. What is no text is refused by file and line: a
model would learn it without a word.

Which side a document is on, a hash of its own bytes decides: copies of it land on the same side, and further files move
none that is there. Generated problems bring a split of their own.
"""

import hashlib
import json
import math
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import TypeVar

import numpy as np

from solar import cli, problems
from solar.permutation import permutation
from solar.tally import Tally

BUILT_IN = ("stdlib", "problems")
PROBLEMS = 100_000  # documents of the corpus `problems`: about 7 million tokens in a vocabulary of 2,048
PROBLEM_BYTES = 210  # of text in one: for the progress line only
CUT_BYTES = 64 << 10  # a text file longer than this is cut into documents, at the next blank line
LONGEST_BYTES = 256 << 10  # ... or, where none comes, at a line's end before this
LONGEST_LINE_BYTES = 64 << 20  # of a jsonl file: what is longer is some other kind of file

BLANK_LINES = re.compile(rb"\n(?:[ \t]*\r?\n)+")
BOM = b"\xef\xbb\xbf"

Row, T = TypeVar("Row"), TypeVar("T")


@dataclass(frozen=True)
class Source:
    """Where documents come from: a text file, a .jsonl file, a directory of them, one that this module wrote, or the
    built-in corpora "stdlib" and "problems" (files of those names are ./stdlib and ./problems).

    weight: its share of the sequences, relative to the other sources' weights; None if none was given, which counts as
    1 where documents are drawn by weight. limit: how many documents at most.
    """

    path: str
    weight: float | None = None
    limit: int | None = None

    @property
    def share(self) -> float:
        return 1.0 if self.weight is None else self.weight


def parse_source(text: str) -> Source:
    """ "PATH[:WEIGHT[:LIMIT]]" -> Source; "PATH::LIMIT" has a limit and no weight.

    Only numbers are taken off the end, so a path may hold colons.

    Raises ValueError for a weight that is not above 0 and finite, and for a limit that is no positive whole number.
    """
    path, numbers = text, []
    while len(numbers) < 2 and ":" in path and _is_number(path.rpartition(":")[2]):
        path, _, number = path.rpartition(":")
        numbers.insert(0, number)
    weight, limit = [*numbers, None, None][:2]
    if len(numbers) == 1 and path.endswith(":"):
        path, weight, limit = path[:-1], None, weight
    if not path:
        raise ValueError(f"{text!r}: no path; PATH, PATH:WEIGHT or PATH:WEIGHT:LIMIT is wanted")
    if weight is not None and not 0 < float(weight) < math.inf:
        raise ValueError(f"{text!r}: the weight {weight} must be above 0 and finite; leave a source out to not use it")
    if limit is not None and not (limit.isdecimal() and int(limit) > 0):
        raise ValueError(f"{text!r}: the limit {limit} must be a whole number of documents, at least 1")
    return Source(path, None if weight is None else float(weight), int(limit) if limit else None)


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


def source_files(source: Source) -> tuple[Path, list[Path]]:
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
    A subclass may read other files: it says which (`_files`), what stands in one (`_from_file`), and by what a document
    is held out (`_key`).
    """

    nothing = "no text in it, so there is nothing to learn from"

    def __init__(self, sources: Sequence[Source], skip_bad_lines: bool = False):
        self.sources, self.skip_bad_lines = sources, skip_bad_lines
        self.skipped: dict[Path, Tally] = {}
        self.size = 0
        self._paths: list[list[Path]] = []  # of each source
        self.description = [self._describe(source) for source in sources]

    def _describe(self, source: Source) -> dict:
        directory, paths = self._files(source)
        self._paths.append(paths)
        files = [
            {
                "path": path.relative_to(directory).as_posix(),
                "bytes": path.stat().st_size,
                "sha256": cli.file_sha256(path),
            }
            for path in paths
        ]
        if source.path == "problems":
            count = source.limit or PROBLEMS
            self.size += count * PROBLEM_BYTES
            return {"corpus": "problems", "seed": 0, "count": count, "files": files}
        self.size += sum(file["bytes"] for file in files)
        corpus = {"corpus": "stdlib"} if source.path == "stdlib" else {}
        return corpus | {"limit": source.limit, "files": files}

    def _files(self, source: Source) -> tuple[Path, list[Path]]:
        return source_files(source)

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
                yield document, _is_held_out(self._key(document), holdout)

    def _documents(
        self, source: Source, files: list[tuple[Path, str]], advance: Callable[[int], None]
    ) -> Iterator[bytes]:
        """The documents of one source that hold more than white space."""
        for path, sha256 in files:
            documents = self._from_file(source, path, sha256, advance)
            yield from (document for document in documents if document.strip())

    def _key(self, document: bytes) -> bytes:
        return document

    def _from_file(self, source: Source, path: Path, sha256: str, advance: Callable[[int], None]) -> Iterator[bytes]:
        if source.path == "stdlib":
            yield b"".join(read(path, sha256, advance)).decode(errors="ignore").encode()
        elif path.suffix == ".jsonl":
            lines = numbered_lines(path, read(path, sha256, advance, lines=True))
            yield from (text for _, text in self._parsed(path, lines, _json_text))
        else:
            yield from from_text(path, read(path, sha256, advance))

    def _parsed(
        self, path: Path, rows: Iterable[tuple[str, Row]], parse: Callable[[Row], T]
    ) -> Iterator[tuple[str, T]]:
        """(place, what `parse` makes of the row) of each (place, row); what it refuses stops, or is counted."""
        skipped = self.skipped[path] = Tally()
        for place, row in rows:
            try:
                parsed = parse(row)
            except ValueError as error:
                if not self.skip_bad_lines:
                    raise ValueError(f"{path}, {place}: {error}; --skip-bad-lines leaves it out") from None
                skipped.add(str(error), place)
            else:
                yield place, parsed


def numbered_lines(path: Path, lines: Iterable[bytes]) -> Iterator[tuple[str, bytes]]:
    """("line 1", line), ... of a jsonl file, without those that are blank."""
    for number, line in enumerate(lines, start=1):
        if len(line) > LONGEST_LINE_BYTES:
            raise ValueError(f"{path}, line {number}: longer than {LONGEST_LINE_BYTES >> 20} MB; no jsonl file")
        if line.strip():
            yield f"line {number}", line


def read(path: Path, sha256: str, advance: Callable[[int], None], lines: bool = False) -> Iterator[bytes]:
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


def from_text(path: Path, pieces: Iterable[bytes]) -> Iterator[bytes]:
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


def json_row(line: bytes):
    """What a line of JSON says. Raises ValueError for what is none."""
    try:
        return json.loads(line.decode())
    except (ValueError, RecursionError):
        raise ValueError("no JSON") from None


def _json_text(line: bytes) -> bytes:
    row = json_row(line)
    if not isinstance(row, dict):
        raise ValueError("JSON, but no object")
    if not isinstance(row.get("text"), str):
        raise ValueError('an object without a string "text" (questions and answers are for --stage sft)')
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
