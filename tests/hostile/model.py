"""The model that hostile directories start from, written byte by byte, so that every byte can be wrong."""

import io
import json
import struct
import zipfile
from dataclasses import dataclass, field
from typing import Any

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 600,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
}
PARAMS = {
    "dim": 8,
    "n_layers": 2,
    "head_dim": 4,
    "hidden_dim": 12,
    "n_heads": 2,
    "n_kv_heads": 1,
    "norm_eps": 1e-5,
    "vocab_size": 600,
    "rope_theta": 10000.0,
}
LAYER = {
    "input_layernorm": (8,),
    "self_attn.q_proj": (8, 8),
    "self_attn.k_proj": (4, 8),
    "self_attn.v_proj": (4, 8),
    "self_attn.o_proj": (8, 8),
    "post_attention_layernorm": (8,),
    "mlp.gate_proj": (12, 8),
    "mlp.up_proj": (12, 8),
    "mlp.down_proj": (8, 12),
}
SHAPES = {
    "model.embed_tokens.weight": (600, 8),
    **{f"model.layers.{i}.{name}.weight": shape for i in (0, 1) for name, shape in LAYER.items()},
    "model.norm.weight": (8,),
    "lm_head.weight": (600, 8),
}
NAMES = list(SHAPES)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]


@dataclass(frozen=True)
class Case:
    """A hostile directory, and what must be said of it.

    files: name -> bytes, or a function of the path that makes something else than a file. named: one of these must
    stand in the refusal. command: which program reads it. arguments: more of its flags; in them, and in an index,
    {beside} is the folder that the directory stands in. extra: files there. header: bytes that a reader may hold
    beyond the bound on memory.
    """

    files: dict[str, Any]
    named: tuple[str, ...]
    command: str = "upscale"
    arguments: tuple[str, ...] = ()
    extra: dict[str, bytes] = field(default_factory=dict)
    header: int = 0

    def _repr_pretty_(self, printer, _) -> None:  # of Hypothesis, which would print all of it
        shown = {name: str(content)[:800] for name, content in (self.files | self.extra).items()}
        printer.text(f"Case({self.command} {' '.join(self.arguments)}, {shown})")


# ------------------------------------------------------------------------------------------------ a whole model


def numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def entries(names: list[str], dtype: str = "BF16") -> dict[str, dict]:
    """The header of a safetensors file with these tensors, as JSON would say it."""
    header, at = {}, 0
    for name in names:
        size = numel(SHAPES[name]) * 2
        header[name] = {"dtype": dtype, "shape": list(SHAPES[name]), "data_offsets": [at, at := at + size]}
    return header


def shard(header: dict | bytes, size: int | None = None, length: int | None = None) -> bytes:
    """A file of this header and as much data, of this length announced; by default what the header says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    if size is None:
        size = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    return struct.pack("<Q", len(text) if length is None else length) + text + weights(size)


def weights(size: int) -> bytes:
    """Of a period that no tensor has, so that no two are equal."""
    return (bytes(range(61)) * (size // 61 + 1))[:size]


def single(header: dict | bytes | None = None, **more) -> dict[str, Any]:
    return {"config.json": dumps(CONFIG), SINGLE: shard(entries(NAMES) if header is None else header, **more)}


def sharded() -> dict[str, Any]:
    files: dict[str, Any] = {"config.json": dumps(CONFIG)}
    files |= {file: shard(entries(NAMES[i::3])) for i, file in enumerate(SHARDS)}
    return files | {INDEX: dumps(index())}


def index() -> dict[str, Any]:
    return {"metadata": {}, "weight_map": {name: SHARDS[i % 3] for i, name in enumerate(NAMES)}}


def dumps(value: Any) -> bytes:
    return json.dumps(value).encode()


class Persistent:
    """What a pickle of torch.save has in place of a storage."""

    def __init__(self, kind: str, key: str, count: int):
        self.stated = ("storage", Name("torch", kind), key, "cpu", count)


class Name:
    """A global, or a call of one, in a pickle that is written without importing it."""

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name


class Call:
    def __init__(self, function: Name, *arguments: Any):
        self.function, self.arguments = function, arguments


def program(value: Any, protocol: int = 2) -> bytes:
    """A pickle of plain values, names and calls, instruction by instruction."""
    return b"\x80" + bytes([protocol]) + instructions(value) + b"."


def instructions(value: Any) -> bytes:
    match value:
        case Name(module=module, name=name):
            return f"c{module}\n{name}\n".encode()
        case Call(function=function, arguments=arguments):
            return instructions(function) + instructions(arguments) + b"R"
        case Persistent(stated=stated):
            return instructions(stated) + b"Q"
        case bool():
            return b"\x88" if value else b"\x89"
        case None:
            return b"N"
        case int():
            return b"J" + struct.pack("<i", value)
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case tuple():
            return b"(" + b"".join(map(instructions, value)) + b"t"
        case list():
            return b"](" + b"".join(map(instructions, value)) + b"e"
        case dict():
            return b"}(" + b"".join(instructions(key) + instructions(v) for key, v in value.items()) + b"u"
    raise AssertionError(value)


def described(key: int, shape: tuple[int, ...], /, **change: Any) -> Call:
    """A tensor of bfloat16 as torch.save describes it; or with another offset, shape, strides or count."""
    strides = tuple(numel(shape[i + 1 :]) for i in range(len(shape)))
    told = {"offset": 0, "shape": shape, "strides": strides, "count": numel(shape)} | change
    storage = Persistent("BFloat16Storage", str(key), told["count"])
    hooks = Call(Name("collections", "OrderedDict"))
    rebuild = Name("torch._utils", "_rebuild_tensor_v2")
    return Call(rebuild, storage, told["offset"], told["shape"], told["strides"], False, hooks)


def state() -> dict[str, Any]:
    return {name: described(key, shape) for key, (name, shape) in enumerate(SHAPES.items())}


def archive(pickled: bytes, records: dict[str, bytes] | None = None, **how) -> bytes:
    """The zip archive of torch.save around a pickle."""
    if records is None:
        records = sound_records()
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", **how) as file:
        for name, data in {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n", **records}.items():
            file.writestr(f"archive/{name}", data)
    return out.getvalue()


def sound_records() -> dict[str, bytes]:
    return {f"data/{key}": weights(2 * numel(shape)) for key, shape in enumerate(SHAPES.values())}


def legacy(pickled: bytes | None = None, records=None, **how) -> dict[str, Any]:
    return {
        "config.json": dumps(CONFIG),
        "pytorch_model.bin": archive(pickled or program(state()), records, **how),
    }


def release() -> dict[str, Any]:
    parts = {
        "input_layernorm": "attention_norm",
        "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
    }
    whole = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}
    header = {}
    for name, entry in entries(NAMES).items():
        stem = name.removesuffix(".weight")
        if stem in whole:
            header[f"{whole[stem]}.weight"] = entry
        else:
            _, _, layer, part = stem.split(".", 3)
            header[f"layers.{layer}.{parts[part]}.weight"] = entry
    return {"params.json": dumps(PARAMS), "consolidated.safetensors": shard(header)}
