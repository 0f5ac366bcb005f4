"""Model directories: every layout gives the same bits, and whatever is wrong with one is said at once."""

import ctypes
import errno
import gc
import hashlib
import json
import os
import random
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kernels.rotary import rotary_reference
from solar import checkpoint, tensorfile
from solar.checkpoint import CheckpointReader, load_model, save_model
from solar.config import ModelConfig
from solar.directory import Weight
from solar.elements import elements
from solar.jsonfile import brief
from solar.model import Transformer, rotary_table
from solar.plan import Source
from solar.tensorfile import read_safetensors_header
from tests.golden import tiny

MISTRALS = [case for case, config in tiny.CASES.items() if config["model_type"] == "mistral"]
SHARDS = 3

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """For models this small, several threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tensors_of(config: dict | str, dtype: str = "float32", seed: int = 0) -> dict[str, Tensor]:
    config = tiny.CASES[config] if isinstance(config, str) else config
    return {name: torch.from_numpy(a).to(getattr(torch, dtype)) for name, a in tiny.state(config, seed).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit: names, shapes, dtypes, values."""
    bits = lambda t: t.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    describe = lambda tensors: {name: (t.dtype, tuple(t.shape), bits(t)) for name, t in tensors.items()}
    return describe(a) == describe(b)


def snapshot(directory: Path) -> dict[str, str]:
    """Every file under a directory with the hash of its content, every directory, every link with its target."""
    found = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_dir():
            found[name] = "directory"
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


# ------------------------------------------------------------------------------------------------ layouts


def write_config(directory: Path, config: dict) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    return directory


def write_single(directory: Path, config: dict, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, write_config(directory, config) / "model.safetensors", metadata={"format": "pt"})
    return directory


def write_shards(directory: Path, config: dict, tensors: dict[str, Tensor], stem="model", suffix="safetensors") -> Path:
    """Tensors dealt out to the shards in an order that means nothing."""
    write_config(directory, config)
    names = random.Random(0).sample(sorted(tensors), len(tensors))
    weight_map = {}
    for number in range(SHARDS):
        file_name = f"{stem}-{number + 1:05}-of-{SHARDS:05}.{suffix}"
        shard = {name: tensors[name] for name in names[number::SHARDS]}
        weight_map |= dict.fromkeys(shard, file_name)
        (save_file if suffix == "safetensors" else torch.save)(shard, directory / file_name)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return directory


def write_hub_cache(directory: Path, config: dict, tensors: dict[str, Tensor]) -> Path:
    """As huggingface_hub keeps it: snapshots/REVISION/NAME is a link to ../../blobs/HASH."""
    blobs, snapshots = directory / "blobs", directory / "snapshots" / "26bca36bde8333b5d7f72e9ed20ccda6a618af24"
    blobs.mkdir(parents=True)
    snapshots.mkdir(parents=True)
    for path in write_shards(directory / "staged", config, tensors).iterdir():
        name = hashlib.sha256(path.read_bytes()).hexdigest()
        path.rename(blobs / name)
        (snapshots / path.name).symlink_to(Path("..", "..", "blobs", name))
    (directory / "staged").rmdir()
    return snapshots


def write_bin(directory: Path, config: dict, tensors: dict[str, Tensor]) -> Path:
    torch.save(tensors, write_config(directory, config) / "pytorch_model.bin")
    return directory


def write_bin_shards(directory: Path, config: dict, tensors: dict[str, Tensor]) -> Path:
    return write_shards(directory, config, tensors, "pytorch_model", "bin")


