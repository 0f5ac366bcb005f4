"""Tokens that are the text again, an order that is a function of the step, and every kind of file that is no text.

Most tests use a tokenizer whose ids are bytes: what stands in a shard can then be written down without a library.
"""

import collections
import concurrent.futures
import io
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from solar import data, problems
from solar.data import Source, TokenBatches, open_tokens, parse_source, permutation, prepare
from solar.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
BOS, EOS = 256, 257


class Bytes:
    """A tokenizer whose ids are the UTF-8 bytes, 256 for BOS, 257 for EOS."""

    vocab_size, bos_id, eos_id = 258, BOS, EOS

    def __init__(self, path):
        self._path = path

    def encode(self, text, bos=True, eos=False):
        return [BOS, *text.encode(), EOS]


class Killed(Bytes):
    def encode(self, text, bos=True, eos=False):
        if multiprocessing.parent_process():
            os._exit(9)
        raise AssertionError("this was to run in a worker")


@pytest.fixture(scope="session")
def bytes_tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("bytes") / "tokenizer.model"
    path.write_text("bytes")
    return Bytes(path)


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pieces")
    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(Path(data.__file__).read_text().splitlines()), model_writer=proto, vocab_size=600,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(proto.getvalue())
    return folder


@pytest.fixture
def write(tmp_path):
    """write({name: text or bytes}) -> a directory of these files"""

    def write(files, folder="text"):
        for name, content in files.items():
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path / folder

    return write


@pytest.fixture
def make(tmp_path, bytes_tokenizer):
    """make(path, holdout) -> the prepared directory"""

    def make(path, holdout=0.0, limit=None, **options):
        source = Source(str(path), limit=limit)
        return prepare(source, bytes_tokenizer, tmp_path / "cache", holdout, workers=1, **options)

    return make


def texts(directory, split="train"):
    """The documents of a split, from ids that are bytes."""
    tokens = open_tokens(directory, split, Bytes.vocab_size)
    starts = tokens.beginnings(0, len(tokens)).tolist()
    documents = [tokens.read(*ends).tolist() for ends in itertools.pairwise([*starts, len(tokens)])]
    assert all(document[0] == BOS and document[-1] == EOS for document in documents)
    return [bytes(document[1:-1]).decode() for document in documents]


