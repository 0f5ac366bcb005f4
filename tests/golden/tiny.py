"""Tiny checkpoints, the same on every machine: the peers' golden numbers are made from them, and our tests load them.

`CASES` holds one `config.json` per feature that changes the logits, spelt as published files spell it. The weights are
not stored anywhere: `state` draws them from the raw bits of numpy's PCG64, whose stream (unlike that of
`Generator.normal`) is promised never to change. They are large on purpose, so that a forward pass with one detail wrong
is off by far more than rounding.

Shapes: D hidden, F intermediate, H query heads, K kv heads, E head_dim, V vocab.
"""

import json
import math
import zlib
from pathlib import Path

import numpy as np

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 48,
    "initializer_range": 0.02,
    "intermediate_size": 80,
    "max_position_embeddings": 512,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.34.0",
    "use_cache": True,
    "vocab_size": 97,
}
_MISTRAL = _LLAMA | {  # without the key `sliding_window`, which each case below sets, or leaves out
    "architectures": ["MistralForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "model_type": "mistral",
    "num_key_value_heads": 2,
    "vocab_size": 101,
}
# The 8 pairs of channels of a head turn with wavelengths of 6.3, 20, 63, 199, ... positions. With a first training on
# 64 positions, the first is kept (below 64/4), the next two blended, the others (above 64/1) stretched by the factor.
_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
_LONG = _LLAMA | {"hidden_size": 64, "num_key_value_heads": 2, "vocab_size": 128}

CASES: dict[str, dict] = {
    # The first Llama files do not name num_key_value_heads: as many as query heads.
    "llama_mha": {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"},
    # A head_dim of its own: 4 heads of 16 channels on a hidden size of 48. Four layers: this one is up-scaled, too.
    "llama_gqa_head_dim": _LLAMA | {"head_dim": 16, "num_key_value_heads": 2, "num_hidden_layers": 4},
    # One kv head for all, and an epsilon that is large enough to be seen.
    "llama_mqa": _LLAMA | {"num_key_value_heads": 1, "rms_norm_eps": 1e-2},
    "llama_tied": _LLAMA | {"tie_word_embeddings": True},
    # In a Llama, `attention_bias` gives all four projections a bias, o_proj too.
    "llama_biases": _LLAMA | {"attention_bias": True, "mlp_bias": True},
    "llama_rope_theta": _LLAMA | {"rope_theta": 1000000.0},
    "llama_rope_linear": _LONG | {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama_rope_llama3": _LONG | {"rope_scaling": _LLAMA3 | {"rope_type": "llama3"}},
    # The same model as the one before, as transformers 5 spells it: the logits must be the same, too.
    "llama_rope_llama3_v5": {key: _LONG[key] for key in _LONG if key not in ("rope_theta", "torch_dtype")}
    | {
        "dtype": "float32",
        "head_dim": 16,
        "rope_parameters": _LLAMA3 | {"rope_theta": 10000.0, "rope_type": "llama3"},
        "transformers_version": "5.23.0",
    },
    # Seven keys per query, its own included. The same weights three times: only the window differs.
    "mistral_window": _MISTRAL | {"sliding_window": 7},
    "mistral_window_null": _MISTRAL | {"sliding_window": None},
    "mistral_window_absent": dict(_MISTRAL),  # absent means 4096, so a short text has the logits of the case before
}

# Small enough that whole merged models can be stored.
MERGED = _LLAMA | {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 29}


def uniform(seed: int, name: str, shape: tuple[int, ...], mean: float, std: float) -> np.ndarray:
    """fp32 numbers, flatly distributed with this mean and deviation; every (seed, name) has a stream of its own."""
    bits = np.random.PCG64([seed, zlib.crc32(name.encode())]).random_raw(math.prod(shape))
    unit = (bits >> np.uint64(11)).astype(np.float64) / 2**53  # [0, 1)
    return (mean + std * math.sqrt(12) * (unit - 0.5)).astype(np.float32).reshape(shape)


def token_ids(seed: int, name: str, shape: tuple[int, ...], vocab_size: int) -> np.ndarray:
    """Random token ids (int64), from the same kind of stream as the weights."""
    bits = np.random.PCG64([seed, zlib.crc32(name.encode())]).random_raw(math.prod(shape))
    return (bits % np.uint64(vocab_size)).astype(np.int64).reshape(shape)


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that a checkpoint with this config holds."""
    D, F, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    H = config["num_attention_heads"]
    K = config.get("num_key_value_heads", H)
    E = config.get("head_dim", D // H)
    attention = {"q_proj": (H * E, D), "k_proj": (K * E, D), "v_proj": (K * E, D), "o_proj": (D, H * E)}
    mlp = {"gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F)}
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for part, biased, projections in (
            ("self_attn.", config.get("attention_bias", False), attention),
            ("mlp.", config.get("mlp_bias", False), mlp),
        ):
            for name, shape in projections.items():
                out[f"{prefix}{part}{name}.weight"] = shape
                if biased:
                    out[f"{prefix}{part}{name}.bias"] = shape[:1]
        out[f"{prefix}input_layernorm.weight"] = (D,)
        out[f"{prefix}post_attention_layernorm.weight"] = (D,)
    out["model.norm.weight"] = (D,)
    if not config["tie_word_embeddings"]:
        out["lm_head.weight"] = (V, D)
    return out


def state(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Name -> fp32 array, of every tensor. Two configs with the same shapes get the same weights from one seed."""
    out = {}
    for name, shape in shapes(config).items():
        mean = 1.0 if "norm" in name else 0.0
        std = 0.2 if name.endswith("_proj.weight") else 0.3
        out[name] = uniform(seed, name, shape, mean, std)
    return out


def to_merge() -> list[dict[str, np.ndarray]]:
    """The fp32 tensors of three models of `MERGED`; a few of the second are special cases beside the first's."""
    models = [state(MERGED, seed) for seed in (1, 2, 3)]
    first, second, _ = models
    attention, mlp = "model.layers.0.self_attn.{}_proj.weight", "model.layers.0.mlp.{}_proj.weight"
    second[attention.format("q")] = -first[attention.format("q")]  # opposite
    second[attention.format("k")] = np.zeros_like(first[attention.format("k")])
    first[mlp.format("up")] = np.zeros_like(first[mlp.format("up")])
    near = second[attention.format("v")] * np.float32(0.01)
    second[attention.format("v")] = first[attention.format("v")] * np.float32(1.5) + near  # nearly parallel
    far = second[mlp.format("gate")]
    second[mlp.format("gate")] = far - first[mlp.format("gate")]  # an obtuse angle
    return models


def write(case: str, directory: str | Path, dtype: str = "float32", seed: int = 0) -> Path:
    """Write a case as a Hugging Face directory: config.json and model.safetensors. Returns the directory.

    torch does the cast, which rounds to nearest, ties to even.
    """
    import torch
    from safetensors.torch import save_file

    config = dict(CASES[case])
    config["dtype" if "dtype" in config else "torch_dtype"] = dtype
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {name: torch.from_numpy(array).to(getattr(torch, dtype)) for name, array in state(config, seed).items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
