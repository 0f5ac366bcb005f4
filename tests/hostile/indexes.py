"""Indexes that lead astray, and configs at odds with the tensors."""

from typing import Any

from hypothesis import strategies as st

from tests.hostile.model import (
    CONFIG,
    INDEX,
    NAMES,
    PARAMS,
    SHARDS,
    SINGLE,
    Case,
    dumps,
    entries,
    index,
    release,
    shard,
    sharded,
    single,
)
from tests.hostile.values import COMMANDS, SPECIAL, anything, cut, junk_text, name, no_json


@st.composite
def index_out(draw) -> Case:
    """A shard that is no plain name of a file in the directory; `../outside.safetensors` would fit."""
    outside = ["../outside.safetensors", "/etc/passwd", "{beside}/outside.safetensors", "./../outside.safetensors"]
    outside += ["..", ".", "", "/", "~/x", "a/../../outside.safetensors", "..\\outside.safetensors", "C:\\x"]
    outside += ["x\0.safetensors", f"{SHARDS[0]}\0", "\x1b[31m", "a\nb", "n" * 300, "é" * 128, "\ud800", "\u202ex"]
    odd = st.sampled_from(outside) | st.builds(lambda a, b: f"{a}/{b}", junk_text, junk_text)
    files, content = sharded(), index()
    moved = draw(st.sets(name, min_size=1, max_size=3))
    not_text = anything.filter(lambda value: not isinstance(value, str))
    content["weight_map"] |= dict.fromkeys(moved, draw(odd | not_text))
    return Case(files | {INDEX: dumps(content)}, (INDEX,), draw(COMMANDS))


@st.composite
def index_missing(draw) -> Case:
    """A shard that is not there, or is no file."""
    files, content = sharded(), index()
    plain = st.from_regex(r"[a-zA-Z0-9_. -]{1,60}", fullmatch=True).filter(lambda s: s not in (".", "..", *files))
    gone = draw(plain | st.sampled_from(SHARDS))
    if gone in files:
        del files[gone]
        if draw(st.booleans()):
            files[gone] = draw(st.sampled_from(SPECIAL))
    content["weight_map"] |= dict.fromkeys(draw(st.sets(name, min_size=1, max_size=3)), gone)
    return Case(files | {INDEX: dumps(content)}, (gone,), draw(COMMANDS))


@st.composite
def index_twice(draw) -> Case:
    """A tensor in two shards, of which the index says so or not."""
    files, at = sharded(), draw(st.integers(0, 2))
    extra = draw(st.sampled_from(NAMES[(at + 1) % 3 :: 3]))
    names = [*NAMES[at::3], extra]
    files[SHARDS[at]] = shard(entries(names))
    return Case(files, (extra,), draw(COMMANDS))


@st.composite
def index_wrong(draw) -> Case:
    """A tensor that stands in another shard than the index says, or in none, or that it does not name."""
    files, content, target = sharded(), index(), draw(name)
    how = draw(st.sampled_from(["moved", "left out", "swapped", "renamed"]))
    weight_map = content["weight_map"]
    home = weight_map[target]
    other = draw(st.sampled_from([file for file in SHARDS if file != home]))
    if how == "moved":
        weight_map[target] = other
    elif how == "left out":
        del weight_map[target]
    elif how == "swapped":
        files[home], files[other] = files[other], files[home]
        target = home
    else:
        weight_map[draw(junk_text.filter(lambda text: text not in NAMES))] = weight_map.pop(target)
    return Case(files | {INDEX: dumps(content)}, (target,), draw(COMMANDS))


@st.composite
def index_noise(draw) -> Case:
    whole = dumps(index())
    bad = draw(no_json | cut(whole) | anything.filter(lambda value: not _has_map(value)).map(dumps))
    return Case(sharded() | {INDEX: bad}, (INDEX,), draw(COMMANDS))


def _has_map(value: Any) -> bool:
    return isinstance(value, dict) and "weight_map" in value


# ------------------------------------------------------------------------------------------------ the config

