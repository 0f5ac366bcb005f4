"""The six benchmarks beside lm-evaluation-harness: same model, questions, shots and threads; scores, choices, times.

    python -m tests.bench.evaluate --peer PYTHON --model DIR --data DIR [--limit 50] [--tasks NAME,...] [--keep DIR]

PYTHON is that of an environment with lm_eval. Times are those that each program needs from the questions to the scores,
without the loading of the model. --keep keeps both reports, and what is there is not computed again.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from solar.tasks import TASKS

ROOT = Path(__file__).resolve().parent.parent.parent


def run(command: list, out: Path) -> dict:
    if not out.exists():
        subprocess.run([str(word) for word in command], cwd=ROOT, check=True, stdout=sys.stderr, env=os.environ)
    return json.loads(out.read_text())


def likeliest(item: dict) -> object:
    logps = item.get("loglikelihoods")
    return item["answer"].strip() if logps is None else logps.index(max(logps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--limit", default="50")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--max-new-tokens", default="256")
    parser.add_argument("--batch-size", default="1", help="of lm_eval")
    parser.add_argument("--keep")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        keep = Path(options.keep or scratch).absolute()
        keep.mkdir(parents=True, exist_ok=True)
        print(f"{'benchmark':<14} {'n':>4}  {'lm_eval':>8} {'solar':>8}  same choice  largest difference of log p"
              f"  {'lm_eval':>8} {'solar':>8} {'ratio':>6}")  # fmt: skip
        for name in options.tasks.split(","):
            shared = ["--model", options.model, "--data", options.data, "--tasks", name, "--limit", options.limit,
                      "--max-new-tokens", options.max_new_tokens]  # fmt: skip
            out = keep / f"{name}.lm_eval.json"
            peer = [options.peer, "tests/golden/make_harness.py", *shared, "--batch-size", options.batch_size]
            theirs = run([*peer, "--out", out], out)[name]
            out = keep / f"{name}.solar.json"
            mine = run([sys.executable, "-m", "solar.evaluate", *shared, "--dtype", "fp32", "--device", "cpu",
                        "--bos", "no", "--out", out], out)  # fmt: skip
            items, seconds = mine["items"][name], mine["seconds"][name]
            key = {"mc2": "acc", "exact_match": "strict"}.get(TASKS[name].metric, TASKS[name].metric)
            # Of MMLU the plain mean over subjects.
            subjects = sorted({item.get("subject", "") for item in theirs["items"]})
            of = [[item[key] for item in theirs["items"] if item.get("subject", "") == name] for name in subjects]
            score = sum(sum(marks) / len(marks) for marks in of) / len(of)
            pairs = list(zip(items, theirs["items"], strict=True))
            same = sum(likeliest(one) == likeliest(other) for one, other in pairs)
            logps = [(x, y) for one, other in pairs if name != "gsm8k"
                     for x, y in zip(one["loglikelihoods"], other["loglikelihoods"], strict=True)]  # fmt: skip
            worst = f"{max(abs(x - y) / abs(y) for x, y in logps):.1e} of it" if logps else "-"
            print(f"{name:<14} {len(items):>4}  {100 * score:8.2f} {100 * mine['results'][name]['score']:8.2f}  "
                  f"{f'{same} of {len(items)}':<11}  {worst:<27}  {theirs['seconds']:6.1f} s {seconds:6.1f} s "
                  f"{theirs['seconds'] / seconds:6.1f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
