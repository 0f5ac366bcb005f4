"""Runs of train.py in tests: a tiny model, ways to start, stop and kill a run, and what one has left behind."""

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

import train
from solar import base, problems
from solar.checkpoint import load_model, save_model
from solar.config import ModelConfig
from solar.model import Transformer

ROOT = Path(__file__).resolve().parent.parent
# Widths that two and three ranks cannot share evenly: 30 rows of hidden size, 45 of the MLP.
CONFIG = ModelConfig(
    model_type="mistral", vocab_size=384, hidden_size=30, intermediate_size=45, num_hidden_layers=3,
    num_attention_heads=3, num_key_value_heads=1, head_dim=10, max_position_embeddings=64, sliding_window=24,
    torch_dtype="float32",
)  # fmt: skip


def write_model(directory: Path, config: ModelConfig = CONFIG, seed: int = 0) -> list[str]:
    """A model with random weights and a tokenizer; returns the texts that the tokenizer was trained on."""
    texts = list(problems.documents(0, 300, "train"))
    model = Transformer(config)
    model.init_weights(seed)
    save_model(model, directory, companions={"tokenizer.model": base.train_tokenizer(texts, config.vocab_size)})
    return texts


# ------------------------------------------------------------------------------------------------ running


@contextlib.contextmanager
def signals_kept() -> Iterator[None]:
    """train.py takes signals for itself: give them back in the end."""
    before = [(number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    yield
    for number, handler in before:
        signal.signal(number, handler)


def flags(options: train.Options) -> list[str]:
    words = []
    for name, value in vars(options).items():
        if value is True:
            words.append(f"--{name.replace('_', '-')}")
        elif value is not None and value is not False:
            words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return words


def launch(options: train.Options, ranks: int = 1, fault: str = "none:0:0", torchrun: tuple = ()):
    """The run as processes of its own, started by torchrun."""
    runner = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    runner += torchrun or ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    return subprocess.run(
        [*runner, "-m", "tests.faulty_train", fault, *flags(options)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def started(options: train.Options, **more) -> multiprocessing.Process:
    """The run in a process of its own, forked from one that has imported torch and done nothing with it.

    more: of `_run`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training"])
    process = context.Process(target=_run, args=(options,), kwargs=more)
    process.start()
    return process


def as_ranks(options: train.Options, size: int) -> list[int]:
    """The run as a job of several ranks, as torchrun would describe it; returns their exit codes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    job = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    ranks = [started(options, environment=job | {"RANK": rank, "LOCAL_RANK": rank}) for rank in range(size)]
    for process in ranks:
        process.join(120)
    return [process.exitcode for process in ranks]


def _run(options: train.Options, environment: dict | None = None, killed_at: int | None = None) -> None:
    """killed_at: the step at whose end the process is gone."""
    os.environ |= {name: str(value) for name, value in (environment or {}).items()}
    with signal_after(signal.SIGKILL, killed_at) if killed_at else contextlib.nullcontext():
        train.run(options)


@contextlib.contextmanager
def signal_after(number: int, step: int) -> Iterator[None]:
    """The signal reaches this process when it has taken that step."""
    inner = train.Meter.entry

    def entry(meter, taken, *rest):
        if taken == step:
            signal.raise_signal(number)
        return inner(meter, taken, *rest)

    train.Meter.entry = entry
    try:
        yield
    finally:
        train.Meter.entry = inner


def interrupted_after(step: int) -> contextlib.AbstractContextManager:
    """SIGTERM reaches the process while it takes that step."""
    return signal_after(signal.SIGTERM, step - 1)


# ------------------------------------------------------------------------------------------------ what it has left


def metrics(options: train.Options) -> list[dict]:
    return [json.loads(line) for line in (Path(options.out) / "metrics.jsonl").read_text().splitlines()]


def steps(options: train.Options) -> list[dict]:
    """The entries of the steps, from the first."""
    entries = [entry for entry in metrics(options) if "loss" in entry]
    assert [entry["step"] for entry in entries] == list(range(1, len(entries) + 1))
    return entries


def losses(options: train.Options) -> list[float]:
    return [entry["loss"] for entry in steps(options)]


def weights(options: train.Options) -> dict[str, torch.Tensor]:
    return load_model(Path(options.out) / "model").state_dict()


def assert_same_weights(a: train.Options, b: train.Options) -> None:
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
