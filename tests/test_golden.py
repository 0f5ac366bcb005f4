"""Logits and greedy generations against those that transformers computed (tests/golden/README.md)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import kernels
from solar.checkpoint import load_model
from solar.config import ModelConfig, RopeScaling
from solar.model import Transformer
from solar.sampling import generate
from tests.golden import tiny

HERE = Path(__file__).parent / "golden"
LOGITS = np.load(HERE / "logits.npz")
GREEDY = json.loads((HERE / "greedy.json").read_text())
CONFIGS = json.loads((HERE / "configs.json").read_text())
WRITTEN = json.loads((HERE / "written.json").read_text())
cases = pytest.mark.parametrize("case", tiny.CASES)
forms = pytest.mark.parametrize("form", ["reference", "torch"])


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Tensors as small as these take longer on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _switch_is_put_back():
    yield
    kernels.select("auto")


def build(case: str, **changes) -> Transformer:
    raw = tiny.CASES[case] | changes
    model = Transformer(ModelConfig.from_hf(raw))
    state = {name: torch.from_numpy(array) for name, array in tiny.state(tiny.CASES[case]).items()}
    assert not model.load_state_dict(state, assign=True).missing_keys
    return model


@torch.no_grad()
def distance(model: Transformer, case: str) -> float:
    """The largest difference to a stored logit: of the whole first text, and the last position of the second."""
    logits = model(torch.from_numpy(LOGITS[f"{case}/input_ids"])).numpy()
    stored = LOGITS[f"{case}/logits_row0"], LOGITS[f"{case}/logits_row1_last"]
    assert logits[0].shape == stored[0].shape
    return max(np.abs(logits[0] - stored[0]).max(), np.abs(logits[1, -1] - stored[1]).max())


def test_every_case_is_stored():
    assert {name.split("/")[0] for name in LOGITS.files} == set(tiny.CASES) == set(GREEDY) == set(CONFIGS)


@forms
@cases
def test_logits(form, case):
    kernels.select(form)
    assert distance(build(case), case) < 1e-4


@forms
@cases
def test_greedy_generation(form, case):
    kernels.select(form)
    model, stored = build(case), GREEDY[case]
    for generation in stored:
        assert generate(model, [generation["prompt"]], len(generation["new"])) == [generation["new"]]
    both = generate(model, [generation["prompt"] for generation in stored], 16)
    assert both == [generation["new"] for generation in stored]


@pytest.mark.parametrize("case", WRITTEN)
def test_what_transformers_wrote_opens(case, tmp_path):
    """A directory of its save_pretrained: as it was, but for the weights, which are made again."""
    written = WRITTEN[case]
    (tmp_path / "config.json").write_text(json.dumps(written["config"]))
    if written["index"]:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(written["index"]))
    state = {name: torch.from_numpy(array) for name, array in tiny.state(tiny.CASES[case]).items()}
    for name, shard in written["shards"].items():
        dtype = getattr(torch, shard["dtype"])
        save_file({tensor: state[tensor].to(dtype) for tensor in shard["tensors"]}, tmp_path / name, {"format": "pt"})
    model = load_model(tmp_path)
    assert str(model.config.torch_dtype) == shard["dtype"]
    assert all(torch.equal(tensor, state[name].to(dtype)) for name, tensor in model.named_parameters())
    if dtype == torch.float32:
        assert distance(model, case) < 1e-4


@cases
def test_configs_are_read_alike(case):
    config, peer = ModelConfig.from_hf(tiny.CASES[case]), CONFIGS[case]
    for name in ("num_key_value_heads", "head_dim", "sliding_window", "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(config, name) == peer[name]
    rope = dict(peer["rope_parameters"])
    assert config.rope_theta == rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    rope.pop("type", None)
    assert config.rope_scaling == (None if kind == "default" else RopeScaling(kind, **rope))


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("llama_mha", {"rope_theta": 10_100.0}),
        ("llama_mqa", {"rms_norm_eps": 1.1e-2}),
        ("llama_rope_linear", {"rope_scaling": None}),
        (
            "llama_rope_llama3",
            {"rope_scaling": tiny.CASES["llama_rope_llama3"]["rope_scaling"] | {"high_freq_factor": 5.0}},
        ),
        ("mistral_window", {"sliding_window": 6}),
        ("mistral_window", {"sliding_window": 8}),
        ("mistral_window_null", {"sliding_window": 23}),
    ],
)
def test_a_wrong_detail_would_show(case, change):
    """The numbers can tell: a small change to a config is a hundred times as far off as the bound."""
    assert distance(build(case, **change), case) > 1e-2
