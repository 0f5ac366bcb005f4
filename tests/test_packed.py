"""Packed rows: every example once an epoch, equal to one example a row, and nothing that ranks could change."""

import json

import numpy as np
import pytest
import torch

from solar import packed
from solar.config import ModelConfig
from solar.corpus import Source
from solar.examples import prepare
from solar.losses import learned
from solar.model import Transformer
from solar.packed import ChatBatches, PairBatches, show
from solar.tokenizer import Tokenizer

T = 320
CHATS = [{"prompt": f"What is {n}?", "response": f"It is {'very ' * (n % 9)}{n}."} for n in range(80)]
PAIRS = [{"prompt": f"Is {n}?", "chosen": f"{n} is {'so ' * (n % 5)}.", "rejected": f"No {n}."} for n in range(60)]
CONFIG = ModelConfig(
    model_type="llama", vocab_size=600, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=320,
)  # fmt: skip
lines = lambda rows: "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="session")
def tokenizer(sentencepiece_model):
    return Tokenizer(sentencepiece_model)


@pytest.fixture
def batches(write, tokenizer, tmp_path):
    """batches(rows of each source, weights, pairs, **options) -> ChatBatches or PairBatches"""

    def batches(sources, weights=None, pairs=False, holdout=0.0, length=T, batch_size=4, seed=5, **options):
        folder = write({f"{i}.jsonl": lines(rows) for i, rows in enumerate(sources)})
        weights = weights or [None] * len(sources)
        sources = [Source(str(folder / f"{i}.jsonl"), weight) for i, weight in enumerate(weights)]
        made = [
            prepare(source, tokenizer, tmp_path / "cache", holdout, "solar", length, pairs, workers=1)
            for source in sources
        ]
        kind = PairBatches if pairs else ChatBatches
        return kind(sources, made, tokenizer.vocab_size, length, batch_size, seed, **options)

    return batches


def documents(batch, pairs=False):
    """The (ids, learned ids) of every document that is no padding, over all rows of a batch."""
    found = []
    for ids, labels, numbers in zip(batch["input_ids"], batch["labels"], batch["document_ids"], strict=True):
        assert torch.all(numbers.diff() >= 0)
        for number in numbers.unique().tolist():
            here = numbers == number
            if (labels[here] != -100).any():
                found.append((tuple(ids[here].tolist()), tuple(labels[here].tolist())))
            else:
                assert not ids[here].any()
    return found


def expected(it, split="train"):
    return sorted(
        (tuple(ids.tolist()), tuple(np.where(mask, ids, -100).tolist()))
        for examples in it.examples[split]
        for _, parts in examples.units()
        for ids, mask in parts
    )


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("pack_rows", [False, True])
def test_a_pool_shows_every_example_once_an_epoch(pairs, pack_rows, batches):
    rows = PAIRS if pairs else CHATS
    it = batches([rows[:50], rows[50:]], pairs=pairs, batch_size=1, pack_rows=pack_rows)
    assert it.epoch_rows == (len(rows) if not pack_rows else it.epoch_rows)
    epochs = [[it.batch(step) for step in range(e * it.epoch_rows, (e + 1) * it.epoch_rows)] for e in range(2)]
    for epoch in epochs:
        assert sorted(document for batch in epoch for document in documents(batch)) == expected(it)
        assert {batch["input_ids"].shape for batch in epoch} == {(1, T)}
    assert [documents(batch) for batch in epochs[0]] != [documents(batch) for batch in epochs[1]]
    if pack_rows:
        assert it.epoch_rows < len(rows) / 2
        two = {k for row in it.train for i in range(len(row)) for k in [len({s for s, _ in row.row(i).examples})]}
        assert two == {1, 2}  # rows hold examples of both sources


def test_with_weights_rows_are_drawn_by_them(batches):
    it = batches([CHATS[:60], CHATS[60:]], [3.0, 1.0])
    sources = [source for step in range(64) for source, _ in it.rows(step)]
    assert sources.count(0) == 3 * sources.count(1) == 192
    assert all({k for k, _ in rows.row(i).examples} == {n} for n, rows in enumerate(it.train) for i in range(len(rows)))
    assert it.epoch_rows == sum(map(len, it.train))
    assert [line.split(" x ")[1] for line in it.identity()["data"]] == ["3", "1"]
    with pytest.raises(ValueError, match=r"0\.jsonl has a weight and .*1\.jsonl has none: give a weight"):
        batches([CHATS[:60], CHATS[60:]], [3.0, None])


