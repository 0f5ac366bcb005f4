"""Configs as they lie on disk: what is read, what it means when it is absent, what is refused and in which words."""

import json
import math
import re
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import kernels
from solar.config import LLAMA_2_7B, MISTRAL_7B, SOLAR_10_7B, TINY, ModelConfig, RopeScaling
from solar.model import Transformer
from tests.golden import tiny

pytestmark = pytest.mark.filterwarnings("error")

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "vocab_size": 101,
}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "num_key_value_heads": 2}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
PRESETS = {"MISTRAL_7B": MISTRAL_7B, "SOLAR_10_7B": SOLAR_10_7B, "LLAMA_2_7B": LLAMA_2_7B, "TINY": TINY}
CONFIGS = PRESETS | {case: ModelConfig.from_hf(raw) for case, raw in tiny.CASES.items()}
CONFIGS["with every id"] = replace(TINY, bos_token_id=0, eos_token_id=(2, 7), pad_token_id=-1)
CONFIGS["mistral of 40 layers"] = MISTRAL_7B.with_depth(40, "keep")


# ------------------------------------------------------------ there and back


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip(name):
    written = json.loads(json.dumps(CONFIGS[name].to_hf()))
    assert ModelConfig.from_hf(written) == CONFIGS[name]
    assert written == CONFIGS[name].to_hf()  # nothing in it that JSON would change
    assert written["hidden_act"] == "silu"
    assert ("sliding_window" in written) == (CONFIGS[name].model_type == "mistral")


positive = st.integers(1, 2**31 - 1)
scalings = st.none() | st.builds(RopeScaling, st.just("linear"), st.floats(0.1, 1e4))
scalings |= st.builds(
    RopeScaling, st.just("llama3"), st.floats(1, 64), st.floats(0.5, 1), st.floats(2, 8), st.integers(1, 10**6)
)


@settings(max_examples=50)
@given(data=st.data(), scaling=scalings, heads=st.integers(1, 64), groups=st.integers(1, 8))
def test_round_trip_of_any_config(data, scaling, heads, groups):
    model_type = data.draw(st.sampled_from(["llama", "mistral"]))
    bias = st.booleans() if model_type == "llama" else st.just(False)
    config = ModelConfig(
        model_type=model_type,
        vocab_size=data.draw(positive),
        hidden_size=data.draw(positive),
        intermediate_size=data.draw(positive),
        num_hidden_layers=data.draw(st.integers(1, 10_000)),
        num_attention_heads=heads * groups,
        num_key_value_heads=heads,
        head_dim=2 * data.draw(st.integers(1, 512)),
        max_position_embeddings=data.draw(positive),
        rms_norm_eps=data.draw(st.floats(1e-12, 1)),
        rope_theta=data.draw(st.floats(1, 1e9) | st.integers(1, 10**9)),
        rope_scaling=scaling,
        sliding_window=data.draw(st.none() | positive) if model_type == "mistral" else None,
        tie_word_embeddings=data.draw(st.booleans()),
        attention_bias=data.draw(bias),
        mlp_bias=data.draw(bias),
        eos_token_id=data.draw(st.none() | st.integers(0, 9) | st.lists(st.integers(0, 9)).map(tuple)),
    )
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_parameter_counts_of_the_papers():
    assert MISTRAL_7B.num_parameters() == 7_241_732_096
    assert SOLAR_10_7B.num_parameters() == 10_731_524_096
    assert MISTRAL_7B.with_depth(40).num_parameters() == 8_986_628_096
    assert LLAMA_2_7B.num_parameters() == 6_738_415_616


@pytest.mark.parametrize("case", tiny.CASES)
def test_tensor_shapes_are_those_of_the_checkpoint(case):
    assert ModelConfig.from_hf(tiny.CASES[case]).tensor_shapes() == tiny.shapes(tiny.CASES[case])


