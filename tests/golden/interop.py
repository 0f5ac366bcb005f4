"""What we write opens in the peers, and what they write opens here: run for real, with each peer in an environment of
its own, where our packages are too. Never imported by the project or its tests.

    python tests/golden/interop.py transformers [--model DIR]    both directions; also writes written.json, beside this
    python tests/golden/interop.py mergekit     [--model DIR]    both directions
    python tests/golden/interop.py lm_eval      [--model DIR]    a small task of its own, with --model hf
    python tests/golden/interop.py llama.cpp --sources DIR [--model DIR]
                                                                 its convert_hf_to_gguf.py, with transformers and gguf

--model: a real model, to be used beside the tiny ones. --every N: of the variants of what we write only each Nth, for a
quick look. Each line of the table says how many variants of a writer's output a reader has opened as it should: every
tensor there, with the same bits, and the same logits, to 1e-5 of the largest, in fp32. A line that begins with FAILED
says which did not, and the exit code is 1.
"""

import argparse
import contextlib
import io
import itertools
import json
import logging
import math
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT)]

from solar import checkpoint  # noqa: E402
from solar.checkpoint import load_model, save_model  # noqa: E402
from solar.config import ModelConfig  # noqa: E402
from solar.merge import merge  # noqa: E402
from solar.model import Transformer  # noqa: E402
from solar.tensorfile import read_safetensors_header  # noqa: E402
from solar.tokenizer import Tokenizer  # noqa: E402
from solar.upscale import upscale  # noqa: E402
from tests.golden import tiny  # noqa: E402
from tests.golden.make_golden import save_json  # noqa: E402

SMALL_BASE = ROOT / "solar/assets/base"
DTYPES = ("bfloat16", "float16", "float32")
SHARD = 20_000  # bytes: several shards for each tiny model
TEXT = 24  # tokens, more than the window of 7
NEAR = 1e-5
KEPT = {  # in written.json: one variant of each of these cases
    "llama_gqa_head_dim": ("float32", "shards"),
    "llama_biases": ("bfloat16", "one file"),
    "llama_tied": ("float32", "shards"),
    "llama_rope_llama3": ("float16", "one file"),
    "mistral_window": ("float32", "one file"),
}
WORDS = "The capital of France is Paris. def add(a, b): return a + b. Tom has 3 apples and buys 12 more."


class Table:
    """How many variants of each pair of writer and reader there were, and what was wrong with some."""

    def __init__(self, every: int = 1):
        self.every, self.tried, self.passed = every, Counter(), Counter()
        self.failed: list[str] = []

    def some(self, variants: Iterator) -> Iterator:
        return itertools.islice(variants, 0, None, self.every)

    @contextlib.contextmanager
    def row(self, writer: str, reader: str, variant: str) -> Iterator[None]:
        self.tried[writer, reader] += 1
        try:
            yield
            self.passed[writer, reader] += 1
        except Exception as error:  # whatever a peer may raise
            self.failed.append(f"FAILED {writer} -> {reader}, {variant}: {type(error).__name__}: {error}")

    def finish(self) -> None:
        for (writer, reader), tried in self.tried.items():
            print(f"{writer:<34} -> {reader:<44} {self.passed[writer, reader]:>4} of {tried}")
        print(*self.failed, sep="\n")
        sys.exit(bool(self.failed))


