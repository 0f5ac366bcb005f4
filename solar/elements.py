"""Elements of stored tensors, as torch's: read, mapped, cast, written; several pieces at once.

`solar/tensorfile.py` knows where the bytes stand and moves them; here they become numbers.
"""

import contextlib
import mmap
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from solar.tensorfile import StoredTensor, write_all


class Source(Protocol):
    """What elements are read from: a StoredTensor, or a Weight of solar/directory.py."""

    dtype: str

    def read(self, start: int, stop: int) -> bytearray: ...


def elements(source: Source, start: int, stop: int) -> Tensor:
    """Elements start..stop-1 of the flattened tensor, in memory of their own. OSError if its file is too short."""
    data, dtype = source.read(start, stop), getattr(torch, source.dtype)
    return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)


def fill(name: str, source: Source, part: Tensor, start: int, stop: int) -> None:
    """Copy elements start..stop-1 of the flattened tensor `name` into `part`, of any dtype, on any device.

    ValueError naming the tensor if a value becomes infinite.
    """
    piece = elements(source, start, stop)
    if part.is_cuda:  # from pinned memory, the copy is the device's own work, and the cast follows it there
        piece = piece.pin_memory().to(part.device)
    part.copy_(piece)
    if part.dtype == torch.float16:
        check_fits(name, piece, part)


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor, row-major."""
    return memoryview(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())


def write_bytes(file: FileIO, tensor: Tensor) -> None:
    """The bytes of a CPU tensor, row-major, to an unbuffered file."""
    write_all(file, as_bytes(tensor))


def cast(name: str, dtype: str, make: Callable[[int, int], Tensor]) -> Callable[[int, int], memoryview]:
    """The `make` of a Target that is `name` in `dtype`, from what gives the elements before the cast.

    ValueError naming the tensor, when it is called, if a value becomes infinite.
    """

    def make_bytes(start: int, stop: int) -> memoryview:
        made = make(start, stop)
        cast = made.to(getattr(torch, dtype))
        check_fits(name, made, cast)
        return as_bytes(cast)

    return make_bytes


def check_fits(name: str, made: Tensor, cast: Tensor) -> None:
    """Raise ValueError naming the tensor if a value that was finite in `made` is infinite in `cast`."""
    finite = cast.dtype == made.dtype or not len(cast) or cast.abs().max().isfinite()  # quick, and nearly always true
    if not finite and bool((cast.isinf() & ~made.isinf()).any()):
        raise ValueError(f"{name}: values up to {made.abs().max():.4g} do not fit {cast.dtype}; use bfloat16")


def map_file(path: Path) -> Tensor:
    """The bytes of a file, memory-mapped: read when touched; what is written to them never reaches the file."""
    # Writable and private means copied where written, so Linux would reserve memory for all of it, and refuse a file
    # that is larger than the memory, unless told not to. (Python names the flag from 3.13 on.)
    flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
    with open(path, "rb") as file:
        return torch.frombuffer(
            mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE), dtype=torch.uint8
        )


def view_in(mapped: Tensor, stored: StoredTensor) -> Tensor:
    """A tensor as a view of `map_file(stored.path)`, or as a copy where the file does not align it."""
    raw = mapped[stored.offset : stored.offset + stored.nbytes]
    if stored.offset % stored.itemsize:
        raw = raw.clone()
    return raw.view(getattr(torch, stored.dtype)).view(stored.shape)


@contextlib.contextmanager
def side_by_side() -> Iterator[Callable]:
    """An `itertools.starmap` that works on a few items at once, one on each of torch's threads; results in order.

    Within an operator on a chunk, threads would wait for each other after a fraction of a millisecond's work; and what
    one thread sums up alone does not depend on their number.
    """
    workers = torch.get_num_threads()

    def run(function, items):
        waiting: deque[Future] = deque()
        for item in items:
            waiting.append(pool.submit(function, *item))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield run
    finally:
        torch.set_num_threads(workers)
