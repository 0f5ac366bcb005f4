"""The decoder against itself: cached and whole, packed and alone, before and after a change to the future.

Weights are drawn large and most models run in fp64, so that whatever is wrong is off by far more than rounding.
"""

import copy
import inspect
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
import solar.model
from solar.config import LLAMA_2_7B, MISTRAL_7B, SOLAR_10_7B, TINY, ModelConfig, RopeScaling
from solar.model import KVCache, Transformer
from tests.golden import tiny

SMALL = ModelConfig(
    model_type="mistral",
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    initializer_range=0.3,
)
NEAR = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Tensors as small as these take longer on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _switch_is_put_back():
    yield
    kernels.select("auto")


def build(dtype=torch.float64, seed: int = 0, **changes) -> Transformer:
    model = Transformer(replace(SMALL, **changes))
    model.init_weights(seed)
    return model.to(dtype)


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, SMALL.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def empty_cache(model: Transformer, batch: int, max_length: int) -> KVCache:
    return KVCache(model.config, batch, max_length, model.lm_head.weight.dtype, "cpu")


@torch.no_grad()
def in_chunks(model: Transformer, input_ids: Tensor, sizes: list[int], documents: Tensor | None = None) -> Tensor:
    """The logits of all positions, from passes over so many tokens each against one cache."""
    B, T = input_ids.shape
    cache, out = empty_cache(model, B, T), []
    places = (cache.keys.data_ptr(), cache.values.data_ptr())
    ids_of_parts = [None] * len(sizes) if documents is None else documents.split(sizes, 1)
    for part, document_ids in zip(input_ids.split(sizes, 1), ids_of_parts, strict=True):
        out.append(model(part, document_ids=document_ids, cache=cache))
    assert cache.length == T
    assert places == (cache.keys.data_ptr(), cache.values.data_ptr())  # allocated once
    return torch.cat(out, dim=1)


# ------------------------------------------------------------ shapes and counts


def test_one_forward_pass_is_at_most_300_lines():
    assert len(Path(solar.model.__file__).read_text(encoding="utf-8").splitlines()) <= 300


