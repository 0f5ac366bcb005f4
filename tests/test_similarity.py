"""Hidden states against those that hooks on the model see; influence, similarity and seams against torch's own."""

import pytest
import torch
from torch.nn import functional as F

from solar import seams, similarity
from solar.activations import Walk, distance, unit
from solar.checkpoint import load_model
from solar.perplexity import BASE
from solar.plan import Source, parse_plan, to_json
from solar.tokenizer import Tokenizer
from solar.windows import batches, collate, windows_of

TEXTS = ["def f(a):\n    return a + 1\n", "Ann has 3 pens and finds 4 more. How many pens does Ann have?\n"]


@pytest.fixture(scope="module")
def sample():
    windows = windows_of(Tokenizer(BASE), TEXTS, 40, 40, True)
    return [collate([windows[i] for i in batch]) for batch in batches(windows, 1000)]


@pytest.fixture(scope="module")
def base():
    return load_model(BASE, dtype="float32", plan="copy")


def watch(model, ids) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What each call of a layer is given, then what the last one gives; and the logits."""
    states, hooks = [], []
    for layer in set(model.model.layers):  # a layer that stands at several places is called as often
        hooks.append(layer.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0])))
    hooks.append(model.model.norm.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0])))
    with torch.inference_mode():
        logits = model(ids)
    for hook in hooks:
        hook.remove()
    return states, logits


def test_a_walk_gives_the_bits_of_the_forward_pass(base, sample):
    (batch,) = sample
    states, logits = watch(base, batch.ids)
    walk = Walk(base, [batch.ids])
    with torch.inference_mode():
        found = [walk.embed()]
        for layer in base.model.layers:
            found.append(walk.through(layer, found[-1]))
        assert all(torch.equal(mine, theirs) for (mine,), theirs in zip(found, states, strict=True))
        assert torch.equal(walk.logits(found[-1][0]), logits)
        assert torch.equal(walk.logps(found[-1][0], batch.labels), base(batch.ids, labels=batch.labels))


def test_distance_is_one_minus_cosine_and_nothing_for_equals():
    a, b = torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(0)).unbind()
    torch.testing.assert_close(distance(unit(a), unit(b)), 1 - F.cosine_similarity(a, b))
    assert torch.equal(distance(unit(a), unit(a)), torch.zeros(50))
    near = 1e-4 * b + a  # a difference that 1 - cosine in fp32 could not tell from rounding
    exact = (1 - F.cosine_similarity(a.double(), near.double())).float()
    torch.testing.assert_close(distance(unit(a), unit(near)), exact, rtol=2e-2, atol=0)


def test_influence_and_similarity_are_averages_of_cosines(base, sample):
    (batch,) = sample
    states, _ = watch(base, batch.ids)
    states = [x[batch.real].double() for x in states]
    found = similarity.measure(base, sample)
    cosine = lambda i, j: F.cosine_similarity(states[i], states[j]).mean().item()
    for i in range(12):
        assert found.influence[i].item() == pytest.approx(1 - cosine(i, i + 1), abs=1e-6)
        assert found.norms[i].item() == pytest.approx(states[i].norm(dim=-1).log().mean().exp().item())
    for i, j in ((0, 12), (3, 9), (9, 3), (5, 7)):
        assert found.similarity[i, j].item() == pytest.approx(cosine(i, j), abs=1e-6)


def test_padding_and_batching_count_for_nothing(base, sample):
    windows = windows_of(Tokenizer(BASE), TEXTS, 40, 40, True)
    told = []
    apart = similarity.measure(base, [collate([window]) for window in windows], told.append)
    torch.testing.assert_close(apart.similarity, similarity.measure(base, sample).similarity, rtol=0, atol=1e-6)
    assert sum(told) == sum(len(window.ids) for window in windows)


def test_an_identity_layer_has_no_influence_at_all(sample):
    plan = parse_plan("expand:3:1", 12)
    found = similarity.measure(load_model(BASE, dtype="float32", plan=plan), sample)
    for position, source in enumerate(plan):
        assert (found.influence[position].item() == 0.0) == (source.init == "identity")
        assert (found.similarity[position, position + 1].item() == 1.0) == (source.init == "identity")
    assert torch.equal(found.similarity.diagonal(), torch.ones(len(plan) + 1, dtype=torch.float64))
    assert torch.equal(found.similarity, found.similarity.T)


def test_what_is_printed_of_layers(base, sample):
    found = similarity.measure(base, sample)
    lines = similarity.table(found).splitlines()
    assert lines[1].split()[:2] == ["0", f"{found.influence[0]:.4f}"]
    shades = [line[6:] for line in lines[-13:]]
    assert all(row[i] == "@" for i, row in enumerate(shades))
    assert similarity.to_json(found).keys() == {"influence", "similarity", "norms"}


@pytest.mark.parametrize("plan", ["copy", "expand:3:1", "expand:2:3"])
def test_what_computes_the_base_has_no_seam(base, sample, plan):
    found = seams.measure(base, parse_plan(plan, 12), sample)
    assert found.seams == []
    assert found.kl == 0.0
    assert all((place.cosine, place.ratio, place.kl) == (1.0, 1.0, None) for place in found.places)
    assert "no seam" in seams.table(found)


@pytest.mark.parametrize("text", ["dus", "idus:4:3", "slices:0-5,7-12", "stack"])
def test_seams_are_what_hooks_on_the_grown_model_see(base, sample, text):
    (batch,) = sample
    plan = parse_plan(text, 12)
    there, truth = watch(base, batch.ids)
    here, logits = watch(load_model(BASE, dtype="float32", plan=plan), batch.ids)
    found = seams.measure(base, plan, sample)
    jumps = {place.position: place.jump for place in found.seams}
    assert jumps == dict(seams.plans.seams(plan))
    for place in found.places:
        assert place.layer == plan[place.position].layer
        a, b = here[place.position][batch.real].double(), there[place.layer][batch.real].double()
        assert place.cosine == pytest.approx(F.cosine_similarity(a, b).mean().item(), abs=1e-6)
        assert place.ratio == pytest.approx((a.norm(dim=-1) / b.norm(dim=-1)).log().mean().exp().item())
    assert found.kl == pytest.approx(divergence(truth, logits, batch), rel=1e-5)
    for place in found.seams:  # the plan that this seam would end
        ended = [*plan[: place.position], *(Source(layer) for layer in range(place.layer, 12))]
        _, logits = watch(load_model(BASE, dtype="float32", plan=ended), batch.ids)
        assert place.kl == pytest.approx(divergence(truth, logits, batch), rel=1e-5)
    assert found.seams[-1].kl == found.kl  # these plans end with the base's last layer


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("slices:4-12", ["begins with layer 4 of the base, which is fed the embedding"]),
        ("slices:0-8", ["ends with layer 7 of the base's 0-11, whose output goes to the head"]),
        ("slices:2-6,4-11", ["begins with layer 2", "ends with layer 10"]),
        ("slices:0-6,4-12", []),
    ],
)
def test_layers_that_are_left_out_at_either_end_are_told(base, sample, text, said):
    printed = seams.table(seams.measure(base, parse_plan(text, 12), sample))
    assert all(line in printed for line in said)
    assert sum(word in printed for word in ("begins with", "ends with")) == len(said)
    assert ("no seam: every layer is fed" in printed) == (text == "slices:0-8")


def divergence(truth, logits, batch) -> float:
    p, q = (x[batch.real].double().log_softmax(-1) for x in (truth, logits))
    return F.kl_div(q, p, log_target=True, reduction="sum").item() / len(p)


def test_what_is_printed_and_kept_of_seams(base, sample):
    plan = parse_plan("idus:4:3", 12)
    found = seams.measure(base, plan, sample)
    printed = seams.table(found)
    for place in found.seams:
        assert f"{place.cosine:.4f}" in printed
        assert f"{place.kl:.4f}" in printed
    kept = seams.to_json(found)
    assert [place["layer"] for place in kept["places"]] == [entry["layer"] for entry in to_json(plan)]
