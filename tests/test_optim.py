"""Schedules, what decays, AdamW in 16 bits against torch's in 32, and its rounding."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from solar.config import ModelConfig
from solar.model import Transformer
from solar.optim import SCHEDULES, AdamW16, build_optimizer, learning_rate, parameter_groups, scale_, square_sum, store

CONFIG = ModelConfig(
    model_type="mistral", vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
)  # fmt: skip


def rates(schedule: str, steps=100, warmup=10):
    return [learning_rate(step, steps, 2.0, warmup, schedule, 0.1, 0.2) for step in range(steps)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_is_linear_and_reaches_the_peak(schedule):
    assert rates(schedule)[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert max(rates(schedule)) == 2.0


def test_shapes_of_the_schedules():
    assert set(rates("constant")[9:]) == {2.0}
    cosine = rates("cosine")
    assert cosine[-1] == pytest.approx(0.2)
    assert cosine[54] == pytest.approx(2.0 * (0.1 + 0.9 / 2), rel=1e-6)  # half way down
    assert all(a > b for a, b in itertools.pairwise(cosine[9:]))
    wsd = rates("wsd")
    assert set(wsd[9:80]) == {2.0}
    assert wsd[-1] == pytest.approx(0.2)
    assert wsd[89] == pytest.approx(2.0 * (1 - 0.9 / 2))


@given(st.sampled_from(SCHEDULES), st.integers(1, 50), st.integers(0, 60))
def test_a_rate_is_always_positive_and_never_above_the_peak(schedule, steps, warmup):
    assert all(0 < rate <= 2.0 for rate in rates(schedule, steps, warmup))


@given(st.integers(2, 60), st.integers(1, 60), st.floats(0.05, 1))
def test_wsd_that_falls_before_it_has_risen_does_not_jump(steps, warmup, decay):
    curve = [learning_rate(step, steps, 2.0, warmup, "wsd", 0.1, decay) for step in range(steps)]
    steepest = max(2.0 / warmup, 2.0 * 0.9 / max(round(decay * steps), 1))
    assert all(abs(a - b) <= steepest + 1e-12 for a, b in itertools.pairwise(curve))


def test_only_matrices_decay():
    model = Transformer(CONFIG)
    decayed, kept = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    ids = {id(parameter) for parameter in decayed["params"]}
    assert ids == {id(p) for name, p in model.named_parameters() if not name.endswith("norm.weight")}
    assert len(decayed["params"]) + len(kept["params"]) == len(list(model.parameters()))
    model.model.norm.weight.requires_grad_(False)
    assert len(parameter_groups(model, 0.1)[1]["params"]) == len(kept["params"]) - 1


def test_fp32_takes_torchs_fused_form_and_16_bits_ours():
    assert isinstance(build_optimizer(Transformer(CONFIG), 0.1, (0.9, 0.95)), torch.optim.AdamW)
    assert isinstance(build_optimizer(Transformer(CONFIG), 0.1, (0.9, 0.95), torch.bfloat16), AdamW16)
    assert isinstance(build_optimizer(Transformer(CONFIG).bfloat16(), 0.1, (0.9, 0.95)), AdamW16)


def descend(make, steps=60, dtype=torch.float32):
    """Fit a small regression; returns the weights."""
    generator = torch.Generator().manual_seed(1)
    x, target = torch.randn(64, 16, generator=generator), torch.randn(64, 8, generator=generator)
    weight = nn.Parameter(torch.randn(8, 16, generator=generator).to(dtype))
    optimizer = make([{"params": [weight], "weight_decay": 0.1}])
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / steps)
        (x @ weight.float().T - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return weight.detach().float(), optimizer.state[weight]


def test_ours_in_fp32_is_torchs():
    ours, state = descend(lambda groups: AdamW16(groups, (0.9, 0.95), torch.float32, seed=0))
    theirs, their_state = descend(lambda groups: torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95)))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(state["exp_avg_sq"], their_state["exp_avg_sq"])
    assert state.keys() == their_state.keys()


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_bf16_states_end_near_fp32(weights):
    """Rounding costs accuracy but no more than a few of its own steps (2^-8 of values around 1)."""
    exact, _ = descend(lambda groups: torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95)))
    rounded, state = descend(lambda groups: AdamW16(groups, (0.9, 0.95), torch.bfloat16, seed=0), dtype=weights)
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
    distance = (rounded - exact).abs().max().item()
    assert distance < (0.1 if weights == torch.bfloat16 else 0.05)


def test_the_same_seed_rounds_alike_and_another_does_not():
    run = lambda seed: descend(lambda groups: AdamW16(groups, (0.9, 0.95), torch.bfloat16, seed), 5, torch.bfloat16)[0]
    assert torch.equal(run(3), run(3))
    assert not torch.equal(run(3), run(4))


def test_stochastic_rounding_is_right_on_average_and_leaves_what_fits():
    values = torch.tensor([1.0, -1.0, 0.0, 3.0e-39, 1 + 2**-9, -(1 + 2**-10), 1e30 * (1 + 2**-9)]).repeat(20_000, 1)
    target = torch.empty_like(values, dtype=torch.bfloat16)
    store(target, values, torch.Generator().manual_seed(0))
    assert torch.equal(target[:, :3].float(), values[:, :3])
    assert torch.allclose(target.double().mean(0)[4:], values.double()[0, 4:], rtol=1e-4)
    below, above = 1.0, 1 + 2**-7
    assert set(target[:, 4].tolist()) == {below, above}  # never further than the two neighbours


def test_an_update_below_half_a_step_is_not_lost():
    """Ten thousand times 2^-14 onto 1: nearest rounding in bf16 would stay at 1 for ever."""
    weight = torch.ones(256, dtype=torch.bfloat16)
    noise = torch.Generator().manual_seed(0)
    for _ in range(4096):
        store(weight, weight.float() + 2**-14, noise)
    assert weight.float().mean().item() == pytest.approx(1.25, rel=0.02)


def test_norm_and_scale():
    tensors = [torch.randn(3, 4), torch.randn(5)]
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    assert math.sqrt(square_sum(tensors)) == pytest.approx(flat.norm().item(), rel=1e-6)
    scale_(tensors, 0.5)
    assert torch.equal(torch.cat([tensor.flatten() for tensor in tensors]), flat * 0.5)