class Allocations(TorchDispatchMode):
    """Counts the elements of every tensor off the meta device that any operator returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel += sum(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor) and not t.is_meta)
        return out


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (MISTRAL_7B, 7_241_732_096),
        (SOLAR_10_7B, 10_731_524_096),
        (MISTRAL_7B.with_depth(40), 8_986_628_096),
        (LLAMA_2_7B, 6_738_415_616),
    ],
    ids=["mistral-7b", "solar-10.7b", "40 layers", "llama-2-7b"],
)
def test_the_models_of_the_papers_without_their_weights(config, parameters):
    with Allocations() as seen, torch.device("meta"):
        model = Transformer(config)
    assert seen.numel == 0
    with Allocations() as seen:
        Transformer(SMALL)
    assert seen.numel > 0  # the count can see an allocation
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert sum(parameter.numel() for parameter in model.parameters()) == config.num_parameters() == parameters
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == config.tensor_shapes()


@pytest.mark.parametrize("case", tiny.CASES)
def test_the_names_are_those_of_a_checkpoint(case):
    config = ModelConfig.from_hf(tiny.CASES[case])
    shapes = {name: tuple(tensor.shape) for name, tensor in Transformer(config).state_dict().items()}
    assert shapes == config.tensor_shapes() == tiny.shapes(tiny.CASES[case])


def test_init_weights():
    model = Transformer(
        replace(TINY, num_hidden_layers=2, model_type="llama", sliding_window=None, attention_bias=True)
    )
    for parameter in model.parameters():
        nn.init.constant_(parameter, torch.nan)
    model.init_weights(3)
    for name, parameter in model.state_dict().items():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all()
        elif name.endswith("bias"):
            assert (parameter == 0).all()
        else:
            assert float(parameter.std()) == pytest.approx(TINY.initializer_range, rel=0.02)
            assert abs(float(parameter.mean())) < 0.001
    again, other = copy.deepcopy(model), copy.deepcopy(model)
    again.init_weights(3), other.init_weights(4)
    for one, same, different in zip(model.parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, same)
        assert one.std() < 1e-6 or not torch.equal(one, different)


def test_a_tied_head_is_the_embedding():
    model = build(tie_word_embeddings=True)
    assert not hasattr(model, "lm_head")
    before = model(ids(1, 5))
    with torch.no_grad():
        model.model.embed_tokens.weight[7] += 1
    changed = model(torch.tensor([[1, 2, 3, 4, 5]])) != build(tie_word_embeddings=True)(torch.tensor([[1, 2, 3, 4, 5]]))
    assert changed[..., 7].all()
    assert not changed[..., :7].any()
    assert before.shape == (1, 5, SMALL.vocab_size)


# ------------------------------------------------------------ what a position sees


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("form", ["reference", "torch"])
def test_causality(form, window):
    kernels.select(form)
    model, input_ids = build(sliding_window=window), ids(2, 12)
    before = model(input_ids)
    for t in range(11):
        changed = input_ids.clone()
        changed[:, t + 1 :] = (changed[:, t + 1 :] + 17) % SMALL.vocab_size
        after = model(changed)
        assert torch.equal(after[:, : t + 1], before[:, : t + 1])
        assert (after[:, t + 1 :] != before[:, t + 1 :]).any(dim=-1).all()


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_window_ends_where_it_should(layers):
    """A layer sees the last W tokens, the token's own included: L layers reach back L * (W - 1) and not one farther."""
    W, T = 4, 16
    model, input_ids = build(num_hidden_layers=layers, sliding_window=W), ids(1, T)
    before = model(input_ids)[0, -1]
    for at in range(T):
        changed = input_ids.clone()
        changed[0, at] = (changed[0, at] + 1) % SMALL.vocab_size
        assert torch.equal(model(changed)[0, -1], before) == (at < T - 1 - layers * (W - 1))


def test_a_window_as_long_as_the_text_changes_nothing():
    input_ids = ids(2, 9)
    torch.testing.assert_close(build(sliding_window=9)(input_ids), build()(input_ids), **NEAR)
    assert not torch.allclose(build(sliding_window=8)(input_ids)[:, -1], build()(input_ids)[:, -1])


def test_the_order_of_the_tokens_counts():
    """Rotary embedding is there: without it, a last token would see a set and not a sequence."""
    model = build(num_hidden_layers=1)
    logits = model(torch.tensor([[5, 6, 7, 8], [6, 5, 7, 8]]))
    assert not torch.allclose(logits[0, -1], logits[1, -1])


# ------------------------------------------------------------ the cache


@settings(max_examples=30)
@given(data=st.data(), B=st.integers(1, 3), T=st.integers(1, 20), window=st.none() | st.integers(1, 22))
def test_cached_passes_are_one_pass(data, B, T, window):
    """Any split into chunks, the window rolling or not, with documents or without."""
    cuts = data.draw(st.sets(st.integers(1, T - 1))) if T > 1 else set()
    places = [0, *sorted(cuts), T]
    sizes = [end - start for start, end in pairwise(places)]
    documents = None
    if data.draw(st.booleans()):
        begins = st.lists(st.booleans(), min_size=T, max_size=T)
        documents = torch.tensor([data.draw(begins) for _ in range(B)]).cumsum(dim=1) - 1
    model, input_ids = build(sliding_window=window), ids(B, T, seed=T)
    with torch.no_grad():
        expected = model(input_ids, document_ids=documents)
    torch.testing.assert_close(in_chunks(model, input_ids, sizes, documents), expected, **NEAR)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["reference", "torch"])