# What a field may not be beside these tensors, also where it would be a sound config.
ODDS: dict[str, list[Any]] = {
    "vocab_size": [599, 601, 1, 2**31 - 1],
    "hidden_size": [4, 16, 2**31 - 2],
    "intermediate_size": [11, 13, 8, 2**31 - 1],
    "num_hidden_layers": [1, 3, 50, 10_000, 10_001, 2**31 - 1],
    "num_attention_heads": [1, 4, 3],
    "num_key_value_heads": [2, 8, 3],
    "head_dim": [2, 8, 6, 5],
    "tie_word_embeddings": [True],
    "attention_bias": [True],
    "mlp_bias": [True],
    "model_type": ["mistral", "gpt2", "mixtral", "LLAMA"],
    "architectures": [["GPT2LMHeadModel"], ["MixtralForCausalLM"]],
    "hidden_act": ["gelu", "relu"],
    "rope_scaling": [{"type": "yarn", "factor": 2.0}, {"type": "linear"}, {"rope_type": "llama3", "factor": 1.0}],
    "quantization_config": [{"bits": 4}],
    "num_local_experts": [8],
    "layer_types": [["sliding_attention"] * 2],
    "max_position_embeddings": [0, -1, 2**31, 64.0],
    "rms_norm_eps": [0, -1e-5, 1e400],
    "rope_theta": [0, -1.0, 2**63],
    "initializer_range": [0, -1],
    "bos_token_id": ["1", 2**31, [1]],
    "eos_token_id": ["2", [2, None], 10**30],
    "pad_token_id": [0.5, 2**40],
    "torch_dtype": [16, "float 32", ["float32"], "\x1b[31m"],
}
NO_FIELD = anything.filter(lambda value: value is not None and not isinstance(value, int | float | bool | str))


@st.composite
def config_odds(draw, field: str) -> Case:
    value = draw(st.sampled_from(ODDS[field]))
    changed = CONFIG | {field: value}
    if draw(st.booleans()):
        changed |= {"zz": draw(anything)}  # unknown, so only a warning
    if value == "mistral":
        del changed["architectures"]  # a mistral it is; but then the biases and tensors of a llama do not fit
        changed["attention_bias"] = True
    return Case(
        single() | {"config.json": dumps(changed)}, (field, "config.json", SINGLE, "the config implies"), draw(COMMANDS)
    )


@st.composite
def config_types(draw) -> Case:
    """A field of another type than it has."""
    fields = [name for name in CONFIG if name not in ("hidden_act", "architectures", "eos_token_id")]
    field = draw(st.sampled_from(fields))
    return Case(single() | {"config.json": dumps(CONFIG | {field: draw(NO_FIELD)})}, ("config.json",), draw(COMMANDS))


@st.composite
def config_noise(draw) -> Case:
    gone = draw(st.sampled_from(["vocab_size", "model_type", "num_attention_heads"]))
    lacking = {key: value for key, value in CONFIG.items() if key != gone}
    no_config = anything.filter(lambda value: not isinstance(value, dict) or "model_type" not in value)
    bad = no_json | cut(dumps(CONFIG)) | no_config.map(dumps) | st.just(dumps(lacking))
    return Case(single() | {"config.json": draw(bad)}, ("config.json",), draw(COMMANDS))


@st.composite
def params(draw) -> Case:
    """Of Mistral's own layout."""
    odds = {"dim": [4, 16], "n_layers": [1, 3], "head_dim": [2, 8], "hidden_dim": [11, 24], "n_heads": [1, 4]}
    odds |= {"n_kv_heads": [2], "vocab_size": [599], "norm_eps": [0], "rope_theta": [0]}
    field = draw(st.sampled_from(sorted(odds)))
    changed = PARAMS | {field: draw(st.sampled_from(odds[field]) | NO_FIELD)}
    other = st.sampled_from([{"moe": {"num_experts": 8}}, {"causal": False}, {"quantization": {"a": 1}}])
    bad = draw(st.just(dumps(changed)) | other.map(lambda more: dumps(PARAMS | more)) | no_json | cut(dumps(PARAMS)))
    return Case(
        release() | {"params.json": bad},
        ("params.json", "consolidated.safetensors", "the config implies", "unknown to this config"),
        draw(COMMANDS),
    )
