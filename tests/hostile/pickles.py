"""Pickles with code in them, pickles that exhaust who follows them, and damaged archives."""

import functools
import struct
import zipfile
from typing import Any

from hypothesis import strategies as st

from tests.hostile.model import (
    CONFIG,
    NAMES,
    PARAMS,
    SHAPES,
    Call,
    Case,
    Name,
    Persistent,
    archive,
    described,
    dumps,
    instructions,
    legacy,
    program,
    sound_records,
    state,
)
from tests.hostile.values import COMMANDS, cut, name, noise

CANARY = "canary"  # the folder that a payload would make, where it runs
CODE = f"__import__('os').mkdir('{CANARY}')"
CALLS = [
    Call(Name("os", "mkdir"), CANARY),
    Call(Name("posix", "mkdir"), CANARY),
    Call(Name("builtins", "eval"), CODE),
    Call(Name("builtins", "exec"), CODE),
    Call(Name("__builtin__", "eval"), CODE),
    Call(Name("os", "system"), f"mkdir {CANARY}"),
    Call(Name("subprocess", "check_call"), ["mkdir", CANARY]),
    Call(Name("os", "makedirs"), CANARY),
    Call(Name("runpy", "_run_code"), CODE, {}),
    Call(Name("torch", "_utils._rebuild_tensor_v2.__globals__"), CODE),
    Call(Name("collections", "OrderedDict.__init__.__globals__"), CODE),
    Call(Call(Name("builtins", "getattr"), Name("os", "mkdir"), "__call__"), CANARY),
]


@st.composite
def code(draw) -> Case:
    """A pickle that would run code if anybody let it, somewhere beside or within a whole state dict."""
    call, target = draw(st.sampled_from(CALLS)), draw(name)
    how = draw(
        st.sampled_from(["value", "argument", "whole", "first", "build", "stack", "inst", "obj", "new", "legacy"])
    )
    tensors = state()
    if how == "value":
        pickled = program(tensors | {draw(st.sampled_from([target, "extra"])): call})
    elif how == "argument":
        place = draw(st.sampled_from(["offset", "shape", "strides"]))
        pickled = program(tensors | {target: described(NAMES.index(target), SHAPES[target], **{place: call})})
    elif how == "whole":
        pickled = program(call)
    elif how == "first":
        pickled = b"\x80\x02" + instructions(call) + b"0" + program(tensors)[2:]
    elif how == "build":
        pickled = program(tensors)[:-1] + instructions({"__setstate__": call}) + b"b."
    elif how == "stack":
        text = "".join(f"\x8c{chr(len(part))}{part}" for part in ("os", "mkdir"))
        pickled = b"\x80\x04" + text.encode("latin-1") + b"\x93" + instructions((CANARY,)) + b"R."
    elif how == "inst":
        pickled = b"\x80\x02(" + instructions(CANARY) + b"ios\nmkdir\n."
    elif how == "obj":
        pickled = b"\x80\x02(" + instructions(Name("os", "mkdir")) + instructions(CANARY) + b"o."
    elif how == "new":
        pickled = b"\x80\x02" + instructions(Name("os", "mkdir")) + instructions((CANARY,)) + b"\x81."
    else:
        pickled = program(call)
    if how == "legacy":
        files: dict[str, Any] = {"config.json": dumps(CONFIG), "pytorch_model.bin": pickled}
    else:
        files = legacy(pickled)
    file = "pytorch_model.bin"
    if draw(st.booleans()):
        middle = draw(st.sampled_from(["00", "a\nerror: b", "\x1b[31m", "x" * 230]))
        files = {"params.json": dumps(PARAMS), f"consolidated.{middle}.pth": files[file]}
        file = "consolidated."
    return Case(files, (file,), draw(COMMANDS))