def to_release(config: dict, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mistral's names and its order of the rows of wq and wk.

    Row j of the half h (0 or 1) of a head stands at 2 j + h of that head: the numbers that turn together adjoin.
    """
    parts = {
        "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    whole = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}
    E = config["hidden_size"] // config["num_attention_heads"]
    out = {}
    for name, tensor in tensors.items():
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            layer, part = stem.removeprefix("model.layers.").split(".", 1)
            if part in ("self_attn.q_proj", "self_attn.k_proj"):
                released = torch.empty_like(tensor)
                for row in range(len(tensor)):
                    head, within = divmod(row, E)
                    half, j = divmod(within, E // 2)
                    released[head * E + 2 * j + half] = tensor[row]
                tensor = released
            out[f"layers.{layer}.{parts[part]}.weight"] = tensor
        else:
            out[f"{whole[stem]}.weight"] = tensor
    return out


def params_of(config: dict) -> dict:
    params = {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "head_dim": config["hidden_size"] // config["num_attention_heads"],
        "hidden_dim": config["intermediate_size"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "norm_eps": config["rms_norm_eps"],
        "vocab_size": config["vocab_size"],
        "rope_theta": config["rope_theta"],
        "sliding_window": config.get("sliding_window", 4096),
    }
    return {key: value for key, value in params.items() if value is not None}


def write_release(directory: Path, config: dict, tensors: dict[str, Tensor]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "params.json").write_text(json.dumps(params_of(config), indent=4))
    save_file(to_release(config, tensors), directory / "consolidated.safetensors")
    return directory


def write_release_pth(directory: Path, config: dict, tensors: dict[str, Tensor]) -> Path:
    """As v0.1 was first published, and in two files, as larger models were."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "params.json").write_text(json.dumps(params_of(config), indent=4))
    released = list(to_release(config, tensors).items())
    torch.save(dict(released[::2]), directory / "consolidated.00.pth")
    torch.save(dict(released[1::2]), directory / "consolidated.01.pth")
    return directory


Writer = Callable[[Path, dict, dict[str, Tensor]], Path]
HF_LAYOUTS: dict[str, Writer] = {
    "single": write_single,
    "shards": write_shards,
    "hub cache": write_hub_cache,
    "bin": write_bin,
    "bin shards": write_bin_shards,
}
LAYOUTS = HF_LAYOUTS | {"release": write_release, "release pth": write_release_pth}
KIND = {"bin": "bin", "bin shards": "bin", "release": "mistral", "release pth": "mistral"}


def logits_of(model: Transformer, T: int = 24) -> Tensor:
    ids = torch.from_numpy(tiny.token_ids(0, "ids", (2, T), model.config.vocab_size))
    with torch.no_grad():
        return model(ids)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", tiny.CASES)
def test_every_case_loads_bit_for_bit(case, dtype, tmp_path):
    model = load_model(tiny.write(case, tmp_path, dtype))
    assert list(model.state_dict()) == list(model.config.tensor_shapes())
    assert same(dict(model.state_dict()), tensors_of(case, dtype))
    assert all(type(parameter) is torch.nn.Parameter for parameter in model.parameters())


@pytest.mark.parametrize("layout", HF_LAYOUTS)
@pytest.mark.parametrize("case", ["llama_biases", "llama_tied", "mistral_window"])
def test_every_layout_of_hugging_face_gives_the_same_bits(case, layout, tmp_path):
    config, tensors = tiny.CASES[case], tensors_of(case, "bfloat16")
    directory = HF_LAYOUTS[layout](tmp_path / "model", config, tensors)
    assert CheckpointReader(directory).layout == KIND.get(layout, "safetensors")
    model = load_model(directory)
    assert model.config == ModelConfig.from_hf(config)
    assert same(dict(model.state_dict()), tensors)


@pytest.mark.parametrize("layout", ["release", "release pth"])
@pytest.mark.parametrize("case", MISTRALS)
def test_a_mistral_release_gives_the_bits_and_the_logits(case, layout, tmp_path):
    config, tensors = tiny.CASES[case], tensors_of(case)
    released = load_model(LAYOUTS[layout](tmp_path / "release", config, tensors))
    published = load_model(write_single(tmp_path / "hf", config, tensors))
    assert same(dict(released.state_dict()), tensors)
    assert released.config.sliding_window == published.config.sliding_window
    assert torch.equal(logits_of(released), logits_of(published))


def test_the_rows_of_a_release_turn_in_adjacent_pairs():
    """What a release means is its own code: neighbours as one complex number, times exp(i * position * frequency)."""
    config = ModelConfig.from_hf(tiny.CASES["mistral_window"])
    E, H, K, T = config.head_dim, config.num_attention_heads, config.num_key_value_heads, 11
    tensors = {name: tensor.double() for name, tensor in tensors_of("mistral_window").items()}
    released = to_release(tiny.CASES["mistral_window"], tensors)
    x = torch.randn(T, config.hidden_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    angles = torch.outer(torch.arange(T), 10_000.0 ** -(torch.arange(0, E, 2) / E).double())
    turn = lambda y: torch.view_as_complex(y.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angles), angles)
    heads = lambda weight, n: (x @ weight.T).view(T, n, E).transpose(0, 1)
    q = torch.view_as_real(turn(heads(released["layers.1.attention.wq.weight"], H))).flatten(-2)
    k = torch.view_as_real(turn(heads(released["layers.1.attention.wk.weight"], K))).flatten(-2)
    expected = q.unflatten(0, (K, -1)) @ k[:, None].mT

    q = heads(tensors["model.layers.1.self_attn.q_proj.weight"], H)[None]
    k = heads(tensors["model.layers.1.self_attn.k_proj.weight"], K)[None]
    q, k = rotary_reference(q, k, *rotary_table(torch.arange(T)[None], config))
    found = q[0].unflatten(0, (K, -1)) @ k[0][:, None].mT
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()  # cos and sin are fp32


def test_of_two_layouts_in_one_folder_the_one_of_config_json_counts(tmp_path):
    config, ours, theirs = (
        tiny.CASES["mistral_window"],
        tensors_of("mistral_window"),
        tensors_of("mistral_window", seed=1),
    )
    write_release(write_single(tmp_path, config, ours), config, theirs)  # as the repository of Mistral-7B v0.3
    reader = CheckpointReader(tmp_path)
    assert (reader.layout, list(reader.files)) == ("safetensors", ["model.safetensors"])
    assert same(dict(load_model(tmp_path).state_dict()), ours)
    (tmp_path / "model.safetensors").unlink()  # a download of the release alone, with the config
    assert same(dict(load_model(tmp_path).state_dict()), theirs)
    (tmp_path / "config.json").unlink()
    assert same(dict(load_model(tmp_path).state_dict()), theirs)


def test_safetensors_count_before_bin(tmp_path):
    config, new, old = tiny.CASES["llama_mha"], tensors_of("llama_mha"), tensors_of("llama_mha", seed=1)
    write_bin(tmp_path, config, old)
    assert same(dict(load_model(tmp_path).state_dict()), old)
    write_shards(tmp_path, config, new)
    assert same(dict(load_model(tmp_path).state_dict()), new)


def test_files_that_the_index_does_not_name_are_none_of_ours(tmp_path):
    tensors = tensors_of("llama_mha")
    write_shards(tmp_path, tiny.CASES["llama_mha"], tensors)
    (tmp_path / "model-00004-of-00004.safetensors").write_bytes(b"left over")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"something else")
    assert same(dict(load_model(tmp_path).state_dict()), tensors)