def test_cached_passes_are_one_pass_in_other_dtypes(form, dtype, window):
    kernels.select(form)
    model, input_ids = build(dtype, sliding_window=window), ids(2, 17)
    expected = model(input_ids).float()
    near = {torch.float32: 1e-4, torch.bfloat16: 0.3, torch.float16: 0.04}[dtype]
    got = in_chunks(model, input_ids, [7, 1, 6, 1, 1, 1])
    assert got.dtype == dtype
    assert (got.float() - expected).abs().max() < near * expected.std()


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
@pytest.mark.parametrize("window", [None, 4])
def test_tokens_without_ids_belong_to_the_document_before_them(window, kind):
    """As generation does it: documents in the prompt, then one token at a time without ids."""
    model, input_ids = build(sliding_window=window), ids(2, 12)
    documents = torch.tensor([[-1] * 5 + [0] * 7, [0] * 12], dtype=kind)
    cache, out = empty_cache(model, 2, 12), []
    with torch.no_grad():
        for at, end in ((0, 3), (3, 7)):
            out.append(model(input_ids[:, at:end], document_ids=documents[:, at:end], cache=cache))
        out += [model(input_ids[:, t : t + 1], cache=cache) for t in range(7, 10)]
        out.append(model(input_ids[:, 10:], cache=cache))
        torch.testing.assert_close(torch.cat(out, 1), model(input_ids, document_ids=documents), **NEAR)


def test_the_cache_holds_the_window_and_no_more():
    for window, length, held in ((None, 40, 40), (7, 40, 7), (40, 40, 40), (50, 40, 40)):
        cache = KVCache(replace(SMALL, sliding_window=window), 2, length, torch.bfloat16, "cpu")
        size = SMALL.num_hidden_layers * 2 * SMALL.num_key_value_heads * held * SMALL.head_dim * 2
        assert cache.keys.untyped_storage().nbytes() == cache.values.untyped_storage().nbytes() == size
        assert cache.keys.dtype == torch.bfloat16


def test_a_rolling_cache_never_grows_and_is_not_moved():
    model, input_ids = build(sliding_window=5), ids(1, 60)
    cache = empty_cache(model, 1, 60)
    places, size = (cache.keys.data_ptr(), cache.values.data_ptr()), cache.keys.untyped_storage().nbytes()
    with torch.no_grad():
        out = [model(input_ids[:, :11], cache=cache)] + [
            model(input_ids[:, t : t + 1], cache=cache) for t in range(11, 60)
        ]
    assert places == (cache.keys.data_ptr(), cache.values.data_ptr())
    assert size == cache.keys.untyped_storage().nbytes() == 3 * 2 * 5 * 8 * 8
    torch.testing.assert_close(torch.cat(out, 1), model(input_ids), **NEAR)


@pytest.mark.parametrize("window", [None, 8, 9])
def test_a_full_cache_says_so_and_stays_as_it_was(window):
    model, input_ids = build(sliding_window=window), ids(1, 9)
    cache = empty_cache(model, 1, 8)
    with torch.no_grad():
        model(input_ids[:, :6], cache=cache)
        with pytest.raises(ValueError, match="holds 8 positions; 6 are taken and 3 more do not fit"):
            model(input_ids[:, 6:], cache=cache)
        torch.testing.assert_close(model(input_ids[:, 6:8], cache=cache), model(input_ids[:, :8])[:, 6:], **NEAR)
    with pytest.raises(ValueError, match="8 are taken and 1 more"):
        model(input_ids[:, 8:], cache=cache)


def test_documents_that_come_too_late_are_refused():
    model, input_ids = build(), ids(2, 6)
    cache = empty_cache(model, 2, 6)
    model(input_ids[:, :3], cache=cache)
    with pytest.raises(ValueError, match="first tokens"):
        model(input_ids[:, 3:], document_ids=torch.zeros(2, 3, dtype=torch.long), cache=cache)


