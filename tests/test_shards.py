"""Tokens that are the text again, whoever made them, and directories that are not what they were."""

import concurrent.futures
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from solar import shards, tokens
from solar.corpus import Source
from solar.shards import fingerprint, prepare
from solar.tokenizer import Tokenizer
from solar.tokens import Manifest, Tokens
from tests.byte_tokenizer import BOS, EOS, Bytes

ROOT = Path(__file__).resolve().parent.parent


class Killed(Bytes):
    def encode(self, text, bos=True, eos=False):
        if multiprocessing.parent_process():
            os._exit(9)
        raise AssertionError("this was to run in a worker")


def texts(directory, split="train"):
    """The documents of a split, from ids that are bytes."""
    tokens = Tokens(directory, split, Bytes.vocab_size)
    starts = tokens.beginnings(0, len(tokens)).tolist()
    documents = [tokens.read(*ends).tolist() for ends in itertools.pairwise([*starts, len(tokens)])]
    assert all(document[0] == BOS and document[-1] == EOS for document in documents)
    return [bytes(document[1:-1]).decode() for document in documents]


# ------------------------------------------------------------------------------------------------ tokenising


def test_both_sides_are_the_text_again(write, make):
    lines = [f"größer {i}" for i in range(100)]
    made = make(write({"a.jsonl": "".join(json.dumps({"text": line}) + "\n" for line in lines)}), 0.3)
    train, held_out = texts(made), texts(made, "heldout")
    assert 10 < len(held_out) < 50
    assert sorted(train + held_out) == sorted(lines)
    assert train == [line for line in lines if line in {*train}]  # in their order


def test_no_held_out_document_is_said(write, make):
    with pytest.warns(UserWarning, match="none of its 1 documents fell to the held-out side"):
        make(write({"a": "text"}), holdout=0.001)


@pytest.mark.parametrize("holdout", [-0.1, 1.0, float("nan")])
def test_a_share_that_is_none(write, make, holdout):
    with pytest.raises(ValueError, match="--holdout"):
        make(write({"a": "text"}), holdout)


@pytest.mark.parametrize(("name", "content"), [("a.txt", ""), ("a.txt", " \n\n"), ("a.jsonl", "\n")])
def test_no_text(name, content, write, make):
    with pytest.raises(ValueError, match="no text in it"):
        make(write({name: content}))


def test_nothing_is_left_of_text_that_is_none(write, make, tmp_path):
    with pytest.raises(ValueError, match="line 2: a NUL byte"):
        make(write({"a": "text\n\0"}))
    assert [name for name in os.listdir(tmp_path / "cache") if not name.endswith(".lock")] == []


def test_bad_lines_are_skipped_and_counted(write, make):
    folder = write({"a.jsonl": 'no\n{"text": "a"}\n[]\n', "b.jsonl": '{"text": "b"}\n'})
    with pytest.warns(UserWarning, match=r"a\.jsonl: 2 lines that could not be read were skipped"):
        made = make(folder, skip_bad_lines=True)
    assert texts(made) == ["a", "b"]
    assert json.loads((made / "manifest.json").read_text())["skipped_lines"] == 2


def test_workers_change_nothing(write, tmp_path, sentencepiece_model, monkeypatch):
    tokenizer = Tokenizer(sentencepiece_model)
    folder = write({f"{i}.txt": f"file {i}: " + "some words and 中文\n" * (40 * i % 97) for i in range(60)})
    monkeypatch.setattr(shards, "GROUP_BYTES", 5000)
    monkeypatch.setattr(shards, "BYTES_PER_WORKER", 1000)
    one, two = (prepare(Source(str(folder)), tokenizer, tmp_path / str(n), 0.1, workers=n) for n in (1, 2))
    assert one.name == two.name
    assert sorted(os.listdir(one)) == sorted(os.listdir(two))
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in os.listdir(one))
    Manifest(one).verify()
    tokens = Tokens(one, "train", tokenizer.vocab_size)
    starts = [*tokens.beginnings(0, len(tokens)).tolist(), len(tokens)]
    decoded = [tokenizer.decode(tokens.read(*ends).tolist()) for ends in itertools.pairwise(starts)]
    paths = sorted(folder.iterdir())
    assert [text for text in (path.read_text() for path in paths) if text in {*decoded}] == decoded
    first = tokens.read(0, starts[1]).tolist()
    assert first == tokenizer.encode(decoded[0], bos=True, eos=True)


def test_a_worker_that_is_killed(write, tmp_path, bytes_tokenizer, monkeypatch):
    monkeypatch.setattr(shards, "BYTES_PER_WORKER", 1)
    source = Source(str(write({"a": "text"})))
    with pytest.raises(ValueError, match=r"one of the 2 tokenising processes was killed.*--workers"):
        prepare(source, Killed(bytes_tokenizer.path), tmp_path / "cache", 0.0, workers=2)
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
        made = prepare(Source(str(tmp_path / name)), Few(bytes_tokenizer.path), tmp_path, 0.0, workers=1)
        assert len(Tokens(made, "train", 258)) > 300
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "big.jsonl").stat().st_size > 20e6
    assert peak < 6e6