PARAMS = {
    "v0.1: a window and no theta": ({"rope_theta": None, "sliding_window": 7}, (10_000.0, 7)),
    "v0.3: a theta and no window": ({"rope_theta": 1e6, "sliding_window": None}, (1e6, None)),
    "a later alias of the window": ({"sliding_window": None, "_sliding_window": 5}, (10_000.0, 5)),
    "both": ({"rope_theta": 5e5, "sliding_window": 9}, (5e5, 9)),
}


@pytest.mark.parametrize("case", PARAMS)
def test_params_json_as_releases_spell_it(case, tmp_path):
    change, expected = PARAMS[case]
    write_release(tmp_path, tiny.CASES["mistral_window"], tensors_of("mistral_window", "float16"))
    params = json.loads((tmp_path / "params.json").read_text()) | change
    (tmp_path / "params.json").write_text(
        json.dumps({key: value for key, value in params.items() if value is not None})
    )
    config = CheckpointReader(tmp_path).config
    assert (config.rope_theta, config.sliding_window) == expected
    assert (config.model_type, config.torch_dtype) == ("mistral", "float16")  # the files say which


NOT_PARAMS = {
    "a mixture of experts": ({"moe": {"num_experts": 8, "num_experts_per_tok": 2}}, "'moe' is not supported"),
    "neither window nor theta": ({"sliding_window": None, "rope_theta": None}, "neither rope_theta nor sliding_window"),
    "no depth": ({"n_layers": None}, "missing n_layers"),
    "an embedding model": ({"causal": False}, "only causal"),
}


@pytest.mark.parametrize("case", NOT_PARAMS)
def test_params_json_that_cannot_be_followed(case, tmp_path):
    change, reason = NOT_PARAMS[case]
    write_release(tmp_path, tiny.CASES["mistral_window"], tensors_of("mistral_window"))
    params = json.loads((tmp_path / "params.json").read_text()) | change
    (tmp_path / "params.json").write_text(json.dumps(params))
    with pytest.raises(ValueError, match=rf"^{tmp_path}/params.json: params: .*{reason}"):
        CheckpointReader(tmp_path)


# ------------------------------------------------------------------------------------------------ problems

CONFIG = tiny.CASES["llama_mha"]
UNKNOWN = "in the files, unknown to this config: "
MISSING = "missing from the files, the config implies them: "
INT8 = "; only bfloat16, float16 and float32 weights are supported"


def drop(*names):
    return lambda config, tensors: [tensors.pop(name) for name in names]


def put(name: str, change: Callable[[Tensor], Tensor] = lambda tensor: torch.ones(3)):
    return lambda config, tensors: tensors.update({name: change(tensors.get(name)).contiguous()})


def say(**values):
    return lambda config, tensors: config.update(values)


def both(*changes):
    return lambda config, tensors: [change(config, tensors) for change in changes]


UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"
LAYER_2 = [name for name in tiny.shapes(CONFIG) if name.startswith("model.layers.2.")]
LAYER_2_SHOWN = ", ".join(sorted(LAYER_2)[:5]) + ", ... (9 in all)"
WRONG = {
    "one missing": (drop(UP), [MISSING + UP]),
    "a whole layer missing": (
        drop(*LAYER_2),
        ["num_hidden_layers is 3, but the files hold 2 layers", MISSING + LAYER_2_SHOWN],
    ),
    "a layer too many": (
        say(num_hidden_layers=2),
        ["num_hidden_layers is 2, but the files hold 3 layers", UNKNOWN + LAYER_2_SHOWN],
    ),
    "one unexpected": (put("model.layers.1.mlp.experts.weight"), [UNKNOWN + "model.layers.1.mlp.experts.weight"]),
    "a layer that is no number": (put("model.layers.x.weight"), [UNKNOWN + "model.layers.x.weight"]),
    "a layer without a name": (put("model.layers."), [UNKNOWN + "model.layers."]),
    "a name of 5000 digits": (put("a." + "9" * 5000), [UNKNOWN + brief("a." + "9" * 5000)]),
    "a name of two lines": (put("a\nb"), [UNKNOWN + "'a\\nb'"]),
    "a bias that the config denies": (
        put("model.layers.0.self_attn.q_proj.bias"),
        [UNKNOWN + "model.layers.0.self_attn.q_proj.bias"],
    ),
    "wrong shape": (
        put(UP, lambda t: t[:-1]),
        [f"{UP} in model.safetensors: shape [79, 48], the config implies [80, 48]"],
    ),
    "transposed": (
        put(UP, lambda t: t.t()),
        [f"{UP} in model.safetensors: shape [48, 80], the config implies [80, 48]"],
    ),
    "flattened": (
        put(UP, lambda t: t.flatten()),
        [f"{UP} in model.safetensors: shape [3840], the config implies [80, 48]"],
    ),
    "int8": (put(UP, lambda t: t.to(torch.int8)), [f"{UP} in model.safetensors: dtype int8{INT8}"]),
    "float8": (
        put(UP, lambda t: t.to(torch.float8_e4m3fn)),
        [f"{UP} in model.safetensors: dtype float8_e4m3fn{INT8}"],
    ),
    "float64": (put(NORM, lambda t: t.double()), [f"{NORM} in model.safetensors: dtype float64{INT8}"]),
    "a tied config with another lm_head": (
        say(tie_word_embeddings=True),
        [
            "lm_head.weight differs from model.embed_tokens.weight, but tie_word_embeddings is true; "
            "set it to false to use both"
        ],
    ),
    "another lm_head, and a tensor missing": (
        both(say(tie_word_embeddings=True), drop(NORM)),
        [
            "lm_head.weight differs from model.embed_tokens.weight, but tie_word_embeddings is true; "
            "set it to false to use both",
            MISSING + NORM,
        ],
    ),
    "an untied config without lm_head": (drop("lm_head.weight"), [MISSING + "lm_head.weight"]),
    "several at once": (
        both(drop(NORM), put("extra"), put(UP, lambda t: t.half()[:1]), put("lm_head.weight", lambda t: t.byte())),
        [
            MISSING + NORM,
            UNKNOWN + "extra",
            f"{UP} in model.safetensors: shape [1, 48], the config implies [80, 48]",
            f"lm_head.weight in model.safetensors: dtype uint8{INT8}",
        ],
    ),
}


