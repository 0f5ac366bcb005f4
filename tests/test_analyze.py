"""The commands of `solar.analyze`, on the small base: what they print, what they leave behind, what they refuse."""

import json
import sys
import types

import pytest

from solar import analyze
from solar.checkpoint import load_model
from solar.perplexity import BASE, score, total
from solar.plan import parse_plan

SMALL = {"window": 48, "data": ["problems"]}
SEARCH = SMALL | {"calibration": 60, "validation": 100, "reporting": 150, "budget": 4.0}


@pytest.fixture(autouse=True)
def no_matplotlib(monkeypatch):
    """As on a machine without it, wherever this runs."""
    monkeypatch.setattr(analyze.importlib.util, "find_spec", lambda name: None)


def read(path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_layers_prints_a_table_and_keeps_the_numbers(tmp_path, capsys):
    analyze.layers(analyze.LayersOptions(**SMALL, tokens=100, plan="expand:3:1", out=str(tmp_path)))
    printed = capsys.readouterr().out
    kept = read(tmp_path / "layers.json")
    assert len(kept["influence"]) == 15
    assert [kept["influence"][i] for i in (4, 9, 14)] == [0, 0, 0]
    assert len(kept["similarity"]) == len(kept["similarity"][0]) == 16
    assert f"{kept['influence'][0]:.4f}" in printed
    assert printed.splitlines()[-1] == str(tmp_path / "layers.json")
    assert [path.name for path in tmp_path.iterdir()] == ["layers.json"]


def test_seams_prints_a_table_and_keeps_the_numbers(tmp_path, capsys):
    analyze.seams(analyze.SeamsOptions(**SMALL, tokens=100, plan="dus:3", out=str(tmp_path)))
    printed = capsys.readouterr().out
    kept = read(tmp_path / "seams.json")
    (seam,) = [place for place in kept["places"] if place["jump"]]
    assert (seam["position"], seam["layer"], seam["jump"], seam["kl"]) == (9, 3, -6, kept["kl"])
    assert "seam 8 -> 3, jump -6" in printed
    assert f"{seam['cosine']:.4f}" in printed
    assert parse_plan(str(tmp_path / "seams.json"), 12) == parse_plan("dus:3", 12)


def test_search_proposes_a_plan_that_every_command_takes(tmp_path, capsys):
    analyze.search(analyze.SearchOptions(**SEARCH, depth=16, out=str(tmp_path)))
    printed = capsys.readouterr().out
    report, copies, proposal = (read(tmp_path / f"{name}-16.json") for name in ("search", "copies", "plan"))
    assert printed.splitlines()[-1] == str(tmp_path / "plan-16.json")
    assert proposal["plan_text"] == report["proposal"] == "expand:4:1"
    assert report["passes"] <= 4
    rows = {row["name"]: row for row in report["rows"]}
    assert rows["expand:4:1"]["reporting"]["loss"] == rows["the base"]["reporting"]["loss"]
    for name, kept in (("copies", copies), ("plan", proposal)):
        plan = parse_plan(str(tmp_path / f"{name}-16.json"), 12)
        assert plan == parse_plan(kept["plan_text"], 12)
        assert load_model(BASE, plan=str(tmp_path / f"{name}-16.json")).config.num_hidden_layers == 16
    named = [row for name, row in rows.items() if name.startswith(("dus", "idus"))]
    assert rows[copies["plan_text"]]["reporting"]["loss"] <= min(row["reporting"]["loss"] for row in named)


def test_the_figures_of_a_search_are_those_of_perplexity(tmp_path):
    options = analyze.SearchOptions(**SEARCH, depth=14, copies_only=True, out=str(tmp_path))
    analyze.search(options)
    report = read(tmp_path / "search-14.json")
    assert report["proposal"] == report["copies"]
    assert read(tmp_path / "plan-14.json") == read(tmp_path / "copies-14.json")
    (row,) = (row for row in report["rows"] if row["name"] == report["proposal"])
    _, (_, _, windows) = analyze.open_model(options, [60, 100, 150])
    model = load_model(BASE, dtype="float32", plan=str(tmp_path / "plan-14.json"))
    assert total(windows, score(model, windows)).perplexity == pytest.approx(row["reporting"]["perplexity"], rel=1e-6)
    assert report["rows"][0]["reporting"]["tokens"] == sum(window.counted for window in windows)


@pytest.mark.parametrize(
    ("command", "options", "what"),
    [
        (analyze.layers, analyze.LayersOptions(png="x.png"), "--png needs matplotlib: pip install matplotlib"),
        (analyze.curves, analyze.CurvesOptions(runs=["."], png="x.png"), "--png needs matplotlib"),
        (analyze.layers, analyze.LayersOptions(window=2000), "--window 2000: .* has room for 1024 positions"),
        (analyze.layers, analyze.LayersOptions(tokens=0), "tokens: 0, at least 1"),
        (analyze.seams, analyze.SeamsOptions(plan="dus:12"), "M = 12 does not fit a model of 12 layers"),
        (analyze.search, analyze.SearchOptions(**(SEARCH | {"depth": 30})), "--depth 30: the base has 12 layers"),
        (analyze.search, analyze.SearchOptions(**(SEARCH | {"budget": 0.0})), "--budget 0"),
        (analyze.search, analyze.SearchOptions(**(SEARCH | {"reporting": 10**9})), "1,000,000,160 are wanted"),
    ],
)
def test_options_that_cannot_be_are_one_line(command, options, what):
    with pytest.raises(ValueError, match=what):
        command(options)


class Figure:
    """Stands for matplotlib's: takes whatever is drawn on it, and remembers the calls."""

    def __init__(self, calls):
        self.calls = calls

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.calls.append(name)
            if name == "subplots":
                rows, columns = (*args, 1, 1)[:2]
                return [Figure(self.calls) for _ in range(rows * columns)] if args else self
            if name == "savefig":
                args[0].write_bytes(b"png")
            return (self,) if name == "plot" else self

        return call


def test_pictures_are_drawn_where_matplotlib_is(tmp_path, monkeypatch, capsys):
    calls: list[str] = []
    pyplot = types.SimpleNamespace(figure=lambda **_: Figure(calls), close=lambda _: None)
    fake = types.SimpleNamespace(use=lambda _: None, pyplot=pyplot)
    monkeypatch.setitem(sys.modules, "matplotlib", fake)
    monkeypatch.setattr(analyze.importlib.util, "find_spec", lambda name: fake)
    out = {"out": str(tmp_path)}
    analyze.layers(analyze.LayersOptions(**SMALL, **out, tokens=50))
    analyze.seams(analyze.SeamsOptions(**SMALL, **out, tokens=50, png=str(tmp_path / "other.png")))
    analyze.search(analyze.SearchOptions(**(SEARCH | {"budget": 2.0}), **out, depth=14))
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["layers.png", "other.png", "search-14.png"]
    assert {"bar", "imshow", "colorbar", "axvline", "plot", "step", "axhline"} <= set(calls)
    assert str(tmp_path / "other.png") in capsys.readouterr().out
