"""Every form of every operation against its formula written out in fp64, with shapes that nobody would choose."""

import math
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
from kernels import launch, logprobs
from kernels.attention import attention_reference, attention_torch
from kernels.linear import linear_reference, linear_torch
from kernels.logprobs import CHUNK, label_logprobs_reference, label_logprobs_torch
from kernels.rmsnorm import add_rmsnorm_reference, add_rmsnorm_torch, rmsnorm_reference, rmsnorm_torch
from kernels.rotary import rotary_reference
from kernels.swiglu import swiglu_reference, swiglu_torch
from tests import oracle

EPS = 1e-5
NEAR = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.float64: {"rtol": 1e-12, "atol": 1e-12}}
HALVES = (torch.bfloat16, torch.float16)
randn = partial(oracle.randn, dtype=torch.float64)
SHAPES = [(1, 1), (1, 7), (5, 64), (3, 13, 127), (2, 1, 1024), (0, 8)]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Tensors as small as these take longer on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weighting(y: torch.Tensor, n: int = 0) -> torch.Tensor:
    """Random weights for the elements of y, of few enough bits to be the same in every dtype."""
    return randn(*y.shape, seed=9 + n, dtype=torch.bfloat16).to(y.dtype)


def gradients(function, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients of a fixed random weighting of the outputs, with respect to every floating input."""
    inputs = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [weighting(y, n) for n, y in enumerate(outputs)])
    return [x.grad for x in inputs if x.requires_grad]


def assert_not_farther(times: float, got: torch.Tensor, reference: torch.Tensor, truth: torch.Tensor) -> None:
    """The rule for 16 bits: at most so many times as far from fp64 as the specification is."""
    assert got.dtype == reference.dtype
    ours, specified = (torch.linalg.vector_norm(t.double() - truth) for t in (got, reference))
    assert ours <= times * specified, f"{ours:.3e} from the truth, the specification is {specified:.3e}"


# Name -> (specification, torch's form, inputs of a dtype): what every operation is put through alike.
OPERATIONS = {
    "linear": (
        linear_reference,
        linear_torch,
        lambda dtype: (
            [randn(3, 31, 193, seed=1, dtype=dtype)]
            + [randn(*shape, seed=len(shape), dtype=dtype) for shape in ((2, 193), (2,))]
        ),
    ),
    "rmsnorm": (
        lambda x, w: rmsnorm_reference(x, w, EPS),
        lambda x, w: rmsnorm_torch(x, w, EPS),
        lambda dtype: [randn(31, 193, seed=1, dtype=dtype), randn(193, seed=2, dtype=dtype)],
    ),
    "add_rmsnorm": (
        lambda x, r, w: add_rmsnorm_reference(x, r, w, EPS),
        lambda x, r, w: add_rmsnorm_torch(x, r, w, EPS),
        lambda dtype: [randn(31, 193, seed=n, dtype=dtype) for n in (1, 2)] + [randn(193, seed=3, dtype=dtype)],
    ),
    "swiglu": (
        swiglu_reference,
        swiglu_torch,
        lambda dtype: [randn(31, 193, seed=1, dtype=dtype, scale=3), randn(31, 193, seed=2, dtype=dtype)],
    ),
    "attention": (
        lambda q, k, v: attention_reference(q, k, v, 29),
        lambda q, k, v: attention_torch(q, k, v, 29),
        lambda dtype: (
            [randn(2, 8, 41, 32, seed=1, dtype=dtype)] + [randn(2, 2, 67, 32, seed=n, dtype=dtype) for n in (2, 3)]
        ),
    ),
    "label_logprobs": (
        label_logprobs_reference,
        label_logprobs_torch,
        lambda dtype: [
            randn(67, 48, seed=1, dtype=dtype),
            randn(101, 48, seed=2, dtype=dtype, scale=0.3),
            torch.where(torch.arange(67) % 5 == 3, -100, torch.arange(67)),
        ],
    ),
}


def first(outputs):
    return outputs[0] if isinstance(outputs, tuple) else outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OPERATIONS)
def test_forms_agree(name, dtype):
    reference, fused, make = OPERATIONS[name]
    torch.testing.assert_close(fused(*make(dtype)), reference(*make(dtype)), **NEAR[dtype])
    for ours, wanted in zip(gradients(fused, make(dtype)), gradients(reference, make(dtype)), strict=True):
        torch.testing.assert_close(ours, wanted, **NEAR[dtype])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_in_16_bits_no_form_is_far_from_the_truth(name, dtype):
    reference, fused, make = OPERATIONS[name]
    inputs = make(dtype)
    exact = [x.double() if x.is_floating_point() else x for x in inputs]
    got, specified, truth = first(fused(*inputs)), first(reference(*inputs)), first(reference(*exact))
    assert_not_farther(2, got, specified, truth)
    assert (got.double() - truth).abs().max() <= 2 * (specified.double() - truth).abs().max()
    # Torch's own attention rounds the operands of its products, which the specification does not.
    yardstick = (lambda q, k, v: oracle.attention_rounded(q, k, v, 29)) if name == "attention" else reference
    found = zip(gradients(fused, inputs), gradients(yardstick, inputs), gradients(reference, exact), strict=True)
    for gradient, specified, truth in found:
        assert_not_farther(2, gradient, specified, truth)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["attention", "swiglu"])
def test_the_specification_rounds_once(name, dtype):
    """Within half a step of the truth, and a little of fp32's: everything before the last rounding is fp32."""
    reference, _, make = OPERATIONS[name]
    got, truth = reference(*make(dtype)).double(), reference(*[x.double() for x in make(dtype)])
    assert ((got - truth).abs() <= truth.abs() * torch.finfo(dtype).eps / 1.99 + 1e-6).all()


@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients_are_those_of_finite_differences(name):
    _, _, make = OPERATIONS[name]
    for function in OPERATIONS[name][:2]:
        small = [
            x[..., :2, :5] if x.ndim > 1 else x[:5] if x.is_floating_point() else x[:2] for x in make(torch.double)
        ]
        if name == "label_logprobs":
            small = [*small[:2], torch.tensor([1, -100])]
        small = [x.clone().requires_grad_(x.is_floating_point()) for x in small]
        assert torch.autograd.gradcheck(function, small)


# ------------------------------------------------------------ projections


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("frozen", ["none", "x", "weight", "bias"])
def test_a_projection_asks_for_no_gradient_that_nobody_wants(monkeypatch, onednn, frozen):
    """By oneDNN as on no Intel."""
    module = sys.modules["kernels.linear"]  # the name in the package is the operation's
    if onednn and not module._has_onednn():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(module, "_has_onednn", lambda: onednn)
    monkeypatch.setattr(module, "mkl_is_at_home", lambda: False)
    tensors = {"x": randn(4, 7, 33), "weight": randn(5, 33, seed=1), "bias": randn(5, seed=2)}
    tensors = {name: t.float().requires_grad_(name != frozen) for name, t in tensors.items()}
    strided = {name: t.detach().double().requires_grad_(name != frozen) for name, t in tensors.items()}
    for inputs in (tensors, strided):
        y = linear_torch(inputs["x"].transpose(0, 1), inputs["weight"], inputs["bias"])
        y.backward(weighting(y))
    for name, tensor in tensors.items():
        if name == frozen:
            assert tensor.grad is None
        else:
            torch.testing.assert_close(tensor.grad, strided[name].grad.float(), **NEAR[torch.float32])


@pytest.mark.parametrize("at_home", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 4, 15, 16, 64])
def test_fp32_is_multiplied_by_whoever_is_faster(monkeypatch, at_home, rows):
    """MKL on Intel's processors, but for a few rows; elsewhere oneDNN: and both give the product."""
    module, asked = sys.modules["kernels.linear"], []
    if not module._has_onednn():
        pytest.skip("this torch has no oneDNN")
    onednn = module.product
    monkeypatch.setattr(module, "mkl_is_at_home", lambda: at_home)
    monkeypatch.setattr(module, "product", lambda *tensors: asked.append(rows) or onednn(*tensors))
    x, weight = randn(rows, 33).float(), randn(5, 33, seed=1).float()
    torch.testing.assert_close(linear_torch(x, weight), linear_reference(x, weight), **NEAR[torch.float32])
    assert bool(asked) == (not at_home or 4 <= rows < 16)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("biased", [True, False])
