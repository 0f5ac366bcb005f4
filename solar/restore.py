"""Checkpoints of a training run read back: into a run, on any number of ranks, or exported as a model directory."""

import shutil
from collections.abc import Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from solar import cli
from solar.config import ModelConfig
from solar.directory import DEFAULT_MAX_SHARD_BYTES, copy_companions, dtype_name, write_config
from solar.elements import write_bytes
from solar.jsonfile import read_json
from solar.manifest import read_manifest, read_metadata, verify
from solar.optim import local
from solar.tensorfile import TensorToWrite, write_shards

PLAN = "upscale.json"  # of a grown model: which of its layers are new
UNFLATTENED = {"flatten_state_dict": False, "flatten_sharded_tensors": False}  # for DCP: names are names already


def parameter_names(model: nn.Module) -> dict[Tensor, str]:
    """Parameter (or buffer) -> its name; the first one, where tied weights have two."""
    names: dict[Tensor, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(tensor, name)
    return names


@torch.no_grad()
def load(
    step_dir: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    group: dist.ProcessGroup | None = None,
    verified: bool = False,
) -> dict[str, Any]:
    """Fill model and optimizer from a checkpoint, in place, bit for bit, and return the record of the run.

    Each rank reads its own parts, whatever number of ranks wrote them. group: to share the verification, which
    `verified` says `Snapshots.latest` has just done. Raises what `verify` raises, and ValueError if the checkpoint is
    of another model, or has moments of weights that are frozen now; weights that were frozen begin without moments.
    """
    step_dir = Path(step_dir)
    if not verified:
        verify(step_dir, group)
    manifest = read_manifest(step_dir)
    metadata = read_metadata(step_dir, manifest)
    names = parameter_names(model)
    parameters = {name: tensor for tensor, name in names.items()}
    options = {names[parameter]: options for options in optimizer.param_groups for parameter in options["params"]}
    state = {f"model.{name}": tensor.detach() for name, tensor in parameters.items()}
    _check_same_model(step_dir, metadata, state, trained=options.keys())

    moments: dict[str, dict[str, Tensor]] = {}
    for full_name in sorted(metadata.state_dict_metadata.keys() - state.keys()):
        name, _, key = full_name.removeprefix("optimizer.").rpartition(".")
        parameter, (shape, dtype) = parameters[name], _shape_and_dtype(metadata, full_name)
        if key == "step":  # torch wants it beside the parameter only where a kernel reads it
            beside = options[name].get("fused") or options[name].get("capturable")
            value = torch.zeros(shape, dtype=dtype, device=local(parameter).device if beside else "cpu")
        elif shape == tuple(parameter.shape):
            value = torch.zeros_like(parameter, dtype=dtype)
        else:
            raise ValueError(f"{step_dir}: {full_name} has another shape than its parameter: {_spell(shape, dtype)}")
        state[full_name] = moments.setdefault(name, {})[key] = value
    _read(step_dir, metadata, state)
    optimizer.state.clear()
    for name, values in moments.items():
        optimizer.state[parameters[name]] = values
    return manifest["record"]


def _check_same_model(step_dir: Path, metadata: Metadata, state: dict[str, Tensor], trained: Set[str]) -> None:
    """ValueError unless the weights in a checkpoint are those of `state`, and its moments belong to what is trained."""
    stored = metadata.state_dict_metadata
    problems = [f"{name} is not in it" for name in state.keys() - stored.keys()]
    for name in stored:
        if name in state:
            found, wanted = _shape_and_dtype(metadata, name), (tuple(state[name].shape), state[name].dtype)
            if found != wanted:
                problems.append(f"{name} is {_spell(*found)} in it, {_spell(*wanted)} in the model")
        elif name.startswith("model."):
            problems.append(f"{name} of it is not in the model")
        elif name.removeprefix("optimizer.").rpartition(".")[0] not in trained:
            problems.append(f"{name} of it belongs to nothing that is trained")
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ValueError(f"{step_dir} is of another model: {'; '.join(sorted(problems)[:3])}{more}")


def _read(step_dir: Path, metadata: Metadata, state: dict[str, Tensor]) -> None:
    """Fill the tensors, or this rank's parts of them, from whatever parts were stored."""
    reader, planner = FileSystemReader(step_dir), DefaultLoadPlanner(**UNFLATTENED)
    planner.set_up_planner(state, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    reader.read_data(planner.finish_plan(planner.create_local_plan()), planner).wait()


def _shape_and_dtype(metadata: Metadata, name: str) -> tuple[tuple[int, ...], torch.dtype]:
    entry = metadata.state_dict_metadata[name]
    return tuple(entry.size), entry.properties.dtype


def _spell(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{list(shape)} {str(dtype).removeprefix('torch.')}"


# ------------------------------------------------------------------------------------------------ exporting


def export(step_dir: str | Path, out: str | Path, dtype: str | torch.dtype | None = None, force: bool = False) -> Path:
    """Write a checkpoint's weights as a model directory in Hugging Face's layout, one tensor at a time.

    dtype: None keeps the one that was trained in. Tokenizer files and upscale.json go along. Needs no process group.
    Raises what `verify` raises, FileExistsError as `save_model` does, ValueError for a value that dtype cannot hold.
    """
    step_dir, dtype = Path(step_dir), dtype_name(dtype)
    cli.check_output(Path(out), force)
    verify(step_dir)
    metadata = read_metadata(step_dir, read_manifest(step_dir))
    config = ModelConfig.from_hf(read_json(step_dir / "config.json"))
    tensors = []
    for name, shape in config.tensor_shapes().items():
        if f"model.{name}" not in metadata.state_dict_metadata:
            raise ValueError(f"{step_dir}: {name} is missing, its config.json implies it")
        found, stored = _shape_and_dtype(metadata, f"model.{name}")
        if found != shape:
            raise ValueError(f"{step_dir}: {name} is {list(found)}, its config.json says {list(shape)}")

        def write(file, name=name, shape=shape, stored=stored) -> None:
            tensor = torch.empty(shape, dtype=stored)
            _read(step_dir, metadata, {f"model.{name}": tensor})
            cast = tensor.to(getattr(torch, dtype) if dtype else stored)
            if not cast.isfinite().all():
                raise ValueError(f"{name}: values up to {tensor.abs().max():.4g} do not fit {dtype}; use bfloat16")
            write_bytes(file, cast)

        tensors.append(TensorToWrite(name, shape, dtype or str(stored).removeprefix("torch."), write))
    with cli.publish(Path(out), force) as staging:
        write_shards(staging, tensors, DEFAULT_MAX_SHARD_BYTES)
        copy_companions(step_dir, staging)
        if (step_dir / PLAN).is_file():
            shutil.copyfile(step_dir / PLAN, staging / PLAN)
        write_config(staging, replace(config, torch_dtype=tensors[0].dtype))
    return Path(out)
