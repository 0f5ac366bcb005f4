"""Every kernel in every configuration, compiled for GPUs that are not here: registers, spills, shared memory, products.

A kernel that spills registers to memory, or asks for more shared memory than its GPU has, fails here, not on a user's
machine; so does one whose matrix products do not become the tensor-core instructions of its architecture.
"""

import importlib
import io
import itertools
import pkgutil
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import pytest

import kernels
from kernels import launch

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not launch.HAVE_TRITON, reason="triton compiles on Linux only"
)

# An A100 has 163 KB, but the row of sm_80 also serves the consumer GPUs sm_86, sm_89 and sm_120, which have 99.
SHARED_LIMIT = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}


@dataclass(frozen=True)
class Figures:
    """What a compiled kernel takes of the machine."""

    kernel: str
    architecture: str
    config: str
    registers: int
    spilled: int  # bytes of memory of its own that a thread has, for which nothing but spilled registers is a reason
    lanes: int  # scalar registers that AMD's compiler keeps in lanes of vector registers
    shared: int  # bytes
    instructions: str  # the class of its matrix products: wgmma, mma, mfma, tcgen05, or none
    narrow: tuple[str, ...]  # elementwise operations on 16-bit values

    def row(self) -> str:
        return (
            f"{self.kernel:<52} {self.architecture:<7} {self.config:<60} {self.registers:>5} {self.spilled:>7} "
            f"{self.lanes:>5} {self.shared:>8} {self.instructions}"
        )


# Arithmetic and functions whose operands are bf16 or fp16, in Triton's own IR; conversions and matrix products are not.
NARROW = re.compile(r"(arith\.(add|sub|mul|div|rem|neg|maximum|minimum|maxnum|minnum)f|math\.\w+)\b.*(x|: )b?f16\b")

HEAD = (
    f"{'kernel':<52} {'arch':<7} {'configuration':<60} {'regs':>5} {'spilled':>7} {'lanes':>5} {'shared B':>8} products"
)


def all_cases(slow: bool = False) -> list[tuple[str, int]]:
    """(module, index) of every usual compile case, or every slow one: what can be sent to another process."""
    found = []
    for module in pkgutil.iter_modules(kernels.__path__, "kernels."):
        cases = getattr(importlib.import_module(module.name), "compile_cases", list)()
        found += [(module.name, index) for index, case in enumerate(cases) if case.slow == slow]
    return found


def compile_one(module: str, index: int) -> Figures:
    return figures_of(importlib.import_module(module).compile_cases()[index])


def figures_of(case: launch.CompileCase) -> Figures:
    """Compile one case and read the figures from what comes out."""
    from triton import compile as triton_compile
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    constants = {**case.constants, **case.config.constants}
    assert constants.keys() | case.signature.keys() == set(names), f"{case.name}: arguments that no one sets"
    source = ASTSource(
        case.kernel,
        signature={name: case.signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible},
    )
    amd = case.architecture.startswith("gfx")
    number = case.architecture if amd else int(case.architecture.removeprefix("sm_"))
    target = GPUTarget("hip", number, 64) if amd else GPUTarget("cuda", number, 32)
    options = {"num_warps": case.config.num_warps, "num_stages": case.config.num_stages}
    with knobs.runtime.scope(), knobs.nvidia.scope():
        knobs.runtime.add_stages_inspection_hook, knobs.nvidia.dump_ptxas_log = _keep_the_log, True
        compiled = triton_compile(source, target=target, options=options)
    told = ", ".join(f"{key}={value}" for key, value in {**case.config.constants, **options}.items())
    told = told.replace("num_warps", "warps").replace("num_stages", "stages")
    read = _read_amd if amd else _read_nvidia
    narrow = tuple(line.strip() for line in compiled.asm["ttir"].splitlines() if NARROW.search(line))
    return Figures(case.name, case.architecture, told, *read(compiled, case.architecture), narrow)


def _keep_the_log(backend=None, stages=None, options=None, language=None, capability=None):
    """Triton's hook: the metadata keep what ptxas says, run once and with Triton's own flags, in its cache, too."""
    if stages is None:
        return "ptxas log", "ptxas log"  # part of the key in the cache
    if "cubin" in stages:
        assemble = stages["cubin"]

        def assemble_and_keep(ptx, metadata):
            with redirect_stdout(io.StringIO()) as told:
                cubin = assemble(ptx, metadata)
            metadata["ptxas_log"] = told.getvalue()
            return cubin

        stages["cubin"] = assemble_and_keep


def _read_nvidia(compiled, _: str) -> tuple[int, int, int, int, str]:
    ptx, told = compiled.asm["ptx"], compiled.metadata.ptxas_log
    registers = int(re.search(r"Used (\d+) registers", told).group(1))
    spilled = max(map(int, re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", told)))
    kinds = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")
    product = next((kind.split(".")[0] for kind in kinds if kind in ptx), "-")
    if "C75" in told:  # ptxas: "wgmma serialised": each waits for the one before, at a large part of the speed
        product += " serialised"
    return registers, spilled, 0, compiled.metadata.shared, product


def _read_amd(compiled, _: str) -> tuple[int, int, int, int, str]:
    text = compiled.asm["amdgcn"]
    field = lambda name: int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))
    # Memory is what counts: a thread without a private segment has nowhere to spill to. A scalar register without a
    # place goes into a lane of a vector register and back by one instruction each way, and is only shown in the table.
    spilled, lanes = field("private_segment_fixed_size"), field("sgpr_spill_count")
    assert spilled or not re.search(r"\bscratch_(load|store)", text)
    return field("vgpr_count"), spilled, lanes, compiled.metadata.shared, "mfma" if "v_mfma" in text else "-"


