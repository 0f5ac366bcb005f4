"""The report on the six benchmarks: lm-evaluation-harness' numbers, going on where a run stopped, ranks, bad input."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from solar import evaluate, standin, tasks
from solar.base import ASSETS
from solar.directory import CheckpointReader
from solar.journal import Journal
from solar.plan import parse_plan, to_json
from solar.tasks import TASKS
from solar.tokenizer import Tokenizer
from tests.test_tasks import GOLDEN
from tests.training import ROOT, write_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("benchmarks") / "standin"
    standin.write(standin.Options(out=str(out)))
    return out


@pytest.fixture
def measure(data, tmp_path, capsys):
    """measure(flags) -> the report, and what was printed."""

    def measure(out="report.json", **flags):
        options = evaluate.Options(**{"data": str(data), "out": str(tmp_path / out)} | flags)
        evaluate.run(options)
        return json.loads((tmp_path / out).read_text()), capsys.readouterr()

    return measure


def compare(report, golden, limit):
    """Every number of a report against lm_eval's."""
    for name in TASKS:
        theirs, mine = [item for item in golden[name]["items"] if item["row"] < limit], report["items"][name]
        assert len(mine) == len(theirs)
        for one, other in zip(mine, theirs, strict=True):
            assert (one["row"], one.get("subject")) == (other["row"], other.get("subject"))
            if name == "gsm8k":
                # transformers takes the first space off a text that it decodes
                assert one["answer"].strip() == other["answer"].strip()
                assert (one["score"], one["flexible"]) == (other["strict"], other["flexible"])
                assert one["flexible_answer"] == other["flexible_answer"]
                continue
            assert one["loglikelihoods"] == pytest.approx(other["loglikelihoods"], rel=1e-5, abs=1e-4)
            if TASKS[name].metric == "mc2":
                assert one["score"] == pytest.approx(other["acc"], rel=1e-3)
            else:
                assert one["score"] == other[TASKS[name].metric]
            if TASKS[name].metric == "acc_norm":
                assert one["acc"] == other["acc"]


CASES = {"plain": {"bos": "no"}, "bos": {}, "cut": {"max_length": 192}}
TOKENS = GOLDEN["max_new_tokens"]


@pytest.mark.parametrize(
    ("case", "limit"),
    [
        ("plain", 3),
        ("bos", 2),
        ("cut", 3),
        *(pytest.param(case, 12, marks=pytest.mark.slow) for case in ("bos", "cut")),
    ],
)
def test_the_harness_s_numbers(case, limit, measure):
    report, _ = measure(limit=limit, max_new_tokens=TOKENS, **CASES[case])
    assert report["settings"]["bos"] is (case != "plain")
    compare(report, GOLDEN[case], limit)
    told = "\n".join(report["deviations"])
    if case == "cut":
        assert f"arc_challenge: {4 * limit} prompts were longer than 192 tokens and lost their beginning" in told
        assert f"gsm8k: {limit} prompts" in told
        assert "truthfulqa: 0 prompts" not in told
    else:
        assert "lost their beginning" not in told


@pytest.mark.slow
def test_the_harness_s_scores_and_standard_errors(measure):
    report, said = measure(bos="no", max_new_tokens=TOKENS)
    compare(report, GOLDEN["plain"], 48)
    for name, entry in report["results"].items():
        assert entry["n"] == 48
        theirs = GOLDEN["plain"][name]["results"]
        if name == "mmlu":
            means = {task.removeprefix("local_mmlu_"): values for task, values in theirs.items()}
            for subject, mine in entry["subjects"].items():
                assert mine["score"] == pytest.approx(means[subject]["acc,none"])
                assert mine["stderr"] == pytest.approx(means[subject]["acc_stderr,none"])
            assert entry["score"] == pytest.approx(sum(values["acc,none"] for values in means.values()) / 3)
            continue
        key = {"gsm8k": "exact_match", "truthfulqa": "acc"}.get(name, entry["metric"])
        kind = "strict-match" if name == "gsm8k" else "none"
        theirs = theirs[f"local_{name}"]
        assert entry["score"] == pytest.approx(theirs[f"{key},{kind}"], rel=1e-4)
        assert entry["stderr"] == pytest.approx(theirs[f"{key}_stderr,{kind}"], rel=1e-4)
        if name == "gsm8k":
            assert entry["flexible"]["score"] == pytest.approx(theirs["exact_match,flexible-extract"])
    mean = sum(entry["score"] for entry in report["results"].values()) / 6
    assert re.search(rf"H6, average of the six +{100 * mean:.2f}\n", said.out)


