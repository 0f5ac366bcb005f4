"""The table of the recipe's models: exact marks of models that are known, and verdicts that follow from intervals."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from solar import instructions, problems, recipe
from solar.intervals import verdict
from solar.recipe import Marks, difference, table

ROOT = Path(__file__).resolve().parent.parent


def marks(right: float, done: float, count: int = 400) -> Marks:
    make = lambda share: np.arange(count) < share * count
    return Marks(make(right), make(done), 1.0)


def test_a_difference_is_paired_and_its_interval_that_of_the_questions():
    better, worse = marks(0.5, 0.5), marks(0.25, 0.5)
    mean, half = difference(better, worse)
    assert mean == pytest.approx(0.125)
    variance = 0.25 * 0.75 * 400 / 399 / 400 / 4  # a quarter of the problems differ by 1, no task does
    assert half == pytest.approx(1.96 * variance**0.5)
    assert difference(worse, better) == (pytest.approx(-mean), pytest.approx(half))
    assert difference(better, better) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("mean", "half", "says"),
    [(0.1, 0.05, "shown"), (-0.1, 0.05, "contradicted"), (0.05, 0.1, "not shown at this size"),
     (0.0, 0.0, "not shown at this size")],
)  # fmt: skip
def test_a_verdict_is_where_the_interval_lies(mean, half, says):
    assert verdict(mean, half) == says


def test_the_table_has_what_was_measured_and_the_papers_numbers():
    text = table({"sft-v2": marks(0.1, 0.9), "sft-v3": marks(0.9, 0.9), "base": marks(0.5, 0.0)})
    assert "| sft-v3 | + Orca + math | 90.0% | 100.0% | 90.0% | 90.0% | 70.03 | 64.14 |" in text
    assert "dpo-v1" not in text
    assert "| mathematics in SFT helps: sft-v3 over sft-v2 | +40.0% ±" in text
    assert text.splitlines()[-1].endswith("| shown |")


def test_every_ordering_is_between_models_of_the_recipe():
    names = {row.name for row in recipe.MODELS}
    assert all(better in names and worse in names for better, worse, _ in recipe.ORDERINGS)
    assert len(names) == len(recipe.MODELS)


def test_marks_are_those_of_the_replies(monkeypatch):
    """A model that answers every second question rightly, in a reply that never ends."""

    def replies(model_dir, questions, template):
        known = {problem.question: f"So. {problems.MARKER} {problem.answer}" for problem in asked}
        known |= {instructions.question(task): f" {task.answer}\n" for task in tasks}
        return [(known[text], True) if i % 2 == 0 else (problems.MARKER, False) for i, text in enumerate(questions)]

    asked = recipe.distinct(problems.generate(1, "heldout"), problems.prompt, 10)
    tasks = recipe.distinct(instructions.generate(1, "heldout"), instructions.question, 10)
    monkeypatch.setattr(recipe, "replies", replies)
    found = recipe.examine("model", 10, "solar", 1)
    assert found.problems.tolist() == found.tasks.tolist() == [True, False] * 5
    assert (found.format, found.score) == (0.5, 0.5)


def test_marks_are_kept_for_the_model_and_the_questions_that_gave_them(tmp_path, monkeypatch):
    asked = []

    def examine(model_dir, count, template, seed):
        asked.append((count, template, seed))
        return Marks(np.array([True, False]), np.array([False, False]), 0.25)

    monkeypatch.setattr(recipe, "examine", examine)
    shutil.copytree(ROOT / "solar/assets/base", tmp_path / "model")
    first = recipe.examined(tmp_path, 3, "solar", 1)
    again = recipe.examined(tmp_path, 3, "solar", 1)
    assert len(asked) == 1
    assert (again.problems.tolist(), again.tasks.tolist(), again.format) == ([True, False], [False, False], 0.25)
    assert again.score == first.score
    recipe.examined(tmp_path, 4, "solar", 1)
    recipe.examined(tmp_path, 4, "alpaca", 1)
    recipe.examined(tmp_path, 4, "alpaca", 2)
    (tmp_path / "marks.json").write_text((tmp_path / "marks.json").read_text()[:-9])  # cut off
    recipe.examined(tmp_path, 4, "alpaca", 2)
    weights = tmp_path / "model/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    recipe.examined(tmp_path, 4, "alpaca", 2)
    assert len(asked) == 6


def test_one_model_alone(tmp_path, monkeypatch):
    for arguments, kind in ((["--only", "sft-v9"], ValueError), (["--only", "sft-v1"], FileNotFoundError)):
        monkeypatch.setattr("sys.argv", ["recipe", str(tmp_path), *arguments])
        with pytest.raises(kind, match=arguments[1]):
            recipe.main()


def test_no_question_is_asked_twice():
    asked = recipe.distinct(instructions.generate(1, "heldout"), instructions.question, 100)
    assert len({instructions.question(task) for task in asked}) == 100
    with pytest.raises(ValueError, match="distinct questions"):
        recipe.distinct(iter("abab" * 100), str, 3)


def test_a_folder_without_models_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["recipe", str(tmp_path)])
    with pytest.raises(FileNotFoundError, match="no model of the recipe in it"):
        recipe.main()
