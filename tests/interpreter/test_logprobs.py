"""Label log-probabilities in Triton's interpreter, forward and gradients, held against the reference in fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import logprobs
from kernels.launch import Config
from kernels.logprobs import IGNORED, label_logprobs_reference, label_logprobs_triton
from tests.oracle import hold, outputs_and_gradients

CHUNK = 8  # tokens: few, so that short inputs have several chunks


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(logprobs, "_chunk_tokens", lambda *_: CHUNK)
    small = Config({"BLOCK_V": 32})
    monkeypatch.setattr(logprobs, "CONFIGS", {key: {"forward": small, "backward": small} for key in logprobs.CONFIGS})


def inputs(N, D, V, dtype=torch.float32, seed=0):
    """x, weight, labels (some ignored) and the gradient that arrives."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, generator=generator).to(dtype)
    weight = torch.randn(V, D, generator=generator).mul(2 * D**-0.5).to(dtype)
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[1::3] = IGNORED
    return x, weight, labels, torch.randn(N, generator=generator)


def run(form, x, weight, labels, dy):
    """y, dx, dW."""
    return outputs_and_gradients(lambda x, w: form(x, w, labels), [x, weight], [dy])


def check(x, weight, labels, dy):
    with_labels = lambda form: lambda x, w: form(x, w, labels)
    hold(with_labels(label_logprobs_triton), with_labels(label_logprobs_reference), [x, weight])
    y, dx, _ = run(label_logprobs_triton, x, weight, labels, dy)
    assert (y[labels == IGNORED] == 0).all()
    assert (dx[labels == IGNORED] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("N", "D", "V"),
    [
        (1, 16, 64),  # one token
        (8, 16, 64),  # one whole chunk
        (29, 24, 97),  # a last chunk that is short; a prime vocabulary
        (17, 7, 31),  # less than a block
        (3, 16, 1),  # nothing to choose from
        (0, 16, 64),  # no token at all
    ],
)
def test_agrees_with_the_reference(N, D, V, dtype):
    check(*inputs(N, D, V, dtype))


@given(data=st.data())
@settings(max_examples=8)
def test_drawn_shapes(data):
    N, D, V = (data.draw(st.integers(1, most)) for most in (30, 40, 150))
    check(*inputs(N, D, V, data.draw(st.sampled_from([torch.float32, torch.float16])), data.draw(st.integers(0, 9))))


def test_chunks_add_up():
    """The same gradients in one chunk and in five; one chunk's dW is not rounded more often than it must be."""
    x, weight, labels, dy = inputs(37, 16, 50, torch.float16)
    check(x, weight, labels, dy)
    logprobs._chunk_tokens = lambda *_: 128  # the fixture undoes it
    check(x, weight, labels, dy)


def test_strided():
    x, weight, labels, dy = inputs(20, 16, 50)
    expected = run(label_logprobs_triton, x, weight, labels, dy)
    strided = [t.T.contiguous().T for t in (x, weight)] + [torch.stack((t, t), 1)[:, 0] for t in (labels, dy)]
    for a, b in zip(expected, run(label_logprobs_triton, *strided), strict=True):
        torch.testing.assert_close(a, b)
    expected = run(label_logprobs_triton, x, weight, labels, torch.ones(20))
    for a, b in zip(expected, run(label_logprobs_triton, x, weight, labels, torch.ones(1).expand(20)), strict=True):
        assert torch.equal(a, b)


def test_logits_far_apart():
    """Logits of +-1000 in every order: a sum that did not follow the maximum would overflow, or vanish."""
    x, weight, labels, dy = inputs(12, 16, 80)
    check(300 * x, weight, labels, dy)
    rising = torch.linspace(-100, 100, 80)[:, None].expand(80, 16).contiguous()
    check(x.abs(), rising, labels, dy)
    check(x.abs(), rising.flip(0), labels, dy)


def test_all_ignored():
    x, weight, labels, dy = inputs(10, 16, 40)
    for found in run(label_logprobs_triton, x, weight, torch.full_like(labels, IGNORED), dy):
        assert (found == 0).all()


@pytest.mark.parametrize("label", [40, -1, 1 << 40])
def test_a_label_outside_the_vocabulary_gives_nan(label):
    x, weight, labels, _ = inputs(3, 16, 40)
    labels[0] = label
    assert label_logprobs_triton(x, weight, labels)[0].isnan()


def test_only_the_gradients_that_are_wanted():
    x, weight, labels, dy = inputs(20, 16, 50)
    _, dx, dw = run(label_logprobs_triton, x, weight, labels, dy)
    for wanted, expected in ((x, dx), (weight, dw)):
        leaves = [t.detach().requires_grad_(t is wanted) for t in (x, weight)]
        label_logprobs_triton(*leaves, labels).backward(dy)
        assert [t.grad is None for t in leaves] == [t is not wanted for t in (x, weight)]
        assert torch.equal(next(t.grad for t in leaves if t.grad is not None), expected)
    assert not label_logprobs_triton(x, weight, labels).requires_grad


def test_deterministic():
    arguments = inputs(20, 16, 50, torch.float16)
    for a, b in zip(run(label_logprobs_triton, *arguments), run(label_logprobs_triton, *arguments), strict=True):
        assert torch.equal(a, b)


def test_gradcheck_of_the_reference():
    x, weight, labels, _ = inputs(7, 5, 11, torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, w: label_logprobs_reference(x, w, labels), (x.requires_grad_(), weight.requires_grad_())
    )


@pytest.mark.parametrize("V", [1, 97, 32000, 128256, 10**6])
@pytest.mark.parametrize("N", [0, 1, 127, 4096, 4097, 8190, 100_001])
def test_chunk_sizes(N, V, monkeypatch):
    monkeypatch.undo()
    size = logprobs._chunk_tokens(N, V, 2)
    assert size % 128 == 0
    assert size == 128 or size * V * 2 <= logprobs.BUFFER_BYTES
    chunks = max(1, -(-N // size))
    most = max(128, logprobs.BUFFER_BYTES // (V * 2) // 128 * 128)
    assert (chunks - 1) * most < max(N, 1)  # no more chunks than there must be


def test_refusals():
    x, weight, labels, _ = inputs(9, 16, 40)
    for match, arguments in {
        r"x \(9, 15\), weight \(40, 16\)": (x[:, :15], weight, labels),
        r"labels \(8,\)": (x, weight, labels[:8]),
        r"x \(1, 9, 16\)": (x[None], weight, labels),
        "weight torch.float16": (x, weight.half(), labels),
        "x torch.float64": (x.double(), weight.double(), labels),
        "labels torch.int32": (x, weight, labels.int()),
        "weight on meta": (x, weight.to("meta"), labels),
    }.items():
        with pytest.raises(ValueError, match=match):
            label_logprobs_triton(*arguments)


def test_as_an_operator(empty_is_anything):
    x, weight, labels, dy = inputs(10, 16, 40)
    leaves = x.requires_grad_(), weight.requires_grad_()
    torch.library.opcheck(torch.ops.solar.label_logprobs.default, (*leaves, labels))
    logits = (x @ weight.T).detach()
    m = logits.amax(1)
    arguments = dy, x.detach(), weight.detach(), labels, m, (logits - m[:, None]).exp().sum(1).log()
    for wanted in ((True, True), (False, True)):
        torch.library.opcheck(torch.ops.solar.label_logprobs_backward.default, (*arguments, *wanted))
    compiled = torch.compile(label_logprobs_triton, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        run(compiled, x, weight, labels, dy), run(label_logprobs_triton, x, weight, labels, dy), strict=True
    ):
        assert torch.equal(a, b)
