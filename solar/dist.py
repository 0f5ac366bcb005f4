"""Many processes, one model: PyTorch's torchrun and FSDP2, and what each rank reads of a checkpoint.

The only file that makes process groups. Each parameter is split along its first dimension over the ranks; before a
layer runs its parts are gathered, in the compute dtype, and freed again afterwards; gradients are summed in fp32 into
each rank's part (arXiv:2304.11277, arXiv:1910.02054). One process takes the same path with a group of one.
"""

import contextlib
import functools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from solar import cli
from solar.directory import CheckpointReader
from solar.elements import elements
from solar.model import Transformer

TIMEOUT = timedelta(minutes=60)  # of a collective: rank 0 may be hashing a checkpoint of a terabyte meanwhile


@dataclass(frozen=True)
class World:
    """This process among the others. `mesh` has the dimension "shard" and, with replicas, "replicate" before it."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    control: dist.ProcessGroup  # gloo, for Python objects
    background: dist.ProcessGroup  # gloo, for a thread that runs beside the training step
    restarts: int = 0  # how often torchrun has started the ranks again
    local_size: int = 1  # ranks on this machine

    @property
    def shards(self) -> int:
        return self.mesh["shard"].size()

    @property
    def shard(self) -> int:
        """Which of the shards this rank holds; in replicas several ranks hold the same."""
        return self.mesh.get_local_rank("shard")

    @property
    def replicas(self) -> int:
        return self.size // self.shards


def setup(device: str = "auto", sharding: str = "full") -> World:
    """Join the job that torchrun describes, or be a job of one process. Call `close` in the end.

    sharding: "full" splits parameters over all ranks; "hybrid" over those of one machine, each machine holding a copy
    (HSDP), so that only gradients travel between machines. Raises ValueError for a device that is not there, and for
    restarts in which the ranks of several machines would not find each other.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"--device {device}: training runs on auto, cpu or cuda; torchrun deals the GPUs to the ranks")
    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"rank {rank} wants GPU {local_rank}, this machine has {torch.cuda.device_count()}: "
                "lower --nproc-per-node, or --device cpu"
            )
        torch.cuda.set_device(local_rank)
    else:
        cli.keep_freed_memory()
    if sharding == "hybrid" and size % local_size:
        raise ValueError(f"--sharding hybrid wants as many ranks on each machine: {size} in all, {local_size} here")
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    if "RANK" in os.environ:
        # torchrun's own store outlives the ranks: new ones would find the old ones' addresses in it. But each machine's
        # torchrun counts its own restarts, so the count tells new from old on one machine only.
        outlives = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        several = int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1
        if outlives and several and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
            raise ValueError(
                "--max-restarts on several machines needs a new store for each start of the ranks: set "
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where torchrun is started"
            )
        store, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
        if outlives:
            store = dist.PrefixStore(f"attempt-{restarts}", store)
    else:
        store = dist.HashStore()
    dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=rank, world_size=size)
    if sharding == "hybrid":
        mesh = init_device_mesh(kind, (size // local_size, local_size), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(kind, (size,), mesh_dim_names=("shard",))
    here = torch.device(kind, local_rank) if kind == "cuda" else torch.device("cpu")
    control, background = (dist.new_group(backend="gloo", timeout=TIMEOUT) for _ in range(2))
    everywhere: list[int] = [0] * size
    dist.all_gather_object(everywhere, restarts, control)
    return World(rank, size, here, mesh, control, background, max(everywhere), local_size)


def close() -> None:
    dist.destroy_process_group()


@contextlib.contextmanager
def joined(device: str = "auto", sharding: str = "full") -> Iterator[World]:
    """`setup`, and `close` when all has gone well.

    A rank that fails while others wait for it leaves without closing: NCCL's way of closing may wait for them in turn,
    and the error would be shown by nobody.
    """
    world = setup(device, sharding)
    try:
        yield world
    except BaseException:
        if world.size == 1:
            close()
        raise
    close()


# ------------------------------------------------------------------------------------------------ the model


def shard(
    model: Transformer,
    world: World,
    compute_dtype: torch.dtype,
    recompute: str = "none",
    compile_layers: bool = False,
    cpu_offload: bool = False,
) -> None:
    """Prepare a model on the meta device for training: recomputation, compilation, FSDP, memory; in this order.

    Each layer is one unit that is gathered as a whole; embedding, last norm and vocabulary projection are another. The
    weights are uninitialised afterwards: see `load_weights`.

    recompute: "none" keeps all activations for the backward pass, "full" only each layer's input (arXiv:1604.06174),
    "selective" also what its matrix products and attention gave, and computes the cheap rest again.
    """
    for layer in model.model.layers:
        if recompute != "none":
            contexts = {} if recompute == "full" else {"context_fn": _keep_products}
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, **contexts)
        if compile_layers:
            layer.forward = torch.compile(layer.forward, dynamic=False)
    stored = next(model.parameters()).dtype
    # Inputs are not cast: the rotary tables come in fp32 and stay so, and the embedding's output has the right dtype.
    precision = MixedPrecisionPolicy(
        param_dtype=compute_dtype if compute_dtype != stored else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    offload = CPUOffloadPolicy() if cpu_offload else OffloadPolicy()
    if cpu_offload and hasattr(os, "sched_getaffinity"):  # the update runs on this rank's cores; torchrun leaves it one
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world.local_size))
    # Gathering a second time for the backward pass buys memory that only accelerators lack, for traffic they can hide.
    reshard = world.device.type != "cpu"
    for unit in [*model.model.layers, model]:
        fully_shard(
            unit, mesh=world.mesh, mp_policy=precision, offload_policy=offload,
            reshard_after_forward=reshard and unit is not model,
        )  # fmt: skip
    if world.size > 1:  # a rank alone has no mean to turn off, and would divide each gradient by 1
        for unit in model.modules():
            if isinstance(unit, FSDPModule):
                unit.set_gradient_divide_factor(1.0)  # gradients are summed; the step divides by the tokens it learned
                unit.set_force_sum_reduction_for_comms(True)  # else gloo is asked for an operation it does not have
    model.to_empty(device="cpu" if cpu_offload else world.device)


