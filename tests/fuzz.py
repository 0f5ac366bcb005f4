"""Coverage-guided fuzzing of what reads the files of strangers. Run by hand; pytest does not collect it.

    python -m venv ENV && ENV/bin/pip install torch numpy sentencepiece safetensors hypothesis atheris
    ENV/bin/python -m tests.fuzz header --seconds 3600 --corpus DIR      header, index, config, archive or plan
    ENV/bin/python -m tests.fuzz header --again FILE                     what a run has left behind as its finding

atheris (libFuzzer) counts the branches of solar/ that an input takes and keeps those that take new ones. A finding is
any exception but a refusal in clear lines, an acceptance that is wrong, a second of CPU, or 2 GB of memory. What is
found here becomes a case of tests/hostile, or a test beside the reader.
"""

import argparse
import json
import random
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

LINE = 1500  # characters of a line of a refusal, without those of the directory


def check_refusal(refusal: str, place: Path, named: tuple[str, ...]) -> None:
    """One clear line, or a list of them; each printable and of bearable length; the file is named."""
    lines = refusal.split("\n")
    assert len(lines) == 1 or (lines[0].endswith(": ") and all(line.startswith("  - ") for line in lines[1:])), refusal
    for line in lines:
        assert line.isprintable(), ascii(line)
        assert len(line.replace(str(place), "")) < LINE, line
        assert "Traceback" not in line
        assert "sys.set_int_max" not in line  # advice to whom the error is not for
    assert any(name in refusal for name in named), refusal


# ------------------------------------------------------------------------------------------------ the readers


class Target:
    """A directory with a sound model in it, of which one file is the input; and the inputs to begin with."""

    def __init__(self, reader: str, folder: Path):
        from tests import hostile

        self.folder, self.reader = folder, reader
        header, shards = hostile.entries(hostile.NAMES), hostile.sharded()
        size = max(entry["data_offsets"][1] for entry in header.values())
        self.files, self.seeds = {
            "header": ({}, [size.to_bytes(2, "little") + hostile.dumps(header)]),
            "index": (shards, [shards["model.safetensors.index.json"]]),
            "config": (
                hostile.single() | hostile.release(),
                [b"c" + hostile.dumps(hostile.CONFIG | more) for more in MORE] + [b"p" + hostile.dumps(hostile.PARAMS)],
            ),
            "archive": (
                {},
                [b"z" + hostile.archive(hostile.program({"a": hostile.described(0, (2, 3))}), {"data/0": b"x" * 12})]
                + [b"p" + hostile.program({"a": hostile.described(0, (2, 3)), "b": hostile.described(1, (4,))})]
                + [b"p" + pickled for pickled in hostile.BOMBS.values() if len(pickled) < 2000],
            ),
            "plan": ({}, [hostile.dumps(hostile.sound_plan), hostile.dumps({"plan": hostile.sound_plan})]),
        }[reader]
        for name, content in self.files.items():
            (folder / name).write_bytes(content)

    def __call__(self, data: bytes) -> None:
        start = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                getattr(self, self.reader)(data)
            except (ValueError, OSError) as error:
                check_refusal(str(error), self.folder, (str(self.folder),))
        assert time.process_time() - start < 1

    def header(self, data: bytes) -> None:
        """The length word is always right, and then as many bytes as the first two say."""
        from solar.tensorfile import read_safetensors_header

        path, header = self.folder / "x.safetensors", data[2:]
        size = int.from_bytes(data[:2], "little")
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
        found = read_safetensors_header(path)
        assert sum(tensor.nbytes for tensor in found.values()) == size
        assert all(tensor.offset >= 8 + len(header) for tensor in found.values())

    def index(self, data: bytes) -> None:
        from solar.checkpoint import CheckpointReader

        (self.folder / "model.safetensors.index.json").write_bytes(data)
        found = CheckpointReader(self.folder)
        assert json.loads(data)["weight_map"].keys() == found.weights.keys()
        assert all(weight.stored.path.parent == self.folder for weight in found.weights.values())

    def config(self, data: bytes) -> None:
        from solar.checkpoint import CheckpointReader
        from solar.config import ModelConfig

        hf = data[:1] != b"p"
        (self.folder / ("config.json" if hf else "params.json")).write_bytes(data[1:])
        if not hf:
            (self.folder / "config.json").unlink(missing_ok=True)
        config = CheckpointReader(self.folder).config
        assert ModelConfig.from_hf(config.to_hf()) == config

    def archive(self, data: bytes) -> None:
        """A whole archive, or the pickle in one."""
        from solar.archive import read_torch_archive
        from tests import hostile

        path = self.folder / "x.bin"
        records = {"data/0": b"x" * 12, "data/1": b"x" * 8}
        path.write_bytes(data[1:] if data[:1] == b"z" else hostile.archive(data[1:], records))
        for tensor in read_torch_archive(path).values():
            assert tensor.offset >= 0
            assert tensor.offset + tensor.nbytes <= path.stat().st_size

    def plan(self, data: bytes) -> None:
        from solar.plan import from_json, layer_table, new_layers, parse_plan, seams, to_json

        path = self.folder / "plan.json"
        path.write_bytes(data)
        plan = parse_plan(str(path), 2)
        assert from_json(to_json(plan), 2) == plan
        assert len(new_layers(plan)) + len(seams(plan)) <= 2 * len(layer_table(plan)) * len(plan)


