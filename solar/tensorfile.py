"""The files that weights lie in: where each tensor's bytes stand, found without reading one of them.

What is known of a stored tensor is a file, an offset, a shape and a dtype. Here they come from safetensors files: 8
bytes of header length, a JSON header, then the tensors end to end. (solar/archive.py finds them in what torch.save
wrote.)

Files come from strangers. A header is bounded, must be consistent and must cover its file exactly; else ValueError.

Only bytes are moved here, without torch, whose import takes seconds and 146 MB, more than all else of an up-scaling.
`solar/elements.py` makes tensors of the bytes.
"""

import ctypes
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from solar.jsonfile import brief, parse_json, plain

MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own bound
MAX_RANK = 64  # torch's own bound
CHUNK_BYTES = 1 << 20  # what is computed from a chunk, in fp32, stays in a cache
BLOCK = 4096  # bytes of a page, and of the blocks that a filesystem can share between files
WRITE_BEHIND = 32 << 20  # bytes
SAMPLE = 2048  # elements at the start, the middle and the end of a tensor that a quick comparison takes

# safetensors' name -> torch's name, by which a dtype is known here, and the bytes of an element.
DTYPES = {
    "BF16": ("bfloat16", 2),
    "F16": ("float16", 2),
    "F32": ("float32", 4),
    "F64": ("float64", 8),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "I16": ("int16", 2),
    "I32": ("int32", 4),
    "I64": ("int64", 8),
}
DTYPE_NAMES = {dtype: name for name, (dtype, _) in DTYPES.items()}
ITEMSIZES = dict(DTYPES.values())


@dataclass(frozen=True)
class StoredTensor:
    """A contiguous, little-endian, row-major tensor at a place in a file."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return ITEMSIZES[self.dtype]

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize

    def read_into(self, view: memoryview, start: int) -> None:
        """Fill `view`, of bytes, from element `start` of the flattened tensor on. OSError if the file is too short."""
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset + start * self.itemsize)
            while view:
                try:
                    count = file.readinto(view)
                except OSError as error:
                    error.filename = str(self.path)  # a failed read() does not say of which file
                    raise
                if count == 0:
                    raise OSError(f"{self.path}: ends at byte {file.tell()}, in the middle of a tensor")
                view = view[count:]

    def read(self, start: int, stop: int) -> bytearray:
        """The bytes of elements start..stop-1 of the flattened tensor. Raises as `read_into` does."""
        data = bytearray((stop - start) * self.itemsize)
        self.read_into(memoryview(data), start)
        return data

    def chunks(self) -> Iterator[bytearray]:
        """The bytes of the tensor in pieces of at most CHUNK_BYTES."""
        for start, stop in spans(self.numel, self.itemsize):
            yield self.read(start, stop)


def spans(numel: int, itemsize: int, whole: bool = True) -> Iterator[tuple[int, int]]:
    """Ranges of elements that cover a tensor in pieces of at most CHUNK_BYTES; or, not whole, three samples of it."""
    if whole:
        step = CHUNK_BYTES // itemsize
        yield from ((at, min(at + step, numel)) for at in range(0, numel, step))
    else:
        last = max(numel - SAMPLE, 0)
        yield from ((at, min(at + SAMPLE, numel)) for at in sorted({0, last // 2, last}))


# ------------------------------------------------------------------------------------------------ reading


def read_safetensors_header(path: Path) -> dict[str, StoredTensor]:
    """Name -> place of every tensor in a safetensors file. ValueError names the file, the found and the expected."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        if prefix == b"version ":
            raise ValueError(
                f"{path}: a git-lfs pointer, not the weights themselves: run `git lfs pull` where it is from"
            )
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > size - 8:
            raise ValueError(
                f"{path}: truncated or not a safetensors file: {size} bytes, with a header of {length} bytes announced"
            )
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"{path}: a header of {length} bytes; at most {MAX_HEADER_BYTES} are allowed")
        raw = file.read(length)
    if not raw.startswith(b"{"):
        raise ValueError(f"{path}: not a safetensors file: its header does not begin with '{{'")
    header = parse_json(raw, path)

    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
                raise ValueError(f"{path}: __metadata__ must hold texts only, found {brief(entry)}")
            continue
        shown = plain(name)
        match entry:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]} if len(entry) == 3:
                pass
            case _:
                raise ValueError(f"{path}: {shown}: malformed entry in the header: {brief(entry)}")
        if dtype not in DTYPES:
            raise ValueError(f"{path}: {shown}: dtype {brief(dtype)} is not one of {', '.join(DTYPES)}")
        numbers = [*shape, begin, end]  # of type int exactly: JSON's true and false are bools, and those count as ints
        if not all(type(n) is int and 0 <= n < 2**48 for n in numbers) or begin > end or len(shape) > MAX_RANK:
            raise ValueError(f"{path}: {shown}: malformed shape {brief(shape)} or offsets {brief([begin, end])}")
        tensors[name] = tensor = StoredTensor(path, 8 + length + begin, tuple(shape), DTYPES[dtype][0])
        if tensor.nbytes != end - begin:
            raise ValueError(
                f"{path}: {shown}: {dtype} {brief(shape)} takes {brief(tensor.nbytes)} bytes, the header gives it "
                f"{end - begin}"
            )
    at = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != at:
            raise ValueError(
                f"{path}: {plain(name)} stands at byte {tensor.offset}, expected {at}: a hole or an overlap"
            )
        at += tensor.nbytes
    if at != size:
        raise ValueError(f"{path}: {size} bytes long, but the header describes {at}: truncated, or trailing bytes")
    return tensors


