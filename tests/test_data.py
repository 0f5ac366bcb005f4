"""An order that is a function of the step, batches that hold every token once, and the command."""

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from solar import data
from solar.corpus import Source
from solar.data import TokenBatches
from solar.permutation import permutation
from solar.tokens import Manifest
from tests.byte_tokenizer import BOS

ROOT = Path(__file__).resolve().parent.parent


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
        batch = it._batch([it._row(k, i) for i in range(it.windows[k])])
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
    sources = [Source(str(folder), 2), Source(str(write({"a": "some text"}, "all")), 1), Source("problems", 1, 10)]
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


def test_without_weights_every_window_is_seen_once_an_epoch(write, make):
    big, small = write({"a": "some longer text " * 60}, "big"), write({"a": "a short text " * 20}, "small")
    sources = [Source(str(big)), Source(str(small))]
    it = TokenBatches(sources, [make(source.path) for source in sources], 258, 8, 4, 0)
    assert it.windows == [145, 37]
    seen = [row for step in range(46) for row in it.rows(step)][: sum(it.windows)]
    for source, count in enumerate(it.windows):
        mine = [row for k, row in seen if k == source]
        assert abs(len(mine) - count) <= 1  # 37 of 182 are 208.2 of 1,024
        assert len({*mine}) == min(len(mine), count)
    assert it.describe(2 * sum(it.windows)) == [
        f"{big}: {len(it.train[0]):,} tokens to train on, 0 held out; 145 sequences, 79.7% of those drawn, 2.00 passes",
        f"{small}: {len(it.train[1])} tokens to train on, 0 held out; 37 sequences, 20.3% of those drawn, 2.00 passes",
    ]
    with pytest.raises(ValueError, match=r"big has a weight and .*small has none: give a weight to every source"):
        TokenBatches([Source(str(big), 1.0), Source(str(small))], [], 258, 8, 4, 0)


def test_a_source_given_twice_is_seen_through_its_spelling(write):
    place = write({"a": "text"}, "one")
    with pytest.raises(ValueError, match="is given twice"):
        data.check_sources([Source(str(place), 1.0), Source(f"{place}/../one", 2.0)])


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
    assert other.identity()["data"][0].endswith(" x 3")
    bare = TokenBatches([Source(source.path)], [make(source.path)], 258, 8, 12, 5)
    assert bare.identity()["data"][0] == other.identity()["data"][0].removesuffix(" x 3")


def test_too_little_text_and_a_source_given_twice(write, make):
    source = Source(str(write({"a": "text"})))
    made = make(source.path)
    with pytest.raises(ValueError, match="has 6 tokens to train on, fewer than a sequence of 8"):
        TokenBatches([source], [made], 258, 8, 4, 0)
    assert TokenBatches([source], [made], 258, 6, 4, 0).windows == [1]
    with pytest.raises(ValueError, match="given twice"):
        TokenBatches([source, source], [made, made], 258, 6, 4, 0)


# ------------------------------------------------------------------------------------------------ the command


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
    Manifest(out).verify()  # what was there stays