def test_16_bit_products_widened_block_by_block_round_once(monkeypatch, dtype, biased):
    """Beside F.linear, which rounds where it likes: half a unit in the last place from the truth, over all blocks."""
    module = sys.modules["kernels.linear"]
    if not module._has_onednn():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(module, "multiplies_natively", lambda _: False)
    monkeypatch.setattr(module, "WIDENED_BLOCK", 100)  # three rows of the weight, the last block one
    x, weight, bias = (randn(*shape, seed=1, dtype=dtype) for shape in ((2, 16, 33), (10, 33), (10,)))
    bias = bias if biased else None
    truth = linear_reference(x.double(), weight.double(), bias.double() if biased else None)
    error = (linear_torch(x, weight, bias).double() - truth).abs()
    assert (error <= truth.abs() * torch.finfo(dtype).eps * 0.5001 + 1e-6).all()
    few = linear_torch(x[:1], weight, bias)  # 16 rows: not worth it
    assert torch.equal(few, F.linear(x[:1], weight, bias))


# ------------------------------------------------------------ norms, activation, rotation


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rmsnorm_is_its_formula(shape):
    x, weight = randn(*shape, seed=1, scale=7), randn(shape[-1], seed=2)
    expected = torch.empty_like(x)
    rows = zip(x.reshape(-1, shape[-1]).tolist(), expected.view(-1, shape[-1]), strict=True)
    for row, out in rows:
        scale = 1 / math.sqrt(sum(value * value for value in row) / len(row) + EPS)
        for i, value in enumerate(row):
            out[i] = weight[i] * value * scale
    for form in (rmsnorm_reference, rmsnorm_torch):
        torch.testing.assert_close(form(x, weight, EPS), expected, **NEAR[torch.float64])
        torch.testing.assert_close(form(x.float(), weight.float(), EPS), expected.float(), **NEAR[torch.float32])
    gradients = []
    for form in (rmsnorm_reference, rmsnorm_torch):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        gradients.append(torch.autograd.grad(form(*leaves, EPS).square().sum(), leaves))
    for mine, specified in zip(*reversed(gradients), strict=True):
        torch.testing.assert_close(mine, specified, **NEAR[torch.float64])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
