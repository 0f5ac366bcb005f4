"""Safetensors files: the oracle is the safetensors library, the inputs are what strangers may send."""

import io
import json
import os
import random
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from solar import tensorfile
from solar.elements import elements, map_file, view_in, write_bytes
from solar.tensorfile import (
    DTYPES,
    StoredTensor,
    TensorToWrite,
    read_safetensors_header,
    write_safetensors,
    write_shards,
)

SHAPES = {"matrix": (3, 5), "vector": (7,), "scalar": (), "none": (0, 4), "deep": (2, 1, 3, 2)}


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Any bits at all: NaNs, infinities and subnormal numbers are copied like the rest."""
    count = torch.Size(shape).numel() * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    bits = torch.randint(0, high, (count,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return bits.view(dtype).view(shape)


def torch_dtype(name: str) -> torch.dtype:
    """Of a name in a header."""
    return getattr(torch, DTYPES[name][0])


def some_tensors() -> dict[str, torch.Tensor]:
    """Every dtype in every shape, the names in no order."""
    pairs = [(dtype, kind) for dtype in DTYPES for kind in SHAPES]
    random.Random(0).shuffle(pairs)
    return {f"{d}.{k}": random_tensor(torch_dtype(d), SHAPES[k], seed) for seed, (d, k) in enumerate(pairs)}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    describe = lambda tensors: {name: (t.dtype, tuple(t.shape), bits(t)) for name, t in tensors.items()}
    return describe(a) == describe(b)


def read_all(tensors: dict[str, StoredTensor]) -> dict[str, torch.Tensor]:
    return {name: elements(stored, 0, stored.numel).view(stored.shape) for name, stored in tensors.items()}


def to_write(tensors: dict[str, torch.Tensor]) -> list[TensorToWrite]:
    return [
        TensorToWrite(name, tuple(t.shape), str(t.dtype).removeprefix("torch."), lambda file, t=t: write_bytes(file, t))
        for name, t in tensors.items()
    ]


def raw_file(path: Path, header: bytes | dict, data: bytes = b"") -> Path:
    header = json.dumps(header).encode() if isinstance(header, dict) else header
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def entry(dtype="U8", shape=(4,), begin=0, end=4) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


# ------------------------------------------------------------------------------------------------ safetensors


def test_the_library_reads_what_we_write_and_we_too(tmp_path):
    tensors, path = some_tensors(), tmp_path / "x.safetensors"
    write_safetensors(path, to_write(tensors))
    assert same(load_file(path), tensors)
    header = read_safetensors_header(path)
    assert list(header) == list(tensors)  # in the order given
    assert same(read_all(header), tensors)
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0  # so that the data begins aligned


def test_we_read_what_the_library_writes(tmp_path):
    tensors, path = some_tensors(), tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "note": 'with "quotes" and ü'})
    header = read_safetensors_header(path)
    assert same(read_all(header), tensors)
    mapped = map_file(path)
    assert same({name: view_in(mapped, stored) for name, stored in header.items()}, tensors)


def test_every_dtype_of_the_table_is_the_librarys(tmp_path):
    for name, (said, itemsize) in DTYPES.items():
        dtype = torch_dtype(name)
        write_safetensors(tmp_path / name, to_write({"a": random_tensor(dtype, (3,))}))
        save_file({"a": random_tensor(dtype, (3,))}, tmp_path / f"{name}.theirs")
        assert f'"dtype":"{name}"'.encode() in (tmp_path / f"{name}.theirs").read_bytes()
        assert read_safetensors_header(tmp_path / name)["a"].dtype == said
        assert itemsize == dtype.itemsize


def test_data_that_is_not_aligned_is_read_bit_for_bit(tmp_path):
    tensors = {
        name: random_tensor(torch_dtype(name), (5,), seed) for seed, name in enumerate(("U8", "BF16", "F32", "F64"))
    }
    for padding in range(9):  # the header's length decides where the data begins; every remainder occurs
        entries, at = {}, 0
        for name, tensor in tensors.items():
            entries[name] = entry(name, tensor.shape, at, at := at + tensor.nbytes)
        header = json.dumps(entries).encode() + b" " * padding
        path = raw_file(tmp_path / f"{padding}", header, b"".join(map(bits, tensors.values())))
        stored, mapped = read_safetensors_header(path), map_file(path)
        assert same(read_all(stored), tensors)
        views = {name: view_in(mapped, place) for name, place in stored.items()}
        assert same(views, tensors)
        for name, place in stored.items():  # a view where it can be one
            inside = 0 <= views[name].data_ptr() - mapped.data_ptr() < mapped.numel()
            assert inside == (place.offset % place.itemsize == 0)


def test_reading_in_pieces_is_reading(tmp_path, monkeypatch):
    tensor = random_tensor(torch.bfloat16, (1000, 3))
    save_file({"pad": random_tensor(torch.uint8, (3,)), "a": tensor}, tmp_path / "x")
    stored = read_safetensors_header(tmp_path / "x")["a"]
    assert stored.read(17, 2000) == bits(tensor)[34:4000]
    assert elements(stored, 5, 5).numel() == 0
    for size in (2, 64, 5999, 6000, 6001, 1 << 20):
        monkeypatch.setattr(tensorfile, "CHUNK_BYTES", size)
        pieces = list(stored.chunks())
        assert b"".join(pieces) == bits(tensor)
        assert max(map(len, pieces)) <= size


def test_a_file_that_has_become_shorter_is_an_error(tmp_path):
    save_file({"a": random_tensor(torch.float32, (100,))}, tmp_path / "x")
    stored = read_safetensors_header(tmp_path / "x")["a"]
    os.truncate(tmp_path / "x", (tmp_path / "x").stat().st_size - 1)
    with pytest.raises(OSError, match=r"x: ends at byte \d+, in the middle"):
        stored.read(0, 100)


def test_what_is_written_to_mapped_bytes_never_reaches_the_file(tmp_path):
    save_file({"a": random_tensor(torch.float32, (5000,))}, tmp_path / "x")
    before = (tmp_path / "x").read_bytes()
    view = view_in(map_file(tmp_path / "x"), read_safetensors_header(tmp_path / "x")["a"])
    view.fill_(1.0)
    assert bool((view == 1).all())
    assert (tmp_path / "x").read_bytes() == before


# ------------------------------------------------------------------------------------------------ hostile headers

OVER = [2**48, 2**62, 2**64, -1]
HOSTILE = {
    "not an object": (b"[]", b"", "does not begin with"),
    "white space first": (b' {"a":1}', b"", "does not begin with"),
    "no header at all": (b"", b"", "does not begin with"),
    "not JSON": (b"{a}", b"", "not valid JSON"),
    "not UTF-8": (b'{"\xff":1}', b"", "not valid JSON"),
    "two objects": (b"{}{}", b"", "not valid JSON"),
    "nested too deep": (b'{"a":' + b"[" * 200_000, b"", "nested too deeply"),
    "a number of 5000 digits": (b'{"a":' + b"9" * 5000 + b"}", b"", "not valid JSON"),
    "a name twice": (b'{"a":1,"b":2,"a":3}', b"", "'a' stands twice"),
    "a key of an entry twice": (
        b'{"a":{"dtype":"U8","dtype":"I8","shape":[4],"data_offsets":[0,4]}}',
        b"1234",
        "'dtype' stands twice",
    ),
    "an entry that is no object": ({"a": "b"}, b"", "malformed entry"),
    "an entry with a key missing": ({"a": {"dtype": "U8", "shape": [4]}}, b"1234", "malformed entry"),
    "an entry with a key too many": ({"a": entry() | {"x": 1}}, b"1234", "malformed entry"),
    "three offsets": ({"a": entry() | {"data_offsets": [0, 4, 4]}}, b"1234", "malformed entry"),
    "a text as offset": ({"a": entry() | {"data_offsets": ["0", 4]}}, b"1234", "malformed entry"),
    "a fraction as offset": ({"a": entry() | {"data_offsets": [0.0, 4.0]}}, b"1234", "malformed entry"),
    "true and false as offsets": ({"a": entry(shape=[1], begin=False, end=True)}, b"1", "malformed shape"),
    "true as a dimension": ({"a": entry(shape=[True], end=1)}, b"1", "malformed shape"),
    "a fraction as a dimension": ({"a": entry(shape=[4.0])}, b"1234", "malformed shape"),
    "a shape that is a number": ({"a": entry() | {"shape": 4}}, b"1234", "malformed entry"),
    "negative dimensions": ({"a": entry(shape=[-2, -2])}, b"1234", "malformed shape"),
    "a negative offset": ({"a": entry(begin=-4, end=0)}, b"1234", "malformed shape"),
    "offsets in the wrong order": ({"a": entry(begin=4, end=0)}, b"1234", "malformed shape"),
    "65 dimensions": ({"a": entry(shape=[1] * 65, end=1)}, b"1", "malformed shape"),
    "a dtype of no table": ({"a": entry("F7")}, b"1234", "dtype 'F7' is not one of BF16"),
    "a dtype in small letters": ({"a": entry("u8")}, b"1234", "dtype 'u8' is not one of BF16"),
    "a dtype that is no text": ({"a": entry() | {"dtype": None}}, b"1234", "malformed entry"),
    "a shape that takes less": ({"a": entry(shape=[3])}, b"1234", "takes 3 bytes, the header gives it 4"),
    "a shape that takes more": ({"a": entry(shape=[5])}, b"1234", "takes 5 bytes, the header gives it 4"),
    "a dtype that takes more": ({"a": entry("F32")}, b"1234", "takes 16 bytes, the header gives it 4"),
    "a product that is 0 modulo 2**64": ({"a": entry(shape=[2**32, 2**32], end=0)}, b"", "takes 18446744073709551616"),
    "a product that is 4 modulo 2**64": ({"a": entry(shape=[2**33 + 2, 2**32 + 2])}, b"1234", "the header gives it 4"),
    **{f"a dimension of {n}": ({"a": entry(shape=[n])}, b"1234", "malformed shape") for n in OVER},
    **{f"an end of {n}": ({"a": entry(shape=[0], end=n)}, b"1234", "malformed shape") for n in OVER},
    "an overlap": ({"a": entry(), "b": entry(begin=3, end=7)}, b"1234567", "hole or an overlap"),
    "the same place twice": ({"a": entry(), "b": entry()}, b"1234", "hole or an overlap"),
    "a hole": ({"a": entry(), "b": entry(begin=5, end=9)}, b"123456789", "hole or an overlap"),
    "a hole at the start": ({"a": entry(begin=1, end=5)}, b"12345", "hole or an overlap"),
    "an empty tensor in the middle of another": (
        {"a": entry(), "b": entry(shape=[0], begin=2, end=2)},
        b"1234",
        "hole or an overlap",
    ),
    "an empty tensor beyond the end": ({"a": entry(shape=[0], begin=9, end=9)}, b"", "hole or an overlap"),
    "trailing bytes": ({"a": entry()}, b"12345", "truncated, or trailing bytes"),
    "trailing bytes without a tensor": ({}, b"1", "truncated, or trailing bytes"),
    "too few bytes": ({"a": entry()}, b"123", "truncated, or trailing bytes"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_refused_by_the_name_of_its_file(case, tmp_path):
    header, data, reason = HOSTILE[case]
    path = raw_file(tmp_path / "x.safetensors", header, data)
    with pytest.raises(ValueError) as refusal:
        read_safetensors_header(path)
    assert str(refusal.value).startswith(f"{path}: ")
    assert reason in str(refusal.value)
    assert len(str(refusal.value)) < len(str(path)) + 400


def test_the_cases_above_are_refused_for_what_is_wrong_with_them(tmp_path):
    good = {
        "a": entry(),
        "b": entry("F32", [], 4, 8),
        "none": entry("F32", [0, 2**40], 8, 8),
        "__metadata__": {"a": "b"},
    }
    stored = read_safetensors_header(raw_file(tmp_path / "x", good, b"12345678"))
    assert {name: (tensor.shape, tensor.nbytes) for name, tensor in stored.items()} == {
        "a": ((4,), 4),
        "b": ((), 4),
        "none": ((0, 2**40), 0),
    }
    assert read_safetensors_header(raw_file(tmp_path / "y", b"{}")) == {}


@pytest.mark.parametrize("length", [9, 2**31, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file_is_refused(length, tmp_path):
    path = tmp_path / "x"
    path.write_bytes(length.to_bytes(8, "little") + b"{}      ")
    with pytest.raises(ValueError, match=rf"{path}: truncated or not a safetensors file: 16 bytes, .* {length} bytes"):
        read_safetensors_header(path)


def test_a_header_longer_than_the_formats_bound_is_refused_unread(tmp_path):
    path = tmp_path / "x"
    path.write_bytes((100_000_001).to_bytes(8, "little") + b"{")
    os.truncate(path, 200_000_000)  # of which the disk holds nine bytes
    with pytest.raises(ValueError, match=rf"{path}: a header of 100000001 bytes; at most 100000000"):
        read_safetensors_header(path)


def test_a_file_truncated_anywhere_is_refused(tmp_path):
    path = tmp_path / "x"
    save_file({"a": random_tensor(torch.float32, (4,)), "b": random_tensor(torch.int8, (3, 3))}, path)
    whole = path.read_bytes()
    assert read_safetensors_header(path)
    for size in range(len(whole)):  # 0 and 7 bytes among them
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"{path}: "):
            read_safetensors_header(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="trailing bytes"):
        read_safetensors_header(path)


def test_a_large_hostile_header_is_refused_soon(tmp_path):
    """What grows with the square of the header takes minutes at this size, and forever at 100 MB."""
    many = b",".join(b'"k%d":0' % i for i in range(50_000))
    path = raw_file(tmp_path / "x", b"{" + many + b',"k49999":0}')
    start = time.monotonic()
    with pytest.raises(ValueError, match="'k49999' stands twice"):
        read_safetensors_header(path)
    deep = raw_file(tmp_path / "y", {"a": entry(shape=[2**47] * 200_000)}, b"1234")
    with pytest.raises(ValueError, match=f"{deep}: a: malformed shape"):
        read_safetensors_header(deep)
    assert time.monotonic() - start < 5


def test_a_damaged_header_never_leads_out_of_the_file(tmp_path):
    path = tmp_path / "x"
    save_file({f"layer.{i}": random_tensor(torch.bfloat16, (i + 1, 3), i) for i in range(4)}, path)
    good, rng = path.read_bytes(), random.Random(0)
    digits = [i for i, byte in enumerate(good) if i >= 8 and chr(byte).isdigit()]
    read, refusals = 0, []
    for _ in range(300):
        damaged = bytearray(good)
        for _ in range(rng.choice([1, 1, 2, 3])):
            damaged[rng.choice(digits)] = ord(rng.choice("0123456789,-[]"))
        path.write_bytes(damaged)
        try:
            stored = read_safetensors_header(path).values()
        except ValueError as refusal:
            refusals.append(str(refusal))
            continue
        read += 1  # damaged in a name only
        assert max(tensor.offset + tensor.nbytes for tensor in stored) == len(good)
        assert sum(tensor.nbytes for tensor in stored) == 60
    assert all(refusal.startswith(f"{path}: ") for refusal in refusals)
    assert len(refusals) > 200
    assert read > 2


# ------------------------------------------------------------------------------------------------ writing


class Stingy(io.FileIO):
    """A file that takes a few bytes at a time, as a disk that is nearly full may, and after `room` bytes none."""

    room = 1 << 60

    def write(self, data):
        if self.tell() >= self.room:
            raise OSError(28, "No space left on device")
        return super().write(bytes(data[:5]))


def test_a_write_that_ends_early_is_taken_up_again(tmp_path, monkeypatch):
    tensors = some_tensors()
    monkeypatch.setattr(tensorfile, "open", lambda path, mode, buffering=0: Stingy(path, "x"), raising=False)
    write_safetensors(tmp_path / "x", to_write(tensors))
    assert same(load_file(tmp_path / "x"), tensors)


@pytest.mark.parametrize("room", [0, 5, 100, 2000])
def test_a_write_that_fails_says_of_which_file(room, tmp_path, monkeypatch):
    monkeypatch.setattr(Stingy, "room", room)
    monkeypatch.setattr(tensorfile, "open", lambda path, mode, buffering=0: Stingy(path, "x"), raising=False)
    with pytest.raises(OSError, match="No space left") as failure:
        write_safetensors(tmp_path / "x", to_write(some_tensors()))
    assert failure.value.filename == str(tmp_path / "x")


def test_a_file_that_exists_is_not_overwritten(tmp_path):
    (tmp_path / "x").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        write_safetensors(tmp_path / "x", [])
    assert (tmp_path / "x").read_bytes() == b"mine"


def test_a_tensor_of_another_size_than_announced_is_caught(tmp_path):
    wrong = TensorToWrite("a", (3,), "float32", lambda file: write_bytes(file, torch.zeros(2)))
    with pytest.raises(AssertionError, match="a: "):
        write_safetensors(tmp_path / "x", [wrong])


def test_bytes_are_written_row_by_row_whatever_the_strides(tmp_path):
    tensor = random_tensor(torch.float16, (6, 4))
    odd = {
        "t": tensor.t(),
        "step": tensor[::2, 1:3],
        "wide": tensor[:1].expand(3, 4),
        "grad": torch.ones(2).requires_grad_(),
    }
    write_safetensors(tmp_path / "x", to_write(odd))
    assert same(load_file(tmp_path / "x"), odd)


def test_shards_are_full_but_not_fuller(tmp_path):
    tensors = {
        f"t{i}": random_tensor(torch.uint8, (size,), i) for i, size in enumerate([60, 40, 1, 100, 250, 30, 30, 40])
    }
    write_shards(tmp_path, to_write(tensors), 100)
    groups = [["t0", "t1"], ["t2"], ["t3"], ["t4"], ["t5", "t6", "t7"]]  # t4 alone is larger than a shard
    names = [f"model-{i:05}-of-00005.safetensors" for i in range(1, 6)]
    assert sorted(os.listdir(tmp_path)) == [*names, "model.safetensors.index.json"]
    assert [list(read_safetensors_header(tmp_path / name)) for name in names] == groups
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 551}
    expected = [(tensor, name) for name, group in zip(names, groups, strict=True) for tensor in group]
    assert list(index["weight_map"].items()) == expected
    assert same({name: t for file in names for name, t in load_file(tmp_path / file).items()}, tensors)


def test_one_shard_needs_no_index(tmp_path):
    tensors = {"a": random_tensor(torch.uint8, (60,)), "b": random_tensor(torch.uint8, (40,))}
    write_shards(tmp_path, to_write(tensors), 100)
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_a_directory_or_nothing_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_safetensors_header(tmp_path / "none")
    with pytest.raises(IsADirectoryError):
        read_safetensors_header(tmp_path)