# Configs of other kinds, to begin with.
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MORE: list[dict[str, Any]] = [
    {},
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_parameters": LLAMA3 | {"rope_theta": 1e4, "original_max_position_embeddings": 64}, "rope_theta": 1e4},
    {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 8, "layer_types": None},
    {"eos_token_id": [1, 2], "pad_token_id": 0, "dtype": "float32", "quantization_config": None, "zz": [1]},
]
POOL = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    2**31,
    2**47,
    2**63,
    10**400,
    0.5,
    1e308,
    1e400,
    "",
    "a",
    "\n",
    "\x1b",
    "\ud800",
]
POOL += [[], {}, [0], [[]], {"a": 0}, "BF16", "U8", "llama", "mistral", "copy", "../x", "/x", "x\0", "layer", "type"]


def mutate_json(data: bytes, skip: int, rng: random.Random) -> bytes | None:
    """The JSON behind the first `skip` bytes with one part replaced, left out, or put somewhere else; None: no JSON."""
    try:
        value = json.loads(data[skip:])
    except (ValueError, RecursionError):
        return None
    places = []  # (container, key) of every part
    waiting = [value]
    while waiting:
        container = waiting.pop()
        if isinstance(container, dict | list):
            for key in list(container) if isinstance(container, dict) else range(len(container)):
                places.append((container, key))
                waiting.append(container[key])
    if not places:
        return None
    (container, key), (donor, other) = rng.choice(places), rng.choice(places)
    new = json.loads(json.dumps(donor[other])) if rng.random() < 0.3 else rng.choice(POOL)
    how = rng.randrange(4)
    if how == 0:
        del container[key]
    elif how == 1 and isinstance(container, dict):
        container[str(rng.choice(POOL))[:99]] = container.pop(key)
    elif how == 2 and type(container[key]) is int:
        container[key] += rng.choice([-1, 1, -2, 2, 8, -8])
    else:
        container[key] = new
    return data[:skip] + json.dumps(value).encode()


# ------------------------------------------------------------------------------------------------ the run


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("reader", choices=["header", "index", "config", "archive", "plan"])
    parser.add_argument("--seconds", type=int, default=3600)
    parser.add_argument("--corpus", type=Path, help="inputs that took new branches are kept here")
    parser.add_argument("--again", type=Path, help="one input, once")
    options = parser.parse_args()
    import atheris
    import torch  # noqa: F401 (before the instrumentation, which would take minutes for it)

    with atheris.instrument_imports(include=["solar"]):
        import solar.archive
        import solar.checkpoint  # noqa: F401
    with tempfile.TemporaryDirectory() as folder:
        target = Target(options.reader, Path(folder))
        if options.again:
            target(options.again.read_bytes())
            return
        corpus = options.corpus or Path(folder, "corpus")
        corpus.mkdir(parents=True, exist_ok=True)
        for number, seed in enumerate(target.seeds):
            (corpus / f"seed-{number}").write_bytes(seed)
        skip = {"header": 2, "config": 1}.get(options.reader, 0)

        def mutate(data: bytes, max_size: int, seed: int) -> bytes:
            rng = random.Random(seed)
            changed = None
            if options.reader != "archive" and rng.random() < 0.5:
                changed = mutate_json(data, skip, rng)
            return (atheris.Mutate(data, max_size) if changed is None else changed)[:max_size]

        # libFuzzer's own timeout is of the clock on the wall, and a process may be stopped for a while.
        flags = [f"-max_total_time={options.seconds}", "-timeout=1200", "-rss_limit_mb=2048", "-max_len=8192"]
        flags += [f"-artifact_prefix={corpus.parent}/finding-{options.reader}-", "-print_final_stats=1"]
        atheris.Setup([sys.argv[0], str(corpus), *flags], target, custom_mutator=mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