# ------------------------------------------------------------------------------------------------ sources


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("a.txt", Source("a.txt")),
        ("a.txt:2", Source("a.txt", 2.0)),
        ("a.txt:.5:70", Source("a.txt", 0.5, 70)),
        (r"C:\texts\a.txt", Source(r"C:\texts\a.txt")),
        (r"C:\a.txt:1e-2:3", Source(r"C:\a.txt", 0.01, 3)),
        ("s3:bucket:3", Source("s3:bucket", 3.0)),
        ("a:1:2:3", Source("a:1", 2.0, 3)),
        ("stdlib:0.5", Source("stdlib", 0.5)),
    ],
)
def test_sources_are_parsed(text, source):
    assert parse_source(text) == source


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a:0", "weight 0 must"),
        ("a:-1", "weight -1 must"),
        ("a:nan", "weight nan must"),
        ("a:inf:3", "weight inf must"),
        ("a:1:0", "limit 0 must"),
        ("a:1:-3", "limit -3 must"),
        ("a:1:2.5", "limit 2.5 must"),
        (":0.5", "no path"),
    ],
)
def test_bad_weights_and_limits_are_named(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_source(text)


def test_documents_of_every_kind_of_file(write, make):
    folder = write(
        {
            "b.txt": "eins\r\n\r\nzwei \n",
            "a.jsonl": '{"text": "größer\\n", "more": 1}\n\n{"text": "  "}\r\n{"text": "🙂"}',
            "deep/er/c": "\ufeffthree",
            ".hidden": b"\0",
            ".git/x": b"\0",
            "empty.txt": "",
        }
    )
    assert texts(make(folder)) == ["größer\n", "🙂", "eins\r\n\r\nzwei \n", "three"]
    assert texts(make(folder / "b.txt")) == ["eins\r\n\r\nzwei \n"]


@given(st.data())
@settings(max_examples=200)
def test_cutting_loses_nothing_and_does_not_see_the_pieces(drawn):
    text = drawn.draw(st.text("ab \n\ré🙂", max_size=200)).encode()
    ends = sorted(drawn.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    pieces = [text[a:b] for a, b in itertools.pairwise([0, *ends, len(text)])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "CUT_BYTES", 12)
        patch.setattr(data, "LONGEST_BYTES", 30)
        documents = [*data.cut(pieces)]
        assert documents == [*data.cut([text])]
    assert b"".join(documents) == text
    for document in documents:
        assert document.decode()
        assert len(document) <= 30
    for document in documents[:-1]:
        blank = re.search(rb"\n[ \t]*\r?\n\Z", document)
        assert document.endswith((b"\n", b" ")) or len(document) >= 27
        assert len(document) > 12 or not blank


def test_a_long_file_is_cut_at_blank_lines(write, make):
    paragraph = "word " * 2000 + "\n\n\n"
    documents = texts(make(write({"a": paragraph * 20}) / "a"))
    assert documents == [paragraph * 7] * 2 + [paragraph * 6]


def test_the_built_in_corpora(bytes_tokenizer, tmp_path):
    made = prepare(Source("problems", limit=50), bytes_tokenizer, tmp_path, holdout=0.1)
    assert texts(made) == [*problems.documents(0, 50, "train")]
    assert texts(made, "heldout") == [*problems.documents(0, 5, "heldout")]
    assert texts(prepare(Source("problems", limit=50), bytes_tokenizer, tmp_path, holdout=0.0), "heldout") == []
    library = data.standard_library()
    assert {"argparse.py", "decoder.py"} <= {path.name for path in library}
    assert not {"test", "tests", "site-packages"} & {part for path in library for part in path.parts}
    some = texts(prepare(Source("stdlib", limit=5), bytes_tokenizer, tmp_path, holdout=0.0))
    assert len(some) == 5
    assert set(some) <= {path.read_bytes().decode() for path in library}


def test_a_limit_is_a_fair_sample(write, make):
    lines = [f"document {i}" for i in range(400)]
    file = write({"a.jsonl": "\n".join(json.dumps({"text": line}) for line in lines)}) / "a.jsonl"
    some = texts(make(file, limit=40))
    assert len(some) == 40 == len({*some})
    assert some == [line for line in lines if line in {*some}]  # in their order
    thirds = collections.Counter(int(line.split()[1]) // 134 for line in some)
    assert min(thirds[k] for k in range(3)) >= 6
    assert texts(make(file, limit=401)) == lines


def test_held_out_by_the_documents_own_bytes(write, make):
    rows = lambda words: "".join(json.dumps({"text": word}) + "\n" for word in words)
    folder = write({"a.jsonl": rows(f"word {i}" for i in range(1000))})
    before = {*texts(make(folder, 0.2), "heldout")}
    assert 150 < len(before) < 250
    write({"0.jsonl": rows(f"new {i}" for i in range(50)), "z.jsonl": rows(f"word {i}" for i in range(1000))})
    made = make(folder, 0.2)
    assert {word for word in texts(made, "heldout") if word.startswith("word")} == before
    assert not {*texts(made)} & {*texts(made, "heldout")}  # copies are on the same side
    assert before < {*texts(make(folder, 0.4), "heldout")}


def test_no_held_out_document_is_said(write, make):
    with pytest.warns(UserWarning, match="none of its 1 documents fell to the held-out side"):
        make(write({"a": "text"}), holdout=0.001)


@pytest.mark.parametrize("holdout", [-0.1, 1.0, float("nan")])
def test_a_share_that_is_none(write, make, holdout):
    with pytest.raises(ValueError, match="--holdout"):
        make(write({"a": "text"}), holdout)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "no text in it"),
        ("a.txt", " \n\n", "no text in it"),
        ("a.jsonl", "\n", "no text in it"),
        ("a.txt", "one\ntwo\0\n", "a.txt, line 2: a NUL byte"),
        ("a.txt", b"x" * 70000 + b"\n\nx\n\xff\n", "a.txt, line 4: byte 0xff is not UTF-8"),
        ("a.txt", "text".encode("utf-16"), "line 1: a NUL byte"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b"\n', "a.jsonl, line 2: no JSON"),
        ("a.jsonl", b'{"text": "\xff"}', "line 1: no JSON"),
        ("a.jsonl", "[" * 100000, "line 1: no JSON"),
        ("a.jsonl", '["text"]', "line 1: JSON, but no object"),
        ("a.jsonl", '{"content": "a"}', 'line 1: an object without a string "text"'),
        ("a.jsonl", '{"text": 3}', 'line 1: an object without a string "text"'),
        ("a.jsonl", r'{"text": "\ud83d"}', "line 1: .*surrogate"),
    ],
)
def test_what_is_no_text_is_named(name, content, message, write, make, tmp_path):
    folder = write({name: content})
    for path in (folder, folder / name):
        with pytest.raises(ValueError, match=message):
            make(path)
    assert not [name for name in os.listdir(tmp_path / "cache") if not name.endswith(".lock")]


def test_a_line_without_end_is_not_read_whole(write, make, monkeypatch):
    monkeypatch.setattr(data, "LONGEST_LINE_BYTES", 100)
    with pytest.raises(ValueError, match=r"line 2: longer than"):
        make(write({"a.jsonl": '{"text": "a"}\n' + "x" * 300}), skip_bad_lines=True)


def test_bad_lines_are_skipped_and_counted(write, make):
    folder = write({"a.jsonl": 'no\n{"text": "a"}\n[]\n', "b.jsonl": '{"text": "b"}\n'})
    with pytest.warns(UserWarning, match=r"a\.jsonl: 2 lines that could not be read were skipped"):
        made = make(folder, skip_bad_lines=True)
    assert texts(made) == ["a", "b"]
    assert json.loads((made / "manifest.json").read_text())["skipped_lines"] == 2


def test_a_source_that_is_no_file(make, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or directory"):
        make("nowhere")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="neither a file nor a directory"):
        make(tmp_path / "pipe")


def test_a_file_that_grows_while_it_is_read(write, bytes_tokenizer, tmp_path):
    folder = write({"a": "text"})
    corpus = data.Corpus([Source(str(folder))])
    write({"a": "more text"})
    with pytest.raises(ValueError, match="changed while it was read"):
        data.tokenise(corpus, bytes_tokenizer, tmp_path / "out", 0.0)
    assert os.listdir(tmp_path) == ["text"]


# ------------------------------------------------------------------------------------------------ tokenising


def test_workers_change_nothing(write, tmp_path, sentencepiece_model, monkeypatch):
    tokenizer = Tokenizer(sentencepiece_model)
    folder = write({f"{i}.txt": f"file {i}: " + "some words and 中文\n" * (40 * i % 97) for i in range(60)})
    monkeypatch.setattr(data, "GROUP_BYTES", 5000)
    monkeypatch.setattr(data, "BYTES_PER_WORKER", 1000)
    one, two = (prepare(Source(str(folder)), tokenizer, tmp_path / str(n), 0.1, workers=n) for n in (1, 2))
    assert one.name == two.name
    assert sorted(os.listdir(one)) == sorted(os.listdir(two))
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in os.listdir(one))
    tokens = open_tokens(one, "train", tokenizer.vocab_size, verify=True)
    starts = [*tokens.beginnings(0, len(tokens)).tolist(), len(tokens)]
    decoded = [tokenizer.decode(tokens.read(*ends).tolist()) for ends in itertools.pairwise(starts)]
    paths = sorted(folder.iterdir())
    assert [text for text in (path.read_text() for path in paths) if text in {*decoded}] == decoded
    first = tokens.read(0, starts[1]).tolist()
    assert first == tokenizer.encode(decoded[0], bos=True, eos=True)