def loss_and_gradients(model, batch):
    model.zero_grad()
    logps = model(batch["input_ids"], labels=batch["labels"], document_ids=batch["document_ids"])
    (-logps.sum()).backward()
    return -logps.sum().item(), learned(batch["labels"]).sum().item(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("pairs", [False, True])
def test_packed_equals_one_by_one_in_loss_and_gradient(pairs, batches):
    model = Transformer(CONFIG)
    model.init_weights(0)
    it = batches([PAIRS[:30] if pairs else CHATS[:30]], pairs=pairs, batch_size=1)
    alone = batches([PAIRS[:30] if pairs else CHATS[:30]], pairs=pairs, batch_size=1, pack_rows=False)
    whole = [loss_and_gradients(model, it.batch(step)) for step in range(it.epoch_rows)]
    single = [loss_and_gradients(model, alone.batch(step)) for step in range(alone.epoch_rows)]
    # ... and each conversation in a batch of its own, without padding and without document_ids
    bare = []
    for _, parts in it.examples["train"][0].units():
        for ids, mask in parts:
            labels = torch.from_numpy(np.where(mask, ids, -100))[None]
            bare.append(loss_and_gradients(model, {
                "input_ids": torch.from_numpy(ids)[None], "labels": labels, "document_ids": None,
            }))  # fmt: skip
    total = lambda runs: [sum(gradients) for gradients in zip(*(gradients for _, _, gradients in runs), strict=True)]
    for other in (single, bare):
        assert sum(count for _, count, _ in whole) == sum(count for _, count, _ in other)
        assert sum(loss for loss, _, _ in whole) == pytest.approx(sum(loss for loss, _, _ in other), rel=1e-5)
        for a, b in zip(total(whole), total(other), strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("pairs", [False, True])
def test_ranks_share_the_rows_in_their_order(pairs, batches):
    it = batches([PAIRS if pairs else CHATS], pairs=pairs, batch_size=12)
    for world, micro in ((1, 12), (2, 3), (3, 1)):
        ranks = [[*it.steps(2, 4, rank, world, micro)] for rank in range(world)]
        for i, step in enumerate(range(2, 4)):
            parts = [part for column in zip(*(rank[i] for rank in ranks), strict=True) for part in column]
            whole = it.batch(step)
            for name in ("input_ids", "labels", "document_ids"):
                assert torch.equal(torch.cat([part[name] for part in parts]), whole[name])
            if pairs:  # each batch is as wide as it must be
                assert sum(part["pairs"].sum() for part in parts) == whole["pairs"].sum()
                assert all(part["pairs"].shape == (micro, part["pairs"].sum(1).max()) for part in parts)


def test_pairs_and_their_reference(batches):
    def reference(it):
        random = np.random.default_rng(0).random
        sizes = ({split: len(it.examples[split][k]) for split in ("train", "heldout")} for k in range(2))
        return [{split: random((count, 2)) for split, count in source.items()} for source in sizes]

    sources = [PAIRS[:40], PAIRS[40:]]
    bare = batches(sources, pairs=True, holdout=0.3)
    values = reference(bare)
    it = batches(sources, pairs=True, holdout=0.3, reference=values)
    known = {}
    for split in ("train", "heldout"):
        for k, examples in enumerate(it.examples[split]):
            for i, (chosen, rejected) in examples.units():
                known[tuple(chosen.ids), tuple(rejected.ids)] = values[k][split][i].tolist()
    held_out = [batch for _, shares in it.heldout(3) for batch in shares]
    seen = 0
    for batch in [it.batch(step) for step in range(3)] + held_out:
        assert batch["pairs"].dtype == torch.bool
        assert batch["reference_chosen"].dtype == torch.float64
        for b, count in enumerate(batch["pairs"].sum(1).tolist()):
            assert batch["pairs"][b].tolist() == [j < count for j in range(batch["pairs"].shape[1])]
            numbers = batch["document_ids"][b]
            assert numbers.max() <= 2 * count
            for j in range(count):
                sides = tuple(tuple(batch["input_ids"][b][numbers == n].tolist()) for n in (2 * j, 2 * j + 1))
                assert [batch["reference_chosen"][b, j], batch["reference_rejected"][b, j]] == known[sides]
                seen += 1
            assert not batch["reference_chosen"][b, count:].any()
    assert seen > 40
    assert any(batch["pairs"].sum() == 0 or not batch["pairs"][-1].any() for batch in held_out)  # rows of padding
    assert "reference_chosen" not in bare.batch(0)
    assert {name: x.tolist() for name, x in bare.batch(0).items()}.items() <= {
        name: x.tolist() for name, x in it.batch(0).items()
    }.items()
    values[1]["heldout"] = values[1]["heldout"][:-1]
    with pytest.raises(ValueError, match=r"1\.jsonl: reference log-probabilities of shape .* for heldout.* are needed"):
        batches(sources, pairs=True, holdout=0.3, reference=values)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize(("batch_size", "world"), [(1, 1), (2, 2), (3, 2)])
def test_held_out_examples_are_seen_once(pairs, batch_size, world, batches):
    rows = PAIRS if pairs else CHATS
    it = batches([rows[:50], rows[50:]], pairs=pairs, holdout=0.4)
    ranks = [dict(it.heldout(batch_size, rank, world)) for rank in range(world)]
    assert [[*rank] for rank in ranks] == [it.names] * world
    shares = [[[*rank[name]] for rank in ranks] for name in it.names]
    assert all(len({len(share) for share in source}) == 1 for source in shares)
    seen = [batch for source in shares for share in source for batch in share]
    assert {batch["input_ids"].shape for batch in seen} == {(batch_size, T)}
    assert sorted(document for batch in seen for document in documents(batch)) == expected(it, "heldout")
    limited = [*dict(it.heldout(2, 0, 1, limit=1))[it.names[0]]]
    assert [bool((row != -100).any()) for batch in limited for row in batch["labels"]] == [True, False]


def test_identity_and_a_row_that_is_too_short(batches):
    it = batches([CHATS])
    assert json.loads(json.dumps(it.identity())) == it.identity()
    for other in (
        batches([CHATS], seed=6), batches([CHATS], batch_size=2), batches([CHATS], length=319),
        batches([CHATS], pack_rows=False), batches([CHATS], [1.0]), batches([CHATS[1:]]),
    ):  # fmt: skip
        assert other.identity() != it.identity()
    directories = [examples.directory for examples in it.examples["train"]]
    with pytest.raises(ValueError, match=r"holds examples of \d+ tokens, more than a row of 20"):
        ChatBatches(it.sources, directories, 600, 20, 4, 0)
    with pytest.raises(ValueError, match="given twice"):
        ChatBatches([*it.sources] * 2, directories * 2, 600, T, 4, 0)


@pytest.mark.filterwarnings("ignore:.*held-out side")
def test_nothing_to_train_on_is_an_error(batches):
    with pytest.raises(ValueError, match=r"0\.jsonl has no examples to train on"):
        batches([CHATS[:2]], holdout=0.999999)


def test_what_there_is_is_described(batches):
    bad = {"prompt": "word " * 400, "response": "x"}
    it = batches([[*CHATS, bad], CHATS[:20]], holdout=0.2)
    lines = it.describe(3 * it.epoch_rows)
    train, held_out = (len(it.examples[split][0]) for split in ("train", "heldout"))
    assert f"0.jsonl: {train} examples to train on, {held_out} held out; " in lines[0]
    assert "0.jsonl: dropped, longer than 320 tokens: 1 (first: " in lines[1]
    assert "1.jsonl: " in lines[2]
    tokens = sum(examples.lengths().sum() for examples in it.examples["train"])
    share = tokens / (it.epoch_rows * T)
    assert lines[3] == f"{it.epoch_rows} rows of 320 tokens in an epoch, {share:.1%} filled; 3.00 epochs"


def test_a_batch_is_shown(batches, tokenizer):
    it = batches([[{"prompt": "Größe 🙂?", "response": "One 🙂.\nTwo."}]], batch_size=1)
    assert show(it.batch(0), tokenizer).splitlines() == [
        f"--- row 0, document 0: {it.train[0].tokens} tokens, {learned(it.batch(0)['labels']).sum()} learned",
        "<s>### User:", "Größe 🙂?", "", "### Assistant:", "[[One 🙂.", "Two.</s>]]",
        f"--- row 0: {T - it.train[0].tokens} tokens of padding",
    ]  # fmt: skip
    it = batches([PAIRS], pairs=True, batch_size=2)
    shown = show(it.batch(0), tokenizer, rows=2, marks=packed.COLOURED)
    assert shown.count("\033[32m") == shown.count("\033[0m") == 2 * it.batch(0)["pairs"].sum()
    assert "--- row 1, pair 0, rejected: " in shown
    plain = {"input_ids": torch.tensor([[1, 300, 301]]), "labels": torch.tensor([[-100, 300, 301]])}
    assert show(plain, tokenizer).startswith("--- row 0, document 0: 3 tokens, 2 learned\n<s>[[")