def test_with_depth():
    assert SOLAR_10_7B.num_hidden_layers == 48
    assert SOLAR_10_7B.model_type == "llama"
    assert SOLAR_10_7B.sliding_window is None
    assert SOLAR_10_7B.max_position_embeddings == 4096  # within the window the logits are the same
    kept = MISTRAL_7B.with_depth(48, "keep")
    assert kept == replace(MISTRAL_7B, num_hidden_layers=48)
    assert replace(MISTRAL_7B, sliding_window=None).with_depth(48).max_position_embeddings == 32768
    assert LLAMA_2_7B.with_depth(40) == replace(LLAMA_2_7B, num_hidden_layers=40)
    with pytest.raises(ValueError, match="gpt2"):
        MISTRAL_7B.with_depth(48, "gpt2")


# ------------------------------------------------------------ what absence means


def test_defaults_of_the_two_model_classes():
    llama, mistral = ModelConfig.from_hf(LLAMA), ModelConfig.from_hf(MISTRAL)
    assert (llama.num_key_value_heads, llama.head_dim, llama.max_position_embeddings) == (4, 16, 2048)
    assert (mistral.num_key_value_heads, mistral.head_dim, mistral.max_position_embeddings) == (2, 16, 131072)
    for config in (llama, mistral):
        assert (config.rms_norm_eps, config.rope_theta, config.tie_word_embeddings) == (1e-6, 10_000.0, False)
        assert config.rope_scaling is config.torch_dtype is config.eos_token_id is None
    assert ModelConfig.from_hf(LLAMA | {"rope_theta": None, "head_dim": None, "rope_scaling": None}) == llama


def test_sliding_window_absent_is_4096_and_null_is_none():
    assert ModelConfig.from_hf(MISTRAL).sliding_window == 4096
    assert ModelConfig.from_hf(MISTRAL | {"sliding_window": None}).sliding_window is None
    assert ModelConfig.from_hf(MISTRAL | {"sliding_window": 7}).sliding_window == 7
    assert ModelConfig.from_hf(LLAMA | {"sliding_window": None}).sliding_window is None
    with pytest.warns(UserWarning, match="sliding_window ignored"):
        assert ModelConfig.from_hf(LLAMA | {"sliding_window": 7}).sliding_window is None


def test_a_mistral_without_kv_heads_has_eight_and_with_null_as_many_as_query_heads():
    heads = {"num_attention_heads": 16}
    absent = {key: value for key, value in MISTRAL.items() if key != "num_key_value_heads"} | heads
    assert ModelConfig.from_hf(absent).num_key_value_heads == 8
    assert ModelConfig.from_hf(absent | {"num_key_value_heads": None}).num_key_value_heads == 16
    assert ModelConfig.from_hf(LLAMA | heads | {"num_key_value_heads": None}).num_key_value_heads == 16


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        ),
        ({"rope_scaling": LLAMA3 | {"rope_type": "llama3"}}, {"rope_parameters": LLAMA3 | {"rope_type": "llama3"}}),
        (
            {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"rope_type": "llama3", "type": "llama3"}},
            {"rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 5e5}},
        ),
        (
            {"rope_theta": 5e5},
            {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 500000, "partial_rotary_factor": 1.0}},
        ),
        ({"torch_dtype": "bfloat16"}, {"dtype": "torch.bfloat16"}),
        ({"hidden_act": "silu"}, {"hidden_act": "swish"}),
        ({}, {"partial_rotary_factor": 1.0, "num_local_experts": 1, "num_experts": 0, "quantization_config": None}),
        ({}, {"layer_types": ["full_attention"] * 3}),
    ],
)
def test_both_spellings_mean_the_same(old, new):
    assert ModelConfig.from_hf(LLAMA | old) == ModelConfig.from_hf(LLAMA | new)


def test_layer_types_that_say_what_the_window_says():
    sliding = {"layer_types": ["sliding_attention"] * 3}
    assert ModelConfig.from_hf(MISTRAL | sliding).sliding_window == 4096
    full = {"layer_types": ["full_attention"] * 3, "sliding_window": None}
    assert ModelConfig.from_hf(MISTRAL | full).sliding_window is None