def test_a_worker_that_is_killed(write, tmp_path, bytes_tokenizer, monkeypatch):
    monkeypatch.setattr(data, "BYTES_PER_WORKER", 1)
    source = Source(str(write({"a": "text"})))
    with pytest.raises(ValueError, match=r"one of the 2 tokenising processes was killed.*--workers"):
        prepare(source, Killed(bytes_tokenizer._path), tmp_path / "cache", 0.0, workers=2)
    assert len(os.listdir(tmp_path / "cache")) == 1  # the lock
    with pytest.raises(ValueError, match="--workers 0"):
        prepare(source, bytes_tokenizer, tmp_path / "cache", 0.0, workers=0)


def test_memory_does_not_grow_with_the_file(tmp_path, bytes_tokenizer):
    class Few(Bytes):
        def encode(self, text, bos=True, eos=False):
            return [BOS, EOS]

    (tmp_path / "big.txt").write_bytes(b"some words in a line\n\n" * 1_000_000)
    rows = (json.dumps({"text": "some words in a line\n" * 400}) + "\n" for _ in range(2500))
    (tmp_path / "big.jsonl").write_text("".join(rows))
    del rows
    tracemalloc.start()
    for name in ("big.txt", "big.jsonl"):
        made = prepare(Source(str(tmp_path / name)), Few(bytes_tokenizer._path), tmp_path, 0.0, workers=1)
        assert len(open_tokens(made, "train", 258)) > 300
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "big.jsonl").stat().st_size > 20e6
    assert peak < 6e6


