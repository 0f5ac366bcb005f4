"""The SwiGLU kernels in Triton's interpreter: the output and both gradients against the formula in fp64."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.launch import Config
from kernels.swiglu import swiglu_reference, swiglu_triton

module = importlib.import_module("kernels.swiglu")  # `kernels.swiglu` is the function of that name
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    small = {"forward": Config({"BLOCK": 32}, 1), "backward": Config({"BLOCK": 16}, 1)}
    monkeypatch.setitem(module.CONFIGS, "sm_80", small)


@pytest.fixture(autouse=True)
def _empty_is_nan():
    """Memory that no kernel writes stays NaN: torch fills what `torch.empty` returns when asked to be deterministic."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def randn(*shape: int, dtype=torch.float32, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape))
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def output_and_gradients(form, gate, up):
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    y = form(gate, up)
    y.backward(randn(*y.shape, dtype=torch.float16, seed=7).to(y.dtype))
    return y.detach(), gate.grad, up.grad


def hold(gate, up):
    """fp32 to a few units in the last place; 16 bits to twice the error that the reference itself makes."""
    truth = output_and_gradients(swiglu_reference, gate.double(), up.double())
    theirs = output_and_gradients(swiglu_reference, gate, up)
    ours = output_and_gradients(swiglu_triton, gate, up)
    for mine, specified, exact in zip(ours, theirs, truth, strict=True):
        assert mine.dtype == specified.dtype
        assert mine.shape == exact.shape
        error, allowed = ((x.double() - exact).norm() for x in (mine, specified))
        assert error <= 2 * allowed + 1e-6 * exact.norm(), f"{error:.2e}, the reference {allowed:.2e}"


@dtypes
@pytest.mark.parametrize("shape", [(1,), (1, 1), (3, 5), (1, 31), (2, 16), (7, 19), (2, 3, 32), (5, 97)], ids=str)
def test_output_and_gradients(shape, dtype):
    hold(randn(*shape, seed=1, dtype=dtype, scale=3), randn(*shape, seed=2, dtype=dtype))


@dtypes
def test_the_real_blocks(dtype, monkeypatch):
    monkeypatch.undo()
    hold(randn(3, 1031, seed=1, dtype=dtype), randn(3, 1031, seed=2, dtype=dtype))


@dtypes
@pytest.mark.parametrize("F", [1, 19, 48])
def test_rows_apart_in_memory(F, dtype):
    gate, up = randn(4, 2 * F, seed=1, dtype=dtype).chunk(2, dim=-1)  # of one projection for both
    hold(gate, up)
    hold(gate, up.contiguous())
    hold(*(randn(3, 2, F, seed=n, dtype=dtype).transpose(0, 1) for n in (1, 2)))  # no one stride for all rows


def test_gradients_as_sum_hands_them_over():
    for F in (5, 40):
        gate, up = (randn(3, F, seed=n).requires_grad_() for n in (1, 2))
        found = torch.autograd.grad(swiglu_triton(gate, up).sum(), (gate, up))
        torch.testing.assert_close(found, torch.autograd.grad(swiglu_reference(gate, up).sum(), (gate, up)))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, for exp(1e4)
def test_at_the_ends():
    gate = torch.tensor([0.0, -0.5, 20.0, -80.0, 80.0, -89.0, -100.0, 100.0, -1e4, 1e4])
    hold(gate, torch.full_like(gate, 2.0))
    y, dgate, dup = output_and_gradients(swiglu_triton, gate, torch.ones_like(gate))
    assert y.isfinite().all() and dgate.isfinite().all() and dup.isfinite().all()  # noqa: PT018


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)], ids=str)
def test_no_elements(shape):
    y, dgate, dup = output_and_gradients(swiglu_triton, randn(*shape), randn(*shape))
    assert y.shape == dgate.shape == dup.shape == shape


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_drawn(data):
    draw = lambda low, high: data.draw(st.integers(low, high))
    N, F, apart = draw(1, 5), draw(1, 70), draw(0, 3)
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16]))
    hold(*(randn(N, F + apart, seed=n, dtype=dtype, scale=3)[:, apart:] for n in (1, 2)))


def test_the_reference_is_differentiable():
    gate, up = (randn(2, 5, seed=n, dtype=torch.float64).requires_grad_() for n in (1, 2))
    assert torch.autograd.gradcheck(swiglu_reference, (gate, up))


def test_operators():
    torch.use_deterministic_algorithms(False)  # torch's own checks compare memory their own way
    dy, gate, up = (randn(2, 19, seed=n) for n in range(3))
    torch.library.opcheck(torch.ops.solar.swiglu.default, (gate.clone().requires_grad_(), up.clone().requires_grad_()))
    torch.library.opcheck(torch.ops.solar.swiglu_backward.default, (dy, gate, up))


def test_compiled_whole():
    torch.use_deterministic_algorithms(False)
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
