"""Curves: what is read from a run, and what is drawn."""

import json
import math

import pytest

from solar import curves
from solar.analyze import CurvesOptions
from solar.analyze import curves as draw_curves


@pytest.fixture
def runs(tmp_path):
    """Two runs of 50 steps, the second with a step that was skipped and a line that a killed run left half written."""
    for name, offset in (("one", 0.0), ("two", 1.0)):
        entries = [{"step": 0, "heldout": {"text": 5.0 + offset}}]
        entries += [{"step": step, "loss": 4 * math.exp(-step / 20) + offset} for step in range(1, 51)]
        entries += [{"step": 50, "heldout": {"text": 2.0 + offset}}]
        if name == "two":
            entries[10]["loss"] = None
        (tmp_path / name).mkdir()
        lines = [json.dumps(entry) + "\n" for entry in entries] + ['{"step": 51, "lo'] * (name == "two")
        (tmp_path / name / "metrics.jsonl").write_text("".join(lines))
    return [tmp_path / "one", tmp_path / "two"]


def test_a_curve_is_read_without_what_was_skipped(runs):
    one, two = (curves.read_curve(run) for run in runs)
    assert (len(one.steps), len(two.steps)) == (50, 49)
    assert 10 not in two.steps
    assert one.heldout == [(0, {"text": 5.0}), (50, {"text": 2.0})]


def test_smoothing_is_a_running_mean():
    assert curves.smooth([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]
    assert curves.smooth([1.0, 3.0], 1) == [1.0, 3.0]


def test_the_terminal_shows_both_and_the_axes_ends(runs, capsys):
    draw_curves(CurvesOptions(runs=[str(run) for run in runs]))
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0].split("|")[0].strip() == f"{4 * math.exp(-1 / 20) + 1:.3f}"
    assert lines[0].endswith("|x")  # the higher curve begins in the upper left corner
    assert lines[17].rstrip().endswith("o")  # the lower one ends in the lower right one
    assert "5.0000 -> 2.0000 (50)" in out
    assert "6.0000 -> 3.0000 (50)" in out


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"give what train\.py had as --out"):
        curves.read_curve(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("[1]\n[2]\n")
    with pytest.raises(ValueError, match='line 1: not an entry with a "step"'):
        curves.read_curve(tmp_path)


def test_more_runs_than_marks_are_all_drawn():
    many = [curves.Curve(f"run{i}", [1, 2], [float(i), float(i + 1)], []) for i in range(len(curves.MARKS) + 1)]
    assert all(f" run{i}" in curves.plot_text(many) for i in range(len(many)))
