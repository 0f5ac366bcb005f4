"""The rotary kernel in Triton's interpreter: both outputs and both gradients against the formula in fp64."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.rotary import rotary_reference, rotary_triton
from tests.oracle import hold, randn

module = importlib.import_module("kernels.rotary")  # `kernels.rotary` is the function of that name
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setattr(module, "TILE", 8)  # pairs: so that the heads of a token take several


def heads(B: int, T: int, H: int, E: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    """(B, H, T, E), as a view of what a projection wrote: (B, T, H * E)."""
    return randn(B, T, H * E, dtype=dtype, seed=seed).unflatten(-1, (H, E)).transpose(1, 2)


def angles(B: int, T: int, E: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = 30 * randn(B, T, E // 2, seed=5)
    return angle.cos(), angle.sin()


def check(q, k, cos, sin):
    hold(lambda q, k: rotary_triton(q, k, cos, sin), lambda q, k: rotary_reference(q, k, cos, sin), [q, k])


@dtypes
@pytest.mark.parametrize("batch", [1, 3], ids=["angles for all", "angles for each"])
@pytest.mark.parametrize(("H", "K", "T", "E"), [(1, 1, 1, 2), (3, 1, 5, 6), (8, 2, 3, 4), (4, 4, 2, 16), (5, 1, 2, 20)])
def test_outputs_and_gradients(H, K, T, E, batch, dtype):
    q, k = heads(3, T, H, E, dtype, seed=1), heads(3, T, K, E, dtype, seed=2)
    check(q, k, *angles(batch, T, E))
    check(q.contiguous(), k, *angles(batch, T, E))


@dtypes
def test_the_real_tile(dtype, monkeypatch):
    monkeypatch.undo()
    check(heads(1, 3, 40, 128, dtype, seed=1), heads(1, 3, 8, 128, dtype, seed=2), *angles(1, 3, 128))


@dtypes
def test_heads_apart_in_memory(dtype):
    fused = randn(2, 3, 8 * 6, seed=1, dtype=dtype).unflatten(-1, (8, 6)).transpose(1, 2)  # one projection for q, k, v
    check(fused[:, :4], fused[:, 4:6], *angles(1, 3, 6))
    wide = randn(2, 4, 3, 10, seed=2, dtype=dtype)
    check(wide[..., 1:7], wide[:, :2, :, 4:], *angles(2, 3, 6))
    cos, sin = angles(2, 6, 6)
    check(wide[..., 1:7], wide[:, :2, :, 4:], cos[:, ::2], sin[:, ::2])
    check(wide[..., 1:7], wide[:, :2, :, 4:], cos[:1, :3].expand(2, 3, 3), sin[:, 3:])


def test_the_layout_stays():
    """What comes as a view of (B, T, H * E) leaves as one, forward and backward: to undo it copies nothing."""
    q, k = heads(2, 5, 4, 6, seed=1).requires_grad_(), heads(2, 5, 2, 6, seed=2).requires_grad_()
    cos, sin = angles(1, 5, 6)
    turned = rotary_triton(q, k, cos, sin)
    for x, y in zip((q, k), turned, strict=True):
        assert x.stride() == y.stride()
        assert y.transpose(1, 2).flatten(2).data_ptr() == y.data_ptr()
    cotangents = [torch.ones_like(y) for y in turned]
    for x, dx in zip((q, k), torch.autograd.grad(turned, (q, k), cotangents), strict=True):
        assert x.stride() == dx.stride()
    whole = rotary_triton(q.detach().contiguous(), k, cos, sin)[0]
    assert whole.is_contiguous()


def test_back_is_the_inverse():
    q, k = heads(2, 5, 4, 6, seed=1), heads(2, 5, 2, 6, seed=2)
    cos, sin = angles(2, 5, 6)
    back = torch.ops.solar.rotary_backward(*rotary_triton(q, k, cos, sin), cos, sin)
    torch.testing.assert_close(back, (q, k))


def test_one_gradient_alone_and_as_sum_hands_it_over():
    q, k = heads(2, 3, 4, 6, seed=1).requires_grad_(), heads(2, 3, 2, 6, seed=2)
    cos, sin = angles(1, 3, 6)
    (found,) = torch.autograd.grad(rotary_triton(q, k, cos, sin)[0].sum(), q)
    (expected,) = torch.autograd.grad(rotary_reference(q, k, cos, sin)[0].sum(), q)
    torch.testing.assert_close(found, expected)


def test_no_tokens():
    q, k = rotary_triton(heads(2, 0, 4, 6), heads(2, 0, 2, 6), *angles(1, 0, 6))
    assert q.shape == (2, 4, 0, 6)
    assert k.shape == (2, 2, 0, 6)


@settings(max_examples=10)
@given(st.data())
def test_drawn(data):
    draw = lambda low, high: data.draw(st.integers(low, high))
    B, T, H, K, E = draw(1, 3), draw(1, 4), draw(1, 7), draw(1, 4), 2 * draw(1, 11)
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16]))
    q, k = heads(B, T, H, E, dtype, seed=1), heads(B, T, K, E, dtype, seed=2)
    check(q, k, *angles(data.draw(st.sampled_from([1, B])), T, E))


def test_the_reference_is_differentiable():
    q, k = (heads(2, 3, H, 4, torch.float64, seed=H).requires_grad_() for H in (2, 1))
    cos, sin = (x.double() for x in angles(1, 3, 4))
    assert torch.autograd.gradcheck(lambda q, k: rotary_reference(q, k, cos, sin), (q, k))


def test_operators(empty_is_anything):
    q, k, table = heads(2, 1, 2, 6, seed=1), heads(2, 1, 1, 6, seed=2), angles(1, 1, 6)
    leaves = [x.clone().requires_grad_() for x in (q, k)]
    torch.library.opcheck(torch.ops.solar.rotary.default, (*leaves, *table))
    torch.library.opcheck(torch.ops.solar.rotary_backward.default, (q, k, *table))
    wide = randn(2, 4, 1, 8, seed=2)
    gradients = wide[..., 1:7], wide[:, :1, :, :6]
    torch.library.opcheck(
        torch.ops.solar.rotary_backward.default, (*gradients, *table), test_utils=("test_schema", "test_faketensor")
    )


def test_compiled_whole(empty_is_anything):
    cos, sin = angles(1, 3, 6)

    def scores(q, k):
        q, k = (x.unflatten(-1, (-1, 6)).transpose(1, 2) for x in (q, k))
        q, k = rotary_triton(q, k, cos, sin)
        return (q @ k.transpose(-1, -2)).square().sum()

    inputs = [randn(2, 3, 12, seed=n).requires_grad_() for n in (1, 2)]
    expected = torch.autograd.grad(scores(*inputs), inputs)
    compiled = torch.compile(scores, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(*inputs), inputs), expected)


Q, K, COS = torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 3, 8), torch.zeros(1, 3, 4)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((Q[0], K, COS, COS), r"q \(4, 3, 8\) and k \(2, 2, 3, 8\)"),
        ((Q, K[:1], COS, COS), r"k \(1, 2, 3, 8\)"),
        ((Q, K[:, :, :2], COS, COS), r"k \(2, 2, 2, 8\)"),
        ((Q[..., :7], K[..., :7], COS, COS), "an even E"),
        ((Q, K, COS[:, :2], COS), r"cos \(1, 2, 4\) does not fit q \(2, 4, 3, 8\)"),
        ((Q, K, COS, COS[..., :3]), r"sin \(1, 3, 3\)"),
        ((Q, K, COS, COS.expand(2, 3, 4)), r"sin \(2, 3, 4\)"),
        ((Q, K, COS.expand(3, 3, 4), COS), r"cos \(3, 3, 4\)"),
        ((Q, K, COS.half(), COS), "cos is torch.float16, not float32"),
        ((Q.double(), K.double(), COS, COS), "q is torch.float64"),
        ((Q, K.half(), COS, COS), "k is torch.float16, q is torch.float32"),
        ((Q, K.to("meta"), COS, COS), "k is on meta, q on cpu"),
        ((Q, K, COS, COS.to("meta")), "sin is on meta, q on cpu"),
        ((torch.zeros(2, 4, 8, 3).mT, K, COS, COS), "last dimension of q must be contiguous, its stride is 3"),
        ((Q, torch.zeros(2, 2, 8, 3).mT, COS, COS), "last dimension of k"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses_what_does_not_fit(arguments, says):
    with pytest.raises(ValueError, match=f"^rotary: .*{says}"):
        rotary_triton(*arguments)


def test_refuses_a_device_without_triton(monkeypatch):
    monkeypatch.setattr(module, "why_not", lambda x: "triton is not installed")
    with pytest.raises(ValueError, match="rotary: triton is not installed"):
        rotary_triton(Q, K, COS, COS)