# ------------------------------------------------------------------------------------------------ what is compared


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def check_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Names, dtypes and bits. A tied head may stand in either."""
    only = {name for name in found.keys() ^ expected.keys() if name != "lm_head.weight"}
    assert not only, f"only in one of the two: {sorted(only)[:3]}"
    for name in found.keys() & expected.keys():
        assert found[name].dtype == expected[name].dtype, f"{name}: {found[name].dtype}, not {expected[name].dtype}"
        assert bits(found[name]) == bits(expected[name]), f"{name}: other bits"


def check_near(found: torch.Tensor, expected: torch.Tensor, bound: float = NEAR) -> None:
    assert found.shape == expected.shape, f"logits {list(found.shape)}, not {list(expected.shape)}"
    off = float((found - expected).abs().max() / expected.abs().max())
    assert off <= bound, f"logits off by {off:.1e} of the largest"


def ids_for(config: ModelConfig) -> torch.Tensor:
    return torch.from_numpy(tiny.token_ids(0, "text", (2, TEXT), config.vocab_size))


@torch.no_grad()
def our_logits(directory: Path, ids: torch.Tensor) -> torch.Tensor:
    return load_model(directory, dtype="float32")(ids)


# ------------------------------------------------------------------------------------------------ what we write


def what_we_write(folder: Path, real: Path | None, cases=tuple(tiny.CASES)) -> Iterator[tuple[str, str, Path]]:
    """(writer, variant, directory), each removed when the next is asked for."""
    made = folder / "made"

    def out(writer: str, *variant: str) -> tuple[str, str, Path]:
        return f"solar {writer}", " ".join(variant), made

    for case, dtype in ((case, dtype) for case in cases for dtype in DTYPES):
        bases = [tiny.write(case, folder / f"base{seed}", dtype, seed) for seed in (0, 1)]
        depth = load_model(bases[0]).config.num_hidden_layers
        for shard, files in ((10**9, "one file"), (SHARD, "shards")):
            for plan in ("copy", "dus:1", "idus:1:1", f"expand:{depth}"):
                for kind in ("llama", "keep") if case.startswith("mistral") else ("llama",):
                    upscale(bases[0], made, plan, model_type=kind, max_shard_bytes=shard, force=True)
                    yield out("upscale " + plan.partition(":")[0], case, dtype, files, kind)
            merge(bases, made, "average", [0.4, 0.6], max_shard_bytes=shard, force=True)
            yield out("merge average", case, dtype, files)
            merge(bases, made, "slerp", t=0.3, max_shard_bytes=shard, force=True)
            yield out("merge slerp", case, dtype, files)
            checkpoint.DEFAULT_MAX_SHARD_BYTES = shard
            save_model(load_model(bases[0]), made, force=True)
            yield out("save_model", case, dtype, files)
        for base in bases:
            shutil.rmtree(base)
    for dtype in DTYPES:  # a cast on the way
        base = tiny.write("llama_biases", folder / "base", "float32")
        upscale(base, made, "dus:1", dtype, force=True)
        yield out("upscale dus", "float32 ->", dtype)
        save_model(load_model(base), made, dtype, force=True)
        yield out("save_model", "float32 ->", dtype)
    shutil.rmtree(base)
    for tied in (False, True):
        for dtype in DTYPES:
            yield out("train.py", dtype, "tied" if tied else "untied", str(train(folder, made, dtype, tied)))
    for source in (SMALL_BASE, real):
        if source:
            upscale(source, made, "dus", force=True)
            yield out("upscale dus", str(source.name))


@torch.no_grad()
def with_tokenizer(directory: Path, dtype: str, tied: bool, case: str = "llama_gqa_head_dim", seed: int = 0) -> Path:
    """A case with random weights and the tokenizer of the small base."""
    raw = tiny.CASES[case] | {"vocab_size": 2048, "tie_word_embeddings": tied}
    model = Transformer(ModelConfig.from_hf(raw))
    model.init_weights(seed)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms and biases
            parameter += 0.1 * torch.randn_like(parameter)
    companions = {"tokenizer.model": (SMALL_BASE / "tokenizer.model").read_bytes()}
    return save_model(model, directory, dtype, force=True, companions=companions)


def train(folder: Path, made: Path, dtype: str, tied: bool) -> Path:
    """Two steps of train.py; what it leaves in OUT/model, moved to `made`."""
    base = with_tokenizer(folder / "base", dtype, tied)
    command = [sys.executable, "train.py", "--model", base, "--out", folder / "run", "--data", "problems:1:40"]
    command += ["--data-cache", folder / "cache", "--max-steps", 2, "--sequence-length", 32, "--batch-size", 2]
    command += ["--eval-every", 0, "--workers", 1, "--device", "cpu"]
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(made, ignore_errors=True)
    (folder / "run" / "model").rename(made)
    for left in ("run", "base"):
        shutil.rmtree(folder / left)
    return made


# ------------------------------------------------------------------------------------------------ transformers


def transformers_reads(directory: Path, bound: float = NEAR):
    """What from_pretrained makes of a directory: the tensors and the logits that we find there."""
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(
        directory, dtype="auto", attn_implementation="eager", output_loading_info=True
    )
    wrong = {kind: keys for kind, keys in found.items() if keys}
    assert not wrong, f"from_pretrained says {wrong}"
    ours = load_model(directory)
    check_same(model.state_dict(), dict(ours.state_dict()))
    ids = ids_for(ours.config)
    with torch.no_grad():
        check_near(model.float().eval()(ids, use_cache=False).logits, our_logits(directory, ids), bound)
    return model


def run_transformers(folder: Path, real: Path | None, table: Table) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MistralConfig

    for writer, variant, directory in table.some(what_we_write(folder, real)):
        with table.row(writer, "transformers from_pretrained", variant):
            transformers_reads(directory)
        if any(directory.glob("tokenizer.*")):
            with table.row(writer, "transformers AutoTokenizer", variant):
                theirs = AutoTokenizer.from_pretrained(directory)(WORDS, add_special_tokens=False)["input_ids"]
                assert theirs == Tokenizer(directory).encode(WORDS, bos=False)

    golden = {}
    configs = dict.fromkeys(tiny.CASES) | {
        "their own Llama": LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
        ),
        "their own Mistral": MistralConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, sliding_window=7, tie_word_embeddings=True,
        ),
    }  # fmt: skip
    for case, config in configs.items():
        for dtype in DTYPES:
            if config is None:
                base = tiny.write(case, folder / "base", dtype)
                model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", attn_implementation="eager")
            else:
                torch.manual_seed(0)
                model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(getattr(torch, dtype))
            for shard, files in (("1GB", "one file"), ("20KB", "shards")):
                out = folder / "theirs"
                model.save_pretrained(out, max_shard_size=shard)
                with table.row("transformers save_pretrained", "solar load_model", f"{case} {dtype} {files}"):
                    read = load_model(out)
                    check_same(dict(read.state_dict()), model.state_dict())
                    ids = ids_for(read.config)
                    full = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="eager")
                    with torch.no_grad():
                        check_near(our_logits(out, ids), full.eval()(ids, use_cache=False).logits)
                    upscale(out, folder / "grown", "dus:1", force=True)
                if KEPT.get(case) == (dtype, files):
                    golden[case] = describe(out)
                shutil.rmtree(out)
    for source in (real,) if real else ():
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
        model.save_pretrained(folder / "theirs", max_shard_size="100MB")
        AutoTokenizer.from_pretrained(source).save_pretrained(folder / "theirs")
        with table.row("transformers save_pretrained", "solar load_model", f"{source.name}, shards"):
            check_same(dict(load_model(folder / "theirs").state_dict()), model.state_dict())
            assert Tokenizer(folder / "theirs").encode(WORDS, bos=False) == Tokenizer(source).encode(WORDS, bos=False)
    save_json("written.json", golden)


def describe(directory: Path) -> dict:
    """All that a directory says without its weights, which tests/golden/tiny.py makes again: config, shards, index."""
    shards = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors = read_safetensors_header(path)
        (dtype,) = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
        shards[path.name] = {"dtype": dtype, "tensors": list(tensors)}
    index = directory / "model.safetensors.index.json"
    return {
        "config": json.loads((directory / "config.json").read_text()),
        "shards": shards,
        "index": json.loads(index.read_text()) if index.exists() else None,
    }


# ------------------------------------------------------------------------------------------------ mergekit


def mergekit_makes(out: Path, recipe: dict) -> Path:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    shutil.rmtree(out, ignore_errors=True)
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True, out_shard_size=SHARD)
    run_merge(MergeConfiguration.model_validate(recipe), str(out), options)
    return out


def check_what_mergekit_wrote(out: Path, ours: Transformer, table: Table, method: str, variant: str) -> None:
    """The same tensors. mergekit 0.1.5 leaves out the biases of a Llama whose config says that it has some: what it
    writes then is no whole model, and we must say which tensors it lacks."""
    biases = [name for name in ours.state_dict() if name.endswith(".bias")]
    with table.row(f"mergekit {method}", "solar load_model" + ", refused: no biases" * bool(biases), variant):
        if not biases:
            check_same(dict(load_model(out).state_dict()), dict(ours.state_dict()))
            return
        refusal = "loaded, although its biases are missing"
        try:
            load_model(out)
        except ValueError as error:
            refusal = str(error)
        assert "missing from the files" in refusal, refusal
        assert "proj.bias" in refusal, refusal


def run_mergekit(folder: Path, real: Path | None, table: Table) -> None:
    out = folder / "theirs"
    cases = ("llama_gqa_head_dim", "llama_tied", "llama_biases", "mistral_window")  # each takes minutes
    for number, (writer, variant, made) in enumerate(table.some(what_we_write(folder, real, cases))):
        directory = made.rename(folder / f"made{number}")  # mergekit remembers what it has read by its path
        ours = load_model(directory)
        dtype = str(next(ours.parameters()).dtype).removeprefix("torch.")
        slices = [{"sources": [{"model": str(directory), "layer_range": [0, ours.config.num_hidden_layers]}]}]
        with table.row(writer, "mergekit passthrough", variant):
            mergekit_makes(out, {"slices": slices, "merge_method": "passthrough", "dtype": dtype})
            check_what_mergekit_wrote(out, ours, table, "passthrough", variant)
        with table.row(writer, "mergekit linear", variant):
            twin = shutil.copytree(directory, folder / f"twin{number}")
            pairs = zip((directory, twin), (0.25, 0.75), strict=True)
            models = [{"model": str(model), "parameters": {"weight": weight}} for model, weight in pairs]
            mergekit_makes(out, {"models": models, "merge_method": "linear", "dtype": dtype})
            check_what_mergekit_wrote(out, ours, table, "linear", variant)
    for case in ("llama_tied", "llama_gqa_head_dim", "mistral_window"):
        grown = []
        for seed in (0, 1):
            base = tiny.write(case, folder / "base", "float32", seed)
            grown.append(upscale(base, folder / f"{case}{seed}", "dus:1", force=True))
        with table.row("solar upscale dus", "mergekit linear = solar merge", case):
            models = [
                {"model": str(model), "parameters": {"weight": weight}}
                for model, weight in zip(grown, (0.4, 0.6), strict=True)
            ]
            mergekit_makes(out, {"models": models, "merge_method": "linear", "dtype": "float32"})
            merged = merge(grown, folder / "merged", "average", [0.4, 0.6], force=True)
            ids = ids_for(load_model(merged).config)
            check_near(our_logits(out, ids), our_logits(merged, ids))
        with table.row("mergekit linear, slerp", "solar upscale, merge", case):
            upscale(out, folder / "again", "dus:1", force=True)
            merge([out, grown[0]], folder / "again", "slerp", force=True)


# ------------------------------------------------------------------------------------------------ lm_eval


def run_lm_eval(folder: Path, real: Path | None, table: Table) -> None:
    """A multiple-choice task in a file: the log-likelihood of every choice, and of whole texts."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    questions = [
        {"question": "Tom has 3 apples and buys 12 more. How many has he now?", "choices": ["15", "9", "36", "3"]},
        {"question": "The capital of France is", "choices": ["Paris", "Rome", "a river"]},
    ]
    tasks = folder / "tasks"
    tasks.mkdir()
    (tasks / "rows.jsonl").write_text("".join(json.dumps(row | {"gold": 0}) + "\n" for row in questions))
    (tasks / "two.yaml").write_text(
        "task: two_questions\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {tasks}/rows.jsonl\ntest_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "Question: {{question}}\\nAnswer:"\ndoc_to_target: gold\ndoc_to_choice: "{{choices}}"\n'
        "metric_list:\n  - metric: acc\nmetadata:\n  version: 1\n"
    )
    bases = [("the small base", SMALL_BASE)] + ([(real.name, real)] if real else [])
    bases += [
        (f"random {'tied' if tied else 'untied'} {dtype}", with_tokenizer(folder / f"r{tied}{dtype}", dtype, tied))
        for tied in (False, True)
        for dtype in DTYPES
    ]
    for label, base in bases:
        for plan in ("dus", "expand"):
            out = upscale(base, folder / "made", plan, max_shard_bytes=5_000_000, force=True)
            with table.row(f"solar upscale {plan}", "lm_eval --model hf", label):
                tokenizer = Tokenizer(out)
                found = lm_eval.simple_evaluate(
                    model="hf",
                    model_args={"pretrained": str(out), "dtype": "float32", "add_bos_token": tokenizer.adds_bos},
                    tasks=["two_questions"],
                    task_manager=TaskManager(include_path=str(tasks)),
                    device="cpu",
                    batch_size=1,
                    log_samples=True,
                    bootstrap_iters=0,
                )
                model = load_model(out, dtype="float32")
                for sample in found["samples"]["two_questions"]:
                    for request, answer in zip(sample["arguments"], sample["resps"], strict=True):
                        context, continuation = request
                        theirs = float(answer[0][0])
                        ours = loglikelihood(model, tokenizer, context, continuation)
                        assert math.isclose(theirs, ours, rel_tol=1e-4, abs_tol=1e-4), f"{theirs} is not {ours}"


