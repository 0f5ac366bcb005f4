"""Depth up-scaling: streamed, loaded and in-memory agree bit for bit; whatever fails, nothing half done is left."""

import contextlib
import copy
import errno
import hashlib
import json
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
from safetensors.torch import load_file

from solar import cli, tensorfile
from solar import upscale as upscaling
from solar.base import ASSETS
from solar.checkpoint import CheckpointReader, load_model
from solar.config import ModelConfig
from solar.model import Transformer
from solar.plan import Source, new_layers, parse_plan, seams, to_json
from solar.tensorfile import read_safetensors_header
from solar.upscale import main, prepare, upscale
from tests.golden import tiny
from tests.test_checkpoint import LAYOUTS, logits_of, same, snapshot, tensors_of, write_single

ROOT = Path(__file__).resolve().parent.parent
FOUR = "llama_gqa_head_dim"  # of four layers
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """For models this small, several threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def written(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a directory of safetensors, by the library."""
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


def in_memory(base: Transformer, plan) -> dict[str, torch.Tensor]:
    """The state of the grown model, from copies of modules: what solar/plan.py says in three lines."""
    grown = copy.deepcopy(base)
    grown.model.layers = torch.nn.ModuleList(copy.deepcopy(base.model.layers[source.layer]) for source in plan)
    for layer, source in zip(grown.model.layers, plan, strict=True):
        if source.init == "identity":
            for parameter in [*layer.self_attn.o_proj.parameters(), *layer.mlp.down_proj.parameters()]:
                parameter.data.zero_()
    return dict(grown.state_dict())


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """{case: directory}, in bfloat16."""
    folder = tmp_path_factory.mktemp("bases")
    return {case: tiny.write(case, folder / case, "bfloat16") for case in tiny.CASES}


# ------------------------------------------------------------------------------------------------ three ways

PLANS_OF_4 = [
    "dus", "dus:0", "dus:1", "dus:2", "dus:3", "idus:1:1", "idus:1:2", "idus:0:3", "idus:2:9", "stack", "copy",
    "expand", "expand:2", "expand:2:2", "expand:4:1", "expand:1:4", "slices:0-3,1-4", "slices:2-4,0-1,3-4",
]  # fmt: skip
PLANS_OF_3 = ["dus:1", "idus:1:1", "stack", "expand:3", "expand:1:2", "slices:2-3,0-2"]
EVERY = [(FOUR, plan) for plan in PLANS_OF_4]
EVERY += [(case, plan) for case in ("llama_biases", "llama_tied", "mistral_window") for plan in PLANS_OF_3]


@pytest.mark.parametrize(("case", "text"), EVERY)
def test_streamed_is_loaded_is_in_memory(case, text, bases, tmp_path):
    base = load_model(bases[case])
    plan = parse_plan(text, base.config.num_hidden_layers)
    expected = in_memory(base, plan)

    assert upscale(bases[case], tmp_path / "out", text) == tmp_path / "out"
    streamed, loaded = load_model(tmp_path / "out"), load_model(bases[case], plan=text)
    assert same(written(tmp_path / "out"), expected)
    assert same(dict(streamed.state_dict()), expected)
    assert same(dict(loaded.state_dict()), expected)
    assert streamed.config == loaded.config
    assert torch.equal(logits_of(streamed), logits_of(loaded))
    with torch.device("meta"):
        third = Transformer(streamed.config)
    third.load_state_dict(expected, assign=True)
    assert torch.equal(logits_of(third), logits_of(loaded))


def test_a_list_and_a_file_are_the_text_they_were_made_from(bases, tmp_path):
    plan = [Source(0), Source(2, "identity"), Source(2), Source(2, "identity"), Source(1), Source(3)]
    (tmp_path / "plan.json").write_text(json.dumps(to_json(plan)))
    upscale(bases[FOUR], tmp_path / "list", plan)
    upscale(bases[FOUR], tmp_path / "file", str(tmp_path / "plan.json"))
    expected = in_memory(load_model(bases[FOUR]), plan)
    assert same(written(tmp_path / "list"), expected)
    assert same(written(tmp_path / "file"), expected)
    assert same(dict(load_model(bases[FOUR], plan=plan).state_dict()), expected)


@pytest.mark.parametrize("plan", ["dus", "dus:2", "idus:1:1", "stack", "slices:2-4,0-1"])
def test_without_identities_there_are_only_bytes_of_the_base(plan, bases, tmp_path):
    upscale(bases[FOUR], tmp_path / "out", plan)
    base, out = (
        {hashlib.sha256(t.view(torch.uint8).numpy()).digest() for t in written(d).values()}
        for d in (bases[FOUR], tmp_path / "out")
    )
    assert out <= base


@pytest.mark.parametrize("case", tiny.CASES)
def test_block_expansion_leaves_every_logit_exactly_as_it_was(case, tmp_path):
    base = tiny.write(case, tmp_path / "base")  # fp32
    depth, window = (tiny.CASES[case].get(key) for key in ("num_hidden_layers", "sliding_window"))
    before = load_model(base)
    for number, plan in enumerate(("expand", f"expand:{depth}", f"expand:1:{depth}")):
        out = upscale(base, tmp_path / f"keep{number}", plan, model_type="keep")
        assert torch.equal(logits_of(load_model(out)), logits_of(before))
    shorter = window or 24  # as llama, within the window
    out = upscale(base, tmp_path / "llama", f"expand:{depth}")
    as_llama, as_was = logits_of(load_model(out), shorter), logits_of(before, shorter)
    assert (as_llama - as_was).abs().max() <= 1e-5 * as_was.abs().max()
    if before.config.model_type == "llama":
        assert torch.equal(as_llama, as_was)


def test_a_window_that_is_dropped_is_the_only_difference(bases, tmp_path):
    """Sanity of the test above: beyond the window, a llama is another model."""
    out = upscale(bases["mistral_window"], tmp_path / "out", "copy", dtype="float32")
    base = load_model(bases["mistral_window"], dtype="float32")
    assert (logits_of(load_model(out))[:, 7:] - logits_of(base)[:, 7:]).abs().max() > 0.1


