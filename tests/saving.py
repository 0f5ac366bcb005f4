"""Checkpoints in tests: a small model and its AdamW, filled by a seed; ranks that save together; ways to fail."""

import errno
import multiprocessing
import os
import signal
import time
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from solar.config import ModelConfig
from solar.model import Transformer
from solar.restore import load
from solar.snapshot import Snapshots
from tests.golden import tiny

# Ranks are forked from a server that has imported everything once and started no thread.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.saving", "pytest", "torch._dynamo"])  # which DTensor imports later
SMALL = ModelConfig.from_hf(tiny.CASES["llama_gqa_head_dim"])


class Toy(nn.Module):
    """Sizes that no number of ranks divides, one row that most ranks have none of, a frozen weight, a tied one."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 7)
        self.frozen = nn.Linear(7, 6, bias=False)
        self.one = nn.Linear(6, 1)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.frozen.requires_grad_(False)

    def forward(self, ids):
        x = self.frozen(self.up(self.embed(ids)).tanh())
        return self.head(x) * self.one(x)


def build(model: nn.Module | None = None, dtype=torch.float32, sharded: bool = False, replicas: int = 1, **adamw):
    """A model and its AdamW, over all ranks there are."""
    model = (Toy() if model is None else model).to(dtype)
    if sharded:
        size = dist.get_world_size()
        mesh = init_device_mesh("cpu", (replicas, size // replicas), mesh_dim_names=("replicate", "shard"))
        mesh = mesh["shard"] if replicas == 1 else mesh
        for layer in model.model.layers if isinstance(model, Transformer) else [model.up]:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model, torch.optim.AdamW(trained, lr=1e-2, **adamw)


@torch.no_grad()
def fill(model, optimizer, seed: int) -> None:
    """Weights and moments that depend on the seed and their names, and on nothing else."""
    model.state_dict()
    for name, parameter in model.named_parameters():
        put(parameter, f"{name} {seed}")
        if parameter.requires_grad:
            moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            for key, moment in moments.items():
                put(moment, f"{name} {key} {seed}")
            optimizer.state[parameter] = {"step": torch.tensor(float(seed)), **moments}


def put(target: Tensor, name: str) -> None:
    values = drawn(name, target.shape, target.dtype)
    if isinstance(target, DTensor):
        values = distribute_tensor(values, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(values)


def drawn(name: str, shape, dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))).to(dtype)


def state_of(model, optimizer) -> dict[str, Tensor]:
    """Everything, whole, as copies."""
    model.state_dict()
    whole = lambda tensor: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
    state = {}
    for name, parameter in model.named_parameters():
        state[name] = whole(parameter)
        state |= {f"{name} {key}": whole(value) for key, value in optimizer.state.get(parameter, {}).items()}
    return state


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    bits = lambda tensor: tensor.contiguous().reshape(-1).view(torch.uint8)
    return one.keys() == other.keys() and all(
        a.dtype == other[name].dtype and a.shape == other[name].shape and torch.equal(bits(a), bits(other[name]))
        for name, a in one.items()
    )


def holds(path: Path, seed: int) -> bool:
    """Whether a checkpoint of a Toy in one process is what `fill` with this seed makes."""
    found, expected = build(), build()
    fill(*expected, seed)
    record = load(path, *found)
    return record == {"step": seed} and same(state_of(*found), state_of(*expected))


def alone(root: Path, keep: int = 2, config=SMALL, companions=None, on_error="stop") -> Snapshots:
    return Snapshots(root, keep, 0, 1, None, config, companions, on_error)


def save(snapshots: Snapshots, *seeds: int) -> None:
    """A Toy at each of these steps, filled with the step as seed."""
    toy = build()
    for seed in seeds:
        fill(*toy, seed)
        snapshots.save(seed, *toy, {"step": seed})
        snapshots.wait()


def steps(root: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in root.glob("step-*"))


def hidden(root: Path) -> list[str]:
    return [path.name for path in root.iterdir() if path.name.startswith(".")]


# ------------------------------------------------------------------------------------------------ several ranks


def ranks(size: int, work, *args, killed: tuple[int, ...] = ()) -> None:
    """Run work(group, *args) on that many gloo ranks; all but the killed must end well."""
    store = Path(args[0]).parent / f"store-{time.monotonic_ns()}"
    processes = [PROCESSES.Process(target=_rank, args=(rank, size, str(store), work, args)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [-signal.SIGKILL if rank in killed else 0 for rank in range(size)]


def _rank(rank: int, size: int, store: str, work, args) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    work(dist.new_group(backend="gloo"), *args)
    dist.destroy_process_group()


def across(group, root: Path, keep: int = 2, on_error="stop", config=SMALL) -> Snapshots:
    return Snapshots(root, keep, dist.get_rank(), dist.get_world_size(), group, config, None, on_error)


# ------------------------------------------------------------------------------------------------ failing


def killer(phase: str, nth: int = 1):
    """A `_phase` that is the end of its process."""
    left = [nth]

    def end(name):
        left[0] -= name == phase
        if name == phase and not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    return end


def full_disk_at(phase: str):
    def fail(name):
        if name == phase:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return fail


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