@torch.no_grad()
def loglikelihood(model: Transformer, tokenizer: Tokenizer, context: str, continuation: str) -> float:
    whole, before = (tokenizer.encode(text, bos=tokenizer.adds_bos) for text in (context + continuation, context))
    labels = torch.tensor([[-100] * len(before) + whole[len(before) :]])
    return float(model(torch.tensor([whole]), labels=labels).sum())


# ------------------------------------------------------------------------------------------------ llama.cpp


def run_llama_cpp(folder: Path, real: Path | None, table: Table, sources: Path) -> None:
    """convert_hf_to_gguf.py on what we write: every tensor is there, with our values."""
    sys.path[:0] = [str(sources), str(sources / "gguf-py")]
    import convert_hf_to_gguf
    from gguf import GGUFReader
    from gguf.quants import dequantize

    for writer, variant, directory in table.some(llama_cpp_takes(folder, real)):
        gguf = folder / "made.gguf"
        with table.row(writer, "llama.cpp convert_hf_to_gguf.py", variant):
            sys.argv = ["convert_hf_to_gguf.py", str(directory), "--outfile", str(gguf), "--outtype", "f32"]
            convert_hf_to_gguf.main()
            tensors = GGUFReader(gguf).tensors
            found = {t.name: torch.from_numpy(dequantize(t.data, t.tensor_type).copy()) for t in tensors}
            ours = load_model(directory, dtype="float32")
            assert set(found) - {"rope_freqs.weight"} == {gguf_name(name) for name, _ in ours.named_parameters()}
            for name, tensor in ours.named_parameters():
                theirs = found[gguf_name(name)]
                assert torch.equal(theirs, interleaved(name, tensor.detach(), ours.config)), name