def problems(directory: Path) -> list[str]:
    """What the reader says, line by line, without the directory and the bullets."""
    with pytest.raises(ValueError) as refusal:
        load_model(directory)
    text = str(refusal.value)
    assert text.startswith(f"{directory}: ")
    lines = text.removeprefix(f"{directory}: ").splitlines()
    if len(lines) == 1:
        return lines
    assert lines[0] == ""
    assert all(line.startswith("  - ") for line in lines[1:])
    return [line.removeprefix("  - ") for line in lines[1:]]


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_exactly(case, tmp_path):
    change, expected = WRONG[case]
    config, tensors = dict(CONFIG), tensors_of("llama_mha")
    change(config, tensors)
    assert problems(write_single(tmp_path, config, tensors)) == expected


def test_five_names_in_the_order_of_layers_and_a_count(tmp_path):
    config = CONFIG | {"num_hidden_layers": 12}
    tensors = tensors_of(config)
    gone = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(12)]
    drop(*gone)(config, tensors)
    assert problems(write_single(tmp_path / "a", config, tensors)) == [
        MISSING + ", ".join(gone[:5]) + ", ... (12 in all)"
    ]
    tensors |= dict.fromkeys(gone[3:], torch.ones(1))  # now only 0 to 2 are missing, and nine have a wrong shape
    found = problems(write_single(tmp_path / "b", config, {n: t.clone() for n, t in tensors.items()}))
    assert found[0] == MISSING + ", ".join(gone[:3])
    assert [line.split(" ")[0] for line in found[1:]] == gone[3:]  # layer 3 before layer 10, on every run


def test_a_hundred_problems_are_not_all_listed(tmp_path):
    config = CONFIG | {"num_hidden_layers": 12, "hidden_size": 96}
    found = problems(write_single(tmp_path, config, tensors_of(CONFIG | {"num_hidden_layers": 12})))
    assert len(found) == 21
    assert found[0] == "model.embed_tokens.weight in model.safetensors: shape [97, 48], the config implies [97, 96]"
    assert found[-1] == f"... and {3 + 12 * 9 - 20} more"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_missing_tensor_is_missed_in_every_layout(layout, tmp_path):
    tensors = tensors_of("mistral_window")
    whole = LAYOUTS[layout](tmp_path / "whole", tiny.CASES["mistral_window"], tensors)
    load_model(whole)
    del tensors["model.layers.2.self_attn.k_proj.weight"]
    directory = LAYOUTS[layout](tmp_path / "part", tiny.CASES["mistral_window"], tensors)
    assert problems(directory) == [MISSING + "model.layers.2.self_attn.k_proj.weight"]


@pytest.mark.parametrize("write", [write_release, write_release_pth], ids=["safetensors", "pth"])
def test_names_of_hugging_face_in_a_release_are_not_taken_for_its_own(write, tmp_path, monkeypatch):
    """Their q and k would be in the other order, and one of two tensors of the same name would win by chance."""
    config, name = tiny.CASES["mistral_window"], "model.layers.1.self_attn.q_proj.weight"
    tensors = tensors_of("mistral_window")
    released = to_release(config, tensors)
    monkeypatch.setattr(sys.modules[__name__], "to_release", lambda *_: released)
    released[name] = torch.zeros_like(tensors[name])
    assert problems(write(tmp_path / "two", config, tensors)) == [f"{UNKNOWN}{name} (not Mistral's)"]
    released |= {"layers.01.attention.wq.weight": released.pop("layers.1.attention.wq.weight")}
    del released[name]
    found = problems(write(tmp_path / "odd", config, tensors))
    assert found[-2:] == [MISSING + name, UNKNOWN + name.replace(".1.", ".01.")]