def test_a_new_layer_is_a_tensor_of_its_own(bases, tmp_path):
    upscale(bases[FOUR], tmp_path / "out", "dus:1")
    model = load_model(tmp_path / "out")
    assert len({parameter.data_ptr() for parameter in model.parameters()}) == len(model.state_dict())
    kept = model.model.layers[3].mlp.up_proj.weight.clone()  # layer 1 of the base, as position 1 is
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, kept)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.zero_()
    assert torch.equal(model.model.layers[3].mlp.up_proj.weight, kept)


@pytest.mark.parametrize("source_dtype", ["bfloat16", "float32"])
def test_mergekit_writes_the_same_bytes(source_dtype, tmp_path):
    golden = json.loads((ROOT / "tests/golden/passthrough.json").read_text())
    base = tiny.write(golden["case"], tmp_path / "base", source_dtype, golden["seed"])
    text = "slices:" + ",".join(f"{start}-{stop}" for start, stop in golden["slices"])
    out = upscale(base, tmp_path / "out", text, dtype=golden["dtype"])
    found = {
        name: {
            "sha256": hashlib.sha256(tensor.view(torch.uint8).numpy()).hexdigest(),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
        }
        for name, tensor in written(out).items()
    }
    assert found == golden["tensors"]
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == golden["num_hidden_layers"]
    assert same(written(upscale(base, tmp_path / "dus", "dus:1", dtype=golden["dtype"])), written(out))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_the_base_gives_the_same_tensors(layout, tmp_path, monkeypatch):
    """In small chunks, so that the reordered rows of a release are put together from several."""
    monkeypatch.setattr(tensorfile, "CHUNK_BYTES", 1000)
    config, tensors = tiny.CASES["mistral_window"], tensors_of("mistral_window", "float16")
    base = LAYOUTS[layout](tmp_path / "base", config, tensors)
    out = upscale(base, tmp_path / "out", "idus:1:1", verify="full")
    published = load_model(write_single(tmp_path / "hf", config, tensors))
    assert same(written(out), in_memory(published, parse_plan("idus:1:1", 3)))
    assert json.loads((out / "upscale.json").read_text())["source"]["layout"] == CheckpointReader(base).layout
    said = json.loads((out / "config.json").read_text())
    if "release" in layout:
        assert said["torch_dtype"] == "float16"  # params.json does not say; the weights do
    assert {key: said[key] for key in ("model_type", "max_position_embeddings", "rope_theta")} == {
        "model_type": "llama",
        "max_position_embeddings": 7,
        "rope_theta": 10_000.0,
    }


