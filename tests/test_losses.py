"""The losses: sums over labels or pairs, closed forms, equality with the chunked form and with TRL's numbers."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from solar.config import ModelConfig
from solar.losses import (
    IGNORED,
    KINDS,
    document_sums,
    dpo_loss,
    learned,
    lm_loss,
    pair_logps,
    preference_loss,
    token_logps,
)
from solar.model import Transformer
from tests.golden import tiny

CONFIG = ModelConfig(
    model_type="mistral", vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
)  # fmt: skip


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 61, (3, 17), generator=generator)
    labels = ids.masked_fill(torch.rand(3, 17, generator=generator) < 0.3, IGNORED)
    return ids, labels


def test_logits_at_a_position_are_asked_for_the_next_label(batch):
    _, labels = batch
    logits = torch.randn(3, 17, 61, dtype=torch.float64)
    expected = torch.zeros(3, 17)
    for row in range(3):
        for t in range(1, 17):
            if labels[row, t] != IGNORED:
                expected[row, t] = logits[row, t - 1].log_softmax(-1)[labels[row, t]]
    torch.testing.assert_close(token_logps(logits, labels), expected)


def test_loss_is_the_sum_that_cross_entropy_gives(batch):
    _, labels = batch
    logits = torch.randn(3, 17, 61)
    total, count = lm_loss(logits, labels)
    expected = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(total, expected)
    assert count == (labels[:, 1:] != IGNORED).sum()


def test_nothing_to_learn_is_zero_and_not_nan(batch):
    labels = torch.full((3, 17), IGNORED)
    total, count = lm_loss(torch.randn(3, 17, 61, requires_grad=True), labels)
    assert (total.item(), count.item()) == (0.0, 0)
    total.backward()


def test_the_model_computes_the_same_in_chunks(batch):
    ids, labels = batch
    model = Transformer(CONFIG)
    model.init_weights(seed=0)
    torch.testing.assert_close(model(ids, labels=labels), token_logps(model(ids), labels), rtol=1e-5, atol=1e-6)


def test_a_mask_of_learned_labels_leaves_its_input_alone(batch):
    _, labels = batch
    before = labels.clone()
    assert not learned(labels)[:, 0].any()
    assert torch.equal(labels, before)


# ------------------------------------------------------------------------------------------------ preferences


@pytest.fixture
def four():
    """Log-probabilities of 50 pairs: policy chosen, policy rejected, reference chosen, reference rejected."""
    return -300 * torch.rand(4, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_that_is_the_reference_has_the_loss_that_follows(kind, beta, four):
    chosen, rejected = four.float()[:2]
    losses, *rewards = dpo_loss(chosen, rejected, chosen, rejected, beta, kind)
    expected = {"sigmoid": math.log(2), "hinge": 1.0, "ipo": 1 / (4 * beta**2)}[kind]
    torch.testing.assert_close(losses, torch.full_like(losses, expected), rtol=1e-6, atol=1e-6)
    assert all(torch.equal(reward, torch.zeros(50)) for reward in rewards)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradient_of_the_sigmoid_loss_is_the_closed_form(smoothing, four):
    """-beta (sigmoid(-x) - e) on the chosen side, the opposite on the rejected: arXiv:2305.18290, section 4."""
    chosen, rejected = (four[i].clone().requires_grad_() for i in range(2))
    losses, reward_chosen, reward_rejected = dpo_loss(chosen, rejected, *four[2:], 0.02, label_smoothing=smoothing)
    losses.sum().backward()
    margin = reward_chosen - reward_rejected
    assert margin.abs().max() > 2  # not the flat middle alone
    torch.testing.assert_close(chosen.grad, -0.02 * ((-margin).sigmoid() - smoothing))
    torch.testing.assert_close(rejected.grad, -chosen.grad)


def test_gradients_of_hinge_and_ipo(four):
    for kind, slope in (
        ("hinge", lambda x: torch.where(0.02 * x < 1, -0.02, 0.0)),
        ("ipo", lambda x: 2 * (x - 25)),
    ):
        chosen = four[0].clone().requires_grad_()
        dpo_loss(chosen, *four[1:], 0.02, kind)[0].sum().backward()
        torch.testing.assert_close(chosen.grad, slope(four[0] - four[1] - four[2] + four[3]).double())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ratio", [-9000.0, 9000.0])
def test_log_ratios_of_thousands_are_finite(kind, ratio):
    chosen = torch.tensor([ratio], requires_grad=True)
    losses, *_ = dpo_loss(chosen, -chosen.detach(), torch.zeros(1), torch.zeros(1), 0.5, kind)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert chosen.grad.isfinite().all()
    if kind != "ipo":
        assert losses.item() == pytest.approx(max(-ratio + (kind == "hinge"), 0.0), abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"beta": 0.0}, "beta 0.0: a number above 0"),
        ({"beta": math.nan}, "beta nan"),
        ({"beta": 0.1, "kind": "dpo"}, "unknown preference loss 'dpo'; known are sigmoid, hinge, ipo"),
        ({"beta": 0.1, "label_smoothing": 0.5}, "label smoothing 0.5"),
        ({"beta": 0.1, "label_smoothing": -0.1}, "label smoothing -0.1"),
        ({"beta": 0.1, "label_smoothing": 0.1, "kind": "ipo"}, "is for the loss sigmoid, not for ipo"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, said, four):
    with pytest.raises(ValueError, match=re.escape(said)):
        dpo_loss(*four, **settings)


TRL = json.loads((Path(__file__).parent / "golden/preferences.json").read_text())


@pytest.mark.parametrize("golden", TRL["losses"], ids=lambda golden: f"{golden['kind']}-{golden['beta']}")
def test_losses_and_rewards_are_those_of_trl(golden):
    """tests/golden/README.md says how kinds that differ are compared."""
    four = [torch.tensor(TRL[who][side]).double() for who in ("policy", "reference") for side in ("chosen", "rejected")]
    kind = "sigmoid" if golden["kind"] == "aot_unpaired" else golden["kind"]
    losses, *rewards = dpo_loss(*four, golden["beta"], kind, golden["label_smoothing"])
    for side, reward in zip(("chosen", "rejected"), rewards, strict=True):
        torch.testing.assert_close(reward.float(), torch.tensor(golden["rewards"][side]), rtol=1e-4, atol=1e-5)
    if kind == "ipo":
        lengths = [torch.tensor([len(pair[f"{side}_ids"]) for pair in TRL["pairs"]]) for side in ("chosen", "rejected")]
        losses, *_ = dpo_loss(*(x / n for x, n in zip(four, 2 * lengths, strict=True)), golden["beta"], kind)
    torch.testing.assert_close(losses.float(), torch.tensor(golden["losses"]), rtol=1e-4, atol=1e-5)


def golden_model(seed: int) -> Transformer:
    raw = tiny.CASES[TRL["case"]]
    model = Transformer(ModelConfig.from_hf(raw))
    model.load_state_dict({name: torch.from_numpy(array) for name, array in tiny.state(raw, seed).items()}, assign=True)
    return model


def packed(rows: list[list[dict]]) -> dict[str, torch.Tensor]:
    """Rows of pairs of `preferences.json` as a batch; padding is a document of its own."""
    most = max(len(row) for row in rows)
    length = 4 + max(sum(len(ids) for pair in row for ids in documents(pair)) for row in rows)
    shape = len(rows), length
    batch = {"input_ids": torch.zeros(shape, dtype=torch.long), "labels": torch.full(shape, IGNORED)}
    batch |= {"document_ids": torch.full(shape, 2 * most), "pairs": torch.zeros(len(rows), most, dtype=torch.bool)}
    for i, row in enumerate(rows):
        at = 0
        for j, pair in enumerate(row):
            batch["pairs"][i, j] = True
            for k, ids in enumerate(documents(pair)):
                end, answer = at + len(ids), at + len(pair["prompt_ids"])
                batch["input_ids"][i, at:end] = torch.tensor(ids)
                batch["labels"][i, answer:end] = batch["input_ids"][i, answer:end]
                batch["document_ids"][i, at:end] = 2 * j + k
                at = end
    return batch


def documents(pair: dict) -> list[list[int]]:
    return [pair["prompt_ids"] + pair[f"{side}_ids"] for side in ("chosen", "rejected")]


@pytest.fixture(scope="module")
def trl_batch():
    """The six pairs in two rows of four and two, with the reference's log-probabilities."""
    batch = packed([TRL["pairs"][:4], TRL["pairs"][4:]])
    for side in ("chosen", "rejected"):
        flat = torch.tensor(TRL["reference"][side]).double()
        batch[f"reference_{side}"] = torch.stack([flat[:4], torch.cat([flat[4:], torch.full((2,), math.nan)])])
    return batch