def test_prepared_once_whoever_asks(write, make, bytes_tokenizer, tmp_path, monkeypatch):
    calls = []
    tokenise = shards.tokenise

    def slowly(*args):
        calls.append(args)
        time.sleep(0.2)
        return tokenise(*args)

    monkeypatch.setattr(shards, "tokenise", slowly)
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
        other = Bytes(bytes_tokenizer.path)
        other.bos_id = None
        after = name(tokenizer=other)
    assert after != before


SLOW = """
import sys
from pathlib import Path
from solar import shards
from solar.corpus import Source
from solar.tokenizer import Tokenizer
shards.BYTES_PER_WORKER, shards.GROUP_BYTES = 1, 1000
if __name__ == "__main__":
    shards.prepare(Source("stdlib"), Tokenizer(sys.argv[1]), Path(sys.argv[2]), 0.01, workers=2)
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
    while not [*(tmp_path / "cache").glob(".*/train-00000.bin")]:  # the first tokens are there, most are not
        assert time.monotonic() < deadline
        time.sleep(0.01)
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
    with pytest.raises(ValueError, match=f"{fingerprint(bytes_tokenizer)[:16]}.*{fingerprint(other)[:16]}"):
        prepare(Source(str(moved)), other, tmp_path, 0.0)


def test_a_flipped_bit_is_found(made, make, bytes_tokenizer):
    path = made / "train-00000.bin"
    content = bytearray(path.read_bytes())
    content[2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-00000\.bin: sha256 .* by the manifest"):
        make(made)
    with pytest.raises(ValueError, match="sha256"):
        Manifest(made).verify()
    Tokens(made, "train", 258)
    content[1] = 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match="id 65280 between tokens 0 and 5, but the vocabulary has 258"):
        Tokens(made, "train", 258).read(0, 5)


@pytest.mark.parametrize("name", ["train-00000.bin", "train.offsets", "heldout.offsets"])
def test_a_file_that_was_cut_short_or_is_gone(name, made):
    content = (made / name).read_bytes()
    (made / name).write_bytes(content[:-1])
    with pytest.raises(ValueError, match=f"{name}: {len(content) - 1} bytes, but {len(content)} by the manifest"):
        Tokens(made, "train", 258)
    (made / name).unlink()
    with pytest.raises(ValueError, match=f"{name}: no bytes, but {len(content)}"):
        Tokens(made, "train", 258)


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
        lambda raw: raw.update(counts=3),
        lambda raw: raw.update(counts={"train": {"dropped": 3}}),
        lambda raw: raw.update(skipped={"a.jsonl": {"no JSON": ["x", "line 1"]}}),
    ],
)
def test_a_damaged_manifest(damage, made):
    raw = json.loads((made / "manifest.json").read_text())
    damage(raw)
    (made / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"manifest\.json: damaged"):
        Tokens(made, "train", 258)
    (made / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json: damaged"):
        Tokens(made, "train", 258)
    (made / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="no manifest"):
        Tokens(made, "train", 258)


def test_ids_beyond_the_models_vocabulary(made):
    with pytest.raises(ValueError, match="holds the token id 257, but the model's vocabulary has 257"):
        Tokens(made, "train", 257)


def test_a_large_vocabulary_takes_32_bits(write, tmp_path, bytes_tokenizer):
    class Large(Bytes):
        vocab_size = 1 << 16 | 1

        def encode(self, text, bos=True, eos=False):
            return [1 << 16, 7]

    source = Source(str(write({"a": "text"})))
    tokens = Tokens(prepare(source, Large(bytes_tokenizer.path), tmp_path, 0.0), "train", Large.vocab_size)
    assert tokens.read(0, 2).tolist() == [1 << 16, 7]


@pytest.mark.filterwarnings("ignore:.*held-out side")
def test_shards_read_as_one_stream(write, make, monkeypatch):
    folder = write({str(i): "abcdefgh"[: i % 9] + "." for i in range(40)})
    whole = Tokens(make(folder), "train", 258)
    monkeypatch.setattr(tokens, "SHARD_TOKENS", 32)
    parts = Tokens(make(folder, holdout=0.0001), "train", 258)  # another name in the cache
    count = len(whole)
    assert len(parts) == count > 250
    assert len(parts.manifest.shards("train")) == -(-count // 32)
    stream = whole.read(0, count)
    for start, stop in itertools.product(range(0, count, 7), range(0, count + 1, 5)):
        if start <= stop:
            assert np.array_equal(parts.read(start, stop), stream[start:stop])
            begins = np.flatnonzero(stream[start:stop] == BOS)
            assert np.array_equal(parts.beginnings(start, stop), begins)


def test_a_tokenizers_fingerprint_covers_what_stands_beside_its_file(sentencepiece_model, tmp_path):
    """Whether BOS comes before a text, and which pieces were added, decides the ids of a conversation."""
    found = []
    for number, beside in enumerate(
        [
            {},
            {"tokenizer_config.json": {"add_bos_token": False}},
            {"added_tokens.json": {"<|im_start|>": 600, "<|im_end|>": 601}},
            {"added_tokens.json": {"<|im_start|>": 601, "<|im_end|>": 600}},
        ]
    ):
        folder = tmp_path / str(number)
        shutil.copytree(sentencepiece_model, folder)
        for name, content in beside.items():
            (folder / name).write_text(json.dumps(content))
        found.append(fingerprint(Tokenizer(folder)))
    assert len(set(found)) == 4
    assert fingerprint(Tokenizer(sentencepiece_model)) == found[0]