@pytest.mark.parametrize("name", TASKS)
def test_marks_of_the_harness_s_numbers_are_its_own(name, data):
    """All its questions, marked here from its own log-likelihoods and answers: no model takes part."""
    groups, _ = tasks.load(name, data)
    theirs = iter(GOLDEN["plain"][name]["items"])
    for group in groups:
        for question in group.questions:
            item = next(theirs)
            if name == "gsm8k":
                marks = tasks.mark_answer(question, item["answer"])
                assert (marks["score"], marks["flexible"]) == (item["strict"], item["flexible"])
                continue
            marks = tasks.mark(TASKS[name].metric, question, item["loglikelihoods"])
            wanted = item["acc" if TASKS[name].metric == "mc2" else TASKS[name].metric]
            assert marks["score"] == pytest.approx(wanted, rel=1e-4)
    assert next(theirs, None) is None


# ------------------------------------------------------------------------------------------------ the report

# Short prompts: what is tried here does not depend on the benchmark.
FEW = {"limit": 4, "max_new_tokens": 8, "tasks": "mmlu,winogrande,gsm8k"}


def test_the_report_says_what_it_is_of(measure, data):
    report, said = measure(**FEW | {"tasks": "winogrande,mmlu"})
    assert list(report["results"]) == ["mmlu", "winogrande"]
    assert report["results"]["mmlu"]["aggregation"] == "plain mean over subjects"
    assert report["results"]["mmlu"]["n"] == 12
    assert re.fullmatch("[0-9a-f]{16}", report["model"]["model"])
    assert set(report["data"]) >= {"winogrande/dev.jsonl", "winogrande/train_xl.jsonl", "mmlu/dev/made_up_sums_dev.csv"}
    assert {"python", "torch", "numpy"} <= set(report["versions"])
    assert "mmlu: 3 of the 57 subjects" in report["deviations"]
    assert "average of these 2" in said.out
    assert "note: the questions are made up" in said.out
    assert said.out.splitlines()[-1].endswith("report.json")


@pytest.mark.slow  # the numbers below the report are held to the same in test_scoring.py
def test_batch_size_and_reading_whole_give_the_same_report(measure):
    expected, _ = measure(**FEW)
    for number, flags in enumerate(({"batch_size": 1}, {"batch_size": 64}, {"batch_tokens": 40}, {"no_reuse": True})):
        report, _ = measure(f"{number}.json", **FEW, **flags)
        for name, items in report["items"].items():
            for mine, theirs in zip(items, expected["items"][name], strict=True):
                assert mine.pop("loglikelihoods", 0) == pytest.approx(theirs.get("loglikelihoods", 0), rel=1e-5)
                assert mine.pop("score") == pytest.approx(theirs["score"], rel=1e-4)
                assert mine == {key: theirs[key] for key in mine}


def test_a_killed_run_goes_on(measure, tmp_path, monkeypatch):
    expected, _ = measure("whole.json", **FEW)
    add, calls = Journal.add, []

    def die(self, results):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(add(self, results))

    monkeypatch.setattr(Journal, "add", die)
    with pytest.raises(KeyboardInterrupt):
        measure(**FEW)
    monkeypatch.undo()
    partial = tmp_path / "report.json.partial"
    assert not (tmp_path / "report.json").exists()
    lines = partial.read_bytes().splitlines(keepends=True)
    partial.write_bytes(b"".join(lines) + lines[-1][:20])  # a kill in the middle of a line
    answered = []
    monkeypatch.setattr(Journal, "add", lambda self, results: (answered.extend(results), add(self, answered))[1])
    report, said = measure(**FEW)
    assert f"going on    {len(lines) - 1} questions are answered already" in said.out
    total = sum(entry["n"] for entry in expected["results"].values())
    assert len({key for key, _ in answered}) == total - (len(lines) - 1)
    assert report["items"] == expected["items"]
    assert not partial.exists()


def test_another_model_or_setting_begins_anew(measure, tmp_path):
    kept = Journal(tmp_path / "report.json", {"format": evaluate.FORMAT, "model": "other"})
    kept.add([("key", [1.0])])
    kept.close(done=False)
    _, said = measure(**FEW | {"tasks": "winogrande"})
    assert "was of another run (model other, now" in said.err
    assert "going on" not in said.out


