"""The attention kernels, run by Triton's interpreter, against the specification in fp64."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from tests.oracle import attention_rounded, hold, outputs_and_gradients

A = importlib.import_module("kernels.attention")  # the package has a function of this name
KERNELS = importlib.import_module("kernels.attention_triton")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks so small that a few dozen positions have full, diagonal and ragged ones."""
    blocks = {"forward": (32, 16), "queries": (16, 32), "keys": (16, 32)}
    monkeypatch.setattr(KERNELS, "_config", lambda kernel, q, width: KERNELS._tiles(*blocks[kernel], 4, 1))
    monkeypatch.setattr(KERNELS, "PAD", 32)
    monkeypatch.setattr(KERNELS, "SCAN", 64)


def inputs(B, H, K, T, S, E, dtype, seed=0):
    """q, k and v, seen as (B, heads, positions, E) but laid out as projections are: (B, positions, heads, E)."""
    g = torch.Generator().manual_seed(seed)
    make = lambda heads, n: torch.randn(B, n, heads, E, generator=g).to(dtype).transpose(1, 2)
    return make(H, T), make(K, S), make(K, S)


def run(form, q, k, v, dy, *rest):
    """y, dq, dk, dv."""
    return outputs_and_gradients(lambda q, k, v: form(q, k, v, *rest), [q, k, v], [dy])


def check(q, k, v, *rest):
    """A row of one key has dS = 0, the difference of two sums of E terms."""
    ours, truth, rounded = (
        lambda q, k, v, form=form: form(q, k, v, *rest)
        for form in (A.attention_triton, A.attention_reference, attention_rounded)
    )
    hold(ours, truth, [q, k, v], None if q.dtype == torch.float32 else rounded, cancels=2e-6)


