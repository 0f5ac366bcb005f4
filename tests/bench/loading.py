"""Loading a model beside transformers, in pairs: `python -m tests.bench.loading --peer PEER/bin/python`.

The model has 2.04 GB of random bf16 weights (tests/bench/make_checkpoint.py), unless --model gives another. Each load
is a process of its own, and what is timed is the call alone, after the imports: `load_model`, transformers'
`from_pretrained`, and, as the bound for the stored dtype, `map`: nothing but the file mapped and cut into tensors, by
the safetensors library. "used" counts until each weight has been read once by one pass over it: what is only mapped is
read then. Programs take turns; figures are medians. Memory is the most anonymous memory of the process less what it
held after its imports. The file is in the page cache, unless --cold drops it before each load. On a machine that others
use, the seconds of CPU say more than the time that passed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tests.bench.memory import measure

BASE = "out/bench-loading"
SHAPE = ["--hidden-size", "2048", "--intermediate-size", "2816"]


def anonymous() -> int:
    """kB that this process holds."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("RssAnon:")[1].split()[0])


def serve(what: str, directory: str, dtype: str) -> None:
    """Load once; print seconds until loaded, until used, of CPU until loaded, and kB held before."""
    import torch

    cast = None if dtype == "stored" else torch.float32
    if what == "ours":
        from solar.checkpoint import load_model

        load = lambda: load_model(directory, dtype=cast).state_dict()
    elif what == "map":
        from safetensors import safe_open

        def load() -> dict:
            with safe_open(Path(directory) / "model.safetensors", "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    else:
        from transformers import AutoModelForCausalLM

        load = lambda: AutoModelForCausalLM.from_pretrained(directory, dtype=cast or "auto").state_dict()
    held, start, worked = anonymous(), time.perf_counter(), time.process_time()
    weights = load()
    loaded, worked = time.perf_counter() - start, time.process_time() - worked
    for tensor in weights.values():
        tensor.view(torch.int32).max()  # a sum would need memory: it is one of int64
    print(json.dumps([loaded, time.perf_counter() - start, worked, held]), flush=True)
    os._exit(0)  # nobody waits for torch to tidy up


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.loading", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=BASE, help="made if it is not given", metavar="DIR")
    parser.add_argument("--peer", help="an interpreter that has transformers", metavar="PYTHON")
    parser.add_argument("--dtype", nargs="+", default=["stored", "fp32"], choices=["stored", "fp32"])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="drop the file from the page cache before each load")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(*options.serve, options.dtype[0])
        return
    if options.model == BASE and not Path(BASE).exists():
        making = [sys.executable, "-m", "tests.bench.make_checkpoint", "--out", BASE, *SHAPE]
        subprocess.run(making, stdout=subprocess.DEVNULL, check=True)
    files = list(Path(options.model).glob("*.safetensors"))
    for path in files:
        with open(path, "rb") as file:
            while file.read(1 << 20):
                pass
    size = sum(path.stat().st_size for path in files) / 1e6
    print(f"{size:.0f} MB of weights, {'not ' * options.cold}cached, {options.turns} turns")
    for dtype in options.dtype:
        programs = {"ours": sys.executable}
        if options.peer:
            programs["transformers"] = options.peer
        if dtype == "stored":
            programs["map"] = sys.executable
        turns: list[dict[str, tuple[float, ...]]] = []
        for number in range(options.turns):
            turn = {}
            for name in list(programs)[:: -1 if number % 2 else 1]:
                if options.cold:
                    for path in files:
                        with open(path, "rb") as file:
                            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                command = [programs[name], "-m", "tests.bench.loading", "--serve", name, options.model]
                read, write = os.pipe()
                with open(write, "wb") as answer:
                    most, code = measure([*command, "--dtype", dtype], stdout=answer, stderr=subprocess.DEVNULL)[1:]
                with open(read, encoding="ascii") as answer:
                    said = answer.read()
                if code:
                    raise SystemExit(f"exit code {code}: {' '.join(command)}")
                *seconds, held = json.loads(said.splitlines()[-1])
                turn[name] = *seconds, (most - held) / 1000
            turns.append(turn)
        print(f"  {dtype}:")
        for name in programs:
            loaded, used, worked = (statistics.median(turn[name][i] for turn in turns) for i in range(3))
            line = f"    {name:<13}loaded in {loaded:.3f} s ({worked:.3f} s of CPU), used after {used:.2f} s, "
            line += f"{max(turn[name][3] for turn in turns):.0f} MB"
            if name != "ours":
                ratios = sorted(turn[name][0] / turn["ours"][0] for turn in turns)
                line += f"; {statistics.median(ratios):.2f} times ours ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            print(line, flush=True)


if __name__ == "__main__":
    main()
