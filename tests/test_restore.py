"""Checkpoints read back: what is loaded is what was saved, bit for bit, on any number of ranks; exported models."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from solar import snapshot
from solar.checkpoint import load_model
from solar.config import TINY, ModelConfig
from solar.model import Transformer
from solar.restore import export, load
from tests.golden import tiny
from tests.saving import SMALL, Toy, across, alone, build, fill, holds, ranks, same, save, state_of

pytestmark = pytest.mark.usefixtures("one_thread")


# ------------------------------------------------------------------------------------------------ one process


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(root, dtype, fused):
    saved, loaded = build(dtype=dtype, fused=fused), build(dtype=dtype, fused=fused)
    fill(*saved, 1)
    snapshots = alone(root)
    snapshots.save(1, *saved, {"step": 1, "options": {"lr": 0.1, "data": ["ä"]}})
    snapshots.close()
    assert load(snapshots.latest(), *loaded) == {"step": 1, "options": {"lr": 0.1, "data": ["ä"]}}
    assert same(state_of(*saved), state_of(*loaded))
    for model, optimizer in (saved, loaded):
        model(torch.arange(11)).float().sum().backward()
        optimizer.step()
    assert same(state_of(*saved), state_of(*loaded))


def test_before_the_first_step_there_are_no_moments(root):
    saved, loaded = build(), build()
    fill(*loaded, 1)
    snapshots = alone(root)
    snapshots.save(0, *saved, {})
    snapshots.close()
    assert load(root / "step-00000000", *loaded) == {}
    assert same(state_of(*saved), state_of(*loaded))
    assert not loaded[1].state


def test_a_checkpoint_of_another_model_is_refused(root):
    save(alone(root), 1)
    path = root / "step-00000001"

    def refused(change, match, **kwargs):
        toy = Toy()
        change(toy)
        model, optimizer = build(toy, **kwargs)
        before = state_of(model, optimizer)
        with pytest.raises(ValueError, match=match):
            load(path, model, optimizer)
        assert same(before, state_of(model, optimizer))

    refused(lambda toy: setattr(toy, "up", nn.Linear(6, 8)), r"model\.up\.bias is \[7\] float32 in it, \[8\] float32")
    refused(lambda toy: setattr(toy, "more", nn.Linear(2, 2)), r"model\.more\.bias is not in it")
    refused(lambda toy: delattr(toy, "frozen"), r"model\.frozen\.weight of it is not in the model")
    refused(lambda toy: None, "float32 in it, .* bfloat16", dtype=torch.bfloat16)
    refused(lambda toy: toy.up.requires_grad_(False), r"optimizer\.up\.bias\.exp_avg of it belongs to nothing")


# ------------------------------------------------------------------------------------------------ several ranks


def load_and_save_on(group, root: Path, loaded: int | None, saved: int) -> None:
    snapshots = across(group, root)
    model, optimizer = build(sharded=True)
    if loaded is not None:
        assert load(snapshots.latest(), model, optimizer, group) == {"step": loaded}
        one, two = state_of(model, optimizer), build(sharded=True)
        fill(*two, loaded)
        assert same(one, state_of(*two))
    fill(model, optimizer, saved)
    snapshots.save(saved, model, optimizer, {"step": saved})
    snapshots.close()


def test_two_ranks_and_one(root):
    ranks(2, load_and_save_on, root, None, 1)
    assert holds(root / "step-00000001", 1)  # in one process, without FSDP
    save(alone(root), 2)
    ranks(2, load_and_save_on, root, 2, 3)
    ranks(1, load_and_save_on, root, 3, 4)


@pytest.mark.slow
def test_more_ranks_than_some_tensors_have_rows(root):
    for loaded, (size, saved) in zip([None, 1, 2, 3, 4], [(3, 1), (2, 2), (4, 3), (1, 4), (3, 5)], strict=True):
        ranks(size, load_and_save_on, root, loaded, saved)
    assert holds(root / "step-00000005", 5)


def save_replicas(group, root: Path) -> None:
    toy, again = build(sharded=True, replicas=2), build(sharded=True, replicas=2)
    fill(*toy, 1)
    snapshots = across(group, root)
    snapshots.save(1, *toy, {"step": 1})
    snapshots.close()
    load(snapshots.latest(), *again, group)
    assert same(state_of(*toy), state_of(*again))


@pytest.mark.slow
def test_hybrid_sharding_stores_one_copy(root):
    ranks(4, save_replicas, root)
    save(alone(root), 2)
    size = lambda step: sum(file.stat().st_size for file in (root / f"step-{step:08}").glob("*.distcp"))
    assert holds(root / "step-00000001", 1)
    assert size(1) < 1.9 * size(2)


def train_and_resume(group, root: Path) -> None:
    config = SMALL
    batches = [torch.randint(config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(i)) for i in range(6)]

    def start(seed):
        model = Transformer(config)
        model.init_weights(seed)
        return build(model, sharded=True, fused=True)

    def run(model, optimizer, batches):
        for ids in batches:
            model(ids, labels=ids).sum().neg().backward()
            optimizer.step()
            optimizer.zero_grad()

    snapshots, (model, optimizer) = across(group, root), start(0)
    run(model, optimizer, batches[:3])
    with torch.no_grad():
        model(batches[0])  # as an evaluation does, and leaves parameters gathered
    snapshots.save(3, model, optimizer, {"step": 3})
    run(model, optimizer, batches[3:])  # while it is written
    snapshots.close()

    resumed = start(1)
    run(*resumed, batches[5:])  # moments of its own, to be replaced
    assert load(snapshots.latest(), *resumed, group, verified=True) == {"step": 3}
    run(*resumed, batches[3:])
    assert same(state_of(model, optimizer), state_of(*resumed))


@pytest.mark.parametrize("size", [1, 2])
def test_training_goes_on_bit_for_bit(root, size):
    ranks(size, train_and_resume, root)


# ------------------------------------------------------------------------------------------------ exporting


@pytest.fixture
def source(tmp_path) -> Path:
    """A model directory to have been trained from."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.model").write_bytes(b"\0tokens\r\n")
    (source / "upscale.json").write_text('{"plan": []}')
    (source / "notes.txt").write_text("mine")
    return source