def packed(B, lengths, first=5):
    """Document ids of documents of these lengths, another order of ids in each row of the batch."""
    ids = torch.cat([torch.full((n,), first + i) for i, n in enumerate(lengths)])
    return torch.stack([ids if b % 2 == 0 else 100 - ids for b in range(B)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("B", "H", "K", "T", "S", "E", "window"),
    [
        (2, 2, 2, 1, 1, 16, None),  # one token
        (1, 4, 1, 1, 53, 64, None),  # one new token, many keys
        (1, 1, 1, 64, 64, 64, None),  # whole blocks
        (1, 2, 1, 67, 67, 64, None),  # prime
        (1, 8, 1, 17, 17, 16, None),  # groups of 8
        (1, 4, 2, 31, 71, 40, None),  # T != S, padded rows
        (1, 1, 1, 33, 50, 128, None),
        (1, 1, 1, 71, 71, 16, 5),  # window < block
        (1, 1, 1, 97, 97, 16, 40),  # blocks outside the window, and whole ones within
        (1, 1, 1, 29, 90, 16, 33),  # keys that no query sees
        (1, 2, 1, 29, 41, 16, 1000),  # window > S
        (1, 1, 1, 40, 40, 16, 1),  # every query sees itself alone
        (1, 1, 1, 20, 20, 3, 7),  # rows shorter than 16 bytes
    ],
)
def test_agrees_with_the_reference(B, H, K, T, S, E, window, dtype):
    check(*inputs(B, H, K, T, S, E, dtype), window)


@pytest.mark.parametrize(
    ("lengths", "T", "window", "dtype"),
    [
        ((1, 30, 1, 1, 34), 67, None, torch.float32),  # documents of one token
        ((32, 16, 32), 80, None, torch.float16),  # documents that end where blocks do
        ((50, 40), 90, 20, torch.float32),  # whole blocks within a document, with a window
        ((23, 40, 20), 31, None, torch.float16),  # a chunk behind a cache
    ],
    ids=str,
)
def test_documents(lengths, T, window, dtype):
    S = sum(lengths)
    ids = packed(2, lengths)
    check(*inputs(2, 1, 1, T, S, 16, dtype), window, ids[:, S - T :], ids)


def test_nothing_is_read_before_the_first_query():
    """Keys so old that no window reaches them meet no query, neither one before the first: there it is NaN."""
    ids, guard = packed(1, (60, 40)), 64
    before = torch.full((1, 1, guard, 16), float("nan"))
    q, k, v = inputs(1, 1, 1, 20, 100, 16, torch.float32)
    q, dy = (torch.cat((before, t), dim=2)[:, :, guard:] for t in (q, q.cos()))
    expected = run(A.attention_reference, q, k, v, dy, 5, ids[:, 80:], ids)
    found = run(A.attention_triton, q, k, v, dy, 5, ids[:, 80:], ids)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("scan", [16, 128])
def test_ids_are_looked_at_in_many_steps_or_one(scan, monkeypatch):
    monkeypatch.setattr(KERNELS, "_config", lambda kernel, q, width: KERNELS._tiles(16, 16, 4, 1))
    monkeypatch.setattr(KERNELS, "SCAN", scan)
    ids = packed(1, (30, 37))
    check(*inputs(1, 1, 1, 40, 67, 16, torch.float32), None, ids[:, 27:], ids)


def test_document_ids_in_any_order():
    ids = torch.randint(0, 3, (2, 55), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    check(*inputs(2, 2, 1, 40, 55, 16, torch.float32), None, ids[:, 15:], ids)


def test_left_padding():
    ids = torch.zeros(2, 50, dtype=torch.int64)
    ids[0, :17] = -1
    check(*inputs(2, 1, 1, 50, 50, 16, torch.float16), None, ids, ids)


def test_ids_that_are_expanded_or_lie_apart():
    ids = torch.arange(2)[:, None].expand(2, 20)
    check(*inputs(2, 1, 1, 20, 20, 16, torch.float32), None, ids, ids)
    apart = packed(2, (9, 11)).repeat_interleave(2, dim=1)[:, ::2]
    check(*inputs(2, 1, 1, 20, 20, 16, torch.float32), None, apart, apart)


@settings(max_examples=4, derandomize=True)
@given(data=st.data())
def test_any_shape(data):
    draw = lambda low, high: data.draw(st.integers(low, high))
    K, G, S = draw(1, 2), draw(1, 2), draw(1, 60)
    T, E = draw(1, S), data.draw(st.sampled_from([8, 16, 24]))
    window = data.draw(st.none() | st.integers(1, 70))
    ids = None
    if draw(0, 1):
        changes = torch.rand(2, S, generator=torch.Generator().manual_seed(draw(0, 99))) < 0.1
        ids = changes.cumsum(1)
    check(
        *inputs(2, K * G, K, T, S, E, torch.float32, seed=draw(0, 99)),
        window,
        None if ids is None else ids[:, S - T :],
        ids,
    )


def test_rows_that_are_not_aligned():
    """Slices that start anywhere, and rows that lie an odd number of elements apart."""
    wide = torch.randn(3, 1, 2, 30, 27, generator=torch.Generator().manual_seed(0)).half()
    check(*wide[..., 3:19])
    check(*wide[..., :8])


def test_slices_of_a_cache_and_expanded_gradients():
    """Keys from the middle of a longer buffer, queries contiguous, and the gradient of a sum, whose strides are 0."""
    g = torch.Generator().manual_seed(0)
    q, buffer = torch.randn(2, 2, 21, 16, generator=g), torch.randn(2, 2, 1, 64, 16, generator=g)
    k, v = buffer[0, :, :, :45], buffer[1, :, :, :45]
    check(q, k, v)
    dy = torch.ones(()).expand(2, 2, 21, 16)
    for ours, expected in zip(*(run(f, q, k, v, dy) for f in (A.attention_triton, A.attention_reference)), strict=True):
        torch.testing.assert_close(ours, expected)


def test_real_configurations(monkeypatch):
    """The blocks that a GPU gets, for shapes that they are larger than."""
    monkeypatch.undo()
    ids = packed(1, (100, 60))
    check(*inputs(1, 2, 1, 130, 160, 64, torch.float16), 90, ids[:, 30:], ids)
    check(*inputs(1, 2, 1, 130, 160, 64, torch.float32))


def test_gradients_repeat_bit_for_bit_and_outputs_are_views():
    q, k, v = inputs(1, 2, 1, 35, 35, 16, torch.float16)
    first, second = (run(A.attention_triton, q, k, v, q.cos()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert first[0].transpose(1, 2).is_contiguous()


def test_nothing_to_do():
    q, k, v = inputs(2, 2, 1, 0, 20, 16, torch.float32)
    y, dq, dk, dv = run(A.attention_triton, q, k, v, q)
    assert y.shape == dq.shape == q.shape
    assert not dk.any()
    assert not dv.any()


def test_reference_has_the_gradient_of_its_formula():
    q, k, v = (t.requires_grad_() for t in inputs(1, 2, 1, 4, 6, 3, torch.float64))
    ids = packed(1, (3, 3))
    assert torch.autograd.gradcheck(lambda *x: A.attention_reference(*x, 2, ids[:, 2:], ids), (q, k, v))


def test_operators(monkeypatch, empty_is_anything):
    monkeypatch.setattr(KERNELS, "_config", lambda kernel, q, width: KERNELS._tiles(16, 16, 4, 1))
    monkeypatch.setattr(KERNELS, "PAD", 16)
    q, k, v = inputs(1, 1, 1, 3, 5, 16, torch.float32)
    ids = packed(1, (2, 3))
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    opcheck(torch.ops.solar.attention, (*leaves, 4, ids[:, 2:].contiguous(), ids, 0.25))
    y, lse = torch.ops.solar.attention(q, k, v, None, None, None, 0.25)
    opcheck(torch.ops.solar.attention_backward, (q.cos(), q, k, v, y, lse, None, None, None, 0.25))


def test_compiles_as_one_graph(monkeypatch, empty_is_anything):
    monkeypatch.setattr(KERNELS, "_config", lambda kernel, q, width: KERNELS._tiles(16, 16, 4, 1))
    q, k, v = inputs(1, 2, 1, 9, 12, 16, torch.float32)
    compiled = torch.compile(A.attention_triton, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(*(run(form, q, k, v, q.cos(), 5) for form in (compiled, A.attention_triton)), strict=True):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q, k, v[..., :8]), "do not fit"),
        (lambda q, k, v: (q[:, :3], k, v), "do not fit"),
        (lambda q, k, v: (q, k[:, :, :5], v[:, :, :5]), "do not fit"),
        (lambda q, k, v: (q, k.half(), v), "k is torch.float16"),
        (lambda q, k, v: (q.double(), k.double(), v.double()), "torch.float64"),
        (lambda q, k, v: (q, k, v.to("meta")), "v is on meta"),
        (lambda q, k, v: (q, k, v.mT.contiguous().mT), "last dimension of v must be contiguous, its stride is 12"),
        (lambda q, k, v: tuple(t.repeat(1, 1, 1, 20) for t in (q, k, v)), "head_dim 320"),
        (lambda q, k, v: (q, k, v, None, torch.zeros(1, 9, dtype=torch.long)), "come together"),
        (lambda q, k, v: (q, k, v, None, *(torch.zeros(1, 9, dtype=torch.long),) * 2), r"key_document_ids \(1, 9\)"),
        (lambda q, k, v: (q, k, v, None, torch.zeros(1, 9), torch.zeros(1, 12)), "document_ids .* of torch.float32"),
    ],
)
def test_errors(change, message):
    q, k, v = inputs(1, 4, 2, 9, 12, 16, torch.float32)
    with pytest.raises(ValueError, match=message):
        A.attention_triton(*change(q, k, v))
