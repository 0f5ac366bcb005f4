"""train.py: resumed equals uninterrupted, ranks agree, faults are survived, bad input is one line."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import train
from solar.checkpoint import CheckpointReader, load_model, save_model
from solar.manifest import verify
from solar.model import Transformer
from solar.upscale import upscale
from tests.training import (
    CONFIG,
    ROOT,
    assert_same_weights,
    flags,
    interrupted_after,
    launch,
    losses,
    signal_after,
    signals_kept,
    started,
    weights,
    write_model,
)  # fmt: skip


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    """A tiny model with a tokenizer, and a text to train it on."""
    here = tmp_path_factory.mktemp("train")
    texts = write_model(here / "model")
    (here / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return here


@pytest.fixture
def options(workplace, tmp_path):
    """Makes train.py's options for a run of this test."""

    def make(out: str = "run", **changed) -> train.Options:
        settings = {
            "model": str(workplace / "model"),
            "data": [str(workplace / "text.jsonl")],
            "data_cache": str(workplace / "cache"),
            "out": str(tmp_path / out),
            "device": "cpu",
            "workers": 1,
            "max_steps": 12,
            "sequence_length": 32,
            "batch_size": 4,
            "save_every": 4,
            "eval_every": 0,
            "holdout": 0.1,
            "lr": 1e-2,
        }
        return train.Options(**(settings | changed))

    return make


@pytest.fixture(autouse=True)
def signals():
    with signals_kept():
        yield


# ------------------------------------------------------------------------------------------------ it learns


def test_a_run_learns_and_ends_with_a_model(options, capsys):
    done = options(max_steps=30, eval_every=15, lr=2e-2)
    train.run(done)
    curve = losses(done)
    assert curve[0] == pytest.approx(math.log(CONFIG.vocab_size), rel=0.02)
    assert sum(curve[-5:]) / 5 < curve[0] - 1.5
    assert CheckpointReader(Path(done.out) / "model").config == CONFIG
    assert (Path(done.out) / "model/tokenizer.model").is_file()
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == str(Path(done.out) / "model")
    assert sum(line.startswith("step ") for line in lines) == 30
    held_out = [float(found) for line in lines for found in re.findall(r"^held out .*?loss (\S+),", line)]
    assert len(held_out) == 3  # before, in the middle, after
    assert held_out[2] < held_out[0] - 1


def test_the_first_update_is_the_one_that_autograd_and_adamw_give(options, workplace):
    """The oracle: one step in plain PyTorch, no FSDP, no micro-batches, mean cross-entropy."""
    one = options(max_steps=1, micro_batch_size=1, warmup_steps=0, schedule="constant", clip=1e9)
    train.run(one)
    model = load_model(workplace / "model").float()
    optimizer = torch.optim.AdamW(train.optim.parameter_groups(model, 0.1), lr=one.lr, betas=(0.9, 0.95))
    job = train.Job(one, CheckpointReader(workplace / "model"), train.Tokenizer(workplace / "model"), torch.float32)
    batches = train.token_batches(job)
    ids = batches.batch(0)["input_ids"]
    loss = torch.nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    assert losses(one) == [pytest.approx(loss.item(), rel=1e-6)]
    ours = weights(one)
    for name, parameter in model.named_parameters():
        # Every element moves by lr = 0.01, in the direction of its gradient, where that is not as small as epsilon.
        torch.testing.assert_close(ours[name], parameter.detach(), rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    "changed", [{"micro_batch_size": 1}, {"recompute": "full"}, {"recompute": "selective"}], ids=str
)
def test_what_only_saves_memory_does_not_change_the_curve(options, changed):
    plain, saving = options("plain", max_steps=4), options("saving", max_steps=4, **changed)
    train.run(plain)
    train.run(saving)
    assert losses(saving) == pytest.approx(losses(plain), rel=1e-5)


@pytest.mark.slow  # a C++ compiler is at work for most of a minute
def test_compiled_layers_give_the_same_curve(options):
    plain, compiled = options("plain", max_steps=3), options("compiled", max_steps=3, compile=True)
    train.run(plain)
    train.run(compiled)
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)


def test_sixteen_bits_learn_too(options):
    full = options("fp32", max_steps=30, lr=2e-2)
    train.run(full)
    for changed in ({"optimizer_dtype": "bf16"}, {"optimizer_dtype": "bf16", "param_dtype": "bf16", "dtype": "bf16"}):
        half = options(str(len(changed)), max_steps=30, lr=2e-2, **changed)
        train.run(half)
        assert losses(half)[-1] == pytest.approx(losses(full)[-1], abs=0.3)


