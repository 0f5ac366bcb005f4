"""Make the golden numbers beside this file, by running the peers. Never imported by the project or its tests.

    python tests/golden/make_golden.py                                 with transformers: everything but the next two
    python tests/golden/make_golden.py --mergekit                      with mergekit: passthrough.json, merged.*
    python tests/golden/make_golden.py --trl                           with trl: preferences.json
    python tests/golden/make_golden.py --compare DIR --out FILE.npz    with transformers: a real model, kept elsewhere

README.md, next to it, says what each file holds.
"""

import argparse
import hashlib
import itertools
import json
import re
import tempfile
from datetime import date
from pathlib import Path

import numpy as np
import tiny
import torch

HERE = Path(__file__).parent
TEXT = 24  # tokens per row of the stored logits
PROMPTS = (5, 13)  # tokens per prompt of the stored generations: one shorter, one longer than the window of 7
NEW = 16
MARGIN = 0.02  # a greedy choice with less of a lead could go the other way on another machine: none is stored


# ------------------------------------------------------------ forward and greedy


def load(directory: str | Path):
    """transformers' model in fp32, with the attention that is written out in plain operators."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # a generation always has its full length
    model.generation_config.pad_token_id = 0
    return model


@torch.no_grad()
def greedy(model, prompt: list[int], new: int) -> tuple[list[int], float]:
    """The `new` ids that transformers chooses, and the least lead any of them had over the second best.

    The choices were made with a cache; one pass over the whole text has to come to the same ones.
    """
    start = torch.tensor([prompt])
    everything = torch.ones_like(start)  # else `generate` takes an id that looks like padding out of the prompt
    text = model.generate(start, attention_mask=everything, max_new_tokens=new, do_sample=False)
    assert text.shape[1] == len(prompt) + new
    top = model(text, use_cache=False).logits[0, len(prompt) - 1 : -1].topk(2)
    ids = text[0, len(prompt) :].tolist()
    assert top.indices[:, 0].tolist() == ids, "cached and full pass disagree"
    return ids, float((top.values[:, 0] - top.values[:, 1]).min())


def make_models() -> None:
    """logits.npz, greedy.json, configs.json: every tiny case through transformers."""
    arrays, generations, configs = {}, {}, {}
    for case, raw in tiny.CASES.items():
        with tempfile.TemporaryDirectory() as directory:
            model = load(tiny.write(case, directory))
        config = model.config
        configs[case] = {
            name: getattr(config, name, None)
            for name in ("num_key_value_heads", "head_dim", "sliding_window", "rms_norm_eps", "tie_word_embeddings")
        } | {"rope_parameters": dict(config.rope_parameters)}

        ids = tiny.token_ids(0, "text", (2, TEXT), raw["vocab_size"])
        with torch.no_grad():
            logits = model(torch.from_numpy(ids), use_cache=False).logits.numpy()
        arrays[f"{case}/input_ids"] = ids
        arrays[f"{case}/logits_row0"] = logits[0]
        arrays[f"{case}/logits_row1_last"] = logits[1, -1]

        generations[case] = []
        for length in PROMPTS:
            for seed in itertools.count(1):  # the first prompt that leads to a clear and varied text
                prompt = tiny.token_ids(seed, f"prompt {length}", (length,), raw["vocab_size"]).tolist()
                new, margin = greedy(model, prompt, NEW)
                if margin > MARGIN and len(set(new)) > NEW // 2:
                    break
            generations[case].append({"prompt": prompt, "new": new, "margin": round(margin, 4)})
        margins = [generation["margin"] for generation in generations[case]]
        print(f"{case:24} logits within {np.abs(logits).max():.2f}, greedy margins {margins}")
    np.savez_compressed(HERE / "logits.npz", **arrays)
    save_json("greedy.json", generations)
    save_json("configs.json", configs)


# ------------------------------------------------------------ sampling

ALONE = [
    {"temperature": 0.5},
    {"temperature": 1.7},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 60},  # more than there are
    {"top_p": 0.1},
    {"top_p": 0.5},
    {"top_p": 0.9},
    {"top_p": 0.99},
    {"min_p": 0.02},
    {"min_p": 0.3},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8},  # a reward
]
TOGETHER = [
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.5, "top_k": 10},
    {"temperature": 1.5, "min_p": 0.1},
    {"top_k": 8, "top_p": 0.8},
    {"top_p": 0.7, "min_p": 0.15},
    {"repetition_penalty": 1.2, "temperature": 0.8, "top_p": 0.9},
    {"repetition_penalty": 1.5, "temperature": 1.3, "top_k": 12, "top_p": 0.85, "min_p": 0.05},
]


def make_warpers() -> None:
    """warpers.npz and warpers.json: what the sampling settings, alone and together, make of rows of logits.

    The list of processors, and with it their order, is the one that `generate` itself builds.
    """
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    rows, vocab = 4, 50
    logits = torch.from_numpy(tiny.uniform(0, "warper logits", (rows, vocab), 0.0, 2.5))
    context = torch.from_numpy(tiny.token_ids(0, "warper context", (rows, 12), vocab))
    context[:, 6:9] = context[:, :3]  # the penalty counts an id once, however often it stands in the context
    generator = LlamaForCausalLM(
        LlamaConfig(vocab_size=vocab, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )

    def probabilities(setting: dict, scores: torch.Tensor) -> tuple[torch.Tensor, list[str]]:
        wanted = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": None, "repetition_penalty": 1.0} | setting
        processors = generator._get_logits_processor(
            GenerationConfig(do_sample=True, **wanted), input_ids_seq_length=context.shape[1]
        )
        names = [type(processor).__name__ for processor in processors]
        assert len(names) == len(setting), f"{setting} became {names}"
        return processors(context, scores).softmax(-1), names

    settings, results = [], []
    for setting in ALONE + TOGETHER:
        probs, names = probabilities(setting, logits.clone())
        exact, _ = probabilities(setting, logits.double())
        assert torch.equal(probs > 0, exact > 0), f"{setting}: a choice that hangs on the rounding of fp32"
        settings.append({"settings": setting, "processors": names})
        results.append(probs.numpy())
    np.savez_compressed(
        HERE / "warpers.npz", logits=logits.numpy(), context=context.numpy(), probabilities=np.stack(results)
    )
    save_json("warpers.json", settings)
    print(f"{len(settings)} sampling settings on {rows} rows of {vocab} logits")


# ------------------------------------------------------------ mergekit


def make_passthrough() -> None:
    """passthrough.json: depth up-scaling by mergekit (n = 4 layers, m = 1), as a hash of the bytes of every tensor."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge
    from safetensors.torch import load_file

    case, seed, ranges = "llama_gqa_head_dim", 0, [[0, 3], [1, 4]]

    def merged(source_dtype: str) -> tuple[dict, dict]:
        with tempfile.TemporaryDirectory() as directory:
            source = str(tiny.write(case, Path(directory, "source"), source_dtype, seed))
            out = Path(directory, "merged")
            slices = [{"sources": [{"model": source, "layer_range": pair}]} for pair in ranges]
            recipe = {"slices": slices, "merge_method": "passthrough", "dtype": "bfloat16"}
            options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
            run_merge(MergeConfiguration.model_validate(recipe), str(out), options)
            tensors = {}
            for file in out.glob("*.safetensors"):
                tensors |= load_file(file)
            return tensors, json.loads((out / "config.json").read_text())

    tensors, config = merged("bfloat16")
    cast, _ = merged("float32")
    assert tensors.keys() == cast.keys()
    assert all(torch.equal(tensors[name], cast[name]) for name in tensors), "where the cast happens shows"
    described = {
        name: {
            "sha256": hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest(),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
        }
        for name, tensor in sorted(tensors.items())
    }
    save_json(
        "passthrough.json",
        {
            "case": case,
            "seed": seed,
            "source_dtypes": ["bfloat16", "float32"],  # both give these bytes
            "slices": ranges,
            "dtype": "bfloat16",
            "num_hidden_layers": config["num_hidden_layers"],
            "tensors": described,
        },
    )
    print(f"{len(described)} tensors, {config['num_hidden_layers']} layers")