def llama_cpp_takes(folder: Path, real: Path | None) -> Iterator[tuple[str, str, Path]]:
    """Models with a tokenizer, without which it converts nothing."""
    made = folder / "made"
    for case in ("llama_gqa_head_dim", "llama_biases", "llama_rope_llama3", "mistral_window_null"):
        for tied, dtype in ((tied, dtype) for tied in (False, True) for dtype in DTYPES):
            bases = [with_tokenizer(folder / f"base{seed}", dtype, tied, case, seed) for seed in (0, 1)]
            for shard, files in ((10**9, "one file"), (100_000, "shards")):
                variant = f"{case} {dtype} {'tied' if tied else 'untied'} {files}"
                for plan in ("dus:1", "idus:1:1", "expand:1:1"):
                    upscale(bases[0], made, plan, max_shard_bytes=shard, force=True)
                    yield f"solar upscale {plan.partition(':')[0]}", variant, made
                merge(bases, made, "average", max_shard_bytes=shard, force=True)
                yield "solar merge average", variant, made
            yield "solar save_model", variant, save_model(load_model(bases[0]), made, force=True, companions=bases[0])
    for tied, dtype in ((tied, dtype) for tied in (False, True) for dtype in DTYPES):
        yield "solar train.py", f"{dtype} {'tied' if tied else 'untied'}", train(folder, made, dtype, tied)
    for source in (SMALL_BASE, real):
        if source:
            yield "solar upscale dus", source.name, upscale(source, made, "dus", force=True)


def gguf_name(name: str) -> str:
    names = {
        "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    if name.startswith("model.layers."):
        _, _, layer, inner = name.split(".", 3)
        inner, kind = inner.rsplit(".", 1)
        return f"blk.{layer}.{names[inner]}.{kind}"
    return names[name]


def interleaved(name: str, tensor: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Rows of queries and keys as llama.cpp keeps them: those that turn together are adjacent."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    return tensor if heads is None else tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


# ------------------------------------------------------------------------------------------------ main


def main() -> None:
    logging.disable(logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=["transformers", "mergekit", "lm_eval", "llama.cpp"])
    parser.add_argument("--model", type=Path, metavar="DIR", help="a real model, beside the tiny ones")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only each Nth variant of what we write")
    parser.add_argument("--sources", type=Path, metavar="DIR", help="llama.cpp's")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    table = Table(args.every)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        folder = Path(folder)
        if args.peer == "llama.cpp":
            run_llama_cpp(folder, args.model, table, args.sources)
        else:
            {"transformers": run_transformers, "mergekit": run_mergekit, "lm_eval": run_lm_eval}[args.peer](
                folder, args.model, table
            )
    table.finish()


if __name__ == "__main__":
    main()