@pytest.mark.parametrize("case", ["llama_gqa_head_dim", "llama_tied", "mistral_window"])
def test_export(root, tmp_path, source, case):
    config = ModelConfig.from_hf(tiny.CASES[case])
    model, optimizer = build(Transformer(config))
    fill(model, optimizer, 1)
    snapshots = alone(root, config=config, companions=source)
    shutil.rmtree(source)  # a checkpoint stands for itself
    snapshots.save(1, model, optimizer, {"step": 1})
    snapshots.close()
    step_dir, out = root / "step-00000001", tmp_path / "out"
    assert export(step_dir, out) == out
    assert sorted(os.listdir(out)) == ["config.json", "model.safetensors", "tokenizer.model", "upscale.json"]
    assert (out / "tokenizer.model").read_bytes() == b"\0tokens\r\n"
    exported = load_model(out)
    assert exported.config == config
    assert same(dict(model.state_dict()), dict(exported.state_dict()))

    with pytest.raises(FileExistsError, match="--force"):
        export(step_dir, out, "bfloat16")
    export(step_dir, out, "bfloat16", force=True)
    half = load_model(out)
    assert half.config.torch_dtype == "bfloat16"
    assert same({name: t.bfloat16() for name, t in model.state_dict().items()}, dict(half.state_dict()))
    with torch.no_grad():
        model.model.norm.weight[0] = 1e6
    snapshots.save(2, model, optimizer, {"step": 2})
    snapshots.close()
    with pytest.raises(ValueError, match=r"model\.norm\.weight: values up to 1e\+06 do not fit"):
        export(root / "step-00000002", tmp_path / "overflow", "float16")
    assert not (tmp_path / "overflow").exists()


def export_of_two(group, root: Path) -> None:
    model, optimizer = build(Transformer(SMALL), sharded=True)
    fill(model, optimizer, 1)
    snapshots = across(group, root)
    snapshots.save(1, model, optimizer, {"step": 1})
    snapshots.close()


def test_export_of_what_several_ranks_saved(root, tmp_path, monkeypatch, capsys):
    ranks(2, export_of_two, root)
    model, optimizer = build(Transformer(SMALL))
    fill(model, optimizer, 1)
    monkeypatch.setattr(sys, "argv", ["snapshot", "export", str(root / "step-00000001"), str(tmp_path / "out")])
    snapshot.main()
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    assert same(dict(model.state_dict()), dict(load_model(tmp_path / "out").state_dict()))


def test_a_checkpoint_whose_config_is_of_another_model_is_not_exported(root, tmp_path):
    save(alone(root, config=TINY), 1)
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight is missing, its config\.json implies"):
        export(root / "step-00000001", tmp_path / "out")
    assert not (tmp_path / "out").exists()
