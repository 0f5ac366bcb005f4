"""Merging: identities bit for bit, agreement with fp64 and mergekit, streamed = in memory, refusals by name."""

import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from solar import cli, tensorfile
from solar import merge as merging
from solar.checkpoint import CheckpointReader, load_model
from solar.merge import average, main, merge, prepare, slerp
from solar.tensorfile import read_safetensors_header
from tests.golden import tiny
from tests.test_checkpoint import LAYOUTS, logits_of, same, snapshot, tensors_of, write_single
from tests.test_upscale import PAUSE, TELL, Nursery, flip, large_base, one_line, written

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests/golden"
UP = "model.layers.1.mlp.up_proj.weight"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """For models this small, several threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """Two directories of one shape, in bfloat16, each with a tokenizer and a generation config."""
    folder = tmp_path_factory.mktemp("pair")
    for number, name in enumerate("AB"):
        tiny.write("llama_mha", folder / name, "bfloat16", seed=number)
        (folder / name / "tokenizer.model").write_bytes(b"\n\x0e pieces")
        (folder / name / "generation_config.json").write_text(f'{{"of": "{name}"}}')
    return folder / "A", folder / "B"


def anything(dtype: torch.dtype, count: int = 4096, seed: int = 0) -> torch.Tensor:
    """Finite numbers from all bit patterns of a dtype: both zeros, subnormal and huge ones among them."""
    generator = torch.Generator().manual_seed(seed)
    integers = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    limit = 2 ** (8 * dtype.itemsize - 1)
    bits = torch.randint(-limit, limit, (2 * count,), generator=generator).to(integers)
    numbers = bits.view(dtype)
    numbers = numbers[numbers.isfinite()][: count - 2]
    return torch.cat((torch.tensor([0.0, -0.0], dtype=dtype), numbers))


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


# ------------------------------------------------------------------------------------------------ identities


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", [[1, 1], [0.4, 0.6], [0.1, 1e-9], [3, 0, 7], [1e-300, 1e300, 1, 2, 1 / 3]])
def test_the_average_of_equals_is_what_they_are(weights, dtype):
    a = anything(dtype)
    assert bits(average([a.clone() for _ in weights], weights).to(dtype)) == bits(a)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_the_weight_and_both_ends_are_bit_for_bit(dtype):
    a, b, c = (anything(dtype, seed=seed) for seed in range(3))
    c[2:4] = torch.tensor([math.inf, math.nan], dtype=dtype)  # of no weight, so of no effect
    assert bits(average([a, b, c], [0, 5, 0]).to(dtype)) == bits(b)
    assert bits(average([c, b, a], [0, 0, 0.1]).to(dtype)) == bits(a)
    assert bits(slerp(a, b, 0).to(dtype)) == bits(slerp(a, b, 0.0).to(dtype)) == bits(a)
    assert bits(slerp(a, b, 1).to(dtype)) == bits(slerp(a, b, 1.0).to(dtype)) == bits(b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t", [0.1, 0.5, 2 / 3])
def test_between_equals_there_is_nothing_else(t, dtype):
    a = anything(dtype)
    assert bits(slerp(a, a.clone(), t).to(dtype)) == bits(a)


def test_the_arguments_stay_as_they_are():
    a, b = (torch.randn(30, 20) for _ in range(2))
    before = bits(a), bits(b)
    average([a, b], [1, 2]), average([a, b], [1, 0]).shape, slerp(a, b, 0.3), slerp(a, a, 0.3)
    assert (bits(a), bits(b)) == before


# ------------------------------------------------------------------------------------------------ oracles


def slerp_oracle(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """In fp64, with the angle from the normalised vectors."""
    a, b = a.double(), b.double()
    unit = lambda x: x / x.norm() if x.norm() > 1e-8 else x
    cosine = float((unit(a) * unit(b)).sum())
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def off_by(found: torch.Tensor, expected: torch.Tensor, *sources: torch.Tensor) -> float:
    """The greatest error, in halves of the last place of fp32 of the greatest source at that element."""
    greatest = torch.stack([source.double().abs() for source in sources]).amax(0)
    return float(((found.double() - expected).abs() / greatest.clamp(min=1e-30)).max() * 2**24)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.4, 0.6], [2, 3, 5], [0.9, 0.05, 0.03, 0.02]])
def test_the_average_against_fp64(weights, dtype):
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(64, 50, generator=generator).to(dtype) for _ in weights]
    exact = sum(w * x.double() for w, x in zip(weights, tensors, strict=True)) / sum(weights)
    found = average(tensors, weights)
    assert found.dtype == torch.float32
    assert off_by(found, exact, *tensors) <= 2 * len(weights)


def partners(a: torch.Tensor) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    other = torch.randn(a.shape, generator=generator) * 3
    return {
        "any": other,
        "acute": a + 0.3 * other,
        "obtuse": 0.2 * other - a,
        "opposite": -a,
        "nearly opposite": -1.7 * a + 1e-3 * other,
        "nearly parallel": a * 2 + 1e-2 * other,
        "just not parallel": a + 0.02 * other,
        "zero": torch.zeros_like(a),
        "shorter than counts": 1e-12 * other,
    }


@pytest.mark.parametrize("t", [0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("partner", partners(torch.ones(1)))
def test_slerp_against_fp64(partner, t):
    a = torch.randn(70, 30, generator=torch.Generator().manual_seed(5))
    b = partners(a)[partner]
    for x, y in ((a, b), (b, a)):
        found = slerp(x, y, t)
        assert (found.dtype, found.shape) == (torch.float32, a.shape)
        assert off_by(found, slerp_oracle(x, y, t), a, b) <= 8
    if partner == "any":
        linear = (1 - t) * a.double() + t * b.double()
        assert off_by(slerp(a, b, t), linear, a, b) > 1e4  # the oracle can tell


def test_the_dot_products_of_a_long_tensor_are_exact_enough():
    """A billion weights cannot be tried here; but a million of one sign, where sums in fp32 would be off by 1e-7."""
    a = torch.full((1 << 20,), 1 / 3)
    b = a * 7
    sums = merging.dot_products(lambda i, j: a[i:j], lambda i, j: b[i:j], len(a))
    third, product = float(a[0]), float(b[0])
    exact = [len(a) * x for x in (third * third, product * product, third * product)]
    assert np.allclose(sums, exact, rtol=1e-11, atol=0)


# mergekit multiplies and adds in fp32, with the weights and factors rounded to it, where we take differences, and dot
# products in fp64. In fp32 each side is off by a few halves of a last place of the larger source: measured, the two are
# at most 2.3e-7 of the largest source apart. In bf16 that shows where a result lies between two neighbours: measured,
# 19 of 3,152 weights of the average of three, at most 2 of the others, by one step each.
@pytest.mark.parametrize("case", json.loads((GOLDEN / "merged.json").read_text()))
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_mergekit_merges_alike(dtype, case, tmp_path):
    recipe = json.loads((GOLDEN / "merged.json").read_text())[case]
    golden = np.load(GOLDEN / "merged.npz")
    models = []
    for number, state in enumerate(tiny.to_merge()):
        tensors = {name: torch.from_numpy(array).to(getattr(torch, dtype)) for name, array in state.items()}
        models.append(write_single(tmp_path / str(number), tiny.MERGED, tensors))
    if recipe["method"] == "linear":
        out = merge(models[: len(recipe["amount"])], tmp_path / "out", "average", weights=recipe["amount"])
    else:
        out = merge(models[:2], tmp_path / "out", "slerp", t=recipe["amount"])
    found, different = written(out), 0
    assert {f"{dtype}/{case}/{name}" for name in found} == {k for k in golden.files if k.startswith(f"{dtype}/{case}/")}
    for name, ours in found.items():
        theirs = torch.from_numpy(golden[f"{dtype}/{case}/{name}"])
        theirs = theirs.view(torch.bfloat16) if dtype == "bfloat16" else theirs
        largest = max(float(written(model)[name].abs().max()) for model in models)
        step = 2.0**-7 * theirs.double().abs() if dtype == "bfloat16" else 0
        assert ((ours.double() - theirs.double()).abs() <= step + 2.5e-7 * largest).all(), name
        different += int((ours != theirs).sum())
    if dtype == "bfloat16":
        assert different <= (19 if case == "average_three" else 2)


# ------------------------------------------------------------------------------------------------ from disk to disk


def by_hand(tensors: list[dict], method: str, amount, dtype=None) -> dict[str, torch.Tensor]:
    """In memory, tensor by tensor."""
    one = lambda parts: average(parts, amount) if method == "average" else slerp(*parts, amount)
    return {name: one([model[name] for model in tensors]).to(dtype or tensors[0][name].dtype) for name in tensors[0]}


HOW = {"average": {"weights": [0.3, 0.7]}, "slerp": {"t": 0.3}}


@pytest.mark.parametrize("method", HOW)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_streamed_is_merged_in_memory(layout, method, tmp_path, monkeypatch):
    """In chunks of a few rows, so that rows of a release, which stand in another order, come from several."""
    monkeypatch.setattr(tensorfile, "CHUNK_BYTES", 1000)
    config, (amount,) = tiny.CASES["mistral_window"], HOW[method].values()
    tensors = [tensors_of("mistral_window", "float16", seed) for seed in (0, 1)]
    first = write_single(tmp_path / "first", config, tensors[0])
    second = LAYOUTS[layout](tmp_path / "second", config, tensors[1])
    out = merge([first, second], tmp_path / "out", method, verify="full", **HOW[method])
    assert same(written(out), by_hand(tensors, method, amount))
    other = merge([second, first], tmp_path / "other", method, **HOW[method])
    assert same(written(other), by_hand(tensors[::-1], method, amount))
    model = load_model(out)
    assert (model.config.model_type, model.config.sliding_window) == ("mistral", 7)


@pytest.mark.parametrize("case", ["llama_tied", "llama_biases", "llama_gqa_head_dim", "llama_rope_llama3"])
def test_every_feature_is_merged(case, tmp_path):
    models = [tiny.write(case, tmp_path / str(seed), "bfloat16", seed) for seed in range(3)]
    out = merge(models, tmp_path / "out", "average", weights=[1, 2, 3])
    assert same(written(out), by_hand([written(model) for model in models], "average", [1, 2, 3]))
    assert CheckpointReader(out).config == CheckpointReader(models[0]).config
    assert torch.isfinite(logits_of(load_model(out))).all()


@pytest.mark.parametrize("how", [{"method": "average", "weights": [0.123, 4.5]}, {"method": "slerp", "t": 0.77}])
def test_a_model_merged_with_itself_is_itself(how, pair, tmp_path):
    out = merge([pair[0], pair[0]], tmp_path / "out", **how)
    assert same(written(out), written(pair[0]))


def test_the_ends_are_the_models(pair, tmp_path):
    for t, model in zip((0, 1), pair, strict=True):
        assert same(written(merge(pair, tmp_path / f"t{t}", "slerp", t=t)), written(model))
        assert same(written(merge(pair, tmp_path / f"w{t}", "average", weights=[1 - t, t])), written(model))


def test_what_is_not_said_is_the_middle(pair, tmp_path):
    equal = merge(pair, tmp_path / "average", "average")
    assert same(written(equal), by_hand([written(model) for model in pair], "average", [0.5, 0.5]))
    half = merge(pair, tmp_path / "slerp", "slerp")
    assert same(written(half), by_hand([written(model) for model in pair], "slerp", 0.5))


@pytest.mark.parametrize("method", HOW)
def test_the_number_of_threads_changes_no_bit(method, pair, tmp_path, monkeypatch):
    monkeypatch.setattr(tensorfile, "CHUNK_BYTES", 500)
    outs = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        outs.append(written(merge(pair, tmp_path / str(threads), method, **HOW[method])))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(1)
    assert same(*outs)


def test_shards(pair, tmp_path):
    whole = merge(pair, tmp_path / "whole", "average")
    parts = merge(pair, tmp_path / "parts", "average", max_shard_bytes=30_000)
    assert len(list(parts.glob("*.safetensors"))) > 3
    assert same(written(whole), written(parts))
    with pytest.raises(ValueError, match="max_shard_bytes must be positive, found 0"):
        merge(pair, tmp_path / "none", "average", max_shard_bytes=0)


def test_config_and_files_are_the_firsts(pair, tmp_path):
    a, b = (shutil.copytree(model, tmp_path / model.name) for model in pair)
    config = json.loads((b / "config.json").read_text())
    changed = {"eos_token_id": 7, "max_position_embeddings": 9, "model_type": "mistral", "sliding_window": None}
    changed["architectures"] = ["MistralForCausalLM"]
    (b / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 4} | changed))
    (b / "special_tokens_map.json").write_text("of B alone")
    out = merge([a, b], tmp_path / "out", "slerp", t=0.25)
    assert CheckpointReader(out).config == CheckpointReader(a).config
    assert set(os.listdir(out)) == {
        "config.json", "generation_config.json", "merge.json", "model.safetensors", "tokenizer.model"
    }  # fmt: skip
    for name in ("generation_config.json", "tokenizer.model"):
        assert (out / name).read_bytes() == (a / name).read_bytes()
    notes = prepare([a, b], "slerp").notes
    assert f"eos_token_id is 2 in {a}, 7 in {b}" in notes
    assert f"max_position_embeddings is 512 in {a}, 9 in {b}" in notes
    assert f"model_type is llama in {a}, mistral in {b}" in notes
    assert f"generation_config.json of {a} and of {b} differ" in notes
    assert f"special_tokens_map.json is in {b}, but not in {a}" in notes
    assert len(notes) == 5
    for model in (a, b):
        (model / "tokenizer.model").unlink()
    assert f"tokenizers not compared: neither {a} nor {b} has a file of one" in prepare([a, b], "slerp").notes


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "added_tokens.json"])
def test_a_tokenizer_file_that_one_model_lacks_is_a_reason(name, pair, tmp_path):
    a, b = (shutil.copytree(model, tmp_path / model.name) for model in pair)
    (a / name).write_bytes(b"pieces")
    (b / name).unlink(missing_ok=True)
    for models in ([a, b], [b, a]):
        with pytest.raises(ValueError, match=re.escape(f"{name} is in {a}, but not in {b}")):
            prepare(models, "slerp")


def test_merge_json_says_where_it_came_from(pair, tmp_path):
    rules = [{"layers": "1-2", "weights": [1, 0]}]
    out = merge(pair, tmp_path / "out", "average", weights=[1, 3], per_layer=rules)
    record = json.loads((out / "merge.json").read_text())
    assert (record["method"], record["weights"], record["per_layer"]) == ("average", [0.25, 0.75], rules)
    assert (record["dtype"], record["model_type"]) == ("bfloat16", "llama")
    for source, model in zip(record["sources"], pair, strict=True):
        size = (model / "model.safetensors").stat().st_size
        assert source == {
            "path": str(model),
            "layout": "safetensors",
            "fingerprint": CheckpointReader(model).fingerprint(),
            "files": {"model.safetensors": size},
        }
    out = merge(pair, tmp_path / "other", "slerp", t=0.1)
    assert json.loads((out / "merge.json").read_text())["t"] == 0.1


# ------------------------------------------------------------------------------------------------ dtype


def test_the_dtype_is_the_firsts_tensor_by_tensor_unless_another_is_asked_for(tmp_path):
    first = {name: t if "norm" in name else t.bfloat16() for name, t in tensors_of("llama_mha", seed=0).items()}
    tensors = [first, tensors_of("llama_mha", "float16", 1)]
    models = [write_single(tmp_path / str(i), tiny.CASES["llama_mha"], t) for i, t in enumerate(tensors)]
    assert same(written(merge(models, tmp_path / "a", "average")), by_hand(tensors, "average", [1, 1]))
    out = merge(models, tmp_path / "b", "slerp", t=0.4, dtype="fp16")
    assert same(written(out), by_hand(tensors, "slerp", 0.4, torch.float16))
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float16"
    wide = written(merge(models, tmp_path / "c", "average", dtype="float32"))
    assert same({name: t.bfloat16() for name, t in wide.items()}, by_hand(tensors, "average", [1, 1], torch.bfloat16))


BAD_VALUES = [  # of the first, of the second, dtype, what is said
    (70_000.0, 70_000.0, "float16", rf"^{UP}: values up to 7e\+04 do not fit torch.float16"),
    (math.inf, 1.0, None, rf"0/model\.safetensors: {UP}: infinite or NaN"),
    (1.0, math.nan, None, rf"1/model\.safetensors: {UP}: infinite or NaN"),
    (3e38, -3e38, None, rf"^{UP}: values too far apart for float32"),
]


@pytest.mark.parametrize("method", HOW)
@pytest.mark.parametrize(("ours", "theirs", "dtype", "reason"), BAD_VALUES)
def test_a_value_that_does_not_fit_is_an_error_that_names_the_tensor(ours, theirs, dtype, reason, method, tmp_path):
    models = []
    for number, value in enumerate((ours, theirs)):
        tensors = tensors_of("llama_mha", seed=number)
        tensors[UP].view(-1)[-1] = value
        models.append(write_single(tmp_path / str(number), tiny.CASES["llama_mha"], tensors))
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=reason):
        merge(models, tmp_path / "out", method, dtype=dtype)
    assert snapshot(tmp_path) == before


# ------------------------------------------------------------------------------------------------ refusals


def test_models_that_do_not_fit_are_refused_with_every_reason(pair, tmp_path):
    config = tiny.CASES["llama_mha"] | {"vocab_size": 98, "rms_norm_eps": 1e-6, "rope_theta": 5e5}
    other = write_single(tmp_path / "other", config, tensors_of(config, "bfloat16"))
    (other / "tokenizer.model").write_bytes(b"of another")
    shallow = write_single(
        tmp_path / "shallow", c := tiny.CASES["llama_mha"] | {"num_hidden_layers": 2}, tensors_of(c, "bfloat16")
    )
    with pytest.raises(ValueError, match="cannot be merged") as failure:
        merge([pair[0], other, shallow], tmp_path / "out", "average")
    assert str(failure.value).splitlines() == [
        "these models cannot be merged: ",
        f"  - vocab_size is 97 in {pair[0]}, 98 in {other}",
        f"  - rms_norm_eps is 1e-05 in {pair[0]}, 1e-06 in {other}",
        f"  - rope_theta is 10000.0 in {pair[0]}, 500000.0 in {other}",
        f"  - tokenizer.model of {pair[0]} and of {other} differ",
        f"  - num_hidden_layers is 3 in {pair[0]}, 2 in {shallow}",
        f"  - tokenizer.model is in {pair[0]}, but not in {shallow}",
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"num_attention_heads": 8, "num_key_value_heads": 8}, "num_attention_heads"),
        ({"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 7}, "sliding_window"),
    ],
)
def test_a_config_that_computes_something_else_is_refused(change, name, pair, tmp_path):
    other = shutil.copytree(pair[1], tmp_path / "other")
    config = json.loads((other / "config.json").read_text()) | {"num_key_value_heads": 4} | change
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{name} is .* in .*/A, .* in .*/other"):
        prepare([pair[0], other], "average")


@pytest.mark.parametrize(
    ("models", "how", "reason"),
    [
        ("A", {"method": "average"}, "average takes two or more models, found 1"),
        ("ABA", {"method": "slerp"}, "slerp takes exactly two models, found 3"),
        ("AB", {"method": "ties"}, "method must be average or slerp, found 'ties'"),
        ("AB", {"method": "average", "weights": [1, 2, 3]}, r"one for each of the 2 models is needed, found \[1, 2, 3"),
        ("AB", {"method": "average", "weights": [1.5, -0.5]}, r"from 0 up, and not all 0; found 1\.5 -0\.5"),
        ("AB", {"method": "average", "weights": [0, 0]}, "not all 0; found 0 0"),
        ("AB", {"method": "average", "weights": [1, math.nan]}, "found 1 nan"),
        ("AB", {"method": "average", "weights": [1, math.inf]}, "found 1 inf"),
        ("AB", {"method": "average", "weights": [1e308, 1e308]}, "weights must be numbers"),
        ("AB", {"method": "average", "t": 0.5}, r"--t 0\.5 is for --method slerp, and the method is average"),
        (
            "AB",
            {"method": "slerp", "weights": [1, 0]},
            "--weights 1 0 is for --method average, and the method is slerp",
        ),
        ("AB", {"method": "slerp", "t": 1.01}, r"t must be between 0 .* and 1 .*, found 1\.01"),
        ("AB", {"method": "slerp", "t": -0.1}, r"found -0\.1"),
        ("AB", {"method": "slerp", "t": math.nan}, "found nan"),
        ("AB", {"method": "slerp", "dtype": "int8"}, "dtype 'int8' is not one of bfloat16"),
    ],
)
def test_a_request_that_is_not_right(models, how, reason, pair, tmp_path):
    directories = [pair["AB".index(letter)] for letter in models]
    with pytest.raises(ValueError, match=reason):
        merge(directories, tmp_path / "out", **how)
    assert os.listdir(tmp_path) == []


def test_no_source_is_ever_replaced(pair, tmp_path):
    a, b = (shutil.copytree(model, tmp_path / model.name) for model in pair)
    before = snapshot(tmp_path)
    for out in (a, b, tmp_path):
        with pytest.raises(ValueError, match="the output would replace"):
            merge([a, b], out, "average", force=True)
    with pytest.raises(ValueError, match=r"the output would stand inside the model .*/B"):
        merge([a, b], b / "inside", "average")
    assert snapshot(tmp_path) == before


def test_an_output_in_the_way_and_a_disk_too_small(pair, tmp_path, monkeypatch):
    out = merge(pair, tmp_path / "out", "average")
    before = snapshot(tmp_path)
    with pytest.raises(FileExistsError, match=r"out exists already: .* --force"):
        merge(pair, out, "slerp")
    assert snapshot(tmp_path) == before
    merge(pair, out, "slerp", force=True)
    assert os.listdir(tmp_path) == ["out"]
    assert snapshot(tmp_path) != before
    monkeypatch.setattr(cli, "publish", lambda *_: pytest.fail("began to write"))
    nbytes = prepare(pair, "average").nbytes
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=nbytes - 1))
    with pytest.raises(OSError, match="needs") as failure:
        merge(pair, tmp_path / "new", "average")
    assert failure.value.errno == errno.ENOSPC


# ------------------------------------------------------------------------------------------------ rules


def test_the_first_rule_that_matches_counts(pair, tmp_path):
    rules = [
        {"layers": "1-3", "tensors": r"self_attn\.[qk]_proj", "weights": [0, 1]},
        {"layers": "0-2", "weights": [1, 0]},
        {"tensors": "^lm_head", "weights": [1, 3]},
    ]
    (tmp_path / "rules.json").write_text(json.dumps(rules))
    out = merge(pair, tmp_path / "out", "average", weights=[0.5, 0.5], per_layer=tmp_path / "rules.json")
    a, b = (written(model) for model in pair)
    found = written(out)
    for name in found:
        layer = int(name.split(".")[2]) if ".layers." in name else None
        weights = [0.5, 0.5]
        if layer in (1, 2) and ("q_proj" in name or "k_proj" in name):
            weights = [0, 1]
        elif layer in (0, 1):
            weights = [1, 0]
        elif name == "lm_head.weight":
            weights = [0.25, 0.75]
        assert torch.equal(found[name], average([a[name], b[name]], weights).bfloat16()), name
    assert prepare(pair, "average", per_layer=tmp_path / "rules.json").describe().splitlines()[2:-3] == [
        "method      average, weights 0.5 0.5 and rules",
        "  embed_tokens      weights 0.5 0.5",
        "  layers 0 to 0     weights 1 0",
        "  layers 1 to 1     weights 0 1  self_attn.q_proj, self_attn.k_proj",
        "                    weights 1 0  the rest",
        "  layers 2 to 2     weights 0 1  self_attn.q_proj, self_attn.k_proj",
        "                    weights 0.5 0.5  the rest",
        "  norm              weights 0.5 0.5",
        "  lm_head           weights 0.25 0.75",
    ]


def test_rules_give_a_t_of_its_own_to_slerp(pair):
    rules = [{"tensors": "norm", "t": 0}, {"layers": "2-3", "t": 1.0}]
    merging = prepare(pair, "slerp", t=0.2, per_layer=rules)
    amounts = {name: mixture.amount for name, mixture in merging.mixtures.items()}
    assert set(amounts.values()) == {0, 0.2, 1.0}
    assert amounts["model.layers.2.input_layernorm.weight"] == amounts["model.norm.weight"] == 0
    assert amounts["model.layers.2.mlp.up_proj.weight"] == 1
    assert amounts["model.layers.1.mlp.up_proj.weight"] == amounts["lm_head.weight"] == 0.2


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        ('{"layers": "0-1"}', "expected a list of rules, found dict"),
        ("[3]", "rule 1: 't' and 'layers' or 'tensors' or both are needed, found 3"),
        ('[{"t": 0.5}]', "rule 1: 't' and 'layers' or 'tensors'"),
        ('[{"layers": "0-1"}]', "rule 1: 't' and"),
        ('[{"layers": "0-1", "t": 0, "weights": [1, 1]}]', "rule 1: 't' and"),
        ('[{"layers": "0-1", "t": 0}, {"layers": "1-1", "t": 0}]', "rule 2: layers '1-1' is not a half-open range"),
        ('[{"layers": 1, "t": 0}]', "rule 1: layers 1 is not"),
        ('[{"layers": null, "t": 0}]', "rule 1: layers None is not"),
        ('[{"tensors": ["q"], "t": 0}]', "is not a regular expression"),
        ('[{"tensors": "(", "t": 0}]', "rule 1: missing \\)"),
        ('[{"tensors": "norm", "t": 2}]', "rule 1: t must be between 0"),
        ('[{"tensors": "norm", "t": true}]', "rule 1: t must be between 0"),
        ('[{"layers": "3-9", "t": 0}]', "rule 1: no tensor matches"),
        ('[{"tensors": "q_prj", "t": 0}]', "rule 1: no tensor matches"),
        ('[{"tensors": "proj", "t": 0}, {"tensors": "q_proj", "t": 1}]', "rule 2: rules above match all its tensors"),
        ("[", "not valid JSON"),
        ('[{"t": 0, "t": 1, "layers": "0-1"}]', "the key 't' stands twice"),
    ],
)
def test_rules_that_are_not_right(rules, reason, pair, tmp_path):
    (tmp_path / "rules.json").write_text(rules)
    with pytest.raises(ValueError, match=rf"rules\.json: .*{reason}"):
        prepare(pair, "slerp", per_layer=tmp_path / "rules.json")


def test_a_rule_of_the_other_method_or_without_a_file(pair, tmp_path):
    with pytest.raises(ValueError, match="rule 1: 'weights' and"):
        prepare(pair, "average", per_layer=[{"layers": "0-1", "t": 0.5}])
    with pytest.raises(ValueError, match=r"rule 1: weights: one for each of the 2 models is needed, found \[1\]"):
        prepare(pair, "average", per_layer=[{"layers": "0-1", "weights": [1]}])
    with pytest.raises(FileNotFoundError):
        prepare(pair, "average", per_layer=tmp_path / "none.json")


# ------------------------------------------------------------------------------------------------ verification


def test_verification_finds_what_a_disk_may_do(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(tensorfile, "SAMPLE", 8)
    good = merge(pair, tmp_path / "good", "slerp", verify="full")
    place = read_safetensors_header(good / "model.safetensors")["model.layers.2.mlp.gate_proj.weight"]
    before, real = snapshot(tmp_path), merging.write_shards
    for verify, at, found in (
        ("quick", place.offset + place.nbytes - 1, True),
        ("full", place.offset + place.nbytes // 4, True),
        ("quick", place.offset + place.nbytes // 4, False),
    ):

        def write_shards(directory, *rest, at=at):
            real(directory, *rest)
            flip(directory / "model.safetensors", at)

        monkeypatch.setattr(merging, "write_shards", write_shards)
        if found:
            with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.gate_proj\.weight reads back different"):
                merge(pair, tmp_path / "out", "slerp", verify=verify)
            assert snapshot(tmp_path) == before
        else:
            merge(pair, tmp_path / "out", "slerp", verify=verify)  # that is what full is for


def test_a_source_that_becomes_shorter_meanwhile_is_an_error(pair, tmp_path):
    b = shutil.copytree(pair[1], tmp_path / "B")
    checked = prepare([pair[0], b], "average")
    os.truncate(b / "model.safetensors", 20_000)
    with pytest.raises(ValueError, match=r"B/model\.safetensors: changed while it was read"):
        merging.carry_out(checked, tmp_path / "out", 10**9, "quick", False)
    assert os.listdir(tmp_path) == ["B"]


# ------------------------------------------------------------------------------------------------ the command


def test_a_dry_run_writes_nothing(pair, tmp_path, monkeypatch, capsys):
    argv = ["--models", *map(str, pair), "--method", "slerp", "--out", str(tmp_path / "out"), "--dry-run"]
    monkeypatch.setattr(sys, "argv", ["solar.merge", *argv])
    main()
    assert capsys.readouterr().out.splitlines() == [
        f"models      {pair[0]} (safetensors, bfloat16)",
        f"            {pair[1]} (safetensors, bfloat16)",
        "method      slerp, t 0.5",
        f"parameters  {CheckpointReader(pair[0]).config.num_parameters():,}",
        f"bytes       {cli.human_bytes(prepare(pair, 'slerp').nbytes)}",
        f"note: generation_config.json of {pair[0]} and of {pair[1]} differ",
        "dry run: nothing written",
    ]
    assert os.listdir(tmp_path) == []


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    nursery = Nursery(tmp_path_factory.mktemp("nursery"), "solar.merge")
    yield nursery
    nursery.process.stdin.close()
    nursery.process.wait(10)


def test_a_real_process_says_error_and_2(pair, tmp_path):
    command = [sys.executable, "-m", "solar.merge", "--models", str(pair[0]), str(tmp_path / "none")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: {tmp_path}/none: no such directory; a model is a directory with config.json or params.json\n"
    )


def test_exit_codes(nursery, pair, tmp_path):
    out = tmp_path / "out"
    done = nursery.run("--models", *pair, "--out", out, "--weights", 0.3, 0.7)
    assert (done.code, done.err) == (0, "")
    assert done.out.endswith(f"verified    headers, sizes and samples of every tensor\n{out}\n")
    assert same(written(out), by_hand([written(model) for model in pair], "average", [0.3, 0.7]))
    loop, empty = tmp_path / "loop", tmp_path / "empty.json"
    loop.symlink_to("loop")
    empty.write_text("[]")
    before = snapshot(tmp_path)
    for argv, reason in (
        (["--out", out], f"{out} exists already"),
        (["--out", loop], f"{loop} exists and is not a directory"),
        (["--out", loop / "x"], f"{loop}/x: {loop} is a link that leads nowhere"),
        (["--per-layer", empty], f"{empty}: no rule in it"),
        (["--out", pair[1], "--force"], f"{pair[1]}: the output would replace {pair[1]}"),
        (["--weights", 1, 2, 3], "weights: one for each of the 2 models is needed, found [1.0, 2.0, 3.0]"),
        (["--method", "slerp", "--t", 2], "t must be between 0 (the first model) and 1 (the second), found 2.0"),
        (["--per-layer", tmp_path / "none.json"], f"{tmp_path}/none.json: No such file or directory"),
    ):
        assert one_line(nursery.run("--models", *pair, "--out", tmp_path / "x", *argv)).startswith(reason)
    for argv in (["--models"], ["--method", "ties"], ["--t", "half"]):
        assert one_line(nursery.run("--models", *pair, *argv)).endswith(
            "; python -m solar.merge --help lists the flags"
        )
    assert snapshot(tmp_path) == before


def test_a_disk_that_becomes_full(nursery, pair, tmp_path):
    size = (merge(pair, tmp_path / "whole", "average") / "model.safetensors").stat().st_size
    for limit in (3000, size // 2, size - 1):
        done = nursery.run("--models", *pair, "--out", tmp_path / "out", RLIMIT_FSIZE=limit)
        assert one_line(done).endswith("/model.safetensors: File too large")
        assert os.listdir(tmp_path) == ["whole"]


MOMENTS = {
    "in the middle": "import solar.tensorfile as f; f.write_all = pause(f.write_all, 9)",
    "before it is renamed": "os.fsync = pause(os.fsync, 2)",
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_stopped_leaves_no_output(how, moment, nursery, pair, tmp_path):
    argv = ["--models", *pair, "--method", "slerp", "--out", tmp_path / "out"]
    job = nursery.start(*argv, before=PAUSE + MOMENTS[moment])
    deadline = time.monotonic() + 60
    while "asleep" not in job.out.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    done = nursery.finish(job, how)
    left = os.listdir(tmp_path)
    if how == signal.SIGINT:
        assert (done.code, done.err, left) == (130, "interrupted\n", [])
    else:
        assert len(left) == 1
        assert left[0].startswith(".out.partial-")
    assert nursery.run(*argv).code == 0
    assert os.listdir(tmp_path) == ["out"]


# ------------------------------------------------------------------------------------------------ memory

WATCH = """
import solar.cli
def anonymous():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon:"))
    return int(line.split()[1]) << 10
solar.cli.Progress.advance = lambda self, count: seen.append(anonymous())
seen = [anonymous()]
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("method", HOW)
def test_memory_does_not_grow_with_the_model(method, nursery, tmp_path):
    base = large_base(tmp_path / "base")
    command = ["--models", base, base, "--out", tmp_path / "out", "--method", method, "--verify", "full"]
    done = nursery.run(*command, before=WATCH, after=TELL, RLIMIT_AS=2 << 30)
    assert (done.code, done.err) == (0, "")
    growth, samples = map(int, done.out.splitlines()[-1].split())
    assert samples > 500
    assert growth < 60_000_000
    shutil.rmtree(tmp_path / "out")  # of all that it writes, nobody needs a byte later
