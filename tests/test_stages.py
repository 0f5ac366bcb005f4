"""train.py --stage sft and dpo: each inherits the loop, learns, and computes what the formulas say."""

import contextlib
import json
import math
import re
import signal
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from solar import cli, meter, packed, reference
from solar.checkpoint import CheckpointReader, load_model
from solar.losses import IGNORED
from tests.training import (
    CONFIG,
    as_ranks,
    assert_same_weights,
    flags,
    interrupted_after,
    losses,
    metrics,
    signals_kept,
    started,
    steps,
    weights,
    write_model,
)

LENGTH, HOLDOUT, BETA = 160, 0.2, 0.5
PAIRS = [
    {"prompt": f"{n} and {n % 7}?", "chosen": f"It is {n + n % 7}." + n % 4 * " Yes!", "rejected": f"No, {n % 5}."}
    for n in range(90)
]
CHATS = [{"prompt": pair["prompt"], "response": pair["chosen"]} for pair in PAIRS]
REPORTED = {
    "reward_chosen", "reward_rejected", "margin", "accuracy", "logp_chosen", "logp_rejected", "gamma_ref",
}  # fmt: skip
STAGES = ("sft", "dpo")
pytestmark = pytest.mark.filterwarnings("ignore:.*held-out side")


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """Two tiny models with a tokenizer, chats, pairs and what the first model thinks of these."""
    here = tmp_path_factory.mktemp("stages")
    config = replace(CONFIG, max_position_embeddings=256)
    for name, seed in (("model", 0), ("other", 1)):
        write_model(here / name, config, seed)
    write_rows(here / "chats.jsonl", CHATS)
    write_rows(here / "more.jsonl", [row | {"prompt": f"Or {row['prompt']}"} for row in CHATS])
    for name, rows in (("pairs", PAIRS), ("few", PAIRS[:12])):
        write_rows(here / f"{name}.jsonl", rows)
        refer(here, here / f"{name}.jsonl")
    return here


def refer(place: Path, data: Path | str, **changed) -> None:
    """python -m solar.reference"""
    settings = {
        "model": str(place / "model"), "sequence_length": LENGTH, "holdout": HOLDOUT, "workers": 1, "device": "cpu",
        "data_cache": str(place / "cache"),
    }  # fmt: skip
    reference.run(reference.Options(data=[str(data)], **(settings | changed)))


@pytest.fixture
def options(place, tmp_path):
    """Makes train.py's options for a run of this test."""

    def make(stage: str, out: str = "run", **changed) -> train.Options:
        settings = {
            "stage": stage,
            "model": str(place / "model"),
            "data": [str(place / {"sft": "chats.jsonl", "dpo": "pairs.jsonl", "pretrain": "chats.jsonl"}[stage])],
            "data_cache": str(place / "cache"),
            "out": str(tmp_path / out),
            "device": "cpu",
            "workers": 1,
            "sequence_length": LENGTH,
            "batch_size": 4,
            "save_every": 4,
            "eval_every": 0,
            "holdout": HOLDOUT,
            "lr": 3e-3,
        } | ({"beta": BETA} if stage == "dpo" else {})
        if not changed.keys() & set(train.LENGTHS):
            settings["max_steps"] = 12
        return train.Options(**(settings | changed))

    return make


@pytest.fixture(autouse=True)
def signals():
    with signals_kept():
        yield


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """How fast this machine is takes half a second to measure, and matters to no test here."""
    monkeypatch.setattr(meter, "matrix_rate", lambda device, dtype: 1e11)


def batches_of(options: train.Options) -> packed.ChatBatches:
    model = Path(options.model)
    job = train.Job(options, CheckpointReader(model), train.Tokenizer(model), torch.float32)
    return train.STAGES[options.stage].batches(job)


def heldout(options: train.Options, name: str) -> list[float]:
    """What held-out entries of the only source say, from the first to the last."""
    of = lambda entry: entry["heldout"] if name == "heldout" else {
        source: means[name] for source, means in entry["heldout_means"].items()
    }  # fmt: skip
    return [of(entry)[options.data[0]] for entry in metrics(options) if "heldout" in entry]


