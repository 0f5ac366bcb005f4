"""The zip archive of `torch.save` (`pytorch_model.bin`, `consolidated.00.pth`): where each tensor's bytes stand in it.

It holds a pickle that describes the tensors and, for each storage, one uncompressed record. A pickle is a program for a
small stack machine, and may call any function. torch's own restricted unpickler calls only a few, but with these a file
of 100 bytes fills the memory (a bytearray of any size), hangs (the hash of a tuple that holds itself twice, thirty
times over), and one of 300 kB ends the process (the hash of a tuple that is nested as deep). So the program is followed
here, as far as state dicts go: what it "calls" is noted down and never called.
"""

import struct
import zipfile
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from solar.jsonfile import brief, plain
from solar.tensorfile import ITEMSIZES, MAX_RANK, StoredTensor

MAX_BYTES = 1_000_000  # of the pickle, and of the list of records: each describes 5,000 tensors in so much
MAX_STEPS = 100_000  # of the pickle: 2,800 tensors
MAX_STACK = 10_000  # torch.save writes a dictionary in batches of 1,000 entries

STORAGES = {
    "torch.DoubleStorage": "float64",
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
    "torch.storage.UntypedStorage": "uint8",  # of the younger types: the tensor says which
}
NAMED_DTYPES = {f"torch.{dtype}": dtype for dtype in ITEMSIZES}
TENSORS = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3")
PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
CONSTANTS = {b"N": None, b"\x88": True, b"\x89": False, b")": ()}  # what an instruction alone puts on the stack
KNOWN = {*STORAGES, *NAMED_DTYPES, *TENSORS, *PARAMETERS, "collections.OrderedDict"}


class Global(str):
    """The name of a function or class that a pickle refers to."""


@dataclass(frozen=True, eq=False, repr=False)
class Storage:
    """A record of the archive, of which the pickle says that it holds `nbytes` bytes."""

    key: str
    dtype: str
    nbytes: int


@dataclass(frozen=True, eq=False, repr=False)  # what it holds may be too deep to be printed
class Described:
    """A tensor as the pickle describes it; nothing of it is checked."""

    storage: Any
    dtype: Any
    offset: Any  # in elements
    shape: Any
    strides: Any
    lazy: bool  # a negation or a conjugation that is still to be done


def read_torch_archive(path: Path) -> dict[str, StoredTensor]:
    """Name -> place of every tensor in a state dict that `torch.save` wrote. ValueError names file and tensor."""
    with open(path, "rb", buffering=0) as raw:
        try:
            file = _Bounded(raw)
            if not zipfile.is_zipfile(file):
                older = "truncated, or older than torch 1.6; load and save it again"
                raise ValueError(f"not a zip archive of torch.save: {older}")
            records, program = _read_records(file)
            state = follow(program)
            if not isinstance(state, dict):
                raise ValueError(f"holds a {_kind(state)}, expected a dictionary of tensors")
            return {name: _locate(path, name, described, records) for name, described in state.items()}
        except Exception as error:  # a broken archive can make zipfile fail in any way
            told = isinstance(error, ValueError) and not isinstance(error, UnicodeError)
            raise ValueError(f"{path}: {error if told else 'damaged: ' + brief(error)}") from None


def _kind(value: Any) -> str:
    return "tensor" if isinstance(value, Described) else type(value).__name__