BOMBS = {
    "bytearray": program(Call(Name("builtins", "bytearray"), 2**31 - 1)),
    "set": program(Call(Name("builtins", "set"), [1])),
    "encode": program(Call(Name("_codecs", "encode"), "a" * 99, "idna")),
    "torch.Tensor": program(Call(Name("torch", "Tensor"), 2**30, 2**30)),
    "nested name": b"\x80\x02})" + b"\x85" * 90_000 + b"Ns.",
    "doubled name": b"\x80\x02})" + b"q\0h\0\x86" * 60 + b"Ns.",
    "doubled shape": b"\x80\x02}"
    + instructions("a")
    + instructions(Name("torch._utils", "_rebuild_tensor_v2"))
    + b"("
    + instructions(Persistent("FloatStorage", "0", 3))
    + b"K\0)"
    + b"q\0h\0\x86" * 60
    + b")\x89NtRs.",
    "many": b"\x80\x02" + b"N" * 900_000 + b".",
    "lists": b"\x80\x02]" + b"]a" * 400_000 + b".",
    "endless": b"\x80\x02}" + b"q\0" * 450_000 + b".",
    "memo": b"\x80\x02}" + b"".join(b"r" + struct.pack("<I", i) for i in range(90_000)) + instructions("a") + b"Ns.",
    "itself": b"\x80\x02}q\0" + instructions("a") + b"h\0s.",
    "a list of itself": b"\x80\x02}" + instructions("a") + b"]q\0h\0as.",
    "a long name": program({"x" * 900_000: 1}),
    "an odd name": program({"a\nb\x1b[31m": 1}),
    "half a surrogate": b"\x80\x02}X\x03\0\0\0\xed\xa0\x80Ns.",
}


@st.composite
def bombs(draw) -> Case:
    """Pickles that call nothing forbidden, and fill the memory, the stack or the time of who follows them."""
    pickled = BOMBS[draw(st.sampled_from(sorted(BOMBS)))]
    records = draw(st.sampled_from([None, {}, {"data/0": b"x" * 12}]))
    return Case(legacy(pickled, records), ("pytorch_model.bin",), draw(COMMANDS))


@functools.cache
def crowded(count: int) -> bytes:
    return archive(program(state()), sound_records() | {f"{i:030}": b"" for i in range(count)})


@st.composite
def archives(draw) -> Case:
    """Archives that are cut short, packed otherwise, or say another thing than their records."""
    how = draw(st.sampled_from(["cut", "packed", "record", "lacking", "twice", "big", "many", "pickle", "described"]))
    whole = archive(program(state()))
    sound = sound_records()
    key = draw(st.sampled_from(sorted(sound)))
    data = whole
    if how == "cut":
        data = draw(cut(whole))
    elif how == "packed":
        data = archive(program(state()), compression=draw(st.sampled_from([zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])))
    elif how == "record":
        changed = sound[key][:-1] if draw(st.booleans()) else sound[key] + draw(st.binary(min_size=1, max_size=99))
        data = archive(program(state()), sound | {key: changed})
    elif how == "lacking":
        data = archive(program(state()), {name: value for name, value in sound.items() if name != key})
    elif how == "twice":
        data = whole.replace(b"archive/data/3", b"archive/data/4")
    elif how == "big":
        data = archive(program(state()), sound | {draw(st.sampled_from(["x/BYTEorder", "byteorder"])): b"big"})
    elif how == "many":
        data = crowded(12_000)
    elif how == "pickle":
        pickled = program(state())
        data = archive(draw(cut(pickled) | noise))
    else:
        target = draw(name)
        shape = SHAPES[target]
        odd = {
            "offset": draw(st.sampled_from([1, -1, 10**9, "0"])),
            "shape": draw(st.sampled_from([(*shape, 2), (2**31 - 1,) * len(shape), (-1,) * len(shape), [8], "8"])),
            "strides": draw(st.sampled_from([(0,) * len(shape), (-1,) * len(shape), (1, 600, 3), ()])),
            "count": draw(st.sampled_from([0, 1, -1, 2**31 - 1, "8"])),
        }
        field = draw(st.sampled_from(sorted(odd)))
        data = archive(program(state() | {target: described(NAMES.index(target), shape, **{field: odd[field]})}))
    return Case(legacy() | {"pytorch_model.bin": data}, ("pytorch_model.bin",), draw(COMMANDS))
