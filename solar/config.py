"""`ModelConfig`: the shape of a model, as `config.json` spells it.

Read from Hugging Face's `config.json` (model_type `llama` or `mistral`, the spelling of today and of transformers 5)
and from the `params.json` of Mistral's own releases; written back as a `config.json` that transformers opens. What this
code cannot run faithfully is refused by name. A key that it does not know is reported with a warning, never dropped
unseen.

Shapes: D hidden, F intermediate, H query heads, K kv heads, E head_dim, V vocab.
"""

import math
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from solar.jsonfile import brief, plain

MODEL_TYPES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
# A layer's parameters in the order in which the forward pass comes to them.
ORDER = {
    "input_layernorm": 0, "q_proj": 1, "k_proj": 1, "v_proj": 1, "o_proj": 2, "post_attention_layernorm": 3,
    "gate_proj": 4, "up_proj": 4, "down_proj": 5,
}  # fmt: skip
MAX_LAYERS = 10_000  # a config that asks for more is broken, and would fill the memory with names alone

# Keys of config.json that say nothing about the forward pass, or nothing that the tensors do not say themselves.
# (attention_dropout acts only in training, and no published Llama or Mistral uses one; pretraining_tp only says in how
# many slices a projection was once computed.)
INERT_KEYS = frozenset(
    [
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "auto_map",
        "dtype",
        "id2label",
        "label2id",
        "max_length",
        "pretraining_tp",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "use_cache",
        "use_bfloat16",
        "is_llama_config",
        "rope_interleaved",
        "unsloth_version",
        "unsloth_fixed",
    ]
)


@dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies are stretched beyond the context length of the first training.

    `linear` divides each frequency by `factor` (arXiv:2306.15595). `llama3` divides only those whose wavelength is
    longer than `original_max_position_embeddings / low_freq_factor`, leaves those shorter than
    `original_max_position_embeddings / high_freq_factor`, and blends in between (arXiv:2407.21783, section 3.4.1).
    """

    rope_type: str
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None


@dataclass(frozen=True)
class ModelConfig:
    """The fields of `config.json` that decide what the model computes. ValueError lists every field that is off."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    model_type: str = "llama"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None  # a query sees this many keys, its own included; None: all of them
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    torch_dtype: str | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self):
        if problems := list(self._problems()):
            raise ValueError("config: " + "; ".join(problems))

    def _problems(self):
        sizes = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
        sizes += ["num_key_value_heads", "head_dim", "max_position_embeddings"]
        sizes += ["sliding_window"] if self.sliding_window is not None else []
        for name in sizes:
            value = getattr(self, name)
            if type(value) is not int or not 0 < value < 2**31:
                yield f"{name} must be a positive whole number, found {brief(value)}"
            elif name == "num_hidden_layers" and value > MAX_LAYERS:
                yield f"{name} must be at most {MAX_LAYERS}, found {value}"
        for name in ("rms_norm_eps", "rope_theta", "initializer_range"):
            if not _is_positive(getattr(self, name)):
                yield f"{name} must be a positive number, found {brief(getattr(self, name))}"
        for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
            if type(getattr(self, name)) is not bool:
                yield f"{name} must be true or false, found {brief(getattr(self, name))}"
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            ids = value if name == "eos_token_id" and isinstance(value, tuple) else (value,)
            if value is not None and not all(type(i) is int and abs(i) < 2**31 for i in ids):
                yield f"{name} must be a whole number, found {brief(value)}"
        if self.model_type not in MODEL_TYPES:
            yield f"model_type {brief(self.model_type)} is not supported, only {' and '.join(MODEL_TYPES)}"
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if type(heads) is type(kv_heads) is int and kv_heads > 0 and heads % kv_heads:
            yield f"num_attention_heads {brief(heads)} is not a multiple of num_key_value_heads {brief(kv_heads)}"
        if type(self.head_dim) is int and self.head_dim % 2:
            yield f"head_dim {brief(self.head_dim)} is odd; rotary embedding turns pairs"
        if self.model_type == "llama" and self.sliding_window is not None:
            yield f"a llama has no sliding_window, found {self.sliding_window}; model_type mistral has one"
        if self.model_type == "mistral" and (self.attention_bias or self.mlp_bias):
            yield "a mistral has no biases; model_type llama may have them"

    # ------------------------------------------------------------------------------------------------ reading

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> "ModelConfig":
        """From the content of a `config.json`. Raises ValueError naming what is missing, wrong or not supported."""
        if not isinstance(raw, dict):
            raise ValueError(f"config: expected a JSON object, found {type(raw).__name__}")
        null_matters = ("sliding_window", "num_key_value_heads")
        raw = {key: value for key, value in raw.items() if value is not None or key in null_matters}
        model_type = raw.pop("model_type", None)
        if model_type not in tuple(MODEL_TYPES):
            raise ValueError(
                f"config: model_type {brief(model_type)} is not supported, only {' and '.join(MODEL_TYPES)}"
            )
        _refuse_what_cannot_run(raw, model_type)

        sizes = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
        if missing := [name for name in sizes if name not in raw]:
            raise ValueError(f"config: missing {', '.join(missing)}")
        heads, hidden = raw["num_attention_heads"], raw["hidden_size"]
        if "head_dim" not in raw:
            if not (type(heads) is type(hidden) is int and heads > 0 and hidden % heads == 0):
                sizes = f"hidden_size {brief(hidden)} is not a multiple of num_attention_heads {brief(heads)}"
                raise ValueError(f"config: {sizes}")
            raw["head_dim"] = hidden // heads
        # What a key means when it is absent is the model class's own default, and the two classes differ.
        if model_type == "mistral":
            raw.setdefault("num_key_value_heads", 8)  # absent means 8, null means as many as query heads
            raw.setdefault("max_position_embeddings", 4096 * 32)
            raw.setdefault("sliding_window", 4096)  # absent means 4096, null means none
        else:
            if raw.pop("sliding_window", None) is not None:
                warnings.warn("config: sliding_window ignored: model_type llama has none", stacklevel=2)
        if raw.get("num_key_value_heads") is None:
            raw["num_key_value_heads"] = heads
        theta, scaling = _read_rope(raw)
        eos = raw.get("eos_token_id")
        dtype = raw.get("torch_dtype", raw.get("dtype"))
        if dtype is not None and not (isinstance(dtype, str) and dtype.removeprefix("torch.").isidentifier()):
            raise ValueError(f"config: torch_dtype must be the name of a dtype, found {brief(dtype)}")
        known = set(cls.__dataclass_fields__) - {
            "model_type",
            "rope_theta",
            "rope_scaling",
            "torch_dtype",
            "eos_token_id",
        }
        config = cls(
            model_type=model_type,
            rope_theta=theta,
            rope_scaling=scaling,
            torch_dtype=dtype.removeprefix("torch.") if dtype is not None else None,
            eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
            **{key: value for key, value in raw.items() if key in known},
        )
        handled = known | INERT_KEYS | {"rope_theta", "rope_scaling", "rope_parameters", "eos_token_id", "hidden_act"}
        handled |= {"partial_rotary_factor", "num_local_experts", "num_experts"}  # passed: they ask for nothing special
        unknown = [key for key, value in raw.items() if key not in handled and value not in (False, 0, "", [], {})]
        _warn_of_unknown("config", unknown)
        return config

    @classmethod
    def from_mistral(cls, params: dict[str, Any]) -> "ModelConfig":
        """From the content of a Mistral release's `params.json`. Raises ValueError as `from_hf` does."""
        if not isinstance(params, dict):
            raise ValueError(f"params: expected a JSON object, found {type(params).__name__}")
        params = {key: value for key, value in params.items() if value is not None}
        for key in ("moe", "quantization", "vision_encoder", "multimodal", "lora", "ssm_cfg", "yarn", "q_lora_rank"):
            if params.get(key):
                raise ValueError(f"params: {key!r} is not supported; solar runs dense Mistral-7B-like models")
        sizes = ["dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "vocab_size", "norm_eps"]
        if missing := [name for name in sizes if name not in params]:
            raise ValueError(f"params: missing {', '.join(missing)}")
        window = params.get("sliding_window", params.get("_sliding_window"))
        if "rope_theta" not in params and window is None:
            raise ValueError(
                "params: neither rope_theta nor sliding_window is given: add the rope_theta of this release"
            )
        handled = {*sizes, "n_kv_heads", "sliding_window", "_sliding_window", "rope_theta", "max_seq_len", "model_type"}
        handled |= {"max_position_embeddings", "tied_embeddings", "causal", "max_batch_size"}
        if params.get("causal") is False or params.get("model_type", "transformer") != "transformer":
            raise ValueError("params: only causal transformers are supported")
        _warn_of_unknown("params", [key for key in params if key not in handled])
        return cls(
            model_type="mistral",
            vocab_size=params["vocab_size"],
            hidden_size=params["dim"],
            intermediate_size=params["hidden_dim"],
            num_hidden_layers=params["n_layers"],
            num_attention_heads=params["n_heads"],
            num_key_value_heads=params.get("n_kv_heads", params["n_heads"]),
            head_dim=params["head_dim"],
            max_position_embeddings=params.get("max_position_embeddings", params.get("max_seq_len", 32768)),
            rms_norm_eps=params["norm_eps"],
            rope_theta=params.get("rope_theta", 10_000.0),  # v0.1 has a window, states no theta, and means 1e4
            sliding_window=window,
            tie_word_embeddings=params.get("tied_embeddings", False),
            torch_dtype="bfloat16",
            bos_token_id=1,
            eos_token_id=2,
        )

    # ------------------------------------------------------------------------------------------------ writing

    def to_hf(self) -> dict[str, Any]:
        """The content of a `config.json` that transformers (4 and 5), vLLM and llama.cpp open."""
        out: dict[str, Any] = {"architectures": [MODEL_TYPES[self.model_type]], "model_type": self.model_type}
        out |= {name: value for name, value in asdict(self).items() if name != "model_type"}
        out["hidden_act"] = "silu"
        if self.rope_scaling is not None:
            out["rope_scaling"] = {key: value for key, value in out["rope_scaling"].items() if value is not None}
        if isinstance(self.eos_token_id, tuple):
            out["eos_token_id"] = list(self.eos_token_id)
        if self.model_type == "llama":
            del out["sliding_window"]
        else:
            del out["attention_bias"], out["mlp_bias"]  # MistralConfig has neither
        return {key: value for key, value in out.items() if value is not None or key == "sliding_window"}

    def with_depth(self, num_hidden_layers: int, model_type: str = "llama") -> "ModelConfig":
        """The config of an up-scaled model: another depth and, with `model_type="llama"`, the type of SOLAR itself.

        A llama has no sliding window, so its context is cut to the window: within it the logits are the same.
        """
        if model_type not in ("llama", "keep"):
            raise ValueError(f"model_type must be llama or keep, found {model_type!r}")
        config = replace(self, num_hidden_layers=num_hidden_layers)
        if model_type == "keep" or self.model_type == "llama":
            return config
        context = min(self.max_position_embeddings, self.sliding_window or self.max_position_embeddings)
        return replace(config, model_type="llama", sliding_window=None, max_position_embeddings=context)

    # ------------------------------------------------------------------------------------------------ shapes

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name (without `model.layers.N.`) -> shape of each tensor of one decoder layer."""
        D, F, E = self.hidden_size, self.intermediate_size, self.head_dim
        H, K = self.num_attention_heads, self.num_key_value_heads
        projections = {
            "self_attn.q_proj": (H * E, D),
            "self_attn.k_proj": (K * E, D),
            "self_attn.v_proj": (K * E, D),
            "self_attn.o_proj": (D, H * E),
            "mlp.gate_proj": (F, D),
            "mlp.up_proj": (F, D),
            "mlp.down_proj": (D, F),
        }
        shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (D,)}
        for name, shape in projections.items():
            if name == "mlp.gate_proj":
                shapes["post_attention_layernorm.weight"] = (D,)
            shapes[f"{name}.weight"] = shape
            if self.attention_bias if name.startswith("self_attn") else self.mlp_bias:
                shapes[f"{name}.bias"] = shape[:1]
        return shapes

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor of a checkpoint with this config, in the order they are written."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, self.hidden_size)}
        of_one_layer = self.layer_shapes().items()
        for layer in range(self.num_hidden_layers):
            shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in of_one_layer}
        shapes["model.norm.weight"] = (self.hidden_size,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())

    def training_flops(self, sequence_length: int, trained: Iterable[str] | None = None) -> int:
        """Operations for one token of training, forward and backward, in sequences of that many tokens.

        The convention of arXiv:2204.02311, appendix B: 6 for each parameter that takes part in a product (not those of
        the embedding table, which is looked up), and 12 L H E T for the attention, not halved for causality.
        trained: names of the parameters that learn, if not all do. What is frozen has no gradient of its own: 4 for
        each parameter; and below the first that learns nothing is propagated: 2, and 4 H E T.
        """
        L, table = self.num_hidden_layers, "model.embed_tokens.weight"
        sizes = {name: math.prod(shape) for name, shape in self.tensor_shapes().items()}

        def place(name: str) -> tuple[int, int]:
            """Where the forward pass multiplies by it."""
            if not name.startswith("model.layers."):
                return L, int(name != "model.norm.weight")
            _, _, layer, *_, part, _ = name.split(".")
            return int(layer), ORDER[part]

        learns = set(sizes if trained is None else trained)
        first = min((-1, 0) if name == table else place(name) for name in learns)
        products = {name: size for name, size in sizes.items() if name != table or self.tie_word_embeddings}
        forward = sum(products.values())
        of_inputs = sum(size for name, size in products.items() if place(name) > first)
        of_weights = sum(size for name, size in products.items() if name in learns)
        attentions = L + 2 * sum((layer, ORDER["q_proj"]) >= first for layer in range(L))  # forward, and twice backward
        attention = 4 * self.num_attention_heads * self.head_dim * sequence_length
        return 2 * (forward + of_inputs + of_weights) + attention * attentions


def _warn_of_unknown(where: str, keys: list[str]) -> None:
    shown = ", ".join(map(plain, sorted(keys)[:10])) + (f", ... ({len(keys)} in all)" if len(keys) > 10 else "")
    if keys:
        warnings.warn(f"{where}: keys that are not known here, and have no effect: {shown}", stacklevel=3)


def _refuse_what_cannot_run(raw: dict[str, Any], model_type: str) -> None:
    """Raise ValueError for everything in a config that would change the logits and is not implemented."""
    architectures = raw.get("architectures") or [MODEL_TYPES[model_type]]
    if not isinstance(architectures, list) or MODEL_TYPES[model_type] not in architectures:
        raise ValueError(
            f"config: architectures {brief(architectures)} is not supported, only {MODEL_TYPES[model_type]}"
        )
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"config: hidden_act {brief(raw['hidden_act'])} is not supported, only silu")
    if raw.get("quantization_config"):
        raise ValueError(
            "config: quantised weights (quantization_config) are not supported; use the bf16 or fp16 release"
        )
    if (experts := raw.get("num_local_experts", raw.get("num_experts"))) not in (None, 0, 1):
        raise ValueError(f"config: a mixture of {brief(experts)} experts is not supported")
    if layer_types := raw.pop("layer_types", None):
        windowed = raw.get("sliding_window", 4096 if model_type == "mistral" else None) is not None
        expected = "sliding_attention" if windowed and model_type == "mistral" else "full_attention"
        if not isinstance(layer_types, list) or any(kind != expected for kind in layer_types):
            raise ValueError(f"config: layer_types other than {expected!r} in every layer are not supported")


def _read_rope(raw: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """rope_theta and scaling from either spelling: `rope_theta` with `rope_scaling`, or `rope_parameters`."""
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(raw.get(key, {}), dict):
            raise ValueError(f"config: {key} must be an object, found {brief(raw[key])}")
    parameters, scaling = dict(raw.get("rope_parameters", {})), dict(raw.get("rope_scaling", {}))
    if any(isinstance(value, dict) for value in parameters.values()):
        raise ValueError("config: rope_parameters that differ from layer to layer are not supported")
    for partial in (raw.get("partial_rotary_factor", 1.0), parameters.pop("partial_rotary_factor", 1.0)):
        if partial != 1.0:
            raise ValueError(f"config: partial_rotary_factor {brief(partial)} is not supported, only 1.0")
    thetas = [source["rope_theta"] for source in (raw, parameters) if "rope_theta" in source]
    if len(thetas) == 2 and thetas[0] != thetas[1]:
        raise ValueError(f"config: rope_theta {brief(thetas[0])} and rope_parameters disagree: {brief(thetas[1])}")
    theta = thetas[0] if thetas else 10_000.0
    parameters.pop("rope_theta", None)
    if scaling and parameters and scaling != parameters:
        raise ValueError(f"config: rope_scaling {brief(scaling)} and rope_parameters disagree: {brief(parameters)}")
    values = scaling or parameters
    kind = values.pop("rope_type", None) or values.pop("type", None) or "default"
    values.pop("type", None)  # old and new spelling side by side
    wanted = {
        "default": set(),
        "linear": {"factor"},
        "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    }
    if kind not in tuple(wanted):
        raise ValueError(f"config: rope_scaling of type {brief(kind)} is not supported, only linear and llama3")
    if set(values) != wanted[kind]:
        raise ValueError(
            f"config: rope_scaling {kind} needs exactly {sorted(wanted[kind])}, found {brief(sorted(values))}"
        )
    if kind == "default":
        return theta, None
    for key, value in values.items():
        if not _is_positive(value):
            raise ValueError(f"config: rope_scaling {key} must be a positive number, found {brief(value)}")
    if kind == "llama3" and values["high_freq_factor"] <= values["low_freq_factor"]:
        raise ValueError("config: rope_scaling high_freq_factor must be greater than low_freq_factor")
    return theta, RopeScaling(kind, **values)


def _is_positive(value: Any) -> bool:
    """Whether it is a number above 0 that a tensor of int64 or fp32 can hold: not true, not NaN, not 10**400."""
    return type(value) in (int, float) and 0 < value < 2**63


MISTRAL_7B = ModelConfig(
    model_type="mistral",
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=32768,
    rms_norm_eps=1e-5,
    sliding_window=4096,
    torch_dtype="bfloat16",
    bos_token_id=1,
    eos_token_id=2,
)
SOLAR_10_7B = MISTRAL_7B.with_depth(48)
LLAMA_2_7B = ModelConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=128,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    torch_dtype="float16",
    bos_token_id=1,
    eos_token_id=2,
)
# A Mistral in miniature, the embedded base (solar/base.py): 11 MB in bf16.
TINY = ModelConfig(
    model_type="mistral",
    vocab_size=2048,
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=12,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    sliding_window=1024,
    initializer_range=0.05,
    torch_dtype="bfloat16",
    bos_token_id=1,
    eos_token_id=2,
)
