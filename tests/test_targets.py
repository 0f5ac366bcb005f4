"""The Makefile's targets of tuning and aligning, run as a user runs them: on small files, with a tiny model."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest

from solar import instructions, recipe
from solar.checkpoint import CheckpointReader
from tests.test_commands import ROOT, shell
from tests.training import CONFIG, write_model

FEW = "ARGS='--max-steps 2'"


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The Makefile beside the code, a tiny model, and generated files of 40 rows."""
    tree = tmp_path_factory.mktemp("targets")
    for name in ("solar", "kernels", "train.py", "Makefile", "requirements.txt"):
        (tree / name).symlink_to(ROOT / name)
    write_model(tree / "tiny", dataclasses.replace(CONFIG, max_position_embeddings=512, sliding_window=None))
    for name, rows in (("alpaca", 40), ("orca", 40), ("feedback", 40)):
        make = getattr(instructions, f"make_{name}")
        make(instructions.Options(out=str(tree / f"{name}.jsonl"), count=rows))
    instructions.make_feedback(instructions.Options(out=str(tree / "more.jsonl"), count=30, seed=5))
    return tree


def config_of(path: Path):
    return CheckpointReader(path).config


def test_nothing_to_begin_with_is_said_with_the_target_that_makes_it(tree):
    for target, missing, maker in (("sft", "out/pretrain/model", "pretrain"), ("dpo", "out/sft/model", "sft"),
                                   ("sdpo", "out/sft/model", "sft")):  # fmt: skip
        done = shell(tree, f"make {target} DATA='alpaca.jsonl'")
        assert done.returncode == 2, target
        assert f"error: {missing} does not exist yet: `make {maker}` makes it" in done.stderr


def test_tuning_takes_weights_and_limits(tree):
    done = shell(tree, f"make sft MODEL=tiny DATA='alpaca.jsonl:0.5:20 orca.jsonl:0.5' OUT=out/sft-tiny {FEW}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "out/sft-tiny/model"
    assert config_of(tree / "out/sft-tiny/model").hidden_size == CONFIG.hidden_size


def test_aligning_computes_the_reference_first(tree):
    done = shell(tree, f"make dpo MODEL=tiny DATA=feedback.jsonl OUT=out/dpo-tiny PAIRS='--template plain' {FEW}")
    assert done.returncode == 0, done.stderr
    assert json.loads((tree / "feedback.ref.jsonl").read_text().splitlines()[0])["template"] == "plain"
    assert re.search(r"step 1/2  loss 0\.6931", done.stdout)


def test_aligning_in_steps_goes_on_from_the_step_before(tree):
    done = shell(tree, f"make sdpo MODEL=tiny DATA='feedback.jsonl more.jsonl' {FEW}")
    assert done.returncode == 0, done.stderr
    order = (tree / "out/sdpo/order").read_text().splitlines()[-1].split()
    assert sorted(order) == ["feedback.jsonl", "more.jsonl"]
    second = json.loads((tree / "out/sdpo/step-2/options.json").read_text())
    assert second["model"] == "out/sdpo/step-1/model"
    assert second["data"] == order[1:]
    assert len(re.findall(r"step 1/2  loss 0\.6931", done.stdout)) == 2  # each reference is the model of its step
    merged = shell(tree, "make merge MODELS='out/sdpo/step-1/model out/sdpo/step-2/model' OUT=merged")
    assert merged.returncode == 0, merged.stderr
    assert config_of(tree / "merged") == config_of(tree / "tiny")


def test_a_failing_step_fails_the_target(tree):
    shutil.rmtree(tree / "out/sdpo", ignore_errors=True)
    done = shell(tree, "make sdpo MODEL=tiny DATA='feedback.jsonl more.jsonl' ARGS='--lr 0'")
    assert done.returncode == 2
    assert "--lr 0.0" in done.stderr


def test_the_whole_recipe_makes_the_models_that_are_measured(tree):
    plan = shell(tree, "make -n align").stdout
    made = set(re.findall(r"--out out/align/([\w.+-]+?)(?:/model)?(?:\s|$)", plan))
    assert {row.name for row in recipe.MODELS} <= made
    for command in plan.splitlines():
        if "--stage dpo" in command:  # a policy's reference is the model that it begins with
            model = re.search(r"--model out/align/([\w.+-]+)/model", command)[1]
            assert all(name == model for name in re.findall(r"out/align/ref/[\w-]+/([\w.+-]+)\.jsonl", command))


@pytest.mark.slow
def test_a_model_is_analysed(tree):
    few = "--depth 4 --budget 3 --window 32 --calibration 40 --validation 40 --reporting 40"
    done = shell(tree, f"make analyze MODEL=tiny DATA='alpaca.jsonl Makefile' PLAN=dus:1 ARGS='{few}'")
    assert done.returncode != 0  # rows of instructions are no texts
    assert re.search(r"error: alpaca\.jsonl, line 1: .*\"text\"", done.stderr)
    done = shell(tree, f"make analyze MODEL=tiny DATA=Makefile PLAN=dus:1 ARGS='{few}'")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "out/analyze/plan-4.json"
    made = {path.stem for path in (tree / "out/analyze").glob("*.json")}
    assert made == {"layers", "seams", "search-4", "copies-4", "plan-4"}


def test_a_reproduction_takes_another_model_and_some_claims(tree):
    plain = shell(tree, "make -n reproduce").stdout.split()
    assert plain[plain.index("solar.reproduce") + 1 :] == []  # MODEL= has a default that is upscale's
    given = shell(tree, "make -n reproduce MODEL=m DATA='a b:2' EVAL=c ONLY='a d' TOKENS=5000 ARGS='--m 8'").stdout
    assert " ".join(given.split()).endswith("--model m --data a b:2 --eval c --only a d --tokens 5000 --m 8")
    full = " ".join(shell(tree, "make -n reproduce-full TOKENS=900 OUT=elsewhere").stdout.split())
    assert "--seeds 0 1 2" in full
    assert full.endswith("--tokens 900 --out elsewhere")  # argparse takes the last