def test_two_ranks_write_the_same_report(measure, data, tmp_path):
    expected, _ = measure(**FEW, batch_size=1)
    out = tmp_path / "two.json"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0",
         "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "solar.evaluate", "--data", str(data),
         "--tasks", FEW["tasks"], "--limit", "4", "--max-new-tokens", "8", "--batch-size", "1", "--out", str(out)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert report["ranks"] == 2
    assert report["items"] == expected["items"]
    assert report["results"] == expected["results"]
    assert done.stdout.count("average of these 3") == 1


def test_a_plan_is_carried_out_while_loading(measure):
    """An expansion by identity blocks answers as the base does; DUS does not."""
    base, _ = measure("base.json", limit=2, tasks="truthfulqa")
    for plan, same in (("expand", True), ("dus", False)):
        report, _ = measure(f"{plan}.json", limit=2, tasks="truthfulqa", plan=plan)
        mine, theirs = (found["items"]["truthfulqa"][0]["loglikelihoods"] for found in (report, base))
        assert (mine == pytest.approx(theirs, rel=1e-5)) is same
        assert report["model"]["plan"] == plan
        depth = CheckpointReader(ASSETS).config.num_hidden_layers
        assert report["model"]["layers"] == to_json(parse_plan(plan, depth))


def test_the_leaderboard_s_protocol(measure):
    report, _ = measure(**FEW, protocol="leaderboard")
    assert report["settings"]["bos"] is False
    assert not [line for line in report["deviations"] if "leaderboard" in line]
    assert all(":" not in item["answer"] for item in report["items"]["gsm8k"])


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"tasks": "arc"}, "--tasks arc: 'arc' is none of arc_challenge"),
        ({"limit": 0}, "--limit 0: at least 1 is needed"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"max_length": 9999}, "--max-length 9999: the model has room for 4096 positions"),
        ({"max_new_tokens": 4096}, "--max-new-tokens 4096: the model reads 4096"),
        ({"data": None}, "--data is needed: .*`python -m solar.tasks` lists"),
        ({"data": "nowhere"}, "--data nowhere: no such directory; `python -m solar.tasks` lists"),
        ({"data": "."}, "^arc_challenge: no test.jsonl"),
        ({"model": "nowhere"}, "nowhere: no such directory"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_computed(measure, flags, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        measure(**flags)


def test_a_report_is_not_replaced_unasked(measure, tmp_path):
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(FileExistsError, match="exists already"):
        measure(**FEW)
    report, _ = measure(**FEW | {"tasks": "winogrande"}, force=True)
    assert report["results"]


def test_a_tokenizer_without_bos(measure, tmp_path, monkeypatch):
    write_model(tmp_path / "model")
    load = Tokenizer.__init__

    def without(self, path):
        load(self, path)
        self.bos_id, self.adds_bos = None, False

    monkeypatch.setattr(Tokenizer, "__init__", without)
    flags = {"model": str(tmp_path / "model"), "tasks": "truthfulqa", "limit": 2}
    with pytest.raises(ValueError, match=r"--bos yes: .*tokenizer\.model has no BOS"):
        measure(**flags, bos="yes")
    said = measure(**flags)[1]
    assert "note: the tokenizer has no BOS: none stands before any text" in said.out
    assert "truthfulqa: 2 of the 817" in said.out
    assert re.search(r"truthfulqa: \d+ prompts were longer than 64 tokens", said.out)


def test_shots_of_another_file_than_the_published_one_are_told(measure, data, tmp_path):
    copy = tmp_path / "data/winogrande"
    copy.mkdir(parents=True)
    for name in ("dev.jsonl", "train_xl.jsonl"):
        (copy / name.replace("train_xl", "fewshot")).write_bytes((data / "winogrande" / name).read_bytes())
    report, _ = measure(data=str(tmp_path / "data"), tasks="winogrande", limit=2)
    assert "winogrande: shots from fewshot.jsonl, not from the published training file" in report["deviations"]
    assert not [line for line in report["deviations"] if "made up" in line]


def test_the_command_ends_with_one_line(data, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "solar.evaluate", "--model", str(ASSETS), "--data", str(data), "--tasks", "mmul"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == f"error: --tasks mmul: 'mmul' is none of {', '.join(tasks.TASKS)}, or all\n"
    assert not Path(tmp_path / "report.json").exists()