def test_a_config_of_a_billion_layers_is_refused_before_it_is_followed(tmp_path):
    write_single(tmp_path, CONFIG | {"num_hidden_layers": 2**31 - 1}, tensors_of("llama_mha"))
    with pytest.raises(
        ValueError, match=rf"{tmp_path}/config\.json: .*num_hidden_layers must be at most \d+, found 2147483647"
    ):
        CheckpointReader(tmp_path)


def test_tied_files_may_repeat_the_table_as_lm_head(tmp_path):
    config, tensors = tiny.CASES["llama_tied"], tensors_of("llama_tied")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    model = load_model(write_single(tmp_path / "a", config, tensors))
    assert "lm_head.weight" not in model.state_dict()
    tensors["lm_head.weight"][-1, -1] += 2**-20  # the last number of all
    assert "differs from" in problems(write_single(tmp_path / "b", config, tensors))[0]
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].half()
    assert "differs from" in problems(write_single(tmp_path / "c", config, tensors))[0]


def test_rotary_frequencies_of_old_writers_are_passed_over(tmp_path):
    tensors = tensors_of("llama_mha")
    old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(6) for i in range(3)}
    model = load_model(write_single(tmp_path / "a", CONFIG, tensors | old))
    assert same(dict(model.state_dict()), tensors)


def edit_index(directory: Path, change: Callable[[dict], object]) -> Path:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))
    return directory


OUTSIDE = [
    "../x.safetensors",
    "/etc/passwd",
    "a/b.safetensors",
    "a\\b",
    "x\0.safetensors",
    "",
    ".",
    "..",
    7,
    None,
    ["x"],
    "\ud800",
    "a\nb",
    "\x1b[31m",
    "n" * 256,
]


@pytest.mark.parametrize("shard", OUTSIDE, ids=repr)
def test_an_index_may_name_only_plain_files_of_its_directory(shard, tmp_path):
    tensors = tensors_of("llama_mha")
    directory = write_shards(tmp_path / "model", CONFIG, tensors)
    save_file({NORM: tensors[NORM]}, tmp_path / "x.safetensors")  # it would fit
    edit_index(directory, lambda weight_map: weight_map.update({NORM: shard}))
    with pytest.raises(
        ValueError, match=r"model\.safetensors\.index\.json: model\.norm\.weight is put into .*, which is not"
    ):
        load_model(directory)


@pytest.mark.parametrize("shard", ["none.safetensors", "n" * 200, "directory", "loop", "dangling"])
def test_a_shard_that_is_not_there(shard, tmp_path):
    directory = write_shards(tmp_path / "model", CONFIG, tensors_of("llama_mha"))
    (directory / "directory").mkdir()
    (directory / "loop").symlink_to("loop")
    (directory / "dangling").symlink_to("nowhere")
    edit_index(directory, lambda weight_map: weight_map.update({NORM: shard}))
    found = problems(directory)
    assert f"{shard}: named in the index, but there is no such file" in found
    assert not any("missing from the files" in line for line in found)  # one line explains it