MERGES = {  # method, weights of the models or t
    "average_two": ("linear", [0.5, 0.5]),
    "average_uneven": ("linear", [0.4, 0.6]),
    "average_three": ("linear", [2.0, 3.0, 5.0]),
    "slerp_quarter": ("slerp", 0.25),
    "slerp_half": ("slerp", 0.5),
    "slerp_most": ("slerp", 0.9),
}


def make_merged() -> None:
    """merged.npz: tiny models merged by mergekit, in bf16 (stored as their bits) and in fp32."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge
    from safetensors.torch import load_file, save_file

    arrays = {}
    for dtype in ("bfloat16", "float32"):
        with tempfile.TemporaryDirectory() as directory:
            sources = []
            for number, state in enumerate(tiny.to_merge()):
                source = Path(directory, f"source{number}")
                source.mkdir()
                (source / "config.json").write_text(json.dumps(tiny.MERGED | {"torch_dtype": dtype}))
                tensors = {name: torch.from_numpy(array).to(getattr(torch, dtype)) for name, array in state.items()}
                save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
                sources.append(str(source))
            for case, (method, amount) in MERGES.items():
                recipe = {"merge_method": method, "dtype": dtype}
                if method == "linear":
                    pairs = zip(sources, amount, strict=False)
                    recipe["models"] = [{"model": source, "parameters": {"weight": weight}} for source, weight in pairs]
                else:
                    recipe["models"] = [{"model": source} for source in sources[:2]]
                    recipe |= {"base_model": sources[0], "parameters": {"t": amount}}
                out = Path(directory, case)
                options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
                run_merge(MergeConfiguration.model_validate(recipe), str(out), options)
                for file in sorted(out.glob("*.safetensors")):
                    for name, tensor in sorted(load_file(file).items()):
                        assert tensor.dtype == getattr(torch, dtype)
                        bits = tensor.view(torch.uint16) if dtype == "bfloat16" else tensor
                        arrays[f"{dtype}/{case}/{name}"] = bits.numpy()
    np.savez_compressed(HERE / "merged.npz", **arrays)
    save_json("merged.json", {case: {"method": m, "amount": amount} for case, (m, amount) in MERGES.items()})
    print(f"{len(MERGES)} merges, {len(arrays)} tensors")


# ------------------------------------------------------------ trl


def make_preferences() -> None:
    """preferences.json: pairs of answers through TRL's DPOTrainer: sequence log-probabilities, losses, rewards.

    Its own methods do it all, from the text on (a token is a word, the number of its id), one batch padded on the
    right. Losses are asked for pair by pair, since a batch gives their mean only.
    """
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    case, seeds, pairs = "llama_gqa_head_dim", {"policy": 0, "reference": 1}, 6
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    vocab = {special[i] if i < 4 else f"w{i}": i for i in range(tiny.CASES[case]["vocab_size"])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="</s>", pad_token="<pad>", padding_side="right"
    )
    texts = []
    for pair in range(pairs):
        texts.append({})
        for part, most in (("prompt", 9), ("chosen", 12), ("rejected", 13)):
            ids = 4 + tiny.token_ids(pair, part, (1 + (7 * pair + len(part)) % most,), len(vocab) - 4)
            texts[-1][part] = "".join(f" w{i}" for i in ids)

    results = {"case": case, "seeds": seeds, "losses": []}
    with tempfile.TemporaryDirectory() as folder:
        of = {name: load(tiny.write(case, Path(folder, name), seed=seed)) for name, seed in seeds.items()}
        settings = [("sigmoid", 0.1, 0.0), ("sigmoid", 0.5, 0.0), ("hinge", 0.1, 0.0), ("hinge", 0.5, 0.0)]
        settings += [("ipo", 0.1, 0.0), ("ipo", 0.5, 0.0), ("aot_unpaired", 0.1, 0.1), ("aot_unpaired", 0.5, 0.25)]
        for kind, beta, smoothing in settings:
            config = DPOConfig(
                output_dir=folder, loss_type=[kind], beta=beta, label_smoothing=smoothing, max_length=None,
                per_device_train_batch_size=pairs, report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False,
            )  # fmt: skip
            trainer = DPOTrainer(
                model=of["policy"], ref_model=of["reference"], args=config, train_dataset=Dataset.from_list(texts),
                processing_class=tokenizer,
            )  # fmt: skip
            rows = [
                {name: row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
                for row in trainer.train_dataset
            ]
            trainer.model.eval()
            losses, rewards = [], {"chosen": [], "rejected": []}
            for row in rows:
                trainer._metrics["eval"].clear()
                losses.append(trainer._compute_loss(trainer.model, trainer.data_collator([row]), False).item())
                for side, values in rewards.items():
                    values.append(trainer._metrics["eval"][f"rewards/{side}"][0])
            results["losses"].append(
                {"kind": kind, "beta": beta, "label_smoothing": smoothing, "losses": losses, "rewards": rewards}
            )
        for name in seeds:
            model = trainer.model if name == "policy" else trainer.ref_model
            chosen, rejected = trainer.compute_ref_log_probs(model, trainer.data_collator(rows))
            results[name] = {"chosen": chosen.tolist(), "rejected": rejected.tolist()}
    results["pairs"] = rows
    save_json("preferences.json", results)
    print(f"{pairs} pairs of answers, {len(settings)} losses")


# ------------------------------------------------------------ real models

REAL_PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a small village by the sea, there lived",
    "Question: Tom has 3 apples and buys 12 more. He gives half of them away. How many are left?\nAnswer:",
    "Le chat est assis sur la table. In English:",
]


def compare(directory: str, out: str) -> None:
    """Save a real model's ids, fp32 logits and 32 greedy ids per prompt, and print a summary to lay beside our own."""
    from transformers import AutoTokenizer

    model, tokenizer = load(directory), AutoTokenizer.from_pretrained(directory)
    arrays = {"prompts": np.array(REAL_PROMPTS)}
    for i, prompt in enumerate(REAL_PROMPTS):
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0]
        new, margin = greedy(model, ids, 32)
        arrays |= {f"ids_{i}": np.array(ids), f"logits_{i}": logits.numpy(), f"greedy_{i}": np.array(new)}
        arrays[f"margin_{i}"] = np.array(margin)
        best = [(tokenizer.decode([k]), round(float(logits[-1, k]), 4)) for k in logits[-1].topk(5).indices]
        print(f"\n{prompt!r}: ids {ids}")
        print(f"  logits mean {logits.mean():.5f} std {logits.std():.5f} min {logits.min():.4f} max {logits.max():.4f}")
        print(f"  next {best}")
        print(f"  greedy (least lead {margin:.4f}): {tokenizer.decode(new)!r}")
    np.savez_compressed(out, **arrays)
    print(f"\n{out}")