@pytest.mark.parametrize("who", ["policy", "reference"])
def test_log_probabilities_of_packed_answers_are_those_of_trl(who, trl_batch):
    with torch.no_grad():
        model = golden_model(TRL["seeds"][who])
        logps = model(trl_batch["input_ids"], trl_batch["labels"], trl_batch["document_ids"])
    for side, sums in zip(("chosen", "rejected"), pair_logps(logps, trl_batch["document_ids"], 4), strict=True):
        assert not sums[~trl_batch["pairs"]].any()
        torch.testing.assert_close(sums[trl_batch["pairs"]].float(), torch.tensor(TRL[who][side]), rtol=1e-5, atol=1e-4)


def test_documents_are_summed_each_for_itself():
    values = torch.arange(1.0, 9.0).view(2, 4)
    ids = torch.tensor([[0, 0, 1, 7], [2, 2, 2, 0]])
    assert document_sums(values, ids, 3).tolist() == [[3, 3, 0], [8, 0, 18]]
    tiny_steps = torch.full((1, 10_000), 0.1)
    assert document_sums(tiny_steps, torch.zeros(1, 10_000), 1).item() == pytest.approx(1000, rel=1e-7)


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_preference_loss_sums_over_the_pairs_that_are_there(weight, trl_batch):
    model = golden_model(TRL["seeds"]["policy"])
    logps = model(trl_batch["input_ids"], trl_batch["labels"], trl_batch["document_ids"])
    total, count, sums = preference_loss(logps, trl_batch, 0.1, sft_weight=weight)
    golden = TRL["losses"][0]
    chosen = torch.tensor(TRL["policy"]["chosen"])
    sft = -sum(chosen[i] / len(pair["chosen_ids"]) for i, pair in enumerate(TRL["pairs"]))
    assert count == 6
    assert total.item() == pytest.approx(sum(golden["losses"]) + weight * sft.item(), rel=1e-5)
    rewards = {side: torch.tensor(golden["rewards"][side]) for side in ("chosen", "rejected")}
    assert sums["accuracy"] == (rewards["chosen"] > rewards["rejected"]).sum()
    expected = {
        "reward_chosen": rewards["chosen"],
        "reward_rejected": rewards["rejected"],
        "margin": rewards["chosen"] - rewards["rejected"],
        "logp_chosen": chosen,
        "logp_rejected": torch.tensor(TRL["policy"]["rejected"]),
        "gamma_ref": torch.tensor(TRL["reference"]["chosen"]) - torch.tensor(TRL["reference"]["rejected"]),
    }
    for name, values in expected.items():
        assert sums[name].item() == pytest.approx(values.sum().item(), rel=1e-5)
        assert not sums[name].requires_grad
    total.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_tie_is_wrong_and_no_pair_is_no_loss(trl_batch):
    logps = torch.zeros(trl_batch["labels"].shape, requires_grad=True)
    zero = torch.zeros(2, 4)
    batch = trl_batch | {"reference_chosen": zero, "reference_rejected": zero}
    total, count, sums = preference_loss(logps, batch, 0.1)
    assert (count.item(), sums["accuracy"].item()) == (6, 0)
    assert total.item() == pytest.approx(6 * math.log(2), abs=6e-6)
    none = trl_batch | {"pairs": torch.zeros(2, 4, dtype=torch.bool)}
    total, count, sums = preference_loss(logps, none, 0.1, sft_weight=1.0)
    total.backward()
    assert (total.item(), count.item(), sums["margin"].item()) == (0.0, 0, 0.0)
    assert not logps.grad.any()
