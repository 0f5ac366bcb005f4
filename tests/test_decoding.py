"""A decoder laid out anew against the model that it was made of, and through the public `generate`."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

import kernels
import solar.decoding
from kernels.linear import PreparedLinear
from solar.checkpoint import share_layers
from solar.config import ModelConfig
from solar.decoding import PreparedTransformer, prepare
from solar.model import KVCache, Transformer
from solar.plan import parse_plan
from solar.sampling import PADDING, PROMPT, Memory, generate

SMALL = ModelConfig(
    model_type="llama",
    vocab_size=61,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    initializer_range=0.3,
)
MODELS = {
    "grouped queries": {},
    "one query head a key head": {"num_key_value_heads": 6},
    "one key head, tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "window": {"model_type": "mistral", "sliding_window": 7},
    "window of one": {"model_type": "mistral", "sliding_window": 1},
    "shared layers": {"plan": "dus:1"},
    "identity copies": {"plan": "expand:3:1"},
}
models = pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
pytestmark = pytest.mark.usefixtures("one_thread")


def build(plan: str | None = None, dtype=torch.float32, **changes) -> Transformer:
    config = replace(SMALL, **changes)
    model = Transformer(config)
    model.init_weights(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", ".bias")):  # so that each of them matters
                parameter.add_(torch.linspace(-0.5, 0.5, len(parameter)))
    model = model.to(dtype)
    if plan is not None:
        share_layers(model, parse_plan(plan, config.num_hidden_layers))
    return model


def batch_of(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and document ids (B, longest) of random prompts, padded on the left."""
    generator, longest = torch.Generator().manual_seed(0), max(lengths)
    input_ids = torch.randint(0, SMALL.vocab_size, (len(lengths), longest), generator=generator)
    begins = longest - torch.tensor(lengths)[:, None]
    return input_ids, torch.where(torch.arange(longest) < begins, PADDING, PROMPT)


@torch.inference_mode()
def logits_of(model: Transformer, lengths: tuple[int, ...], form: str | None = None) -> torch.Tensor:
    """(12, B, V) logits in fp64 of 12 given tokens, one at a time, behind prompts; form None: by the model itself."""
    (input_ids, document_ids), dtype = batch_of(*lengths), model.model.embed_tokens.weight.dtype
    length = input_ids.shape[1] + 12
    cache = KVCache(model.config, len(lengths), length, dtype, "cpu")
    model(input_ids, document_ids=document_ids if len(set(lengths)) > 1 else None, cache=cache)
    step = model if form is None else PreparedTransformer(model, form)
    tokens = torch.randint(0, SMALL.vocab_size, (12, len(lengths), 1), generator=torch.Generator().manual_seed(1))
    return torch.cat([step(ids, cache=cache) for ids in tokens], dim=1).transpose(0, 1).double()


def distance(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


@models
@pytest.mark.parametrize(
    ("form", "lengths"),
    [("tiles", (11,)), ("columns", (11,)), ("own", (11,)), ("own", (9, 1, 13)), ("own", (8, 8))],
    ids=str,
)
def test_logits_are_the_models(changes, form, lengths):
    model = build(**changes)
    truth = logits_of(build(dtype=torch.float64, **changes), lengths)
    found = logits_of(model, lengths, form)
    assert distance(found, truth) < 2 * distance(logits_of(model, lengths), truth)
    assert (found - truth).abs().max() < 1e-5 * truth.abs().max()


@models
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("form", "lengths"), [("tiles", (11,)), ("own", (11,)), ("half", (9, 1, 13)), ("own", (9, 1, 13))], ids=str
)
def test_in_16_bits_at_most_twice_as_far_from_the_truth_as_the_model(changes, dtype, form, lengths):
    model = build(dtype=dtype, **changes)
    truth = logits_of(build(dtype=dtype, **changes).double(), lengths)
    assert distance(logits_of(model, lengths, form), truth) < 2 * distance(logits_of(model, lengths), truth)


def by_the_model(model: Transformer, *args, **settings) -> list[list[int]]:
    """What the model itself generates: with anything hung on it, it is not prepared."""
    hook = model.register_forward_hook(lambda *_: None)
    try:
        return generate(model, *args, **settings)
    finally:
        hook.remove()


@pytest.fixture
def made(monkeypatch):
    """The form of each model that is prepared from now on, with its number of distinct layers; as on no Intel."""
    forms = []
    monkeypatch.setattr(solar.decoding, "mkl_is_at_home", lambda: False)

    class Recorded(PreparedTransformer):
        def __init__(self, *args):
            super().__init__(*args)
            forms.append((self.form, len(set(self.layers))))

    monkeypatch.setattr(solar.decoding, "PreparedTransformer", Recorded)
    return forms


def prompts_of(*lengths: int) -> list[list[int]]:
    return [row[-n:].tolist() for n, row in zip(lengths, batch_of(*lengths)[0], strict=True)]


@models
@pytest.mark.parametrize(("count", "settings"), [(128, {}), (32, {"repetition_penalty": 1.3})], ids=str)
def test_greedy_tokens_are_the_models(made, changes, count, settings):
    model = build(**changes)
    for lengths in ((11,), (9, 1, 13)):
        prompts = prompts_of(*lengths)
        assert generate(model, prompts, count, **settings) == by_the_model(model, prompts, count, **settings)
    assert [form for form, _ in made] == ["tiles" if count == 128 else "own", "own"]


def test_drawn_tokens_are_the_models(made):
    model, settings = build(), {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 3}
    for prompts in (prompts_of(11), prompts_of(9, 1, 13)):
        assert generate(model, prompts, 64, **settings) == by_the_model(model, prompts, 64, **settings)
    assert len(made) == 2