def test_train_new_changes_the_new_layers_only(options, workplace, tmp_path):
    upscale(workplace / "model", tmp_path / "grown", "expand:3:1", model_type="keep")
    new = json.loads((tmp_path / "grown/upscale.json").read_text())["new_layers"]
    assert new == [1, 3, 5]
    done = options(model=str(tmp_path / "grown"), train="new", max_steps=3)
    train.run(done)
    before, after = load_model(tmp_path / "grown").state_dict(), weights(done)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    expected = {name for name in before if name.startswith(tuple(f"model.layers.{layer}." for layer in new))}
    # What feeds a projection that was zero has no gradient in the first step, but has one in the second.
    assert changed == expected


def test_the_first_twenty_steps_are_what_they_were(options):
    """The golden curve: tests/golden/curve.json, made by this very run. Other processors round otherwise."""
    run = options(max_steps=20)
    train.run(run)
    golden = json.loads((ROOT / "tests/golden/curve.json").read_text(encoding="utf-8"))
    assert losses(run) == pytest.approx(golden, rel=1e-3)


# ------------------------------------------------------------------------------------------------ it resumes


@pytest.mark.parametrize("changed", [{}, {"micro_batch_size": 2}, {"optimizer_dtype": "bf16"}], ids=str)
def test_three_generations_of_a_run_are_one_run_bit_for_bit(options, changed):
    whole, parts = options("whole", max_steps=15, **changed), options("parts", max_steps=15, **changed)
    train.run(whole)
    for stop in (4, 9):
        with interrupted_after(stop), pytest.raises(SystemExit) as stopped:
            train.run(parts)
        assert stopped.value.code == 128 + signal.SIGTERM
    train.run(parts)
    assert losses(parts) == losses(whole)
    assert_same_weights(parts, whole)


def test_a_run_that_has_ended_says_so_and_changes_nothing(options, capsys):
    run = options(max_steps=2)
    train.run(run)
    before = {path: path.stat().st_mtime_ns for path in Path(run.out).glob("checkpoints/*/*")}
    capsys.readouterr()
    train.run(options(max_steps=2, warmup_steps=100, clip=0.5))
    printed = capsys.readouterr().out
    assert "step-00000002 is after step 2, the last: nothing is left to train" in printed
    assert "note:" not in printed
    assert "resuming" not in printed
    assert json.loads((Path(run.out) / "options.json").read_text())["warmup_steps"] == run.warmup_steps
    assert {path: path.stat().st_mtime_ns for path in Path(run.out).glob("checkpoints/*/*")} == before


def test_a_run_that_goes_on_does_not_read_the_base_and_refuses_another_before_it_builds_one(options, monkeypatch):
    with interrupted_after(2), pytest.raises(SystemExit):
        train.run(options(max_steps=4))
    monkeypatch.setattr(train.dist, "load_weights", lambda *_: pytest.fail("the weights are in the checkpoint"))
    train.run(options(max_steps=4))
    monkeypatch.setattr(train, "build", lambda *_, **__: pytest.fail("it is of another run"))
    with pytest.raises(ValueError, match="was trained with seed 0, now it is 1"):
        train.run(options(max_steps=6, seed=1))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_the_exit_code_says_which_signal_it_was(options, number, code):
    with signal_after(number, 2), pytest.raises(SystemExit) as stopped:
        train.run(options(max_steps=4))
    assert stopped.value.code == code


@pytest.mark.slow
def test_two_hundred_steps_over_several_epochs_resume_bit_for_bit(options):
    whole, parts = (options(name, max_steps=200, save_every=30, keep=1) for name in ("whole", "parts"))
    train.run(whole)
    for stop in (50, 101, 150):
        with interrupted_after(stop), pytest.raises(SystemExit):
            train.run(parts)
    train.run(parts)
    assert losses(parts) == losses(whole)
    assert_same_weights(parts, whole)