def test_prepared_once_whoever_asks(write, make, bytes_tokenizer, tmp_path, monkeypatch):
    calls = []
    tokenise = data.tokenise

    def slowly(*args):
        calls.append(args)
        time.sleep(0.2)
        return tokenise(*args)

    monkeypatch.setattr(data, "tokenise", slowly)
    folder = write({"a": "text"})
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        made = {*pool.map(make, [folder] * 4)}
    assert len(made) == len(calls) == 1
    times = folder / "a"
    os.utime(times, (0, 0))
    assert {make(folder)} == made
    os.rename(folder, tmp_path / "elsewhere")
    assert {make(tmp_path / "elsewhere").name.split("-")[1]} == {made.copy().pop().name.split("-")[1]}
    assert len(calls) == 2  # the name is for people, so it belongs to the name of what was made


@pytest.mark.filterwarnings("ignore:.*held-out side")
@pytest.mark.parametrize("what", ["bytes", "file name", "limit", "holdout", "tokenizer", "bos"])
def test_all_that_determines_the_tokens_is_in_the_name(what, write, bytes_tokenizer, tmp_path):
    def name(limit=None, holdout=0.5, tokenizer=bytes_tokenizer):
        return prepare(Source(str(tmp_path / "text"), limit=limit), tokenizer, tmp_path / "cache", holdout).name

    folder = write({"a": "text", "b": "more"})
    before = name()
    assert name() == before
    if what == "bytes":
        stat = (folder / "a").stat()
        write({"a": "next"})
        os.utime(folder / "a", ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size, same date
        after = name()
    elif what == "file name":
        os.rename(folder / "a", folder / "c")
        after = name()
    elif what == "limit":
        after = name(limit=2)
    elif what == "holdout":
        after = name(holdout=0.6)
    elif what == "tokenizer":
        (tmp_path / "other.model").write_text("other")
        after = name(tokenizer=Bytes(tmp_path / "other.model"))
    else:
        other = Bytes(bytes_tokenizer._path)
        other.bos_id = None
        after = name(tokenizer=other)
    assert after != before


SLOW = """
import sys
from pathlib import Path
from solar import data
from solar.tokenizer import Tokenizer
data.BYTES_PER_WORKER, data.GROUP_BYTES = 1, 1000
if __name__ == "__main__":
    data.prepare(data.Source("stdlib"), Tokenizer(sys.argv[1]), Path(sys.argv[2]), 0.01, workers=2)
"""


@pytest.mark.slow
def test_kill_leaves_nothing_that_looks_finished_and_no_worker(tmp_path, sentencepiece_model):
    (tmp_path / "run.py").write_text(SLOW)
    command = [sys.executable, tmp_path / "run.py", sentencepiece_model, tmp_path / "cache"]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 60
    while len(workers := _children(process.pid)) < 3:  # two, and the tracker of multiprocessing
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.1)
    assert not [name for name in os.listdir(tmp_path / "cache") if not name.startswith(".")]


def _children(pid):
    try:
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        pytest.skip("needs Linux's /proc")