@pytest.fixture(scope="module", params=["usual", pytest.param("slow", marks=pytest.mark.slow)])
def figures(request, print_at_the_end) -> list[Figures]:
    cases = all_cases(request.param == "slow")
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        found = list(pool.map(compile_one, *zip(*cases, strict=True)))
    print_at_the_end += [HEAD, *(figure.row() for figure in found)]
    return found


def test_no_kernel_spills(figures):
    """The configurations are chosen with the Triton of requirements.txt. Others place registers a little differently:
    3.6 spills 8 to 140 bytes in 7 of these kernels, which costs little and is no reason to fail."""
    requirements = (Path(__file__).parent.parent / "requirements.txt").read_text()
    allowed = 0 if f"triton=={version('triton')};" in requirements else 160
    assert not [figure.row() for figure in figures if figure.spilled > allowed]


@pytest.mark.parametrize("architecture", launch.ARCHITECTURES)
def test_a_spill_would_be_seen(architecture):
    """A whole row of 32,768 elements on one warp: far more than its registers hold."""
    cases = importlib.import_module("kernels.rmsnorm").compile_cases()
    case = next(case for case in cases if (case.name, case.architecture) == ("rmsnorm_forward 4096", architecture))
    config = launch.Config({"ROWS": 1, "BLOCK_D": 32768}, num_warps=1)
    assert figures_of(replace(case, config=config, constants={**case.constants, "D": 32768})).spilled


def test_shared_memory_fits(figures):
    assert not [figure.row() for figure in figures if figure.shared > SHARED_LIMIT[figure.architecture]]


def test_elementwise_arithmetic_is_fp32(figures):
    """A 16-bit value is widened as it is loaded, and rounded once as it is stored."""
    assert NARROW.search("%5 = arith.mulf %4, %4 : tensor<64xbf16>")
    assert NARROW.search("%5 = math.exp2 %4 : tensor<64x1xf16, #blocked>")
    assert not NARROW.search("%5 = arith.truncf %4 : tensor<64xf32> to tensor<64xbf16>")
    assert not [(figure.row(), figure.narrow[0]) for figure in figures if figure.narrow]


def test_no_row_is_missing():
    """Each kernel is there for each architecture that the configurations are for, in 16 and in 32 bits; in `make test`
    in 32 bits for sm_80 alone."""
    rows = {False: set(), True: set()}
    for slow in rows:
        for module, index in all_cases(slow):
            case = importlib.import_module(module).compile_cases()[index]
            rows[slow].add((case.name.split(" ")[0], case.architecture, case.name.endswith(" fp32")))
    kernels_named = {kernel for kernel, _, _ in rows[False]}
    every = set(itertools.product(kernels_named, launch.ARCHITECTURES, (False, True)))
    assert rows[False] == {(kernel, arch, fp32) for kernel, arch, fp32 in every if not fp32 or arch == "sm_80"}
    assert rows[False] | rows[True] == every
    assert {module for module, _ in all_cases()} == {
        f"kernels.{name}" for name in ("attention_triton", "decode", "logprobs", "rmsnorm", "rotary", "swiglu")
    }


def test_attention_is_there_with_every_pair_of_masks():
    """In `make test` for head_dim 64 and 128 in 16 bits, in `make test-full` for every width, filled and padded."""
    cases = importlib.import_module("kernels.attention_triton").compile_cases()
    for slow, widths in ((False, (64, 128)), (True, (8, 16, 24, 32, 40, 64, 80, 128, 160, 256))):
        names = {(case.architecture, case.name) for case in cases if slow or not case.slow}
        masks = ("", " window", " documents", " window documents")
        kernels_named = ("attention_forward", "attention_backward_queries", "attention_backward_keys")
        for arch, kernel, E, mask in itertools.product(launch.ARCHITECTURES, kernels_named, widths, masks):
            assert (arch, f"{kernel} E{E}{mask}") in names


@pytest.mark.parametrize("architecture", launch.ARCHITECTURES)
def test_decoding_loads_ahead_whatever_the_head_dim(architecture):
    """Rows of 72 take as much shared memory, for blocks on their way, as those of 128, to which they are padded."""
    cases = importlib.import_module("kernels.decode").compile_cases()
    shared = [
        figures_of(case).shared
        for case in cases
        if (case.architecture, case.name) in {(architecture, f"decode_split E{E} M16 documents") for E in (72, 128)}
    ]
    assert len(shared) == 2
    assert shared[0] == shared[1]


def test_attention_uses_the_tensor_cores(figures):
    """On Hopper only wgmma reaches the peak; a product that falls back to mma.sync loses half of it."""
    expected = {"sm_80": {"mma"}, "sm_90": {"wgmma"}, "sm_100": {"tcgen05", "mma"}, "gfx942": {"mfma"}}
    attention = [figure for figure in figures if re.match(r"attention(?!.* fp32)", figure.kernel)]
    assert attention
    assert not [figure.row() for figure in attention if figure.instructions not in expected[figure.architecture]]


def test_products_of_fp32_are_exact(figures):
    """No tensor core of NVIDIA multiplies fp32; what they would take is tf32. AMD's mfma does."""
    exact = [figure for figure in figures if figure.kernel.endswith(" fp32")]
    assert not [figure.row() for figure in exact if figure.instructions not in ("-", "mfma")]