INDEXES = {
    "not JSON": (b"{", "not valid JSON"),
    "a list": (b"[]", "no weight_map"),
    "no weight_map": (b'{"metadata": {}}', "no weight_map"),
    "an empty weight_map": (b'{"weight_map": {}}', "no weight_map"),
    "a tensor twice": (b'{"weight_map": {"a": "x", "a": "y"}}', "'a' stands twice"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_an_index_that_is_none(case, tmp_path):
    content, reason = INDEXES[case]
    directory = write_shards(tmp_path, CONFIG, tensors_of("llama_mha"))
    (directory / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"{directory}/model\.safetensors\.index\.json: .*{reason}"):
        load_model(directory)


def test_an_index_must_say_what_the_shards_hold(tmp_path):
    tensors = tensors_of("llama_mha")
    shards = [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
    fresh = lambda name: write_shards(tmp_path / name, CONFIG, tensors)

    directory = fresh("missing shard")
    (directory / shards[1]).unlink()
    assert problems(directory) == [f"{shards[1]}: named in the index, but there is no such file"]

    directory = fresh("wrong shard")
    home = next(shard for shard in shards if NORM in load_file(directory / shard))
    other = next(shard for shard in shards if shard != home)
    edit_index(directory, lambda weight_map: weight_map.update({NORM: other}))
    assert sorted(problems(directory)) == [
        f"in {home}, but not in the index's entries for it: {NORM}",
        f"not in {other}, though the index says so: {NORM}",
    ]

    directory = fresh("in two shards")
    save_file(load_file(directory / other) | {NORM: tensors[NORM]}, directory / other)
    assert sorted(problems(directory)) == [
        f"in {max(home, other)}, and in another file too: {NORM}",
        f"in {other}, but not in the index's entries for it: {NORM}",
    ]

    directory = fresh("in two shards, and another missing")
    save_file(load_file(directory / other) | {NORM: tensors[NORM]}, directory / other)
    edit_index(directory, lambda weight_map: weight_map.pop(UP))
    home_of_up = next(shard for shard in shards if UP in load_file(directory / shard))
    save_file({n: t for n, t in load_file(directory / home_of_up).items() if n != UP}, directory / home_of_up)
    assert MISSING + UP in problems(directory)

    directory = fresh("several at once")
    (directory / shards[0]).write_bytes((directory / shards[0]).read_bytes()[:-1])
    (directory / shards[2]).write_bytes(b"")
    found = problems(directory)
    assert len(found) == 2
    assert found[0].startswith(f"{shards[0]}: ")
    assert found[0].endswith("truncated, or trailing bytes")
    assert found[1].startswith(f"{shards[2]}: truncated or not a safetensors file: 0 bytes")


def test_a_release_in_two_parts_may_not_repeat_a_tensor(tmp_path):
    directory = write_release_pth(tmp_path, tiny.CASES["mistral_window"], tensors_of("mistral_window"))
    part = torch.load(directory / "consolidated.01.pth")
    torch.save(part | {"norm.weight": torch.ones(64)}, directory / "consolidated.01.pth")
    torch.save(
        torch.load(directory / "consolidated.00.pth") | {"norm.weight": torch.ones(64)},
        directory / "consolidated.00.pth",
    )
    assert problems(directory) == ["in consolidated.01.pth, and in another file too: norm.weight"]


def test_a_path_that_is_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="the path of the model is empty"):
        CheckpointReader("")
    with pytest.raises(FileNotFoundError, match="none: no such directory"):
        load_model(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="file: is not a directory"):
        load_model(tmp_path / "file")
    with pytest.raises(FileNotFoundError, match=r"no config\.json and no params\.json: not a model directory"):
        load_model(tmp_path)
    write_config(tmp_path, CONFIG)
    with pytest.raises(FileNotFoundError, match=r"a config but no weights; looked for model\.safetensors "):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(FileNotFoundError, match="a config but no weights"):
        load_model(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7", b"\xff", b'{"model_type": "gpt2"}', b'{"model_type": []}'])
def test_a_config_that_is_none_is_named(content, tmp_path):
    write_single(tmp_path, CONFIG, tensors_of("llama_mha"))
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/config\.json: "):
        load_model(tmp_path)


# ------------------------------------------------------------------------------------------------ loading


def test_of_mixed_dtypes_the_one_of_most_parameters_counts(tmp_path):
    tensors = {name: t if "norm" in name else t.bfloat16() for name, t in tensors_of("llama_mha").items()}
    write_single(tmp_path, CONFIG, tensors)  # its config says float32
    reader, model = CheckpointReader(tmp_path), load_model(tmp_path)
    assert reader.dtype == "bfloat16"
    assert reader.weights[NORM].dtype == "float32"
    assert same(dict(model.state_dict()), {name: t.bfloat16() for name, t in tensors.items()})


@pytest.mark.parametrize(
    "given", ["bfloat16", "bf16", torch.bfloat16, "float16", "fp16", "float32", "fp32", torch.float32]
)
def test_a_dtype_that_is_asked_for(given, tmp_path):
    write_single(tmp_path, CONFIG, tensors_of("llama_mha"))
    short = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    wanted = given if isinstance(given, torch.dtype) else short.get(given) or getattr(torch, given)
    expected = {name: tensor.to(wanted) for name, tensor in tensors_of("llama_mha").items()}
    assert same(dict(load_model(tmp_path, dtype=given).state_dict()), expected)


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_a_value_that_fp16_does_not_hold_is_named_on_the_way_in_and_out(stored, tmp_path):
    tensors = tensors_of("llama_mha", stored)
    tensors[NORM][3] = 1e5
    write_single(tmp_path / "wide", CONFIG, tensors)
    says = rf"^{NORM}: values up to \S+ do not fit torch\.float16; use bfloat16"
    with pytest.raises(ValueError, match=says):
        load_model(tmp_path / "wide", dtype="float16")
    with pytest.raises(ValueError, match=says):
        save_model(load_model(tmp_path / "wide"), tmp_path / "narrow", dtype="float16")
    assert not (tmp_path / "narrow").exists()
    tensors[NORM][3] = torch.inf  # is what it was
    write_single(tmp_path / "wide", CONFIG, tensors)
    assert load_model(tmp_path / "wide", dtype="float16").state_dict()[NORM][3] == torch.inf


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("threads", [1, 3])
def test_a_cast_in_pieces_is_a_cast(layout, threads, tmp_path, monkeypatch):
    """Pieces that end within a row, and a last one that is short; read by one thread, or by several at once."""
    monkeypatch.setattr(tensorfile, "CHUNK_BYTES", 250)
    config, tensors = tiny.CASES["mistral_window"], tensors_of("mistral_window", "float16")
    LAYOUTS[layout](tmp_path, config, tensors)
    directory = next(tmp_path.glob("snapshots/*"), tmp_path)
    torch.set_num_threads(threads)
    try:
        model = load_model(directory, dtype="float32")
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(1)
    assert same(dict(model.state_dict()), {name: tensor.float() for name, tensor in tensors.items()})


@pytest.mark.parametrize("rows", [2, 3])
def test_any_part_of_a_reordered_weight_is_that_part_of_the_whole(rows, tmp_path):
    """Of heads of four rows: parts that begin and end within a head, and within a row."""
    stored = torch.arange(rows * 4 * 5, dtype=torch.int16).view(rows * 4, 5)
    save_file({"wq": stored}, tmp_path / "x")
    weight = Weight(read_safetensors_header(tmp_path / "x")["wq"], rotary_heads=rows)
    whole = stored[[4 * head + row for head in range(rows) for row in (0, 2, 1, 3)]].flatten()
    for start in range(len(whole) + 1):
        for stop in range(start, len(whole) + 1):
            assert torch.equal(elements(weight, start, stop), whole[start:stop])


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_files_that_change_while_they_are_read_are_an_error(dtype, tmp_path, monkeypatch):
    write_single(tmp_path, CONFIG, tensors_of("llama_mha"))
    real = checkpoint.side_by_side if dtype else checkpoint.view_in

    def and_then(*arguments):
        os.utime(tmp_path / "model.safetensors")
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, real.__name__, and_then)
        with pytest.raises(ValueError, match=r"model\.safetensors: changed while it was read"):
            load_model(tmp_path, dtype=dtype)
    load_model(tmp_path, dtype=dtype)


@pytest.mark.parametrize("given", [torch.int8, torch.float64, torch.float8_e5m2, "int8", "half", "", 16])
def test_a_dtype_that_weights_cannot_have(given, tmp_path):
    model = load_model(write_single(tmp_path / "in", CONFIG, tensors_of("llama_mha")))
    with pytest.raises(ValueError, match="is not one of bfloat16, float16, float32"):
        load_model(tmp_path / "in", dtype=given)
    with pytest.raises(ValueError, match="is not one of bfloat16, float16, float32"):
        save_model(model, tmp_path / "out", dtype=given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("plan", [[Source(-1)], [Source(3)], [Source(0, "zero")], [], [Source(True)]], ids=repr)
def test_a_list_that_is_no_plan_of_this_model(plan, tmp_path):
    write_single(tmp_path, CONFIG, tensors_of("llama_mha"))
    with pytest.raises(ValueError, match="plan"):
        load_model(tmp_path, plan=plan)


def test_layers_of_a_plan_share_their_memory(tmp_path):
    write_single(tmp_path, CONFIG, tensors_of("llama_mha"))
    model = load_model(tmp_path, plan=[Source(0), Source(1), Source(1), Source(1, "identity"), Source(2)])
    layers = model.model.layers
    assert layers[1] is layers[2]
    assert layers[3] is not layers[1]
    assert layers[3].mlp.up_proj.weight.data_ptr() == layers[1].mlp.up_proj.weight.data_ptr()
    assert model.config.num_hidden_layers == 5
    assert list(model.state_dict()) == list(model.config.tensor_shapes())
    assert len(model.state_dict()) == len(list(model.named_parameters(remove_duplicate=False)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_what_was_loaded_never_reaches_the_files(layout, tmp_path):
    tensors = tensors_of("mistral_window")
    directory = LAYOUTS[layout](tmp_path / "model", tiny.CASES["mistral_window"], tensors)
    before = snapshot(tmp_path)
    model, other = load_model(directory), load_model(directory)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(3.0)
    assert snapshot(tmp_path) == before
    assert same(dict(other.state_dict()), tensors)  # nor anybody else's


def anonymous_bytes() -> int:
    """This process's memory that no file stands behind."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) << 10


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_are_mapped_and_not_read(tmp_path):
    """200 MB of weights, of which the disk holds only the header."""
    config = ModelConfig.from_hf(CONFIG | {"hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 1500})
    entries, at = {}, 0
    for name, shape in config.tensor_shapes().items():
        nbytes = torch.Size(shape).numel() * 4
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at := at + nbytes]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(tmp_path / "model.safetensors", 8 + len(header) + at)
    write_config(tmp_path, config.to_hf())
    assert at > 200_000_000

    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # what earlier tests have freed would be used again, and not be seen
    before = anonymous_bytes()
    model = load_model(tmp_path)
    assert anonymous_bytes() - before < 4_000_000
    assert model(torch.zeros(1, 1, dtype=torch.int64)).abs().max() == 0  # every page is touched
    assert anonymous_bytes() - before < 40_000_000
    cast = load_model(tmp_path, dtype="bfloat16")  # the ruler is right: this one has memory of its own
    assert anonymous_bytes() - before > 90_000_000
    assert cast.config == model.config


# ------------------------------------------------------------------------------------------------ saving


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", ["llama_biases", "llama_tied", "mistral_window_absent", "llama_rope_llama3_v5"])
def test_saved_and_loaded_is_the_same(case, dtype, tmp_path):
    model = load_model(tiny.write(case, tmp_path / "in", "bfloat16"))
    assert save_model(model, tmp_path / "new" / "out", dtype) == tmp_path / "new" / "out"
    expected = tensors_of(case, "bfloat16")
    expected = {name: tensor.to(getattr(torch, dtype or "bfloat16")) for name, tensor in expected.items()}
    again = load_model(tmp_path / "new" / "out")
    assert same(dict(again.state_dict()), expected)
    assert same(load_file(tmp_path / "new" / "out" / "model.safetensors"), expected)
    said = {field: getattr(model.config, field) for field in model.config.__dataclass_fields__}
    assert again.config == ModelConfig(**said | {"torch_dtype": dtype or "bfloat16"})
    assert sorted(os.listdir(tmp_path / "new" / "out")) == ["config.json", "model.safetensors"]


def test_saved_in_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "DEFAULT_MAX_SHARD_BYTES", 40_000)
    model = load_model(tiny.write("llama_mha", tmp_path / "in"))
    save_model(model, tmp_path / "out")
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 3
    assert same({name: t for file in files for name, t in load_file(file).items()}, tensors_of("llama_mha"))
    assert same(dict(load_model(tmp_path / "out").state_dict()), tensors_of("llama_mha"))


def test_shared_layers_are_written_each_for_itself(tmp_path):
    model = load_model(tiny.write("llama_mha", tmp_path / "in"), plan="stack")
    save_model(model, tmp_path / "out")
    again = load_model(tmp_path / "out")
    assert same(dict(again.state_dict()), dict(model.state_dict()))
    places = {parameter.data_ptr() for parameter in again.parameters()}
    assert len(places) == len(again.state_dict()) == 3 + 6 * 9
    with torch.no_grad():
        again.model.layers[0].mlp.up_proj.weight.zero_()
    assert bool(again.model.layers[3].mlp.up_proj.weight.any())


def test_a_model_may_take_the_place_of_the_files_that_it_is_mapped_from(tmp_path):
    tensors = tensors_of("llama_mha")
    model = load_model(write_single(tmp_path / "m", CONFIG, tensors))
    (tmp_path / "m" / "tokenizer.model").write_bytes(b"pieces")
    with torch.no_grad():
        model.model.norm.weight.fill_(5.0)
    save_model(model, tmp_path / "m", force=True, companions=tmp_path / "m")
    expected = tensors | {NORM: torch.full((48,), 5.0)}
    assert same(dict(load_model(tmp_path / "m").state_dict()), expected)
    assert same(dict(model.state_dict()), expected)  # and the one in memory still is what it was
    assert (tmp_path / "m" / "tokenizer.model").read_bytes() == b"pieces"
    assert os.listdir(tmp_path) == ["m"]


def test_companions_by_content(tmp_path):
    model = load_model(tiny.write("llama_mha", tmp_path / "in"))
    save_model(model, tmp_path / "out", companions={"tokenizer.model": b"\0\xff", "LICENSE": b"free\r\n"})
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"\0\xff"
    assert (tmp_path / "out" / "LICENSE").read_bytes() == b"free\r\n"


@pytest.mark.parametrize("existing", [False, True], ids=["new", "replaced"])
def test_a_write_that_fails_anywhere_leaves_everything_as_it_was(existing, tmp_path):
    """The kernel itself refuses, after so many bytes of one file."""
    model = load_model(tiny.write("llama_mha", tmp_path / "in"))
    total = (tmp_path / "in" / "model.safetensors").stat().st_size
    if existing:
        save_model(load_model(tiny.write("llama_mqa", tmp_path / "other")), tmp_path / "out")
    before, (soft, hard) = snapshot(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 4, 100, 5000, total // 2, total - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(OSError, match="File too large") as failure:
                save_model(model, tmp_path / "out", force=existing)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert failure.value.errno == errno.EFBIG
        assert failure.value.filename.endswith("model.safetensors")
        assert snapshot(tmp_path) == before
    save_model(model, tmp_path / "out", force=existing)
    assert same(dict(load_model(tmp_path / "out").state_dict()), tensors_of("llama_mha"))


def test_what_force_may_replace(tmp_path):
    model = load_model(tiny.write("llama_mha", tmp_path / "in"))
    (tmp_path / "empty").mkdir()
    save_model(model, tmp_path / "empty")  # an empty directory is not in the way
    tiny.write("llama_mqa", tmp_path / "model")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("model")
    before = snapshot(tmp_path)
    for name, force, reason in (
        ("model", False, "exists already: .* --force"),
        ("home", False, "exists already"),
        ("home", True, "is not just a model"),
        ("file", True, "not a directory"),
        ("link", True, "not a directory"),
    ):
        with pytest.raises(FileExistsError, match=rf"{name} exists.*{reason}|{name} {reason}"):
            save_model(model, tmp_path / name, force=force)
    assert snapshot(tmp_path) == before
    (tmp_path / "model" / "old.bin").write_text("of the old model")
    save_model(model, tmp_path / "model", force=True)
    assert sorted(os.listdir(tmp_path / "model")) == ["config.json", "model.safetensors"]
    assert sorted(os.listdir(tmp_path)) == ["empty", "file", "home", "in", "link", "model"]
    shutil.rmtree(tmp_path / "home")


def test_a_fingerprint_sees_small_changes_and_a_whole_one_sees_every_byte(tmp_path):
    config = ModelConfig(
        model_type="llama", vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, max_position_embeddings=32,
    )  # fmt: skip
    model = Transformer(config)
    model.init_weights(0)
    prints = lambda name: tuple(CheckpointReader(tmp_path / name).fingerprint(whole) for whole in (False, True))
    save_model(model, tmp_path / "base")
    save_model(model, tmp_path / "copy")
    assert prints("base") == prints("copy")
    with torch.no_grad():
        model.lm_head.weight.view(-1)[513] += 1  # between two of the places that are sampled
    save_model(model, tmp_path / "one")
    assert prints("one")[0] == prints("base")[0]
    assert prints("one")[1] != prints("base")[1]
    with torch.no_grad():
        model.lm_head.weight[48:] += 1e-3
    save_model(model, tmp_path / "half")
    assert prints("half")[0] != prints("base")[0]


def test_a_model_is_loaded_in_inference_mode_as_outside():
    base = ROOT / "solar/assets/base"
    with torch.inference_mode():
        inside = load_model(base, dtype="float32")
    outside = load_model(base, dtype="float32")
    assert not any(parameter.is_inference() for parameter in inside.parameters())
    assert all(map(torch.equal, inside.parameters(), outside.parameters()))
