"""Up-scaling beside `cp` and mergekit, in pairs: `python -m tests.bench.upscale --peer PEER/bin/mergekit-yaml`.

The base is made first, of random weights (tests/bench/make_checkpoint.py): 2.04 GB, which the plan grows to 2.93 GB.
Each turn runs ours, mergekit's passthrough of the same plan, and `cp` of what ours wrote, every other turn the other
way round; figures are medians, ratios those of the turns, with the least and the greatest. A time counts until what was
written is on the disk (ours ends there by itself, and has verified by then), less the start of the program: that of
`--help` for ours and mergekit's, nothing for `cp`. Memory is anonymous memory, as in memory.py. The sources are in the
page cache, unless --cold drops them before each run. On a machine that others use, the seconds of CPU say more than the
time that passed.

--curve runs ours for each of six sizes, from 0.1 to 21 GB of output. The largest runs once and alone: it takes 36 GB of
disk as it is. --address-space caps ours, in bytes, as `ulimit -v` would.
"""

import os
import resource
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Literal, NamedTuple

from solar import cli
from solar.plan import parse_plan
from tests.bench.memory import measure

WIDTHS = {  # --hidden-size, --intermediate-size, --layers of make_checkpoint; GB that dus writes
    "0.1": (256, 704, 32),
    "0.3": (512, 1408, 32),
    "1.2": (1024, 2816, 32),
    "2.9": (2048, 2816, 32),
    "9.7": (4096, 14336, 14),
    "21": (4096, 14336, 32),
}


@dataclass
class Options:
    work: str = cli.flag("out/bench-upscale", help="directory for what is written; removed again", metavar="DIR")
    size: Literal["0.1", "0.3", "1.2", "2.9", "9.7", "21"] = cli.flag("2.9", help="GB of output, about")
    peer: str | None = cli.flag(None, help="the mergekit-yaml of an environment that has it", metavar="FILE")
    turns: int = cli.flag(5, help="of each size", metavar="N")
    verify: Literal["quick", "full"] = cli.flag("quick", help="what ours verifies")
    cold: bool = cli.flag(False, help="drop the sources from the page cache before each run")
    curve: bool = cli.flag(False, help="every size in turn, without the peer")
    address_space: int | None = cli.flag(None, help="limit of ours in bytes, as of `ulimit -v`", metavar="N")


class Run(NamedTuple):
    seconds: float
    start_up: float
    megabytes: float
    cpu: float

    @property
    def net(self) -> float:
        return self.seconds - self.start_up


def passthrough(base: Path, plan: str, depth: int) -> str:
    """mergekit's recipe for a plan: runs of layers that follow each other in the base are slices."""
    runs: list[list[int]] = []
    for source in parse_plan(plan, depth):
        if runs and runs[-1][1] == source.layer:
            runs[-1][1] += 1
        else:
            runs.append([source.layer, source.layer + 1])
    slices = "".join(f"  - sources: [{{model: '{base}', layer_range: [{a}, {b}]}}]\n" for a, b in runs)
    return f"merge_method: passthrough\ndtype: bfloat16\nslices:\n{slices}"


def start_up(command: list[str]) -> float:
    start = monotonic()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    return monotonic() - start


def run(command: list[str], out: Path, source: Path, options: Options, limit: Callable | None = None) -> tuple:
    """Seconds until the command has ended and its output is on the disk; MB of anonymous memory; seconds of CPU."""
    if options.cold:
        for path in source.iterdir():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    os.sync()  # so that nobody pays for what the one before has written or removed
    start, before = monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    _, anonymous, code = measure(command, stdout=subprocess.DEVNULL, preexec_fn=limit)
    if code:
        raise ValueError(f"exit code {code}: {' '.join(command)}")
    for path in out.iterdir():
        cli.fsync(path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return monotonic() - start, anonymous / 1000, cpu


def compare(size: str, options: Options, work: Path) -> None:
    """Print a line for one size, and one for each program that ours is compared with."""
    width, inner, layers = WIDTHS[size]
    base, ours, theirs, copy = work / "base", work / "ours", work / "theirs", work / "copy"
    shape = ["--hidden-size", str(width), "--intermediate-size", str(inner), "--layers", str(layers)]
    making = [sys.executable, "-m", "tests.bench.make_checkpoint", "--out", str(base), *shape]
    subprocess.run(making, stdout=subprocess.DEVNULL, check=True)
    (work / "recipe.yaml").write_text(passthrough(base.resolve(), "dus", layers), encoding="utf-8")
    command = [sys.executable, "-m", "solar.upscale", "--model", str(base), "--out", str(ours), "--plan", "dus"]
    command += ["--verify", options.verify]
    programs = {  # what is run, what it makes, what it reads, what its start is
        "ours": (command, ours, base, [*command[:3], "--help"]),
        "mergekit": (
            [options.peer, str(work / "recipe.yaml"), str(theirs), "--no-copy-tokenizer", "--quiet"],
            theirs,
            base,
            [options.peer, "--help"],
        ),
        "cp": (["cp", "-r", "--reflink=never", str(ours), str(copy)], copy, ours, None),
    }
    if options.peer is None or options.curve:
        del programs["mergekit"]
    if size == "21":
        del programs["cp"]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (options.address_space, options.address_space))

    turns: list[dict[str, Run]] = []
    for number in range(1 if size == "21" else options.turns):
        turn = {}
        for name in list(programs)[:: -1 if number % 2 else 1]:
            what, out, source, starting = programs[name]
            shutil.rmtree(out, ignore_errors=True)
            limited = limit if name == "ours" and options.address_space else None
            seconds, megabytes, cpu = run(what, out, source, options, limited)
            turn[name] = Run(seconds, start_up(starting) if starting else 0.0, megabytes, cpu)
            if name != "ours":
                shutil.rmtree(out)  # ours is what cp copies
        turns.append(turn)
    sizes = [sum(path.stat().st_size for path in folder.iterdir()) / 1e9 for folder in (base, ours)]
    print(f"{sizes[0]:.2f} GB -> {sizes[1]:.2f} GB, {len(turns)} turns, verify {options.verify}, ", end="")
    print("sources not cached" if options.cold else "sources cached")
    median = lambda values: statistics.median(list(values))
    for name in programs:
        net = median(turn[name].net for turn in turns)
        line = f"  {name:<9}{net:7.2f} s ({net / sizes[1]:.2f} s/GB) after {turn[name].start_up:.2f} s of start, "
        line += f"{median(turn[name].cpu for turn in turns):.1f} s of CPU, "
        line += f"{max(turn[name].megabytes for turn in turns):.0f} MB"
        if name != "cp" and "cp" in programs:
            ratios = [turn[name].net / turn["cp"].net for turn in turns]
            line += f"; {median(ratios):.2f} times cp ({min(ratios):.2f} to {max(ratios):.2f})"
        if name == "mergekit":
            ratios = [turn[name].net / turn["ours"].net for turn in turns]
            line += f", {median(ratios):.2f} times ours ({min(ratios):.2f} to {max(ratios):.2f})"
        print(line, flush=True)
    for folder in (base, ours):
        shutil.rmtree(folder)


def main() -> None:
    options = cli.parse(
        Options, prog="python -m tests.bench.upscale", description="Up-scaling, beside cp and mergekit."
    )
    work = Path(options.work)
    work.mkdir(parents=True)
    try:
        for size in WIDTHS if options.curve else [options.size]:
            compare(size, options, work)
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    cli.run(main)