def test_shared_layers_have_each_their_own_cache():
    """Up-scaled while loading: 0 1 2 1 2, where positions 1 and 3 are one module."""
    model, input_ids = build(num_hidden_layers=5, sliding_window=6), ids(2, 13)
    layers = list(model.model.layers)
    model.model.layers = nn.ModuleList(layers[i] for i in (0, 1, 2, 1, 2))
    apart = copy.deepcopy(model)
    apart.model.layers = nn.ModuleList(copy.deepcopy(layer) for layer in model.model.layers)
    assert len({*map(id, model.model.layers)}) == 3
    assert len({*map(id, apart.model.layers)}) == 5
    expected = apart(input_ids)
    torch.testing.assert_close(model(input_ids), expected, **NEAR)
    torch.testing.assert_close(in_chunks(model, input_ids, [4, 1, 7, 1]), expected, **NEAR)
    cache = empty_cache(model, 2, 13)
    model(input_ids[:, :6], cache=cache)
    assert not torch.allclose(cache.keys[1], cache.keys[3])


# ------------------------------------------------------------ documents

DOCUMENTS = [[5, 1, 7, 3], [16], [1, 1, 1, 13]]


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("form", ["reference", "torch"])
def test_packed_documents_are_what_each_is_alone(form, window):
    """Logits, log-probabilities of labels, and the gradient of their sum."""
    kernels.select(form)
    packed, alone = build(sliding_window=window), build(sliding_window=window)
    input_ids, labels = ids(3, 16, seed=1), ids(3, 16, seed=2)
    labels[:, ::5] = -100
    document_ids = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in DOCUMENTS])
    logits = packed(input_ids, document_ids=document_ids)
    logprobs = packed(input_ids, labels=labels, document_ids=document_ids)
    logprobs.sum().backward()
    for row, lengths in enumerate(DOCUMENTS):
        for inputs, wanted, got, scored in zip(
            *(t[row : row + 1].split(lengths, 1) for t in (input_ids, labels, logits, logprobs)), strict=True
        ):
            torch.testing.assert_close(got, alone(inputs), **NEAR)
            expected = alone(inputs, labels=wanted)
            torch.testing.assert_close(scored, expected, **NEAR)
            expected.sum().backward()
    for ours, wanted in zip(packed.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, wanted.grad, **NEAR)
    assert not torch.allclose(packed(input_ids), logits)  # without the ids it is something else


@pytest.mark.parametrize("window", [None, 3])
def test_uneven_rows_padded_on_either_side(window):
    model, lengths = build(sliding_window=window), [9, 1, 5]
    rows = [ids(1, n, seed=n) for n in lengths]
    for left in (True, False):
        input_ids, document_ids = torch.zeros(3, 9, dtype=torch.long), torch.full((3, 9), -1)
        for row, (n, tokens) in enumerate(zip(lengths, rows, strict=True)):
            span = slice(9 - n, 9) if left else slice(0, n)
            input_ids[row, span], document_ids[row, span] = tokens[0], 0
        for padding in (0, 7):
            logits = model(input_ids.masked_fill(document_ids < 0, padding), document_ids=document_ids)
            for row, tokens in enumerate(rows):
                torch.testing.assert_close(logits[row][document_ids[row] == 0], model(tokens)[0], **NEAR)


# ------------------------------------------------------------ labels