def test_both_rmsnorms_have_the_same_bits(dtype):
    for shape in SHAPES:
        for scale in (1e-3, 1.0, 100.0):
            x, weight = randn(*shape, seed=1, dtype=dtype, scale=scale), randn(shape[-1], seed=2, dtype=dtype)
            assert torch.equal(rmsnorm_torch(x, weight, EPS), rmsnorm_reference(x, weight, EPS))


@pytest.mark.parametrize("dtype", HALVES)
def test_rmsnorm_rounds_before_it_multiplies(dtype):
    """Llama's order: the other one gives other bits."""
    x, weight = randn(64, 256, seed=1, dtype=dtype), randn(256, seed=2, dtype=dtype)
    x32 = x.float()
    normalised = x32 * (x32.square().mean(-1, keepdim=True) + EPS).rsqrt()
    assert not torch.equal((weight.float() * normalised).to(dtype), weight * normalised.to(dtype))
    for form in (rmsnorm_reference, rmsnorm_torch):
        assert torch.equal(form(x, weight, EPS), weight * normalised.to(dtype))
        assert form(x, weight.float(), EPS).dtype == torch.float32  # the promoted dtype


@pytest.mark.parametrize("form", [add_rmsnorm_reference, add_rmsnorm_torch])
def test_add_rmsnorm_is_a_sum_and_a_norm(form):
    for dtype in (torch.float32, *HALVES):
        x, residual, weight = (randn(5, 19, seed=n, dtype=dtype)[0 if n == 3 else ...] for n in (1, 2, 3))
        normalised, total = form(x, residual, weight, EPS)
        assert torch.equal(total, residual + x)
        assert torch.equal(normalised, rmsnorm_reference(residual + x, weight, EPS))


@pytest.mark.parametrize("form", [swiglu_reference, swiglu_torch])
def test_swiglu_is_its_formula_also_at_the_ends(form):
    values = [0.0, -0.5, 1.0, -3.0, 20.0, -80.0, 80.0, -89.0, -100.0, 100.0, -1e4, 1e4]
    gate = torch.tensor(values, requires_grad=True)
    sigmoid = [1 / (1 + math.exp(-z)) if z > -700 else 0.0 for z in values]
    y = form(gate, torch.full_like(gate, 2.0))
    y.sum().backward()
    expected = torch.tensor([2 * z * s for z, s in zip(values, sigmoid, strict=True)])
    slope = torch.tensor([2 * (s + z * s * (1 - s)) for z, s in zip(values, sigmoid, strict=True)])
    torch.testing.assert_close(y.detach(), expected)
    torch.testing.assert_close(gate.grad, slope)