# ------------------------------------------------------------ what is refused

linear = lambda factor: {"rope_scaling": {"type": "linear", "factor": factor}}
REFUSED = [
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "dynamic"),
    ({"rope_parameters": {"rope_type": "longrope", "factor": 4.0}}, "longrope"),
    ({"rope_scaling": {"type": ["linear"], "factor": 4.0}}, "rope_scaling of type"),
    ({"rope_scaling": {"type": "linear"}}, "factor"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta": 1}}, "beta"),
    ({"rope_scaling": {"factor": 2.0}}, "factor"),
    ({"rope_scaling": {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta"),
    ({"rope_scaling": LLAMA3 | {"rope_type": "llama3", "low_freq_factor": 4.0}}, "low_freq_factor"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "original_max_position_embeddings"),
    ({"rope_scaling": "linear"}, "rope_scaling must be an object"),
    ({"rope_parameters": [1, 2]}, "rope_parameters must be an object"),
    (linear(0.0), "factor"),
    (linear(-1), "factor"),
    (linear("4"), "factor"),
    (linear(True), "factor"),
    (linear(math.nan), "factor"),
    (linear(math.inf), "factor"),
    (linear(10**400), "factor"),
    (linear(None), "factor"),
    ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta 10000.0 .* 500000.0"),
    (linear(2.0) | {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, "rope_scaling .* disagree"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 1e6}}}, "layer"),
    ({"rope_parameters": {"rope_theta": [1e4]}}, "rope_theta"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}, "partial_rotary_factor 0.25"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"hidden_act": "gelu_pytorch_tanh"}, "gelu_pytorch_tanh"),
    ({"num_local_experts": 8}, "8 experts"),
    ({"num_experts": 64}, "64 experts"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
    ({"architectures": 5}, "architectures 5"),
    ({"model_type": "qwen2"}, "qwen2"),
    ({"model_type": "mixtral"}, "mixtral"),
    ({"model_type": None}, "model_type None"),
    ({"model_type": ["llama"]}, "model_type"),
    ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types"),
    ({"layer_types": "full_attention"}, "layer_types"),
    ({"num_attention_heads": 5}, "hidden_size 64 is not a multiple of num_attention_heads 5"),
    ({"num_attention_heads": 0}, "num_attention_heads 0"),
    ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
    ({"num_key_value_heads": 0}, "num_key_value_heads"),
    ({"head_dim": 15}, "head_dim 15 is odd"),
    ({"hidden_size": 60, "num_attention_heads": 4}, "head_dim 15 is odd"),
    ({"num_hidden_layers": 2_000_000_000}, "num_hidden_layers must be at most"),
    ({"vocab_size": 2**31}, "vocab_size"),
    ({"rms_norm_eps": 0}, "rms_norm_eps"),
    ({"rope_theta": -1.0}, "rope_theta"),
    ({"tie_word_embeddings": "true"}, "tie_word_embeddings must be true or false"),
    ({"attention_bias": 1}, "attention_bias must be true or false"),
    ({"bos_token_id": "1"}, "bos_token_id"),
    ({"eos_token_id": {"id": 1}}, "eos_token_id"),
    ({"eos_token_id": [1, [2]]}, "eos_token_id"),
    ({"eos_token_id": [1, True]}, "eos_token_id"),
    ({"pad_token_id": 0.0}, "pad_token_id"),
]


@pytest.mark.parametrize(("change", "says"), REFUSED, ids=[json.dumps(change)[:60] for change, _ in REFUSED])
def test_what_cannot_run_is_refused_by_name(change, says):
    with pytest.raises(ValueError, match=says):
        ModelConfig.from_hf(LLAMA | change)


SIZES = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
NUMBERS = ["rms_norm_eps", "rope_theta", "initializer_range"]


