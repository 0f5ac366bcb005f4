"""The kernels on a real GPU in bf16 and fp16: at most twice as far from the fp64 truth as the reference in that dtype.

The interpreter cannot show this: its bf16 arithmetic is wrong, and nothing of the compiler has run. `make test-gpu`.
"""

from dataclasses import replace

import pytest
import torch

import kernels
from kernels.attention import attention_reference
from kernels.logprobs import label_logprobs_reference
from kernels.rmsnorm import add_rmsnorm_reference, rmsnorm_reference
from kernels.rotary import rotary_reference
from kernels.swiglu import swiglu_reference
from solar.config import TINY
from solar.model import KVCache, Transformer
from solar.sampling import generate
from tests.oracle import attention_rounded, hold, outputs_and_gradients

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here; `make test-gpu` where there is one")
DEVICE = "cuda"
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


@pytest.fixture(autouse=True)
def triton_form():
    before = kernels.select("triton")
    torch.manual_seed(0)
    yield
    kernels.select(before)


def random(*shape, dtype):
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


@dtypes
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (7, 97), (513, 4096), (3, 16384), (5, 20000), (131072, 128)])
def test_rmsnorm(rows, width, dtype):
    x, residual, w = random(rows, width, dtype=dtype), random(rows, width, dtype=dtype), random(width, dtype=dtype)
    hold(lambda x, w: kernels.rmsnorm(x, w, 1e-5), lambda x, w: rmsnorm_reference(x, w, 1e-5), [x, w])
    hold(
        lambda x, r, w: kernels.add_rmsnorm(x, r, w, 1e-5),
        lambda x, r, w: add_rmsnorm_reference(x, r, w, 1e-5),
        [x, residual, w],
    )