def angles(T: int, E: int, B: int = 1, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    angle = randn(B, T, E // 2, seed=seed, dtype=torch.float32, scale=30)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize(("B", "H", "K", "T", "E"), [(1, 1, 1, 1, 2), (2, 4, 1, 7, 6), (3, 2, 2, 13, 64)])
def test_rotary_turns_pairs_half_a_head_apart(dtype, B, H, K, T, E):
    q, k = randn(B, H, T, E, seed=1, dtype=dtype), randn(B, K, T, E, seed=2, dtype=dtype)
    for batch in (1, B):
        cos, sin = angles(T, E, batch)
        turn = torch.complex(cos.double(), sin.double())[:, None]
        for x, got in zip((q, k), rotary_reference(q, k, cos, sin), strict=True):
            pairs = torch.complex(x[..., : E // 2].double(), x[..., E // 2 :].double()) * turn
            expected = torch.cat((pairs.real, pairs.imag), dim=-1)
            assert got.dtype == dtype
            if dtype in HALVES:  # one rounding, no more: within half a step of the truth, and a little of fp32's
                assert ((got.double() - expected).abs() <= expected.abs() * torch.finfo(dtype).eps / 1.99 + 1e-6).all()
            else:
                torch.testing.assert_close(got, expected.to(dtype), rtol=1e-6, atol=1e-6)


def test_rotary_gradient():
    q, k = (randn(2, heads, 3, 4, seed=heads).requires_grad_() for heads in (2, 1))
    cos, sin = (t.double() for t in angles(3, 4))
    assert torch.autograd.gradcheck(lambda q, k: rotary_reference(q, k, cos, sin), (q, k))


def test_rotary_scores_depend_on_distance_alone():
    E, frequencies = 8, torch.tensor([1.0, 0.3, 0.1, 0.01])
    q, k = randn(1, 1, 1, E, seed=1), randn(1, 1, 1, E, seed=2)

    def score(query_at: float, key_at: float) -> torch.Tensor:
        turned = []
        for x, at in ((q, query_at), (k, key_at)):
            angle = (at * frequencies.double())[None, None]
            turned.append(rotary_reference(x, x, angle.cos(), angle.sin())[0])
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(3, 1), score(103, 101))
    assert not torch.isclose(score(3, 1), score(3, 2))


# ------------------------------------------------------------ attention


def attention_loop(q, k, v, window=None, document_ids=None, key_document_ids=None) -> torch.Tensor:
    """The words of kernels/attention.py as loops, in fp64."""
    q, k, v = q.double(), k.double(), v.double()
    (B, H, T, E), (_, K, S, _) = q.shape, k.shape
    y = torch.zeros_like(q)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                i, kv = S - T + t, h // (H // K)
                seen = [j for j in range(S) if j <= i and (window is None or j > i - window)]
                if document_ids is not None:
                    seen = [j for j in seen if document_ids[b, t] == key_document_ids[b, j]]
                scores = [float(q[b, h, t] @ k[b, kv, j]) / math.sqrt(E) for j in seen]
                weights = [math.exp(score - max(scores)) for score in scores]
                for weight, j in zip(weights, seen, strict=True):
                    y[b, h, t] += weight / sum(weights) * v[b, kv, j]
    return y


def heads(B=1, K=1, G=1, T=5, S=5, E=4, dtype=torch.float64):
    return [randn(B, K * G, T, E, seed=1, dtype=dtype)] + [randn(B, K, S, E, seed=n, dtype=dtype) for n in (2, 3)]


UGLY = {
    "one query, one key": ({"T": 1, "S": 1}, None, None),
    "decode": ({"B": 2, "K": 2, "G": 4, "T": 1, "S": 13}, None, None),
    "decode with a window": ({"B": 2, "K": 2, "G": 4, "T": 1, "S": 13}, 5, None),
    "decode, window of one": ({"T": 1, "S": 7}, 1, None),
    "whole": ({"K": 2, "G": 1, "T": 11, "S": 11, "E": 2}, None, None),
    "whole with a window": ({"K": 1, "G": 8, "T": 11, "S": 11, "E": 6}, 3, None),
    "window larger than the text": ({"T": 7, "S": 7}, 100, None),
    "window as large as the text": ({"T": 7, "S": 7}, 7, None),
    "window one short of the text": ({"T": 7, "S": 7}, 6, None),
    "chunk": ({"K": 2, "G": 4, "T": 5, "S": 13}, None, None),
    "chunk with a window": ({"K": 2, "G": 4, "T": 5, "S": 13}, 4, None),
    "chunk, window of one": ({"T": 5, "S": 13}, 1, None),
    "documents": ({"B": 2, "G": 4, "T": 7, "S": 7}, None, [[0, 0, 0, 1, 2, 2, 2], [5, 3, 3, 3, 3, 3, 4]]),
    "documents with a window": ({"B": 2, "G": 4, "T": 7, "S": 7}, 2, [[0, 0, 0, 1, 1, 1, 1], [3, 3, 3, 3, 3, 3, 4]]),
    "documents of one token": ({"T": 5, "S": 5}, None, [[0, 1, 2, 3, 4]]),
    "left padding": ({"B": 2, "K": 2, "T": 5, "S": 5}, None, [[-1, -1, -1, 0, 0], [0, 0, 0, 0, 0]]),
    "decode behind left padding": ({"B": 2, "T": 1, "S": 6}, 4, [[-1, -1, -1, 0, 0, 0], [0, 0, 0, 0, 0, 0]]),
    "chunk of documents": ({"B": 1, "T": 3, "S": 7}, None, [[0, 0, 1, 1, 1, 1, 2]]),
}


@pytest.mark.parametrize("form", [attention_reference, attention_torch])
@pytest.mark.parametrize("case", UGLY)
def test_attention_is_the_loop(form, case):
    shape, window, key_documents = UGLY[case]
    q, k, v = heads(**shape)
    keys = None if key_documents is None else torch.tensor(key_documents)
    documents = (None if keys is None else keys[:, -q.shape[2] :], keys)
    expected = attention_loop(q, k, v, window, *documents)
    torch.testing.assert_close(form(q, k, v, window, *documents), expected, **NEAR[torch.float64])
    half = [t.to(torch.float16) for t in (q, k, v)]
    error = form(*half, window, *documents).double() - attention_loop(*half, window, *documents)
    assert error.abs().max() < 4e-3


@settings(max_examples=60)
@given(data=st.data())
def test_attention_of_any_shape(data):
    """Forward against the loop, gradients of the fused form against those of the specification."""
    draw = lambda low, high: data.draw(st.integers(low, high))
    B, K, T = draw(1, 3), draw(1, 3), draw(1, 9)
    q, k, v = heads(B, K, data.draw(st.sampled_from([1, 4, 8])), T, T + draw(0, 9), 2 * draw(1, 4))
    S = k.shape[2]
    window = data.draw(st.none() | st.integers(1, S + 2))
    documents = (None, None)
    if data.draw(st.booleans()):
        keys = torch.tensor(
            data.draw(st.lists(st.lists(st.integers(-1, 2), min_size=S, max_size=S), min_size=B, max_size=B))
        )
        documents = (keys[:, S - T :], keys)
    expected = attention_loop(q, k, v, window, *documents)
    results = []
    for form in (attention_reference, attention_torch):
        call = lambda q, k, v, form=form: form(q, k, v, window, *documents)
        torch.testing.assert_close(call(q, k, v), expected, **NEAR[torch.float64])
        results.append(gradients(call, [q, k, v]))
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, **NEAR[torch.float64])


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(("T", "S", "E"), [(2, 3, 8), (5, 6, 24), (7, 70, 64), (33, 600, 40), (600, 633, 16)])
def test_a_chunk_behind_earlier_keys_is_two_softmaxes_in_one(T, S, E, dtype, monkeypatch):
    q, k, v = heads(B=2, K=2, G=3, T=T, S=S, E=E, dtype=dtype)
    k[:, :, : S - T] *= 3  # so that neither part counts for nothing
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *_, **__: pytest.fail("with a mask"))
    with torch.no_grad():
        found = attention_torch(q, k, v)
    assert found.dtype == dtype
    expected = attention_reference(q.double(), k.double(), v.double())
    limit = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    assert (found.double() - expected).abs().max() < limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize("form", [attention_reference, attention_torch])
def test_a_query_that_sees_one_key_returns_its_value(form, dtype):
    q, k, v = heads(B=2, K=2, G=4, T=6, S=9, E=16, dtype=dtype)
    own = v[:, :, -6:].repeat_interleave(4, dim=1)
    assert torch.equal(form(q, k, v, window=1), own)
    keys = torch.arange(9).expand(2, 9)
    assert torch.equal(form(q, k, v, None, keys[:, -6:], keys), own)


@pytest.mark.parametrize("form", [attention_reference, attention_torch])
def test_attention_looks_neither_ahead_nor_beyond_its_window(form):
    q, k, v = heads(B=1, K=2, G=4, T=8, S=11, dtype=torch.float32)
    for window in (None, 3):
        before = form(q, k, v, window)
        for t in range(8):  # query t stands at S - T + t on the axis of the keys
            hidden = torch.ones(11, dtype=torch.bool)
            hidden[max(0, 3 + t + 1 - (window or 11)) : 3 + t + 1] = False
            k2, v2 = (torch.where(hidden[:, None], 100.0, x) for x in (k, v))
            assert torch.equal(form(q, k2, v2, window)[:, :, t], before[:, :, t])
            k2, v2 = (torch.where(hidden[:, None], x, 100.0) for x in (k, v))
            assert not torch.equal(form(q, k2, v2, window)[:, :, t], before[:, :, t])


Q, KV = torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 5, 8)
IDS, KEY_IDS = torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 5, dtype=torch.long)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((torch.zeros(2, 4, 6, 8), KV, KV), "T at most S"),
        ((torch.zeros(2, 3, 3, 8), KV, KV), "multiple of K"),
        ((torch.zeros(1, 4, 3, 8), KV, KV), r"\(1, 4, 3, 8\)"),
        ((torch.zeros(2, 4, 3, 6), KV, KV), "do not fit"),
        ((Q, KV, torch.zeros(2, 2, 4, 8)), r"v \(2, 2, 4, 8\)"),
        ((Q, KV, KV, 0), "window 0"),
        ((Q, KV, KV, -1), "window -1"),
        ((Q, KV, KV, None, IDS, None), "come together"),
        ((Q, KV, KV, None, None, KEY_IDS), "come together"),
        ((Q, KV, KV, None, KEY_IDS, KEY_IDS), r"document_ids \(2, 5\) of torch.int64 on cpu must be integers \(2, 3\)"),
        ((Q, KV, KV, None, IDS, IDS), r"key_document_ids \(2, 3\) of torch.int64 on cpu must be integers \(2, 5\)"),
        ((Q, KV, KV, None, IDS.float(), KEY_IDS), "document_ids .* of torch.float32"),
    ],
)
def test_attention_refuses_what_does_not_fit(arguments, says):
    with pytest.raises(ValueError, match=says):
        kernels.attention(*arguments)
    assert kernels.attention(Q, KV, KV, 1, IDS, KEY_IDS).shape == Q.shape


