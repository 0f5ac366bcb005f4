"""Every kernel on this machine's GPU, against torch's own in the same run: `python -m kernels.bench`.

Each row gives the median time, the rate, its share of the ceiling that this very run measured (a large copy for kernels
that move bytes, a large bf16 product for those that multiply), and how many times faster it is than each alternative.
The L2 cache is flushed before every call: in a model, something else has always just used it. What is timed is the GPU:
it is given so much to flush that a call has been issued, by Python and autograd, long before its turn comes.

Operations of attention are counted as everyone counts them: 4 B H T S E forward, halved when causal, 2.5 times that
backward. Bytes are those that must move: every input read once, every output written once.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch._dynamo.config
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
from kernels.attention import attention_reference
from kernels.logprobs import label_logprobs_reference
from kernels.rmsnorm import add_rmsnorm_reference, add_rmsnorm_torch, rmsnorm_reference
from kernels.rotary import rotary_reference
from kernels.swiglu import swiglu_reference

EPS = 1e-5
HEAD = f"{'kernel':<24} {'shape':<34} {'ms':>8} {'rate':>14} {'ceiling':>8}  faster than"


@dataclass(frozen=True)
class Ceiling:
    """What the machine reached in this run: bytes and floating-point operations a second."""

    bytes_per_second: float
    flops_per_second: float


class Clock:
    """Median milliseconds of a call, the cache flushed before each."""

    def __init__(self, device: torch.device, budget_ms: float = 150.0):
        self.device, self.budget_ms = device, budget_ms
        self.flush = torch.empty(256 << 20 if device.type == "cuda" else 1, dtype=torch.int8, device=device)

    def __call__(self, call: Callable[[], object]) -> float:
        for _ in range(3):  # compile, and warm up
            call()
        first = self._once(call)
        runs = max(5, min(100, int(self.budget_ms / max(first, 1e-3))))
        return statistics.median(self._once(call) for _ in range(runs))

    def _once(self, call: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            call()
            return 1000 * (time.perf_counter() - start)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(16):  # 4 GB: about a millisecond
            self.flush.zero_()
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)


@dataclass(frozen=True)
class Case:
    """One thing to measure: ours, the alternatives, and what it costs in bytes or operations."""

    name: str
    shape: str
    ours: Callable[[], object]
    others: dict[str, Callable[[], object]]
    bytes: float = 0.0
    flops: float = 0.0

    def row(self, clock: Clock, ceiling: Ceiling) -> str:
        ms = clock(self.ours)
        work, unit, best = (
            (self.flops / 1e12, "TFLOP/s", ceiling.flops_per_second / 1e12)
            if self.flops
            else (self.bytes / 1e9, "GB/s", ceiling.bytes_per_second / 1e9)
        )
        rate = work / (ms / 1000)
        ratios = []
        for other, call in self.others.items():
            try:
                ratios.append(f"{other} {clock(call) / ms:.2f}x")
            except (RuntimeError, ValueError) as error:  # a backend that does not take this shape, or lacks the memory
                ratios.append(f"{other} -: {str(error).splitlines()[0][:40]}")
        measured = f"{ms:>8.3f} {rate:>8.0f} {unit:<7}{rate / best:>7.0%}"
        return f"{self.name:<24} {self.shape:<34} {measured}  {', '.join(ratios)}"


def measure_ceiling(clock: Clock, small: bool) -> Ceiling:
    """A copy of 2 GB and a product of two 8192 x 8192 matrices of random bf16 numbers (zeros would draw less power)."""
    n = 1 << 20 if small else 1 << 30
    source, target = (torch.empty(n, dtype=torch.bfloat16, device=clock.device) for _ in range(2))
    copy = 2 * source.nbytes / (clock(lambda: target.copy_(source)) / 1000)
    m = 256 if small else 8192
    a, b = (torch.randn(m, m, device=clock.device, dtype=torch.bfloat16) for _ in range(2))
    return Ceiling(copy, 2 * m**3 / (clock(lambda: a @ b) / 1000))


def forward_backward(
    name: str,
    shape: str,
    inputs: list[Tensor],
    forms: dict[str, Callable],
    bytes: tuple = (0, 0),
    flops: tuple = (0, 0),
) -> list[Case]:
    """Two cases, forward and backward, of an operation in several forms; the first form is ours."""

    def backward(form: Callable) -> Callable[[], object]:
        leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
        outputs = form(*leaves)
        outputs = [y for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if y.requires_grad]
        gradients = [torch.randn_like(y) for y in outputs]
        wanted = [x for x in leaves if x.requires_grad]
        return lambda: torch.autograd.grad(outputs, wanted, gradients, retain_graph=True)

    def lazily(form: Callable) -> Callable[[], object]:
        made: list[Callable] = []  # the graph of an alternative is built when it is measured, not while another is
        return lambda: (made or made.append(backward(form)) or made)[0]()

    ours, *others = forms
    forward = {key: (lambda form=form: form(*inputs)) for key, form in forms.items()}
    return [
        Case(f"{name} forward", shape, forward[ours], {k: forward[k] for k in others}, bytes[0], flops[0]),
        Case(f"{name} backward", shape, lazily(forms[ours]), {k: lazily(forms[k]) for k in others}, bytes[1], flops[1]),
    ]


def elementwise_cases(device: torch.device, small: bool) -> list[Case]:
    """RMSNorm, SwiGLU and rotary embedding, at the sizes of Mistral-7B and one many rows high."""
    random = lambda *shape: torch.randn(*shape, device=device, dtype=torch.bfloat16)
    compiled = (lambda f: f) if small else (lambda f: torch.compile(f, dynamic=False))
    cases = []
    for rows, width in [(64, 32)] if small else [(16384, 4096), (8192, 4096), (2048, 4096), (131072, 128)]:
        x, residual, w = random(rows, width), random(rows, width), random(width)
        size = x.nbytes
        forms = {
            "ours": lambda x, w: kernels.rmsnorm(x, w, EPS),
            "torch": lambda x, w: F.rms_norm(x, (x.shape[-1],), w, EPS),
            "compile": compiled(lambda x, w: rmsnorm_reference(x, w, EPS)),
        }
        cases += forward_backward("rmsnorm", f"{rows} x {width}", [x, w], forms, bytes=(2 * size, 3 * size))
        forms = {
            "ours": lambda x, r, w: kernels.add_rmsnorm(x, r, w, EPS),
            "torch": lambda x, r, w: add_rmsnorm_torch(x, r, w, EPS),
            "compile": compiled(lambda x, r, w: add_rmsnorm_reference(x, r, w, EPS)),
        }
        # backward: the sum and both gradients in, one gradient out (it is that of both addends)
        cases += forward_backward(
            "add_rmsnorm", f"{rows} x {width}", [x, residual, w], forms, bytes=(4 * size, 4 * size)
        )
    rows, width = (64, 32) if small else (8192, 14336)
    gate, up = random(rows, width), random(rows, width)
    forms = {"ours": kernels.swiglu, "torch": lambda g, u: F.silu(g) * u, "compile": compiled(swiglu_reference)}
    size = gate.nbytes
    cases += forward_backward("swiglu", f"{rows} x {width}", [gate, up], forms, bytes=(3 * size, 5 * size))
    T, H, K, E = (16, 4, 2, 16) if small else (8192, 32, 8, 128)
    q, k = random(1, T, H, E).transpose(1, 2), random(1, T, K, E).transpose(1, 2)
    angles = torch.rand(1, T, E // 2, device=device)
    cos, sin = angles.cos(), angles.sin()
    forms = {
        "ours": lambda q, k: kernels.rotary(q, k, cos, sin),
        "torch": lambda q, k: rotary_reference(q, k, cos, sin),
        "compile": compiled(lambda q, k: rotary_reference(q, k, cos, sin)),
    }
    size = 2 * (q.nbytes + k.nbytes)
    cases += forward_backward("rotary", f"T {T}, heads {H}/{K}, dim {E}", [q, k], forms, bytes=(size, size))
    return cases


def sdpa(backend: SDPBackend, expand: bool) -> Callable:
    """torch's attention under one backend; `expand` repeats K and V for a backend that knows no grouped queries."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if expand:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=not expand)

    return attend