# ------------------------------------------------------------------------------------------------ writing


@dataclass(frozen=True)
class TensorToWrite:
    """A tensor that is still to be made: `write(file)` puts exactly its bytes at the end of the file.

    copied_from: where its bytes stand in another file, if they are copied.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    write: Callable[[FileIO], None]
    copied_from: int | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZES[self.dtype]


@dataclass(frozen=True)
class Target:
    """A tensor to write of which any part can be made, and made again: `make(start, stop)` gives the bytes of elements
    start..stop-1 of the flattened tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    make: Callable[[int, int], bytearray | memoryview]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZES[self.dtype]

    def spans(self, whole: bool = True) -> Iterator[tuple[int, int]]:
        return spans(math.prod(self.shape), ITEMSIZES[self.dtype], whole)

    def writer(self, advance: Callable[[int], None], run: Callable = itertools.starmap) -> Callable[[FileIO], None]:
        """What writes the tensor in constant memory, and reports the bytes of each piece to `advance`."""

        def write(file: FileIO) -> None:
            for piece in run(self.make, self.spans()):
                write_all(file, memoryview(piece))
                advance(len(piece))

        return write


def write_all(file: FileIO, data: memoryview) -> None:
    """Bytes to an unbuffered file, whose write may end early, without an error."""
    while data:
        data = data[file.write(data) :]


def _begin_write_out(file: FileIO, start: int, count: int) -> None:
    """Have the disk begin to write a range and come back at once, so that the fsync at the end has little left to do.

    Linux's sync_file_range, which Python does not have; elsewhere nothing. What fails, fsync will find.
    """
    if begin := getattr(ctypes.CDLL(None), "sync_file_range", None):
        begin(file.fileno(), ctypes.c_int64(start), ctypes.c_int64(count), 2)  # 2: SYNC_FILE_RANGE_WRITE


def write_safetensors(path: Path, tensors: list[TensorToWrite]) -> None:
    """One safetensors file with the tensors in the order given, each written by its own `write`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at, places = 0, Counter()
    for tensor in tensors:
        if tensor.copied_from is not None:
            places[(tensor.copied_from - at) % BLOCK] += tensor.nbytes
        offsets = [at, at := at + tensor.nbytes]
        header[tensor.name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    # Padded so that the data begins aligned, and so that what is copied comes to stand within a block where it stood
    # (most of it, of several files): copies go by whole pages then, and some filesystems share the blocks instead.
    place = next((place for place, _ in places.most_common() if place % 8 == 0), None)
    encoded += b" " * (-len(encoded) % 8 if place is None else (place - 8 - len(encoded)) % BLOCK)
    try:
        with open(path, "xb", buffering=0) as file:
            write_all(file, memoryview(len(encoded).to_bytes(8, "little") + encoded))
            end = begun = file.tell()
            for tensor in tensors:
                tensor.write(file)
                end += tensor.nbytes
                assert file.tell() == end, f"{tensor.name}: {file.tell()} bytes written, {end} expected"
                if end - begun >= WRITE_BEHIND:
                    _begin_write_out(file, begun, end - begun)
                    begun = end
    except OSError as error:
        if error.filename is None and error.errno is not None:  # a failed write() does not say of which file
            error.filename = str(path)
        raise


def write_shards(directory: Path, tensors: list[TensorToWrite], max_shard_bytes: int) -> None:
    """`model.safetensors`, or shards of at most max_shard_bytes (or one tensor) with `model.safetensors.index.json`."""
    shards: list[list[TensorToWrite]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        write_safetensors(directory / "model.safetensors", shards[0])
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(directory / file_name, shard)
        weight_map |= {tensor.name: file_name for tensor in shard}
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