def test_the_command(write, tmp_path, sentencepiece_model, monkeypatch, capsys):
    write({"a.txt": "some text", "b.jsonl": '{"text": "more"}\n', "x.bin": b"\0"})
    monkeypatch.chdir(tmp_path / "text")
    out = tmp_path / "out"

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["data", "--tokenizer", str(sentencepiece_model), "--out", str(out), *argv])
        data.main()
        return capsys.readouterr().out

    said = run("a.txt", "b.jsonl", "--holdout", "0")
    assert re.fullmatch(rf"train    2 documents, \d+ tokens\nheldout  0 documents, 0 tokens\n{out}\n", said)
    with pytest.raises(FileExistsError, match="exists already"):
        run("a.txt")
    assert run("a.txt", "--holdout", "0", "--force").startswith("train    1 documents")
    with pytest.raises(ValueError, match="tokenised already"):
        run("a.txt", str(out), "--force")
    line = [sys.executable, "-m", "solar.data", "x.bin", "--tokenizer", sentencepiece_model, "--out", out, "--force"]
    bad = subprocess.run(line, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert bad.returncode == 2
    assert bad.stderr == "error: x.bin, line 1: a NUL byte, so this is no text file; leave it out\n"
    assert len(open_tokens(out, "train", 600, verify=True)) > 3  # what was there stays


# ------------------------------------------------------------------------------------------------ prepared directories


@pytest.fixture
def made(write, make):
    return make(write({"a": "some text", "b": "more of it"}))


def test_a_prepared_directory_is_a_source(made, make, bytes_tokenizer, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(made, moved)
    assert make(moved) == moved
    with pytest.raises(ValueError, match=r"a limit \(3\) is for text"):
        make(moved, limit=3)
    (tmp_path / "other.model").write_text("other")
    other = Bytes(tmp_path / "other.model")
    with pytest.raises(ValueError, match=f"{data.fingerprint(bytes_tokenizer)[:16]}.*{data.fingerprint(other)[:16]}"):
        prepare(Source(str(moved)), other, tmp_path, 0.0)


def test_a_flipped_bit_is_found(made, make, bytes_tokenizer):
    path = made / "train-00000.bin"
    content = bytearray(path.read_bytes())
    content[2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-00000\.bin: sha256 .* by the manifest"):
        make(made)
    with pytest.raises(ValueError, match="sha256"):
        open_tokens(made, "train", 258, verify=True)
    open_tokens(made, "train", 258)
    content[1] = 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match="id 65280 between tokens 0 and 5, but the vocabulary has 258"):
        open_tokens(made, "train", 258).read(0, 5)


@pytest.mark.parametrize("name", ["train-00000.bin", "train.offsets", "heldout.offsets"])
def test_a_file_that_was_cut_short_or_is_gone(name, made):
    content = (made / name).read_bytes()
    (made / name).write_bytes(content[:-1])
    with pytest.raises(ValueError, match=f"{name}: {len(content) - 1} bytes, but {len(content)} by the manifest"):
        open_tokens(made, "train", 258)
    (made / name).unlink()
    with pytest.raises(ValueError, match=f"{name}: no bytes, but {len(content)}"):
        open_tokens(made, "train", 258)


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw.clear(),
        lambda raw: raw.update(format="another"),
        lambda raw: raw.update(dtype="<f8"),
        lambda raw: raw.update(shard_tokens=0),
        lambda raw: raw.update(splits=[]),
        lambda raw: raw["splits"]["train"].update(tokens="7"),
        lambda raw: raw["splits"]["train"].update(tokens=-7),
        lambda raw: raw["splits"].pop("heldout"),
        lambda raw: raw["files"].pop("train.offsets"),
        lambda raw: raw["files"].update({"train.offsets": 3}),
    ],
)
def test_a_damaged_manifest(damage, made):
    raw = json.loads((made / "manifest.json").read_text())
    damage(raw)
    (made / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"manifest\.json: damaged"):
        open_tokens(made, "train", 258)
    (made / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json: damaged"):
        open_tokens(made, "train", 258)
    (made / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="no manifest"):
        open_tokens(made, "train", 258)


def test_ids_beyond_the_models_vocabulary(made):
    with pytest.raises(ValueError, match="holds the token id 257, but the model's vocabulary has 257"):
        open_tokens(made, "train", 257)


def test_a_large_vocabulary_takes_32_bits(write, tmp_path, bytes_tokenizer):
    class Large(Bytes):
        vocab_size = 1 << 16 | 1

        def encode(self, text, bos=True, eos=False):
            return [1 << 16, 7]

    source = Source(str(write({"a": "text"})))
    tokens = open_tokens(prepare(source, Large(bytes_tokenizer._path), tmp_path, 0.0), "train", Large.vocab_size)
    assert tokens.read(0, 2).tolist() == [1 << 16, 7]


@pytest.mark.filterwarnings("ignore:.*held-out side")
def test_shards_read_as_one_stream(write, make, monkeypatch):
    folder = write({str(i): "abcdefgh"[: i % 9] + "." for i in range(40)})
    whole = open_tokens(make(folder), "train", 258)
    monkeypatch.setattr(data, "SHARD_TOKENS", 32)
    parts = open_tokens(make(folder, holdout=0.0001), "train", 258)  # another name in the cache
    count = len(whole)
    assert len(parts) == count > 250
    assert len(parts.manifest.shards("train")) == -(-count // 32)
    stream = whole.read(0, count)
    for start, stop in itertools.product(range(0, count, 7), range(0, count + 1, 5)):
        if start <= stop:
            assert np.array_equal(parts.read(start, stop), stream[start:stop])
            begins = np.flatnonzero(stream[start:stop] == BOS)
            assert np.array_equal(parts.beginnings(start, stop), begins)


# ------------------------------------------------------------------------------------------------ order


@given(st.integers(1, 3000), st.text(max_size=5))
@settings(max_examples=60)
def test_a_permutation_is_a_bijection(size, key):
    image = permutation(np.arange(size), size, key)
    assert np.array_equal(np.sort(image), np.arange(size))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 1 << 20])
