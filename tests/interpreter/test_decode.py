"""Decode attention in Triton's interpreter, held against attention's reference in fp64."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import decode
from kernels.attention import attention_reference
from kernels.decode import decode_attention_triton, is_decode
from tests.oracle import hold

SMALL = {"BLOCK_N": 16}  # so that short caches have many blocks


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(decode, "_config", lambda name, *_: replace(decode.CONFIGS[name], constants=SMALL))


def check(q, k, v, *masks):
    with_masks = lambda form: lambda q, k, v: form(q, k, v, *masks)
    hold(with_masks(decode_attention_triton), with_masks(attention_reference), [q, k, v], gradients=False)
    return decode_attention_triton(q, k, v, *masks)


def random_qkv(B, H, K, T, S, E, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)
    return make(B, H, T, E), make(B, K, S, E), make(B, K, S, E)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("B", "H", "K", "T", "S", "E", "window"),
    [
        (1, 1, 1, 1, 1, 16, None),  # one key
        (2, 4, 1, 1, 150, 32, None),  # a length that no block divides
        (1, 4, 4, 1, 64, 16, None),  # G = 1, and a length of whole blocks
        (1, 8, 1, 4, 131, 16, None),  # the most rows
        (1, 8, 2, 3, 97, 24, None),  # head_dim that is padded, rows that are padded
        (3, 2, 1, 2, 100, 80, 33),  # a window that begins within a block
        (1, 4, 2, 1, 90, 16, 5),  # window < block
        (1, 4, 2, 5, 50, 16, 1),  # each query sees itself alone
        (1, 2, 2, 3, 40, 16, 1000),  # window > S
        (1, 2, 1, 7, 7, 16, None),  # T = S: a short prompt
        (1, 2, 1, 7, 7, 16, 3),
    ],
)
def test_agrees_with_the_reference(B, H, K, T, S, E, window, dtype):
    check(*random_qkv(B, H, K, T, S, E, dtype), window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("window", [None, 20])
def test_documents(window, dtype):
    """Documents of one token, ones that end on a block's edge, and keys of none of them: a split that is all hidden."""
    q, k, v = random_qkv(3, 4, 2, 2, 112, 16, dtype)
    ids = torch.tensor([[0] * 16 + [1] * 94 + [2] * 2, [0] * 110 + [1, 2], [-1] * 96 + [5] * 16])
    check(q, k, v, window, ids[:, -2:], ids)
    check(q, k, v, window, ids[:, -2:], ids.T.contiguous().T)  # strided


def test_views_of_a_cache():
    """Any strides but in E; what lies behind the keys is not read, nor what the window has left."""
    caches = torch.full((2, 5, 3, 2, 99, 16), float("nan"))  # k and v, layers, B, K, C, E
    q, k, v = random_qkv(3, 6, 2, 2, 70, 16)
    caches[0, 2, :, :, :70], caches[1, 2, :, :, :70] = k, v
    views = caches[0, 2, :, :, :70], caches[1, 2, :, :, :70]
    expected = check(q, k, v)
    assert torch.equal(decode_attention_triton(q, *views), expected)
    heads_last = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(decode_attention_triton(*heads_last), expected)

    expected = check(q, k, v, 20)
    caches[:, 2, :, :, : 70 - 21] = float("nan")
    assert torch.equal(decode_attention_triton(q, *views, 20), expected)


def test_a_rolling_cache_in_any_order():
    q, k, v = random_qkv(1, 4, 2, 1, 48, 16)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    rolled = decode_attention_triton(q, k[:, :, order], v[:, :, order], 48)
    torch.testing.assert_close(rolled, check(q, k, v, 48))


