"""Merging beside mergekit, in pairs: `python -m tests.bench.merge --models A B --peer PEER/bin/mergekit-yaml`.

`python -m tests.bench.make_checkpoint --out A --layers 3`, then `--out B --layers 3 --seed 1`, make two that fit. Each
turn runs ours, theirs, and `cp` of what ours wrote, one after the other on the same machine; the figure is the median,
the ratio that of the turns. A command's time counts until what it wrote is on the disk: ours ends there by itself, and
has read back samples by then; behind the others the output is flushed. Memory is anonymous memory, as in memory.py.
"""

import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from solar import cli
from tests.bench.memory import measure

RECIPES = {
    "average": "merge_method: linear\ndtype: bfloat16\nmodels:\n"
    "  - {{model: '{a}', parameters: {{weight: 0.4}}}}\n  - {{model: '{b}', parameters: {{weight: 0.6}}}}\n",
    "slerp": "merge_method: slerp\ndtype: bfloat16\nbase_model: '{a}'\nparameters: {{t: 0.3}}\n"
    "models:\n  - model: '{a}'\n  - model: '{b}'\n",
}
OURS = {"average": ["--weights", "0.4", "0.6"], "slerp": ["--t", "0.3"]}


@dataclass
class Options:
    models: list[str] = cli.flag(help="two model directories", metavar="DIR")
    work: str = cli.flag("out/bench-merge", help="directory for what is written; removed again", metavar="DIR")
    peer: str | None = cli.flag(None, help="the mergekit-yaml of an environment that has it", metavar="FILE")
    turns: int = cli.flag(3, help="of each method", metavar="N")


def timed(command: list[str], out: Path) -> tuple[float, float]:
    """Seconds until the command has ended and its output is on the disk; MB of anonymous memory."""
    shutil.rmtree(out, ignore_errors=True)
    start = time.monotonic()
    _, anonymous, code = measure(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if code:
        raise ValueError(f"exit code {code}: {' '.join(command)}")
    for path in out.iterdir():
        cli.fsync(path)
    return time.monotonic() - start, anonymous / 1000


def main() -> None:
    options = cli.parse(Options, prog="python -m tests.bench.merge", description="Merging, beside mergekit and cp.")
    a, b = (str(Path(model).resolve()) for model in options.models)
    work = Path(options.work)
    work.mkdir(parents=True)
    try:
        for method, recipe in RECIPES.items():
            (work / "recipe.yaml").write_text(recipe.format(a=a, b=b), encoding="utf-8")
            ours, theirs, copy = work / "ours", work / "theirs", work / "copy"
            commands = {
                "ours": [sys.executable, "-m", "solar.merge", "--models", a, b, "--out", str(ours), "--method", method]
                + OURS[method],
                "mergekit": [options.peer, str(work / "recipe.yaml"), str(theirs), "--no-copy-tokenizer", "--quiet"],
                "cp": ["cp", "-r", "--reflink=never", str(ours), str(copy)],
            }
            if options.peer is None:
                del commands["mergekit"]
            turns = []
            for _ in range(options.turns):
                places = {"ours": ours, "mergekit": theirs, "cp": copy}
                turns.append({name: timed(command, places[name]) for name, command in commands.items()})
            line = f"{method}:"
            for name in commands:
                seconds = statistics.median(turn[name][0] for turn in turns)
                line += f"  {name} {seconds:.2f} s, {max(turn[name][1] for turn in turns):.0f} MB"
            if options.peer is not None:
                ratio = statistics.median(turn["mergekit"][0] / turn["ours"][0] for turn in turns)
                line += f"  mergekit takes {ratio:.2f} times as long"
            print(line, flush=True)
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    cli.run(main)
