"""What every Triton kernel here shares: Triton or a stand-in for it, configurations, cases to compile, and checks.

A file with kernels says `from kernels.launch import tl, triton` and imports everywhere: where Triton does not exist,
`jit` leaves a function as it is and nothing ever calls it.

A kernel is compiled with one configuration of a small fixed list, chosen by architecture and shape and never by timing,
so a run is repeatable and nothing is compiled again when only a length changes (attention but once, when the keys
become more than the window).
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

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
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


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
    slow: bool = False  # a neighbour of other cases, left to `make test-full`

    def in_fp32(self, config: Config | None = None) -> "CompileCase":
        """The same kernel with fp32 tensors for bf16 ones, and their own configuration if they have one.

        Models on a GPU run in 16 bits: fp32 is usual only where shared memory is least, and slow elsewhere.
        """
        slow = self.slow or self.architecture != "sm_80"
        signature = {name: "*fp32" if kind == "*bf16" else kind for name, kind in self.signature.items()}
        return replace(self, name=f"{self.name} fp32", signature=signature, config=config or self.config, slow=slow)


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


def check_tensors(operation: str, one_dtype: bool = True, **tensors: torch.Tensor) -> None:
    """ValueError, naming the tensor, unless all are of a float dtype of 16 or 32 bits, on one device, with whole rows.

    one_dtype: they must share it. A row is whole when its elements lie side by side, however far apart rows are.
    """
    (first, x), *_ = tensors.items()
    for name, t in tensors.items():
        if t.dtype not in DTYPES:
            raise ValueError(f"{operation}: {name} is {t.dtype}, not float16, bfloat16 or float32")
        if one_dtype and t.dtype != x.dtype:
            raise ValueError(f"{operation}: {name} is {t.dtype}, {first} is {x.dtype}")
        if t.device != x.device:
            raise ValueError(f"{operation}: {name} is on {t.device}, {first} on {x.device}")
        if t.stride(-1) != 1 and t.shape[-1] > 1:
            raise ValueError(
                f"{operation}: the last dimension of {name} must be contiguous, its stride is {t.stride(-1)}"
            )


def has_aligned_rows(x: torch.Tensor) -> bool:
    """Whether every row of x (..., E) lies together and starts at a multiple of 16 bytes, as loads of 16 bytes need."""
    starts = [x.data_ptr(), *(x.stride(at) * x.element_size() for at in range(x.ndim - 1) if x.shape[at] > 1)]
    return x.stride(-1) == 1 and all(start % 16 == 0 for start in starts)