@pytest.mark.parametrize("value", ["32", True, math.nan, math.inf, 1e400, 10**400, -1, [32], {"a": 32}, "", 32.5])
@pytest.mark.parametrize("name", [*SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings", *NUMBERS])
def test_wrong_types_are_refused_by_name(name, value):
    if value == 32.5 and name in NUMBERS:
        assert getattr(ModelConfig.from_hf(LLAMA | {name: value}), name) == 32.5
        return
    with pytest.raises(ValueError, match=name):
        ModelConfig.from_hf(LLAMA | {name: value})


@pytest.mark.parametrize("value", ["32", True, 0, -1, 4096.0, [7]])
def test_a_window_that_is_none(value):
    with pytest.raises(ValueError, match="sliding_window"):
        ModelConfig.from_hf(MISTRAL | {"sliding_window": value})


def test_what_only_one_model_type_has():
    for bias in ("attention_bias", "mlp_bias"):
        assert getattr(ModelConfig.from_hf(LLAMA | {bias: True}), bias)
        with pytest.raises(ValueError, match="mistral has no biases"):
            ModelConfig.from_hf(MISTRAL | {bias: True})
    with pytest.raises(ValueError, match="llama has no sliding_window"):
        replace(LLAMA_2_7B, sliding_window=7)
    with pytest.raises(ValueError, match="layer_types"):
        ModelConfig.from_hf(MISTRAL | {"layer_types": ["full_attention"] * 3})


def test_every_problem_is_listed_at_once():
    with pytest.raises(ValueError) as error:
        replace(LLAMA_2_7B, vocab_size=0, rms_norm_eps="1e-5", head_dim=3, num_key_value_heads=5)
    for name in ("vocab_size", "rms_norm_eps", "head_dim 3", "num_key_value_heads 5"):
        assert name in str(error.value)


@pytest.mark.parametrize("name", SIZES)
def test_what_is_missing_is_named(name):
    with pytest.raises(ValueError, match=f"missing {name}"):
        ModelConfig.from_hf({key: value for key, value in LLAMA.items() if key != name})


@pytest.mark.parametrize("raw", [None, [], "llama", 5, {}])
def test_what_is_no_config_at_all(raw):
    for read in (ModelConfig.from_hf, ModelConfig.from_mistral):
        with pytest.raises(ValueError):
            read(raw)


def test_unknown_keys_are_reported_by_name():
    with pytest.warns(UserWarning, match=r"no effect: attn_logit_softcap, zz_top$"):
        config = ModelConfig.from_hf(LLAMA | {"zz_top": 3, "attn_logit_softcap": 50.0, "use_cache": True, "off": False})
    assert config == ModelConfig.from_hf(LLAMA)
    with pytest.warns(UserWarning, match="no effect: use_biases"):
        ModelConfig.from_mistral(V02 | {"use_biases": True})


# ------------------------------------------------------------ Mistral's own releases

V01 = {
    "dim": 4096,
    "n_layers": 32,
    "head_dim": 128,
    "hidden_dim": 14336,
    "n_heads": 32,
    "n_kv_heads": 8,
    "norm_eps": 1e-05,
    "sliding_window": 4096,
    "vocab_size": 32000,
}
V02 = {key: value for key, value in V01.items() if key != "sliding_window"} | {"rope_theta": 1000000.0}
V03 = V02 | {"vocab_size": 32768}


def test_params_json_of_the_releases():
    v01, v02, v03 = (ModelConfig.from_mistral(params) for params in (V01, V02, V03))
    assert v01 == MISTRAL_7B
    assert v02 == replace(MISTRAL_7B, sliding_window=None, rope_theta=1e6)
    assert v03 == replace(v02, vocab_size=32768)
    alias = {key: value for key, value in V01.items() if key != "sliding_window"} | {"_sliding_window": 4096}
    assert ModelConfig.from_mistral(alias) == v01
    assert ModelConfig.from_mistral(V01 | {"rope_theta": 5e5}).rope_theta == 5e5
    no_groups = {key: value for key, value in V02.items() if key != "n_kv_heads"}
    assert ModelConfig.from_mistral(no_groups).num_key_value_heads == 32


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rope_theta": None}, "neither rope_theta nor sliding_window"),
        ({"moe": {"num_experts_per_tok": 2, "num_experts": 8}}, "moe"),
        ({"quantization": {"qformat_weight": "fp8_e4m3"}}, "quantization"),
        ({"vision_encoder": {"hidden_size": 1024}}, "vision_encoder"),
        ({"yarn": {"factor": 4}}, "yarn"),
        ({"lora": {"rank": 8}}, "lora"),
        ({"causal": False}, "causal"),
        ({"model_type": "mamba"}, "causal transformers"),
        ({"n_layers": "32"}, "num_hidden_layers"),
        ({"norm_eps": 10**400}, "rms_norm_eps"),
        ({"sliding_window": [4096, None]}, "sliding_window"),
        ({"dim": None}, "missing dim"),
        ({"tied_embeddings": 1}, "tie_word_embeddings"),
    ],
)
def test_params_json_that_is_refused(change, says):
    with pytest.raises(ValueError, match=says):
        ModelConfig.from_mistral(V02 | change)