@pytest.mark.parametrize("form", ["reference", "torch"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_label_logprobs_are_log_softmax_of_the_logits(form, tied, dtype):
    kernels.select(form)
    model, input_ids, labels = build(dtype, tie_word_embeddings=tied), ids(3, 11), ids(3, 11, seed=1)
    labels[0, 4:7], labels[2] = -100, -100
    document_ids = torch.tensor([[0] * 11, [0] * 4 + [1] * 7, [0] * 11])
    got = model(input_ids, labels=labels, document_ids=document_ids)
    logprobs = model(input_ids, document_ids=document_ids).log_softmax(-1)
    expected = torch.zeros(3, 11, dtype=dtype)
    for row in range(3):
        for t in range(1, 11):
            if labels[row, t] != -100 and document_ids[row, t] == document_ids[row, t - 1]:
                expected[row, t] = logprobs[row, t - 1, labels[row, t]]
    near = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else NEAR
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected, **near)
    nothing = torch.zeros(3, 11, dtype=torch.bool)
    nothing[:, 0] = nothing[1, 4] = True
    assert torch.equal(got == 0, nothing | (labels == -100))
    assert (model(ids(2, 1), labels=ids(2, 1)) == 0).all()  # a lone token has nothing before it


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_label_logprobs_are_fp32_in_16_bits(dtype):
    model, input_ids = build(dtype), ids(2, 7)
    got = model(input_ids, labels=input_ids)
    assert got.dtype == torch.float32
    expected = model(input_ids)[:, :-1].float().log_softmax(-1).gather(-1, input_ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(got[:, 1:], expected)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("changes", [{}, {"model_type": "llama", "attention_bias": True, "mlp_bias": True}], ids=str)
def test_the_gradient_reaches_every_parameter(changes, tied):
    model, input_ids = build(tie_word_embeddings=tied, **changes), ids(2, 9)
    model(input_ids, labels=input_ids).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).any(), name
    untouched = sorted({*range(SMALL.vocab_size)} - set(input_ids.flatten().tolist()))
    assert tied or (model.model.embed_tokens.weight.grad[untouched] == 0).all()


def test_the_gradient_is_that_of_finite_differences():
    model, input_ids = build(num_hidden_layers=2, sliding_window=3), ids(2, 6)
    labels, document_ids = ids(2, 6, seed=1), torch.tensor([[0, 0, 0, 1, 1, 1], [0] * 6])
    loss = lambda: model(input_ids, labels=labels, document_ids=document_ids).sum()
    loss().backward()
    step = 1e-6
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        slope = (parameter.grad * direction).sum()
        with torch.no_grad():
            parameter += step * direction
            above = loss()
            parameter -= 2 * step * direction
            below = loss()
            parameter += step * direction
        assert float((above - below) / (2 * step)) == pytest.approx(float(slope), rel=1e-5, abs=1e-5), name


def test_the_sum_of_the_labels_is_theirs_and_so_is_its_gradient():
    model, input_ids, labels = build(), ids(2, 9), ids(2, 9, seed=1)
    labels[0, 3:5] = -100
    found = []
    for summed in (False, True):
        loss = model(input_ids, labels=labels, summed=summed).sum()
        loss.backward()
        found.append([loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
        model.zero_grad()
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="summed"):
        model(input_ids, summed=True)


# ------------------------------------------------------------ the arguments and settings, all of which count


def test_every_argument_of_the_forward_pass_changes_the_output():
    model, input_ids = build(), ids(2, 8)
    cache = empty_cache(model, 2, 16)
    model(ids(2, 8, seed=5), cache=cache)
    changes = {
        "input_ids": (input_ids + 1) % SMALL.vocab_size,
        "labels": input_ids,
        "document_ids": torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]] * 2),
        "cache": cache,
        "last_only": True,
        "summed": True,
    }
    assert changes.keys() == set(inspect.signature(Transformer.forward).parameters) - {"self"}
    before = model(input_ids)
    for name, value in changes.items():
        given = {"input_ids": input_ids} | ({"labels": input_ids} if name == "summed" else {})
        after = model(**(given | {name: value}))
        assert after.shape != before.shape or not torch.allclose(after, before), name


def test_last_only_is_the_last_position():
    model, input_ids = build(), ids(2, 8)
    for T in (8, 1):
        last = model(input_ids[:, :T], last_only=True)
        torch.testing.assert_close(last, model(input_ids[:, :T])[:, -1:], **NEAR)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": 1e6},
        {"rms_norm_eps": 1e-2},
        {"sliding_window": 4},
        {"rope_scaling": RopeScaling("linear", 4.0)},
        {"rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 16)},
    ],
    ids=str,
)
def test_every_setting_that_has_no_weights_changes_the_output(change):
    input_ids = ids(1, 12)
    assert (build(**change)(input_ids) - build()(input_ids)).abs().max() > 0.01


