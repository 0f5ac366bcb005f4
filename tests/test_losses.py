"""The losses: sums over learned labels, their shift, and equality with what the model computes in chunks."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from solar.config import ModelConfig
from solar.losses import IGNORED, learned, lm_loss, token_logps
from solar.model import Transformer

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