def test_a_permutation_is_a_bijection_at_the_edges(size):
    assert np.array_equal(np.sort(permutation(np.arange(size), size, "x")), np.arange(size))


@given(st.integers(1, 1 << 60), st.integers(0, 1 << 60))
def test_a_permutation_of_many_needs_no_table(size, start):
    index = (start + np.arange(100)) % size if size < 100 else start % (size - 99) + np.arange(100)
    image = permutation(index, size, "x")
    assert len({*image.tolist()}) == len({*index.tolist()})
    assert 0 <= image.min() <= image.max() < size
    assert permutation(index[:1], size, "x")[0] == image[0]  # one by one or together


def test_permutations_are_many_and_random():
    assert len({tuple(permutation(np.arange(4), 4, str(key)).tolist()) for key in range(2000)}) == 24
    image = permutation(np.arange(10_000), 10_000, "x")
    assert abs(np.corrcoef(image, np.arange(10_000))[0, 1]) < 0.03
    assert abs(np.corrcoef(image[1:], image[:-1])[0, 1]) < 0.03
    assert np.bincount(image[:1000] // 1000, minlength=10).min() > 60


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40))
def test_sources_are_interleaved_by_weight(weights):
    pattern = data.interleave(weights)
    slots = np.bincount(pattern, minlength=len(weights))
    assert len(pattern) == data.PERIOD == slots.sum()
    assert slots.min() >= 1
    exact = np.array(weights) / np.sum(weights) * data.PERIOD
    assert np.all(slots - exact < 1 + 1e-6)
    for source in range(
        len(weights)
    ):  # evenly: the distance of two draws is the mean distance, but for what others take
        gaps = np.diff(np.flatnonzero(pattern == source))
        assert gaps.size == 0 or gaps.max() <= data.PERIOD / slots[source] + len(weights) + 1


def test_equal_weights_alternate():
    assert data.interleave([0.5, 0.5]).tolist() == [0, 1] * 512
    assert data.interleave([3, 1])[:8].tolist() == [0, 0, 1, 0] * 2
    assert len({*data.interleave([1.0] * 1024).tolist()}) == 1024
    with pytest.raises(ValueError, match="1025 sources"):
        data.interleave([1.0] * 1025)