def test_rope_scaling_is_its_formula():
    positions = torch.arange(40)[None]
    plain = solar.model.rotary_table(positions, SMALL)
    linear = solar.model.rotary_table(positions, replace(SMALL, rope_scaling=RopeScaling("linear", 4.0)))
    for table, slowed in zip(plain, linear, strict=True):
        torch.testing.assert_close(slowed[:, ::4], table[:, :10])  # position 4 p stands where p stood
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
    cos, sin = solar.model.rotary_table(torch.ones(1, 1), replace(SMALL, rope_scaling=scaling))
    frequencies = [10_000 ** (-i / 4) for i in range(4)]  # wavelengths of 6.3, 63, 628, 6283
    turns = 64 * frequencies[1] / (2 * torch.pi)  # between 1 and 4: blended
    keep = (turns - 1) / 3
    blended = keep * frequencies[1] + (1 - keep) * frequencies[1] / 8
    expected = torch.tensor([frequencies[0], blended, frequencies[2] / 8, frequencies[3] / 8])
    torch.testing.assert_close(torch.atan2(sin, cos)[0, 0], expected)


# ------------------------------------------------------------ numbers


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_the_fast_forms_are_not_far_from_the_truth(dtype):
    model, input_ids = build(dtype, num_hidden_layers=6, initializer_range=0.1), ids(4, 32)
    truth = copy.deepcopy(model).double()(input_ids)
    distance = {}
    for form in ("reference", "torch"):
        kernels.select(form)
        logits = model(input_ids)
        assert logits.dtype == dtype
        distance[form] = float((logits.double() - truth).norm() / truth.norm())
    assert distance["torch"] <= 2 * distance["reference"]
    assert distance["reference"] < (0.03 if dtype == torch.bfloat16 else 0.004)


def test_the_forms_agree():
    model, input_ids = build(torch.float32, sliding_window=5), ids(2, 16)
    logits = {}
    for form in ("reference", "torch"):
        kernels.select(form)
        logits[form] = model(input_ids)
    torch.testing.assert_close(logits["torch"], logits["reference"], rtol=1e-4, atol=1e-4)


def test_the_same_pass_has_the_same_bits():
    for dtype in (torch.float32, torch.bfloat16):
        model, input_ids = build(dtype, sliding_window=5), ids(4, 32)
        assert torch.equal(model(input_ids), model(input_ids))
        assert torch.equal(model(input_ids), build(dtype, sliding_window=5)(input_ids))
        found = []
        for _ in range(2):
            model.zero_grad()
            model(input_ids, labels=input_ids).sum().backward()
            found.append([parameter.grad.clone() for parameter in model.parameters()])
        assert all(map(torch.equal, *found))


def test_casting_a_model_leaves_the_rotation_in_fp32():
    """A table cast along with the weights would know the angles of far positions to no more than three digits."""
    positions = torch.tensor([[100_000]])
    for dtype in (torch.bfloat16, torch.float64):
        model = build(dtype)
        assert not list(model.buffers())
        cos, sin = solar.model.rotary_table(positions, model.config)
        assert cos.dtype == sin.dtype == torch.float32
        exact = torch.tensor([100_000 * 10_000 ** (-i / 4) for i in range(4)], dtype=torch.float64)
        torch.testing.assert_close(cos[0, 0].double(), exact.cos(), rtol=0, atol=0.02)


@pytest.mark.parametrize("documents", [False, True])
def test_a_decoder_layer_compiles_whole(documents):
    """No graph break: kernels dispatch on what is known when a graph is traced."""
    model = build()
    ids = torch.zeros(2, 6, dtype=torch.long) if documents else None
    x, angles = torch.randn(2, 6, model.config.hidden_size), torch.rand(1, 6, model.config.head_dim // 2)
    arguments = (x, angles.cos(), angles.sin(), (ids, ids))
    layer = model.model.layers[0]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), layer(*arguments))