# ------------------------------------------------------------------------------------------------ dtype


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The upper half of an fp32, rounded to nearest, ties to even: on the bits."""
    bits = values.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype(np.uint16)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_cast_rounds_to_nearest_even(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(tensorfile, "CHUNK_BYTES", 512)
    config, tensors = tiny.CASES["llama_mha"], tensors_of("llama_mha")
    ties = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, -1 - 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 2.0**-25, 65519.0])
    tensors[UP].view(-1)[: len(ties)] = ties
    base = write_single(tmp_path / "base", config, tensors)
    out = upscale(base, tmp_path / "out", "dus:1", dtype=dtype, verify="full")
    for name, found in written(out).items():
        source = name
        if name.startswith("model.layers."):
            position = int(name.split(".")[2])
            source = name.replace(f".{position}.", f".{[0, 1, 1, 2][position]}.", 1)
        values = tensors[source].numpy()
        rounded = to_bfloat16(values) if dtype == "bfloat16" else values.astype(np.float16).view(np.uint16)
        assert found.dtype == getattr(torch, dtype)
        assert np.array_equal(found.view(torch.uint16).numpy(), rounded)
    first = written(out)[UP].view(-1)[:3].tolist()
    assert first == ([1.0, 1 + 2.0**-6, -1.0] if dtype == "bfloat16" else ties[:3].tolist())
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == dtype
    assert load_model(out).config.torch_dtype == dtype


def test_a_cast_to_the_wider_type_changes_no_value(bases, tmp_path):
    out = upscale(bases[FOUR], tmp_path / "out", "copy", dtype=torch.float32)
    assert same(written(out), {name: tensor.float() for name, tensor in written(bases[FOUR]).items()})


@pytest.mark.parametrize("verify", ["quick", "full"])
@pytest.mark.parametrize("value", [65520.0, -70000.0, 3e38])
def test_a_value_beyond_float16_is_an_error_that_names_the_tensor(value, verify, tmp_path, monkeypatch):
    monkeypatch.setattr(tensorfile, "CHUNK_BYTES", 512)
    tensors = tensors_of("llama_mha")
    tensors[UP].view(-1)[-1] = value
    base = write_single(tmp_path / "base", tiny.CASES["llama_mha"], tensors)
    before = snapshot(tmp_path)
    with pytest.raises(
        ValueError, match=r"^model\.layers\.1\.mlp\.up_proj\.weight: values up to \S+ do not fit torch.float16"
    ):
        upscale(base, tmp_path / "out", "dus:1", dtype="float16", verify=verify)
    assert snapshot(tmp_path) == before


def test_what_is_not_finite_already_stays_what_it_is(tmp_path):
    tensors = tensors_of("llama_mha")
    tensors[UP].view(-1)[:4] = torch.tensor([float("inf"), float("-inf"), float("nan"), 65519.0])
    base = write_single(tmp_path / "base", tiny.CASES["llama_mha"], tensors)
    found = written(upscale(base, tmp_path / "out", "copy", dtype="float16"))[UP].view(-1)[:4].float()
    assert found[:2].tolist() == [float("inf"), float("-inf")]
    assert found[2].isnan()
    assert found[3] == 65504.0  # the largest float16: just not infinite


def test_mixed_dtypes_stay_mixed_unless_a_dtype_is_asked_for(tmp_path):
    tensors = {name: t if "norm" in name else t.bfloat16() for name, t in tensors_of("llama_mha").items()}
    base = write_single(tmp_path / "base", tiny.CASES["llama_mha"], tensors)
    kept = written(upscale(base, tmp_path / "kept", "copy"))
    assert same(kept, tensors)
    cast = written(upscale(base, tmp_path / "cast", "copy", dtype="bf16"))
    assert same(cast, {name: tensor.bfloat16() for name, tensor in tensors.items()})


# ------------------------------------------------------------------------------------------------ files


def test_shards_and_index_count_layers_as_people_do(tmp_path):
    """Layer 2 stands before layer 10, in the files and in the index."""
    config = tiny.CASES["llama_mha"] | {"num_hidden_layers": 8}
    base = write_single(tmp_path / "base", config, tensors_of(config, "bfloat16"))
    out = upscale(base, tmp_path / "out", "dus:2", max_shard_bytes=30_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    names = list(ModelConfig.from_hf(config | {"num_hidden_layers": 12}).tensor_shapes())
    layer_of = [int(name.split(".")[2]) for name in names if name.startswith("model.layers.")]
    assert layer_of == sorted(layer_of)
    assert list(index["weight_map"]) == names
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 9
    stored = {file: read_safetensors_header(out / file) for file in files}
    assert [name for file in files for name in stored[file]] == names
    assert index["weight_map"] == {name: file for file in files for name in stored[file]}
    sizes = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in stored.values()]
    assert max(sizes) <= 30_000
    assert sum(sizes) == index["metadata"]["total_size"]
    assert same(written(out), in_memory(load_model(base), parse_plan("dus:2", 8)))


def test_a_limit_below_every_tensor_gives_each_a_file(bases, tmp_path):
    out = upscale(bases[FOUR], tmp_path / "out", "dus:1", max_shard_bytes=1)
    assert len(list(out.glob("*.safetensors"))) == 3 + 6 * 9
    assert same(dict(load_model(out).state_dict()), dict(load_model(bases[FOUR], plan="dus:1").state_dict()))
    for limit in (0, -1):
        with pytest.raises(ValueError, match="max_shard_bytes must be positive"):
            upscale(bases[FOUR], tmp_path / "none", "dus:1", max_shard_bytes=limit)
    assert os.listdir(tmp_path) == ["out"]


WINDOWS = {  # of a mistral with 512 positions: window in config.json -> positions as llama, window when kept
    "mistral_window": (7, 7),
    "mistral_window_null": (512, None),
    "mistral_window_absent": (512, 4096),
}


@pytest.mark.parametrize("case", WINDOWS)
def test_a_mistral_becomes_a_llama_of_its_window_or_stays_what_it_is(case, bases, tmp_path):
    positions, window = WINDOWS[case]
    say = lambda out: json.loads((out / "config.json").read_text())
    llama = say(upscale(bases[case], tmp_path / "llama", "dus:1"))
    kept = say(upscale(bases[case], tmp_path / "kept", "dus:1", model_type="keep"))
    base = say(bases[case])
    assert (llama["model_type"], llama["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert "sliding_window" not in llama
    assert llama["max_position_embeddings"] == positions
    assert (kept["model_type"], kept["architectures"]) == ("mistral", ["MistralForCausalLM"])
    assert kept["sliding_window"] == window
    assert kept["max_position_embeddings"] == 512
    rewritten = {"architectures", "model_type", "sliding_window", "max_position_embeddings", "num_hidden_layers"}
    silent = {"transformers_version", "use_cache"}
    for out in (llama, kept):
        assert out["num_hidden_layers"] == 4
        assert {key: out[key] for key in base.keys() - rewritten - silent} == {
            key: base[key] for key in base.keys() - rewritten - silent
        }


@pytest.mark.parametrize("case", [case for case, raw in tiny.CASES.items() if raw["model_type"] == "llama"])
def test_of_a_llamas_config_only_the_depth_changes(case, bases, tmp_path):
    out = upscale(bases[case], tmp_path / "out", "dus:1")
    before, after = (vars(CheckpointReader(directory).config) for directory in (bases[case], out))
    assert after == before | {"num_hidden_layers": 2 * (before["num_hidden_layers"] - 1)}


def test_only_llama_or_keep(bases, tmp_path):
    with pytest.raises(ValueError, match="model_type must be llama or keep, found 'mistral'"):
        upscale(bases[FOUR], tmp_path / "out", "dus:1", model_type="mistral")


COMPANIONS = {
    "tokenizer.model": b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02",
    "tokenizer.model.v3": b"\xff\xfe",
    "tokenizer.json": b'{"b": 1, "a": 1.0}\r\n\r\n',
    "tokenizer_config.json": '{"ü":\t"\u2028"}'.encode(),
    "special_tokens_map.json": b"",
    "added_tokens.json": b"not even JSON",
    "vocab.json": b"{}",
    "merges.txt": b"a b\r\n",
    "chat_template.jinja": b"{{ x }}  \n",
    "generation_config.json": b'{"eos_token_id": 2}',
    "LICENSE": b"\0",
    "LICENSE.txt": b"free",
}


def test_companions_are_copied_byte_for_byte_and_nothing_else_is(bases, tmp_path):
    base = shutil.copytree(bases[FOUR], tmp_path / "base")
    for name, content in COMPANIONS.items():
        (base / name).write_bytes(content)
    (base / "tokenizer.model").chmod(0o400)
    (base / "vocab.json").rename(tmp_path / "elsewhere")
    (base / "vocab.json").symlink_to(tmp_path / "elsewhere")  # as in the hub's cache
    for name in (
        "README.md",
        "training_args.bin",
        "optimizer.pt",
        "model.safetensors.index.json.bak",
        "pytorch_model.bin",
    ):
        (base / name).write_bytes(b"of the base")
    (base / "tokenizer.model.v9").mkdir()
    (base / "LICENSE.gone").symlink_to("nowhere")
    out = upscale(base, tmp_path / "out", "dus:1")
    assert set(os.listdir(out)) == {*COMPANIONS, "config.json", "model.safetensors", "upscale.json"}
    assert {name: (out / name).read_bytes() for name in COMPANIONS} == COMPANIONS
    assert not any(path.is_symlink() for path in out.iterdir())


@pytest.mark.parametrize("text", ["idus:1:2", "expand:2", "slices:2-4,0-1,3-4"])
def test_upscale_json_says_what_was_done_and_does_it_again(text, bases, tmp_path):
    out = upscale(bases[FOUR], tmp_path / "out", text)
    record, plan = json.loads((out / "upscale.json").read_text()), parse_plan(text, 4)
    assert record["plan_text"] == text
    assert record["plan"] == to_json(plan)
    assert record["new_layers"] == new_layers(plan)
    assert record["seams"] == [{"layer": position, "jump": jump} for position, jump in seams(plan)]
    assert record["num_parameters"] == sum(tensor.numel() for tensor in written(out).values())
    source = record["source"]
    assert source["path"] == str(bases[FOUR])
    assert source["num_hidden_layers"] == 4
    assert source["num_parameters"] == sum(tensor.numel() for tensor in written(bases[FOUR]).values())
    assert source["files"] == {"model.safetensors": (bases[FOUR] / "model.safetensors").stat().st_size}
    again = upscale(bases[FOUR], tmp_path / "again", str(out / "upscale.json"))
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert (again / "config.json").read_bytes() == (out / "config.json").read_bytes()


# ------------------------------------------------------------------------------------------------ verification


def flip(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def damaging(monkeypatch, damage) -> None:
    """Have damage(directory) done between the last write and the verification."""
    real = upscaling.write_shards

    def write_shards(directory, tensors, limit):
        real(directory, tensors, limit)
        damage(directory)

    monkeypatch.setattr(upscaling, "write_shards", write_shards)


def test_verification_finds_what_a_disk_may_do(bases, tmp_path, monkeypatch):
    """Full: any byte. Quick: sizes, and the start, the middle and the end of every tensor."""
    monkeypatch.setattr(tensorfile, "SAMPLE", 8)
    out = upscale(bases[FOUR], tmp_path / "good", "dus:1", verify="full")
    place = read_safetensors_header(out / "model.safetensors")["model.layers.5.mlp.gate_proj.weight"]
    size = (out / "model.safetensors").stat().st_size
    before = snapshot(tmp_path)
    start, middle, end = place.offset, place.offset + place.nbytes // 2, place.offset + place.nbytes - 1
    unsampled = place.offset + place.nbytes // 4
    shorter = lambda directory: os.truncate(directory / "model.safetensors", size - 1)
    longer = lambda directory: os.truncate(directory / "model.safetensors", size + 1)
    flipped = lambda at: lambda directory: flip(directory / "model.safetensors", at)
    differs = r"model\.safetensors: model\.layers\.5\.mlp\.gate_proj\.weight reads back different"
    for verify, damage, reason in (
        *((verify, flipped(at), differs) for verify in ("quick", "full") for at in (start, middle, end)),
        ("full", flipped(unsampled), differs),
        *((verify, flipped(20), ".") for verify in ("quick", "full")),  # in the header
        *((verify, shorter, "truncated, or trailing bytes") for verify in ("quick", "full")),
        *((verify, longer, "truncated, or trailing bytes") for verify in ("quick", "full")),
        ("quick", lambda directory: (directory / "model.safetensors").unlink(), "no weights"),
    ):
        with monkeypatch.context() as patched:
            damaging(patched, damage)
            with pytest.raises((ValueError, FileNotFoundError), match=reason):
                upscale(bases[FOUR], tmp_path / "out", "dus:1", verify=verify)
        assert snapshot(tmp_path) == before
    damaging(monkeypatch, flipped(unsampled))
    upscale(bases[FOUR], tmp_path / "out", "dus:1", verify="quick")  # that is what full is for
    assert snapshot(tmp_path) != before


def test_the_quick_verification_finds_every_layer_that_is_not_its_own(bases, tmp_path, monkeypatch):
    """A copy that takes each tensor from where the one before it stands."""
    real = upscaling._copy_range
    seen = []

    def copy_range(source, offset, count, *rest):
        seen.append(offset)
        real(source, seen[-2] if len(seen) == 12 else offset, count, *rest)

    monkeypatch.setattr(upscaling, "_copy_range", copy_range)
    with pytest.raises(ValueError, match="reads back different"):
        upscale(bases[FOUR], tmp_path / "out", "dus:1")
    assert len(seen) == 3 + 6 * 9
    assert os.listdir(tmp_path) == []


def test_without_the_kernels_own_copy_it_is_the_same(bases, tmp_path, monkeypatch):
    expected = (upscale(bases[FOUR], tmp_path / "kernel", "dus:1") / "model.safetensors").read_bytes()
    monkeypatch.setattr(upscaling, "COPY_BYTES", 700)
    assert (upscale(bases[FOUR], tmp_path / "pieces", "dus:1") / "model.safetensors").read_bytes() == expected
    real = os.copy_file_range
    for number in (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM):
        calls = []

        def sometimes(source, target, count, offset, number=number, calls=calls):
            calls.append(offset)
            if len(calls) % 3 == 0:  # in the middle of a tensor, too
                raise OSError(number, os.strerror(number))
            return real(source, target, count // 2 + 1, offset)  # and never all that was asked for

        monkeypatch.setattr(os, "copy_file_range", sometimes)
        out = upscale(bases[FOUR], tmp_path / str(number), "dus:1")
        assert len(calls) > 57
        assert (out / "model.safetensors").read_bytes() == expected
    monkeypatch.delattr(os, "copy_file_range")
    assert (upscale(bases[FOUR], tmp_path / "none", "dus:1") / "model.safetensors").read_bytes() == expected


def repadded(directory: Path, spaces: int) -> Path:
    """The same model with so many spaces more behind the header of its file."""
    path = directory / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length] + b" " * spaces
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    return directory


@pytest.mark.parametrize("spaces", [0, 8, 4000, 4096, 3])
def test_what_is_copied_stands_within_a_block_where_it_stood(spaces, tmp_path, monkeypatch):
    """So that XFS and btrfs can share blocks; they are asked for ranges that begin at one, but for the first bytes."""
    config = tiny.CASES[FOUR] | {"hidden_size": 1024, "intermediate_size": 8}  # every tensor takes whole blocks
    base = repadded(write_single(tmp_path / "base", config, tensors_of(config)), spaces)
    real, asked = os.copy_file_range, []

    def copy(source, target, count, offset):
        asked.append((offset, count))
        return real(source, target, count, offset)

    monkeypatch.setattr(os, "copy_file_range", copy)
    out = upscale(base, tmp_path / "out", "stack", verify="full")
    monkeypatch.undo()
    before, after = (read_safetensors_header(directory / "model.safetensors") for directory in (base, out))
    places = [{stored.offset % 4096 for stored in header.values()} for header in (before, after)]
    assert places[0] == places[1] if spaces % 8 == 0 else places[1] < set(range(0, 4096, 8))
    assert all(offset % 4096 == 0 or (offset + count) % 4096 == 0 for offset, count in asked)
    assert same(written(out), in_memory(load_model(base), parse_plan("stack", 4)))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_copy_that_fails_leaves_nothing(number, bases, tmp_path, monkeypatch):
    def fail(source, target, count, offset):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "copy_file_range", fail)
    with pytest.raises(OSError, match=os.strerror(number)) as failure:
        upscale(bases[FOUR], tmp_path / "deep" / "out", "dus:1")
    assert failure.value.filename.endswith("model.safetensors")
    assert os.listdir(tmp_path / "deep") == []


def test_a_base_that_becomes_shorter_meanwhile_is_an_error(bases, tmp_path, monkeypatch):
    base = shutil.copytree(bases[FOUR], tmp_path / "base")
    real, calls = upscaling._copy_range, []

    def copy_range(*arguments):
        calls.append(arguments)
        if len(calls) == 5:
            os.truncate(base / "model.safetensors", 20_000)
        real(*arguments)

    monkeypatch.setattr(upscaling, "_copy_range", copy_range)
    with pytest.raises(ValueError, match=r"base/model\.safetensors: changed while it was read"):
        upscale(base, tmp_path / "out", "dus:1")
    assert os.listdir(tmp_path) == ["base"]


REPLACED = {  # what may happen to a file of the base while it is read; none changes its size
    "written to": lambda path: flip(path, path.stat().st_size - 1),
    "touched": lambda path: os.utime(path),
    "replaced": lambda path: shutil.copy(path, path.with_name("other")) and os.replace(path.with_name("other"), path),
}


@pytest.mark.parametrize("what", REPLACED)
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_a_base_that_changes_meanwhile_is_an_error(what, dtype, bases, tmp_path, monkeypatch):
    """Even where what is verified is the same: what was written may be of no file that there ever was."""
    base = shutil.copytree(bases[FOUR], tmp_path / "base")
    real = upscaling.write_shards

    def write_shards(*arguments):
        real(*arguments)
        REPLACED[what](base / "model.safetensors")

    with monkeypatch.context() as patched:
        patched.setattr(upscaling, "write_shards", write_shards)
        with pytest.raises(ValueError, match=r"base/model\.safetensors: changed while it was read"):
            upscale(base, tmp_path / "out", "dus:1", dtype)
    assert os.listdir(tmp_path) == ["base"]
    upscale(base, tmp_path / "out", "dus:1", dtype)


# ------------------------------------------------------------------------------------------------ what is in the way


def test_an_output_that_exists(bases, tmp_path):
    out = upscale(bases[FOUR], tmp_path / "out", "dus:1")
    before = snapshot(tmp_path)
    with pytest.raises(FileExistsError, match=r"out exists already: .* --force"):
        upscale(bases[FOUR], out, "dus:2")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years")
    with pytest.raises(FileExistsError, match="home is not just a model"):
        upscale(bases[FOUR], tmp_path / "home", "dus:2", force=True)
    shutil.rmtree(tmp_path / "home")
    assert snapshot(tmp_path) == before
    (out / "model-00001-of-00002.safetensors").write_bytes(b"of the old one")
    upscale(bases[FOUR], out, "dus:2", force=True)
    assert sorted(os.listdir(out)) == ["config.json", "model.safetensors", "upscale.json"]
    assert load_model(out).config.num_hidden_layers == 4
    assert os.listdir(tmp_path) == ["out"]


def test_the_base_is_never_replaced(bases, tmp_path, monkeypatch):
    """Not itself, not by another name, not a directory that it lies in, not one that its files are links to."""
    base = shutil.copytree(bases[FOUR], tmp_path / "models" / "base")
    shutil.copy(base / "config.json", tmp_path / "models")  # or else --force would not be allowed to
    (tmp_path / "alias").symlink_to("models/base")
    linked = tmp_path / "linked"
    linked.mkdir()
    shutil.copy(base / "config.json", linked)
    (linked / "model.safetensors").symlink_to(base / "model.safetensors")
    before = snapshot(tmp_path)
    monkeypatch.chdir(base)
    for model, out in (
        (base, base),
        (base, tmp_path / "alias"),
        (tmp_path / "alias", base),
        (base, tmp_path / "models" / ".." / "models" / "base"),
        (".", "."),
        (base, ".."),
        (base, tmp_path / "models"),
        (linked, linked),
        (linked, base),
        (linked, tmp_path / "models"),
        (linked, tmp_path),
    ):
        with pytest.raises(ValueError, match="the output would replace"):
            upscale(model, out, "dus:1", force=True)
    assert snapshot(tmp_path) == before
    with pytest.raises(ValueError, match="inside the model"):
        upscale(base, base / "inside", "dus:1")
    assert snapshot(tmp_path) == before


def test_an_output_that_comes_into_being_meanwhile_is_left_alone(bases, tmp_path, monkeypatch):
    """Two runs, one output: the first to finish has it."""
    real = upscaling.verify_written

    def verify(*arguments, **more):
        monkeypatch.setattr(upscaling, "verify_written", real)
        upscale(bases[FOUR], tmp_path / "out", "dus:2")
        real(*arguments, **more)

    monkeypatch.setattr(upscaling, "verify_written", verify)
    with pytest.raises(FileExistsError, match="out exists already"):
        upscale(bases[FOUR], tmp_path / "out", "dus:1")
    assert load_model(tmp_path / "out").config.num_hidden_layers == 4
    assert os.listdir(tmp_path) == ["out"]


def test_everything_is_checked_before_the_first_byte(bases, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "publish", lambda *_: pytest.fail("began to write"))
    full = SimpleNamespace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    nbytes = prepare(bases[FOUR], "dus:1").nbytes
    assert nbytes == sum(tensor.nbytes for tensor in load_model(bases[FOUR], plan="dus:1").state_dict().values())
    with pytest.raises(OSError, match="needs") as failure:
        upscale(bases[FOUR], tmp_path / "a" / "b" / "out", "dus:1")
    assert failure.value.errno == errno.ENOSPC
    assert cli.describe(failure.value) == (
        f"{tmp_path}/a/b/out needs {cli.human_bytes(nbytes)}, 1.00 kB are free: no space left on the disk"
    )
    full.free = nbytes - 1
    with pytest.raises(OSError, match="needs") as failure:
        upscale(bases[FOUR], tmp_path / "out", "dus:1")
    full.free = nbytes
    with pytest.raises(pytest.fail.Exception, match="began to write"):
        upscale(bases[FOUR], tmp_path / "out", "dus:1")
    for plan, dtype, reason in (
        ("dus:4", None, "M = 4 does not fit"),
        ("expand:3", None, "GROUPS = 3 does not divide"),
        ("slices:0-5", None, "the range 0-5"),
        ("sus:1", None, "is not one of"),
        ("dus:1", "int8", "is not one of bfloat16"),
        ("dus:1", torch.float64, "is not one of bfloat16"),
        ([Source(4)], None, "names layer 4"),
        ([], None, "non-empty"),
    ):
        with pytest.raises(ValueError, match=reason):
            upscale(bases[FOUR], tmp_path / "out", plan, dtype)
    assert os.listdir(tmp_path) == []


# ------------------------------------------------------------------------------------------------ the command


def run_here(monkeypatch, *argv) -> None:
    monkeypatch.setattr(sys, "argv", ["solar.upscale", *map(str, argv)])
    main()


def test_a_dry_run_writes_nothing(bases, tmp_path, monkeypatch, capsys):
    base = shutil.copytree(bases["mistral_window"], tmp_path / "base")
    upscale(base, tmp_path / "out", "dus:1")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path, base, tmp_path / "out")}
    before = snapshot(tmp_path)
    for name in ("new", "out", "deep/er"):  # even where an output would be in the way
        run_here(monkeypatch, "--model", base, "--out", tmp_path / name, "--plan", "dus:1", "--dry-run")
        shown = capsys.readouterr().out
        assert "dus:1: 3 -> 4 layers" in shown
        assert "model_type mistral -> llama; sliding_window 7 -> None; max_position_embeddings 512 -> 7" in shown
        assert "seam 1 -> 1, jump -1" in shown
        assert shown.endswith("dry run: nothing written\n")
    assert snapshot(tmp_path) == before
    assert times == {path: path.stat().st_mtime_ns for path in times}


def test_what_the_command_says(bases, tmp_path, monkeypatch, capsys):
    run_here(monkeypatch, "--model", bases[FOUR], "--out", tmp_path / "out", "--plan", "dus:1", "--verify", "full")
    shown = capsys.readouterr().out.splitlines()
    assert shown[-2:] == ["verified    every byte", str(tmp_path / "out")]
    before, after = (sum(t.numel() for t in written(d).values()) for d in (bases[FOUR], tmp_path / "out"))
    assert f"parameters  {before:,} -> {after:,}" in shown
    run_here(monkeypatch, "--model", bases[FOUR], "--out", tmp_path / "less", "--plan", "slices:0-2")
    shown = capsys.readouterr().out
    assert "note: this plan does not make the model deeper" in shown
    assert f"note: {bases[FOUR]} has no tokenizer" in shown


def test_the_config_line_says_a_cast_and_a_tokenizer_is_missed_only_where_there_is_none(tmp_path, monkeypatch, capsys):
    run_here(monkeypatch, "--model", ASSETS, "--out", tmp_path / "out", "--dtype", "float32", "--dry-run")
    shown = capsys.readouterr().out
    (line,) = [line for line in shown.splitlines() if line.startswith("config ")]
    assert line.endswith("; dtype bfloat16 -> float32")
    assert "no tokenizer" not in shown
    run_here(monkeypatch, "--model", ASSETS, "--out", tmp_path / "out", "--dtype", "bfloat16", "--dry-run")
    assert "dtype" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ processes

# Imports torch once, then runs each command in a process of its own as `python -m MODULE` would; and spares each the
# second that Python takes to tidy up after torch.
NURSERY = """
import gc, json, os, resource, runpy, signal, sys, traceback
sys.path.insert(0, os.getcwd())
import solar.checkpoint
gc.freeze()
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    if child := os.fork():
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    for descriptor, name in ((0, "/dev/null"), (1, job["stdout"]), (2, job["stderr"])):
        os.dup2(os.open(name, os.O_RDWR | os.O_APPEND), descriptor)
    for name, value in job["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    exec(job["before"])
    sys.argv = [job["module"], *job["argv"]]
    try:
        runpy.run_module(job["module"], run_name="__main__", alter_sys=True)
    except SystemExit as leaving:
        for number in (signal.SIGINT, signal.SIGTERM):  # the command is over; what follows is the nursery's
            signal.signal(number, signal.SIG_IGN)
        code = leaving.code
    except BaseException:
        traceback.print_exc()
        code = 1
    exec(job["after"])
    sys.stdout.flush()
    os._exit(code)
"""


class Nursery:
    def __init__(self, folder: Path, module: str = "solar.upscale", prefix: tuple[str, ...] = ()):
        self.folder, self.module, self.count = folder, module, 0
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-c", NURSERY],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert self.process.stdout.readline() == "ready\n"

    def start(self, *argv, module: str = "", before: str = "", after: str = "", **limits: int) -> SimpleNamespace:
        self.count += 1
        out, err = self.folder / f"{self.count}.out", self.folder / f"{self.count}.err"
        out.touch(), err.touch()
        job = {
            "module": module or self.module,
            "argv": [*map(str, argv)],
            "before": before,
            "after": after,
            "limits": limits,
        }
        self.process.stdin.write(json.dumps(job | {"stdout": str(out), "stderr": str(err)}) + "\n")
        self.process.stdin.flush()
        return SimpleNamespace(pid=int(self.process.stdout.readline()), out=out, err=err)

    def finish(self, job: SimpleNamespace, send: signal.Signals | None = None) -> SimpleNamespace:
        if send is not None:
            with contextlib.suppress(ProcessLookupError):  # it has ended already
                os.kill(job.pid, send)
        code = int(self.process.stdout.readline())
        return SimpleNamespace(code=code, out=job.out.read_text(), err=job.err.read_text())

    def run(self, *argv, **more) -> SimpleNamespace:
        return self.finish(self.start(*argv, **more))


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    nursery = Nursery(tmp_path_factory.mktemp("nursery"))
    yield nursery
    nursery.process.stdin.close()
    nursery.process.wait(10)


def one_line(done: SimpleNamespace) -> str:
    """The message of a command that has failed as it should."""
    assert done.code == 2, (done.code, done.err)
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    assert done.err.endswith("\n")
    return done.err.removeprefix("error: ").rstrip("\n")


def test_a_real_process_says_error_and_2(bases, tmp_path):
    """Without the nursery: the very command."""
    command = [sys.executable, "-m", "solar.upscale", "--model", str(tmp_path / "none"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: {tmp_path}/none: no such directory; a model is a directory with config.json or params.json\n"
    )


WITHOUT = """
import os, resource, runpy, sys
sys.modules["torch"] = sys.modules["numpy"] = None  # whoever imports them fails
resource.setrlimit(resource.RLIMIT_AS, (100_000_000, 100_000_000))
sys.path.insert(0, os.getcwd())
runpy.run_module("solar.upscale", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("layout", ["single", "shards", "release"])
def test_what_is_not_cast_needs_no_torch_and_hardly_any_memory(layout, tmp_path):
    config, tensors = tiny.CASES["mistral_window"], tensors_of("mistral_window", "bfloat16")
    base = LAYOUTS[layout](tmp_path / "base", config, tensors)
    argv = ["--model", base, "--out", tmp_path / "out", "--plan", "expand:1:2", "--verify", "full"]
    done = subprocess.run([sys.executable, "-c", WITHOUT, *argv], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    published = load_model(write_single(tmp_path / "hf", config, tensors))
    assert same(written(tmp_path / "out"), in_memory(published, parse_plan("expand:1:2", 3)))


def test_exit_codes(nursery, bases, tmp_path):
    base, out = bases[FOUR], tmp_path / "out"
    done = nursery.run("--model", base, "--out", out, "--plan", "dus:1")
    assert (done.code, done.err) == (0, "")
    assert done.out.endswith(f"verified    headers, sizes and samples of every tensor\n{out}\n")
    assert same(written(out), dict(load_model(base, plan="dus:1").state_dict()))
    before = snapshot(tmp_path)
    broken = shutil.copytree(base, tmp_path / "broken")
    os.truncate(broken / "model.safetensors", 50_000)
    shutil.copytree(base, tmp_path / "denied").joinpath("config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    for argv, reason in (
        (
            ["--model", base, "--out", out],
            f"{out} exists already: give another output directory, or --force to replace it",
        ),
        (["--model", base, "--out", base, "--force"], f"{base}: the output would replace {base}"),
        (["--model", base, "--out", tmp_path / "x", "--plan", "dus:9"], "M = 9 does not fit a model of 4 layers"),
        (["--model", base, "--out", tmp_path / "x", "--plan", "none.json"], "none.json: No such file or directory"),
        (["--model", base, "--out", tmp_path / "x", "--dtype", "int8"], "dtype 'int8' is not one of bfloat16"),
        (["--max-shard-bytes", "0"], "argument --max-shard-bytes: '0' is not a size of at least 1 byte, such as 5GB"),
        (["--model", base, "--out", tmp_path / "file"], f"{tmp_path}/file exists and is not a directory"),
        (
            ["--model", base, "--out", tmp_path / "file" / "x" / "y"],
            f"{tmp_path}/file/x/y: {tmp_path}/file is a file, not a directory",
        ),
        (["--model", base, "--out", tmp_path / "loop"], f"{tmp_path}/loop exists and is not a directory"),
        (
            ["--model", base, "--out", tmp_path / "loop" / "x"],
            f"{tmp_path}/loop/x: {tmp_path}/loop is a link that leads",
        ),
        (["--model", broken, "--out", tmp_path / "x"], f"{broken}: model.safetensors: 50000 bytes long"),
        (
            ["--model", tmp_path / "denied", "--out", tmp_path / "x"],
            f"{tmp_path}/denied/config.json: config: model_type",
        ),
    ):
        done = nursery.run(*argv)
        assert one_line(done).startswith(reason)
        assert done.out == ""  # before the plan is shown
    for argv in (["--plan"], ["--verify", "twice"], ["--max-shard-bytes", "5PB"], ["--mod", base]):
        assert one_line(nursery.run(*argv)).endswith("; python -m solar.upscale --help lists the flags")
    assert nursery.run("--help").code == 0
    for name in ("broken", "denied"):
        shutil.rmtree(tmp_path / name)
    for name in ("file", "loop"):
        (tmp_path / name).unlink()
    assert snapshot(tmp_path) == before


def test_several_problems_are_several_lines(nursery, tmp_path):
    tensors = tensors_of("llama_mha")
    tensors["extra"] = tensors.pop(UP)
    base = write_single(tmp_path / "base", tiny.CASES["llama_mha"], tensors)
    done = nursery.run("--model", base, "--out", tmp_path / "out")
    assert done.code == 2
    assert done.err.splitlines() == [
        f"error: {base}: ",
        f"  - missing from the files, the config implies them: {UP}",
        "  - in the files, unknown to this config: extra",
    ]


@pytest.mark.parametrize("argv", [[], ["--dtype", "float32"]], ids=["copied", "cast"])
def test_a_disk_that_becomes_full(argv, nursery, bases, tmp_path):
    """The kernel refuses to let a file grow beyond so many bytes: in the header, in a tensor, in the last one."""
    out = upscale(bases[FOUR], tmp_path / "out", "copy")
    size = (upscale(bases[FOUR], tmp_path / "whole", "stack", *argv[1:]) / "model.safetensors").stat().st_size
    before = snapshot(tmp_path)
    for limit in (3000, size // 2, size - 1):
        for more in (["--out", tmp_path / "new"], ["--out", out, "--force"]):
            done = nursery.run("--model", bases[FOUR], "--plan", "stack", *argv, *more, RLIMIT_FSIZE=limit)
            assert one_line(done).endswith("/model.safetensors: File too large")
            assert snapshot(tmp_path) == before


def test_no_room_on_the_disk(nursery, bases, tmp_path):
    little = "import shutil, types; shutil.disk_usage = lambda path: types.SimpleNamespace(free=12345)"
    argv = ["--model", bases[FOUR], "--out", tmp_path / "a" / "out"]
    message = one_line(nursery.run(*argv, before=little))
    assert re.fullmatch(rf"{tmp_path}/a/out needs \d+\.\d\d kB, 12\.35 kB are free: no space left on the disk", message)
    full = "import os, errno\ndef copy(*_): raise OSError(errno.ENOSPC, 'x')\nos.copy_file_range = copy"
    assert one_line(nursery.run(*argv, before=full)).endswith("/model.safetensors: no space left on the disk")
    assert os.listdir(tmp_path / "a") == []


# Where a run is stopped: it says so and goes to sleep.
PAUSE = """
import os, time
import solar.cli, solar.directory
def pause(function, at, calls=[]):
    def paused(*arguments, **more):
        calls.append(arguments)
        if len(calls) == at:
            print("asleep", flush=True)
            time.sleep(60)
        return function(*arguments, **more)
    return paused
"""
MOMENTS = {
    "before the first byte": "os.copy_file_range = pause(os.copy_file_range, 1)",
    "in the middle of the copy": "os.copy_file_range = pause(os.copy_file_range, 30)",
    "before it is verified": "solar.directory.write_config = pause(solar.directory.write_config, 1)",
    "while it is verified": "tensor = solar.tensorfile.StoredTensor; tensor.read = pause(tensor.read, 20)",
    "before it is renamed": "os.fsync = pause(os.fsync, 2)",
}


def start_and_wait_until_asleep(nursery, moment, *argv) -> SimpleNamespace:
    job = nursery.start(*argv, before=PAUSE + MOMENTS[moment])
    deadline = time.monotonic() + 20
    while "asleep" not in job.out.read_text():
        if time.monotonic() > deadline:
            pytest.fail(f"did not come to the moment {moment}: {nursery.finish(job, signal.SIGKILL)}")
        time.sleep(0.005)
    return job


@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_leaves_nothing(moment, nursery, bases, tmp_path):
    out = upscale(bases[FOUR], tmp_path / "out", "copy")
    before = snapshot(tmp_path)
    for more in (["--out", tmp_path / "new"], ["--out", out, "--force"]):
        job = start_and_wait_until_asleep(nursery, moment, "--model", bases[FOUR], "--plan", "dus:1", *more)
        done = nursery.finish(job, signal.SIGINT)
        assert (done.code, done.err) == (130, "interrupted\n")
        assert snapshot(tmp_path) == before


@pytest.mark.parametrize("moment", MOMENTS)
def test_after_a_kill_there_is_no_output_and_the_next_run_cleans_up(moment, nursery, bases, tmp_path):
    argv = ["--model", bases[FOUR], "--plan", "dus:1", "--out", tmp_path / "out"]
    for _ in range(2):
        job = start_and_wait_until_asleep(nursery, moment, *argv)
        assert nursery.finish(job, signal.SIGKILL).code == -signal.SIGKILL
        (left,) = os.listdir(tmp_path)  # the second run has removed what the first had left
        assert left.startswith(".out.partial-")
        with pytest.raises(FileNotFoundError):
            load_model(tmp_path / "out")
    assert nursery.run(*argv).code == 0
    assert os.listdir(tmp_path) == ["out"]
    assert load_model(tmp_path / "out").config.num_hidden_layers == 6


def test_a_living_run_is_not_cleaned_up(nursery, bases, tmp_path):
    argv = ["--model", bases[FOUR], "--plan", "dus:1", "--out", tmp_path / "out"]
    job = start_and_wait_until_asleep(nursery, "in the middle of the copy", *argv)
    try:
        upscale(bases[FOUR], tmp_path / "out", "dus:2")
        found = os.listdir(tmp_path)
    finally:
        done = nursery.finish(job, signal.SIGINT)
    assert sorted(name.startswith(".out.partial-") for name in found) == [False, True]
    assert done.code == 130
    assert os.listdir(tmp_path) == ["out"]


# ------------------------------------------------------------------------------------------------ memory

# The report of progress is called after every chunk, while its buffers are still there: a timer would miss peaks.
WATCH = """
import solar.cli, solar.upscale
del sys.modules["solar.upscale"]  # its own memory is not what is measured
def anonymous():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon:"))
    return int(line.split()[1]) << 10
solar.cli.Progress.advance = lambda self, count: seen.append(anonymous())
seen = [anonymous()]
"""
TELL = "print(max(seen) - seen[0], len(seen))"


def large_base(directory: Path, release: bool = False) -> Path:
    """600 MB of zeros, of which the disk holds only the header."""
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 16}
    config = ModelConfig.from_hf(tiny.CASES["llama_mha"] | sizes | {"vocab_size": 4000, "num_hidden_layers": 6})
    entries, at = {}, 0
    for name, shape in config.tensor_shapes().items():
        entries[name] = {
            "dtype": "BF16",
            "shape": shape,
            "data_offsets": [at, at := at + torch.Size(shape).numel() * 2],
        }
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(directory / "model.safetensors", 8 + len(header) + at)
    (directory / "config.json").write_text(json.dumps(config.to_hf()))
    assert at > 600_000_000
    return directory


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "argv",
    [["--plan", "dus:2"], ["--plan", "slices:0-3", "--dtype", "float16", "--verify", "full"]],
    ids=["copied", "cast"],
)
def test_memory_does_not_grow_with_the_model(argv, nursery, tmp_path):
    base = large_base(tmp_path / "base")
    command = ["--model", base, "--out", tmp_path / "out", *argv]
    done = nursery.run(*command, before=WATCH, after=TELL, RLIMIT_AS=2 << 30)
    assert (done.code, done.err) == (0, "")
    growth, samples = map(int, done.out.splitlines()[-1].split())
    assert samples > 100
    assert growth < 100_000_000
    shutil.rmtree(tmp_path / "out")  # of all that it writes, nobody needs a byte later