@dtypes
@pytest.mark.parametrize(("T", "H", "K", "E"), [(1, 1, 1, 16), (129, 8, 2, 64), (1000, 32, 8, 128)])
def test_rotary(T, H, K, E, dtype):
    q, k = (random(2, T, heads, E, dtype=dtype).transpose(1, 2) for heads in (H, K))
    angles = torch.rand(1, T, E // 2, device=DEVICE) * 100
    for_form = lambda form: lambda q, k: form(q, k, angles.cos(), angles.sin())
    hold(for_form(kernels.rotary), for_form(rotary_reference), [q, k])


@dtypes
@pytest.mark.parametrize("shape", [(1, 1), (33, 97), (2, 300, 14336)])
def test_swiglu(shape, dtype):
    hold(kernels.swiglu, swiglu_reference, [random(*shape, dtype=dtype), random(*shape, dtype=dtype)])


SHAPES = [  # B, H, K, T, S, E, window, documents
    (1, 4, 4, 1, 1, 64, None, False),
    (2, 8, 2, 257, 257, 128, None, False),
    (1, 8, 1, 128, 640, 64, None, False),
    (1, 4, 2, 500, 500, 128, 100, False),
    (1, 4, 2, 700, 700, 64, 3, False),
    (2, 4, 4, 384, 384, 128, None, True),
    (2, 8, 2, 511, 511, 64, 130, True),
    (1, 2, 2, 200, 200, 80, None, False),
    (1, 2, 1, 200, 230, 100, None, False),  # rows of 200 bytes
    (1, 2, 1, 130, 130, 256, None, False),
]


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention(shape, dtype):
    B, H, K, T, S, E, window, documents = shape
    q, k, v = (random(B, n, h, E, dtype=dtype).transpose(1, 2) for n, h in ((T, H), (S, K), (S, K)))
    ids = (torch.arange(S, device=DEVICE) // 97).expand(B, S).contiguous() if documents else None
    for_form = lambda form: lambda q, k, v: form(q, k, v, window, ids, ids)
    ours, truth, rounded = (for_form(form) for form in (kernels.attention, attention_reference, attention_rounded))
    # Where few keys are seen dS is a small difference, and tensor cores add with a little less than fp32 has.
    hold(ours, truth, [q, k, v], rounded, cancels=1e-5)


@dtypes
@pytest.mark.parametrize(
    ("B", "H", "K", "T", "S", "window"),
    [(1, 32, 8, 1, 8192, None), (16, 32, 8, 1, 5000, None), (2, 8, 2, 5, 3000, 700)],
)
@pytest.mark.parametrize("E", [64, 128])
def test_decode(B, H, K, T, S, window, E, dtype):
    q, k, v = random(B, H, T, E, dtype=dtype), random(B, K, S, E, dtype=dtype), random(B, K, S, E, dtype=dtype)
    for_form = lambda form: lambda q, k, v: form(q, k, v, window)
    hold(for_form(kernels.attention), for_form(attention_reference), [q, k, v], gradients=False)


@dtypes
@pytest.mark.parametrize(("N", "D", "V"), [(1, 64, 97), (1025, 256, 32000), (9000, 256, 32002)])
def test_label_logprobs(N, D, V, dtype):
    x, w = random(N, D, dtype=dtype), random(V, D, dtype=dtype) * D**-0.5
    labels = torch.randint(0, V, (N,), device=DEVICE)
    labels[:: max(N // 7, 2)] = -100
    for_form = lambda form: lambda x, w: form(x, w, labels)
    hold(for_form(kernels.label_logprobs), for_form(label_logprobs_reference), [x, w])


def test_the_same_call_gives_the_same_bits():
    bf16 = torch.bfloat16
    labels = torch.randint(0, 32000, (5000,), device=DEVICE)
    for form, inputs in (
        (kernels.attention, [random(2, 300, h, 128, dtype=bf16).transpose(1, 2) for h in (8, 2, 2)]),
        (lambda x, w: kernels.rmsnorm(x, w, 1e-5), [random(3000, 4096, dtype=bf16), random(4096, dtype=bf16)]),
        (lambda x, w: kernels.label_logprobs(x, w, labels), [random(n, 256, dtype=bf16) for n in (5000, 32000)]),
    ):
        first, *others = (outputs_and_gradients(form, inputs, [form(*inputs)]) for _ in range(3))
        assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def build(dtype):
    model = Transformer(TINY)
    model.init_weights(0)
    return model.to(DEVICE, dtype)


def test_a_decoder_layer_compiles_whole_and_not_again_for_another_length():
    model = build(torch.bfloat16)
    torch._dynamo.reset()
    layer = torch.compile(model.model.layers[0], fullgraph=True, dynamic=True)
    compiled = torch._dynamo.utils.counters["stats"]
    seen = []
    for T in (64, 65, 96, 128):
        x = random(1, T, TINY.hidden_size, dtype=torch.bfloat16)
        angles = torch.rand(1, T, TINY.head_dim // 2, device=DEVICE)
        args = (x, angles.cos(), angles.sin(), (None, None))
        y, expected = layer(*args), model.model.layers[0](*args)
        assert (y - expected).norm() <= 0.02 * expected.norm()
        seen.append(compiled["unique_graphs"])
    assert seen[-1] == seen[1]


@pytest.mark.parametrize("sliding", [None, 64])
def test_the_model_with_cache_equals_the_full_pass(sliding):
    config = replace(TINY, sliding_window=sliding, num_hidden_layers=3)
    model = Transformer(config)
    model.init_weights(0)
    model.to(DEVICE)
    ids = torch.randint(0, config.vocab_size, (2, 200), device=DEVICE)
    with torch.inference_mode():
        full = model(ids)
        cache, parts, at = KVCache(config, 2, 200, torch.float32, DEVICE), [], 0
        for n in (100, 1, 1, 50, 48):
            parts.append(model(ids[:, at : at + n], cache=cache))
            at += n
    torch.testing.assert_close(torch.cat(parts, 1), full, atol=2e-4, rtol=1e-3)


def test_uneven_prompts_generate_what_each_would_alone():
    model = build(torch.float32)
    prompts = [list(range(5, 5 + n)) for n in (3, 40, 17)]
    together = generate(model, prompts, 20)
    assert together == [generate(model, [prompt], 20)[0] for prompt in prompts]
