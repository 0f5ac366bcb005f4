"""What every Triton kernel here shares: Triton or a stand-in for it, configurations, and cases to compile.

A file with kernels says `from kernels.launch import tl, triton` and imports everywhere: where Triton does not exist,
`jit` leaves a function as it is and nothing ever calls it.

A kernel is compiled with one configuration of a small fixed list, chosen by architecture and shape and never by timing,
so a run is repeatable and nothing is compiled again when only a length changes.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

try:
    import triton
    import triton.language as tl
except ImportError:

    class _StandIn:
        """Answers to every attribute with itself, and as a decorator gives back what it decorates."""

        def __getattr__(self, name: str) -> "_StandIn":
            return self

        def __call__(self, *args, **kwargs):
            return args[0] if args and callable(args[0]) else self

    triton = tl = _StandIn()
    HAVE_TRITON = False
else:
    HAVE_TRITON = True

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class Config:
    """One way to compile a kernel: its block sizes and other constants, warps, and depth of the software pipeline."""

    constants: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True)
class CompileCase:
    """Everything that compiling a kernel ahead of time needs, for a GPU that need not be there.

    signature: argument -> Triton type ("*bf16", "i32", "fp32"), without the constants; divisible: arguments (pointers,
    strides) that are multiples of 16, as they are in real calls.
    """

    kernel: Callable
    name: str
    architecture: str
    signature: Mapping[str, str]
    config: Config
    constants: Mapping[str, object] = field(default_factory=dict)  # those that no Config sets: head_dim, flags
    divisible: tuple[str, ...] = ()


@functools.cache
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1 when they were imported)."""
    return HAVE_TRITON and bool(triton.knobs.runtime.interpret)


@functools.cache
def architecture(device: torch.device) -> str:
    """The row of the configuration tables that a device takes.

    Consumer GPUs of every generation (sm_86, sm_89, sm_120) take that of sm_80: they have its tensor cores and, with
    99 KB, the least shared memory, for which its configurations are made.
    """
    if device.type != "cuda":
        return "sm_80"  # the interpreter computes the same with any
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def why_not(x: torch.Tensor) -> str | None:
    """Why a tensor cannot go to a Triton kernel; None if it can."""
    if not HAVE_TRITON:
        return "triton is not installed"
    if not x.is_cuda and not interpreted():
        return f"a tensor is on {x.device}, where triton does not run"
    return None