@pytest.fixture
def batches(write, make):
    """batches(**options) of two sources, 3 to 1, of 82 and 21 windows of 8 tokens"""
    write({f"{i:02}.txt": "abcdefghij"[: i % 11] + f" {i}" for i in range(60)}, "one")
    write({f"{i}.txt": f"text number {i}" for i in range(10)}, "two")
    sources = [Source(str(write({}, name)), weight) for name, weight in (("one", 3.0), ("two", 1.0))]
    made = [make(source.path) for source in sources]

    def batches(sequence_length=8, batch_size=12, seed=5, document_mask=False):
        return TokenBatches(sources, made, 258, sequence_length, batch_size, seed, document_mask)

    return batches


def test_the_order_never_changes(batches):
    """Frozen: with another order, a run that goes on from a checkpoint would see samples twice and others never."""
    it = batches()
    assert it.windows == [82, 21]
    assert it.rows(0) == GOLDEN[0]
    assert it.rows(100) == GOLDEN[100]


GOLDEN = {
    0: [(0, 80), (0, 39), (1, 1), (0, 70), (0, 46), (0, 50), (1, 16), (0, 0), (0, 34), (0, 52), (1, 0), (0, 8)],
    100: [(0, 28), (0, 49), (1, 16), (0, 19), (0, 42), (0, 59), (1, 12), (0, 54), (0, 75), (0, 6), (1, 8), (0, 58)],
}


