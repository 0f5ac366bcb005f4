"""Plan search: the named plans, the neighbours, what is used again and what that is worth, and what is chosen."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solar import search
from solar.checkpoint import load_model
from solar.perplexity import BASE, Perplexity, score, total
from solar.plan import parse_plan, slices
from solar.search import Row, Scorer, explore, find, named_plans, neighbours, one_run, to_slices, to_text
from solar.tokenizer import Tokenizer
from solar.windows import deal, read_texts

CACHE = 1 << 30


@pytest.fixture(scope="module")
def samples():
    tokenizer = Tokenizer(BASE)
    dealt = deal(
        [found for name in ("problems", "stdlib") for found in read_texts(name)], tokenizer, 64, True, [120] * 3
    )
    return dict(zip(("calibration", "validation", "reporting"), dealt, strict=True))


@pytest.fixture(scope="module")
def base():
    return load_model(BASE, dtype="float32", plan="copy")


def test_the_named_plans_of_a_depth():
    found = named_plans(30, 44)
    assert list(found) == [
        "dus:8",
        "idus:8:16",
        "idus:8:11",
        "idus:8:8",
        "idus:8:4",
        "idus:8:2",
        "idus:8:1",
        "expand:2:7",
    ]
    assert all(parse_plan(name, 30) == plan and len(plan) == 44 for name, plan in found.items())
    assert list(named_plans(12, 24))[:2] == ["stack", "idus:0:8"]
    assert list(named_plans(12, 24))[-1] == "expand:12:1"
    assert list(named_plans(12, 13)) == ["expand:1:1"]  # dus makes even depths only
    assert list(named_plans(32, 48))[-1] == "expand:16:1"
    for depth in (12, 25):
        with pytest.raises(ValueError, match=f"--depth {depth}: the base has 12 layers, so from 13 to 24"):
            named_plans(12, depth)


@pytest.mark.parametrize("plan", ["dus:3", "idus:3:2", "stack", "copy"])
def test_slices_are_the_plan(plan):
    found = to_slices(parse_plan(plan, 12))
    assert slices(12, list(found)) == parse_plan(plan, 12)
    assert parse_plan(to_text(found), 12) == parse_plan(plan, 12)


@settings(max_examples=30)
@given(n=st.integers(2, 9), data=st.data())
def test_neighbours_have_the_depth_and_every_layer(n, data):
    length = data.draw(st.integers(1, n))
    plan = one_run(n, data.draw(st.integers(0, n - length)), length)
    for _ in range(2):
        around = set(neighbours(plan, n))
        for near in around:
            layers = [source.layer for source in slices(n, list(near))]
            assert len(layers) == n + length
            assert set(layers) == set(range(n))
            assert to_slices(slices(n, list(near))) == near
        if around:
            plan = data.draw(st.sampled_from(sorted(around)))


def test_every_plan_is_reached():
    """All plans of a small depth that keep the layers in order, from any one of them."""
    n, depth = 4, 6
    reached, waiting = set(), [one_run(n, 0, 2)]
    while waiting:
        reached.add(plan := waiting.pop())
        waiting += set(neighbours(plan, n)) - reached - set(waiting)
    every = set()
    for cuts in range(1, 3):
        for places in itertools.combinations_with_replacement(
            [(end, start) for end in range(1, n + 1) for start in range(end)], cuts
        ):
            starts, ends = [0, *(s for _, s in places)], [*(e for e, _ in places), n]
            whole = tuple(zip(starts, ends, strict=True))
            in_order = starts == sorted(starts) and ends == sorted(ends)
            if in_order and sum(e - s for s, e in whole) == depth and all(s < e for s, e in whole):
                every.add(whole)
    assert reached == every


def test_prefixes_used_again_change_no_perplexity(base, samples):
    scorer = Scorer(base, samples["calibration"], 18, 4096, CACHE)
    plans = [
        "copy",
        "dus:3",
        "idus:3:4",
        "idus:3:1",
        "expand:6:1",
        "slices:0-9,3-12",
        "slices:0-4,2-12",
        "stack",
        "dus:3",
    ]
    for text in plans:
        plan = parse_plan(text, 12)
        before, cost = scorer.passes, scorer.cost(plan)
        found = scorer.score(plan)
        assert scorer.passes == before + cost
        windows = samples["calibration"]
        scratch = total(windows, score(load_model(BASE, "float32", plan=plan), windows))
        assert found.perplexity == pytest.approx(scratch.perplexity, rel=1e-6)
        np.testing.assert_allclose(found.blocks, scratch.blocks, rtol=1e-5)


def test_what_is_used_again_costs_nothing(base, samples):
    layer, head = 393_600, 2048 * 192
    scorer = Scorer(base, samples["calibration"], 18, 4096, CACHE)
    assert sum(p.numel() for p in base.model.layers[0].parameters()) == layer
    whole = 18 * layer + head
    cost = lambda plan: scorer.cost(parse_plan(plan, 12)) * whole
    assert cost("dus:3") == pytest.approx(whole)
    scorer.score(parse_plan("copy", 12))
    assert cost("copy") == cost("expand:6:1") == pytest.approx(head)
    assert cost("dus:3") == pytest.approx(9 * layer + head)  # layers 0-8 are known
    assert cost("slices:0-12,6-12") == pytest.approx(6 * layer + head)
    forgetful = Scorer(base, samples["calibration"], 18, 4096, cache_bytes=0)
    forgetful.score(parse_plan("copy", 12))
    assert forgetful.held == 0
    assert forgetful.cost(parse_plan("dus:3", 12)) == pytest.approx(1)


def test_what_is_kept_stays_within_its_bytes(base, samples):
    scorer = Scorer(base, samples["calibration"], 18, 4096, cache_bytes=0)
    scorer.score(parse_plan("copy", 12))
    size = sum(x.nbytes for x in scorer.walk.embed())
    scorer.cache_bytes = 14 * size
    for text in ("copy", "dus:3", "idus:3:1", "copy"):
        scorer.score(parse_plan(text, 12))
        assert scorer.held == size * len(scorer.states) <= scorer.cache_bytes
    assert scorer.cost(parse_plan("copy", 12)) < 0.1


@pytest.mark.parametrize("budget", [1, 4.5])
def test_the_budget_is_kept(base, samples, budget):
    scorer, told = Scorer(base, samples["calibration"], 16, 4096, CACHE), []
    trials = explore(scorer, 16, [parse_plan("dus:4", 12)], budget, told.append)
    assert scorer.passes <= budget
    assert sum(told) == pytest.approx(scorer.passes)
    assert [trial.passes for trial in trials.values()] == sorted(trial.passes for trial in trials.values())
    assert list(trials.values())[-1].passes == scorer.passes
    assert scorer.passes > budget - 1  # it is used


def test_a_depth_with_few_plans_is_searched_whole(base, samples):
    """13 layers: one layer stands twice, of which there are 12 plans; each is tried once, whatever the budget."""
    found = find(base, 13, samples, 1000, 4096, CACHE, copies_only=True)
    assert len(found.trials) == 13
    losses = {trial.plan: trial.loss for trial in found.trials[1:]}
    assert to_slices(found.rows[1].plan) == min(losses, key=losses.__getitem__)


def test_the_proposal_is_never_worse_than_a_named_plan(base, samples):
    found = find(base, 16, samples, 6, 4096, CACHE)
    reported = {row.name: row.loss("reporting") for row in found.rows[1:] if "reporting" in row.measured}
    assert reported.keys() >= named_plans(12, 16).keys()
    assert found.proposal.loss("reporting") == min(reported.values())
    assert found.copies.loss("reporting") == min(loss for name, loss in reported.items() if "expand" not in name)
    assert reported["expand:4:1"] == found.rows[0].loss("reporting")
    scratch = load_model(BASE, "float32", plan=found.copies.plan)
    windows = samples["reporting"]
    assert total(windows, score(scratch, windows)).loss == pytest.approx(found.copies.loss("reporting"), rel=1e-6)
    assert found.copies.name in search.table(found)
    assert json.loads(json.dumps(search.to_json(found)))["proposal"] == found.proposal.name


def test_a_named_plan_that_does_better_on_the_reporting_text_is_given_instead(base, samples, monkeypatch):
    """Whatever calibration and validation prefer."""
    inner, lucky = Scorer.score, parse_plan("idus:5:1", 12)

    def score_with_luck(scorer, plan):
        found = inner(scorer, plan)
        return (
            Perplexity(found.blocks * [0.5, 1, 1])
            if scorer.windows is samples["reporting"] and plan == lucky
            else found
        )

    monkeypatch.setattr(Scorer, "score", score_with_luck)
    found = find(base, 14, samples, 3, 4096, CACHE)
    assert (found.copies.name, found.proposal.name) == ("idus:5:1", "idus:5:1")
    assert found.copies is not found.picked
    assert f"note: validation picked {found.picked.name}; idus:5:1 does better" in search.table(found)


def test_a_plan_that_gives_no_number_is_never_chosen():
    broken, sound = (Row(name, [], {"reporting": Perplexity(np.array([[nats, 10.0, 40.0]]))}) for name, nats in
                     (("broken", np.nan), ("sound", 99.0)))  # fmt: skip
    assert min([broken, sound], key=lambda row: row.loss("reporting")) is sound


def test_a_budget_for_nothing_is_refused(base, samples):
    with pytest.raises(ValueError, match=r"--budget 0\.5: at least 1"):
        find(base, 18, samples, 0.5, 4096, CACHE)
