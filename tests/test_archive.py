"""The archives of torch.save: the oracle is torch.load, the inputs are what strangers may send."""

import os
import random
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from solar.archive import read_torch_archive
from solar.elements import map_file, view_in
from tests.test_tensorfile import read_all, same, some_tensors


def test_an_archive_is_read_bit_for_bit_from_where_it_stands(tmp_path):
    shared = torch.arange(100.0)
    tensors = some_tensors() | {
        "parameter": torch.nn.Parameter(torch.randn(3, 3)),
        "head": shared[:10],
        "middle": shared[33:77].view(4, 11),
        "again": shared[33:77],
        "one": shared[99],
        "none": shared[50:50],
    }
    torch.save(tensors, tmp_path / "x.bin")
    stored = read_torch_archive(tmp_path / "x.bin")
    assert list(stored) == list(tensors)
    assert same(read_all(stored), tensors)
    mapped = map_file(tmp_path / "x.bin")
    assert same({name: view_in(mapped, place) for name, place in stored.items()}, tensors)
    assert stored["middle"].offset == stored["again"].offset == stored["head"].offset + 33 * 4  # nothing is copied
    assert same(read_all(stored), torch.load(tmp_path / "x.bin", weights_only=True))


def test_a_modules_state_dict_is_a_dictionary_of_tensors(tmp_path):
    module = torch.nn.Linear(3, 2)
    torch.save(module.state_dict(), tmp_path / "x.bin")  # an OrderedDict with an attribute
    assert same(read_all(read_torch_archive(tmp_path / "x.bin")), dict(module.state_dict()))
    torch.serialization.set_crc32_options(False)  # torch loads such files, so they are about
    try:
        torch.save(module.state_dict(), tmp_path / "y.bin")
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(read_all(read_torch_archive(tmp_path / "y.bin")), dict(module.state_dict()))


NO_STATE = {
    "strides": (lambda: {"a": torch.ones(2, 3).t()}, r"a is a view, with strides \(1, 3\); save it again"),
    "an expanded tensor": (lambda: {"a": torch.ones(1).expand(5)}, r"a is a view, with strides \(0,\)"),
    "a lazy negation": (lambda: {"a": torch.ones(1, dtype=torch.complex64).conj().imag}, "a is a view"),
    "a sparse tensor": (lambda: {"a": torch.eye(3).to_sparse()}, "Unsupported global: GLOBAL torch._utils._rebuild_sp"),
    "a tensor without bytes": (
        lambda: {"a": torch.empty(3, device="meta")},
        "Unsupported global: GLOBAL torch._utils._rebuild_meta",
    ),
    "nested": (lambda: {"model": {"a": torch.ones(3)}}, "'model': a dict; expected a dictionary of tensors by name"),
    "a number beside tensors": (lambda: {"a": torch.ones(3), "step": 7}, "'step': a int; expected"),
    "numbers as names": (lambda: {1: torch.ones(3)}, "1: a tensor; expected a dictionary of tensors by name"),
    "a list": (lambda: [torch.ones(3)], "holds a list, expected a dictionary"),
    "a tensor": (lambda: torch.ones(3), "holds a tensor, expected a dictionary"),
    "a module": (lambda: torch.nn.Linear(2, 2), "Unsupported global: GLOBAL torch.nn.modules.linear.Linear"),
}


@pytest.mark.parametrize("case", NO_STATE)
def test_an_archive_of_anything_but_plain_tensors_is_refused(case, tmp_path):
    make, reason = NO_STATE[case]
    path = tmp_path / "x.bin"
    torch.save(make(), path)
    with pytest.raises(ValueError, match=rf"^{path}: {reason}") as refusal:
        read_torch_archive(path)
    assert "\n" not in str(refusal.value)
    assert "weights_only" not in str(refusal.value)  # torch's own advice is to trust the file


class Payload:
    def __init__(self, call, *arguments):
        self.reduced = (call, arguments)

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("call", [os.mkdir, eval, exec], ids=lambda call: call.__name__)
@pytest.mark.parametrize("as_name", [False, True], ids=["value", "name"])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_code_in_a_pickle_never_runs(call, as_name, legacy, tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "x.bin"
    argument = str(canary) if call is os.mkdir else f"__import__('os').mkdir({str(canary)!r})"
    payload = Payload(call, argument)
    state = {payload: torch.ones(3)} if as_name else {"a": torch.ones(3), "b": payload}
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=f"^{path}: "):
        read_torch_archive(path)
    assert not canary.exists()
    torch.load(path, weights_only=False)  # the payload is a live one
    assert canary.exists()


