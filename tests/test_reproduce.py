"""A reproduction end to end on a tiny model: windows, trials that are computed once, the report."""

import dataclasses
import json
import sys
import threading
import types

import numpy as np
import pytest
import torch

import train
from solar import cli, evidence, heldout, pool, reproduce, trials
from solar.checkpoint import load_model
from solar.claims import Finding
from solar.config import SOLAR_10_7B, ModelConfig
from solar.intervals import CONTRADICTED, SHOWN
from solar.plan import parse_plan
from solar.tokenizer import Tokenizer
from solar.tokens import Tokens
from tests.training import CONFIG, started, write_model

SIX = dataclasses.replace(CONFIG, num_hidden_layers=6, model_type="llama", sliding_window=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of six layers, and texts of which some documents are held out."""
    folder = tmp_path_factory.mktemp("reproduce")
    texts = write_model(folder / "model", SIX)
    for name, some in (("old", texts[:150]), ("new", texts[150:]), ("other", texts[:40])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in some))
    return folder


@pytest.fixture
def options(folder, tmp_path, monkeypatch):
    """options(**more) of a reproduction in seconds: runs of two steps, a third of the documents held out."""
    monkeypatch.setattr(heldout, "HOLDOUT", 0.3)
    monkeypatch.setattr(trials, "HOLDOUT", 0.3)

    def make(**more):
        return reproduce.Options(
            **{
                "model": str(folder / "model"), "data": [str(folder / "old.jsonl")],
                "domain": str(folder / "new.jsonl"),
                "tokens": 128, "sequence_length": 32, "batch_size": 2, "windows": 6, "out": str(tmp_path / "out"),
                "align": str(tmp_path / "align"), "data_cache": str(folder / "cache"),
            } | more
        )  # fmt: skip

    return make


class Forked:
    """A run of train.py as subprocess.Popen would start it, in a process that has torch already."""

    begun: list[str] = []  # noqa: RUF012 (of all)
    fails: dict[str, str] = {}  # noqa: RUF012 (of all: a part of the name of a run -> its last line)

    def __init__(self, words, stdout, stderr, start_new_session):
        options = cli.parse(train.Options, words[2:], prog="train.py", description="")
        Forked.begun.append(options.out.rpartition("/")[2])
        errors = [error for part, error in Forked.fails.items() if part in options.out]
        self.code = 2 if errors else None
        if errors:
            stdout.write(f"some lines\nerror: {errors[0]}\n".encode())
        else:
            self.process = started(options)

    def wait(self):
        if self.code is None:
            self.process.join()
        return self.code or self.process.exitcode

    def terminate(self):
        pass


@pytest.fixture
def forked(monkeypatch):
    monkeypatch.setattr(trials, "subprocess", types.SimpleNamespace(Popen=Forked))
    monkeypatch.setattr(Forked, "begun", [])
    monkeypatch.setattr(Forked, "fails", {})
    return Forked


def carry_out(options) -> trials.Trials:
    job = trials.Trials(options)
    job.prepare()
    job.carry_out()
    return job


# ------------------------------------------------------------------------------------------------ windows


@pytest.fixture
def windows(options):
    job = trials.Trials(options(only=["d"]))
    job.prepare()
    return job.texts["old"].windows[0]


def test_windows_are_held_out_and_no_window_is_in_both_roles(windows, options, folder):
    (directory,) = (folder / "cache").glob("old-*")
    tokens = Tokens(directory, "heldout", SIX.vocab_size)
    stream = tokens.read(0, len(tokens))
    starts = []
    for (ids, labels), rows in ((windows.report, 6), (windows.choice, 2)):
        assert ids.shape == labels.shape == (rows, 32)
        for row, counted in zip(ids.tolist(), labels.tolist(), strict=True):
            real = [i for i in counted if i != -100]
            (start,) = [i for i in range(0, len(stream), 31) if stream[i : i + 32].tolist() == row[: len(real)]]
            assert real == row[: len(real)]
            starts.append(start)
    assert len(set(starts)) == 8
    documents = [int(np.searchsorted(tokens._offsets[:-1], start, side="right")) for start in starts[:6]]
    assert windows.sample.documents.tolist() == documents
    assert windows.sample.tokens.tolist() == [31] * 6


def test_what_a_window_costs_is_what_the_logits_say(windows, folder):
    model = load_model(folder / "model", dtype=torch.float32)
    ids, labels = windows.report
    with torch.inference_mode():
        logps = model(ids).double().log_softmax(-1)
    expected = -logps[:, :-1].gather(-1, ids[:, 1:, None]).sum(dim=(1, 2))
    assert heldout.nats(model, ids, labels) == pytest.approx(expected.tolist(), rel=1e-6)


def test_text_to_measure_on_is_taken_whole(options, folder):
    job = trials.Trials(options(only=["d"], eval=[str(folder / "other.jsonl:2")]))
    job.prepare()
    (windows,) = job.texts["old"].windows
    (directory,) = (folder / "cache").glob("other-*")
    first = (folder / "other.jsonl").read_text().splitlines()[0]
    assert Tokens(directory, "heldout", SIX.vocab_size).manifest.splits["heldout"].documents == 0
    assert Tokenizer(folder / "model").decode(windows.report[0][0].tolist())[:20] == json.loads(first)["text"][:20]
    assert windows.sample.weight == 1.0


# ------------------------------------------------------------------------------------------------ costs


def test_operations_against_a_count_by_hand():
    config = ModelConfig(
        vocab_size=100, hidden_size=8, intermediate_size=20, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4,
    )  # fmt: skip
    layer = 8 * 8 + 4 * 8 + 4 * 8 + 8 * 8 + 3 * 8 * 20 + 2 * 8  # q, k, v, o, the MLP, two norms
    products = 3 * layer + 8 + 800  # a norm and the head
    attention = 12 * 3 * 2 * 4 * 16
    assert trials.training_flops(config, 16, None) == 6 * products + attention
    assert trials.training_flops(config, 16, 1) == 4 * products + 2 * layer + attention
    assert trials.training_flops(config, 16, 3) == 6 * products + attention - 2 * (8 + 800)


def test_the_base_gets_as_many_operations_as_dus():
    base, dus = (
        trials.training_flops(dataclasses.replace(SOLAR_10_7B, num_hidden_layers=n), 4096, None) for n in (32, 48)
    )
    assert dus / base == pytest.approx(1.49, abs=0.01)


def test_equal_operations_in_steps(options):
    job = trials.Trials(options(tokens=64_000))
    cost = lambda arm: job.steps(arm) * job.flops(job.arms[arm].start)
    assert cost("base-flops") == pytest.approx(cost("dus"), rel=1e-3)
    assert job.steps("dus") == job.steps("base") == 1000
    assert job.steps("dus-early") == 125


# ------------------------------------------------------------------------------------------------ side by side


def test_the_longest_come_first_and_all_are_done(capsys):
    order = []
    tasks = [pool.Task(str(size), size, lambda size=size: order.append(size)) for size in (1, 3, 2)]
    pool.side_by_side("work", tasks, 1, lambda: None)
    assert order == [3, 2, 1]
    assert capsys.readouterr().err == "work 100%  3 of 3, 0 s left\n"


def test_a_failure_stops_the_others_and_is_raised():
    stopped, begun = threading.Event(), []

    def fail():
        raise ValueError("one failed")

    tasks = [pool.Task("long", 3, lambda: stopped.wait(60)), pool.Task("bad", 2, fail)]
    tasks.append(pool.Task("never", 1, lambda: begun.append(1)))
    with pytest.raises(ValueError, match="one failed"):
        pool.side_by_side("work", tasks, 2, stopped.set)
    assert stopped.is_set()


def test_the_time_left_is_by_what_this_call_has_done(capsys):
    tasks = [pool.Task("a", 100, None, lambda: 0.75), pool.Task("b", 100, None, lambda: 0.0)]
    pool.show("work", tasks, {"a": 0.5, "b": 0.0}, set(), 10.0)
    assert capsys.readouterr().err == "work  38%  0 of 2, 50 s left\n"


# ------------------------------------------------------------------------------------------------ trials


def test_everything_is_computed_once(options, forked):
    """Part c twice, then with a second seed: each time only what is new."""
    first = ["dus-lr0.0001-seed0", "dus-m2-lr0.0001-seed0"]
    job = carry_out(options(only=["c"]))
    assert sorted(forked.begun) == first
    assert not list(job.out.glob("runs/*/checkpoints"))
    assert all((job.out / "runs" / name / "model/config.json").is_file() for name in first)
    carry_out(options(only=["c"]))
    assert len(forked.begun) == 2
    carry_out(options(only=["c"], seeds=[0, 1]))
    assert sorted(forked.begun[2:]) == [name[:-1] + "1" for name in first]
    with pytest.raises(ValueError, match="was computed with tokens 128, now it is 256: give another --out"):
        carry_out(options(only=["c"], tokens=256))


def test_a_run_that_fails_is_named_and_the_next_call_does_the_rest(options, forked):
    forked.fails = {"dus-m2": "the disk is full"}
    with pytest.raises(ValueError, match=r"dus-m2-lr0\.0001-seed0: the disk is full \(train\.py ended with 2; .*/log"):
        carry_out(options(only=["c"], jobs=1))
    assert forked.begun == ["dus-lr0.0001-seed0", "dus-m2-lr0.0001-seed0"]  # the deeper one first
    forked.fails = {}
    carry_out(options(only=["c"], jobs=1))
    assert forked.begun[2:] == ["dus-m2-lr0.0001-seed0"]


def test_each_arm_takes_its_best_learning_rate_by_windows_that_are_not_reported(options, forked):
    job = carry_out(options(only=["c"], lrs=[1e-2, 1e-9], seeds=[0, 1], about="a tiny model"))
    assert len(forked.begun) == 2 * 2 + 2
    for arm in ("dus", "dus-m2"):
        chosen = {}
        for lr in (1e-2, 1e-9):
            (roles,) = json.loads(job.losses_path(f"{arm}-lr{lr:g}-seed0").read_text())["old"].values()
            chosen[sum(roles["choice"])] = lr
            assert ("report" in roles) == (job.chosen(arm) == lr)
        assert job.chosen(arm) == chosen[min(chosen)]
        assert f"{arm}-lr{job.chosen(arm):g}-seed1" in forked.begun
    report = reproduce.collect(job)
    assert {row.name: row.lr for row in report.training} == {arm: job.chosen(arm) for arm in ("dus", "dus-m2")}
    assert (report.facts["about"], report.facts["seeds"]) == ("a tiny model", "0 1")


def test_a_learning_rate_that_diverges_is_not_chosen(options, forked):
    forked.fails = {"lr2": "step 7: the gradient is infinite or NaN; nothing was updated or saved. Lower --lr"}
    job = carry_out(options(only=["c"], lrs=[2.0, 1e-4]))
    assert [job.chosen(arm) for arm in ("dus", "dus-m2")] == [1e-4, 1e-4]
    begun = len(forked.begun)
    carry_out(options(only=["c"], lrs=[2.0, 1e-4]))
    assert len(forked.begun) == begun  # nor tried again
    with pytest.raises(ValueError, match=r"dus.*: infinite or NaN with every learning rate, 2, 20; give lower --lrs"):
        carry_out(options(only=["c"], lrs=[2.0, 20.0]))
    with pytest.raises(trials.Diverged, match=r"dus.*-lr200-seed0: step 7: the gradient is infinite or NaN"):
        carry_out(options(only=["c"], lrs=[200.0]))


def test_without_training_the_table_of_idus(options, monkeypatch, capsys):
    """A whole command: the four models of part d, and where part f comes from."""
    words = vars(options(only=["d", "f"], windows=4))
    flags = [
        word
        for name in ("model", "data", "only", "tokens", "windows", "out", "align", "data_cache")
        for word in (
            f"--{name.replace('_', '-')}",
            *map(str, words[name] if name in ("data", "only") else [words[name]]),
        )
    ]
    monkeypatch.setattr(sys, "argv", ["reproduce", *flags, "--sequence-length", "32", "--batch-size", "2"])
    reproduce.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith("out/report.md")
    assert any("`make align` measures them | not measured |" in line for line in lines)
    report = json.loads((trials.Path(words["out"]) / "report.json").read_text())
    assert {row["name"] for row in report["models"]} == {"base", "dus", "idus-1", "idus-2", "random"}
    base, dus = (next(row for row in report["models"] if row["name"] == name) for name in ("base", "dus"))
    assert (base["layers"], dus["layers"]) == ("0-5", "0-4 1-5")
    below = next(row for row in report["findings"] if row["what"] == "DUS is below the base")
    difference = dus["losses"]["old text"] - base["losses"]["old text"]
    assert below["value"].startswith(f"{difference:+.4f} ± ")


def test_what_is_not_to_be_trained_is_measured_untrained_alone(options):
    job = trials.Trials(options(only=["b"], without=["stack", "random"]))
    assert not {("stack", True), ("random", True)} & job.needed.keys()
    assert {("stack", False), ("pro", True)} <= job.needed.keys()


def test_random_weights_are_those_of_the_seed(options):
    job = trials.Trials(options(only=["d"]))
    one, two = (load_model(job.start_dir("random", seed)).state_dict() for seed in (0, 1))
    assert not torch.equal(one["model.layers.0.mlp.up_proj.weight"], two["model.layers.0.mlp.up_proj.weight"])
    assert len(one) == len(load_model(job.start_dir("dus", 0)).state_dict())


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"data": None}, "name the text to train it on with --data"),
        ({"tokens": 0}, "--tokens 0: at least 1"),
        ({"seeds": [1, 1]}, "--seeds: 1 is given twice"),
        ({"sequence_length": 1}, "--sequence-length 1: at least 2"),
        ({"sequence_length": 65}, "--sequence-length 65: the model has room for 64"),
        ({"m": 6}, "M = 6 does not fit"),
        ({"plans": ["dus:9"]}, "M = 9 does not fit"),
        ({"plans": ["nowhere.json"]}, "nowhere.json"),
        ({"plans": ["dus:2", "PLAN"]}, "two of one name"),
        ({"lrs": [0.1, 0.0]}, "--lrs 0.0: a number above 0"),
        ({"group": 1}, "--group 1"),
        ({"without": ["stak"]}, "--without stak: not one of base, dus, stack, "),
        ({"domain": "OLD"}, "it is trained on before"),
        ({"eval": ["OLD"]}, "it is trained on; leave it out"),
        ({"eval": ["OTHER", "SAME"]}, r"old\.jsonl: it is trained on; leave it out"),
        ({"eval": ["FOLDER"]}, "it is trained on; leave it out"),
        ({"data": ["OLD", "model/old.jsonl"]}, r"tells texts by their names; rename a old\.jsonl"),
        ({"eval": ["ONE"]}, "windows of 1 documents; at least 2"),
        ({"model": "nowhere"}, "nowhere"),
    ],
)  # fmt: skip
def test_bad_input_is_said_before_anything_is_computed(options, folder, more, says):
    (folder / "one.jsonl").write_text(json.dumps({"text": "A word and another one. " * 40}) + "\n")
    (folder / "dus-2.json").write_text('[{"layer": 0}]')
    paths = {
        name: f"{folder}/{file}"
        for name, file in (
            ("OLD", "old.jsonl"),
            ("ONE", "one.jsonl"),
            ("PLAN", "dus-2.json"),
            ("OTHER", "other.jsonl"),
            ("SAME", "model/../old.jsonl"),
            ("FOLDER", ""),
        )
    }
    put = lambda value: [paths.get(v, v) for v in value] if isinstance(value, list) else paths.get(value, value)
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        trials.Trials(options(**{name: put(value) for name, value in more.items()})).prepare()


# ------------------------------------------------------------------------------------------------ the report


def test_a_plan_in_one_line():
    assert evidence.spans(parse_plan("dus:3", 12)) == "0-8 3-11"
    assert evidence.spans(parse_plan("expand:3:1", 12)) == "0-3 +3 4-7 +7 8-11 +11"
    assert evidence.spans(parse_plan("idus:9:1", 12)) == "0 9 1 10 2 11"


def test_part_f_is_what_align_has_left(tmp_path):
    (tmp_path / "report.json").write_text(
        json.dumps({"orderings": [{"what": "maths helps", "mean": 0.4417, "half": 0.034, "verdict": "shown"}]})
    )
    (row,) = evidence.orderings(tmp_path)
    assert row == ("f", "maths helps", "arXiv:2312.15166, tables 3 to 8", "+44.2% ± 3.4%", "shown")
    for broken in ("{", "{}", "[]", '{"orderings": [1]}'):
        (tmp_path / "report.json").write_text(broken)
        with pytest.raises(ValueError, match=r"report\.json: no orderings in it; `python -m solar\.recipe "):
            evidence.orderings(tmp_path)


def found() -> evidence.Evidence:
    findings = [
        Finding("a", "it drops", "here", "+0.5000 ± 0.1000", SHOWN),
        Finding("a", "it passes", "there", "-0.5000 ± 0.1000", CONTRADICTED),
        Finding("f", "they are ordered", "there", "`make align` measures them", evidence.NOT_MEASURED),
    ]
    models = [evidence.Model("dus", "0-8 3-11", 18, 7_000, {"old text": 1.0, "stdlib": 2.0})]
    arms = [evidence.Training("domain-pro", "pro", "new", "new domain", 1e-3, 1000, 2000, {"new domain": 0.5})]
    curves = [
        evidence.Curve("base", [(0, 1.0), (100, 0.8), (200, 0.75)], 10),
        evidence.Curve("dus", [(0, 2.0), (100, 0.9), (200, 0.7)], 15),
        evidence.Curve("random", [(0, 9.0), (100, 8.0), (200, 7.0)], 15),
    ]
    return evidence.Evidence({"seeds": "0", "command": "python -m solar.reproduce"}, findings, models, arms, curves)


def test_the_report_has_claims_models_and_curves(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence.importlib.util, "find_spec", lambda name: None)
    text = evidence.write(found(), tmp_path).read_text()
    lines = text.splitlines()
    assert "| it passes | there | -0.5000 ± 0.1000 | contradicted |" in lines
    assert "3 claims: 1 shown, 0 not shown at this size, 1 contradicted, 1 not measured." in lines
    assert "| dus | 0-8 3-11 | 18 | 7,000 | 1.0000 | 2.0000 |  | 2.72 |" in lines
    assert "| domain-pro | pro | new | new domain | 0.001 | 1,000 | 2.00e+06 |  |  | 0.5000 |  |" in lines
    assert "DUS first stood below the base trained on as many tokens after 200 tokens." in lines
    assert "held-out loss; a step is 100 tokens" in lines
    assert not any("random" in line for line in lines[lines.index("## The curves") :])
    assert "| seeds | 0 |" in lines
    assert json.loads((tmp_path / "report.json").read_text())["findings"][0]["verdict"] == "shown"


def test_a_curve_that_stays_above_is_said_to(tmp_path):
    curves = [evidence.Curve("base", [(0, 1.0), (100, 0.8)], 1), evidence.Curve("dus", [(0, 2.0), (100, 0.9)], 1)]
    assert evidence.crossing(curves) == "At no evaluation did DUS stand below the base trained on as many tokens."
    assert evidence.crossing(curves[:1]) == ""


def test_a_picture_where_matplotlib_is(tmp_path):
    pytest.importorskip("matplotlib")
    text = evidence.write(found(), tmp_path).read_text()
    assert "](curves.png)" in text
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_held_out_losses_are_weighed_as_they_were_trained_on(tmp_path):
    for seed, loss in ((0, 1.0), (1, 3.0)):
        (tmp_path / str(seed)).mkdir()
        entries = [
            {"step": 0, "heldout": {"a": loss, "b": 5.0}},
            {"step": 2, "loss": 1.0, "tokens": 30, "tokens_per_second": 15.0},
        ]
        (tmp_path / str(seed) / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    runs = [tmp_path / "0", tmp_path / "1"]
    assert evidence.heldout(runs, {"a": 3.0, "b": 1.0}, 10) == [(0, pytest.approx(0.75 * 2 + 0.25 * 5))]
    assert evidence.seconds(runs[0]) == 2.0
    (tmp_path / "0/metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 1, "heldout": {}}\n')
    assert evidence.heldout(runs[:1], {"a": 3.0}, 10) == []  # nothing was held out
    with pytest.raises(ValueError, match="evaluated on a, b, and not on c"):
        evidence.heldout(runs[1:], {"c": 1.0}, 10)