def test_what_an_interrupted_run_logged_beyond_its_checkpoint_is_taken_back(options, monkeypatch):
    cut, whole = options("cut", max_steps=10), options("whole", max_steps=10)
    train.run(whole)

    def fail(*_):
        raise OSError("the machine goes down")

    with monkeypatch.context() as patch:
        inner = train.Meter.entry
        patch.setattr(
            train.Meter, "entry", lambda meter, step, *rest: fail() if step == 7 else inner(meter, step, *rest)
        )
        with pytest.raises(OSError, match="goes down"):
            train.run(cut)
    assert len(losses(cut)) == 6
    train.run(cut)  # from step 4
    assert losses(cut) == losses(whole)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 1}, r"was trained with seed 0, now it is 1: .*--out"),
        ({"sequence_length": 16}, r"with sequence_length 32, now it is 16"),
        ({"no_resume": True}, r"--no-resume wants an --out without checkpoints"),
    ],
)
def test_another_run_is_not_gone_on_with(options, changed, message):
    train.run(options(max_steps=2))
    with pytest.raises((ValueError, FileExistsError), match=message):
        train.run(options(max_steps=2, **changed))


def test_another_model_or_other_data_is_not_gone_on_with(options, workplace, tmp_path):
    train.run(options(max_steps=2))
    other = Transformer(CONFIG)
    other.init_weights(seed=1)
    save_model(other, tmp_path / "other", companions=workplace / "model")
    with pytest.raises(ValueError, match="was trained with model"):
        train.run(options(max_steps=2, model=str(tmp_path / "other")))
    (tmp_path / "more.txt").write_text((workplace / "text.jsonl").read_text())
    with pytest.raises(ValueError, match="was trained with data"):
        train.run(options(max_steps=2, data=[str(tmp_path / "more.txt")]))