def _locate(path: Path, name: str, value: Any, records: dict[str, tuple[int, int]]) -> StoredTensor:
    """The place of a described tensor. ValueError unless it lies in its record, whole and row by row."""
    if not isinstance(value, Described):
        raise ValueError(f"{brief(name)}: a {_kind(value)}; expected a dictionary of tensors by name")
    name, storage, shape, strides = plain(name), value.storage, value.shape, value.strides
    sizes = all(isinstance(numbers, tuple) and len(numbers) <= MAX_RANK for numbers in (shape, strides))
    sizes = sizes and all(type(n) is int and 0 <= n < 2**48 for n in (*shape, *strides, value.offset))
    if not sizes or len(shape) != len(strides) or value.dtype not in ITEMSIZES:
        raise ValueError(f"{name}: malformed shape {brief(shape)}, strides {brief(strides)} or dtype")
    tensor = StoredTensor(path, 0, shape, value.dtype)
    row_by_row, step = True, 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        row_by_row, step = row_by_row and (size == 1 or stride == step), step * size
    if value.lazy or not (row_by_row or tensor.numel == 0):
        raise ValueError(f"{name} is a view, with strides {strides}; save it again as a contiguous tensor")
    start, size = records.get(storage.key, (0, -1)) if isinstance(storage, Storage) else (0, -1)
    skipped = value.offset * tensor.itemsize
    if size < 0 or size != storage.nbytes or skipped + tensor.nbytes > size:
        raise ValueError(f"{name} is not where it should be: damaged; load and save it again")
    return StoredTensor(path, start + skipped, shape, value.dtype)


# ------------------------------------------------------------------------------------------------ the archive


class _Bounded(BufferedReader):
    """A file of which a part that describes the rest is read in one piece, of whatever length it says of itself."""

    def read(self, size: int = -1) -> bytes:
        if size > MAX_BYTES:
            raise ValueError(f"a pickle or a list of records of {size} bytes; at most {MAX_BYTES} are allowed")
        return super().read(size)