# ------------------------------------------------------------ main


def save_json(name: str, value) -> None:
    """JSON with every list of plain values on one line, so that a diff can be read."""
    text = json.dumps(value, indent=1)
    text = re.sub(r"\[[^][{}]*\]", lambda plain: " ".join(plain[0].split()), text)
    (HERE / name).write_text(text + "\n")


def record_versions(*packages: str) -> None:
    """versions.json: what the numbers were made with. Each of the two environments records its own."""
    from importlib.metadata import version

    path = HERE / "versions.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    known[packages[0]] = {name: version(name) for name in (*packages, "torch", "numpy")} | {"date": str(date.today())}
    save_json("versions.json", dict(sorted(known.items())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", action="store_true", help="make passthrough.json and merged.npz, needs mergekit")
    parser.add_argument("--trl", action="store_true", help="make preferences.json, needs trl")
    parser.add_argument("--compare", metavar="MODEL_DIR", help="run a real model instead, needs transformers")
    parser.add_argument("--out", metavar="FILE.npz", help="where --compare saves")
    args = parser.parse_args()
    if bool(args.compare) != bool(args.out):
        parser.error("--compare and --out go together")
    if args.compare:
        compare(args.compare, args.out)
    elif args.mergekit:
        make_passthrough()
        make_merged()
        record_versions("mergekit", "transformers", "safetensors")
    elif args.trl:
        make_preferences()
        record_versions("trl", "transformers")
    else:
        make_models()
        make_warpers()
        record_versions("transformers")


if __name__ == "__main__":
    main()