def test_a_pickle_may_not_fill_the_memory_or_end_the_process(tmp_path):
    """With torch's own restricted unpickler the first takes 2 GB, the second a segmentation fault, the third an age."""
    path = tmp_path / "x.bin"
    torch.save({"a": torch.ones(3)}, path)
    for program, reason in (
        (b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.", "Unsupported global: GLOBAL builtins.bytearray"),
        (b"\x80\x02})" + b"\x85" * 90_000 + b"Ns.", "a tuple as name"),
        (b"\x80\x02})" + b"q\0h\0\x86" * 100 + b"Ns.", "a tuple as name"),
        (b"\x80\x02}" + b"q\0" * 400_000 + b".", "its pickle goes on for more than 100000 steps"),
        (b"\x80\x02" + b"N" * 400_000 + b".", "its pickle is cut short, or puts too much on its stack"),
        (b"\x80\x02}" + b"q\0" * 600_000 + b".", "a pickle or a list of records of 1200004 bytes"),
    ):
        start = time.process_time()
        change = lambda name, data, program=program: program if name.endswith("data.pkl") else data
        with pytest.raises(ValueError, match=f"{tmp_path}/y: {reason}"):
            read_torch_archive(repack(path, tmp_path / "y", change))
        assert time.process_time() - start < 2


def test_2500_tensors_are_none_too_many(tmp_path):
    tensors = {f"model.layers.{i // 9}.mlp.up_proj_{i % 9}.weight": torch.tensor([i]) for i in range(2500)}
    torch.save(tensors, tmp_path / "x.bin")
    assert same(read_all(read_torch_archive(tmp_path / "x.bin")), tensors)


def test_the_format_before_torch_1_6_is_refused_with_the_way_out(tmp_path):
    path = tmp_path / "x.bin"
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(
        ValueError, match=rf"^{path}: not a zip archive .* older than torch 1\.6; load and save it again"
    ):
        read_torch_archive(path)


def test_a_truncated_archive_is_refused(tmp_path):
    path = tmp_path / "x.bin"
    torch.save({"a": torch.arange(300.0), "b": torch.ones(3)}, path)
    whole = path.read_bytes()
    for size in [0, 1, 7, 100, *range(200, len(whole), 97), *range(len(whole) - 30, len(whole))]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"^{path}: "):
            read_torch_archive(path)


def repack(source: Path, target: Path, change=lambda name, data: data, **how) -> Path:
    """Write the archive again, record by record; change(name, data) -> data, or None for no such record."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", **how) as new:
        for name in old.namelist():
            if (data := change(name, old.read(name))) is not None:
                new.writestr(name, data)
    return target


def test_an_archive_packed_by_another_tool_is_read_right_or_refused(tmp_path):
    """torch calculates where a record is from its own padding if a record `.format_version` tells it to. Not here."""
    tensors = {"a": torch.arange(300.0), "b": torch.ones(30), "c": torch.zeros(30)}
    torch.save(tensors, tmp_path / "x.bin")
    older = repack(tmp_path / "x.bin", tmp_path / "older", lambda n, data: None if "format_version" in n else data)
    for path in (older, repack(tmp_path / "x.bin", tmp_path / "again")):
        stored = read_torch_archive(path)
        assert any(place.offset % 4 for place in stored.values())
        assert same(read_all(stored), tensors)
        assert same({name: view_in(map_file(path), place) for name, place in stored.items()}, tensors)
    with pytest.raises(ValueError, match="is compressed, stands twice or overlaps"):
        read_torch_archive(repack(tmp_path / "x.bin", tmp_path / "small", compression=zipfile.ZIP_DEFLATED))


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\0", lambda data: b""])
def test_a_record_must_hold_what_the_pickle_says_of_it(change, tmp_path):
    torch.save({"a": torch.arange(300.0)}, tmp_path / "x.bin")
    path = repack(tmp_path / "x.bin", tmp_path / "y", lambda n, data: change(data) if n.endswith("/0") else data)
    with pytest.raises(ValueError, match=rf"^{path}: a is not where it should be"):
        read_torch_archive(path)


BEYOND = [(50, (100,)), (100, (1,)), (0, (2**61,)), (-1, (1,)), (0, (-1,)), (10**12, (0,))]


@pytest.mark.parametrize(("start", "shape"), BEYOND)
def test_a_tensor_may_not_reach_beyond_its_storage(start, shape, tmp_path):
    def rebuilt(start, shape):
        storage = torch.arange(100.0)._typed_storage()
        return {"a": Payload(torch._utils._rebuild_tensor_v2, storage, start, shape, (1,), False, OrderedDict())}

    path = tmp_path / "x.bin"
    torch.save(rebuilt(1, (99,)), path)
    assert read_all(read_torch_archive(path))["a"].tolist() == list(range(1, 100))
    torch.save(rebuilt(start, shape), path)
    with pytest.raises(ValueError, match=f"^{path}: "):
        read_torch_archive(path)


def test_a_big_endian_archive_is_refused(tmp_path):
    torch.save({"a": torch.arange(300.0)}, tmp_path / "x.bin")
    path = repack(tmp_path / "x.bin", tmp_path / "y", lambda n, data: b"big" if n.endswith("byteorder") else data)
    with pytest.raises(ValueError, match=rf"^{path}: not saved in little-endian byte order"):
        read_torch_archive(path)
    path.write_bytes(path.read_bytes().replace(b"/byteorder", b"/BYTEorder"))  # torch finds it all the same
    with pytest.raises(ValueError, match=rf"^{path}: not saved in little-endian byte order"):
        read_torch_archive(path)


def test_a_damaged_archive_is_refused_or_read_within_its_records(tmp_path):
    path, rng = tmp_path / "x.bin", random.Random(0)
    torch.save({"a": torch.arange(100.0), "b": torch.ones(30, dtype=torch.bfloat16)}, path)
    good = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        places = [info.header_offset for info in archive.infolist()] + [archive.start_dir]
    refusals = []
    for _ in range(200):
        damaged = bytearray(good)
        for _ in range(rng.choice([1, 1, 2])):
            damaged[rng.randrange(len(good))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            stored = read_torch_archive(path).values()
        except ValueError as refusal:
            refusals.append(str(refusal))
            continue
        for tensor in stored:  # within one record: no header of another stands between its first and its last byte
            assert not any(tensor.offset <= place < tensor.offset + tensor.nbytes for place in places)
    assert all(refusal.startswith(f"{path}: ") for refusal in refusals)
    assert 50 < len(refusals) < 195


def test_a_directory_or_nothing_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_torch_archive(tmp_path / "none")
    with pytest.raises(IsADirectoryError):
        read_torch_archive(tmp_path)