# ------------------------------------------------------------ log-probabilities of labels


def labelled(N: int, dtype=torch.float64, D: int = 8, V: int = 13, ignored: float = 0.2):
    x, weight = randn(N, D, seed=1, dtype=dtype), randn(V, D, seed=2, dtype=dtype)
    labels = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(N))
    return x, weight, labels.masked_fill(torch.rand(N, generator=torch.Generator().manual_seed(N)) < ignored, -100)


@pytest.mark.parametrize("form", [label_logprobs_reference, label_logprobs_torch])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_label_logprobs_is_its_formula(form, dtype):
    x, weight, labels = labelled(29, dtype)
    got = form(x, weight, labels)
    assert got.dtype == dtype
    for n, label in enumerate(labels.tolist()):
        logits = [float(x[n].double() @ row.double()) for row in weight]
        expected = 0.0 if label == -100 else logits[label] - math.log(sum(map(math.exp, logits)))
        assert float(got[n]) == pytest.approx(expected, abs=1e-5 if dtype == torch.float32 else 1e-12)
    for label in (-5, len(weight)):
        with pytest.raises((IndexError, RuntimeError)):
            form(x, weight, labels.masked_fill(labels == labels[0], label))
    every = torch.stack([form(x, weight, torch.full((29,), label)) for label in range(13)])
    torch.testing.assert_close(every.exp().sum(0), torch.ones(29, dtype=dtype), **NEAR[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("N", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 7])
def test_label_logprobs_across_the_borders_of_chunks(N, dtype):
    inputs = labelled(N, dtype)
    assert CHUNK == 1024
    torch.testing.assert_close(label_logprobs_torch(*inputs), label_logprobs_reference(*inputs), **NEAR[dtype])
    near = NEAR[dtype] if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}  # sums of two thousand terms
    found = zip(gradients(label_logprobs_torch, inputs), gradients(label_logprobs_reference, inputs), strict=True)
    for ours, wanted in found:
        torch.testing.assert_close(ours, wanted, **near)