def attention_cases(device: torch.device, small: bool) -> list[Case]:
    """Causal, windowed and packed attention, and decoding against a long cache; heads of Mistral-7B."""
    random = lambda *shape: torch.randn(*shape, device=device, dtype=torch.bfloat16)
    backends = {
        "flash": sdpa(SDPBackend.FLASH_ATTENTION, False),
        "cudnn": sdpa(SDPBackend.CUDNN_ATTENTION, False),
        "efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION, True),
    }
    if small:
        backends = {"reference": attention_reference}
    B, H, K, E = (1, 4, 2, 16) if small else (1, 32, 8, 128)
    cases = []
    for T in (32,) if small else (2048, 4096, 8192, 16384):
        qkv = [random(B, T, h, E).transpose(1, 2) for h in (H, K, K)]
        flops = 2 * B * H * T * T * E
        shape = f"causal T {T}, heads {H}/{K}, dim {E}"
        cases += forward_backward(
            "attention", shape, qkv, {"ours": kernels.attention} | backends, flops=(flops, 2.5 * flops)
        )
    T, window, documents = (32, 8, 4) if small else (16384, 4096, 8)
    qkv = [random(B, T, h, E).transpose(1, 2) for h in (H, K, K)]
    seen = window * T - window * (window - 1) // 2  # pairs of query and key inside the window
    flops = 4 * B * H * seen * E
    ours = {"ours": lambda q, k, v: kernels.attention(q, k, v, window)}
    cases += forward_backward("attention", f"window {window}, T {T}", qkv, ours, flops=(flops, 2.5 * flops))
    ids = torch.arange(T, device=device).div(T // documents, rounding_mode="floor").expand(B, T)
    flops = 2 * B * H * T * (T // documents) * E
    ours = {"ours": lambda q, k, v: kernels.attention(q, k, v, None, ids, ids)}
    cases += forward_backward("attention", f"{documents} documents, T {T}", qkv, ours, flops=(flops, 2.5 * flops))

    for batch, S in [(2, 64)] if small else [(1, 8192), (16, 8192), (16, 32768)]:
        q, (k, v) = random(batch, H, 1, E), (random(batch, K, S, E) for _ in range(2))
        others = {name: (lambda f=f, q=q, k=k, v=v: f(q, k, v)) for name, f in backends.items()}
        call = lambda q=q, k=k, v=v: kernels.attention(q, k, v)
        cases.append(Case("attention decode", f"batch {batch}, S {S}, heads {H}/{K}", call, others, 2 * k.nbytes))
    return cases


def logprobs_cases(device: torch.device, small: bool) -> list[Case]:
    """The vocabulary projection with its log-softmax, at Mistral-7B's size."""
    N, D, V = (64, 32, 100) if small else (8192, 4096, 32000)
    x = torch.randn(N, D, device=device, dtype=torch.bfloat16)
    w = torch.randn(V, D, device=device, dtype=torch.bfloat16) * D**-0.5
    labels = torch.randint(0, V, (N,), device=device)
    forms = {
        "ours": lambda x, w: kernels.label_logprobs(x, w, labels),
        "whole": lambda x, w: label_logprobs_reference(x, w, labels),
    }
    flops = 2 * N * D * V
    # backward: the logits again, dx and dW
    return forward_backward("label_logprobs", f"{N} x {D} x {V}", [x, w], forms, flops=(flops, 3 * flops))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="tiny shapes, on the CPU too: only to see that it runs")
    parser.add_argument("--kernels", choices=kernels.CHOICES, default="auto", help="the form that counts as ours")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.small:
        parser.exit(2, "error: no GPU here; --small runs tiny shapes on the CPU\n")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kernels.select(options.kernels)
    torch.manual_seed(0)
    torch._functorch.config.donated_buffer = False  # else a compiled backward pass refuses to run again on its graph
    torch._dynamo.config.recompile_limit = 64  # each lambda below is compiled for many shapes
    clock = Clock(device, budget_ms=5 if options.small else 150)
    ceiling = measure_ceiling(clock, options.small)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    version = kernels.launch.triton.__version__ if kernels.launch.HAVE_TRITON else "absent"
    print(f"{name}, torch {torch.__version__}, triton {version}, {time.strftime('%Y-%m-%d')}")
    print(
        f"ceilings of this run: copy {ceiling.bytes_per_second / 1e9:.0f} GB/s, "
        f"bf16 product {ceiling.flops_per_second / 1e12:.1f} TFLOP/s"
    )
    print(HEAD, flush=True)
    for build in (elementwise_cases, attention_cases, logprobs_cases):
        for case in build(device, options.small):
            print(case.row(clock, ceiling), flush=True)


if __name__ == "__main__":
    main()