def test_a_finished_run_is_not_cut_short(options):
    train.run(options(max_steps=4))
    before = weights(options())
    with pytest.raises(ValueError, match="is after step 4, the run ends with step 2: give more --max-steps"):
        train.run(options(max_steps=2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(options()).items())


def test_another_out_goes_on_from_a_given_checkpoint(options, tmp_path):
    whole = options("whole", max_steps=6, save_every=2)
    train.run(options("first", max_steps=6, save_every=2, keep=9))
    train.run(whole)
    branch = options("branch", max_steps=6, resume=str(tmp_path / "first/checkpoints/step-00000002"))
    train.run(branch)
    assert_same_weights(branch, whole)
    train.run(branch)  # from its own last checkpoint, not from step 2 again
    assert_same_weights(branch, whole)


def test_damaged_checkpoints_are_not_trained_over(options):
    train.run(options(max_steps=2, keep=1))
    (state,) = (Path(options().out) / "checkpoints/step-00000002").glob("*.distcp")
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    with pytest.raises(ValueError, match="step-00000002 and all before it are damaged"):
        train.run(options(max_steps=4, keep=1))
    assert state.read_bytes() == content


def test_tokens_instead_of_steps_and_isolated_documents(options, capsys):
    run = options(max_steps=None, max_tokens=4 * 32 * 3 + 1, document_mask=True)
    train.run(run)
    assert len(losses(run)) == 4
    assert "step 4/4" in capsys.readouterr().out


def test_a_longer_run_goes_on_and_says_what_was_changed(options, capsys):
    train.run(options(max_steps=2))
    train.run(options(max_steps=4))
    said = capsys.readouterr().out
    assert "after step 2" in said
    assert "note: --max-steps was 2, now it is 4" in said


# ------------------------------------------------------------------------------------------------ ranks


def test_two_ranks_learn_what_one_does_and_pass_their_checkpoints_on(options):
    """1 -> 2 -> 1 ranks, beside one rank all the way; the shapes do not divide by two."""
    alone, mixed = options("alone", max_steps=9, save_every=3), options("mixed", max_steps=9, save_every=3)
    train.run(alone)
    with interrupted_after(3), pytest.raises(SystemExit):
        train.run(mixed)
    done = launch(options("mixed", max_steps=6, save_every=3), ranks=2)
    assert done.returncode == 0, done.stderr
    train.run(mixed)
    assert losses(mixed) == pytest.approx(losses(alone), rel=1e-4)


@pytest.mark.slow
def test_two_ranks_resume_bit_for_bit(options):
    whole, parts = options("whole", max_steps=10), options("parts", max_steps=10)
    assert launch(whole, ranks=2).returncode == 0
    assert launch(parts, ranks=2, fault="kill:1:7").returncode != 0
    assert launch(parts, ranks=2).returncode == 0
    assert losses(parts) == losses(whole)
    assert_same_weights(parts, whole)


def test_a_killed_rank_is_restarted_and_the_curve_is_the_same(options):
    """torchrun --max-restarts: rank 1 is killed once, all start again from the last checkpoint."""
    whole, killed = options("whole", max_steps=8, save_every=2), options("killed", max_steps=8, save_every=2)
    elastic = (
        "--max-restarts",
        "3",
        "--monitor-interval",
        "0.2",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
    )
    done = launch(killed, ranks=2, fault="kill:1:6", torchrun=elastic)
    assert done.returncode == 0, done.stderr
    assert (Path(killed.out) / "survived").exists()
    assert launch(whole, ranks=2).returncode == 0
    assert losses(killed) == losses(whole)
    assert_same_weights(killed, whole)


@pytest.mark.slow
def test_two_nodes_with_hybrid_sharding(options):
    """Two torchruns on one machine, each a "node" of two ranks, copies across and shards within."""
    alone = options("alone", max_steps=4)
    nodes = options("nodes", max_steps=4, sharding="hybrid", micro_batch_size=1)  # replicas are summed once a step
    train.run(alone)
    meet = ("--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:29517", "--rdzv-id", "two")
    first = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *meet, "train.py", *flags(nodes)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    second = launch(nodes, ranks=2, torchrun=meet)
    out, err = first.communicate(timeout=300)
    assert first.returncode == second.returncode == 0, err + second.stderr
    assert "2 copies sharded 2-fold" in out + second.stdout
    assert losses(nodes) == pytest.approx(losses(alone), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("own_store", [True, False])
def test_two_nodes_meet_again_when_a_rank_of_one_was_killed(options, own_store, monkeypatch):
    """Each torchrun counts restarts by itself, so every start needs a store of its own; without, that is said."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", str(int(own_store)))
    whole, killed = options("whole", max_steps=8, save_every=2), options("killed", max_steps=8, save_every=2)
    meet = ("--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:29519", "--rdzv-id", "again")
    meet += ("--max-restarts", "3" if own_store else "1", "--monitor-interval", "0.2")
    with ThreadPoolExecutor(2) as pool:
        nodes = [pool.submit(launch, killed, 1, "kill:1:6", meet) for _ in range(2)]
    done = [node.result() for node in nodes]
    if not own_store:
        assert all(node.returncode for node in done)
        assert any("set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in node.stderr for node in done)
        return
    assert [node.returncode for node in done] == [0, 0], done
    assert (Path(killed.out) / "survived").exists()
    assert launch(whole, ranks=2).returncode == 0
    assert losses(killed) == losses(whole)


# ------------------------------------------------------------------------------------------------ faults


def test_nan_on_one_rank_stops_all_and_is_not_saved(options):
    run = options(max_steps=8, save_every=2)
    done = launch(run, ranks=2, fault="nan:1:4")
    assert done.returncode != 0
    assert "step 4: the loss on rank 1 is infinite or NaN" in done.stderr
    assert sorted(path.name for path in (Path(run.out) / "checkpoints").glob("step-*")) == ["step-00000002"]
    assert not (Path(run.out) / "model").exists()


def test_a_nonfinite_batch_can_be_skipped(options, monkeypatch, capsys):
    sound, calls = train.STAGES["pretrain"], []

    def nan_once(model, batch):
        calls.append(1)
        loss, count, further = train.lm_objective(model, batch)
        return (loss * float("nan") if len(calls) == 3 else loss), count, further

    monkeypatch.setitem(train.STAGES, "pretrain", sound._replace(objective=nan_once))
    run = options(max_steps=6, on_nonfinite="skip")
    train.run(run)
    assert "step 3: the loss on rank 0 is infinite or NaN; skipped" in capsys.readouterr().out
    assert [step for step, loss in enumerate(losses(run), start=1) if loss is None] == [3]
    assert all(tensor.isfinite().all() for tensor in weights(run).values())


def test_skipping_has_an_end(options, monkeypatch):
    always = lambda model, batch: (train.lm_objective(model, batch)[0] * float("inf"), torch.tensor(1), {})
    monkeypatch.setitem(train.STAGES, "pretrain", train.STAGES["pretrain"]._replace(objective=always))
    with pytest.raises(ValueError, match=r"step 10: .* 10 times in a row"):
        train.run(options(max_steps=50, on_nonfinite="skip"))


def kills(options, count: int) -> int:
    """Kill a run that saves at every step, `count` times at random moments of it; each time `latest` loads.

    A run that is done before the signal comes does not count, and is begun again. Returns how many were killed.
    """
    whole, killed = options("whole", max_steps=40, save_every=1), options("killed", max_steps=40, save_every=1)
    started(options("first", max_steps=1)).join()  # the server starts, too
    begun, process = time.monotonic(), started(whole)
    process.join(120)
    length = time.monotonic() - begun
    assert process.exitcode == 0
    generator = torch.Generator().manual_seed(0)
    checkpoints, done = Path(killed.out) / "checkpoints", 0
    while done < count:
        process = started(killed)
        time.sleep(length / 2 * torch.rand(1, generator=generator).item())
        process.kill()
        process.join()
        if process.exitcode == 0:
            shutil.rmtree(killed.out)
            continue
        assert process.exitcode == -signal.SIGKILL
        done += 1
        if (checkpoints / "latest").exists():
            named = checkpoints / (checkpoints / "latest").read_text().strip()
            assert verify(named)["step"] == int(named.name.removeprefix("step-"))
    train.run(killed)
    assert losses(killed) == losses(whole)
    assert_same_weights(killed, whole)
    return done


def test_a_run_survives_kill_9(options):
    assert kills(options, 4) == 4


@pytest.mark.slow
def test_a_run_survives_a_hundred_kill_9(options):
    assert kills(options, 100) == 100


@pytest.mark.parametrize("policy", ["continue", "stop"])
def test_a_disk_that_is_full_for_one_save(options, monkeypatch, capsys, policy):
    def full_at_step_four(phase):
        if phase == "write" and (Path(run.out) / "checkpoints/step-00000002").exists() and not failed:
            failed.append(1)
            raise OSError(28, "No space left on device")

    failed = []
    run = options(max_steps=8, save_every=2, on_save_error=policy)
    monkeypatch.setattr(train.snapshot, "_phase", full_at_step_four)
    if policy == "stop":
        with pytest.raises(OSError, match="no space left on the disk"):
            train.run(run)
    else:
        train.run(run)
        assert "no space left on the disk" in capsys.readouterr().err
        assert len(losses(run)) == 8
    assert failed
    checkpoints = sorted((Path(run.out) / "checkpoints").glob("step-*"))
    # What was learned since the refusal is not thrown away either: it is saved before the run stops.
    assert [int(path.name[5:]) for path in checkpoints] == ([2, 6] if policy == "stop" else [6, 8])
    assert all(verify(path) for path in checkpoints)


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sequence_length": 128}, r"--sequence-length 128: the model has room for 64 positions"),
        ({"data": ["nowhere.txt"]}, r"nowhere.txt: no such file or directory"),
        ({"model": "nowhere"}, r"nowhere: no such directory"),
        ({"train": "nothing-like-this"}, r"--train nothing-like-this: no parameter is left to train"),
        ({"train": "new"}, r"upscale.json would say which layers are new"),
        ({"train": "("}, r"--train \(: "),
        ({"micro_batch_size": 3}, r"--batch-size 4 .* micro-batches of 3 on 1 ranks: it must be a multiple of 3"),
        ({"clip": 0.0}, r"--clip 0.0: a number above 0"),
        ({"lr": float("nan")}, r"--lr nan: a number above 0"),
        ({"max_steps": None, "max_tokens": -5}, r"--max-tokens -5: at least 1"),
        ({"decay": 2.0}, r"--decay 2.0: a share between 0 and 1"),
        ({"betas": [0.9]}, r"--betas 0.9: two numbers"),
        ({"max_steps": 0}, r"--max-steps 0: at least 1"),
        ({"cpu_offload": True}, r"--cpu-offload: without a GPU"),
        ({"resume": "nowhere"}, r"nowhere.*no manifest.json"),
        ({"out": ROOT / "solar/assets/base"}, r"--out \S+/base is a model, and training leaves a folder with"),
    ],
    ids=str,
)
def test_bad_input_is_one_clear_line(options, changed, message):
    with pytest.raises((ValueError, FileNotFoundError, FileExistsError), match=message) as raised:
        train.run(options(**changed))
    assert "\n" not in str(raised.value)


def test_the_command_ends_with_code_2_and_no_traceback(options):
    done = subprocess.run(
        [sys.executable, "train.py", *flags(options(data=["nowhere.txt"]))], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (2, "error: nowhere.txt: no such file or directory\n")