@pytest.mark.parametrize("N", [0, 1, CHUNK, 2 * CHUNK + 7])
@pytest.mark.parametrize("kept", [True, False])
def test_a_promised_sum_changes_no_gradient_whether_it_is_kept_or_not(N, kept):
    found = []
    for form, summed in (
        (label_logprobs_reference, False),
        (label_logprobs_torch, True),
        (label_logprobs_torch, False),
    ):
        x, weight, labels = labelled(N)
        x.requires_grad_(), weight.requires_grad_()
        y = form(x, weight, labels, summed)
        (y.sum() * 0.7 if kept else (y * weighting(y)).sum()).backward()
        found.append((x.grad, weight.grad))
    for ours in found[1:]:
        torch.testing.assert_close(ours, found[0], **NEAR[torch.float64])


@pytest.mark.parametrize("form", [label_logprobs_reference, label_logprobs_torch])
def test_ignored_labels_give_nothing_and_take_nothing(form):
    x, weight, labels = labelled(CHUNK + 3, torch.float32)
    assert (form(x, weight, labels)[labels == -100] == 0).all()
    dx, dw = gradients(form, [x, weight, labels])
    assert (dx[labels == -100] == 0).all()
    assert (dx[labels != -100] != 0).any(dim=1).all()
    kept = labels != -100
    alone = x[kept].requires_grad_(), weight.clone().requires_grad_()
    form(*alone, labels[kept]).backward(weighting(labels.float())[kept])
    torch.testing.assert_close(dw, alone[1].grad, rtol=1e-4, atol=1e-4)
    all_ignored = torch.full_like(labels, -100)
    assert (form(x, weight, all_ignored) == 0).all()
    assert all((gradient == 0).all() for gradient in gradients(form, [x, weight, all_ignored]))