# ------------------------------------------------------------ anything at all

leaves = st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=8)
leaves |= st.sampled_from(
    ["llama", "mistral", "linear", "llama3", "default", "yarn", "silu", "full_attention", 1, 2, 4, 64]
)
anything = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["rope_type", "type", "factor", "rope_theta", "full_attention", "?"]), inner)
    ),
    max_leaves=6,
)
HF_KEYS = [*ModelConfig.__dataclass_fields__, "architectures", "hidden_act", "quantization_config", "num_local_experts"]
HF_KEYS += ["partial_rotary_factor", "layer_types", "rope_parameters", "dtype", "num_experts", "something_new"]
MISTRAL_KEYS = [*V01, "_sliding_window", "rope_theta", "moe", "causal", "model_type", "tied_embeddings", "max_seq_len"]
MISTRAL_KEYS += ["max_position_embeddings", "something_new"]


def read_quietly(read, raw: dict) -> tuple[ModelConfig | None, str]:
    """The config, or the words in which it was refused; any other exception goes through."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return read(raw), ""
        except ValueError as error:
            return None, str(error)


@settings(max_examples=200)
@given(
    base=st.sampled_from([{}, LLAMA, MISTRAL]),
    change=st.dictionaries(st.sampled_from(HF_KEYS), anything, max_size=4),
)
def test_from_hf_takes_anything_and_raises_nothing_but_value_error(base, change):
    config, refusal = read_quietly(ModelConfig.from_hf, base | change)
    assert refusal.startswith("config: ") if config is None else ModelConfig.from_hf(config.to_hf()) == config


@settings(max_examples=150)
@given(
    base=st.sampled_from([{}, V01, V02]),
    change=st.dictionaries(st.sampled_from(MISTRAL_KEYS), anything, max_size=4),
)
def test_from_mistral_takes_anything_and_raises_nothing_but_value_error(base, change):
    config, refusal = read_quietly(ModelConfig.from_mistral, base | change)
    assert refusal.startswith(("params: ", "config: ")) if config is None else config.model_type == "mistral"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "trained", [r"", r"layers\.2\.", r"layers\.[13]\.", r"lm_head", r"layers\.1\.mlp", r"embed_tokens", r"model\.norm"]
)
def test_training_flops_are_those_that_autograd_does(tied, trained):
    config = ModelConfig(
        model_type="llama", vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=64, tie_word_embeddings=tied,
    )  # fmt: skip
    names = [name for name in config.tensor_shapes() if re.search(trained, name)]
    if not names:  # a tied model has no lm_head
        pytest.skip("nothing of that name")
    model = Transformer(config)
    model.init_weights(0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    ids = torch.randint(0, 512, (1, 64))
    before = kernels.select("reference")
    try:
        with FlopCounterMode(display=False) as counted:
            model(ids, labels=ids).sum().backward()
    finally:
        kernels.select(before)
    assert config.training_flops(64, names) == pytest.approx(counted.get_total_flops() / 64, rel=0.04)
    assert config.training_flops(64) == config.training_flops(64, config.tensor_shapes())
