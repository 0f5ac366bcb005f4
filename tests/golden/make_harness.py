"""What lm-evaluation-harness makes of the six benchmarks, on local files: its templates, shots, scorers and filters.

    python tests/golden/make_harness.py                  the small base on made-up questions: harness.json, prompts.txt
    python tests/golden/make_harness.py --model DIR --data DIR --limit 50 --out FILE     a real model, kept elsewhere

In an environment with lm_eval; never imported by the project or its tests. The tasks are those that lm_eval ships
(included by their path), with three changes: the rows come from files, the shots are the first ones (its own first_n
sampler, which MMLU has anyway), and of GSM8K's answers at most --max-new-tokens tokens are generated. The files are
read here by json and csv alone, so that a mistake of ours in reading them would show, too.
"""

import argparse
import csv
import hashlib
import json
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BASE = ROOT / "solar/assets/base"
SHOTS = {"arc_challenge": 25, "hellaswag": 10, "mmlu": 5, "truthfulqa": 0, "winogrande": 5, "gsm8k": 5}
SHIPPED = {
    "arc_challenge": "arc/arc_challenge.yaml", "hellaswag": "hellaswag/hellaswag.yaml",
    "mmlu": "mmlu/default/_default_template_yaml", "truthfulqa": "truthfulqa/truthfulqa_mc2.yaml",
    "winogrande": "winogrande/default.yaml", "gsm8k": "gsm8k/gsm8k.yaml",
}  # fmt: skip
# What extractors may stumble over; the gold answer is "... #### 1234".
HARD = [
    "#### 1234", "####1234", "#### 1,234", "#### $1,234", "#### -1234", "#### 1234.", "#### 1234.0", "#### 1234.00",
    "so #### 12 and then #### 1234", "so #### 1234 and then #### 12", "The answer is 1234.", "The answer is $1,234.",
    "1234", "", "no number", "####", "#### ", "#### .", "#### ,", "#### -", "####  1234", "#### 1234 apples",
    "a 5 b 1234", "a 1234 b 5", "$5", "5", "-5", "--5", "3-5", "1.5.2", "1/2", "12:34", "1e3", "1 234", "1234%",
    "1,2,3", "...", "$$$", "-$5", "- 5", "#### 1234\n\nQuestion: 5", "#### 1234</s>#### 5", "\u0661\u0662", "１２３４",
    "#### \n1234", "x=1234=y", "1234\n####\n5", "#### 1.234", "#### 01234", "#### +1234", "## 1234", "##### 1234",
    "<<600+634=1234>>1234", "1234.5", "#### 1234.5", "(1234)", "[1234]", "'1234'", "#### (1234)", "1234-", "-1234-",
]  # fmt: skip


def jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def first_of(folder: Path, *names: str) -> Path:
    return next(folder / name for name in names if (folder / name).exists())


def rows_of(name: str, data: Path) -> dict[str, tuple[list[dict], list[dict]]]:
    """{subject or "": (rows, rows to take shots from)}, in the fields that the hub's copies have."""
    folder = data / name
    if name == "mmlu":
        found = {}
        for path in sorted((folder / "test").glob("*_test.csv")):
            subject = path.name.removesuffix("_test.csv")
            both = []
            for file in (path, folder / f"dev/{subject}_dev.csv"):
                with open(file, newline="", encoding="utf-8") as lines:
                    both.append([
                        {"question": row[0], "choices": row[1:5], "answer": "ABCD".index(row[5])}
                        for row in csv.reader(lines)
                    ])  # fmt: skip
            found[subject] = tuple(both)
        return found
    if name == "truthfulqa":
        rows = json.loads((folder / "mc_task.json").read_text(encoding="utf-8"))
        for row in rows:
            for key in ("mc1_targets", "mc2_targets"):
                row[key] = {"choices": list(row[key]), "labels": list(row[key].values())}
        return {"": (rows, [])}
    tests = {"arc_challenge": ("test.jsonl",), "hellaswag": ("hellaswag_val.jsonl", "val.jsonl"),
             "winogrande": ("dev.jsonl",), "gsm8k": ("test.jsonl",)}[name]  # fmt: skip
    shots = {"arc_challenge": ("train.jsonl",), "hellaswag": ("hellaswag_train.jsonl", "fewshot.jsonl"),
             "winogrande": ("train_xl.jsonl", "fewshot.jsonl"), "gsm8k": ("train.jsonl",)}[name]  # fmt: skip
    return {"": (jsonl(first_of(folder, *tests)), jsonl(first_of(folder, *shots)))}


