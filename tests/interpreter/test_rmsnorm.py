"""The RMSNorm kernels in Triton's interpreter: outputs and every gradient against the formula in fp64."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.launch import Config
from kernels.rmsnorm import add_rmsnorm_reference, add_rmsnorm_triton, rmsnorm_reference, rmsnorm_triton
from tests.oracle import hold, randn

module = importlib.import_module("kernels.rmsnorm")  # `kernels.rmsnorm` is the function of that name
EPS = 1e-5

# Narrow rows share a tile of 16, rows of 17 to 32 have one of their own, and wider ones are cut. Both tiles of the
# backward pass: one that loads a row once, one that loads it again.
SMALL = {
    "forward": {16: Config({}, 1), 32: Config({}, 1)},
    "backward": {16: Config({"STAGES": 2, "RELOAD": 0}, 1), 32: Config({"STAGES": 2, "RELOAD": 1}, 1)},
}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setitem(module.CONFIGS, "sm_80", SMALL)
    monkeypatch.setattr(module, "ROW_SUMS", Config({"BLOCK_D": 16}, 1))
    monkeypatch.setattr(module, "SUM", Config({"ROWS": 2, "BLOCK_D": 16}, 1))


def check(inputs):
    """Alone and fused. A row of one element has a gradient of eps alone: two terms, a thousand times larger, cancel."""
    x, residual, weight = inputs
    cancels = 1e-5 if x.shape[-1] == 1 else 0.0
    with_eps = lambda form: lambda *tensors: form(*tensors, EPS)
    hold(with_eps(rmsnorm_triton), with_eps(rmsnorm_reference), [x, weight], cancels=cancels)
    hold(with_eps(add_rmsnorm_triton), with_eps(add_rmsnorm_reference), [x, residual, weight], cancels=cancels)


dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])


@dtypes
@pytest.mark.parametrize(
    ("N", "D"), [(1, 1), (37, 1), (11, 2), (23, 7), (1, 16), (5, 16), (1, 19), (4, 32), (1, 33), (5, 33), (2, 67)]
)
def test_outputs_and_gradients(N, D, dtype):
    check([randn(N, D, seed=1, dtype=dtype), randn(N, D, seed=2, dtype=dtype), randn(D, seed=3, dtype=dtype)])


@dtypes
@pytest.mark.parametrize("shape", [(3, 257), (1, 8209), (70, 64)], ids=str)
def test_the_real_tiles(shape, dtype, monkeypatch):
    monkeypatch.undo()
    D = shape[1]
    check([randn(*shape, seed=1, dtype=dtype), randn(*shape, seed=2, dtype=dtype), randn(D, seed=3, dtype=dtype)])


def test_every_row_takes_the_tile_that_the_table_has_for_it(monkeypatch):
    monkeypatch.undo()
    shape = lambda *of, **more: tuple(module._tiled(*of, **more).constants[name] for name in ("ROWS", "BLOCK_D"))
    assert shape("forward", "sm_90", 1) == (4096, 1)
    assert shape("forward", "sm_90", 100) == (32, 128)
    assert shape("forward", "sm_90", 5120) == (1, 8192)
    assert shape("forward", "sm_90", 16384) == shape("backward", "sm_90", 16384) == (1, 16384)  # read once
    assert shape("forward", "sm_90", 16385) == (1, 4096)  # cut
    assert shape("backward", "sm_80", 8192) == (1, 8192)
    assert shape("backward", "sm_80", 8193) == (1, 4096)
    assert shape("backward", "sm_80", 4096, itemsize=4) == (1, 4096)
    assert shape("backward", "sm_80", 4097, itemsize=4) == (1, 4096)  # cut: 32 bits take twice the shared memory


@dtypes
@pytest.mark.parametrize("D", [13, 40])
def test_rows_apart_in_memory(D, dtype):
    wide, weight = randn(4, D + 5, seed=1, dtype=dtype), randn(D, seed=3, dtype=dtype)
    some, more = wide[:, 2 : D + 2], randn(8, D, seed=2, dtype=dtype)[::2]
    assert some.stride(0) != D != more.stride(0)
    check([some, more, weight])
    last = randn(3, 2, D, seed=4, dtype=dtype)[:, -1:]  # what `last_only` of the model hands over
    check([last, last, weight])
    crossed = randn(2, 3, D, seed=5, dtype=dtype).transpose(0, 1)  # no one stride steps through its rows
    check([crossed, crossed.contiguous(), weight])


def test_gradients_as_sum_hands_them_over():
    """Of stride 0, in every dimension."""
    for D in (13, 40):
        x, weight = randn(5, D, seed=1).requires_grad_(), randn(D, seed=2).requires_grad_()
        found = torch.autograd.grad(rmsnorm_triton(x, weight, EPS).sum(), (x, weight))
        expected = torch.autograd.grad(rmsnorm_reference(x, weight, EPS).sum(), (x, weight))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("D", [13, 40])
def test_dtypes_may_differ(D):
    half, full = torch.float16, torch.float32
    for x, residual, weight in ((half, half, full), (half, full, half), (full, half, half)):
        check([randn(3, D, seed=1, dtype=x), randn(3, D, seed=2, dtype=residual), randn(D, seed=3, dtype=weight)])


@pytest.mark.parametrize("D", [16, 40])
def test_the_norm_is_that_of_the_rounded_sum_and_rounds_once_in_the_middle(D):
    x, residual, weight = (randn(*shape, seed=n, dtype=torch.float16) for n, shape in enumerate([(9, D), (9, D), (D,)]))
    y, total = add_rmsnorm_triton(x, residual, weight, EPS)
    assert torch.equal(total, residual + x)
    assert torch.equal(y, rmsnorm_triton(total, weight, EPS))
    exact = total.double()
    exact *= (exact.square().mean(-1, keepdim=True) + EPS).rsqrt()
    at_the_end = (weight.double() * exact).half()
    # Both sides of a tie in fp32 are allowed; the other order of rounding would differ in a quarter of all elements.
    assert (y == weight * exact.half()).float().mean() > 0.98 > (y == at_the_end).float().mean()


def test_large_and_small_values():
    weight = randn(13, seed=3, dtype=torch.float16)
    for scale in (1e-4, 2e4):  # the squares are beyond fp16's ends
        x = randn(5, 13, seed=1).clamp(-3, 3).mul(scale).half()
        check([x, torch.zeros_like(x), weight])
    for scale in (1e-15, 1e15):
        check([*(randn(5, 13, seed=n, scale=scale) for n in (1, 2)), weight.float()])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, for 1 / 0 and 0 * inf
def test_without_eps_the_rows_that_fill_up_a_tile_do_no_harm():
    x, weight = randn(3, 5, seed=1).requires_grad_(), randn(5, seed=2).requires_grad_()
    found = torch.autograd.grad(rmsnorm_triton(x, weight, 0.0).sum(), (x, weight))
    expected = torch.autograd.grad(rmsnorm_reference(x, weight, 0.0).sum(), (x, weight))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)], ids=str)
def test_no_rows(shape):
    x, weight = randn(*shape).requires_grad_(), randn(8).requires_grad_()
    y, total = add_rmsnorm_triton(x, x.detach(), weight, EPS)
    (y.sum() + total.sum() + rmsnorm_triton(x, weight, EPS).sum()).backward()
    assert y.shape == total.shape == x.grad.shape == shape
    assert torch.equal(weight.grad, torch.zeros(8))


@pytest.mark.parametrize("programs", [1, 100])
def test_any_number_of_programs(programs, monkeypatch):
    monkeypatch.setattr(module, "_most_programs", lambda *_: programs)
    check([randn(13, 7, seed=1), randn(13, 7, seed=2), randn(7, seed=3)])
    check([randn(3, 40, seed=1), randn(3, 40, seed=2), randn(40, seed=3)])


@settings(max_examples=6)
@given(st.data())
def test_drawn(data):
    draw = lambda low, high: data.draw(st.integers(low, high))
    N, D, apart = draw(1, 5), draw(1, 50), draw(0, 3)
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16]))
    x, residual = (randn(N, D + apart, seed=n, dtype=dtype)[:, apart:] for n in (1, 2))
    check([x, residual, randn(D, seed=3, dtype=dtype)])


def test_the_reference_is_differentiable():
    x, residual, weight = (randn(*shape, dtype=torch.float64).requires_grad_() for shape in ((3, 5), (2, 3, 5), (5,)))
    assert torch.autograd.gradcheck(lambda x, w: rmsnorm_reference(x, w, EPS), (x, weight))
    assert torch.autograd.gradcheck(lambda x, r, w: add_rmsnorm_reference(x, r, w, EPS), (x, residual[0], weight))


def test_operators(empty_is_anything):
    D = 8
    rows = [randn(2, 1, D, seed=n) for n in range(3)]
    leaves, weight = [x.clone().requires_grad_() for x in rows], randn(D).requires_grad_()
    arguments = {
        "rmsnorm": (leaves[0], weight, EPS),
        "rmsnorm_backward": (*rows[:2], weight.detach(), EPS),
        "add_rmsnorm": (*leaves[:2], weight, EPS),
        "add_rmsnorm_backward": (*rows, weight.detach(), EPS),
    }
    for name, given_to_it in arguments.items():
        torch.library.opcheck(getattr(torch.ops.solar, name).default, given_to_it)


def test_compiled_whole(empty_is_anything):
    def layer(x, residual, weight):
        y, total = add_rmsnorm_triton(x, residual, weight, EPS)
        return (y * rmsnorm_triton(total * 2, weight, EPS)).sum()

    inputs = [randn(*shape, seed=n).requires_grad_() for n, shape in enumerate([(2, 3, 16), (2, 3, 16), (16,)])]
    expected = torch.autograd.grad(layer(*inputs), inputs)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(*inputs), inputs), expected)


X, W = torch.zeros(4, 8), torch.zeros(8)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((X, torch.zeros(7)), r"weight \(7,\) does not fit x \(4, 8\)"),
        ((X, torch.zeros(1, 8)), r"weight \(1, 8\)"),
        ((torch.zeros(()), W), r"does not fit x \(\)"),
        ((X, torch.zeros(16)[::2]), "weight must be contiguous, its stride is 2"),
        ((X.double(), W), "x is torch.float64"),
        ((X, W.long()), "weight is torch.int64"),
        ((X.T.contiguous().T, W), "last dimension of x must be contiguous, its stride is 4"),
        ((X, W.to("meta")), "weight is on meta, x on cpu"),
        ((X, X[:3], W), r"residual \(3, 8\) is not of the shape of x \(4, 8\)"),
        ((X, X.int(), W), "residual is torch.int32"),
        ((X, X.to("meta"), W), "residual is on meta, x on cpu"),
        ((X, torch.zeros(8, 4).T, W), "last dimension of residual"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses_what_does_not_fit(arguments, says):
    form, name = (rmsnorm_triton, "rmsnorm") if len(arguments) == 2 else (add_rmsnorm_triton, "add_rmsnorm")
    with pytest.raises(ValueError, match=f"^{name}: .*{says}"):
        form(*arguments, EPS)


def test_refuses_a_device_without_triton(monkeypatch):
    monkeypatch.setattr(module, "why_not", lambda x: "triton is not installed")
    with pytest.raises(ValueError, match="rmsnorm: triton is not installed"):
        rmsnorm_triton(X, W, EPS)