def _read_records(file: BufferedReader) -> tuple[dict[str, tuple[int, int]], bytes]:
    """Storage's key -> place and size of its record, and the pickle. ValueError unless all lie plainly in a row."""
    places, at = {}, 0
    with zipfile.ZipFile(file) as archive:
        for record in sorted(archive.infolist(), key=lambda record: record.header_offset):
            name = record.filename
            archive.open(record).close()  # compares the record's own header with the archive's directory
            file.seek(record.header_offset + 26)  # there: the lengths of the name and of a padding before the bytes
            start = record.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
            if record.compress_type != zipfile.ZIP_STORED or record.header_offset < at or name in places:
                raise ValueError(f"{plain(name)} is compressed, stands twice or overlaps another: not by torch.save")
            places[name], at = (start, record.file_size), start + record.file_size
        if at > archive.start_dir:
            raise ValueError("its last record is longer than the space for it: damaged")

    def content(name: str) -> bytes:
        file.seek(places[name][0])
        return file.read(places[name][1])

    pickles = [name for name in places if name.partition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        raise ValueError("not an archive of torch.save: it has one record NAME/data.pkl")
    for name in places:  # torch takes capitals for small letters
        if name.lower().endswith("/byteorder") and content(name) != b"little":
            raise ValueError("not saved in little-endian byte order; load and save it again")
    folder = pickles[0].removesuffix("data.pkl") + "data/"
    storages = {name.removeprefix(folder): place for name, place in places.items() if name.startswith(folder)}
    return storages, content(pickles[0])


# ------------------------------------------------------------------------------------------------ the pickle


def follow(program: bytes) -> Any:
    """What a pickle of protocol 2 describes: dictionaries, tuples, plain values, and `Described` tensors.

    Nothing is imported, called or hashed but text. Raises ValueError for what no state dict needs.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    storages: dict[str, Storage] = {}
    at = 0

    def take(count: int) -> bytes:
        nonlocal at
        if count > len(program) - at:
            raise ValueError("its pickle is cut short")
        at += count
        return program[at - count : at]

    def take_line() -> str:
        end = program.find(b"\n", at)
        return take(end + 1 - at if end >= 0 else len(program))[:-1].decode()

    def number(format: str) -> int:
        return struct.unpack(format, take(struct.calcsize(format)))[0]

    def since_mark() -> list[Any]:
        first = marks.pop()
        items, stack[first:] = stack[first:], []
        return items

    def set_items(items: list[Any]) -> None:
        target = stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError(f"its pickle adds entries to a {_kind(target)}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str:
                shown = brief(key) if isinstance(key, int) else f"a {_kind(key)} as name"
                raise ValueError(f"{shown}: a {_kind(value)}; expected a dictionary of tensors by name")
            target[key] = value

    def extend(items: list[Any]) -> None:
        if not isinstance(stack[-1], list):
            raise ValueError(f"its pickle appends to a {_kind(stack[-1])}")
        stack[-1].extend(items)

    push = stack.append
    for _ in range(MAX_STEPS):
        if len(stack) > MAX_STACK or at >= len(program):
            raise ValueError("its pickle is cut short, or puts too much on its stack")
        code = program[at : (at := at + 1)]
        if code in CONSTANTS:
            push(CONSTANTS[code])
            continue
        match code:
            case b"X":  # BINUNICODE
                push(take(number("<I")).decode("utf-8", "surrogatepass"))
            case b"q":  # BINPUT, and LONG_BINPUT below
                memo[number("B")] = stack[-1]
            case b"r":
                memo[number("<I")] = stack[-1]
            case b"h":  # BINGET, and LONG_BINGET below
                push(memo[number("B")])
            case b"j":
                push(memo[number("<I")])
            case b"K":
                push(number("B"))
            case b"M":
                push(number("<H"))
            case b"J":
                push(number("<i"))
            case b"\x8a":  # LONG1
                push(int.from_bytes(take(number("B")), "little", signed=True))
            case b"G":
                push(number(">d"))
            case b"\x85" | b"\x86" | b"\x87":  # TUPLE1, TUPLE2, TUPLE3
                count = code[0] - 0x84
                stack[-count:] = [tuple(stack[-count:])]
            case b"(":  # MARK
                marks.append(len(stack))
            case b"t":
                push(tuple(since_mark()))
            case b"]":
                push([])
            case b"a":
                extend([stack.pop()])
            case b"e":
                extend(since_mark())
            case b"}":
                push({})
            case b"s":
                marks.append(len(stack) - 2)
                set_items(since_mark())
            case b"u":
                set_items(since_mark())
            case b"c":  # GLOBAL
                name = Global(f"{take_line()}.{take_line()}")
                if name not in KNOWN:
                    raise ValueError(f"Unsupported global: GLOBAL {plain(name)}")
                push(name)
            case b"Q":  # BINPERSID: a storage
                stack[-1] = _storage(stack[-1], storages)
            case b"R":  # REDUCE: a call
                arguments = stack.pop()
                stack[-1] = _noted(stack[-1], arguments)
            case b"b":  # BUILD: the versions of the modules, which torch notes in an OrderedDict
                stack.pop()
            case b"\x80":  # PROTO
                if number("B") != 2:
                    raise ValueError("its pickle is not of protocol 2, which torch.save writes")
            case b".":  # STOP
                return stack.pop()
            case _:
                raise ValueError(f"its pickle holds an instruction {code!r} that no state dict needs")
    raise ValueError(f"its pickle goes on for more than {MAX_STEPS} steps")


def _storage(stated: Any, storages: dict[str, Storage]) -> Storage:
    match stated:
        case ("storage", Global() as kind, str(key), str(), int(numel)) if kind in STORAGES and 0 <= numel < 2**48:
            return storages.setdefault(key, Storage(key, STORAGES[kind], numel * ITEMSIZES[STORAGES[kind]]))
    raise ValueError("its pickle names a storage that is none")


def _noted(called: Any, arguments: Any) -> Any:
    """What a call describes. Of parameters the tensor, of an OrderedDict an empty dictionary."""
    match called, arguments:
        case Global("collections.OrderedDict"), ():
            return {}
        case Global("torch._utils._rebuild_tensor_v3"), (of, offset, shape, strides, _, _, Global(dtype), *lazy):
            return Described(of, NAMED_DTYPES.get(dtype), offset, shape, strides, any(lazy))
        case Global(name), (Storage() as of, offset, shape, strides, *more) if name in TENSORS:
            return Described(of, of.dtype, offset, shape, strides, any(more[2:]))
        case Global(name), (Described() as tensor, *_) if name in PARAMETERS:
            return tensor
    name = plain(called) if isinstance(called, Global) else f"a {_kind(called)}"
    raise ValueError(f"its pickle calls {name} with what it does not take")