def write_tasks(names: list[str], data: Path, limit: int | None, new_tokens: int, folder: Path) -> dict[str, list[str]]:
    """A yaml and json files for each task; {benchmark: names of its tasks}."""
    import lm_eval

    shipped = Path(lm_eval.__file__).parent / "tasks"
    made: dict[str, list[str]] = {}
    for name in names:
        for subject, (rows, shots) in rows_of(name, data).items():
            task = f"local_{name}" + (f"_{subject}" if subject else "")
            files = {"test": rows[:limit]} | ({"train": shots} if shots else {})
            for split, content in files.items():
                (folder / f"{task}.{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
            config = {
                "include": str(shipped / SHIPPED[name]),
                "task": task,
                "dataset_path": "json",
                "dataset_name": None,
                "dataset_kwargs": {"data_files": {split: str(folder / f"{task}.{split}.jsonl") for split in files}},
                "training_split": "train" if shots else None,
                "fewshot_split": "train" if shots else None,
                "validation_split": None,
                "test_split": "test",
                "num_fewshot": SHOTS[name],
                "fewshot_config": {"sampler": "first_n"},
                "tag": None,
            }
            if name == "mmlu":
                about = subject.replace("_", " ")
                head = f"The following are multiple choice questions (with answers) about {about}.\n\n"
                config["description"] = head
            if name == "gsm8k":
                config["generation_kwargs"] = {"until": ["Question:", "</s>", "<|im_end|>"], "do_sample": False,
                                               "temperature": 0.0, "max_gen_toks": new_tokens}  # fmt: skip
            # JSON is YAML.
            (folder / f"{task}.yaml").write_text(json.dumps(config, indent=1))
            made.setdefault(name, []).append(task)
    return made


def model_of(path: str, bos: bool, batch_size: int, max_length: int | None):
    import transformers
    from lm_eval.models.huggingface import HFLM
    from tokenizers.processors import TemplateProcessing

    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    if bos:
        pair = (tokenizer.bos_token, tokenizer.bos_token_id)
        tokenizer._tokenizer.post_processor = TemplateProcessing(single=f"{pair[0]} $A", special_tokens=[pair])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return HFLM(pretrained=path, tokenizer=tokenizer, dtype="float32", device="cpu", batch_size=batch_size,
                max_length=max_length, add_bos_token=bos)  # fmt: skip


def run(lm, made: dict[str, list[str]], folder: Path) -> dict[str, dict]:
    """{benchmark: {"items": [...], "results": {task: metrics}, "seconds": ...}}"""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager, found = TaskManager(include_path=str(folder), include_defaults=False), {}
    for name, names in made.items():
        start, cpu = time.monotonic(), time.process_time()
        out = lm_eval.simple_evaluate(lm, tasks=names, task_manager=manager, bootstrap_iters=2, log_samples=True)
        seconds, cpu = time.monotonic() - start, time.process_time() - cpu
        items = []
        for task in names:
            samples = out["samples"][task]
            for doc_id in sorted({sample["doc_id"] for sample in samples}):
                of = [sample for sample in samples if sample["doc_id"] == doc_id]
                first = of[0]
                item = {"subject": task.removeprefix("local_mmlu_")} if name == "mmlu" else {}
                item |= {"row": doc_id}
                if name == "gsm8k":
                    item["answer"] = first["resps"][0][0]
                    for sample in of:
                        kind = sample["filter"].partition("-")[0]
                        item[f"{kind}_answer"], item[kind] = sample["filtered_resps"][0], sample["exact_match"]
                else:
                    item["loglikelihoods"] = [float(pair[0]) for pair in first["filtered_resps"]]
                    item |= {key: float(first[key]) for key in ("acc", "acc_norm") if key in first}
                arguments = first["arguments"]
                asked = arguments.values() if isinstance(arguments, dict) else arguments
                item["requests"] = [
                    [*pair.values()][:2] if isinstance(pair, dict) else list(pair[:2]) for pair in asked
                ]
                items.append(item)
        results = {task: {key: value for key, value in out["results"][task].items() if isinstance(value, float)}
                   for task in names}  # fmt: skip
        found[name] = {"seconds": seconds, "cpu_seconds": cpu, "results": results, "items": items}
        print(f"{name}: {len(items)} in {seconds:.1f} s", file=sys.stderr, flush=True)
    return found


def extractions() -> list[dict]:
    """What lm_eval's filters find in HARD, and whether it counts as 1234."""
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter

    ignore = [",", "\\$", "(?s).*#### ", "\\.$"]
    filters = {
        "strict": RegexFilter("#### (\\-?[0-9\\.\\,]+)"),
        "flexible": RegexFilter("(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1),
    }
    found = []
    for text in HARD:
        entry = {"text": text}
        for kind, extract in filters.items():
            entry[f"{kind}_answer"] = extract.apply([[text]], [{}])[0][0]
            marked = exact_match_hf_evaluate([entry[f"{kind}_answer"]], ["600 + 634 = 1,234\n#### 1,234"], ignore, True)
            entry[kind] = float(marked["exact_match"])
        found.append(entry)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(BASE))
    parser.add_argument("--data")
    parser.add_argument("--tasks", default=",".join(SHOTS))
    parser.add_argument("--limit", type=int)
    parser.add_argument("--bos", action="store_true")
    parser.add_argument("--max-length", type=int)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--out")
    options = parser.parse_args()
    from importlib.metadata import version

    report = {"versions": {name: version(name) for name in ("lm_eval", "transformers", "torch", "datasets")}}
    names = options.tasks.split(",")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if options.data:
            made = write_tasks(names, Path(options.data), options.limit, options.max_new_tokens, folder)
            lm = model_of(options.model, options.bos, options.batch_size, options.max_length)
            report |= run(lm, made, folder)
            Path(options.out).write_text(json.dumps(report) + "\n")
            return
        sys.path.insert(0, str(ROOT))
        from solar import standin

        data, digest = folder / "data", hashlib.sha256()
        for name, text in standin.files():
            path = data / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="")
            digest.update(f"{name}\n{text}".encode())
        report |= {"data": digest.hexdigest(), "max_new_tokens": options.max_new_tokens, "hard": extractions()}
        # All questions without BOS; the first ones with it; and those where most prompts are longer than a model reads.
        prompts = ""
        for case, bos, length, limit in (("plain", False, None, None), ("bos", True, None, 12), ("cut", True, 192, 12)):
            made = write_tasks(names, data, limit, options.max_new_tokens, folder)
            report[case] = run(model_of(str(BASE), bos, 8, length), made, folder)
            for name, entry in report[case].items():
                del entry["seconds"], entry["cpu_seconds"]
                for item in entry["items"]:
                    requests = item.pop("requests")
                    if case == "plain" and item["row"] == 0 and item.get("subject", "made_up_sums") == "made_up_sums":
                        for number, (context, continuation) in enumerate(requests):
                            if not number or context != requests[0][0]:
                                prompts += f"======== {name}: prompt\n{context}\n"
                            text = repr(continuation) if name != "gsm8k" else "(generated)"
                            prompts += f"======== {name}: continuation\n{text}\n"
                    if "loglikelihoods" in item:
                        item["loglikelihoods"] = [round(value, 5) for value in item["loglikelihoods"]]
        text = json.dumps(report, ensure_ascii=False)
        text = text.replace('{"subject"', '\n{"subject"').replace('{"row"', '\n{"row"').replace('{"text"', '\n{"text"')
        (HERE / "harness.json").write_text(text + "\n", encoding="utf-8")
        (HERE / "prompts.txt").write_text(prompts, encoding="utf-8")


if __name__ == "__main__":
    main()