def test_rows_are_what_drawing_one_by_one_gives(batches):
    it = batches(batch_size=7)
    pattern = data.interleave([3.0, 1.0]).tolist()
    drawn, expected = [0, 0], []
    for g in range(7 * 300):  # two periods
        k = pattern[g % len(pattern)]
        epoch, nth = divmod(drawn[k], it.windows[k])
        expected.append((k, int(permutation(np.array([nth]), it.windows[k], f"5 {k} {epoch}")[0])))
        drawn[k] += 1
    assert [row for step in range(300) for row in it.rows(step)] == expected
    first = [window for k, window in expected if k == 0]
    epochs = [first[i : i + 82] for i in range(0, 82 * 19, 82)]
    assert all(sorted(epoch) == [*range(82)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    assert batches(batch_size=7, seed=6).rows(0) != it.rows(0)
    assert batches(batch_size=14).rows(3) == it.rows(6) + it.rows(7)


@pytest.mark.parametrize("sequence_length", [2, 3, 8, 50])
def test_an_epoch_learns_every_token_once(sequence_length, batches):
    it = batches(sequence_length)
    for k, tokens in enumerate(it.train):
        stream = tokens.read(0, len(tokens)).tolist()
        batch = it._batch([it._window(k, i) for i in range(it.windows[k])])
        assert torch.equal(batch["labels"], batch["input_ids"])
        assert batch["labels"][:, 1:].flatten().tolist() == stream[1 : it.windows[k] * (sequence_length - 1) + 1]
        assert 0 <= len(stream) - 1 - it.windows[k] * (sequence_length - 1) < sequence_length - 1


def test_document_mask(batches):
    plain, it = batches(), batches(document_mask=True)
    assert "document_ids" not in plain.batch(0)
    for step in range(30):
        batch = it.batch(step)
        assert torch.equal(batch["input_ids"], plain.batch(step)["input_ids"])
        begins = batch["input_ids"] == BOS
        assert torch.equal(batch["labels"], batch["input_ids"].masked_fill(begins, -100))
        steps = batch["document_ids"].diff(dim=1)
        assert torch.equal(steps, begins[:, 1:].long())
        assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_a_batch_in_parts(batches):
    it = batches()
    whole = it.batch(4)["input_ids"]
    assert whole.shape == (12, 8)
    assert torch.equal(
        torch.cat([it.batch(4, slice(0, 5))["input_ids"], it.batch(4, slice(5, 12))["input_ids"]]), whole
    )


@pytest.mark.parametrize(("world", "micro"), [(1, 12), (1, 3), (2, 6), (2, 2), (4, 3), (3, 1)])
def test_ranks_share_the_rows_in_their_order(world, micro, batches):
    it = batches(document_mask=True)
    ranks = [[*it.steps(3, 6, rank, world, micro)] for rank in range(world)]
    for i, step in enumerate(range(3, 6)):
        parts = [parts for column in zip(*(rank[i] for rank in ranks), strict=True) for parts in column]
        assert len(parts) == 12 // micro
        for name, whole in it.batch(step).items():
            assert torch.equal(torch.cat([part[name] for part in parts]), whole)


def test_batches_that_cannot_be_dealt_out(batches):
    with pytest.raises(ValueError, match=r"batch of 12 .* micro-batches of 5 to 2 ranks"):
        batches().steps(0, 1, 0, 2, 5)
    with pytest.raises(ValueError, match="micro-batches of 0"):
        batches().steps(0, 1, 0, 1, 0)


def test_the_thread_ends_with_its_iterator(batches):
    before = threading.active_count()
    it = batches()
    assert [*it.steps(5, 5, 0, 1, 12)] == []
    steps = it.steps(0, 1000, 0, 1, 12)
    next(steps)
    assert threading.active_count() == before + 1
    steps.close()
    assert threading.active_count() == before


def test_what_fails_in_the_thread_is_raised_at_its_step(batches, monkeypatch):
    it = batches()
    rows = it.rows
    monkeypatch.setattr(it, "rows", lambda step: rows(step) if step < 2 else [][step])
    steps = it.steps(0, 9, 0, 1, 12)
    assert len([next(steps), next(steps)]) == 2
    with pytest.raises(IndexError):
        next(steps)


@pytest.mark.parametrize(("batch_size", "world"), [(1, 1), (4, 1), (3, 2), (5, 3)])
@pytest.mark.parametrize("document_mask", [False, True])
def test_held_out_tokens_are_counted_once(batch_size, world, document_mask, write, make):
    folder = write({f"{i}.txt": f"text number {i}" for i in range(60)})
    sources = [Source(str(folder), 2), Source(str(write({"a": "some text"}, "all"))), Source("problems", 1, 10)]
    made = [make(source.path, share, source.limit) for source, share in zip(sources, (0.3, 0.0, 0.1), strict=True)]
    it = TokenBatches(sources, made, 258, 8, 4, 0, document_mask)
    ranks = [dict(it.heldout(batch_size, rank, world)) for rank in range(world)]
    assert all([*rank] == [str(folder), "problems"] for rank in ranks)  # the other one holds nothing out
    for source, held_out in ((str(folder), it.held_out[0]), ("problems", it.held_out[2])):
        shares = [[*rank[source]] for rank in ranks]
        assert len({len(share) for share in shares}) == 1
        batches = [batch for column in zip(*shares, strict=True) for batch in column]
        assert {batch["labels"].shape for batch in batches} == {(batch_size, 8)}
        labels = torch.cat([batch["labels"][:, 1:] for batch in batches]).flatten()
        stream = held_out.read(0, len(held_out))
        learned = stream[1:][stream[1:] != BOS] if document_mask else stream[1:]
        assert labels[labels != -100].tolist() == learned.tolist()
    limited = [*dict(it.heldout(2, 0, 1, limit=3))["problems"]]
    assert [bool((row != -100).any()) for batch in limited for row in batch["labels"]] == [True] * 3 + [False]


def test_identity(batches, write, make):
    identity = batches().identity()
    assert json.loads(json.dumps(identity)) == identity
    assert identity["batch_size"] == 12
    assert [line.split()[0] for line in identity["data"]] == ["one", "two"]
    for other in (batches(batch_size=4), batches(seed=1), batches(sequence_length=9)):
        assert other.identity() != identity
    source = Source(str(write({"new.txt": "a new document"}, "one")), 3.0)
    other = TokenBatches([source], [make(source.path)], 258, 8, 12, 5)
    assert other.identity()["data"][0].split()[0] == "one"
    assert other.identity()["data"][0] != identity["data"][0]


def test_too_little_text_and_a_source_given_twice(write, make):
    source = Source(str(write({"a": "text"})))
    made = make(source.path)
    with pytest.raises(ValueError, match="has 6 tokens to train on, fewer than a sequence of 8"):
        TokenBatches([source], [made], 258, 8, 4, 0)
    assert TokenBatches([source], [made], 258, 6, 4, 0).windows == [1]
    with pytest.raises(ValueError, match="given twice"):
        TokenBatches([source, source], [made, made], 258, 6, 4, 0)