def test_a_memory_keeps_what_was_prepared(made):
    model, memory = build(), Memory()
    (said,) = prompts_of(9)
    for turn in ([3], [4, 5]):
        said = said + turn
        (answer,) = generate(model, [said], 64, memory=memory)
        assert [answer] == by_the_model(model, [said], 64)
        said = said + answer
    assert made == [("tiles", 3)]


def test_a_shared_layer_is_laid_out_once(made):
    model = build(plan="dus:1")
    assert len(model.model.layers) == 4
    generate(model, prompts_of(5), 64)
    generate(model, prompts_of(5), 63)
    assert made == [("tiles", 3), ("own", 3)]


def test_where_mkl_is_at_home_fp32_lies_in_columns(made, monkeypatch):
    monkeypatch.setattr(solar.decoding, "mkl_is_at_home", lambda: True)
    prompts, model = prompts_of(11), build(attention_bias=True)
    for count in (64, 63):
        assert generate(model, prompts, count) == by_the_model(model, prompts, count)
    generate(build(dtype=torch.bfloat16), prompts, 64)
    assert [form for form, _ in made] == ["columns", "own", "tiles"]


def test_16_bits_in_batches_where_the_processor_does_not_multiply_them(made, monkeypatch):
    model, prompts = build(dtype=torch.bfloat16), prompts_of(9, 1, 13, 5)
    monkeypatch.setattr(solar.decoding, "multiplies_natively", lambda dtype: dtype == torch.float32)
    generate(model, prompts, 32)
    generate(model, prompts, 31)  # 124 tokens in all: packing would take longer than it saves
    generate(build(), prompts, 32)
    monkeypatch.setattr(solar.decoding, "multiplies_natively", lambda dtype: True)
    generate(model, prompts, 32)
    assert [form for form, _ in made] == ["half", "own", "own", "own"]


def test_a_large_model_stays_as_it_is(made, monkeypatch):
    model = build(plan="dus:1")
    layers = set(model.model.layers)
    assert (len(layers), len(model.model.layers)) == (3, 4)  # what stands at two places is counted once
    copied = sum(p.nbytes for part in (*layers, model.lm_head) for p in part.parameters())
    for limit, form in ((copied, "tiles"), (copied - 1, "own")):
        monkeypatch.setattr(solar.decoding, "MAX_COPIED_BYTES", limit)
        generate(model, prompts_of(5), 64)
        assert made.pop()[0] == form


def test_own_copies_no_weight():
    model = build(dtype=torch.bfloat16, attention_bias=True)
    prepared = PreparedTransformer(model, "own")
    stored = {parameter.data_ptr() for parameter in model.parameters()}
    held = [weight for layer in prepared.layers for part in (layer.qkv, layer.down) for weight in part.weights]
    assert all(weight.data_ptr() in stored for weight in held)


@pytest.mark.parametrize("form", ["tiles", "columns", "half", "own"])
def test_what_was_prepared_goes_when_nobody_holds_it(form):
    """And not when the garbage collector finds a cycle: the next call prepares anew, and would take as much again."""
    prepared = PreparedTransformer(build(dtype=torch.bfloat16), form)
    held = [weakref.ref(prepared), weakref.ref(prepared.layers[0].qkv)]
    gc.disable()
    try:
        del prepared
        assert [reference() for reference in held] == [None, None]
    finally:
        gc.enable()


def test_weights_beyond_fp16_are_not_packed_as_such():
    weight = torch.full((8, 16), 1e5, dtype=torch.bfloat16)
    prepared = PreparedLinear([weight], [None], "half", {})
    assert prepared(torch.ones(2, 16)).float().allclose(torch.tensor(1.6e6), rtol=2**-8)


@pytest.mark.parametrize("form", ["tiles", "columns", "half"])
def test_16_bit_weights_are_those_of_the_model(form):
    """The products with the identity are the weights; of those below 2^-17 fp16 loses what lies below 2^-24."""
    weight = (torch.randn(40, 16, generator=torch.Generator().manual_seed(0)) / 50).bfloat16()
    weight[0, 0], weight[1, 0], weight[2, 0] = 2.0**-17 * 1.5, 2.0**-24, 2.0**-30
    prepared = PreparedLinear([weight[:8], weight[8:]], [None, None], form, {})
    found = torch.cat([prepared(row[None]) for row in torch.eye(16)]).T
    if form == "half":
        assert (found[2, 0], found[1, 0]) == (0, 2.0**-24)
        found[2, 0] = weight[2, 0]
    assert torch.equal(found.float(), weight.float())


def test_what_is_not_prepared():
    model = build()
    assert prepare(model, 1, 16) is not None
    assert prepare(model, 1, 15) is None
    assert prepare(build(dtype=torch.float64), 1, 16) is None
    with torch.device("meta"):
        assert prepare(Transformer(SMALL), 1, 16) is None
    before = kernels.select("reference")
    try:
        assert prepare(model, 1, 16) is None
    finally:
        kernels.select(before)
    for part in (model, model.model.layers[1].mlp, model.lm_head):
        for hang in (part.register_forward_hook, part.register_forward_pre_hook):
            hook = hang(lambda *_: None)
            assert prepare(model, 1, 16) is None
            hook.remove()
    assert prepare(model, 1, 16) is not None

    class Adapted(nn.Linear):
        pass

    model.model.layers[1].self_attn.v_proj = Adapted(48, 16, bias=False)
    assert prepare(model, 1, 16) is None


def test_weights_that_change_between_two_calls():
    model, (prompt,) = build(), prompts_of(5)
    before = generate(model, [prompt], 64)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.data.neg_()
    after = generate(model, [prompt], 64)
    assert after == by_the_model(model, [prompt], 64) != before