@pytest.mark.parametrize("frozen", [0, 1])
def test_label_logprobs_with_one_side_frozen(frozen):
    inputs = labelled(33)
    both = gradients(label_logprobs_torch, inputs)
    leaves = [t.clone().requires_grad_(n != frozen) for n, t in enumerate(inputs[:2])]
    y = label_logprobs_torch(*leaves, inputs[2])
    y.backward(weighting(y))
    assert leaves[frozen].grad is None
    assert torch.equal(leaves[1 - frozen].grad, both[1 - frozen])


class LargestTensor(TorchDispatchMode):
    """Notes how many elements the largest tensor has that any operator returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


def test_no_more_than_one_chunk_of_logits_is_ever_held(monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK", 16)
    x, weight, labels = labelled(160, torch.float32, V=64)
    x.requires_grad_(), weight.requires_grad_()
    for form, largest in ((label_logprobs_torch, 16 * 64), (label_logprobs_reference, 160 * 64)):
        with LargestTensor() as seen:
            form(x, weight, labels).sum().backward()
        assert seen.numel == max(largest, 160 * 8)


def test_a_weight_gradient_of_many_chunks_keeps_its_small_terms(monkeypatch):
    """Each of 1,024 chunks adds 2/3 to one row: in bf16 the running sum would stand still at 256."""
    monkeypatch.setattr(logprobs, "CHUNK", 1)
    x, weight = torch.ones(1024, 1, dtype=torch.bfloat16), torch.zeros(3, 1, dtype=torch.bfloat16, requires_grad=True)
    label_logprobs_torch(x, weight, torch.zeros(1024, dtype=torch.long)).sum().backward()
    torch.testing.assert_close(weight.grad.float(), 1024 / 3 * torch.tensor([[2.0], [-1.0], [-1.0]]), rtol=0.01, atol=0)


# ------------------------------------------------------------ the switch

CALLS = {
    "linear": lambda x: kernels.linear(x, x),
    "rmsnorm": lambda x: kernels.rmsnorm(x, x[0], EPS),
    "add_rmsnorm": lambda x: kernels.add_rmsnorm(x, x, x[0], EPS),
    "rotary": lambda x: kernels.rotary(x[None, None], x[None, None], x[None, :, :2], x[None, :, :2]),
    "attention": lambda x: kernels.attention(x[None, None], x[None, None], x[None, None]),
    "swiglu": lambda x: kernels.swiglu(x, x),
    "label_logprobs": lambda x: kernels.label_logprobs(x, x, torch.arange(3)),
}


@pytest.fixture(autouse=True)
def _switch_is_put_back():
    yield
    kernels.select("auto")


def test_every_operation_is_switched():
    assert set(CALLS) == set(kernels._FORMS)
    assert all("reference" in forms for forms in kernels._FORMS.values())


def test_select_returns_the_choice_before():
    assert kernels.select("reference") == "auto"
    assert kernels.select("torch") == "reference"
    assert kernels.select() == "torch"
    assert kernels.select("auto") == "auto"


@pytest.mark.parametrize("choice", ["cuda", "", "Torch", None])
def test_select_refuses_what_there_is_not(choice):
    kernels.select("reference")
    with pytest.raises(ValueError, match=r"is not one of auto, triton, torch, reference"):
        kernels.select(choice)
    assert kernels.select("auto") == "reference"  # and nothing has changed


@pytest.mark.parametrize("name", CALLS)
def test_each_choice_takes_the_form_of_that_name(monkeypatch, name):
    forms = {kind: lambda *_, kind=kind: kind for kind in ("triton", "torch", "reference")}
    monkeypatch.setattr(launch, "why_not", lambda x: None)  # as on a GPU
    x = torch.zeros(3, 4)

    def taken(choice: str, *kinds: str) -> str:
        monkeypatch.setitem(kernels._FORMS, name, {kind: forms[kind] for kind in kinds})
        kernels.select(choice)
        return CALLS[name](x)

    assert taken("triton", "triton", "torch", "reference") == "triton"
    assert taken("torch", "triton", "torch", "reference") == "torch"
    assert taken("reference", "triton", "torch", "reference") == "reference"
    assert taken("auto", "triton", "torch", "reference") == "torch"  # x is on the CPU
    assert taken("triton", "torch", "reference") == "torch"
    assert taken("triton", "reference") == taken("torch", "reference") == taken("auto", "reference") == "reference"


def test_triton_leaves_fp64_to_torch_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr(kernels.launch, "why_not", lambda _: None)  # as on a GPU
    before = kernels.select("triton")
    try:
        assert [kernels.kind(torch.zeros(1, dtype=dtype)) for dtype in (*HALVES, torch.float32)] == ["triton"] * 3
        assert kernels.kind(torch.zeros(1, dtype=torch.float64)) == "torch"
    finally:
        kernels.select(before)
    told = "kernels: triton's take 16 and 32 bits, not torch.float64; torch's own operators run instead of triton's\n"
    assert capsys.readouterr().err == told


def test_auto_takes_triton_on_a_gpu(monkeypatch):
    forms = {kind: lambda *_, kind=kind: kind for kind in ("triton", "torch", "reference")}
    monkeypatch.setitem(kernels._FORMS, "swiglu", forms)
    monkeypatch.setattr(launch, "why_not", lambda x: None)
    on_gpu = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
    assert kernels.swiglu(on_gpu, on_gpu) == "triton"


def test_a_fallback_says_in_one_line_what_was_lost(monkeypatch, capsys):
    lines = lambda: capsys.readouterr().err.splitlines()
    monkeypatch.setattr(kernels, "_FORMS", {name: {"torch": 1, "reference": 2} for name in ("rmsnorm", "swiglu")})
    kernels._say_once.cache_clear()
    for choice in ("torch", "reference", "auto"):
        kernels.select(choice)
    assert lines() == []
    kernels.select("triton")
    (line,) = lines()
    assert "no triton form of rmsnorm, swiglu" in line
    assert "torch" in line.split(";")[1]
    kernels.select("triton")
    assert lines() == []  # said once


@pytest.mark.skipif(launch.interpreted(), reason="the interpreter takes CPU tensors")
def test_triton_on_the_cpu_falls_back_and_says_so(capsys):
    kernels.select("triton")
    capsys.readouterr()
    kernels._say_once.cache_clear()
    x = randn(3, 4, seed=1, dtype=torch.float32)
    for _ in range(3):
        assert torch.equal(kernels.rmsnorm(x, x[0], EPS), rmsnorm_torch(x, x[0], EPS))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("kernels: ")
    assert "torch's own operators run instead" in line


def test_without_triton_everything_imports_and_the_fallback_says_so():
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib, pkgutil, torch, kernels\n"
        "for module in pkgutil.iter_modules(kernels.__path__, 'kernels.'): importlib.import_module(module.name)\n"
        "kernels.select('triton')\n"
        "x, w = torch.randn(3, 8), torch.randn(8)\n"
        "assert torch.equal(kernels.rmsnorm(x, w, 1e-5), kernels.rmsnorm_torch(x, w, 1e-5))\n"
        "kernels.rmsnorm(x, w, 1e-5)\n"
    )
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "kernels: triton is not installed; torch's own operators run instead of triton's\n"