@pytest.mark.parametrize("splits", [1, 2, 3, 17, 40])
def test_any_number_of_splits(splits, monkeypatch):
    """One, several that do not divide the blocks, more than the second kernel takes at a time, more than blocks."""
    S = 16 * 21 - 3
    monkeypatch.setattr(decode, "_split", lambda groups, blocks, slots: -(-blocks // splits))
    q, k, v = random_qkv(1, 4, 2, 1, S, 16)
    v += 100 * torch.arange(S)[:, None]  # a key counted twice or left out would show
    k[:, :, ::50] *= 30  # and a maximum far above the others, here and there
    check(q, k, v)


def test_scores_of_any_size():
    q, k, v = random_qkv(1, 2, 1, 1, 100, 16)
    check(1e4 * q, k, v)
    check(torch.zeros_like(q), k, v)


@given(data=st.data())
@settings(max_examples=12)
def test_drawn_shapes(data):
    draw = lambda low, high: data.draw(st.integers(low, high))
    K, G, T, E = draw(1, 3), draw(1, 8), draw(1, 4), draw(1, 40)
    S = draw(T, 140)
    window = data.draw(st.none() | st.integers(1, 160))
    q, k, v = random_qkv(draw(1, 2), G * K, K, T, S, E, data.draw(st.sampled_from([torch.float32, torch.float16])))
    check(q, k, v, window)


def test_deterministic():
    inputs = random_qkv(2, 4, 2, 1, 150, 16, torch.float16)
    assert torch.equal(decode_attention_triton(*inputs), decode_attention_triton(*inputs))


@pytest.mark.parametrize("groups", [1, 3, 8, 128, 264, 1000])
@pytest.mark.parametrize("blocks", [1, 2, 31, 128, 4096])
def test_splits_fill_the_gpu(groups, blocks):
    """No split is empty, and the slowest round of programs is not far from the least that the work can take."""
    slots = 264
    length = decode._split(groups, blocks, slots)
    splits = -(-blocks // length)
    assert 1 <= length <= blocks
    assert (splits - 1) * length < blocks
    rounds = -(-groups * splits // slots)
    ideal = max(1.0, groups * blocks / slots)
    assert rounds * length <= 1.6 * ideal


def test_is_decode():
    q, k, v = random_qkv(1, 8, 2, 1, 9, 16)
    assert is_decode(q, k, v)
    assert is_decode(q.expand(1, 8, 8, 16), k, v)
    assert not is_decode(q.expand(1, 8, 9, 16), k, v)  # 36 rows
    assert not is_decode(q[:, :, :0], k, v)  # none
    for learns in range(3):
        leaves = [t.detach().requires_grad_(i == learns) for i, t in enumerate((q, k, v))]
        assert not is_decode(*leaves)
        with torch.no_grad():
            assert is_decode(*leaves)


def test_refusals():
    q, k, v = random_qkv(2, 4, 2, 1, 9, 16)
    ids, key_ids = torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, 9, dtype=torch.long)
    for match, arguments in {
        "four dimensions": (q[0], k, v),
        r"\(2, 4, 1, 16\), k \(1, 2, 9, 16\)": (q, k[:1], v[:1]),
        r"v \(2, 2, 8, 16\)": (q, k, v[:, :, :8]),
        "multiple of K": (q[:, :3], k, v),
        "36 rows": (q.repeat(1, 9, 2, 1), k, v),
        "head_dim 272": (q.repeat(1, 1, 1, 17), k.repeat(1, 1, 1, 17), v.repeat(1, 1, 1, 17)),
        "k is torch.float16, q is torch.float32": (q, k.half(), v),
        "q is torch.float64": (q.double(), k.double(), v.double()),
        "window 0": (q, k, v, 0),
        "come together": (q, k, v, None, ids),
        r"document_ids \(2, 9\)": (q, k, v, None, key_ids, key_ids),
        "k is on meta, q on cpu": (q, k.to("meta"), v),
        "last dimension of v must be contiguous, its stride is 9": (q, k, v.mT.contiguous().mT),
    }.items():
        with pytest.raises(ValueError, match=match):
            decode_attention_triton(*arguments)


def test_as_an_operator(empty_is_anything):
    q, k, v = random_qkv(1, 4, 2, 2, 40, 16)
    ids, key_ids = torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 40, dtype=torch.long)
    for arguments in ((q, k, v, None, None, None), (q, k, v, 7, ids, key_ids)):
        torch.library.opcheck(torch.ops.solar.decode_attention.default, arguments)
    compiled = torch.compile(decode_attention_triton, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v, 7), decode_attention_triton(q, k, v, 7))
    with pytest.raises(RuntimeError, match="autograd"):
        decode_attention_triton(q.requires_grad_(), k, v).sum().backward()