# ------------------------------------------------------------------------------------------------ it learns


def test_sft_learns_the_answers(options):
    run = options("sft", max_steps=40, eval_every=20, lr=1e-2)
    train.run(run)
    curve, held_out = losses(run), heldout(run, "heldout")
    assert curve[0] == pytest.approx(math.log(CONFIG.vocab_size), rel=0.03)
    assert len(held_out) == 3
    assert held_out[2] < held_out[0] - 2
    first = steps(run)[0]
    assert first["tokens"] == sum((batches_of(run).batch(0)["labels"] != IGNORED).sum(1).tolist())
    assert not first.keys() & REPORTED


def test_dpo_learns_the_preference(options):
    """Before it learns, policy and reference are one: every loss is ln 2, every reward 0."""
    run = options("dpo", max_steps=30, eval_every=15)
    train.run(run)
    curve = steps(run)
    assert curve[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert curve[0]["margin"] == pytest.approx(0, abs=1e-4)
    held_out = heldout(run, "heldout")
    assert held_out[0] == pytest.approx(math.log(2), abs=1e-6)
    assert held_out[2] < held_out[0] - 0.3
    accuracy = heldout(run, "accuracy")
    assert accuracy[2] > max(0.95, accuracy[0])
    assert curve[-1]["margin"] > 1
    assert curve[0]["pairs"] == batches_of(run).batch(0)["pairs"].sum()


def conversations(options: train.Options, step: int) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """The examples of a step, each a list of (ids, which of them are learned), from the rows and not from a batch."""
    batches = batches_of(options)
    found = []
    for source, index in batches.rows(step):
        for k, i in batches.train[source].row(index).examples:
            parts = batches.examples["train"][k].example(i)
            found.append([(torch.from_numpy(ids), torch.from_numpy(learned)) for ids, learned in parts])
    return found


def logp(model, ids: torch.Tensor, learned: torch.Tensor) -> torch.Tensor:
    """log p(answer | prompt) of one conversation by itself."""
    each = model(ids[None])[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    return each[learned[1:]].double().sum()


@pytest.mark.parametrize("stage", STAGES)
def test_the_first_updates_are_those_that_autograd_and_adamw_give(options, place, stage):
    """The oracle: plain PyTorch, a conversation at a time, the loss written out, two models for DPO."""
    model, frozen = (load_model(place / "model").float() for _ in range(2))
    optimizer = torch.optim.AdamW(train.optim.parameter_groups(model, 0.1), lr=3e-3, betas=(0.9, 0.95))
    run = options(stage, max_steps=3, warmup_steps=0, schedule="constant", clip=1e9, micro_batch_size=2)
    train.run(run)
    for step, entry in enumerate(steps(run)):
        optimizer.zero_grad()
        examples = conversations(run, step)
        if stage == "sft":
            total = -sum(logp(model, *chat) for [chat] in examples)
            loss = total / sum(learned[1:].sum() for [(_, learned)] in examples)
        else:
            total = 0.0
            for chosen, rejected in examples:
                with torch.no_grad():
                    expected = logp(frozen, *chosen) - logp(frozen, *rejected)
                x = BETA * (logp(model, *chosen) - logp(model, *rejected) - expected)
                total = total + torch.log1p(torch.exp(-x))
            loss = total / len(examples)
        loss.backward()
        norm = math.sqrt(sum(p.grad.double().square().sum() for p in model.parameters()))
        assert entry["loss"] == pytest.approx(loss.item(), rel=1e-5 if step == 0 else 1e-3)
        assert entry["grad_norm"] == pytest.approx(norm, rel=1e-4 if step == 0 else 1e-2)
        if step == 0:
            gradients = {name: p.grad.abs() for name, p in model.named_parameters()}
            optimizer.step()
            once = {name: p.detach().clone() for name, p in model.named_parameters()}
        else:
            optimizer.step()
    one = options(stage, "one", max_steps=1, warmup_steps=0, schedule="constant", clip=1e9)
    train.run(one)
    for name, ours in weights(one).items():
        # AdamW's first step has the length lr whatever the gradient is: where that is noise, so is the direction.
        sure = gradients[name] > 1e-3 * gradients[name].max()
        assert sure.any()
        torch.testing.assert_close(ours[sure], once[name][sure], rtol=0, atol=6e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_what_only_saves_memory_does_not_change_the_curve(options, stage):
    plain = options(stage, "plain", max_steps=4)
    train.run(plain)
    for changed in ({"micro_batch_size": 1}, {"recompute": "full"}, {"recompute": "selective", "micro_batch_size": 2}):
        saving = options(stage, str(changed), max_steps=4, **changed)
        train.run(saving)
        assert losses(saving) == pytest.approx(losses(plain), rel=1e-4)
        unit = train.STAGES[stage].unit
        assert [entry[unit] for entry in steps(saving)] == [entry[unit] for entry in steps(plain)]


def test_each_setting_of_the_loss_changes_the_curve_as_its_formula_says(options):
    """At the first step all log-ratios are 0, so each loss is a number that is known; the second tells the rest."""
    curves = {}
    for name, changed, first in (
        ("sigmoid", {}, math.log(2)),
        ("beta", {"beta": 0.1}, math.log(2)),
        ("hinge", {"loss": "hinge"}, 1.0),
        ("ipo", {"loss": "ipo"}, (1 / (2 * BETA)) ** 2),
        ("smoothing", {"label_smoothing": 0.3}, math.log(2)),
        ("sft", {"sft_weight": 0.5}, None),
    ):
        run = options("dpo", name, max_steps=3, warmup_steps=0, **changed)
        train.run(run)
        curves[name] = losses(run)
        if first is None:
            pairs = conversations(run, 0)
            model = load_model(run.model).float()
            means = [logp(model, *chosen).item() / chosen[1][1:].sum().item() for chosen, _ in pairs]
            first = math.log(2) - 0.5 * sum(means) / len(means)
        assert curves[name][0] == pytest.approx(first, rel=1e-4)
    assert len({round(curve[2], 4) for curve in curves.values()}) == len(curves)


# ------------------------------------------------------------------------------------------------ what it writes


def test_options_and_metrics_say_everything_of_a_dpo_run(options):
    run = options("dpo", max_steps=2, eval_every=1)
    train.run(run)
    assert json.loads((Path(run.out) / "options.json").read_text()) == vars(run)
    common = {"step", "loss", "lr", "grad_norm", "tokens_per_second", "mfu", "memory_bytes", "seconds_left"}
    for entry in metrics(run):
        if "heldout" in entry:
            assert entry.keys() == {"step", "heldout", "heldout_means"}
            assert entry["heldout"].keys() == entry["heldout_means"].keys() == {run.data[0]}
            assert entry["heldout_means"][run.data[0]].keys() == REPORTED
        else:
            assert entry.keys() == common | {"pairs"} | REPORTED
            assert entry["margin"] == pytest.approx(entry["reward_chosen"] - entry["reward_rejected"], abs=1e-6)
    assert [entry["step"] for entry in metrics(run)] == [0, 1, 1, 2, 2]
    gammas = heldout(run, "gamma_ref")
    assert gammas[0] != 0
    assert gammas == [gammas[0]] * 3
    table = np.diff(reference.read_reference(run.data[0].replace(".jsonl", ".ref.jsonl"), {}))
    assert gammas[0] == pytest.approx(-table[len(batches_of(run).examples["train"][0]) :].mean(), rel=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_show_batch_prints_and_stops(options, stage, capsys, monkeypatch):
    run = options(stage, show_batch=True, eval_every=1)
    train.run(run)
    said = capsys.readouterr().out
    assert "--- row 0, " + ("pair 0, rejected" if stage == "dpo" else "document 1") in said
    assert "--- row 1, " in said
    assert "[[It is " in said
    assert not Path(run.out).exists()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    train.run(run)
    assert packed.COLOURED[0] + "It is " in capsys.readouterr().out


def test_pairs_are_shown_before_their_reference_is_computed(options, tmp_path, capsys):
    rows = write_rows(tmp_path / "bare.jsonl", PAIRS)
    train.run(options("dpo", data=[str(rows)], show_batch=True))
    assert "--- row 0, pair 0, chosen: " in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ how long, of what


@pytest.mark.parametrize("stage", STAGES)
def test_an_epoch_takes_every_example_once(options, stage):
    for epochs in (1.0, 1.5):
        run = options(stage, str(epochs), epochs=epochs, batch_size=2)
        train.run(run)
        batches = batches_of(run)
        assert len(losses(run)) == math.ceil(epochs * batches.epoch_rows / 2)
    odd = batches.epoch_rows % 2
    pairs = sum(entry["pairs"] for entry in steps(run)[: batches.epoch_rows // 2]) if stage == "dpo" else None
    if pairs is not None and not odd:
        assert pairs == len(batches.examples["train"][0])


@pytest.mark.parametrize(("epochs", "rows", "batch", "expected"), [
    (0.07, 100, 1, 7), (1.1, 50, 1, 55), (0.5, 7, 2, 2), (1.0, 7, 2, 4), (1.0, 3, 8, 1), (1e-6, 7, 2, 1),
])  # fmt: skip
def test_steps_of_so_many_epochs(options, epochs, rows, batch, expected):
    class Some:
        epoch_rows = rows

    assert train.length(options("sft", epochs=epochs, batch_size=batch), Some()) == expected


def test_fewer_rows_than_a_batch(options, place):
    """A step then sees rows more than once, the same however they are dealt out."""
    one, two = (
        options("dpo", str(micro), data=[str(place / "few.jsonl")], epochs=1.0, batch_size=16, micro_batch_size=micro)
        for micro in (16, 4)
    )
    train.run(one)
    train.run(two)
    assert batches_of(one).epoch_rows < 16
    assert losses(one) == pytest.approx(losses(two), rel=1e-5)
    assert len(losses(one)) == 1


def test_weights_and_limits(options, place):
    chats, more = (str(place / name) for name in ("chats.jsonl", "more.jsonl"))
    run = options("sft", data=[f"{chats}:3:40", f"{more}:1"], max_steps=4, eval_every=4)
    train.run(run)
    sources = [source for step in range(4) for source, _ in batches_of(run).rows(step)]
    assert sources.count(0) == 3 * sources.count(1) == 12
    assert sum(len(examples[0]) for examples in batches_of(run).examples.values()) == 40
    assert metrics(run)[0]["heldout"].keys() == {chats, more}
    with pytest.raises(ValueError, match="was trained with data"):
        train.run(options("sft", data=[f"{chats}:3:40", f"{more}:2"], max_steps=4))


def test_pairs_in_two_files_with_their_references(options, place, tmp_path):
    run = options("dpo", data=[str(place / "pairs.jsonl"), str(place / "few.jsonl")], max_steps=2, eval_every=2)
    train.run(run)
    assert losses(run)[0] == pytest.approx(math.log(2), abs=1e-6)
    named = [str(place / "pairs.ref.jsonl"), str(place / "few.ref.jsonl")]
    again = options("dpo", "named", data=run.data, reference=named, max_steps=2)
    train.run(again)
    assert losses(again) == losses(run)


def test_a_reference_pass_beforehand_changes_nothing(options, place, tmp_path):
    plain, after = options("dpo", "plain", max_steps=4), options("dpo", "after", max_steps=4)
    train.run(plain)
    refer(place, plain.data[0], out=str(tmp_path / "again.jsonl"), batch_size=3)
    after.reference = [str(tmp_path / "again.jsonl")]
    train.run(after)
    assert losses(after) == pytest.approx(losses(plain), rel=1e-6)
    seen = [
        batch
        for run in (plain, after)
        for batch in [{name: x for name, x in batches_of(run).batch(3).items() if not name.startswith("reference")}]
    ]
    assert all(torch.equal(seen[0][name], seen[1][name]) for name in seen[0])


# ------------------------------------------------------------------------------------------------ it resumes


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_and_a_stopped_run_end_with_the_bits_of_the_whole_one(options, stage):
    whole, parts = (options(stage, name, max_steps=15, eval_every=5) for name in ("whole", "parts"))
    train.run(whole)
    killed = started(parts, killed_at=7)  # after the save at step 4
    killed.join(120)
    assert killed.exitcode == -signal.SIGKILL
    assert len(losses(parts)) == 6
    with interrupted_after(11), pytest.raises(SystemExit) as stopped:
        train.run(parts)
    assert stopped.value.code == 128 + signal.SIGTERM
    train.run(parts)
    assert losses(parts) == losses(whole)
    measured = {"tokens_per_second", "mfu", "memory_bytes", "seconds_left"}
    timeless = lambda run: [{name: entry[name] for name in entry.keys() - measured} for entry in metrics(run)]
    assert timeless(parts) == timeless(whole)
    assert_same_weights(parts, whole)


@pytest.mark.parametrize("stop", [4, 8])
def test_an_evaluation_that_a_stop_has_cut_off_is_made_up_for(options, stop):
    """SIGTERM leaves no time to evaluate, not even at the last step: who goes on does it, and once."""
    whole, parts = (options("dpo", name, max_steps=8, eval_every=4) for name in ("whole", "parts"))
    train.run(whole)
    with interrupted_after(stop), contextlib.suppress(SystemExit):
        train.run(parts)
    assert [entry["step"] for entry in metrics(parts) if "heldout" in entry] == [*range(0, stop, 4)]
    train.run(parts)
    train.run(parts)
    assert [entry["step"] for entry in metrics(parts) if "heldout" in entry] == [0, 4, 8]
    assert heldout(parts, "margin") == heldout(whole, "margin")


def test_a_finished_run_is_not_cut_short(options):
    train.run(options("sft", max_steps=9))
    with pytest.raises(ValueError, match=r"is after step 9, the run ends with step \d: give more --epochs"):
        train.run(options("sft", epochs=1.0))


@pytest.mark.parametrize("stage", STAGES)
def test_another_template_other_data_and_another_stage_are_not_gone_on_with(options, place, tmp_path, stage):
    def prepared(**changed):
        run = options(stage, max_steps=2, **changed)
        if stage == "dpo":
            run.reference = [str(tmp_path / "ref.jsonl")]
            refer(place, run.data[0], out=run.reference[0], template=run.template, model=run.model)
        return run

    train.run(prepared())
    with pytest.raises(ValueError, match="was trained with data"):
        train.run(prepared(template="plain"))
    rows = write_rows(tmp_path / "rows.jsonl", (CHATS if stage == "sft" else PAIRS)[1:])
    with pytest.raises(ValueError, match="was trained with data"):
        train.run(prepared(data=[str(rows)]))
    with pytest.raises(ValueError, match="was trained with model"):
        train.run(prepared(model=str(place / "other")))
    other = {"sft": "dpo", "dpo": "sft"}[stage]
    with pytest.raises(ValueError, match=f"was trained with stage {stage}, now it is {other}"):
        train.run(options(other, max_steps=2))


def test_another_beta_and_reference_file_are_noted(options, place, tmp_path, capsys):
    train.run(options("dpo", max_steps=2))
    copy = tmp_path / "copy.ref.jsonl"
    copy.write_bytes((place / "pairs.ref.jsonl").read_bytes())
    train.run(options("dpo", max_steps=4, beta=0.1, reference=[str(copy)]))
    said = capsys.readouterr().out
    assert f"note: --beta was {BETA}, now it is 0.1" in said
    assert f"note: --reference was None, now it is ['{copy}']" in said
    assert "after step 2" in said


def test_other_reference_values_are_refused(options, place, tmp_path):
    train.run(options("dpo", max_steps=2))
    header, *rows = (place / "pairs.ref.jsonl").read_text().splitlines()
    moved = [json.dumps(row | {"chosen": row["chosen"] - 50}) for row in map(json.loads, rows)]
    (tmp_path / "other.ref.jsonl").write_text("\n".join([header, *moved]) + "\n")
    with pytest.raises(ValueError, match="was trained with reference"):
        train.run(options("dpo", max_steps=4, reference=[str(tmp_path / "other.ref.jsonl")]))


# ------------------------------------------------------------------------------------------------ ranks, faults


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_learn_what_one_does(options, place, stage):
    """The held-out rows are fewer than two ranks hold at once, so that one of them has rows of padding alone."""
    changed = {"max_steps": 5, "eval_every": 5}
    alone, two = options(stage, "alone", **changed), options(stage, "two", **changed)
    train.run(alone)
    assert as_ranks(two, 2) == [0, 0]
    unit = train.STAGES[stage].unit
    assert [entry[unit] for entry in steps(two)] == [entry[unit] for entry in steps(alone)]
    assert losses(two) == pytest.approx(losses(alone), rel=1e-4)
    for name in REPORTED - {"accuracy"} if stage == "dpo" else ():  # a tie's accuracy is a matter of rounding
        assert [entry[name] for entry in steps(two)] == pytest.approx(
            [entry[name] for entry in steps(alone)], rel=1e-3, abs=1e-3
        )
    assert heldout(two, "heldout") == pytest.approx(heldout(alone, "heldout"), rel=1e-4)
    few = options(stage, "few", data=[str(place / "few.jsonl")], **changed) if stage == "dpo" else None
    if few:
        assert sum(len(rows) for rows in batches_of(few).held_out) <= 2
        assert as_ranks(few, 2) == [0, 0]
        assert all(math.isfinite(loss) for loss in heldout(few, "heldout"))


@pytest.mark.parametrize("stage", STAGES)
def test_nan_stops_and_is_not_saved(options, stage, monkeypatch):
    sound, calls = train.STAGES[stage], []

    def nan_at_step_six(model, batch, **settings):
        calls.append(1)
        loss, count, further = sound.objective(model, batch, **settings)
        return loss * (float("nan") if len(calls) == 6 else 1.0), count, further

    monkeypatch.setitem(train.STAGES, stage, sound._replace(objective=nan_at_step_six))
    run = options(stage)
    with pytest.raises(ValueError, match="step 6: the loss on rank 0 is infinite or NaN; nothing was updated"):
        train.run(run)
    assert [path.name for path in (Path(run.out) / "checkpoints").glob("step-*")] == ["step-00000004"]
    assert not (Path(run.out) / "model").exists()


def test_a_second_run_in_the_same_out_is_refused_until_the_first_has_ended(options):
    first = started(options("sft", max_steps=5000))
    log = Path(options("sft").out) / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (log.is_file() and log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    with pytest.raises(ValueError, match=r"run: another run is at work in it; wait for its end, or give another --out"):
        train.run(options("sft", max_steps=5000))
    assert first.is_alive()
    first.kill()
    first.join()
    reached = len(losses(options("sft")))
    train.run(options("sft", max_steps=reached + 1))
    assert len(losses(options("sft"))) == reached + 1


def test_nothing_held_out_is_said(options, capsys, place, tmp_path):
    run = options("sft", holdout=0.0, max_steps=1, eval_every=1)
    train.run(run)
    assert capsys.readouterr().out.count("held out: nothing, so nothing is evaluated") == 2


# ------------------------------------------------------------------------------------------------ bad input


def bad(case: str, place: Path, tmp_path: Path) -> tuple[str, dict, str]:
    """(stage, changed options, what is said) of a case that must fail."""
    path = lambda name: str(place / name)
    if case == "text":
        (tmp_path / "text.txt").write_text("Some text.\n")
        (tmp_path / "texts.jsonl").write_text('{"text": "Some text."}\n')
    elif case == "bare":
        write_rows(tmp_path / "bare.jsonl", PAIRS)
    return {
        "no reference": ("dpo", {"reference": ["nowhere"]}, "nowhere: no such file; .* python -m solar.reference"),
        "bare": ("dpo", {"data": [str(tmp_path / "bare.jsonl")]}, r"bare\.ref\.jsonl: no such file; .*--data \S*bare"),
        "other model": ("dpo", {"model": path("other")}, r"pairs\.ref\.jsonl was made with model \w+, wanted is \w+"),
        "another length": ("dpo", {"sequence_length": 128}, "was made with sequence_length 160, wanted is 128"),
        "other share": ("dpo", {"holdout": 0.3}, "was made with holdout 0.2, wanted is 0.3"),
        "template": ("dpo", {"template": "plain"}, "was made with template solar, wanted is plain"),
        "two references": ("dpo", {"reference": ["a", "b"]}, "--reference names 2 files for 1 of --data"),
        "no data": ("sft", {"data": None}, "--stage sft learns from files of your own: name them with --data"),
        "no pairs": ("dpo", {"data": None}, "--stage dpo learns from files of your own: name them with --data"),
        "reference with sft": ("sft", {"reference": ["a"]}, "--reference is for --stage dpo, not for sft"),
        "beta with sft": ("sft", {"beta": 0.5}, "--beta is for --stage dpo, not for sft; leave it out"),
        "loss with sft": ("sft", {"loss": "ipo"}, "--loss is for --stage dpo, not for sft; leave it out"),
        "two lengths": ("sft", {"max_steps": 3, "epochs": 1.0}, "--max-steps and --epochs both say how long"),
        "two more": ("dpo", {"max_tokens": 3, "epochs": 1.0}, "--max-tokens and --epochs both say how long"),
        "text": ("sft", {"data": [str(tmp_path / "text.txt")]}, r"text\.txt"),
        "corpus": ("sft", {"data": ["problems"]}, "problems is a corpus of text; this stage takes"),
        "pairs as chats": ("sft", {"data": [path("pairs.jsonl")]}, r"pairs\.jsonl, line 1: no answer"),
        "chats as pairs": ("dpo", {"data": [path("chats.jsonl")]}, r"chats\.jsonl, line 1: no 'chosen'"),
        "no epoch": ("sft", {"epochs": 0.0}, r"--epochs 0\.0: a number above 0"),
        "endless": ("dpo", {"epochs": math.inf}, "--epochs inf: a number above 0"),
        "mixed": ("sft", {"data": [path("chats.jsonl") + ":1", path("more.jsonl")]}, "has a weight and .* has none"),
        "too short": ("sft", {"sequence_length": 8}, r"chats\.jsonl: no example in it is left; dropped, longer than 8"),
        "no room": ("dpo", {"sequence_length": 512}, "the model has room for 256 positions"),
        "beta": ("dpo", {"beta": 0.0}, r"beta 0\.0: a number above 0"),
        "smoothing": ("dpo", {"label_smoothing": 0.5}, r"label smoothing 0\.5"),
        "smooth hinge": ("dpo", {"label_smoothing": 0.1, "loss": "hinge"}, "is for the loss sigmoid, not for hinge"),
        "weight": ("dpo", {"sft_weight": -1.0}, r"weight of the SFT term -1\.0"),
    }[case]  # fmt: skip


@pytest.mark.parametrize("case", [
    "no reference", "bare", "other model", "another length", "other share", "template", "two references", "no data",
    "no pairs", "reference with sft", "two lengths", "two more", "beta with sft",
    "loss with sft", "text", "corpus", "pairs as chats", "chats as pairs",
    "no epoch", "endless", "mixed", "too short", "no room", "beta", "smoothing", "smooth hinge", "weight",
])  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(options, place, tmp_path, capsys, monkeypatch, case):
    stage, changed, message = bad(case, place, tmp_path)
    run = options(stage, **changed)
    monkeypatch.setattr(sys, "argv", ["train.py", *flags(run)])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # cli.run takes it for itself
    with pytest.raises(SystemExit) as ended:
        cli.run(train.main)
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert re.fullmatch(r"error: [^\n]+\n", error), error
    assert re.search(message, error), error
    assert not (Path(run.out) / "metrics.jsonl").exists()