def free_gathered(model: Transformer) -> None:
    """Give back what a forward pass without a backward one has left gathered; parameters are shards again."""
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()


# What selective recomputation keeps: each costs a matrix product or more to make again.
KEPT = {
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "mkldnn::_linear_pointwise",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "solar::attention",
}


def _keep_products():
    def policy(_context, operator, *_args, **_kwargs):
        return CheckpointPolicy.MUST_SAVE if operator.name() in KEPT else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def sum_over_replicas(model: Transformer, wanted: bool) -> None:
    """Whether the next backward pass sums gradients over replicas, too: for all micro-batches together once will do."""
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(wanted)


@torch.no_grad()
def load_weights(model: Transformer, reader: CheckpointReader, world: World) -> None:
    """Fill a sharded model from a checkpoint, in place: each rank reads its own rows of each tensor and no others."""
    for name, parameter in model.named_parameters():
        part = parameter.to_local()
        start, stop = rows_of(parameter.shape[0], world)
        assert stop - start == part.shape[0], f"{name}: rows {start}-{stop}, the shard has {part.shape[0]}"
        width = math.prod(parameter.shape[1:])
        part.copy_(elements(reader.weights[name], start * width, stop * width).view(part.shape))


def rows_of(rows: int, world: World) -> tuple[int, int]:
    """The rows start..stop-1 of a tensor that this rank holds: FSDP cuts as torch.chunk does, the last may be short."""
    share, index = -(-rows // world.shards), world.shard
    return min(index * share, rows), min((index + 1) * share, rows)


# ------------------------------------------------------------------------------------------------ agreement


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of all ranks' tensors, in place, the same bits on each."""
    dist.all_reduce(tensor)
    return tensor


def from_all_ranks(value: Any, world: World) -> list:
    """Every rank's value, by rank."""
    values = [None] * world.size
    dist.all_gather_object(values, value, group=world.control)
    return values


def wait_for_all(world: World) -> None:
    dist.barrier(group=world.control)


@contextlib.contextmanager
def alone_in(directory: Path, world: World) -> Iterator[None]:
    """Make a directory and hold it for this job. ValueError, on all ranks, if another job is at work in it."""
    directory.mkdir(parents=True, exist_ok=True)
    # Not the directory itself: whoever publishes something inside locks that for a moment.
    with open(directory / ".running", "ab") as file:
        busy = world.rank == 0 and cli.is_busy(file.fileno())
        if any(from_all_ranks(busy, world)):
            raise ValueError(f"{directory}: another run is at work in it; wait for its end, or give another --out")
        yield
