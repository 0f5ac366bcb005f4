"""The SwiGLU kernels in Triton's interpreter: the output and both gradients against the formula in fp64."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.launch import Config
from kernels.swiglu import swiglu_reference, swiglu_triton
from tests.oracle import hold, outputs_and_gradients, randn

module = importlib.import_module("kernels.swiglu")  # `kernels.swiglu` is the function of that name
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    small = {"forward": Config({"BLOCK": 32}, 1), "backward": Config({"BLOCK": 16}, 1)}
    monkeypatch.setitem(module.CONFIGS, "sm_80", small)


def check(gate, up):
    hold(swiglu_triton, swiglu_reference, [gate, up])


@dtypes
@pytest.mark.parametrize("shape", [(1,), (1, 1), (3, 5), (1, 31), (2, 16), (7, 19), (2, 3, 32), (5, 97)], ids=str)
def test_output_and_gradients(shape, dtype):
    check(randn(*shape, seed=1, dtype=dtype, scale=3), randn(*shape, seed=2, dtype=dtype))


@dtypes
def test_the_real_blocks(dtype, monkeypatch):
    monkeypatch.undo()
    check(randn(3, 1031, seed=1, dtype=dtype), randn(3, 1031, seed=2, dtype=dtype))


@dtypes
@pytest.mark.parametrize("F", [1, 19, 48])
def test_rows_apart_in_memory(F, dtype):
    gate, up = randn(4, 2 * F, seed=1, dtype=dtype).chunk(2, dim=-1)  # of one projection for both
    check(gate, up)
    check(gate, up.contiguous())
    check(*(randn(3, 2, F, seed=n, dtype=dtype).transpose(0, 1) for n in (1, 2)))  # no one stride for all rows


def test_gradients_as_sum_hands_them_over():
    for F in (5, 40):
        gate, up = (randn(3, F, seed=n).requires_grad_() for n in (1, 2))
        found = torch.autograd.grad(swiglu_triton(gate, up).sum(), (gate, up))
        torch.testing.assert_close(found, torch.autograd.grad(swiglu_reference(gate, up).sum(), (gate, up)))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, for exp(1e4)
def test_at_the_ends():
    gate = torch.tensor([0.0, -0.5, 20.0, -80.0, 80.0, -89.0, -100.0, 100.0, -1e4, 1e4])
    check(gate, torch.full_like(gate, 2.0))
    y, dgate, dup = outputs_and_gradients(swiglu_triton, [gate, torch.ones_like(gate)], [torch.ones_like(gate)])
    assert y.isfinite().all() and dgate.isfinite().all() and dup.isfinite().all()  # noqa: PT018


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)], ids=str)
def test_no_elements(shape):
    y, dgate, dup = outputs_and_gradients(swiglu_triton, [randn(*shape)] * 2, [randn(*shape)])
    assert y.shape == dgate.shape == dup.shape == shape


@settings(max_examples=10)
@given(st.data())
def test_drawn(data):
    draw = lambda low, high: data.draw(st.integers(low, high))
    N, F, apart = draw(1, 5), draw(1, 70), draw(0, 3)
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16]))
    check(*(randn(N, F + apart, seed=n, dtype=dtype, scale=3)[:, apart:] for n in (1, 2)))


def test_the_reference_is_differentiable():
    gate, up = (randn(2, 5, seed=n, dtype=torch.float64).requires_grad_() for n in (1, 2))
    assert torch.autograd.gradcheck(swiglu_reference, (gate, up))


def test_operators(empty_is_anything):
    dy, gate, up = (randn(2, 19, seed=n) for n in range(3))
    torch.library.opcheck(torch.ops.solar.swiglu.default, (gate.clone().requires_grad_(), up.clone().requires_grad_()))
    torch.library.opcheck(torch.ops.solar.swiglu_backward.default, (dy, gate, up))


def test_compiled_whole(empty_is_anything):
    mlp = lambda gate, up: (swiglu_triton(gate * 2, up) ** 2).sum()
    inputs = [randn(3, 19, seed=n).requires_grad_() for n in (1, 2)]
    expected = torch.autograd.grad(mlp(*inputs), inputs)
    compiled = torch.compile(mlp, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(*inputs), inputs), expected)


X = torch.zeros(4, 8)


@pytest.mark.parametrize(
    ("gate", "up", "says"),
    [
        (X, X[:3], r"gate \(4, 8\) and up \(3, 8\)"),
        (X[0, 0], X[0, 0], r"gate \(\)"),
        (X.double(), X.double(), "gate is torch.float64"),
        (X, X.half(), "up is torch.float16, gate is torch.float32"),
        (X, X.to("meta"), "up is on meta, gate on cpu"),
        (torch.zeros(8, 4).T, X, "last dimension of gate must be contiguous, its stride is 4"),
        (X, torch.zeros(8, 4).T, "last dimension of up"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses_what_does_not_fit(gate, up, says):
    with pytest.raises(ValueError, match=f"^swiglu: .*{says}"):
        swiglu_triton(gate, up)


def test_refuses_a_device_without_triton(monkeypatch):
    monkeypatch.setattr(module, "why_not", lambda x: "triton is not installed")
    with pytest.raises(ValueError, match="swiglu: triton is not installed"):
        swiglu_triton(X, X)
